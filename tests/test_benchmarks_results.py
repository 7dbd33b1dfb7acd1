"""What is made of the benchmark's results: tables, and goals that are reached or missed."""

from __future__ import annotations

import json
import sys

import pytest
from made_up_results import MACHINE, _results, row, written  # noqa: F401

from benchmarks import goals, report
from benchmarks.__main__ import main
from benchmarks.files import read_results


def test_a_report_has_tables_and_pictures(tmp_path, results, capsys):
    path = written(tmp_path, "cpu.json", results)
    assert main(["report", str(path)]) == 0
    page = (tmp_path / "cpu.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    lines = page.splitlines()
    assert "| configuration (N, W, R, H; B, T) | dnc_triton | reference, eager | nn.LSTM | retired_peer |" in lines
    assert "| copy (16, 8, 4, 32; 2, 3) | 2.00 (reference) | 3.00 (1.50×) | 0.5 (0.25×) | – |" in lines
    assert "| recall (16, 8, 4, 32; 2, 3) | 2.00 (reference) | – | 0.01 (0.01×) | 1.50 (0.75×) |" in lines
    swept = [line.startswith("| base/") for line in lines]
    assert swept.index(True) > lines.index("## Every figure")
    assert sum(swept) == 6
    figures = "| 2.00 | 1.90 to 2.10 | 1.00 | 12.3 | 1.0 | 5.0% | 3e-07 |"
    assert f"| copy (16, 8, 4, 32; 2, 3) | training | dnc_triton {figures}" in lines
    assert lines[-3:] == ["- dnc is not installed", "- compiled is wrong", "- copy, forward: the time is up"]
    assert "The floor is reckoned with 20 GB/s." in page
    assert "a processor, threads: 2; Python 3.12.0, PyTorch 2.11.0; 2026-01-02" in page
    for picture in ("bars", "scaling", "roofline"):
        assert f"![](cpu-{picture}.png)" in lines
        assert (tmp_path / f"cpu-{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("differs", ["", "-dirty"])
def test_a_report_tells_whether_the_files_were_those_of_the_commit(results, differs):
    results["machine"] = {**MACHINE, "commit": 4 * "0123456789" + differs}
    assert f", commit 0123456789{differs}; float32." in report.markdown(results)


def test_geometric_means_are_over_what_both_have(results):
    """On copy the reference takes 1.5 times as long; on two configurations the LSTM takes 0.25 and 0.005 times."""
    results["rows"].append(row("copy", "training", "torch_sequence", 1.0, spread=0.5))  # of its median
    lines = report.markdown(results).splitlines()
    training = lines.index("| than | reference, eager | nn.LSTM | retired_peer |")
    assert lines[training + 2] == "| dnc_triton | 1.50× (1) | 0.04× (2) | 0.75× (1) |"
    assert lines[training + 3] == "| dnc_triton, torch_sequence | 3.00× (1) | 0.50× (1) | – |"
    assert "| dnc_triton | 1.50× (1) | 0.25× (1) |" in lines  # of a single step
    page = report.markdown(results)
    assert "Goals" not in page
    assert report.OF_A_GPU not in page


def test_what_is_empty_throughout_has_no_column(results):
    for measured in results["rows"]:
        measured["peak_bytes"] = None
    page = report.markdown(results)
    assert "peak MB" not in page
    assert "| copy (16, 8, 4, 32; 2, 3) | training | dnc_triton | 2.00 | 1.90 to 2.10 | 1.00 | 1.0 | 5.0% |" in page


def test_calls_in_a_row_are_told_where_there_are_any(results):
    results["rows"][0]["calls"], results["rows"][1]["calls"] = 4, 1
    page = report.markdown(results)
    assert "| 20th to 80th percentile | calls in a row | ratio |" in page
    assert "| training | dnc_triton | 2.00 | 1.90 to 2.10 | 4 | 1.00 |" in page
    assert "| training | reference, eager | 3.00 | 2.85 to 3.15 |  | 1.50 |" in page


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123"), (0.5, "0.5"), (1.234, "1.23"), (12.344, "12.34")])
def test_milliseconds_have_three_digits_or_two_behind_the_point(value, text):
    assert report.milliseconds(value) == text


def test_goals_are_reached_missed_or_not_measured(results):
    results["machine"] = {**MACHINE, "device": "cuda", "gpu": "NVIDIA H200"}
    rows = results["rows"] = [
        row("deepmind_repeat_copy", "training", "dnc_triton", 0.019),
        row("deepmind_repeat_copy", "training", "lstm", 0.004),
        row("deepmind_repeat_copy", "training", "reference", 0.019 * 20.5),
        row("adnc_babi", "training", "dnc_triton", 0.061),
        row("adnc_babi", "training", "reference", 0.061 * 45),
        row("sam_scaling_2048", "training", "dnc_triton", 1.0),
        row("nature_babi", "forward", "dnc_triton", 0.001),
        row("nature_babi_wide", "training", "dnc_triton", status="wrong", note="wrong"),
        row("base/N=16", "training", "reference", 100.0, sweep="N"),
        row("base/N=16", "training", "dnc_triton", 1.0, sweep="N"),
    ]
    for measured in rows:
        measured["peak_bytes"] = 60 if measured["peer"] == "reference" else 30
    rows[0]["peak_bytes"] = 6
    page = report.markdown(results)
    assert report.OF_A_GPU in page
    assert "NVIDIA H200; Python 3.12.0, PyTorch 2.11.0, Triton 3.6.0; " in page
    verdicts = dict(line[2:].split(" | ", 1) for line in page.splitlines() if line.startswith("| "))
    assert verdicts["deepmind_repeat_copy, training, µs per time step"] == "≤ 20 | 19 | reached |"
    assert verdicts["adnc_babi, training, µs per time step"] == "≤ 60 | 61 | missed |"
    for name in ("nature_babi", "nature_babi_wide", "csordas_repeat_copy"):
        assert verdicts[f"{name}, training, µs per time step"].endswith("| | not measured |")
    assert verdicts["sam_scaling_2048, training, times its byte floor"] == "≤ 2 | 20 | missed |"
    mean = "training, {} over dnc_triton, geometric mean"
    assert verdicts[mean.format("reference")] == "≥ 30 | 30.37 | reached so far, over 2 of 8 configurations |"
    assert verdicts[mean.format("pypi_dnc")] == "≥ 30 | | not measured |"
    assert verdicts["deepmind_repeat_copy, training, dnc_triton over lstm"] == "≤ 4 | 4.75 | missed |"
    memory = "training, peak of memory, part of eager's, the largest"
    assert verdicts[memory] == "≤ 0.333 | 0.5 | missed so far, over 2 of 8 configurations |"


def test_the_limits_are_those_that_were_set():
    """A limit that is moved is another goal: then it is moved here as well."""
    limits = {goal.what: (">=" if goal.at_least else "<=", goal.limit, goal.over) for goal in goals.TIMES}
    microseconds = {"deepmind": 20, "csordas": 20, "nature": 60, "adnc": 60}
    for what in [what for what in limits if "µs" in what]:
        assert limits.pop(what) == ("<=", microseconds[what.split("_")[0]], 1)
    assert limits == {
        "sam_scaling_2048, training, times its byte floor": ("<=", 2, 1),
        "training, reference over dnc_triton, geometric mean": (">=", 30, 8),
        "training, pypi_dnc over dnc_triton, geometric mean": (">=", 30, 8),
        "training, compiled_cuda_graphs over dnc_triton, geometric mean": (">=", 4, 8),
        "deepmind_repeat_copy, training, dnc_triton over lstm": ("<=", 4, 1),
        "csordas_repeat_copy, training, dnc_triton over lstm": ("<=", 4, 1),
        "training, peak of memory, part of eager's, the largest": ("<=", 1 / 3, 8),
    }
    assert [(goal.limit, goal.at_least) for goal in goals.STEPS] == [(6, False), (10, False), (16, False), (28, False)]
    assert [(goal.limit, goal.at_least) for goal in goals.MEMORY] == [(1 / 3, False), (1 / 10, False), (8, False)]


def test_what_is_as_much_as_the_limit_reaches_it():
    for at_least, nearly in ((False, 5.01), (True, 4.99)):
        for value, verdict in ((5.0, "reached"), (nearly, "missed")):
            goal = goals.Goal("goal", 5, lambda rows, value=value: (value, 1), at_least)
            assert goals.table([goal], []).endswith(f" | {verdict} |")


def test_a_captured_training_is_measured_by_its_own_rows():
    rows = [row("nature_babi", mode, "dnc_triton", time) for mode, time in (("training", 0.07), ("captured", 0.05))]
    lines = goals.table(goals.TIMES, rows).splitlines()
    assert "| nature_babi, training, µs per time step | ≤ 60 | 70 | missed |" in lines
    assert "| nature_babi, captured, µs per time step | ≤ 60 | 50 | reached |" in lines


def test_goals_of_a_step_and_of_memory():
    sizes = dict(batch=16, memory_size=16, word_size=16, num_reads=4)
    steps = [
        dict(**sizes, who="fused 16×16, 4 warps", forward_us=5.0, backward_us=12.0),
        dict(**sizes, who="split 16×16, 8 warps", forward_us=7.0, backward_us=11.0),
        dict(**sizes, who="split 16×32, 8 warps", forward_us=None, backward_us=None),
        dict(**sizes, who="sequence of 32", forward_us=1.0, backward_us=1.0),
        dict(**{**sizes, "batch": 64}, who="fused 16×16, 4 warps", forward_us=1.0, backward_us=1.0),
    ]
    lines = goals.table(goals.STEPS, steps).splitlines()[2:]
    assert [line.split("| ")[-1] for line in lines] == ["reached |", "missed |", *["not measured |"] * 2]
    assert lines[1] == "| memory step (16, 16, 16, 4), backward, µs | ≤ 10 | 11 | missed |"
    memory = [
        ("reference", 256, None, 1200),
        ("auto", 256, "auto", 500),
        ("auto", 256, None, 300),
        ("auto", 256, 16, 150),
        ("auto", 1000, 16, 10),
        ("auto", 1000, 32, 8_100_000_000),
    ]
    rows = [
        dict(backend=name, steps=steps, checkpoint=kept, grown_bytes=grown, finite=True)
        for name, steps, kept, grown in memory
    ]
    lines = goals.table(goals.MEMORY, rows).splitlines()[2:]
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "≤ 0.333 | 0.25 | reached |",
        "≤ 0.1 | 0.125 | missed |",
        "≤ 8 | 8.1 | missed |",
    ]
    rows[-1]["finite"] = False
    assert goals.table(goals.MEMORY, rows).splitlines()[-1].endswith("| not measured |")


def test_a_report_is_named_after_all_of_a_file_s_name(tmp_path, results, capsys):
    (tmp_path / "cpu.md").write_text("precious")
    assert main(["report", str(written(tmp_path, "cpu.v2.json", results))]) == 0
    assert (tmp_path / "cpu.md").read_text() == "precious"
    assert f"Written: {tmp_path / 'cpu.v2.json'}, {tmp_path / 'cpu.v2.md'}, " in capsys.readouterr().out


def test_a_report_that_cannot_be_written_is_a_line(tmp_path, results, monkeypatch, capsys):
    path = written(tmp_path, "cpu.json", results)
    monkeypatch.setattr("benchmarks.__main__.find_spec", lambda name: None)
    (tmp_path / "cpu.md").mkdir()
    assert main(["report", str(path)]) == 2
    assert str(tmp_path / "cpu.md") in capsys.readouterr().err.splitlines()[-1]


def test_without_matplotlib_there_are_tables(tmp_path, results, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "benchmarks.pictures", None)
    assert main(["report", str(written(tmp_path, "cpu.json", results))]) == 0
    assert "No pictures: matplotlib is not installed" in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cpu.json", "cpu.md"]


DAMAGED = {
    **dict(configuration="copy", peer="lstm", mode="step", status="measured"),
    **{f"ms_per_step_p{percentile}": 1.0 for percentile in (20, 50, 80)},
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "expected a JSON object with machine and rows"),
        ('{"machine": {}, "rows": [{"peer": "lstm"}]}', "configuration is missing in one"),
        (json.dumps({"machine": {}, "rows": [{**DAMAGED, "mode": ["step"]}]}), "expected text for configuration"),
        (json.dumps({"machine": {}, "rows": [{**DAMAGED, "ms_per_step_p50": None}]}), "expected times above 0"),
        (json.dumps({"machine": {}, "rows": [{**DAMAGED, "ms_per_step_p20": "1"}]}), "expected times above 0"),
        (json.dumps({"machine": {}, "rows": [{**DAMAGED, "ms_per_step_p80": 0}]}), "expected times above 0"),
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


def test_a_report_on_what_no_run_writes_is_explained(tmp_path, results, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.find_spec", lambda name: None)
    results["rows"][0]["floor_share"] = "much"
    path = written(tmp_path, "odd.json", results)
    assert main(["report", str(path)]) == 2
    assert f"{path}: expected results as `run` writes them" in capsys.readouterr().err
