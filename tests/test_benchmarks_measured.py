"""What the benchmark measures: times in turns, how many rounds, and peaks of memory."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tiny_benchmark import CASE, CPU, _tiny_configuration_without_peer, session  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floors, lean, measure, memory, peers, verify
from benchmarks.modes import call_of, draw_inputs
from benchmarks.peers import EAGER, OURS, Network
from dnc_triton import DNC
from dnc_triton.sequence import graphs

# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "order"), [(0.0, "abbaab"), (10.0, "abbbaaaabb")])
def test_peers_take_turns(short, order, monkeypatch):
    """Those whose calls are short make an untimed one before each that is timed, once it is known that they are."""
    monkeypatch.setattr(measure, "SHORT_SECONDS", short)
    calls = []
    runs = {peer: partial(calls.append, peer) for peer in "ab"}
    seconds = measure._time_in_turns(runs, session(rounds=3), {"a": 1, "b": 1})
    assert "".join(calls) == order
    assert {peer: len(times) for peer, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_call_that_is_made_before_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "SHORT_SECONDS", 10.0)

    def call():
        now[0] += 0.25

    assert measure._time_in_turns({"a": call}, session(rounds=3), {"a": 1}) == {"a": [0.25] * 3}
    assert now == [0.25 * 5]


def test_what_takes_long_gets_fewer_rounds():
    runs, once = {"a": lambda: time.sleep(0.002)}, {"a": 1}
    seconds = measure._time_in_turns(runs, session(rounds=1000, case_seconds=0.03), once)
    assert measure.LEAST_ROUNDS <= len(seconds["a"]) <= 16
    seconds = measure._time_in_turns({"a": lambda: None}, session(rounds=1000, case_seconds=0.0), once)
    assert len(seconds["a"]) == measure.LEAST_ROUNDS


def test_who_is_slow_gets_fewer_rounds_than_others(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.02)
    runs = {"slow": lambda: time.sleep(0.03), "fast": lambda: None}
    once = dict.fromkeys(runs, 1)
    seconds = measure._time_in_turns(runs, session(rounds=1000, case_seconds=0.0), once)
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 3, "fast": 5}
    seconds = measure._time_in_turns(runs, session(rounds=7, case_seconds=100.0), once)
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 7, "fast": 7}


def test_a_disturbance_makes_nobody_slow(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "SHORT_SECONDS", 0.0)
    took = iter([2 * measure.SLOW_SECONDS, *[0.1] * (measure.LEAST_ROUNDS - 1)])

    def call():
        now[0] += next(took)

    (times,) = measure._time_in_turns({"a": call}, session(rounds=20, case_seconds=-1.0), {"a": 1}).values()
    assert len(times) == measure.LEAST_ROUNDS


def test_who_is_fast_has_its_share_of_the_time_when_the_others_have_had_theirs(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.02)
    runs = {"slow": lambda: time.sleep(0.03), "fast": lambda: None}
    seconds = measure._time_in_turns(runs, session(rounds=20, case_seconds=0.05), dict.fromkeys(runs, 1))
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 3, "fast": 20}


def test_a_share_of_the_time_is_of_all_that_take_turns(monkeypatch):
    now = [0.0]
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: now[0])

    def call():
        now[0] += 0.125

    seconds = measure._time_in_turns({"a": call, "b": call}, session(rounds=100, case_seconds=2.0), {"a": 1, "b": 1})
    assert {name: len(times) for name, times in seconds.items()} == {"a": 9, "b": 9}


def test_once_all_time_is_up_who_is_slow_is_timed_once(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.02)
    runs = {"slow": lambda: time.sleep(0.03), "fast": lambda: None}
    up = session(rounds=20, case_seconds=100.0, deadline=0.0)
    seconds = measure._time_in_turns(runs, up, dict.fromkeys(runs, 1))
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 1, "fast": measure.LEAST_ROUNDS}
    up.device = torch.device("cuda")
    assert measure._calls_in_a_row({"slow": lambda: 1 / 0}, "training", up) == {"slow": 1}


@pytest.mark.parametrize(("name", "slow", "rounds"), [(EAGER, True, 1), (EAGER, False, 2), (OURS, True, 2)])
def test_who_is_slow_is_warmed_up_once_unless_it_has_graphs(monkeypatch, name, slow, rounds):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.0 if slow else 100.0)
    called = []
    monkeypatch.setattr(measure, "call_of", lambda mode, network, inputs: lambda: called.append(mode))
    monkeypatch.setattr(measure, "synchronize", lambda device: called.append("wait"))
    monkeypatch.setattr(measure, "_time_in_turns", lambda *arguments: {})
    measure.measure(CASE, [name], ["forward"], session())
    assert called == ["forward", "wait"] * rounds


def test_a_step_is_timed_from_the_middle_of_a_sequence():
    inputs, seen = draw_inputs(replace(CASE, steps=8), CPU), []

    def single(given, state):
        seen.append((given.tolist(), state))
        return given, (state or 0) + 1

    call = call_of("step", Network(torch.nn.Linear(1, 1), None, single=single), inputs)
    assert seen == [(inputs[:, step].tolist(), step or None) for step in range(5)]
    seen.clear()
    call()
    call()
    assert seen == [(inputs[:, 0].tolist(), 5)] * 2


def test_percentiles_and_what_follows_from_them():
    row = measure.Row(CASE, "training", OURS, "measured")
    seconds = [0.003 * i for i in range(1, 12)]  # 1 to 11 ms a step
    ours = [x / 2 for x in seconds[:-1]] + [1.0]  # one of them disturbed
    timed = measure._timed(row, seconds, ours, session(bytes_per_second=1e6))
    percentiles = timed.ms_per_step_p20, timed.ms_per_step_p50, timed.ms_per_step_p80
    assert percentiles == pytest.approx((3, 6, 9))
    assert (timed.rounds, timed.ratio) == (11, pytest.approx(2))
    assert timed.floor_bytes == 2 * (8 * 36 + 8 * 24 + 12 * 36 + 12 * 24)
    assert timed.bytes_per_second == pytest.approx(timed.floor_bytes / 0.006)
    assert timed.floor_share == pytest.approx(timed.bytes_per_second / 1e6)
    step = measure._timed(replace(row, mode="step"), seconds, None, session())
    assert (step.ms_per_step_p50, step.ratio, step.floor_bytes) == (pytest.approx(18), None, 2 * (8 * 36 + 8 * 24))


@pytest.mark.parametrize(("names", "ratios"), [(["lstm", OURS], [0.5, 1.0]), (["lstm", EAGER], [None, None])])
def test_a_ratio_is_over_our_layer(names, ratios, monkeypatch):
    """Whoever comes first; and there is none without it."""
    monkeypatch.setattr(measure, "_time_in_turns", lambda runs, *others: dict(zip(runs, ([1.0], [2.0]), strict=True)))
    assert [row.ratio for row in measure.measure(CASE, names, ["step"], session())] == ratios


@pytest.mark.parametrize("num_layers", [1, 2])
def test_what_a_step_computes(num_layers):
    """Its products, as PyTorch counts those of the reference; and what goes over link and memory number by number."""
    case = replace(CASE, num_layers=num_layers)
    dnc = peers.dnc_layer(case, CPU, EAGER)
    state = tree_map(lambda x: x.requires_grad_(), dnc.initial_state(case.batch))
    inputs = torch.randn(case.batch, case.input_size, requires_grad=True)
    links, words, row = case.memory_size**2, case.memory_size * case.word_size, case.num_reads * case.memory_size
    by_product_as_well = case.batch * (2 * words + 6 * row)  # w vᵀ, and to add up the three ways to read
    with FlopCounterMode(display=False) as counter:
        loss = sum(x.sum() for x in tree_leaves(dnc.step(inputs, state)))
    assert floors.products(case) == counter.get_total_flops() - by_product_as_well
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert 2 * floors.products(case) == counter.get_total_flops() - 2 * by_product_as_well
    passes = case.batch * (4 * links + 6 * words), case.batch * (13 * links + 18 * words)
    assert floors.operations(case, "forward") == floors.products(case) + passes[0]
    assert floors.operations(case, "training") == 3 * floors.products(case) + passes[1]


def test_speeds_are_of_the_median_call_but_for_the_first(monkeypatch):
    took = [9.0, 0.001, 0.007, 0.002, 0.004, 0.006, 0.003, 0.005]
    ticks = [tick for start, seconds in enumerate(took) for tick in (10.0 * start, 10.0 * start + seconds)]
    for speed, count in ((floors.copy_speed, 2 * 2**20), (floors.product_speed, 2 * 128**3)):
        clock = iter(ticks)
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: next(clock))
        assert speed(CPU) == pytest.approx(count / 0.004)


def test_speeds_are_of_all_that_is_copied_and_computed(monkeypatch):
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), named=None):
            if operation is torch.ops.aten.copy_.default:
                copied.extend(tensor.nbytes for tensor in given)
            return operation(*given, **named or {})

    monkeypatch.setattr(floors, "_seconds", lambda call, device: call() is None or 1.0)
    with Copies():
        assert floors.copy_speed(CPU) == sum(copied) > 0
    with FlopCounterMode(display=False) as counter:
        assert floors.product_speed(CPU) == counter.get_total_flops() > 0


def test_a_speed_waits_for_the_device_before_and_after_each_call(monkeypatch):
    happened = []
    monkeypatch.setattr(floors, "synchronize", lambda device: happened.append("wait"))
    floors._seconds(lambda: happened.append("call"), CPU)
    assert happened == ["wait", "call", "wait"] * (floors.REPEATS + 1)


def test_compiling_has_a_budget(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, options: step)
    for settings in ({"compile_seconds": 0.0}, {"deadline": time.monotonic() + 30}):
        rows = {row.peer: row for row in measure.measure(CASE, [OURS, "compiled"], ["step"], session(**settings))}
        assert (rows[OURS].status, rows["compiled"].status) == ("measured", "left out")
        assert rows["compiled"].note == "compiled: not timed where the time for compiling was up"
    spent = session(compile_seconds=1e-9)
    measure.measure(CASE, ["compiled"], ["step"], spent)
    assert spent.compile_seconds < 0


@pytest.mark.parametrize(("name", "status"), [("compiled", "left out"), ("compiled_cuda_graphs", "measured")])
def test_shortly_before_the_end_compiles_who_can_be_stopped(name, status):
    """What runs in a process of its own."""
    network, inputs = peers.make_layer(CASE, CPU, backend=EAGER), draw_inputs(CASE, CPU)
    truth = verify.find_truth(CASE, inputs, ["forward"])
    soon = session(deadline=time.monotonic() + 30)
    assert measure._check(CASE, "forward", name, network, truth, inputs, soon)[0].status == status


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "mode", "peer", "told"),
    [
        ("cpu", "training", OURS, True),
        ("cuda", "forward", "compiled", True),
        ("cpu", "forward", OURS, False),
        ("cpu", "training", "compiled", False),
        ("cuda", "training", "compiled_cuda_graphs", False),
    ],
)
def test_memory_that_there_was_no_time_for_is_told(device, mode, peer, told):
    """Where it would have been measured."""
    row = measure.Row(CASE, mode, peer, "measured")
    over = session(device=torch.device(device), deadline=0.0)
    note = f"the memory of {peer} on tiny, {mode}: the time is up"
    assert measure._with_peak(row, None, None, over) == replace(row, note=note if told else "")


@pytest.mark.parametrize(("asked", "modes"), [(True, ["training", "forward"]), (False, [])])
def test_memory_is_measured_of_whole_sequences_where_it_is_asked_for(asked, modes, monkeypatch):
    done = []
    monkeypatch.setattr(measure, "_with_peak", lambda row, *others: done.append(row.mode) or row)
    measure.measure(CASE, [OURS], ["step", "training", "forward"], session(peak_memory=asked))
    assert done == modes


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")
def test_peak_of_memory_on_a_cpu_is_a_process_growth():
    """Of a network whose kept links are counted easily: at least one N² tensor per step, at most 40."""
    case = replace(CASE, memory_size=256, batch=4, steps=6, num_layers=1)
    links = case.batch * case.steps * case.memory_size**2 * 4
    grown = memory.cpu_peak(case, EAGER, "training", threads=1)
    assert links < grown < 40 * links


def test_what_training_took_of_memory(monkeypatch):
    """The committed results: a thousand steps in 8 GB, N = 512 in half of the reference's. Here only that it runs."""
    content = json.loads(lean.RESULT.read_text(encoding="utf-8"))
    rows = content["rows"]
    for row, (backend, steps, checkpoint, sizes) in zip(rows, lean.CASES, strict=True):
        assert {"backend": backend, "steps": steps, "checkpoint": checkpoint, **sizes}.items() <= row.items()
        assert row["finite"]
    eager, _, large, compiled, long = (row["grown_bytes"] for row in rows)
    assert long < 8e9
    assert max(large, compiled) < eager / 2
    assert {"date", "cpu", "torch", "commit", "command"} <= content["machine"].keys()
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    small = dict(batch=2, memory_size=5, word_size=3, num_reads=2, hidden_size=4, features=3)
    again = lean.train_once("auto", 4, 2, small)
    assert again.keys() == rows[0].keys()
    assert again["finite"]


