"""The benchmark's part for a GPU, without one: CUDA graphs, captured trainings, and the benchmark of a single step."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from stand_in import StandIn
from tiny_benchmark import CASE, CPU, _tiny_configuration_without_peer, run, session  # noqa: F401

from benchmarks import files, floors, machine, measure, modes, peers, verify
from benchmarks.machine import describe_machine
from benchmarks.modes import CAPTURED, call_of, draw_inputs, modes_on
from benchmarks.peers import EAGER, OURS, PEERS, Network

# --- the GPU's part, without one --------------------------------------------------------------------------------------


def test_cuda_graphs_are_marked_and_their_state_outlives_them(monkeypatch):
    """On the CPU, with a compiler that does nothing: as many marks as calls, and a state in memory of its own."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(peers, "_check_compiler", lambda device: None)
    made = []

    def compile_nothing(step, options):
        assert options == {"triton.cudagraphs": True}

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
        marks.clear()
        _, state = network.step(truth.inputs[:, 0], state)
    assert len(marks) == 1
    assert torch.equal(state.memory.link, made[-1])
    assert state.memory.link.data_ptr() != made[-1].data_ptr()


@pytest.mark.parametrize(("module", "of_cudnn"), [("benchmarks.__main__", False), ("benchmarks.gpu", True)])
def test_everybody_computes_in_float32(module, of_cudnn, tmp_path, monkeypatch):
    """Also where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 is in the environment, which makes PyTorch begin with "high".

    What cuDNN computes, nn.LSTM, is not in the benchmark of a step.
    """
    found = []

    def stop(command):
        found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(f"{module}.describe_machine", stop)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(module).main(["--output", str(tmp_path)])
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == [("highest", of_cudnn)]


def test_a_device_is_waited_for_before_and_after_the_calls(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    runs = {"a": lambda: happened.append("call")}
    measure._time_in_turns(runs, session(device=torch.device("cuda"), rounds=1), {"a": 2})
    assert happened == ["wait", "call", "call", "wait"]


def test_calls_that_a_gpu_queues_are_timed_in_a_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    # Three times 12 ms, the first and the last disturbed; once 400 ms; three times 0.1 ms
    now = iter([0.0, 0.060, 0.1, 0.112, 0.2, 0.260, 1.0, 1.4, 2.0, 2.0001, 2.1, 2.1001, 2.2, 2.2001])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    runs = {name: lambda: None for name in ("ours", "slow", "fast")}
    on_gpu = session(device=torch.device("cuda"))
    assert measure._calls_in_a_row(runs, "training", on_gpu) == {"ours": 4, "slow": 1, "fast": measure.MOST_IN_A_ROW}
    assert measure._calls_in_a_row(runs, "step", on_gpu) == dict.fromkeys(runs, 1)
    assert measure._calls_in_a_row(runs, "training", session()) == dict.fromkeys(runs, 1)


def test_seconds_are_of_one_call_however_many_are_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.25

    seconds = measure._time_in_turns({"a": call}, session(device=torch.device("cuda"), rounds=2), {"a": 4})
    assert seconds == {"a": [0.25, 0.25]}


def test_the_floor_knows_an_h200_and_measures_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert floors.bytes_per_second(torch.device("cuda")) == 4.3e12
    assert 1e8 < floors.bytes_per_second(CPU) < 1e13
    assert 1e8 < floors.product_speed(CPU) < 1e14


def test_triton_says_itself_which_one_it_is(monkeypatch):
    """The package that it comes in has another name for ROCm."""
    triton = pytest.importorskip("triton")

    def not_found(name):
        raise PackageNotFoundError(name)

    for place in ("importlib.metadata.version", "benchmarks.machine.version"):
        monkeypatch.setattr(place, not_found, raising=False)
    assert describe_machine("make gpu")["triton"] == triton.__version__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert describe_machine("make gpu")["triton"] is None


def test_results_that_are_written_anew_leave_the_commit_what_it_is(tmp_path, monkeypatch):
    """`make gpu` rewrites some that are tracked before its last part, which describes the machine again."""
    paths = [tmp_path / "benchmarks" / "results" / "lean-gpu.json", tmp_path / "dnc_triton" / "layer.py"]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "benchmarks" / "machine.py"))
    clean = machine._commit()
    assert len(clean) == 40
    paths[0].write_text("after")
    assert machine._commit() == clean
    paths[1].write_text("after")
    assert machine._commit() == f"{clean}-dirty"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert machine._commit() == "unknown"


