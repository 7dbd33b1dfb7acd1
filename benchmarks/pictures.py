"""Pictures of a result: bars against the peers, scaling over B, N and T, and a roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.configurations import SWEPT
from benchmarks.files import case_of_record
from benchmarks.floors import operations
from benchmarks.measure import MEASURED
from benchmarks.report import Record, label_of, milliseconds
from dnc_triton.pictures import STYLE

COLORS = ["#1f6f8b", "#e08e45", "#7a9e7e", "#8c5e8a", "#c9525b", "#b8a24a", "#5f6b78", "#4a90c2", "#a0765b"]
COLORS += ["#2f2f2f", "#d98cb3", "#3f7f4f", "#9fb8d0"]
MOST_LINEAR = 10  # times as long; beyond, the scale is logarithmic, so that bars as short as ours can be seen
MARKERS = "osv^Dd<>PXh*p"  # as many, so that on a GPU all peers can be told apart


def draw(results: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what the result has rows for.

    Args:
        results: as `read_results` gives them.
        stem: of the PNGs, <stem>-bars.png and so on.

    Returns:
        the paths of the pictures.
    """
    rows = [row for row in results["rows"] if row["status"] == MEASURED]
    styles = {
        peer: {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
        for place, peer in enumerate(dict.fromkeys(row["peer"] for row in rows))
    }
    paths = []
    with mpl.rc_context(STYLE):
        figures = {
            "bars": _draw_bars(rows, styles),
            "scaling": _draw_scaling(rows, styles),
            "roofline": _draw_roofline(rows, styles, results["machine"]),
        }
        for name, figure in figures.items():
            if figure is not None:
                paths.append(stem.with_name(f"{stem.name}-{name}.png"))
                figure.savefig(paths[-1], dpi=150)
    return paths


def _draw_bars(rows: list[Record], styles: dict[str, Any]) -> Figure | None:
    """A panel per mode, a group of bars per configuration: how many times as long as our layer each peer takes.

    The whiskers go from the 20th to the 80th percentile; under each configuration stands our median.
    """
    rows = [row for row in rows if not row.get("sweep") and row.get("ratio") is not None]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if not modes:
        return None
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure = Figure(figsize=(max(6.0, 1.5 * len(names) + 1), 0.6 + 2.6 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), squeeze=False)[:, 0]
    width = 0.85 / len(peers)
    for axes, mode in zip(panels, modes, strict=True):
        here = [row for row in rows if row["mode"] == mode]
        ours = {row["configuration"]: row["ms_per_step_p50"] / row["ratio"] for row in here}
        for place, peer in enumerate(peers):
            found = [row for row in here if row["peer"] == peer]
            if not found:
                continue
            at = [names.index(row["configuration"]) + (place - (len(peers) - 1) / 2) * width for row in found]
            middle, low, high = (times / [ours[row["configuration"]] for row in found] for times in _percentiles(found))
            axes.bar(at, middle, width, color=styles[peer]["color"], label=label_of(peer))
            axes.errorbar(at, middle, yerr=[middle - low, high - middle], fmt="none", ecolor="#444444", elinewidth=0.7)
        axes.axhline(1, color="#444444", linewidth=0.5)
        if max(row["ratio"] for row in here) > MOST_LINEAR:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel("times dnc_triton's time")
        axes.set_title(f"{mode}; below, dnc_triton's milliseconds per time step")
        labels = [f"{name}\n{milliseconds(ours[name])} ms" if name in ours else name for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=7)
    _legend(figure, list(panels))
    return figure


def _draw_scaling(rows: list[Record], styles: dict[str, Any]) -> Figure | None:
    """A panel per sweep, a row of them per mode, a line per peer."""
    rows = [row for row in rows if row.get("sweep")]
    sweeps = [sweep for sweep in SWEPT if any(row["sweep"] == sweep for row in rows)]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if not sweeps:
        return None
    figure = Figure(figsize=(1 + 3 * len(sweeps), 0.6 + 2.6 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(sweeps), squeeze=False)
    for line, mode in enumerate(modes):
        for column, sweep in enumerate(sweeps):
            axes = panels[line, column]
            here = [row for row in rows if (row["mode"], row["sweep"]) == (mode, sweep)]
            for peer in dict.fromkeys(row["peer"] for row in here):
                found = sorted((row for row in here if row["peer"] == peer), key=lambda row: row[SWEPT[sweep]])
                middle, low, high = _percentiles(found)
                sizes = [row[SWEPT[sweep]] for row in found]
                axes.plot(sizes, middle, markersize=4, linewidth=1.2, label=label_of(peer), **styles[peer])
                axes.fill_between(sizes, low, high, color=styles[peer]["color"], alpha=0.2, linewidth=0)
            _logarithmic(axes)
            axes.set_xticks(sorted({row[SWEPT[sweep]] for row in here}))
            axes.set_xlabel(f"{sweep}, {SWEPT[sweep].replace('_', ' ')}")
            axes.set_title(f"{mode}, over {sweep}")
        panels[line, 0].set_ylabel("ms per time step")
    _legend(figure, list(panels.flat))
    return figure


def _draw_roofline(rows: list[Record], styles: dict[str, Any], machine: Record) -> Figure | None:
    """Operations of a step per second, over its operations per byte of link and memory that must move.

    The roof is the speed of a copy, and that of a large product where it was measured. A second panel shows the bytes
    per second, over their number: how far small networks are from any roof.
    """
    rows = [row for row in rows if row.get("bytes_per_second")]
    rows = [{**row, "operations": operations(case_of_record(row), row["mode"])} for row in rows]
    copied, computed = machine.get("bytes_per_second"), machine.get("operations_per_second")
    if not rows or not copied:
        return None
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for peer in dict.fromkeys(row["peer"] for row in rows):
        found = [row for row in rows if row["peer"] == peer]
        style: dict[str, Any] = dict(linestyle="none", markersize=5, alpha=0.8, label=label_of(peer), **styles[peer])
        speed = [row["operations"] / row["ms_per_step_p50"] / 1e6 for row in found]
        left.plot([row["operations"] / row["floor_bytes"] for row in found], speed, **style)
        moved = [row["floor_bytes"] / 1e6 for row in found]
        right.plot(moved, [row["bytes_per_second"] / 1e9 for row in found], **style)
    intensities = [row["operations"] / row["floor_bytes"] for row in rows]
    least, most = min(intensities) / 1.5, max(intensities) * 1.5
    ends = np.array([least, most] if computed is None else [least, computed / copied, max(most, 3 * computed / copied)])
    roof = ends * copied if computed is None else np.minimum(ends * copied, computed)
    left.plot(ends, roof / 1e9, color="#444444", linewidth=1)
    right.axhline(copied / 1e9, color="#444444", linewidth=1)
    copy, above = f"a copy: {copied / 1e9:,.0f} GB/s", dict(textcoords="offset points", xytext=(0, 3))
    left.annotate(copy, (ends[0], roof[0] / 1e9), xytext=(-8, 36), textcoords="offset points")
    right.annotate(copy, (0.01, copied / 1e9), xycoords=("axes fraction", "data"), **above)
    if computed is not None:
        product = f"a large product: {computed / 1e9:,.0f} GFLOP/s"
        left.annotate(product, (ends[-1], computed / 1e9), horizontalalignment="right", **above)
    for axes in (left, right):
        _logarithmic(axes)
    left.set_xlabel("floating-point operations per byte of link and memory")
    left.set_ylabel("GFLOP/s")
    left.set_title("all of a time step")
    right.set_xlabel("MB of link and memory that a time step must move")
    right.set_ylabel("GB/s of link and memory")
    right.set_title("beside the floor")
    _legend(figure, [left, right])
    return figure


def _logarithmic(axes: Axes) -> None:
    """Logarithmic axes, with plain decimal numbers."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _percentiles(rows: list[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 50th, 20th and 80th percentiles."""
    middle, low, high = (np.array([row[f"ms_per_step_p{p}"] for row in rows]) for p in (50, 20, 80))
    return middle, low, high


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend for all panels."""
    entries: dict[str, Any] = {}
    for axes in panels:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(entries.values()), list(entries), loc="outside upper center", ncols=min(3, len(entries)), frameon=False
    )
