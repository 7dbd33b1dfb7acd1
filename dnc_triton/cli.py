"""The command line: ``python -m dnc_triton train copy``."""

from __future__ import annotations

import argparse
import inspect
import io
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnc_triton.training.folder import claim, give_up, written
from dnc_triton.tuning import NothingWorks

if TYPE_CHECKING:
    from dnc_triton.tasks import Task
    from dnc_triton.training.run import Run
    from dnc_triton.training.settings import Settings

NEEDED = ("lightning_fabric", "matplotlib", "plotly", "tensorboard", "tqdm")
INTERRUPTED, UNREAD = 130, 141  # the statuses that shells give programs ended by SIGINT, SIGPIPE
OWN = ("command", "task", "act", "run", "resume", "config", "device", "workers")  # options, not settings

EPILOG = """\
first steps:
  python -m dnc_triton train copy                 train on a task; about a minute on two CPU cores
  python -m dnc_triton train copy --resume        go on with the latest run, after Ctrl-C or a crash
  python -m dnc_triton evaluate RUN               the run's table again
  python -m dnc_triton trace RUN --size 5         pictures of its memory at work
A run is a folder of its own, runs/TASK-DATE-TIME unless --run names another.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the return value is the exit status."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"{', '.join(missing)} not installed; training needs, in a clone of the repository: pip install '.[train]'",
            file=sys.stderr,
        )
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that cannot be encoded is no reason to fail
    try:
        # Flush here, where a closed pipe is handled.
        try:
            options = _parser().parse_args(arguments)
        finally:  # --help ends the process
            print(end="", flush=True)
        status: int = options.act(options)
        print(end="", flush=True)
    except KeyboardInterrupt:  # not the first one in training: that ends the step and saves the run
        print("dnc_triton: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        status = UNREAD
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, NothingWorks) as error:
        print(f"dnc_triton: {_reason(error)}", file=sys.stderr)
        status = 2
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        if not _is_out_of_memory(error):
            raise
        print(f"dnc_triton: no room for these sizes: {_reason(error).splitlines()[0]}", file=sys.stderr)
        status = 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Skip the interpreter's shutdown, in which a thread of gloo now and then aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _reason(error: Exception) -> str:
    """An error's text, or its type if that is empty; of a worker's, which is a whole traceback, the end."""
    return str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip() or type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or on a CPU, where no error type says so; or a size overflowed."""
    import torch

    texts = ("can't allocate memory", "Storage size calculation overflowed", "Overflow when unpacking long")
    integers = ("too large to convert to C", "cannot fit 'int'")  # Python's; any other overflow is a bug of ours
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(x in str(error) for x in texts + integers)