def test_who_compiles_has_a_single_step_compiled_whole(monkeypatch):
    """With its output layer, and nothing but that step: our own layer has no more to do."""
    compiled, called = [], []

    def compile_nothing(call, options):
        compiled.append(call)
        return lambda *arguments: called.append(call) or call(*arguments)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(peers, "_check_compiler", lambda device: None)
    network = peers.make_compiled(CASE, CPU, mode="default")
    call_of("step", network, draw_inputs(CASE, CPU))()
    assert set(called) == {network.module.forward}
    call_of("forward", network, draw_inputs(CASE, CPU))()
    assert set(called) == set(compiled) == {network.module.forward, network.module.advance}


@pytest.mark.slow  # starts PyTorch's compiler
def test_the_compiler_takes_what_it_is_told_for_a_large_memory():
    """That this keeps PyTorch 2.11 from its assertion only a GPU can show."""
    compiled = peers.compile_reference(lambda x: x + 1, 256, "reduce-overhead")
    assert torch.equal(compiled(torch.ones(3)), torch.full([3], 2.0))


@pytest.mark.parametrize(("slots", "added"), [(64, {}), (65, {"triton.mix_order_reduction": False})])
def test_what_the_compiler_is_told(slots, added, monkeypatch):
    assert peers.MIXED_ORDERS in torch._inductor.list_options()  # of this version
    monkeypatch.setattr(torch, "compile", lambda call, options: options)
    assert peers.compile_reference(len, slots) == added
    assert peers.compile_reference(len, slots, "reduce-overhead") == {"triton.cudagraphs": True} | added


# --- captured ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_captured(tmp_path):
    status, rows, content = run(tmp_path, "--modes", "captured,forward", "--peers", "lstm")
    assert status == 0
    assert [row["mode"] for row in rows] == ["forward"]
    assert content["left_out"] == ["captured: CUDA graphs need a GPU"]


def test_a_training_that_is_captured(monkeypatch):
    """On the CPU, where a replay is a call. It is compared with the oracle and has a floor, but no peak of memory."""
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
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, EAGER, "torch_sequence", "lstm"], [CAPTURED], here)}
    assert inputs == [2, CASE.steps, 2, CASE.steps, CASE.steps]  # the LSTM is not verified
    for peer in (OURS, "torch_sequence", "lstm"):
        row = rows[peer]
        assert (row.status, row.note, row.peak_bytes) == ("measured", "", None)
        assert row.floor_bytes == (None if peer == "lstm" else floors.floor_bytes(CASE, "training"))
    assert 0 < rows[OURS].error <= rows[OURS].allowed_error
    assert (rows[EAGER].status, rows[EAGER].note) == ("declined", "reference: it is not captured")

    monkeypatch.setattr(modes, "train", lambda network, given: torch.zeros(*given.shape[:2], CASE.output_size))
    (row,) = measure.measure(CASE, [OURS], [CAPTURED], session())
    assert row.status == "wrong"


def test_a_training_is_captured_by_the_engine(monkeypatch):
    engine = StandIn(CPU)
    monkeypatch.setattr(modes, "_engine", lambda device: engine)
    monkeypatch.setattr(modes, "aside", nullcontext)
    network, inputs = PEERS["lstm"].make(CASE, CPU), draw_inputs(CASE, CPU)
    replay, outputs = modes.capture(network, inputs)
    assert outputs.isnan().all()
    replay()
    assert torch.equal(outputs, modes.train(network, inputs))
    assert (engine.captures, engine.replays) == (1, 1)


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

