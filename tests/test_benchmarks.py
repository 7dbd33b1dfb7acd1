"""The benchmark runs, measures what it is asked for, and says so in its files and on the screen."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_benchmark import CASE, QUICK, TINY, _tiny_configuration_without_peer, run, session  # noqa: F401

from benchmarks import files, measure, verify
from benchmarks.__main__ import _jobs, _parser, main
from benchmarks.configurations import BASE, CONFIGURATIONS, SWEEPS, SWEPT, LeftOutError, case_of, sweep_cases
from benchmarks.modes import CAPTURED, MODES, modes_on
from benchmarks.peers import EAGER, OURS, PEERS
from dnc_triton.dispatch import BACKENDS
from dnc_triton.files import write_table

# --- a run ------------------------------------------------------------------------------------------------------------

COLUMNS = [
    *("configuration", "sweep", "source", "batch", "steps", "memory_size", "word_size", "num_reads", "hidden_size"),
    *("num_layers", "input_size", "output_size", "dtype", "mode", "peer", "status", "backend", "error"),
    *("allowed_error", "rounds", "calls", "ms_per_step_p20", "ms_per_step_p50", "ms_per_step_p80", "ratio"),
    *("peak_bytes", "floor_bytes", "bytes_per_second", "floor_share", "note"),
    *("device", "cpu", "gpu", "threads", "load", "python", "torch", "triton", "commit", "date"),
]


def test_results_have_their_schema_and_a_missing_peer_is_named(tmp_path, capsys):
    status, rows, content = run(tmp_path)
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
        *("torch", "triton", "gpu", "cuda", "cudnn", "dnc_triton", "environment"),
        *("bytes_per_second", "operations_per_second"),
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
    """Only what is around the compiler, which leaves the code as it is. A backend with its own takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda step, options: step)
    peers = [peer for peer in PEERS if peer != "torch_compiled"]
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
    monkeypatch.setattr("benchmarks.configurations.BASE", TINY)
    monkeypatch.setitem(SWEEPS, "N", {"cpu": (2, 3), "cuda": ()})
    monkeypatch.setattr(measure, "cpu_peak", lambda *arguments: 7)
    arguments = ["--configurations", "", "--sweeps", "N", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)]
    assert main([*arguments, "--no-report"]) == 0  # `run` goes without saying
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    swept = [name for name, peer in PEERS.items() if peer.sweeps]
    names = [(f"base/N={size}", "training", peer) for size in (2, 3) for peer in swept]
    assert [(row["configuration"], row["mode"], row["peer"]) for row in rows] == names
    assert {row["peak_bytes"] for row in rows} == {7}


def test_a_configuration_for_gpus_is_said_to_be_left_out(tmp_path, capsys):
    status, rows, content = run(tmp_path, "--configurations", "nature_babi_wide")
    assert (status, rows) == (2, [])
    assert content["left_out"] == ["nature_babi_wide: too large for a CPU, it is measured on a GPU"]
    assert content["left_out"][0] in capsys.readouterr().err


def test_a_configuration_has_a_batch_for_each_kind_of_device():
    assert case_of("tiny", TINY, "cpu").batch == TINY.cpu_batch
    case = case_of("tiny", TINY, "cuda")
    assert (case.batch, case.steps) == (4, 7)
    with pytest.raises(LeftOutError):
        case_of("huge", replace(TINY, cpu_batch=0), "cpu")


def test_training_comes_first(tmp_path, monkeypatch):
    """Training of all networks, then what else is done with them, then the sweeps."""
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


def test_what_goals_are_set_for_comes_first():
    """On a GPU: training, in calls and in a graph, of networks with goals; then of the others; then anything else."""
    names = ("one", "adnc_babi", "two")
    cases = [case_of(name, TINY, "cuda") for name in names]
    done = [(case.configuration, mode) for case, modes in _jobs(cases, list(MODES)) for mode in modes]
    assert done[:2] == [("adnc_babi", "training"), ("adnc_babi", "captured")]
    assert done[2:6] == [(name, mode) for mode in ("training", "captured") for name in ("one", "two")]
    assert sorted(done[6:]) == sorted((name, mode) for name in names for mode in ("forward", "step"))


def test_each_mode_is_written_when_it_is_done(tmp_path, monkeypatch):
    exact = measure._time_in_turns
    written = []

    def time_in_turns(runs, session, in_a_row):
        written.append([len(json.loads(file.read_text())["rows"]) for file in tmp_path.glob("*.json")])
        return exact(runs, session, in_a_row)

    monkeypatch.setattr(measure, "_time_in_turns", time_in_turns)
    run(tmp_path)
    assert written == [[], [len(QUICK)], [2 * len(QUICK)]]


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "tiny_too", TINY)
    exact = verify.find_truth

    def interrupted(case, *arguments):
        if case.configuration == "tiny_too":
            assert len(list(tmp_path.iterdir())) == 2, "nothing was written before"
            raise KeyboardInterrupt
        return exact(case, *arguments)

    monkeypatch.setattr(verify, "find_truth", interrupted)
    status, rows, content = run(tmp_path, "--configurations", "tiny,tiny_too", "--modes", "step")
    assert status == 130
    assert {row["configuration"] for row in rows} == {"tiny"}
    assert content["left_out"] == ["tiny_too and what follows: interrupted"]