def test_the_peak_on_a_cpu_is_of_what_is_asked_for(monkeypatch):
    """With this process in the place of the one that it starts."""

    class Here:
        def __init__(self, workers, mp_context):
            assert workers == 1

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def submit(self, call, *arguments):
            return SimpleNamespace(result=lambda: call(*arguments))

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(memory, "_growth", lambda *arguments: arguments)
    assert memory.cpu_peak(CASE, "lstm", "forward", 3) == (CASE, "lstm", "forward", 3)


class Counted(DNC):
    """Notes each call, and has one gradient that is not finite."""

    calls: ClassVar[list[tuple[int, object, bool]]] = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.output.bias.register_hook(lambda gradient: gradient / 0)

    def forward(self, inputs):
        self.calls.append((inputs.shape[1], self.checkpoint, any(x.grad is not None for x in self.parameters())))
        return super().forward(inputs)


def test_what_training_takes_of_memory_is_what_it_adds(monkeypatch):
    """On a CPU, to what the process held before, when there is no gradient yet. One that is not finite is told."""
    monkeypatch.setattr(Counted, "calls", [])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(lean, "DNC", Counted)
    monkeypatch.setattr(lean, "most_held", lambda: 100 + 30 * len(Counted.calls))
    small = dict(batch=2, memory_size=5, word_size=3, num_reads=2, hidden_size=4, features=3)
    row = lean.train_once("auto", 4, 2, small)
    assert Counted.calls == [(1, 2, False), (4, 2, False)]
    assert (row["grown_bytes"], row["finite"]) == (30, False)


