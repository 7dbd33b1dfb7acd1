"""This machine: what is installed on it, and how fast a task's networks run there."""

from __future__ import annotations

import platform
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import dnc_triton
from dnc_triton.layer import explain
from dnc_triton.pictures import LABELS
from dnc_triton.tasks.data import generator
from dnc_triton.training.learner import Learner
from dnc_triton.training.run import Run
from dnc_triton.training.settings import Settings
from dnc_triton.tuning import cache_directory, triton_version

SECONDS = 2.0  # for each figure
PACKAGES = ("numpy", "lightning-fabric", "tensorboard", "matplotlib")


def bench(settings: Settings, device: str) -> str:
    """Time a batch of the last size of a task's last lesson, usually the longest; medians, as text.

    Args:
        settings: of the run to time; nothing is written.
        device: as `make_fabric` takes it.

    Raises:
        ValueError: no such device, or the backend that the environment asks for does not serve the DNC.
    """
    run = Run(settings, Path(), device=device)
    run.check_backend()
    task, size = run.task, run.task.lessons[-1][-1]
    batch = task.sample(settings.batch_size, size, generator(settings.seed, "train", 0))
    units, sequences = task.units(batch), batch.inputs.shape[0]
    batch = batch.to(run.fabric.device)
    steps = batch.inputs.shape[1]
    lines = [
        f"{task.name}, size {size}: {settings.batch_size} sequences of {steps} steps on {device}, "
        f"{_threads()}; medians of {SECONDS:.0f} s each",
        f"{'':<6}{'ms per batch:':>14}{'forward':>10}{'training':>10}"
        f"{'ms per step:':>16}{'forward':>10}{'training':>10}",
    ]

    def train(learner: Learner) -> None:
        learner.backward(batch, units, sequences)
        learner.update()

    for name, learner in run.learners.items():
        times = []
        for work in (partial(learner.outputs, batch), partial(train, learner)):
            timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
            timer.timeit(2)  # so that what is compiled or measured once is done
            times.append(1000 * timer.blocked_autorange(min_run_time=SECONDS).median)
        forward, training = times
        lines.append(f"{LABELS[name]:<6}{'':>14}{forward:>10.2f}{training:>10.2f}{'':>16}"
                     f"{forward / steps:>10.3f}{training / steps:>10.3f}")  # fmt: skip
    return "\n".join(lines)


def info(task: str, device: str) -> str:
    """Versions, devices, paths, and which backend runs for a task's DNC, as text.

    Raises:
        ValueError: no such device.
    """
    run = Run(Settings.read(task, baseline=False), Path(), device=device)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    sample = run.task.sample(run.settings.batch_size, run.task.lessons[-1][-1], generator(0, "train", 0))
    dnc = run.learners["dnc"].model
    rows = {
        "dnc_triton": f"{dnc_triton.__version__} in {Path(dnc_triton.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}, {platform.platform()}",
        "torch": torch.__version__,  # it says what it was built for
        "triton": triton_version() or "not installed",
        **{name: _version(name) for name in PACKAGES},
        "cpu": _threads(),
        "cuda": ", ".join(f"cuda:{index} {name}" for index, name in enumerate(names)) or "none",
        "mps": "yes" if torch.backends.mps.is_available() else "none",
        "runs": f"{Path('runs').resolve()} (or where --run says)",
        "measured": f"{cache_directory()} (which backend is the fastest)",
    }
    explanation = explain(dnc, sample.to(run.fabric.device).inputs)  # type: ignore[arg-type]
    lines = [f"{name:<18}{value}" for name, value in rows.items()]
    return "\n".join([*lines, "", f"{task} in training:", explanation])


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
