"""What the tests of the benchmark share: a configuration that takes milliseconds, and a run of it."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch

from benchmarks import floors, measure
from benchmarks.__main__ import main
from benchmarks.configurations import CONFIGURATIONS, Configuration, case_of
from benchmarks.peers import EAGER, OURS

CPU = torch.device("cpu")
TINY = Configuration(
    source="tests",
    memory_size=6,
    word_size=4,
    num_reads=2,
    hidden_size=5,
    input_size=3,
    output_size=2,
    cpu_batch=2,
    cpu_steps=3,
    gpu_batch=4,
    gpu_steps=7,
    num_layers=2,
)
CASE = case_of("tiny", TINY, "cpu")
QUICK = [OURS, EAGER, "pypi_dnc", "lstm"]


@pytest.fixture(autouse=True)
def _tiny_configuration_without_peer(monkeypatch):
    """A configuration "tiny", no package `dnc` to import, no GPU, and torch's threads put back afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(CONFIGURATIONS, "tiny", TINY)
    monkeypatch.setitem(sys.modules, "dnc", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(floors, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(floors, "MULTIPLIED", {"cpu": 128})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    torch.set_num_threads(threads)


def session(**settings):
    usual = dict(device=CPU, bytes_per_second=1e9, rounds=1, case_seconds=1.0, compile_seconds=1.0, peak_memory=False)
    return measure.Session(**{**usual, **settings})


def run(folder, *arguments):
    """Exit status, rows of the CSV, content of the JSON."""
    usual = ["--configurations", "tiny", "--peers", ",".join(QUICK), "--rounds", "1", "--threads", "1", "--no-memory"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.__main__.find_spec", lambda name: None)  # pictures take longer than all the rest
        status = main(["run", *usual, "--output", str(folder), *arguments])
    (csv_file,), (json_file,) = folder.glob("cpu-*.csv"), folder.glob("cpu-*.json")
    with csv_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return status, rows, json.loads(json_file.read_text(encoding="utf-8"))