def test_lean_memory_is_written_as_it_is_measured(tmp_path, monkeypatch, capsys):
    def train_once(backend, steps, checkpoint, sizes, device):
        if checkpoint == "auto":
            raise KeyboardInterrupt
        return {"backend": backend, "checkpoint": checkpoint, "grown_bytes": 1_234_000_000, "finite": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lean, "describe_machine", lambda command: {"threads": 7})
    monkeypatch.setattr(lean, "train_once", train_once)
    with pytest.raises(KeyboardInterrupt):
        lean.main(["--device", "cuda", "--output", str(tmp_path / "lean-gpu.json")])
    content = json.loads((tmp_path / "lean-gpu.json").read_text(encoding="utf-8"))
    assert [row["backend"] for row in content["rows"]] == ["reference"]
    assert content["machine"]["threads"] == 1
    assert capsys.readouterr().out == "reference, N = 256, T = 256, checkpoint = None: 1,234 MB\n"


def test_lean_memory_on_a_gpu(tmp_path, monkeypatch, capsys):
    """On the CPU in its place; what a call takes is made up."""
    assert lean.main(["--device", "cuda"]) == 2
    assert "There is no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lean.main(["--output", str(tmp_path)])
    assert "--output: expected a file, got the folder" in capsys.readouterr().err
    exact, peaks, out = lean.train_once, iter([100, 30, 30, 7e9]), tmp_path / "lean-gpu.json"
    small = dict(batch=2, memory_size=5, word_size=3, num_reads=2, hidden_size=4, features=3)

    def train_once(backend, steps, checkpoint, sizes, device):
        long, short = (1000, 32, 256), (256, 16, 256)
        assert (steps, sizes["batch"], sizes["memory_size"]) == (long if checkpoint == 32 else short)
        if checkpoint == 16:
            raise torch.OutOfMemoryError("CUDA out of memory.\nAnd more")
        return exact(backend, 4, checkpoint, small, device) | {"steps": steps}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lean, "describe_machine", lambda command: {"command": command})
    monkeypatch.setattr(lean, "train_once", train_once)
    monkeypatch.setattr(lean, "gpu_peak", lambda call, module: call() or next(peaks))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "to", lambda self, device: self)
    assert lean.main(["--device", "cuda", "--output", str(out)]) == 1, "one is missing"
    content = json.loads(out.read_text(encoding="utf-8"))
    kept = [(row["backend"], row["checkpoint"], row["grown_bytes"]) for row in content["rows"]]
    assert kept == [("reference", None, 100), ("auto", "auto", 30), ("auto", None, 30), ("auto", 32, 7e9)]
    assert all(row["finite"] for row in content["rows"])
    printed = capsys.readouterr().out
    assert "checkpoint = 16: not measured: OutOfMemoryError: CUDA out of memory." in printed
    assert "everything kept | ≤ 0.333 | 0.3 | reached |" in printed
    assert "every 16th step kept | ≤ 0.1 | | not measured |" in printed
    assert "every 32nd step kept | ≤ 8 | 7 | reached |" in printed