def _parser() -> argparse.ArgumentParser:
    from dnc_triton.tasks import TASKS

    parser = argparse.ArgumentParser(
        prog="python -m dnc_triton",
        description="Train Differentiable Neural Computers, and look into them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, act: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary + ".")
        command.set_defaults(act=act)
        return command

    train = add("train", _train, "train a DNC on a task, and an LSTM of the same hidden size beside it")
    tasks = train.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS.values():
        _add_settings(_add_training(tasks, task), task)

    evaluate = add(
        "evaluate", _evaluate, "say how many sequences a run's models solve, drawn separately from its training"
    )
    _add_run(evaluate)
    text = "at least this many per row of the table, equally many of each size (default: 1000)"
    evaluate.add_argument("--sequences", type=int, default=1000, help=text)

    trace = add("trace", _trace, "draw what a run's DNC does with its memory: memory.png, and memory.html to play with")
    _add_run(trace)
    trace.add_argument(
        "--size",
        type=int,
        help="size of the sequence, as the task counts it: vectors or items, or the number "
        "of a lesson, kind or style (default: the last of the task's last lesson)",
    )
    trace.add_argument("--index", type=int, default=0, help="which sequence of that size (default: 0)")
    trace.add_argument("--output", type=_path, help="folder for the pictures (default: the run's)")

    bench = add("bench", _bench, "time a task's DNC on this machine, and an LSTM of the same hidden size beside it")
    tasks = bench.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in TASKS.values():
        command = tasks.add_parser(
            task.name, help=task.summary, description=task.summary, argument_default=argparse.SUPPRESS
        )
        _add_device(command)
        _add_settings(command, task)

    info = add("info", _info, "show versions, devices, paths, and which backend runs for a task's DNC")
    info.add_argument("task", nargs="?", choices=TASKS, default="copy", help="whose DNC (default: copy)")
    _add_device(info)
    return parser


def _add_training(tasks: Any, task: type[Task]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = tasks.add_parser(
        task.name, help=task.summary, description=task.summary, argument_default=argparse.SUPPRESS
    )
    folder = parser.add_mutually_exclusive_group()
    # torchrun takes --run for an abbreviation of its own --run-path, wherever it stands: hence --folder.
    folder.add_argument(
        "--run", "--folder", type=_path, help=f"folder for the run (default: runs/{task.name}-DATE-TIME)"
    )
    folder.add_argument(
        "--resume",
        type=_path,
        nargs="?",
        const=None,
        metavar="RUN",
        help=f"go on with the run in this folder (default: the latest runs/{task.name}-*)",
    )
    _add_device(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that draw batches ahead; worth it where drawing takes long (default: 0, training draws them)",
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    """Flags for the settings that all tasks share and for the task's own arguments, with the task's defaults."""
    from dnc_triton.training.settings import CHOICES, Settings

    defaults = Settings.read(task.name)
    parser.add_argument("--config", type=_path, metavar="FILE", help="TOML file of settings, such as a run's "
                        "settings.toml (default: the one that comes with the task)")  # fmt: skip
    group = parser.add_argument_group("settings of a new run; they override those in the file")
    for setting in fields(Settings):
        if "meaning" in setting.metadata:
            default = getattr(defaults, setting.name)
            _add_flag(group, setting.name, setting.metadata["meaning"], default, CHOICES.get(setting.name))
    group = parser.add_argument_group("arguments of the task; they override the file, too")
    for name, parameter in inspect.signature(task).parameters.items():
        _add_flag(group, name, task.arguments.get(name, ""), defaults.task_arguments.get(name, parameter.default))


def _add_flag(group: Any, name: str, meaning: str, default: Any, choices: tuple[str, ...] | None = None) -> None:
    """--name, or --name and --no-name, of the default's type."""
    flag = "--" + name.replace("_", "-")
    text = f"{meaning} (default: {default})".lstrip().replace("%", "%%")
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        metavar = "|".join(choices) if choices else None
        group.add_argument(flag, type=str if default is None else type(default), help=text, metavar=metavar)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=_path, help="the run's folder")
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="the last one, or the one with the most sequences right in validation (default: last)",
    )
    _add_device(parser)


def _path(text: str) -> Path:
    """A path from the command line. For "", left by an unset variable, pathlib would take the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def _settings(options: argparse.Namespace) -> Settings:
    from dnc_triton.training.settings import Settings

    return Settings.read(options.task, getattr(options, "config", None), **_given(options))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    from dnc_triton.training.settings import with_whole_path

    return with_whole_path({name: value for name, value in vars(options).items() if name not in OWN})


def _train(options: argparse.Namespace) -> int:
    from dnc_triton.training.report import report
    from dnc_triton.training.run import Run

    task, where = options.task, {"device": options.device, "workers": options.workers}
    if options.workers < 0:
        raise ValueError(f"--workers: expected at least 0, got {options.workers}")
    if hasattr(options, "resume"):
        run = Run.resume(options.resume or _latest(task), **where)
        _check_same(run.settings, options)
    else:
        run = Run(_settings(options), getattr(options, "run", Path("runs")), **where)
    run.check_backend()
    if not hasattr(options, "resume"):
        _claim(run, named=hasattr(options, "run"))

    processes = f", {run.fabric.world_size} processes" if run.fabric.world_size > 1 else ""
    say = print if run.fabric.is_global_zero else lambda text: None
    say(f"{'Going on with' if run.step else 'Training'} {task} in {run.folder}/ on {options.device}{processes}")
    try:
        finished = run.train()
    except Exception:
        if run.step == 0 and run.fabric.is_global_zero:
            give_up(run.folder)
        raise
    if not finished:
        again = ["python", "-m", "dnc_triton", "train", task, "--resume", str(run.folder)]
        for name, default in (("device", "cpu"), ("workers", 0)):  # these are not settings
            again += [f"--{name}", str(where[name])] if where[name] != default else []
        say(f"Stopped at step {run.step} of {run.settings.steps}. To go on: {shlex.join(again)}")
        return INTERRUPTED
    say(report(run))
    return 0


def _claim(run: Run, *, named: bool) -> None:
    """Claim the run's folder, or, if it was not named, a new one in it; the same one in all processes.

    Raises:
        ValueError: it holds files that a run writes, or cannot be made; in every process.
    """
    refused = ""
    if run.fabric.is_global_zero:
        try:
            if named:
                refused = _claim_named(run)
            else:
                _claim_new(run)
        except OSError as error:
            refused = f"--run: expected a folder that can be made and written to, got {run.folder}: {error}"
    run.folder, refused = run.fabric.broadcast((run.folder, refused))
    if refused:
        raise ValueError(refused)


def _claim_named(run: Run) -> str:
    """Why the folder cannot be the run's, if it cannot."""
    folder = run.folder
    if claim(folder, run.settings.toml()):
        return ""
    if (folder / "checkpoint.pt").exists():
        return (
            f"--run: {folder} holds a run; go on with it by --resume {shlex.quote(str(folder))}, or name another folder"
        )
    return (
        f"--run: expected a folder with nothing in it that a run writes, got {folder}, which has "
        f"{written(folder) or 'been taken by another run'}; name another folder"
    )


def _claim_new(run: Run) -> None:
    first = run.folder / f"{run.settings.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):  # others may have started in the same second
        run.folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        if claim(run.folder, run.settings.toml(), new=True):
            return


def _check_same(settings: Settings, options: argparse.Namespace) -> None:
    """A run goes on with the settings it was started with."""
    from dnc_triton.tasks import TASKS

    if settings.task != options.task:
        raise ValueError(f"--resume: expected a run of {options.task!r}, got one of {settings.task!r}")
    if hasattr(options, "config"):
        raise ValueError("--resume: a run goes on with its own settings; leave --config out, or start a new run")
    defaults = {name: argument.default for name, argument in inspect.signature(TASKS[settings.task]).parameters.items()}
    here = defaults | asdict(settings) | settings.task_arguments
    for name, value in _given(options).items():
        if here[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--resume: a run goes on with the settings it was started with, {flag} {here[name]}, "
                             f"got {value}; leave it out, or start a new run")  # fmt: skip


def _load(options: argparse.Namespace) -> Run:
    from dnc_triton.training.run import Run

    name = {"last": "checkpoint.pt", "best": "best.pt"}[options.checkpoint]
    return Run.resume(options.run, name=name, device=options.device)


def _evaluate(options: argparse.Namespace) -> int:
    from dnc_triton.training.report import evaluate, table

    if options.sequences < 1:
        raise ValueError(f"--sequences: expected at least 1, got {options.sequences}")
    run = _load(options)
    run.check_backend()
    print(f"{run.settings.task}, step {run.step} of {run.settings.steps}")
    print(table(run, evaluate(run, options.sequences)))
    return 0


def _trace(options: argparse.Namespace) -> int:
    from dnc_triton.training.report import draw

    folder = options.output or options.run
    print(draw(_load(options), folder, options.size, options.index))
    print(f"see {folder}/memory.png and {folder}/memory.html")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from dnc_triton.machine import bench

    print(bench(_settings(options), options.device))
    return 0


def _info(options: argparse.Namespace) -> int:
    from dnc_triton.machine import info

    print(info(options.task, options.device))
    return 0


def _latest(task: str) -> Path:
    runs = [path.parent for path in Path("runs").glob(f"{task}-*/checkpoint.pt")]
    if not runs:
        raise ValueError(f"--resume: expected a run in runs/{task}-*, got none; name its folder")
    return max(runs, key=lambda folder: (folder / "checkpoint.pt").stat().st_mtime)
