"""What is made of the benchmark's results: tables, pictures, and the comparison of two of them."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.files import read_results

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
}


def row(configuration, mode, peer, median=None, *, spread=0.1, sweep="", status="measured", note="", **sizes):
    """A row as it is written; half of the spread below the median, half above."""
    times = dict.fromkeys(("ms_per_step_p20", "ms_per_step_p50", "ms_per_step_p80", "ratio", "bytes_per_second"))
    if median is not None:
        low, high = median * (1 - spread / 2), median * (1 + spread / 2)
        times = dict(ms_per_step_p20=low, ms_per_step_p50=median, ms_per_step_p80=high, ratio=median / 2)
        times |= dict(bytes_per_second=1e9, floor_bytes=10**6, floor_share=0.05, peak_bytes=12_345_678, error=3e-7)
    usual = dict(batch=2, steps=3, memory_size=16, word_size=8, num_reads=4, hidden_size=32, num_layers=1)
    return {
        **dict(configuration=configuration, sweep=sweep, mode=mode, peer=peer, status=status, note=note),
        **usual,
        **sizes,
        **dict(backend="reference" if peer == "dnc_triton" else ""),
        **times,
    }


@pytest.fixture
def results():
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


PEERS = {"dnc_triton": 2.0, "reference": 3.0, "lstm": 0.5}


def written(folder, name, results):
    path = folder / name
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


# --- report -----------------------------------------------------------------------------------------------------------


def test_a_report_has_tables_and_pictures(tmp_path, results, capsys):
    path = written(tmp_path, "cpu.json", results)
    assert main(["report", str(path)]) == 0
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    lines = page.splitlines()
    assert "| configuration (N, W, R, H; B, T) | dnc_triton | reference, eager | nn.LSTM | retired_peer |" in lines
    assert "| copy (16, 8, 4, 32; 2, 3) | 2.00 (reference) | 3.00 (1.50×) | 0.5 (0.25×) | – |" in lines
    assert "| recall (16, 8, 4, 32; 2, 3) | 2.00 (reference) | – | 0.01 (0.01×) | 1.50 (0.75×) |" in lines
    figures = "| 2.00 | 1.90 to 2.10 | 1.00 | 12.3 | 1.0 | 5.0% | 3e-07 |"
    assert f"| copy (16, 8, 4, 32; 2, 3) | training | dnc_triton {figures}" in lines
    assert lines[-3:] == ["- dnc is not installed", "- compiled is wrong", "- copy, forward: the time is up"]
    assert "a processor, threads: 2; Python 3.12.0, PyTorch 2.11.0; 2026-01-02" in page
    for picture in ("bars", "scaling", "roofline"):
        assert f"![](cpu-{picture}.png)" in lines
        assert (tmp_path / f"cpu-{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_there_are_no_pictures_of_what_was_not_measured(tmp_path, results):
    results["rows"] = [row("copy", "training", "dnc_triton", status="wrong", note="dnc_triton is wrong")]
    assert main(["report", str(written(tmp_path, "cpu.json", results))]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cpu.json", "cpu.md"]
    assert "| copy (16, 8, 4, 32; 2, 3) | training | dnc_triton | wrong |" in (tmp_path / "cpu.md").read_text()


def test_without_matplotlib_there_are_tables(tmp_path, results, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "benchmarks.pictures", None)
    assert main(["report", str(written(tmp_path, "cpu.json", results))]) == 0
    assert "No pictures: matplotlib is not installed" in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cpu.json", "cpu.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "expected a JSON object with machine and rows"),
        ('{"machine": {}, "rows": [{"peer": "lstm"}]}', "configuration is missing in one"),
    ],
)
def test_a_file_without_results_is_explained(tmp_path, text, message, capsys):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(path)
    for arguments in (["report", str(path)], ["compare", str(path), str(path)]):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


# --- compare ----------------------------------------------------------------------------------------------------------


def changed(results, factor, place=0):
    """The results with one row slower by a factor."""
    new = copy.deepcopy(results)
    for percentile in (20, 50, 80):
        new["rows"][place][f"ms_per_step_p{percentile}"] *= factor
    return new


@pytest.mark.parametrize(
    ("factor", "margin", "verdict"),
    [
        (1.0, 0.05, ""),
        (1.10, 0.05, ""),  # from 1.9…2.1 to 2.09…2.31: within the noise
        (1.15, 0.05, ""),  # to 2.185…: beyond the noise, not beyond the margin
        (1.15, 0.03, "slower"),
        (1.20, 0.05, "slower"),  # to 2.28…2.52
        (0.80, 0.05, "faster"),  # to 1.52…1.68
        (0.87, 0.05, ""),  # to …1.827
    ],
)
def test_what_is_beyond_the_noise_and_the_margin_is_flagged(results, factor, margin, verdict):
    found = compare(results, changed(results, factor), margin)
    assert (len(found.regressions), len(found.improvements)) == (verdict == "slower", verdict == "faster")
    assert found.compared == sum(row["status"] == "measured" for row in results["rows"])
    assert (found.incomparable, found.cautions) == ([], [])
    for text in found.regressions + found.improvements:
        assert text.startswith("copy, training, dnc_triton: 1.9 to 2.1 ms before")
        assert f"the median {factor - 1:+.0%}" in text


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_when_the_yardstick_differs_it_is_the_machine(results, factor):
    found = compare(results, changed(results, factor, place=2))
    assert (found.regressions, found.improvements) == ([], [])
    (caution,) = found.cautions
    assert caution.startswith("copy, training, lstm: ")
    assert caution.endswith("the machine was another or busy")


def test_a_regression_fails_the_command(tmp_path, results, capsys):
    old, new = written(tmp_path, "old.json", results), written(tmp_path, "new.json", changed(results, 1.5))
    assert main(["compare", str(old), str(old)]) == 0
    assert "slower: 0, faster: 0" in capsys.readouterr().out
    assert main(["compare", str(old), str(new)]) == 1
    printed = capsys.readouterr().out
    assert "Slower:\n  copy, training, dnc_triton" in printed
    assert "slower: 1, faster: 0" in printed
    assert main(["compare", str(old), str(new), "--margin", "60"]) == 0
    assert main(["compare", str(new), str(old)]) == 0
    assert "Faster:\n  copy, training, dnc_triton" in capsys.readouterr().out


def test_what_is_on_one_side_only_is_told(results):
    new = copy.deepcopy(results)
    new["rows"][0]["mode"] = "forward"
    new["rows"][1]["batch"] = 64
    found = compare(results, new)
    assert found.incomparable == [
        "copy, training, dnc_triton: only in the old results",
        "copy, training, reference: other sizes, batch 2 → 64",
        "copy, forward, dnc_triton: only in the new results",
    ]
    assert found.regressions == []


@pytest.mark.parametrize(("status", "is_regression"), [("wrong", True), ("failed", True), ("missing", False)])
def test_a_time_that_was_lost_is_told(results, status, is_regression):
    new = copy.deepcopy(results)
    new["rows"][0] |= {"status": status, "ms_per_step_p50": None}
    found = compare(results, new)
    assert len(found.regressions) == is_regression
    assert len(found.incomparable) == (not is_regression)
    assert status in (found.regressions + found.incomparable)[0]
    assert compare(new, results).regressions == []


def test_another_machine_is_a_caution(results):
    new = copy.deepcopy(results)
    new["machine"] |= {"gpu": "a GPU", "torch": "2.13.0"}
    assert compare(results, new).cautions == ["gpu: None before, a GPU now", "torch: 2.11.0 before, 2.13.0 now"]
