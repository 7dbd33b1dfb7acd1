"""The benchmark runs, says what it measured, and times nothing that is wrong or missing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from benchmarks import measure
from benchmarks.__main__ import main
from benchmarks.configurations import CONFIGURATIONS, Configuration
from benchmarks.peers import OURS, PEERS, MissingPeerError, pypi_dnc

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
    num_layers=2,
)
COLUMNS = [
    *("configuration", "peer", "status", "error", "ms_per_step_p20", "ms_per_step_p50", "ms_per_step_p80", "ratio"),
    *("note", "rounds", "dtype", "source", "memory_size", "word_size", "num_reads", "hidden_size", "input_size"),
    *("output_size", "published_batch", "published_steps", "cpu_batch", "cpu_steps", "num_layers"),
    *("cpu", "threads", "load", "python", "torch", "commit", "date"),
]


@pytest.fixture(autouse=True)
def _tiny_configuration_without_peer(monkeypatch):
    """A configuration "tiny", no package `dnc` to import, and torch's threads put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(CONFIGURATIONS, "tiny", TINY)
    monkeypatch.setitem(sys.modules, "dnc", None)
    yield
    torch.set_num_threads(threads)


def run(folder, *arguments):
    """Exit status, rows of the CSV, content of the JSON."""
    status = main(["--configurations", "tiny", "--rounds", "1", "--output", str(folder), *arguments])
    (csv_file,), (json_file,) = folder.glob("cpu-*.csv"), folder.glob("cpu-*.json")
    with csv_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return status, rows, json.loads(json_file.read_text(encoding="utf-8"))


def test_results_have_their_schema_and_a_missing_peer_is_named(tmp_path, capsys):
    status, rows, content = run(tmp_path, "--threads", "1")
    assert status == 0
    assert [row["peer"] for row in rows] == list(PEERS)
    assert all(list(row) == COLUMNS for row in rows)

    ours, peer = rows
    assert (ours["status"], ours["note"], float(ours["ratio"])) == ("measured", "", 1.0)
    assert 0 < float(ours["ms_per_step_p20"]) <= float(ours["ms_per_step_p50"]) <= float(ours["ms_per_step_p80"])
    assert 0 < float(ours["error"]) <= measure.ALLOWED_ERROR
    message = "dnc is not installed; install it with: pip install --no-deps dnc==2.0.0b1"
    assert (peer["status"], peer["note"], peer["ms_per_step_p50"]) == ("missing", message, "")

    machine = content["machine"]
    assert list(machine) == [
        *("date", "command", "commit", "cpu", "cores", "threads", "load", "system", "python"),
        *("torch", "triton", "gpu", "dnc_triton"),
    ]
    assert machine["command"].startswith("python -m benchmarks --configurations tiny --rounds 1")
    assert machine["threads"] == 1
    assert all(value not in ("", None) for key, value in machine.items() if key not in ("triton", "gpu"))
    assert [{key: "" if x is None else str(x) for key, x in row.items()} for row in content["rows"]] == rows

    printed = capsys.readouterr().out
    assert f"| tiny | 6 | 4 | 2 | 2×5 | 2 | 3 | {OURS} |" in printed
    assert message in printed


def test_a_wrong_layer_gets_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "worst_error", lambda configuration, inputs: float("nan"))
    status, rows, _ = run(tmp_path)
    assert status == 1
    assert {row["status"] for row in rows} == {"wrong"}
    assert not any(row["ms_per_step_p50"] for row in rows)
    assert f"{OURS} is wrong on tiny: off by nan" in capsys.readouterr().out


def test_a_wrong_gradient_is_noticed(monkeypatch):
    inputs = torch.randn(TINY.cpu_batch, TINY.cpu_steps, TINY.input_size)
    layer = measure.dnc_layer(TINY)
    layer.interface.weight.register_hook(lambda gradient: gradient * 1.001)
    monkeypatch.setattr(measure, "dnc_layer", lambda configuration: layer)
    assert measure.worst_error(TINY, inputs) > measure.ALLOWED_ERROR


def test_another_version_of_the_peer_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dnc", ModuleType("dnc"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    with pytest.raises(MissingPeerError, match=r"dnc is installed in version 1\.0; install it with"):
        pypi_dnc(TINY, torch.randn(TINY.cpu_batch, TINY.cpu_steps, TINY.input_size))


def test_peers_take_turns():
    calls = []
    runs = {peer: partial(calls.append, peer) for peer in "ab"}
    seconds = measure._time_in_turns(runs, 3, description="turns")
    warm_up = 2 * measure.WARM_UP_ROUNDS
    assert "".join(calls[warm_up:]) == "abbaab"
    assert {peer: len(times) for peer, times in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configurations", "tiny,huge"], "unknown configuration 'huge', expected some of deepmind_repeat_copy"),
        (["--rounds", "0"], "argument --rounds: expected an integer of at least 1, got '0'"),
        (["--output", __file__], "argument --output"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


GPU_BENCHMARK = """
import time, torch
from benchmarks import gpu
from dnc_triton.kernels.layout import layouts

def clock(call):
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)

gpu.layouts = lambda *sizes: [layouts(*sizes)[0], layouts(*sizes)[-1]]
gpu.torch.compile = lambda step: step
gpu.STATES = 2
print(gpu.markdown(gpu.measure(2, 4, 3, 2, torch.device("cpu"), clock, clock)))
exact = gpu.step_forward
gpu.step_forward = lambda *a, **k: (lambda r: r._replace(usage=r.usage + 0.001))(exact(*a, **k))
print(gpu.markdown(gpu.measure(2, 4, 3, 2, torch.device("cpu"), clock, clock)))
"""


def test_the_gpu_benchmark_holds_every_layout_against_the_oracle_before_it_is_timed():
    """Its code, on the CPU with interpreted kernels and a clock of its own; then again with a kernel that is off."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", GPU_BENCHMARK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = [[line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| 2, 4")]]
    right, wrong = tables[0][:4], tables[0][4:]
    assert [row[1] for row in right] == [row[1] for row in wrong]
    assert all(float(row[2]) < 1e-5 and float(row[3]) > 0 and float(row[4]) > 0 for row in right[:2])
    assert all(float(row[2]) > 1e-4 and row[3] == row[4] == "not measured" for row in wrong[:2])
    assert all(float(row[3]) > 0 for row in wrong[2:]), "the reference is timed all the same"


def test_without_a_gpu_the_gpu_benchmark_says_so(capsys, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
