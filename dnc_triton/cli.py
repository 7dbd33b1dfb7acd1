"""The command line: ``python -m dnc_triton train copy``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dnc_triton.train import Run

INTERRUPTED = 130  # what a shell expects of a program that SIGINT ended


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the return value is the exit status."""
    try:
        import dnc_triton.train  # noqa: F401
    except ModuleNotFoundError as missing:
        print(f"{missing.name} is not installed; training needs: pip install 'dnc_triton[train]'", file=sys.stderr)
        return 2
    options = _parser().parse_args(arguments)
    try:
        return _train(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"dnc_triton: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from dnc_triton.tasks import CopyTask, DelayedCopyTask

    parser = argparse.ArgumentParser(prog="python -m dnc_triton", description="Differentiable Neural Computers.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a DNC on a task, an LSTM of the same hidden size beside it")
    tasks = train.add_subparsers(dest="task", required=True, metavar="TASK")

    copy = _add_task(tasks, CopyTask, "repeat a sequence of random bit vectors after its end")
    copy.add_argument("--min-length", type=int, help="vectors in the shortest training sequence (default: 1)")
    copy.add_argument("--max-length", type=int, help="vectors in the longest training sequence (default: 10)")
    copy.add_argument("--num-bits", type=int, help="bits in a vector (default: 8)")

    delayed = _add_task(tasks, DelayedCopyTask, "give back a symbol after blanks: 8 _ _ _ _ gives _ _ _ _ 8")
    delayed.add_argument("--delay", type=int, help="blanks after the symbol (default: 4)")
    delayed.add_argument("--num-symbols", type=int, help="how many symbols there are (default: 10)")
    return parser


def _add_task(tasks: Any, task: Any, text: str) -> argparse.ArgumentParser:
    """The parser of one task with the options that all tasks share; what is not given keeps the task's default."""
    from dnc_triton.train import Settings

    parser: argparse.ArgumentParser = tasks.add_parser(
        task.name, help=text, description=text, argument_default=argparse.SUPPRESS
    )
    defaults = Settings(task.name, **task.defaults)
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--run", type=Path, help=f"folder for the run (default: runs/{task.name}-DATE-TIME)")
    folder.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=None,
        help=f"go on with the run in this folder (default: the latest runs/{task.name}-*)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    group = parser.add_argument_group("settings of a new run")
    for name, kind, meaning in (
        ("seed", int, "of the weights and of the data"),
        ("steps", int, "optimisation steps"),
        ("batch_size", int, "sequences per step"),
        ("learning_rate", float, "of Adam at the start; it falls to 0 along a cosine"),
        ("max_gradient_norm", float, "longer gradients are scaled down to it"),
        ("controller", str, "lstm, gru, rnn or feedforward"),
        ("hidden_size", int, "of the controller, and of the LSTM beside it"),
        ("memory_size", int, "slots of the memory"),
        ("word_size", int, "numbers in a slot"),
        ("num_reads", int, "read heads"),
    ):
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, help=f"{meaning} (default: {getattr(defaults, name)})")
    group.add_argument("--no-baseline", dest="baseline", action="store_false", help="train no LSTM beside the DNC")
    return parser


def _train(options: argparse.Namespace) -> int:
    from dnc_triton.tasks import TASKS
    from dnc_triton.train import Run, Settings

    given = {name: value for name, value in vars(options).items() if name not in ("command", "device", "run", "resume")}
    task = given.pop("task")
    device = _device(options.device)
    run: Run
    if hasattr(options, "resume"):
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--resume: a run goes on with the settings it was started with, got also {flags}")
        run = Run.resume(options.resume or _latest(task), device)
        if run.settings.task != task:
            raise ValueError(f"--resume: expected a run of {task!r}, got one of {run.settings.task!r}")
    else:
        fields = set(Settings.__dataclass_fields__)
        arguments = {name: given.pop(name) for name in list(given) if name not in fields}
        settings = Settings(task, task_arguments=arguments, **(TASKS[task].defaults | given))
        folder = getattr(options, "run", Path("runs") / f"{task}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (folder / "checkpoint.pt").exists():
            raise ValueError(f"--run: {folder} holds a run; go on with it by --resume {folder}, or name another folder")
        run = Run(settings, folder, device)

    print(f"{'Going on with' if run.step else 'Training'} {task} in {run.folder}/ on {device}")
    if not run.train():
        print(f"Stopped at step {run.step} of {run.settings.steps}. To go on: "
              f"python -m dnc_triton train {task} --resume {run.folder}")  # fmt: skip
        return INTERRUPTED
    print(run.report())
    return 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that this machine has, got {name!r}: {error}") from error
    return device


def _latest(task: str) -> Path:
    runs = [path.parent for path in Path("runs").glob(f"{task}-*/checkpoint.pt")]
    if not runs:
        raise ValueError(f"--resume: expected a run in runs/{task}-*, got none; name its folder")
    return max(runs, key=lambda folder: (folder / "checkpoint.pt").stat().st_mtime)