def test_a_run_that_is_interrupted_before_anything_is_measured_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "find_truth", interrupted)
    status, rows, content = run(tmp_path)
    assert (status, rows) == (130, [])
    assert content["left_out"] == ["tiny and what follows: interrupted"]
    assert "- tiny and what follows: interrupted" in capsys.readouterr().err


def test_who_interrupts_the_measuring_of_memory_has_the_times(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "cpu_peak", interrupted)
    arguments = ["--configurations", "tiny", "--peers", f"{OURS},lstm", "--modes", "training", "--rounds", "1"]
    assert main(["run", *arguments, "--no-report", "--output", str(tmp_path)]) == 130
    (file,) = tmp_path.glob("cpu-*.json")
    assert [row["status"] for row in json.loads(file.read_text())["rows"]] == ["measured"] * 2


@pytest.mark.parametrize(
    ("statuses", "status", "measured"),
    [([130], 130, ["cuda"]), ([1, 0], 1, ["cuda", "cpu"]), ([0, 2], 2, ["cuda", "cpu"]), ([0, 0], 0, ["cuda", "cpu"])],
)
def test_who_interrupts_a_device_interrupts_the_next_one_too(tmp_path, monkeypatch, statuses, status, measured):
    """What went wrong on one is not lost because the next one went well."""
    begun, ended = [], iter(statuses)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.__main__._run", lambda device, *others: begun.append(device.type) or next(ended))
    assert main(["--device", "cuda,cpu", "--output", str(tmp_path)]) == status
    assert begun == measured


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    stem, machine = tmp_path / "cpu", dict.fromkeys(files.MEANS)
    files.write_results(stem, machine, [{"peer": OURS}], [])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for write in (files.write_json, write_table):
        for path in sorted(tmp_path.iterdir()):
            with pytest.raises(OSError, match="No space left"):
                write(path, [{"peer": EAGER}])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_after_the_time_is_up_nothing_is_started(tmp_path, capsys):
    status, rows, content = run(tmp_path, "--seconds", "0")
    assert (status, rows) == (2, [])
    assert content["left_out"] == [f"tiny, {mode}: the time is up" for mode in modes_on("cpu")]
    assert "- tiny, training: the time is up" in capsys.readouterr().err


def test_all_devices_have_the_time_that_is_asked_for_together(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__._devices", lambda asked: ["cpu", "cpu"])
    deadlines = []

    def measure_all(cases, modes, options, session, write):
        deadlines.append(session.deadline)
        return [], False

    monkeypatch.setattr("benchmarks.__main__._measure_all", measure_all)
    before = time.monotonic()
    assert main(["run", "--seconds", "100", "--output", str(tmp_path)]) == 2
    assert deadlines[0] == deadlines[1] <= time.monotonic() + 100
    assert deadlines[0] >= before + 100


@pytest.mark.parametrize(("load", "told"), [(3.0, True), (0.1, False)])
def test_other_programs_that_take_its_time_are_told(load, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    run(tmp_path, "--seconds", "0")
    assert (f"Other programs are running (load {load:.1f})" in capsys.readouterr().err) == told


def test_as_many_threads_compute_as_are_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run(tmp_path, "--seconds", "0", "--threads", "3")
    assert asked == [3]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seconds", "0"], "tiny, training: the time is up"),
        (["--peers", "triton_fused"], "triton_fused: device is the CPU"),
        (["--peers", "compiled_cuda_graphs"], "CUDA graphs need a GPU"),
        (["--configurations", ","], "neither configurations nor sweeps were asked for"),
    ],
    ids=["no time", "declined", "missing", "nothing asked for"],
)
def test_a_run_that_measures_nothing_leaves_the_results_of_another(tmp_path, capsys, arguments, reason):
    run(tmp_path, "--modes", "step", "--peers", "lstm")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path, *arguments)[0] == 2
    assert f"- {reason}" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_a_gpu_its_benchmark_says_so_and_the_cpu_is_measured(tmp_path, capsys):
    message = "There is no GPU here: nothing was measured on one"
    assert main(["run", "--device", "cuda", "--configurations", "tiny", "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    status, rows, _ = run(tmp_path, "--device", "cuda,cpu", "--modes", "step")
    assert status == 0
    assert {row["device"] for row in rows} == {"cpu"}
    assert message in capsys.readouterr().err


def test_the_bar_reaches_its_end(tmp_path, monkeypatch):
    """Having said each time what is measured."""
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)
            self.said = []

        def set_description(self, text, *arguments):
            self.said.append(text)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    assert run(tmp_path, "--modes", "step,forward")[0] == 0
    (bar,) = bars
    assert bar.n == bar.total > 1
    assert bar.disable  # closed
    assert {"tiny, step: timing", "tiny, forward: timing"} <= set(bar.said)


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
        (["list"], "invalid choice: 'list'"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "soon", ""])
def test_a_time_is_a_number(text, capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["run", "--seconds", text])
    assert f"argument --seconds: expected a number of at least 0, got {text!r}" in capsys.readouterr().err


def test_what_is_named_twice_is_measured_once():
    options = _parser().parse_args(["run", "--modes", "step, forward,step,"])
    assert options.modes == ["step", "forward"]


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert f"argument --output: {tmp_path} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(("of", "file"), [("gpu", ""), ("on_gpu", ""), ("lean", "lean.json")])
def test_the_others_say_that_their_folder_is_a_file(of, file, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{of}").main(["--output", str(Path(__file__) / file)])
    assert "argument --output: [Errno" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--help"], ["run", "report", "compare"]), (["run", "--help"], QUICK)]
)
def test_help_names_what_there_is(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)
