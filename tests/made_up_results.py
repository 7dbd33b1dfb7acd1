"""Made-up results of the benchmark, for the tests of what is made from them."""

from __future__ import annotations

import json

import pytest

MACHINE = {
    "device": "cpu",
    "cpu": "a processor",
    "gpu": None,
    "threads": 2,
    "load": 0.1,
    "python": "3.12.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
    "bytes_per_second": 2e10,
    "operations_per_second": 1e11,
}
PEERS = {"dnc_triton": 2.0, "reference": 3.0, "lstm": 0.5}


def row(configuration, mode, peer, median=None, *, spread=0.1, sweep="", status="measured", note="", **sizes):
    """A row as it is written; half of the spread below the median, half above."""
    times = dict.fromkeys(("ms_per_step_p20", "ms_per_step_p50", "ms_per_step_p80", "ratio", "bytes_per_second"))
    if median is not None:
        low, high = median * (1 - spread / 2), median * (1 + spread / 2)
        times = dict(ms_per_step_p20=low, ms_per_step_p50=median, ms_per_step_p80=high, ratio=median / 2)
        times |= dict(bytes_per_second=1e9, floor_bytes=10**6, floor_share=0.05, peak_bytes=12_345_678, error=3e-7)
    usual = dict(batch=2, steps=3, memory_size=16, word_size=8, num_reads=4, hidden_size=32, num_layers=1)
    usual |= dict(source="tests", input_size=3, output_size=2)
    return {
        **dict(configuration=configuration, sweep=sweep, mode=mode, peer=peer, status=status, note=note),
        **usual,
        **sizes,
        **dict(backend="reference" if peer == "dnc_triton" else ""),
        **times,
    }


@pytest.fixture(name="results")
def _results():
    rows = [row("copy", mode, peer, time) for mode in ("training", "step") for peer, time in PEERS.items()]
    rows += [row("recall", "training", "dnc_triton", 2.0), row("recall", "training", "lstm", 0.01)]
    rows.append(row("recall", "training", "retired_peer", 1.5))
    rows.append(row("recall", "training", "pypi_dnc", status="missing", note="dnc is not installed"))
    rows.append(row("recall", "training", "compiled", status="wrong", note="compiled is wrong"))
    for sweep, name, sizes in (("B", "batch", (1, 4)), ("N", "memory_size", (16, 32)), ("T", "steps", (5, 10))):
        for size in sizes:
            changed = {name: size}
            rows.append(row(f"base/{sweep}={size}", "training", "dnc_triton", 1.0 + size, sweep=sweep, **changed))
    return {"machine": MACHINE, "left_out": ["copy, forward: the time is up"], "rows": rows}


def written(folder, name, results):
    path = folder / name
    path.write_text(json.dumps(results), encoding="utf-8")
    return path