gpu.layouts = lambda slots: [layouts(slots)[0], layouts(slots)[-1]]
resets = []
gpu.torch.compiler.reset = lambda: resets.append(1)
gpu.torch.compile = lambda step, **options: step if resets else None
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
    kinds = [row[1].replace(",", "").split()[0] for row in right]
    assert kinds == ["fused", "split", "sequence", "reference", "reference"]
    assert [row[1] for row in wrong] == [row[1] + (" (wrong: not timed)" if row[2] else "") for row in right]
    assert all(float(row[2]) < 1e-5 and float(row[3]) > 0 and float(row[4]) > 0 for row in right[:3])
    assert all(float(row[2]) > 1e-4 and row[3] == row[4] == "not measured" for row in wrong[:3])
    assert all(float(row[3]) > 0 for row in wrong[3:]), "the reference is timed all the same"


def test_what_a_bucket_launches_is_compiled_before_its_first_row(monkeypatch):
    """All of it, the sequence too, and nothing else. Nothing is compiled and nothing runs, so all of ours are wrong."""
    pytest.importorskip("triton")
    from triton.runtime.jit import KernelInterface

    from benchmarks import gpu
    from dnc_triton.kernels import launcher

    happened = []

    def note(what, kernel, options):
        happened.append((what, kernel.__name__, str(sorted(options.items()))))

    monkeypatch.setattr(
        launcher.Compiling, "add", lambda self, kernel, grid, arguments, options: note("compiled", kernel, options)
    )
    monkeypatch.setattr(
        KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **options: note("launched", kernel, options)
    )
    monkeypatch.setattr(gpu, "SEQUENCE_STEPS", 2)
    jobs = gpu.jobs([(2, 4, 3, 2)], torch.device("cpu"), None, lambda call: 1.0, compiled=False)
    rows = [gpu.measure_one(*job) for job in jobs]
    assert [row.note for row in rows] == [*["wrong: not timed"] * 4, ""]
    number = sum(what == "compiled" for what, *_ in happened)
    assert {what for what, *_ in happened[:number]} == {"compiled"}
    compiled, launched = ({tuple(kernel) for _, *kernel in part} for part in (happened[:number], happened[number:]))
    assert compiled == launched
    assert {name for name, _ in compiled} >= {"step_backward_kernel", "sequence_backward_kernel"}