@pytest.mark.parametrize(("failing", "status", "left"), [(["reference"], 1, 4), (["reference", "auto"], 2, 0)])
def test_a_failure_in_lean_memory_costs_the_others_nothing(tmp_path, monkeypatch, capsys, failing, status, left):
    out = tmp_path / "lean-gpu.json"
    out.write_text("before")

    def train_once(backend, steps, checkpoint, sizes, device):
        if backend in failing:
            raise RuntimeError
        return {"backend": backend, "steps": steps, "checkpoint": checkpoint, "grown_bytes": 7, "finite": True}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lean, "describe_machine", lambda command: {})
    monkeypatch.setattr(lean, "train_once", train_once)
    assert lean.main(["--device", "cuda", "--output", str(out)]) == status
    assert capsys.readouterr().out.count("not measured: RuntimeError") == len(lean.GPU_CASES) - left
    text = out.read_text(encoding="utf-8")
    assert len(json.loads(text)["rows"]) == left if left else text == "before"


def test_lean_memory_with_gradients_that_are_not_finite_is_no_success(tmp_path, monkeypatch, capsys):
    def train_once(backend, steps, checkpoint, sizes, device):
        finite = checkpoint != 16
        return {"backend": backend, "steps": steps, "checkpoint": checkpoint, "grown_bytes": 7, "finite": finite}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lean, "describe_machine", lambda command: {})
    monkeypatch.setattr(lean, "train_once", train_once)
    assert lean.main(["--device", "cuda", "--output", str(tmp_path / "lean-gpu.json")]) == 1
    assert capsys.readouterr().out.count("0 MB, not finite\n") == 1


