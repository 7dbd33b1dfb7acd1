"""An interactive look into the memory: one HTML page that contains all it needs and opens without a network."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from torch import Tensor

from dnc_reference.checks import check_dense
from dnc_triton.files import write
from dnc_triton.trace import Trace, check_trace

# From 0 to 1: what is written in the orange of the other pictures, what is read in their blue, what stays in grey.
STOPS = [0, 0.15, 0.5, 1]  # uneven, so that a weight of 0.05 can be seen
WRITING = ["#ffffff", "#f6d9b8", "#e08e45", "#8a4a12"]
READING = ["#ffffff", "#b9d9e3", "#1f6f8b", "#0c3443"]
KEEPING = ["#ffffff", "#cfd6d9", "#7b8a92", "#2b363c"]
WRONG = "#b23a2e"
INK, GRID = "#22313a", "#e3e8ea"

WRITTEN = 0.1  # the least write weight at which a slot counts as written
STEP_PIXELS = 9  # the least width of a step; with more steps than the window has room for, the panels scroll
LETTER = (7, 14)  # width and height of a letter in the rows of symbols
TITLE_PIXELS = 30


def write_page(
    trace: Trace,
    path: Path | str,
    *,
    inputs: list[str],
    targets: list[str],
    outputs: list[str],
    title: str,
    wrong: list[bool] | None = None,
) -> None:
    """Write the page that shows a sequence's memory at work: time to the right, slots down, the link beside.

    Stacked, on one time axis that zooms as one: the symbols, write weights, read weights of each head, usage, gates,
    read modes. Beside them the link of the step under the pointer; a click holds that step, the arrow keys move it.
    Slots are ordered by when they were first written (a write weight of 0.1 or more), those never written last, or by
    number.

    The page takes the size of Plotly, 4.8 MB, plus T·(K+R+1)·N numbers in float32, plus the link: T·K·N² numbers of 8
    bits, accurate to 1/510, compressed. With T = 100, N = 128, K = 1, R = 4 that is at most 8 MB in all.

    Args:
        trace: its first row is the sequence.
        path: of the page.
        inputs, targets, outputs: one string per step, as `bit_symbols` makes them from bits; line breaks in them are
            kept. A target of "" asks for nothing.
        title: of the page.
        wrong: which outputs are marked as wrong, one per step; None: those that differ from a target.

    Raises:
        ValueError: no row, no step, or not as many strings or marks as steps; numbers in the trace that are not finite.
        OSError: the page could not be written; an old one is left as it was.
        TypeError: no `Trace`; symbols or a title that are no strings; marks that are no list.
    """
    check_trace(trace)
    if not isinstance(title, str):
        raise TypeError(f"title: expected a string, got {type(title).__name__}")
    _, steps, writes, slots = trace.write_weights.shape
    row = {name: field[0].detach().double().cpu().numpy() for name, field in trace._asdict().items()}
    for name, field in row.items():
        if not np.isfinite(field).all():
            step = int(np.argmin(np.isfinite(field.reshape(steps, -1)).all(1)))
            raise ValueError(f"trace.{name}: expected finite numbers, got others from step {step} on")
    symbols = {"input": inputs, "target": targets, "output": outputs}
    for name, strings in symbols.items():
        if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
            raise TypeError(f"{name}s: expected a list of strings, got {strings!r}")
        if len(strings) != steps:
            raise ValueError(f"{name}s: expected {steps} strings, one per step of the trace, got {len(strings)}")
    if wrong is None:
        wrong = [target not in ("", output) for target, output in zip(targets, outputs, strict=True)]
    elif isinstance(wrong, str) or not hasattr(wrong, "__len__"):
        raise TypeError(f"wrong: expected a list of bools, got {wrong!r}")
    if len(wrong) != steps:
        raise ValueError(f"wrong: expected {steps} marks, one per step of the trace, got {len(wrong)}")
    wrong = [bool(mark) for mark in wrong]  # NumPy's or a tensor's too

    written = (row["write_weights"] >= WRITTEN).any(1)  # [T, N]
    first_write = np.where(written.any(0), written.argmax(0), steps)
    orders = {"first_write": np.argsort(first_write, kind="stable"), "number": np.arange(slots)}
    names = {key: [str(slot) for slot in order] for key, order in orders.items()}

    over_time, slot_axes = _over_time(_panels(row), symbols, wrong, names["first_write"])
    link, link_axes = _link(writes, names["first_write"])
    levels = (row["link"].clip(0, 1) * 255).round().astype(np.uint8)
    data = {
        "steps": steps,
        "slots": slots,
        "writes": writes,
        "symbols": symbols,
        "wrong": wrong,
        "orders": names,
        "slot_axes": slot_axes,
        "link_axes": link_axes,
        "panels": over_time.to_plotly_json(),
        "link": link.to_plotly_json(),
    }
    # No "<" in the script, so that no symbol can end it.
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    values = {
        "title": html.escape(title),
        "least_width": str(STEP_PIXELS * steps + 150),
        "writing": _gradient(WRITING),
        "reading": _gradient(READING),
        "keeping": _gradient(KEEPING),
        "wrong": WRONG,
        "plotly": get_plotlyjs(),
        "data": text,
        "links": base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode(),
    }
    template = (Path(__file__).parent / "viewer.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
    write(Path(path), page.encode())


def bit_symbols(bits: Tensor) -> list[str]:
    """Vectors of bits as symbols: a column of squares and dots, a square for each number above one half.

    Args:
        bits: [T, channels].

    Returns:
        T strings of as many lines as there are channels.

    Raises:
        ValueError: bits of another number of axes.
        TypeError: no tensor.
    """
    check_dense("bits", bits)
    if bits.dim() != 2:
        raise ValueError(f"bits: expected the shape [T, channels] of one sequence, got {list(bits.shape)}")
    return ["\n".join("■" if bit else "·" for bit in vector) for vector in (bits > 0.5).tolist()]


class Panel(NamedTuple):
    """A quantity over time, in rows.

    Attributes:
        title: above it.
        height: in pixels.
        names: of the rows, the first one on top.
        values: [rows, T].
        colors: from 0 to 1.
        of_slots: whether the rows are slots, which are ordered, and zoom together with those of the other panels.
    """

    title: str
    height: float
    names: list[str]
    values: np.ndarray
    colors: list[str]
    of_slots: bool = False


def _panels(row: dict[str, np.ndarray]) -> list[Panel]:
    """From the top: write weights, read weights, usage, gates, read modes."""
    _, writes, slots = row["write_weights"].shape
    reads = row["read_weights"].shape[1]

    def of_slots(title: str, values: np.ndarray, colors: list[str]) -> Panel:
        height, names = min(max(8 * slots, 120), 320), [str(slot) for slot in range(slots)]
        return Panel(title, height, names, values.T, colors, of_slots=True)

    def of_few(title: str, names: list[str], values: np.ndarray, colors: list[str]) -> Panel:
        return Panel(title, 18 * len(names), names, values, colors)

    panels = []
    for name, heads, colors in (("write", writes, WRITING), ("read", reads, READING)):
        for head in range(heads):
            title = f"{name.capitalize()} weights{_of(head, heads)}"
            panels.append(of_slots(title, row[f"{name}_weights"][:, head], colors))
    panels.append(of_slots("Usage", row["usage"], KEEPING))
    for title, kinds, heads, colors in (
        ("Write and allocation gates", ("write", "allocation"), writes, WRITING),
        ("Free gates", ("free",), reads, READING),
    ):
        gates = {f"{kind}{_of(i, heads)}": row[f"{kind}_gates"][:, i] for i in range(heads) for kind in kinds}
        panels.append(of_few(title, list(gates), np.stack(list(gates.values())), colors))
    modes = [f"{way}{_of(i, writes)}" for way in ("backward", "forward") for i in range(writes)] + ["content"]
    for head in range(reads):
        panels.append(of_few(f"Read modes{_of(head, reads)}", modes, row["read_modes"][:, head].T, READING))
    return panels


def _over_time(
    panels: list[Panel], symbols: dict[str, list[str]], wrong: list[bool], order: list[str]
) -> tuple[go.Figure, list[str]]:
    """All that has a time axis, symbols above panels, and which of its y axes are slots; `order` is theirs at first."""
    steps = len(wrong)
    width = max(STEP_PIXELS, 900 / steps)
    rotated = {name: _rotated(strings, width) for name, strings in symbols.items()}
    heights = [_symbol_height(strings, rotated[name]) for name, strings in symbols.items()]
    heights += [panel.height for panel in panels]
    # The title of a panel takes the space above it; rows of symbols have no title.
    spacing = [4.0] * (len(symbols) - 1) + [float(TITLE_PIXELS)] * len(panels)
    figure, total = _stack(heights, spacing)

    annotations: list[dict[str, Any]] = []
    for index, (name, strings) in enumerate(symbols.items(), start=1):
        marked = wrong if name == "output" else [False] * steps
        annotations += _add_symbols(figure, index, name, strings, marked, rotated=rotated[name])
    slot_axes: list[str] = []
    for index, panel in enumerate(panels, start=len(symbols) + 1):
        annotations.append(_add_panel(figure, index, panel))
        if panel.of_slots:
            slot_axes.append(f"yaxis{index}")
            slot_axis = dict(categoryorder="array", categoryarray=order, nticks=7, title="slot", fixedrange=False)
            figure.update_yaxes(slot_axis, matches=slot_axes[0].replace("axis", ""), row=index, col=1)
        figure.update_yaxes(range=[len(panel.names) - 0.5, -0.5], row=index, col=1)  # the first one on top
    figure.update_yaxes(type="category")
    figure.update_xaxes(range=[-0.5, steps - 0.5], showticklabels=False)
    figure.update_xaxes(title="step", showticklabels=True, row=len(heights), col=1)
    _frame(figure)
    # All at once: added one by one, each would be checked again with every other.
    figure.update_layout(_style(), annotations=annotations, height=total + 84, dragmode="zoom", hovermode="closest")
    figure.update_layout(margin={"l": 110, "r": 16, "t": 34, "b": 50})
    return figure, slot_axes


def _add_symbols(
    figure: go.Figure, index: int, name: str, strings: list[str], marked: list[bool], *, rotated: bool
) -> list[dict[str, Any]]:
    """Add a row of symbols, the marked ones on red; returns the symbols, as annotations."""
    figure.add_trace(
        go.Heatmap(
            z=[[int(mark) for mark in marked]],
            y=[name],
            zmin=0,
            zmax=1,
            colorscale=[[0, "#f6f8f9"], [1, "#f4cfc9"]],
            showscale=False,
            xgap=1,
            customdata=[[_plotly_text(string) for string in strings]],
            hovertemplate=f"step %{{x}}, {name}<br>%{{customdata}}<extra></extra>",
        ),
        row=index,
        col=1,
    )
    annotations = []
    for step, (string, mark) in enumerate(zip(strings, marked, strict=True)):
        font = {"size": 11, "family": "ui-monospace, monospace", "color": WRONG if mark else INK}
        letters = {"text": _plotly_text(string), "textangle": -90 if rotated else 0, "font": font}
        place = {"xref": f"x{index}", "yref": f"y{index}", "x": step, "y": name}
        annotations.append({**letters, **place, "showarrow": False})
    return annotations


def _add_panel(figure: go.Figure, index: int, panel: Panel) -> dict[str, Any]:
    """Add a panel; returns its title, as an annotation."""
    text = f"step %{{x}}, {'slot ' if panel.of_slots else ''}%{{y}}: %{{z:.3f}}"
    figure.add_trace(_heatmap(panel.values, panel.names, panel.colors, text), row=index, col=1)
    figure.update_yaxes(fixedrange=True, row=index, col=1)
    place = {"x": 0, "xref": "paper", "xanchor": "left", "y": 1, "yref": f"y{index} domain", "yanchor": "bottom"}
    return {"text": panel.title, **place, "yshift": 3, "showarrow": False, "font": {"size": 13}}


def _link(writes: int, order: list[str]) -> tuple[go.Figure, list[str]]:
    """The link of one step, which the page fills in, and its slot axes."""
    height = 400 * writes
    titles = [f"Link{_of(head, writes)}" for head in range(writes)]
    figure = make_subplots(rows=writes, cols=1, vertical_spacing=80 / height, subplot_titles=titles)
    names = [str(slot) for slot in range(len(order))]
    for head in range(writes):
        text = "slot %{y} written after slot %{x}: %{z:.3f}"
        heatmap = _heatmap(np.zeros((len(order), len(order))), names, KEEPING, text)
        figure.add_trace(heatmap.update(x=names), row=head + 1, col=1)
    category = dict(type="category", categoryorder="array", categoryarray=order, nticks=8)
    figure.update_yaxes(category, autorange="reversed", title="slot written …")
    figure.update_xaxes(category, title="… right after slot")
    _frame(figure)
    figure.update_layout(_style(), height=height, margin={"l": 48, "r": 8, "t": 28, "b": 48})
    return figure, [f"{axis}axis{head + 1 if head else ''}" for axis in "xy" for head in range(writes)]


def _stack(heights: list[float], spacing: list[float]) -> tuple[go.Figure, float]:
    """Stacked subplots with a shared time axis, with these heights and spaces in pixels."""
    total = sum(heights) + sum(spacing)
    figure = make_subplots(rows=len(heights), cols=1, shared_xaxes=True, vertical_spacing=0)
    top = total
    for index, (height, space) in enumerate(zip(heights, [*spacing, 0.0], strict=True), start=1):
        figure.update_yaxes(domain=[max(0.0, (top - height) / total), top / total], row=index, col=1)
        top -= height + space
    return figure, total


def _heatmap(values: np.ndarray, names: list[str], colors: list[str], text: str) -> go.Heatmap:
    return go.Heatmap(
        z=values.astype(np.float32),
        y=names,
        zmin=0,
        zmax=1,
        colorscale=list(zip(STOPS, colors, strict=True)),
        showscale=False,
        hovertemplate=text + "<extra></extra>",
    )


def _style() -> dict[str, Any]:
    return {
        "font": {"family": "system-ui, sans-serif", "size": 11, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "showlegend": False,
    }


def _frame(figure: go.Figure) -> None:
    """A thin line around each panel, and nothing else."""
    line = dict(showline=True, mirror=True, linecolor=GRID, showgrid=False, zeroline=False, ticks="")
    figure.update_xaxes(line)
    figure.update_yaxes(line)


def _of(head: int, heads: int) -> str:
    return f", head {head + 1}" if heads > 1 else ""


def _gradient(colors: list[str]) -> str:
    stops = ", ".join(f"{color} {100 * stop:g}%" for stop, color in zip(STOPS, colors, strict=True))
    return f"linear-gradient(to right, {stops})"


def _plotly_text(string: str) -> str:
    """The string escaped, so that Plotly, which knows a few tags, shows it letter by letter."""
    return html.escape(string, quote=False).replace("\n", "<br>")


def _longest(strings: list[str]) -> tuple[int, int]:
    """The most letters in a line, the most lines."""
    lines = [string.split("\n") for string in strings]
    return max(len(line) for some in lines for line in some), max(map(len, lines))


def _rotated(strings: list[str], width: float) -> bool:
    """Whether symbols must be rotated, since they are wider than a step."""
    letters, lines = _longest(strings)
    return lines == 1 and letters > 1 and letters * LETTER[0] > width


def _symbol_height(strings: list[str], rotated: bool) -> float:
    letters, lines = _longest(strings)
    return LETTER[0] * letters + 8.0 if rotated else LETTER[1] * lines + 6.0
