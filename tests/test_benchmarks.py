"""The benchmark runs, says what it measured, and times nothing that is wrong or missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain
from types import ModuleType

import pytest
import torch

from benchmarks import apart, floors, lean, measure, memory, modes, peers, verify
from benchmarks.__main__ import main
from benchmarks.configurations import (
    BASE,
    CONFIGURATIONS,
    SWEEPS,
    SWEPT,
    Configuration,
    LeftOutError,
    case_of,
    sweep_cases,
)
from benchmarks.modes import CAPTURED, MODES, call_of, draw_inputs, modes_on
from benchmarks.peers import EAGER, OURS, MissingPeerError, Network, all_peers
from dnc_triton.dispatch import BACKENDS
from dnc_triton.sequence import graphs

CPU = torch.device("cpu")
TINY = Configuration(
    source="tests",
    memory_size=6,
    word_size=4,
    num_reads=2,
    hidden_size=5,
    input_size=3,
    output_size=2,
    published_batch="any",
    published_steps="any",
    cpu_batch=2,
    cpu_steps=3,
    gpu_batch=4,
    gpu_steps=7,
    num_layers=2,
)
CASE = case_of("tiny", TINY, "cpu")
QUICK = [OURS, EAGER, "pypi_dnc", "lstm"]
COLUMNS = [
    *("configuration", "sweep", "source", "batch", "steps", "memory_size", "word_size", "num_reads", "hidden_size"),
    *("num_layers", "input_size", "output_size", "dtype", "mode", "peer", "status", "backend", "error"),
    *("allowed_error", "rounds", "ms_per_step_p20", "ms_per_step_p50", "ms_per_step_p80", "ratio", "peak_bytes"),
    *("floor_bytes", "bytes_per_second", "floor_share", "note"),
    *("device", "cpu", "gpu", "threads", "load", "python", "torch", "triton", "commit", "date"),
]


@pytest.fixture(autouse=True)
def _tiny_configuration_without_peer(monkeypatch):
    """A configuration "tiny", no package `dnc` to import, no GPU, and torch's threads put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(CONFIGURATIONS, "tiny", TINY)
    monkeypatch.setitem(sys.modules, "dnc", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(floors, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    torch.set_num_threads(threads)


def session(**settings):
    usual = dict(device=CPU, bytes_per_second=1e9, rounds=1, case_seconds=1.0, compile_seconds=1.0, peak_memory=False)
    return measure.Session(**{**usual, **settings})


def run(folder, *arguments):
    """Exit status, rows of the CSV, content of the JSON."""
    usual = ["--configurations", "tiny", "--peers", ",".join(QUICK), "--rounds", "1", "--no-memory"]
    status = main(["run", *usual, "--output", str(folder), *arguments])
    (csv_file,), (json_file,) = folder.glob("cpu-*.csv"), folder.glob("cpu-*.json")
    with csv_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return status, rows, json.loads(json_file.read_text(encoding="utf-8"))


# --- a run ------------------------------------------------------------------------------------------------------------


def test_results_have_their_schema_and_a_missing_peer_is_named(tmp_path, capsys):
    status, rows, content = run(tmp_path, "--threads", "1")
    assert status == 0
    assert set(MODES) - set(modes_on("cpu")) == {CAPTURED}
    assert [(row["mode"], row["peer"]) for row in rows] == [(mode, peer) for mode in modes_on("cpu") for peer in QUICK]
    assert all(list(row) == COLUMNS for row in rows)

    for row in rows:
        if row["peer"] == "pypi_dnc":
            message = "dnc is not installed; install it with: pip install --no-deps dnc==2.0.0b1"
            assert (row["status"], row["note"], row["ms_per_step_p50"]) == ("missing", message, "")
            continue
        assert (row["status"], row["note"]) == ("measured", "")
        assert 0 < float(row["ms_per_step_p20"]) <= float(row["ms_per_step_p50"]) <= float(row["ms_per_step_p80"])
        assert float(row["ratio"]) > 0
        assert (row["error"] == "") == (row["floor_bytes"] == "") == (row["peer"] == "lstm")
        if row["error"]:
            assert 0 < float(row["error"]) <= float(row["allowed_error"]) < 2 * verify.ALLOWED_ERROR
    assert {row["backend"] for row in rows if row["peer"] == OURS} <= set(BACKENDS)

    machine = content["machine"]
    assert list(machine) == [
        *("device", "date", "command", "commit", "cpu", "cores", "threads", "load", "system", "python"),
        *("torch", "triton", "gpu", "cuda", "cudnn", "dnc_triton", "bytes_per_second"),
    ]
    assert machine["command"].startswith("python -m benchmarks run --configurations tiny")
    assert (machine["device"], machine["threads"], machine["gpu"]) == ("cpu", 1, None)
    means = [key for key in COLUMNS if key in machine and key != "bytes_per_second"]
    flat = [{**row, **{key: machine[key] for key in means}} for row in content["rows"]]
    assert [{key: "" if x is None else str(x) for key, x in row.items()} for row in flat] == rows

    printed = capsys.readouterr().out
    assert "tiny (6, 4, 2, 2×5; 2, 3)" in printed
    assert message in printed


def test_everybody_runs(monkeypatch):
    """With a compiler that leaves the code as it is: what is around it. A backend with its own takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda step, mode: step)
    peers = [peer for peer in all_peers() if peer != "torch_compiled"]
    rows = measure.measure(CASE, peers, modes_on("cpu"), session(compile_seconds=100.0))
    statuses = {peer: {row.status for row in rows if row.peer == peer} for peer in peers}
    assert statuses.pop("pypi_dnc") == statuses.pop("compiled_cuda_graphs") == {"missing"}
    kernels = [name for name in statuses if name.startswith(("triton_fused", "triton_split"))]
    assert len(kernels) == 4
    assert all(statuses.pop(name) == {"declined"} for name in kernels)
    assert all(status <= {"measured", "declined"} for status in statuses.values()), statuses
    assert statuses[OURS] == statuses[EAGER] == statuses["compiled"] == {"measured"}
    notes = {row.note for row in rows}
    assert "CUDA graphs need a GPU" in notes
    assert "triton_split: device is the CPU, and TRITON_INTERPRET=1 is not set" in notes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("sweep", ["B", "N", "T"])
def test_a_sweep_changes_one_size(sweep, device):
    base = case_of("base", BASE, device)
    cases = sweep_cases([sweep], device)
    assert len(cases) == len(SWEEPS[sweep][device])
    for case in cases:
        size = int(case.configuration.removeprefix(f"base/{sweep}="))
        assert case == replace(base, configuration=case.configuration, sweep=sweep, **{SWEPT[sweep]: size})


def test_a_sweep_is_trained_by_few(tmp_path, monkeypatch):
    monkeypatch.setitem(SWEEPS, "N", {"cpu": (2, 3), "cuda": ()})
    arguments = ["--configurations", "", "--sweeps", "N", "--rounds", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0  # `run` goes without saying
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    swept = [name for name, peer in all_peers().items() if peer.sweeps]
    names = [(f"base/N={size}", "training", peer) for size in (2, 3) for peer in swept]
    assert [(row["configuration"], row["mode"], row["peer"]) for row in rows] == names
    if sys.platform != "win32":
        assert all(row["peak_bytes"] >= 0 for row in rows)


def test_a_configuration_for_gpus_is_said_to_be_left_out(tmp_path, capsys):
    _, rows, content = run(tmp_path, "--configurations", "nature_babi_wide")
    assert rows == []
    assert content["left_out"] == ["nature_babi_wide: too large for a CPU, it is measured on a GPU"]
    assert content["left_out"][0] in capsys.readouterr().out
    case = case_of("tiny", TINY, "cuda")
    assert (case.batch, case.steps) == (4, 7)
    with pytest.raises(LeftOutError):
        case_of("huge", replace(TINY, cpu_batch=0), "cpu")


# --- right or wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [float("nan"), 1.0])
def test_a_wrong_layer_gets_no_time(tmp_path, monkeypatch, capsys, off):
    monkeypatch.setattr(verify, "error", lambda network, mode, truth: off)
    status, rows, _ = run(tmp_path, "--modes", "forward")
    assert status == 1
    assert [row["status"] for row in rows] == ["wrong", "wrong", "missing", "wrong"]
    assert not any(row["ms_per_step_p50"] for row in rows)
    assert f"{OURS} is wrong on tiny, forward: off by {off:.1e}" in capsys.readouterr().out


def test_another_wrong_network_costs_the_others_nothing(monkeypatch):
    exact = peers.make_layer

    def off(case, device, *, backend):
        network = exact(case, device, backend=backend)
        return replace(network, run=lambda inputs, state: (network.run(inputs, state)[0] * 1.01, None))

    peer = replace(all_peers()[EAGER], make=partial(off, backend=EAGER))
    known = {**all_peers(), EAGER: peer}
    monkeypatch.setattr(measure, "all_peers", lambda: known)
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, EAGER], ["training"], session())}
    assert (rows[OURS].status, rows[EAGER].status) == ("measured", "wrong")
    assert rows[EAGER].ms_per_step_p50 is None
    assert "reference is wrong on tiny, training: off by" in rows[EAGER].note


@pytest.mark.parametrize("parameter", ["interface.weight", "output.bias"])
def test_a_wrong_gradient_is_noticed(parameter):
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["training"])
    network = peers.make_layer(CASE, CPU, backend="auto")
    assert verify.error(network, "training", truth) <= truth.allowed["training"]
    network.module.get_parameter(parameter).register_hook(lambda gradient: gradient * 1.001)
    assert verify.error(network, "training", truth) > truth.allowed["training"]


def test_a_state_that_is_lost_is_noticed():
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["step"])
    layer = peers.make_layer(CASE, CPU, backend="auto").module
    assert verify.error(Network(layer, layer), "step", truth) <= truth.allowed["step"]
    forgetful = Network(layer, lambda inputs, state: layer(inputs, None))
    assert verify.error(forgetful, "step", truth) > truth.allowed["step"]


def test_a_poor_reference_does_not_widen_the_tolerance_at_will(monkeypatch):
    monkeypatch.setattr(verify, "error", lambda network, mode, truth: 0.5)
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["forward"])
    assert truth.allowed["forward"] <= verify.ALLOWED_ERROR + 2 * verify.REFERENCE_LIMIT


def test_a_peer_that_breaks_costs_the_others_nothing(monkeypatch):
    def broken(case, device):
        def run(inputs, state):
            raise RuntimeError("no memory left\nand many more lines")

        return Network(torch.nn.Linear(1, 1), run)

    known = {**all_peers(), "lstm": replace(all_peers()["lstm"], make=broken)}
    monkeypatch.setattr(measure, "all_peers", lambda: known)
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, "lstm"], ["step"], session())}
    assert rows[OURS].status == "measured"
    assert (rows["lstm"].status, rows["lstm"].ms_per_step_p50) == ("failed", None)
    assert rows["lstm"].note == "lstm failed on tiny: RuntimeError: no memory left"


def test_an_oracle_that_breaks_leaves_the_case_without_times(monkeypatch):
    monkeypatch.setattr(verify, "find_truth", lambda *arguments: 1 / 0)
    rows = measure.measure(CASE, [OURS], list(MODES), session())
    assert [(row.mode, row.status) for row in rows] == [(mode, "failed") for mode in MODES]
    assert rows[0].note == "the oracle failed on tiny: ZeroDivisionError: division by zero"


def test_another_version_of_the_peer_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dnc", ModuleType("dnc"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    with pytest.raises(MissingPeerError, match=r"dnc is installed in version 1\.0; install it with"):
        peers.make_pypi_dnc(CASE, CPU)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(MissingPeerError, match=r"torch\.compile needs a C\+\+ compiler, none of g\+\+, clang\+\+"):
        all_peers()["compiled"].make(CASE, CPU)


# --- the clock --------------------------------------------------------------------------------------------------------


def test_peers_take_turns():
    calls = []
    runs = {peer: partial(calls.append, peer) for peer in "ab"}
    seconds = measure._time_in_turns(runs, session(rounds=3))
    assert "".join(calls) == "abbaab"
    assert {peer: len(times) for peer, times in seconds.items()} == {"a": 3, "b": 3}


def test_what_takes_long_gets_fewer_rounds():
    seconds = measure._time_in_turns({"a": lambda: time.sleep(0.002)}, session(rounds=1000, case_seconds=0.03))
    assert measure.LEAST_ROUNDS <= len(seconds["a"]) <= 16
    seconds = measure._time_in_turns({"a": lambda: None}, session(rounds=1000, case_seconds=0.0))
    assert len(seconds["a"]) == measure.LEAST_ROUNDS


def test_who_is_slow_gets_fewer_rounds_than_others(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.02)
    runs = {"slow": lambda: time.sleep(0.03), "fast": lambda: None}
    seconds = measure._time_in_turns(runs, session(rounds=1000, case_seconds=0.0))
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 3, "fast": 5}
    seconds = measure._time_in_turns(runs, session(rounds=7, case_seconds=100.0))
    assert {name: len(times) for name, times in seconds.items()} == {"slow": 7, "fast": 7}


@pytest.mark.parametrize(("name", "slow", "rounds"), [(EAGER, True, 1), (EAGER, False, 2), (OURS, True, 2)])
def test_who_is_slow_is_warmed_up_once_unless_it_has_graphs(monkeypatch, name, slow, rounds):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.0 if slow else 100.0)
    called = []
    monkeypatch.setattr(measure, "call_of", lambda mode, network, inputs: lambda: called.append(mode))
    monkeypatch.setattr(measure, "_time_in_turns", lambda runs, session: {})
    measure.measure(CASE, [name], ["forward"], session())
    assert called == ["forward"] * rounds


def test_percentiles_and_what_follows_from_them():
    row = measure.Row(CASE, "training", OURS, "measured")
    seconds = [0.003 * i for i in range(1, 12)]  # 1 to 11 ms a step
    timed = measure._timed(row, seconds, [x / 2 for x in seconds], session(bytes_per_second=1e6))
    percentiles = timed.ms_per_step_p20, timed.ms_per_step_p50, timed.ms_per_step_p80
    assert percentiles == pytest.approx((3, 6, 9))
    assert (timed.rounds, timed.ratio) == (11, pytest.approx(2))
    assert timed.floor_bytes == 2 * (8 * 36 + 8 * 24 + 12 * 36 + 8 * 24)
    assert timed.bytes_per_second == pytest.approx(timed.floor_bytes / 0.006)
    assert timed.floor_share == pytest.approx(timed.bytes_per_second / 1e6)
    step = measure._timed(replace(row, mode="step"), seconds, None, session())
    assert (step.ms_per_step_p50, step.ratio, step.floor_bytes) == (pytest.approx(18), None, 2 * (8 * 36 + 8 * 24))


def test_after_the_time_is_up_nothing_is_started(tmp_path, capsys):
    status, rows, content = run(tmp_path, "--seconds", "0")
    assert (status, rows) == (0, [])
    assert content["left_out"] == [f"tiny, {mode}: the time is up" for mode in modes_on("cpu")]
    assert "- tiny, training: the time is up" in capsys.readouterr().out


def test_compiling_has_a_budget(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, mode: step)
    for settings in ({"compile_seconds": 0.0}, {"deadline": time.monotonic() + 30}):
        rows = {row.peer: row for row in measure.measure(CASE, [OURS, "compiled"], ["step"], session(**settings))}
        assert (rows[OURS].status, rows["compiled"].status) == ("measured", "left out")
        assert rows["compiled"].note == "compiled, where it has no time: that for compiling was spent"
    spent = session(compile_seconds=1e-9)
    measure.measure(CASE, ["compiled"], ["step"], spent)
    assert spent.compile_seconds < 0


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not tell")
def test_peak_of_memory_on_a_cpu_is_a_process_growth():
    """Of a network whose kept links are counted easily: at least one N² tensor per step, at most 40."""
    case = replace(CASE, memory_size=256, batch=4, steps=6, num_layers=1)
    links = case.batch * case.steps * case.memory_size**2 * 4
    grown = memory.cpu_peak(case, EAGER, "training", threads=1)
    assert links < grown < 40 * links


def test_what_training_took_of_memory(monkeypatch):
    """As measured and committed: a thousand steps in 8 GB, N = 512 in half of the reference's. Here that it runs."""
    content = json.loads(lean.RESULT.read_text(encoding="utf-8"))
    rows = content["rows"]
    for row, (backend, steps, checkpoint, sizes) in zip(rows, lean.CASES, strict=True):
        assert {"backend": backend, "steps": steps, "checkpoint": checkpoint, **sizes}.items() <= row.items()
        assert row["finite"]
    eager, *_, large, long = (row["grown_bytes"] for row in rows)
    assert long < 8e9
    assert large < eager / 2
    assert {"date", "cpu", "torch", "commit", "command"} <= content["machine"].keys()
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    small = dict(batch=2, memory_size=5, word_size=3, num_reads=2, hidden_size=4, features=3)
    again = lean.train_once("auto", 4, 2, small)
    assert again.keys() == rows[0].keys()
    assert again["finite"]
    assert again["grown_bytes"] >= 0


def test_lean_memory_on_a_gpu(tmp_path, monkeypatch, capsys):
    """On the CPU in its place; the count of a call is made up."""
    assert lean.main(["--device", "cuda"]) == 2
    assert "There is no GPU here" in capsys.readouterr().err
    exact, peaks, out = lean.train_once, iter([100, 30, 30]), tmp_path / "lean-gpu.json"
    small = dict(batch=2, memory_size=5, word_size=3, num_reads=2, hidden_size=4, features=3)

    def train_once(backend, steps, checkpoint, sizes, device):
        assert (steps, sizes["memory_size"]) == (256, 256)
        if checkpoint == 16:
            raise torch.OutOfMemoryError("CUDA out of memory.\nAnd more")
        return exact(backend, 4, checkpoint, small, device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lean, "describe_machine", lambda command: {"command": command})
    monkeypatch.setattr(lean, "train_once", train_once)
    monkeypatch.setattr(lean, "gpu_peak", lambda call, module: call() or next(peaks))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "to", lambda self, device: self)
    assert lean.main(["--device", "cuda", "--output", str(out)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    kept = [(row["backend"], row["checkpoint"], row["grown_bytes"]) for row in content["rows"]]
    assert kept == [("reference", None, 100), ("auto", "auto", 30), ("auto", None, 30)]
    assert all(row["finite"] for row in content["rows"])
    printed = capsys.readouterr().out
    assert "checkpoint = 16: not measured, CUDA out of memory." in printed
    assert "everything kept | ≤ 0.333 | 0.3 | reached |" in printed
    assert "every 16th step kept | ≤ 0.1 | | not measured |" in printed


def test_peak_of_memory_on_a_gpu_is_beyond_what_was_there(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 130)
    call = lambda: done.append("call, graphs " + os.environ["DNC_TRITON_GRAPHS"])  # noqa: E731
    assert memory.gpu_peak(call, torch.nn.Linear(1, 1)) == 30
    assert done == ["reset", "call, graphs 0"]
    assert "DNC_TRITON_GRAPHS" not in os.environ


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


# --- the GPU's part, without one --------------------------------------------------------------------------------------


def test_cuda_graphs_are_marked_and_their_state_outlives_them(monkeypatch):
    """On the CPU, with a compiler that does nothing: as many marks as calls, and a state of its own memory."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(peers, "_check_compiler", lambda device: None)
    made = []

    def compile_nothing(step, mode):
        assert mode == "reduce-overhead"

        def recorded(*arguments):
            features, state = step(*arguments)
            made.append(state.memory.link)
            return features, state

        return recorded

    monkeypatch.setattr(torch, "compile", compile_nothing)
    cell = peers.reference_cell(CASE, CPU, torch.float32)
    monkeypatch.setattr(peers, "reference_cell", lambda case, device, dtype: cell)
    network = peers.make_compiled(CASE, torch.device("cuda"), mode="reduce-overhead")
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), modes_on("cpu"))
    for mode in modes_on("cpu"):
        assert verify.error(network, mode, truth) <= truth.allowed[mode]
    marks.clear()
    call_of("training", network, draw_inputs(CASE, CPU))()
    assert len(marks) == 1
    with torch.no_grad():
        _, state = network.run(truth.inputs, None)
    assert torch.equal(state.memory.link, made[-1])
    assert state.memory.link.data_ptr() != made[-1].data_ptr()


def test_a_device_is_waited_for_before_and_after_each_call(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    measure._time_in_turns({"a": lambda: happened.append("call")}, session(device=torch.device("cuda"), rounds=1))
    assert happened == ["wait", "call", "wait"]


def test_the_floor_knows_an_h200_and_measures_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert floors.bytes_per_second(torch.device("cuda")) == 4.3e12
    assert 1e8 < floors.bytes_per_second(CPU) < 1e13


def test_without_a_gpu_its_benchmark_says_so_and_the_cpu_is_measured(tmp_path, capsys):
    message = "There is no GPU here: nothing was measured on one"
    assert main(["run", "--device", "cuda", "--configurations", "tiny", "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    status, rows, _ = run(tmp_path, "--device", "cuda,cpu", "--modes", "step")
    assert status == 0
    assert {row["device"] for row in rows} == {"cpu"}
    assert message in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "tiny_too", TINY)
    exact = verify.find_truth

    def interrupted(case, *arguments):
        if case.configuration == "tiny_too":
            assert len(list(tmp_path.iterdir())) == 2, "nothing was written before"
            raise KeyboardInterrupt
        return exact(case, *arguments)

    monkeypatch.setattr(verify, "find_truth", interrupted)
    _, rows, content = run(tmp_path, "--configurations", "tiny,tiny_too", "--modes", "step")
    assert {row["configuration"] for row in rows} == {"tiny"}
    assert content["left_out"] == ["tiny_too and what follows: interrupted"]


@pytest.mark.parametrize("place", ["timing", "cleaning up", "the oracle"])
def test_a_device_that_stops_working_costs_nothing_that_was_measured(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setitem(CONFIGURATIONS, "tiny_too", TINY)
    broken = []
    message = "CUDA error: an illegal memory access was encountered\nand many more lines"

    def break_it(*arguments):
        broken.append(place)
        raise RuntimeError(message)

    def synchronize(device):
        if broken:
            raise RuntimeError(message)

    def time_in_turns(runs, session):
        return break_it() if place == "timing" and len(list(tmp_path.iterdir())) else {name: [1e-3] for name in runs}

    monkeypatch.setattr(measure, "synchronize", synchronize)
    monkeypatch.setattr(measure, "_time_in_turns", time_in_turns)
    if place == "cleaning up":
        monkeypatch.setattr(torch.compiler, "reset", break_it)
    if place == "the oracle":
        exact = verify.find_truth
        monkeypatch.setattr(
            verify, "find_truth", lambda c, *a: (break_it if "too" in c.configuration else exact)(c, *a)
        )
    arguments = ["--configurations", "tiny,tiny_too", "--modes", "forward,step", "--peers", "dnc_triton,lstm"]
    status, rows, content = run(tmp_path, *arguments)
    assert status == 1
    found = {(row["configuration"], row["mode"]): row["status"] for row in rows}
    lost = f"the device was lost when {place} failed on "
    error = f"{place} failed on {{}}: RuntimeError: CUDA error: an illegal memory access was encountered"
    if place == "timing":
        assert found == {("tiny", "forward"): "measured", ("tiny", "step"): "failed"}
        assert rows[-1]["note"] == error.format("tiny")
        assert content["left_out"] == [f"tiny_too, {mode}: {lost}tiny" for mode in ("forward", "step")]
    elif place == "cleaning up":
        assert found == {("tiny", mode): "measured" for mode in ("forward", "step")}
        assert content["left_out"] == [
            error.format("tiny"),
            *(f"tiny_too, {mode}: {lost}tiny" for mode in ("forward", "step")),
        ]
    else:
        assert [status for (name, _), status in found.items() if name == "tiny"] == ["measured"] * 2
        assert {row["note"] for row in rows if row["configuration"] == "tiny_too"} == {error.format("tiny_too")}
    assert error.format("tiny_too" if place == "the oracle" else "tiny") in capsys.readouterr().out


def test_training_comes_first(tmp_path, monkeypatch):
    """Of all networks, then what else is done with them, then the sweeps."""
    done = []

    def measured(case, names, modes, session, report):
        done.extend((case.configuration, mode) for mode in modes)

    monkeypatch.setitem(CONFIGURATIONS, "tiny_too", TINY)
    monkeypatch.setitem(SWEEPS, "T", {"cpu": [2]})
    monkeypatch.setattr("benchmarks.__main__.measure", measured)
    both = ["tiny", "tiny_too"]
    named = [(name, "training") for name in both] + [(name, mode) for name in both for mode in ("step", "forward")]
    for asked, sweep in (("step,training,forward", "training"), ("step,forward", "step,forward")):
        done.clear()
        run(tmp_path, "--configurations", "tiny,tiny_too", "--sweeps", "T", "--modes", asked)
        swept = [("base/T=2", mode) for mode in sweep.split(",")]
        assert done == [job for job in named if job[1] in asked] + swept


# --- captured ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_captured(tmp_path):
    status, rows, content = run(tmp_path, "--modes", "captured,forward", "--peers", "lstm")
    assert status == 0
    assert [row["mode"] for row in rows] == ["forward"]
    assert content["left_out"] == ["captured: CUDA graphs need a GPU"]


def test_a_training_that_is_captured(monkeypatch):
    """On the CPU, where a replay is a call. It is held against the oracle and has a floor, but no peak of memory."""
    inputs = []

    def capture(network, given):
        inputs.append(given.shape[1])
        outputs = torch.empty(*given.shape[:2], CASE.output_size)
        return lambda: outputs.copy_(modes.train(network, given)), outputs

    for module in (modes, verify):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(verify, "VERIFIED_STEPS", 2)
    monkeypatch.setattr(measure, "cpu_peak", None)
    here = session(peak_memory=True)
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, EAGER, "compiled", "lstm"], [CAPTURED], here)}
    assert inputs == [2, CASE.steps, 2, CASE.steps, CASE.steps]  # the LSTM is not verified
    for peer in (OURS, EAGER, "lstm"):
        row = rows[peer]
        assert (row.status, row.note, row.peak_bytes) == ("measured", "", None)
        assert row.floor_bytes == (None if peer == "lstm" else floors.floor_bytes(CASE, "training"))
    assert 0 < rows[OURS].error <= rows[OURS].allowed_error
    assert (rows["compiled"].status, rows["compiled"].note) == ("declined", "compiled: it is not captured")

    monkeypatch.setattr(modes, "train", lambda network, given: torch.zeros(*given.shape[:2], CASE.output_size))
    (row,) = measure.measure(CASE, [OURS], [CAPTURED], session())
    assert row.status == "wrong"


def test_each_mode_is_written_when_it_is_done(tmp_path, monkeypatch):
    exact = measure._time_in_turns
    written = []

    def time_in_turns(runs, session):
        written.append([len(json.loads(file.read_text())["rows"]) for file in tmp_path.glob("*.json")])
        return exact(runs, session)

    monkeypatch.setattr(measure, "_time_in_turns", time_in_turns)
    run(tmp_path)
    assert written == [[], [len(QUICK)], [2 * len(QUICK)]]


# --- in a process of its own ------------------------------------------------------------------------------------------

# Instead of `python -m benchmarks`: what is measured, dies in the second mode, does not stop, dies while it writes.
CHILD = """
import json, pathlib, sys, time
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
mode, names, how = value("--modes"), value("--configurations").split(","), HOW
row = lambda name: dict(ROW, configuration=name, mode=mode, peer=value("--peers"))
out = pathlib.Path(value("--output"), "gpu-2026-01-02.json")
def write(names, notes=()):
    out.write_text(json.dumps(dict(machine={}, left_out=list(notes), rows=[row(name) for name in names])))
if how == "good":
    write(names, ["tiny: too large"])
if how == "dies" and mode == "forward":
    write(names[:1])
    print("CUDA error")
    sys.exit(5)
if how == "hangs":
    write(names[:1])
    time.sleep(60)
if how == "half":
    out.write_text('{"machine": ')
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Has the peer's process do as it is told. Returns what sets that, and the list of commands that were asked for."""
    record = apart.files.record_of(measure.Row(CASE, "", "", "measured", ms_per_step_p50=6.0))
    exact, asked = apart._command, []

    def be(how):
        def command(*arguments):
            asked.append(exact(*arguments))
            text = CHILD.replace("HOW", repr(how), 1).replace("ROW", repr(record), 1)
            return [sys.executable, "-c", text, *asked[-1][4:]]

        monkeypatch.setattr(apart, "_command", command)

    return be, asked


def options_of(*arguments):
    from benchmarks.__main__ import _parser

    return _parser().parse_args(["run", *arguments])


def test_a_peer_is_measured_apart_a_process_per_mode(child):
    be, asked = child
    be("good")
    here = session()
    options = options_of("--modes", "training,forward", "--rounds", "7", "--case-seconds", "1.5", "--threads", "1")
    other = replace(CASE, configuration="other")
    found = apart.measure_apart("compiled_cuda_graphs", [CASE, other], options.modes, options, here)
    rows = list(chain.from_iterable(found))
    names = [("tiny", "training"), ("other", "training"), ("tiny", "forward"), ("other", "forward")]
    assert [(row["configuration"], row["mode"]) for row in rows] == names
    where = "compiled_cuda_graphs, {}, in a process of its own: tiny: too large"
    assert here.left_out == [where.format(mode) for mode in ("training", "forward")]
    assert [command[:4] for command in asked] == [[sys.executable, "-m", "benchmarks", "run"]] * 2
    theirs = options_of(*[word.replace("tiny,other", "tiny") for word in asked[0][4:]])
    assert (theirs.device, theirs.peers, theirs.modes) == (["cuda"], ["compiled_cuda_graphs"], ["training"])
    assert (theirs.rounds, theirs.case_seconds, theirs.threads, theirs.seconds) == (7, 1.5, 1, None)
    assert theirs.no_memory
    assert theirs.no_report


def test_a_peer_apart_that_dies_costs_only_its_own_rows(child, monkeypatch):
    be, _ = child
    where = "compiled_cuda_graphs, {}, in a process of its own: "
    other = replace(CASE, configuration="other")

    def outcome(how, here):
        be(how)
        options = options_of("--modes", "training,forward")
        found = apart.measure_apart("compiled_cuda_graphs", [CASE, other], options.modes, options, here)
        rows = list(chain.from_iterable(found))
        return [(row["configuration"], row["mode"]) for row in rows], here.left_out

    rows, notes = outcome("dies", session())
    assert rows == [("tiny", "forward")]
    assert notes == [where.format("forward") + "ended with status 5: CUDA error"]
    rows, notes = outcome("half", session())
    assert rows == []
    assert all("Expecting value" in note for note in notes)
    monkeypatch.setattr(apart, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(apart, "OVERTIME", 3.0)
    rows, notes = outcome("hangs", session(deadline=time.monotonic() + 1 / apart.SHARE))
    assert rows == [("tiny", "training")]
    stopped = "killed, for it did not stop when its time was up"
    assert notes == [where.format("training") + stopped, where.format("forward") + "the time is up"]


@pytest.mark.parametrize("peers_asked", ["dnc_triton,compiled_cuda_graphs,lstm", "compiled_cuda_graphs"])
def test_what_was_measured_apart_stands_among_the_others(tmp_path, monkeypatch, peers_asked):
    """On the CPU in the place of a GPU. By itself the peer is measured in place, else there would be no end."""
    record = apart.files.record_of(
        measure.Row(CASE, "forward", "compiled_cuda_graphs", "measured", ms_per_step_p50=6.0)
    )
    called = []

    def measure_apart(name, cases, modes, options, session):
        called.append((name, [case.configuration for case in cases]))
        return ([dict(record, mode=mode)] for mode in ("forward", "step"))

    def measured(case, names, modes, session, done):
        assert called == [("compiled_cuda_graphs", ["tiny"])] * ("," in peers_asked)
        for mode in modes:
            done([measure.Row(case, mode, name, "measured", ms_per_step_p50=2.0) for name in names])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # put back
    monkeypatch.setattr(apart, "measure_apart", measure_apart)
    monkeypatch.setattr("benchmarks.__main__.measure", measured)
    monkeypatch.setattr("benchmarks.__main__.bytes_per_second", lambda device: 1e9)
    machine = {"date": "2026-01-02T03", **dict.fromkeys(apart.files.MEANS[1:-1])}
    monkeypatch.setattr("benchmarks.__main__.describe_machine", lambda command: {**machine, "device": "cuda"})
    arguments = ["--device", "cuda", "--configurations", "tiny", "--sweeps", "T", "--modes", "step,training,forward"]
    assert main([*arguments, "--peers", peers_asked, "--no-report", "--output", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv"}
    rows = json.loads((tmp_path / "gpu-2026-01-02.json").read_text())["rows"]
    found = [(row["mode"], row["peer"], row["ratio"]) for row in rows if not row["sweep"]]
    assert [row["configuration"] for row in rows if row["sweep"]] != []
    if "," not in peers_asked:
        assert found == [(mode, "compiled_cuda_graphs", None) for mode in ("step", "training", "forward")]
        return
    assert {row["peer"] for row in rows if row["sweep"]} == {OURS, "lstm"}
    theirs = [("compiled_cuda_graphs", 3.0)]
    expected = {"step": theirs, "training": [], "forward": theirs}
    assert found == [
        (mode, *row) for mode, between in expected.items() for row in [(OURS, None), *between, ("lstm", None)]
    ]


def test_a_failure_while_timing_or_counting_memory_is_noted(monkeypatch):
    monkeypatch.setattr(measure, "cpu_peak", lambda *arguments: 1 / 0)
    (row,) = measure.measure(CASE, [OURS], ["training"], session(peak_memory=True))
    assert row.status == "measured"
    assert row.note == "measuring the memory of dnc_triton failed on tiny: ZeroDivisionError: division by zero"
    monkeypatch.setattr(measure, "_time_in_turns", lambda *arguments: 1 / 0)
    (row,) = measure.measure(CASE, [OURS], ["training"], session())
    assert (row.status, row.ms_per_step_p50) == ("failed", None)


def test_without_tqdm_there_are_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(tmp_path, "--modes", "step")[0] == 0
    printed = capsys.readouterr().err
    assert "tqdm is not installed" in printed
    assert "tiny, step: timing" in printed


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configurations", "tiny,huge"], "unknown configuration 'huge', expected some of deepmind_repeat_copy"),
        (["--peers", "tensorflow"], "unknown peer 'tensorflow', expected some of dnc_triton"),
        (["--modes", "backward"], "unknown mode 'backward', expected some of training, captured, forward, step"),
        (["--sweeps", "X"], "unknown sweep 'X', expected some of B, N, T"),
        (["--device", "tpu"], "unknown device 'tpu', expected some of auto, cpu, cuda"),
        (["--rounds", "0"], "argument --rounds: expected an integer of at least 1, got '0'"),
        (["--seconds", "-1"], "argument --seconds: expected a number of at least 0, got '-1'"),
        (["--output", __file__], "argument --output"),
        (["compare", "one.json"], "the following arguments are required: NEW"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--help"], ["run", "report", "compare"]), (["run", "--help"], QUICK)]
)
def test_help_names_what_there_is(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


# --- the step on a GPU ------------------------------------------------------------------------------------------------

GPU_BENCHMARK = """
import time, torch
from benchmarks import gpu
from dnc_triton.kernels.layout import layouts

def clock(call):
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)

def measure():
    print(gpu.markdown([gpu.measure_one(*job) for job in gpu.jobs([(2, 4, 3, 2)], torch.device("cpu"), clock, clock)]))

gpu.layouts = lambda *sizes: [layouts(*sizes)[0], layouts(*sizes)[-1]]
resets = []
gpu.torch.compiler.reset = lambda: resets.append(1)
gpu.torch.compile = lambda step: step if resets else None
gpu.STATES = gpu.SEQUENCE_STEPS = 2
gpu.SEQUENCE_HIDDEN = 5
measure()
exact = gpu.step_forward
gpu.step_forward = lambda *a, **k: (lambda r: r._replace(usage=r.usage + 0.001))(exact(*a, **k))
gpu.verify.error = lambda *arguments: 0.001
measure()
"""


@pytest.mark.slow
def test_the_gpu_benchmark_holds_every_layout_against_the_oracle_before_it_is_timed():
    """Its code, on the CPU with interpreted kernels and a clock of its own; then again with a kernel that is off."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", GPU_BENCHMARK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = [[line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 2, 4")]]
    right, wrong = tables[0][:5], tables[0][5:]
    names = [row[1].split(",")[0] for row in right]
    assert names == ["fused 16×16", "split 16×16", "sequence of 2", "reference", "reference"]
    assert [row[1] for row in wrong] == [row[1] + (" (wrong: not timed)" if row[2] else "") for row in right]
    assert all(float(row[2]) < 1e-5 and float(row[3]) > 0 and float(row[4]) > 0 for row in right[:3])
    assert all(float(row[2]) > 1e-4 and row[3] == row[4] == "not measured" for row in wrong[:3])
    assert all(float(row[3]) > 0 for row in wrong[3:]), "the reference is timed all the same"


def test_the_gpu_benchmark_writes_as_it_goes_and_stops_in_time(tmp_path, monkeypatch, capsys):
    """Killed in the third row it has two; late from the second on it says what is missing; a failure is noted."""
    from benchmarks import gpu

    def measured(kind):
        def measure(row):
            if kind == "slow":
                time.sleep(0.2)
            if kind in ("failing", "interrupted"):
                raise RuntimeError("no memory\nat all") if kind == "failing" else KeyboardInterrupt
            return replace(row, error=1e-7, forward_us=2.0, backward_us=3.0)

        return gpu.Row(16, 16, 16, 4, kind), measure

    def run(*kinds, seconds="100"):
        monkeypatch.setattr(gpu, "jobs", lambda *arguments: map(measured, kinds))
        status = gpu.main(["--output", str(tmp_path), "--seconds", seconds])
        (file,) = tmp_path.glob("gpu-step-*.json")
        assert file.with_suffix(".csv").exists()
        return status, json.loads(file.read_text(encoding="utf-8"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe_machine", lambda command: {"date": "2026-01-02T03"})
    status, content = run("good", "failing", "interrupted", "good")
    assert [row["note"] for row in content["rows"]] == ["", "not measured: RuntimeError: no memory"]
    assert (status, content["left_out"]) == (0, ["what follows: interrupted"])
    status, content = run("slow", "late", seconds="0.1")
    assert [row["who"] for row in content["rows"]] == ["slow"]
    assert content["left_out"] == ["16, 16, 16, 4, late: the time is up"]
    assert content["left_out"][0] in capsys.readouterr().out


def test_without_a_gpu_the_gpu_benchmark_says_so(capsys, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
