"""The command line: ``python -m dnc_triton train copy``."""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dnc_triton.tasks import Task
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
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"dnc_triton: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from dnc_triton.tasks import TASKS

    parser = argparse.ArgumentParser(prog="python -m dnc_triton", description="Differentiable Neural Computers.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a DNC on a task, an LSTM of the same hidden size beside it")
    tasks = train.add_subparsers(dest="task", required=True, metavar="TASK")

    for task in TASKS.values():
        _add_task(tasks, task)
    return parser


def _add_task(tasks: Any, task: type[Task]) -> argparse.ArgumentParser:
    """The parser of one task with the options that all tasks share; what is not given keeps the task's default."""
    from dnc_triton.settings import Settings

    parser: argparse.ArgumentParser = tasks.add_parser(
        task.name, help=task.summary, description=task.summary, argument_default=argparse.SUPPRESS
    )
    defaults = Settings.read(task.name)
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
    parser.add_argument("--config", type=Path, help="TOML file of settings (default: the one that comes with the task)")
    group = parser.add_argument_group("settings of a new run; they take the place of those in the file")
    for setting in fields(Settings):
        if "meaning" in setting.metadata:
            _add_flag(group, setting.name, setting.metadata["meaning"], getattr(defaults, setting.name))
    group = parser.add_argument_group("the task; these too")
    for name, parameter in inspect.signature(task).parameters.items():
        _add_flag(group, name, task.arguments[name], defaults.task_arguments.get(name, parameter.default))
    return parser


def _add_flag(group: Any, name: str, meaning: str, default: Any) -> None:
    """--name, or --name and --no-name, of the type that the default has."""
    flag = "--" + name.replace("_", "-")
    text = f"{meaning} (default: {default})"
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(flag, type=str if default is None else type(default), help=text)


def _train(options: argparse.Namespace) -> int:
    from dnc_triton.settings import Settings
    from dnc_triton.train import Run

    own = ("command", "device", "run", "resume", "config")
    given = {name: value for name, value in vars(options).items() if name not in own}
    task = given.pop("task")
    device = _device(options.device)
    run: Run
    if hasattr(options, "resume"):
        if hasattr(options, "config"):
            given["config"] = options.config
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--resume: a run goes on with the settings it was started with, got also {flags}")
        run = Run.resume(options.resume or _latest(task), device)
        if run.settings.task != task:
            raise ValueError(f"--resume: expected a run of {task!r}, got one of {run.settings.task!r}")
    else:
        settings = Settings.read(task, getattr(options, "config", None), **given)
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
