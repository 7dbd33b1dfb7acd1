"""What the benchmark's pictures show."""

from __future__ import annotations

import pytest
from made_up_results import _results, row, written  # noqa: F401
from matplotlib.figure import Figure

from benchmarks import peers, pictures
from benchmarks.__main__ import main
from benchmarks.files import case_of_record
from benchmarks.floors import operations


@pytest.fixture
def drawn(tmp_path, results, monkeypatch):
    """The pictures' figures, by name; none is written. The noise is larger on the slow side."""
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


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_there_are_no_pictures_of_what_was_not_measured(tmp_path, results, status):
    results["rows"] = [row("copy", "training", "dnc_triton", status=status, note=f"dnc_triton is {status}")]
    assert main(["report", str(written(tmp_path, "cpu.json", results))]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cpu.json", "cpu.md"]
    assert f"| copy (16, 8, 4, 32; 2, 3) | training | dnc_triton | {status} |" in (tmp_path / "cpu.md").read_text()


def test_every_peer_has_a_look_of_its_own():
    assert len(set(pictures.COLORS)) == len(set(pictures.MARKERS)) >= len(peers.PEERS)
