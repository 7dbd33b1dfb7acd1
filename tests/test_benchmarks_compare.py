"""The comparison of two of the benchmark's results: what became slower beyond the noise, and what cannot be told."""

from __future__ import annotations

import copy

import pytest
from made_up_results import MACHINE, _results, written  # noqa: F401

from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.configurations import SIZES


def test_where_nothing_can_be_compared_that_is_no_success(tmp_path, results):
    paths = [str(written(tmp_path, "old.json", results)), str(written(tmp_path, "new.json", {**results, "rows": []}))]
    assert main(["compare", *paths]) == 2
    assert main(["compare", paths[0], paths[0]]) == 0


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


@pytest.mark.parametrize("size", ["batch", "steps", *SIZES])
def test_sizes_are_compared_where_both_have_them(results, size):
    new = copy.deepcopy(results)
    new["rows"][0][size] += 1
    found = compare(results, new)
    assert found.incomparable == [
        f"copy, training, dnc_triton: other sizes, {size} {results['rows'][0][size]} → {new['rows'][0][size]}"
    ]
    del results["rows"][0][size]
    assert compare(results, new).incomparable == []


@pytest.mark.parametrize(("status", "is_regression"), [("wrong", True), ("failed", True), ("missing", False)])
def test_a_time_that_was_lost_is_told(results, status, is_regression):
    new = copy.deepcopy(results)
    new["rows"][0] |= {"status": status, "ms_per_step_p50": None}
    found = compare(results, new)
    assert len(found.regressions) == is_regression
    assert len(found.incomparable) == (not is_regression)
    assert status in (found.regressions + found.incomparable)[0]
    assert compare(new, results).regressions == []


def test_calls_in_a_row_are_not_compared_with_calls_that_were_waited_for(results):
    new, many = copy.deepcopy(results), copy.deepcopy(results)
    for rows, calls in ((new["rows"], 1), (many["rows"], 10)):
        for row in rows:
            row["calls"] = calls
    for row in results["rows"]:
        row.pop("calls", None)  # as in older files
    measured = sum(row["status"] == "measured" for row in results["rows"])
    assert compare(results, new).compared == compare(many, many).compared == measured
    for before, now in ((results, many), (many, results), (new, many)):
        found = compare(before, now)
        assert found.compared == 0
        assert sum(": calls in a row on one side" in text for text in found.incomparable) == measured


def test_another_machine_is_a_caution(results):
    new = copy.deepcopy(results)
    new["machine"] |= {"gpu": "a GPU", "torch": "2.13.0"}
    assert compare(results, new).cautions == ["gpu: None before, a GPU now", "torch: 2.11.0 before, 2.13.0 now"]
    for name in ("device", "cpu", "gpu", "threads", "python", "torch", "triton"):
        new["machine"] = {**MACHINE, name: "another"}
        assert compare(results, new).cautions == [f"{name}: {MACHINE[name]} before, another now"]


@pytest.mark.parametrize("variables", [{}, {"DNC_TRITON_GRAPHS": "0"}])
def test_what_the_environment_changes_is_recorded_and_told(results, variables, monkeypatch):
    for name in machine.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    described = machine.describe_machine("")
    assert described["environment"] == variables
    new = {**results, "machine": {**MACHINE, "environment": described["environment"]}}
    told = [f"environment: None before, {variables} now"] if variables else []
    assert compare(results, new).cautions == told