def test_peak_of_memory_on_a_gpu_is_beyond_what_was_there(monkeypatch):
    """On a stream where our layer launches plainly, with the choices that it makes on the default one."""
    done, linear = [], torch.nn.Linear(1, 1)

    @contextmanager
    def aside():
        done.append("aside")
        yield
        done.append("back")

    def call():
        assert linear.weight.grad is None
        linear.weight.grad = torch.ones(1, 1)
        done.append("call, graphs " + os.environ.get("DNC_TRITON_GRAPHS", "as ever"))

    monkeypatch.setattr(memory, "aside", aside)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 130)
    assert memory.gpu_peak(call, linear) == 30
    assert done == ["aside", "call, graphs as ever", "reset", "call, graphs as ever", "back"]


def test_a_layer_without_graphs(monkeypatch):
    monkeypatch.setenv("DNC_TRITON_GRAPHS", "1")
    network = peers.make_layer(CASE, CPU, backend="torch_sequence", graphs=False)
    asked = []

    def forward(key, given, run, handed):
        asked.append(os.environ["DNC_TRITON_GRAPHS"])
        return run(given)

    monkeypatch.setattr(graphs, "forward", forward)
    inputs = draw_inputs(CASE, CPU)
    _, state = network.run(inputs, None)
    network.step(inputs[:, 0], state)
    assert asked == ["0", "0"]
    assert os.environ["DNC_TRITON_GRAPHS"] == "1"


def test_cuda_graphs_hide_their_memory_and_everybody_else_is_counted(monkeypatch):
    monkeypatch.setattr(measure, "gpu_peak", lambda call, module: 7)
    network = Network(torch.nn.Linear(1, 1), lambda inputs, state: (inputs, state))
    cuda = session(device=torch.device("cuda"))
    for name, peak in ((OURS, 7), ("lstm", 7), ("compiled", 7), ("compiled_cuda_graphs", None)):
        row = measure.Row(CASE, "training", name, "measured")
        assert measure._with_peak(row, network, lambda: None, cuda).peak_bytes == peak


def test_on_a_cpu_the_memory_of_a_compiler_does_not_count(monkeypatch):
    monkeypatch.setattr(measure, "cpu_peak", lambda *arguments: 7)
    network = Network(torch.nn.Linear(1, 1), lambda inputs, state: (inputs, state))
    for name, peak in ((OURS, 7), ("torch_sequence", 7), ("torch_compiled", None), ("compiled", None)):
        row = measure.Row(CASE, "training", name, "measured")
        assert measure._with_peak(row, network, lambda: None, session()).peak_bytes == peak
