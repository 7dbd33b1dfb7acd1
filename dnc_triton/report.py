"""What a run has come to: its evaluations as a table, its pictures, `result.json`."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from dnc_triton import checkpoint
from dnc_triton.layer import DNC
from dnc_triton.pictures import LABELS, draw_learning_curve, draw_memory
from dnc_triton.tasks.data import generator
from dnc_triton.trace import trace
from dnc_triton.train import PARTS, Run

EVALUATION_SEQUENCES = 1000  # per row of the table, in batches of one length

Shares = dict[str, dict[str, float]]  # evaluation → model → share of sequences without an error


def evaluate(run: Run, sequences: int = EVALUATION_SEQUENCES) -> Shares:
    """Share of sequences without an error, evaluation → model → share, on sequences that no training saw."""
    return {
        name: {model: score["right"] for model, score in run.score(list(sizes), sequences, "test").items()}
        for name, sizes in run.task.evaluations.items()
    }


def table(shares: Shares) -> str:
    """The evaluations in words."""
    width = max(map(len, shares))
    models = next(iter(shares.values()))
    lines = [f"{'sequences without an error':<{width}}" + "".join(f"{LABELS[model]:>10}" for model in models)]
    for name, by_model in shares.items():
        lines.append(f"{name:<{width}}" + "".join(f"{share:>10.1%}" for share in by_model.values()))
    return "\n".join(lines)


def draw(run: Run, folder: Path, size: int | None = None, index: int = 0) -> str:
    """Show what the DNC of a run does with its memory on one sequence that it was not trained on.

    Args:
        run: whose DNC it is.
        folder: where memory.png and memory.html go.
        size: of the sequence; None: the last of those trained on.
        index: which sequence.

    Returns:
        the sequence in words.

    Raises:
        ValueError: the task has no sequence of this size, or the index is negative.
    """
    if index < 0:
        raise ValueError(f"index: expected at least 0, got {index}")
    task, dnc = run.task, run.learners["dnc"].model.eval()
    assert isinstance(dnc, DNC)
    size = run.task.lessons[-1][-1] if size is None else size
    batch = task.sample(1, size, generator(run.settings.seed, "validation", index), split="validation")
    batch = batch.to(run.fabric.device)
    seen = trace(dnc, batch.inputs.transpose(0, 1).to(dnc.output.weight.dtype))
    outputs = seen.outputs.transpose(0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    draw_memory(seen, batch, folder / "memory.png")
    if find_spec("dnc_triton.viewer"):
        words = task.symbols(outputs, batch)
        title = f"{task.name}, size {size}, sequence {index}, step {run.step}"
        lists = {f"{name}s": words[name] for name in ("input", "target", "output")}
        import_module("dnc_triton.viewer").write_page(seen, folder / "memory.html", **lists, title=title)
    return task.show(outputs, batch)


def report(run: Run) -> str:
    """Evaluate, draw the pictures, write `result.json`, and say it all in words; of the first process alone."""
    shares = evaluate(run)
    if not run.fabric.is_global_zero:
        return ""
    example = draw(run, run.folder)
    draw_learning_curve(run.rows, run.validations, run.task.unit, run.folder / "learning_curve.png")
    device = run.fabric.device
    result = {
        "sequences_right": shares,
        "best_step": run.best["step"],
        "seconds": round(run.seconds["all"], 1),
        "seconds_in": {part: round(run.seconds[part], 2) for part in PARTS},
        "settings": asdict(run.settings),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": run.fabric.world_size,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    checkpoint.write(run.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    seconds = f"{run.seconds['all']:.0f} s of training; see {run.folder}/"
    return "\n".join(["An example:", example, "", table(shares), "", seconds])
