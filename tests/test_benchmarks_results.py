"""What is made of the benchmark's results: tables, pictures, and the comparison of two of them."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from matplotlib.figure import Figure

from benchmarks import goals, machine, peers, pictures, report
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.configurations import SIZES
from benchmarks.files import case_of_record, read_results
from benchmarks.floors import operations

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
    """Of copy the reference takes 1.5 times as long; of two configurations the LSTM 0.25 and 0.005 times."""
    results["rows"].append(row("copy", "training", "torch_sequence", 1.0, spread=0.5))  # of its median
    lines = report.markdown(results).splitlines()
    training = lines.index("| than | reference, eager | nn.LSTM | retired_peer |")
    assert lines[training + 2] == "| dnc_triton | 1.50× (1) | 0.04× (2) | 0.75× (1) |"
    assert lines[training + 3] == "| dnc_triton, torch_sequence | 3.00× (1) | 0.50× (1) | – |"
    assert "| dnc_triton | 1.50× (1) | 0.25× (1) |" in lines  # of a single step
    page = report.markdown(results)
    assert "Goals" not in page
    assert report.OF_A_GPU not in page


@pytest.fixture
def drawn(tmp_path, results, monkeypatch):
    """The pictures' figures, by name; none is written. The noise is more on the slow side."""
    for measured in results["rows"]:
        if measured["status"] == "measured":
            measured["ms_per_step_p80"] = 1.5 * measured["ms_per_step_p50"]
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.setdefault(path.stem, figure))
    pictures.draw(results, tmp_path / "cpu")
    return figures


def test_bars_are_times_of_ours_with_whiskers(drawn):
    training, step = drawn["cpu-bars"].axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in training.containers[::2]}
    assert heights == {
        "dnc_triton": pytest.approx([1, 1]),
        "reference, eager": pytest.approx([1.5]),
        "nn.LSTM": pytest.approx([0.25, 0.005]),
        "retired_peer": pytest.approx([0.75]),
    }
    whiskers = [segment[:, 1].tolist() for lines in training.collections for segment in lines.get_segments()]
    assert whiskers == [pytest.approx([0.95 * x, 1.5 * x]) for x in (1, 1, 1.5, 0.25, 0.005, 0.75)]
    assert [text.get_text() for text in training.get_xticklabels()] == ["copy\n2.00 ms", "recall\n2.00 ms"]
    assert [axes.get_title("left").split(";")[0] for axes in (training, step)] == ["training", "step"]
    assert training.get_yscale() == "linear"


def test_scaling_is_over_the_size_that_a_sweep_varies(drawn):
    panels = drawn["cpu-scaling"].axes
    assert [axes.get_title("left") for axes in panels] == [f"training, over {sweep}" for sweep in "BNT"]
    for axes, sizes in zip(panels, ([1, 4], [16, 32], [5, 10]), strict=True):
        (line,), (band,) = axes.lines, axes.collections
        assert line.get_xdata().tolist() == sizes
        assert line.get_ydata().tolist() == [1.0 + size for size in sizes]
        least, most = (1 + sizes[0]) * 0.95, (1 + sizes[1]) * 1.5
        (area,) = band.get_paths()
        assert [area.vertices[:, 1].min(), area.vertices[:, 1].max()] == pytest.approx([least, most])


def test_a_roofline_has_what_is_computed_and_moved_in_a_second(results, drawn):
    left, right = drawn["cpu-roofline"].axes
    measured = [row for row in results["rows"] if row["status"] == "measured" and row["peer"] == "reference"]
    computed = [operations(case_of_record(row), row["mode"]) for row in measured]
    (speed,), (moved,) = (
        [line for line in axes.lines if line.get_label() == "reference, eager"] for axes in (left, right)
    )
    assert speed.get_xdata() == pytest.approx([number / 1e6 for number in computed])  # of the floor's bytes
    assert speed.get_ydata() == pytest.approx([number / 0.003 / 1e9 for number in computed])
    assert (moved.get_xdata(), moved.get_ydata()) == (pytest.approx([1, 1]), pytest.approx([1, 1]))
    (roof,) = (line for line in left.lines if line.get_label().startswith("_"))
    assert [float(x * 20) for x in roof.get_xdata()[:2]] == pytest.approx(roof.get_ydata()[:2])
    assert roof.get_xdata()[1] == 5
    assert roof.get_ydata()[1:].tolist() == [100, 100]
    assert {line.get_ydata()[0] for line in right.lines if line.get_label().startswith("_")} == {20}


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
    assert [(goal.limit, goal.at_least) for goal in goals.MEMORY] == [(1 / 3, False), (1 / 10, False)]


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
    memory = [("reference", None, 1200), ("auto", "auto", 500), ("auto", None, 300), ("auto", 16, 150)]
    rows = [dict(backend=name, checkpoint=kept, grown_bytes=grown, finite=True) for name, kept, grown in memory]
    lines = goals.table(goals.MEMORY, rows).splitlines()[2:]
    assert [line.split(" | ", 1)[1] for line in lines] == ["≤ 0.333 | 0.25 | reached |", "≤ 0.1 | 0.125 | missed |"]
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


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_there_are_no_pictures_of_what_was_not_measured(tmp_path, results, status):
    results["rows"] = [row("copy", "training", "dnc_triton", status=status, note=f"dnc_triton is {status}")]
    assert main(["report", str(written(tmp_path, "cpu.json", results))]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cpu.json", "cpu.md"]
    assert f"| copy (16, 8, 4, 32; 2, 3) | training | dnc_triton | {status} |" in (tmp_path / "cpu.md").read_text()


DAMAGED = {
    **dict(configuration="copy", peer="lstm", mode="step", status="measured"),
    **{f"ms_per_step_p{percentile}": 1.0 for percentile in (20, 50, 80)},
}


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


# --- compare ----------------------------------------------------------------------------------------------------------


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
        row.pop("calls", None)  # as files were written before
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


def test_every_peer_has_a_look_of_its_own():
    assert len(set(pictures.COLORS)) == len(set(pictures.MARKERS)) >= len(peers.PEERS)
