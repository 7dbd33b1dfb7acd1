"""The results of a run: its evaluations as a table, its pictures, `result.json`."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_triton.dispatch import use_backend
from dnc_triton.files import write
from dnc_triton.layer import DNC
from dnc_triton.pictures import LABELS, draw_learning_curve, draw_memory
from dnc_triton.tasks.data import generator
from dnc_triton.training.run import PARTS, Run
from dnc_triton.viewer import write_page

EVALUATION_SEQUENCES = 1000  # per row of the table, in batches of one length

Scores = dict[str, dict[str, dict[str, float]]]  # evaluation → model → what `Run.score` returns for it


def evaluate(run: Run, sequences: int) -> Scores:
    """How each model does in each evaluation of the task, on sequences drawn separately from those of training."""
    return {name: run.score(list(sizes), sequences, "test") for name, sizes in run.task.evaluations.items()}


def table(run: Run, scores: Scores) -> str:
    """The evaluations as text: the sequences right, and what the task adds about the units wrong."""
    shares, errors = (_one_of(scores, key) for key in ("right", f"{run.task.unit}_error"))
    width = max(map(len, shares))
    models = next(iter(shares.values()))
    lines = [f"{'sequences right':<{width}}" + "".join(f"{LABELS[model]:>10}" for model in models)]
    for name, by_model in shares.items():
        lines.append(f"{name:<{width}}" + "".join(f"{share:>10.1%}" for share in by_model.values()))
    if more := run.task.table(errors):
        lines += ["", more]
    return "\n".join(lines)


def _one_of(scores: Scores, key: str) -> dict[str, dict[str, float]]:
    """Evaluation → model → one of the numbers."""
    return {name: {model: score[key] for model, score in by_model.items()} for name, by_model in scores.items()}


def draw(run: Run, folder: Path, size: int | None = None, index: int = 0) -> str:
    """Show what the DNC of a run does with its memory on one sequence that it was not trained on.

    Args:
        run: the run.
        folder: where memory.png and memory.html go.
        size: of the sequence; None: the last size of the task's last lesson.
        index: which sequence of that size.

    Returns:
        the sequence as text.

    Raises:
        ValueError: the task has no sequence of this size, or the index is negative.
        OSError: the folder cannot be made, or written to.
    """
    if index < 0:
        raise ValueError(f"index: expected at least 0, got {index}")
    task, dnc = run.task, run.learners["dnc"].model.eval()
    assert isinstance(dnc, DNC)
    size = task.lessons[-1][-1] if size is None else size
    batch = task.sample(1, size, generator(run.settings.seed, "validation", index), split="validation")
    batch = batch._replace(inputs=batch.inputs.to(dnc.output.weight.dtype)).to(run.fabric.device)
    given: list[Tensor] = []
    with torch.no_grad(), use_backend("reference"):  # only it keeps a trace, whatever the environment asks for
        with dnc.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0])):
            outputs = task.run(dnc, batch)
        # Where the network sees the results of its moves, these replace the results of the target's moves.
        batch = batch._replace(inputs=torch.cat(given, 1))
        _, _, trace = dnc(batch.inputs, lengths=batch.lengths, trace=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder: expected one that can be made, got {folder}: {error}") from error
    targets = batch.targets[0]
    if not targets.is_floating_point():  # indices of symbols, which mean nothing on a scale from 0 to 1
        targets = F.one_hot(targets, task.output_size // targets.shape[-1]).flatten(1) * batch.scored[0].unsqueeze(1)
    draw_memory(trace, batch.inputs[0], targets, folder / "memory.png")
    words = task.symbols(outputs, batch)
    title = f"{task.name}, size {size}, sequence {index}, step {run.step}"
    lists = {f"{name}s": words[name] for name in ("input", "target", "output")}
    wrong = task.wrong(outputs, batch)[0].any(-1).tolist()
    write_page(trace, folder / "memory.html", **lists, title=title, wrong=wrong)
    return task.show(outputs, batch)


def report(run: Run) -> str:
    """Evaluate, write `result.json`, draw the pictures and return a text; processes but the first only evaluate."""
    scores = evaluate(run, EVALUATION_SEQUENCES)
    if not run.fabric.is_global_zero:
        return ""
    try:
        example = _write(run, scores)
    except OSError:
        print(table(run, scores))  # it took longer than all the rest
        raise
    parts = ", ".join(f"{part} {run.seconds[part] / run.seconds['all']:.1%}" for part in PARTS)
    seconds = f"{run.seconds['all']:.0f} s of training, of which {parts}; see {run.folder}/"
    return "\n".join(["An example:", example, "", table(run, scores), "", seconds])


def _write(run: Run, scores: Scores) -> str:
    """Write `result.json`, then the pictures, for which there may be no room left; return an example as text."""
    device = run.fabric.device
    result = {
        "sequences_right": _one_of(scores, "right"),
        f"{run.task.unit}s_wrong": _one_of(scores, f"{run.task.unit}_error"),
        "best_step": run.best.get("step"),  # None: no best.pt could be written
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
    write(run.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    draw_learning_curve(run.rows, run.validations, run.task.unit, run.folder / "learning_curve.png")
    return draw(run, run.folder)
