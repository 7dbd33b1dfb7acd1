"""Pictures of a run: how it learned, and what its memory did."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dnc_reference.checks import check_dense
from dnc_triton.files import write
from dnc_triton.trace import Trace, check_trace

COLORS = {"dnc": "#1f6f8b", "lstm": "#e08e45"}
LABELS = {"dnc": "DNC", "lstm": "LSTM"}
DPI = 150
LEAST_INCHES = 6.5  # the narrowest picture, in which the gates' title and their legend fit side by side
MOST_INCHES = 100  # the widest picture, 5 pixels for each of 3000 steps: wider ones take long; 2^16 pixels are an error
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
}


def draw_learning_curve(
    rows: list[dict[str, float]], validations: list[dict[str, float]], unit: str, path: Path
) -> None:
    """Loss and error over the steps, and what was right in validation, every model of the run in one picture.

    Args:
        rows: those of metrics.csv.
        validations: the rows of validation.csv.
        unit: what the error counts, "bit" say.
        path: of the PNG.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 6), layout="constrained")
        loss_axes, error_axes, right_axes = figure.subplots(3, sharex=True)
        for model, color in COLORS.items():
            if f"{model}_loss" not in rows[0]:
                continue
            for axes, table, column, scale in (
                (loss_axes, rows, "loss", 1),
                (error_axes, rows, f"{unit}_error", 100),
                (right_axes, validations, "right", 100),
            ):
                steps = [row["step"] for row in table]
                values = [scale * row[f"{model}_{column}"] for row in table]
                axes.plot(steps, values, color=color, label=LABELS[model], marker="." if axes is right_axes else None)
        loss_axes.set_yscale("log")
        loss_axes.set_ylabel("loss")
        loss_axes.legend(frameon=False)
        error_axes.set_ylabel(f"wrong {unit}s, %")
        error_axes.set_ylim(bottom=0)
        right_axes.set_ylabel("right in validation, %")
        right_axes.set_ylim(-2, 102)
        right_axes.set_xlabel("step")
        _save(figure, path)


def draw_memory(trace: Trace, inputs: Tensor, targets: Tensor, path: Path | str) -> None:
    """The memory at work on one sequence: input and target, and where and when the memory was written and read.

    Args:
        trace: its first row is that sequence.
        inputs, targets: of the sequence, [T, channels].
        path: of the PNG.

    Raises:
        ValueError: a trace without a row or a step; inputs or targets of another number of axes or steps.
        TypeError: no `Trace`; inputs or targets that are no tensors.
        OSError: it could not be written; an old one is left as it was.
    """
    check_trace(trace)
    first = {name: tensor[0].detach().float().cpu().numpy() for name, tensor in trace._asdict().items()}
    steps = len(first["usage"])
    for name, given in (("inputs", inputs), ("targets", targets)):
        check_dense(name, given)
        if given.dim() != 2 or len(given) != steps:
            raise ValueError(f"{name}: expected the shape [{steps}, channels] of one sequence, got {list(given.shape)}")
    panels: list[tuple[str, np.ndarray, float]] = [
        ("input", inputs.detach().float().cpu().numpy().T, 1.0),
        ("target", targets.detach().float().cpu().numpy().T, 1.0),
    ]
    for kind in ("write", "read"):
        heads = first[f"{kind}_weights"]  # [T, heads, N]
        for head in range(heads.shape[1]):
            name = f"{kind} weights" + (f", head {head + 1}" if heads.shape[1] > 1 else "")
            panels.append((name, heads[:, head].T, 1.6))  # slots down, time to the right
    gates = ("allocation", "write", "free")

    with mpl.rc_context(STYLE):
        heights = [height for _, _, height in panels] + [1.0]
        size = (min(max(LEAST_INCHES, 0.28 * steps + 2), MOST_INCHES), 1.15 * sum(heights))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(panels) + 1, sharex=True, height_ratios=heights)
        for panel, (name, values, _) in zip(axes, panels, strict=False):
            # From 0 to 1, as for weights; inputs and targets may exceed that.
            low, high = np.nanmin(values, initial=0.0), np.nanmax(values, initial=1.0)
            image = panel.imshow(values, aspect="auto", cmap="magma", vmin=low, vmax=high, interpolation="nearest")
            panel.set_title(name if (low, high) == (0, 1) else f"{name}, from {low:.3g} to {high:.3g}")
            panel.set_ylabel("slot" if "weights" in name else "channel")
            _whole_ticks(panel, values.shape[0])
        figure.colorbar(image, ax=list(axes[:-1]), shrink=0.35, aspect=30, pad=0.015)
        for gate, marker in zip(gates, "osv", strict=True):
            for head, values in enumerate(first[f"{gate}_gates"].T):
                label = f"{gate} gate" if head == 0 else None
                axes[-1].plot(values, marker=marker, markersize=3, linewidth=1, alpha=1 / (1 + head), label=label)
        axes[-1].set_title("gates")
        axes[-1].set_ylim(-0.05, 1.05)
        axes[-1].set_xlabel("time step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[-1].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.95), ncols=len(gates))
        _save(figure, path)


def _save(figure: Figure, path: Path | str) -> None:
    """Write it as a PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format="png")
    write(Path(path), picture.getvalue())


def _whole_ticks(axes: Axes, count: int) -> None:
    axes.set_yticks(np.unique(np.linspace(0, count - 1, min(count, 4)).round().astype(int)))