def test_the_gpu_benchmark_writes_as_it_goes_and_stops_in_time(tmp_path, monkeypatch, capsys):
    """Killed in the third row, it has two; late from the second on, it says what is missing; a failure is noted."""
    from benchmarks import gpu

    written = []

    def measured(kind, slots):
        def measure(row):
            written.append([len(json.loads(file.read_text())["rows"]) for file in tmp_path.glob("gpu-step-*.json")])
            if kind == "slow":
                time.sleep(0.2)
            if kind.endswith(("failing", "interrupted")):
                raise KeyboardInterrupt if kind == "interrupted" else RuntimeError("no memory\nat all")
            return replace(row, error=1e-7, forward_us=2.0, backward_us=3.0)

        return gpu.Row(16, slots, 16, 4, kind), measure

    def run(*kinds, seconds="100", slots=16):
        monkeypatch.setattr(gpu, "jobs", lambda *arguments, **options: (measured(kind, slots) for kind in kinds))
        status = gpu.main(["--output", str(tmp_path), "--seconds", seconds])
        (file,) = tmp_path.glob("gpu-step-*.json")
        lines = file.with_suffix(".csv").read_text(encoding="utf-8").splitlines()
        assert all(line.endswith(",2026-01-02T03") for line in lines[1:]), "each can be read by itself"
        assert len(lines) > 1
        return status, json.loads(file.read_text(encoding="utf-8"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine = {**dict.fromkeys(files.MEANS[1:]), "date": "2026-01-02T03"}
    monkeypatch.setattr(gpu, "describe_machine", lambda command: dict(machine))
    monkeypatch.setattr(gpu, "bytes_per_second", lambda device: 1e12)
    assert run("good")[0] == 0
    assert run("good", "interrupted", "good")[0] == 130
    assert run("good", "good", "good")[0] == 0
    assert written[-2:] == [[1], [2]]
    assert run("good", "failing")[0] == 1
    before = run("good", "reference that is failing")
    assert before[0] == 0, "others may"
    monkeypatch.setattr(gpu, "jobs", lambda *arguments, **options: [measured("interrupted", 16)])
    assert gpu.main(["--output", str(tmp_path)]) == 130
    assert gpu.main(["--output", str(tmp_path), "--seconds", "-1"]) == 2
    (file,) = tmp_path.glob("gpu-step-*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == before[1], "no results are no reason to lose some"
    status, content = run("good", "failing", "interrupted", "good")
    assert [row["note"] for row in content["rows"]] == ["", "not measured: RuntimeError: no memory"]
    assert (status, content["left_out"]) == (1, ["what follows: interrupted"])
    status, content = run("slow", "late", seconds="0.1")
    assert [row["who"] for row in content["rows"]] == ["slow"]
    assert content["left_out"] == ["16, 16, 16, 4, late: the time is up"]
    assert content["left_out"][0] in capsys.readouterr().out
    status, content = run("good", gpu.COMPILED, seconds="30")
    assert content["left_out"] == [f"16, 16, 16, 4, {gpu.COMPILED}: the time is up"], "which has none to compile"
    assert run("good", gpu.COMPILED)[1]["left_out"] == []
    content = run("good", gpu.COMPILED, slots=256)[1]
    assert content["left_out"] == [f"16, 256, 16, 4, {gpu.COMPILED}: the time is up"], "a large memory takes longer"
    assert content["machine"]["bytes_per_second"] == 1e12


def unrun(monkeypatch, kind, error, *times):
    """A row of that kind on the CPU, with nothing run: it is off by `error`, and the clock answers `times`."""
    from benchmarks import gpu

    clock = iter(times)
    network = Network(torch.nn.Linear(1, 1), None)
    monkeypatch.setattr(gpu, "kernel_calls", lambda *arguments: (None, None))
    monkeypatch.setattr(gpu, "worst_error", lambda *arguments: error)
    monkeypatch.setattr(gpu, "sequence_of", lambda *arguments: (network, None, None))
    monkeypatch.setattr(gpu.verify, "find_truth", lambda *arguments: SimpleNamespace(allowed={"training": 1e-5}))
    monkeypatch.setattr(gpu.verify, "error", lambda *arguments: error)
    options = {"compiled": False} if kind == "reference" else {"layout": None}
    row = gpu.Row(2, 4, 3, 2, kind)
    return getattr(gpu, f"{kind}_row")(row, device=CPU, clock=lambda call: next(clock), **options)


@pytest.mark.parametrize(
    ("kind", "times", "forward", "backward"),
    [
        ("step", [8.0, 20.0], 2.0, 5.0),  # of four states
        ("sequence", [64.0, 160.0], 2.0, 3.0),  # of 32 steps: forward, forward and backward
        ("reference", [3.0, 10.0], 3.0, 7.0),  # the same of one step
    ],
)
def test_times_are_of_one_step_one_way(kind, times, forward, backward, monkeypatch):
    from benchmarks import gpu

    row = unrun(monkeypatch, kind, 1e-6, *times)
    assert (row.forward_us, row.backward_us, row.note) == (forward, backward, "")
    assert f" | {forward:.1f} | {backward:.1f} | " in gpu.markdown([row])


@pytest.mark.parametrize("error", [float("nan"), 3e-5])
@pytest.mark.parametrize("kind", ["step", "sequence"])
def test_a_layout_that_is_wrong_is_not_timed(kind, error, monkeypatch):
    row = unrun(monkeypatch, kind, error)
    assert (row.forward_us, row.backward_us, row.note) == (None, None, "wrong: not timed")
    assert row.is_wrong


def test_what_is_timed_of_kernels_is_a_graph_of_them(monkeypatch):
    """Warmed up on another stream and captured; replayed behind a wait that outlasts its launch. Median of many."""
    from benchmarks import gpu

    happened, times = [], iter([9.0, 1.0, 2.0])

    @contextmanager
    def within(what):
        happened.append(what)
        yield
        happened.append("")

    def device_time(call, wait):
        call()
        happened.append(wait)
        return next(times)

    monkeypatch.setattr(gpu, "REPLAYS", 3)
    monkeypatch.setattr(gpu, "aside", lambda: within("aside"))
    monkeypatch.setattr(gpu, "device_time", device_time)
    graph = SimpleNamespace(replay=lambda: happened.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: within("capture" if captured is graph else "another"))
    assert gpu.graph_time(lambda: happened.append("call")) == 2.0
    before = ["aside", *["call"] * 3, "", "capture", "call", ""]
    assert happened == [*before, *["replay"] * 5, *["replay", gpu.WAIT] * 3]


def test_what_compiles_for_long_comes_last_the_smallest_first():
    from benchmarks import gpu

    rows = [row for row, _ in gpu.jobs(gpu.BUCKETS, CPU, None, None)]
    last = rows[-len(gpu.BUCKETS) :]
    assert [row.who == gpu.COMPILED for row in rows] == [row in last for row in rows]
    assert [row.memory_size for row in last] == sorted(bucket[1] for bucket in gpu.BUCKETS)
    whole = {row.memory_size for row in rows if row.who.startswith("sequence")}
    assert whole == {bucket[1] for bucket in gpu.BUCKETS if bucket[1] <= 128}, "what one launch serves"


def test_a_layout_that_does_not_compile_costs_the_others_nothing(monkeypatch):
    from benchmarks import gpu

    broken, good = gpu.layouts(4)[:2]
    compiled = []

    def kernel_calls(steps, reads, layout):
        if layout is broken:
            raise RuntimeError("out of resource: shared memory")
        return None, lambda: compiled.append(layout)

    monkeypatch.setattr(gpu, "kernel_calls", kernel_calls)
    monkeypatch.setattr(gpu.launcher, "compiling_ahead", lambda device: nullcontext())
    gpu.compile_ahead(gpu.Row(2, 4, 3, 2, "first"), CPU, [broken, good])
    assert compiled == [good]


def test_floors_of_a_cache_are_of_what_fits_into_it(monkeypatch):
    """At N = 256 and a batch of 64, what a step moves, 42 MB, fits, and what its adjoint moves, 63 MB, does not."""
    from benchmarks import gpu

    def rows_on(card):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
        jobs = gpu.jobs([(64, 256, 64, 4), (64, 512, 64, 8)], torch.device("cuda"), None, None, compiled=False)
        return [row for row, _ in jobs if "reference" in row.who]

    rows = rows_on("NVIDIA H200")
    assert [row.forward_floor_us > 9 and row.backward_floor_us > 13 for row in rows] == [True, True]
    assert rows[0].forward_l2_floor_us == pytest.approx(41.943 / 6, 1e-3)
    assert [rows[0].backward_l2_floor_us, rows[1].forward_l2_floor_us, rows[1].backward_l2_floor_us] == [None] * 3
    assert [line.split(" | ")[-1] for line in gpu.markdown(rows).splitlines()[2:]] == ["6.99, – |", "–, – |"]
    monkeypatch.setattr(floors, "copy_speed", lambda device: 2e12)
    (row, _) = rows_on("another")
    assert (row.forward_floor_us, row.forward_l2_floor_us) == (pytest.approx(41.943 / 2, 1e-3), None)


def test_without_a_gpu_the_gpu_benchmark_says_so(capsys, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
