"""Train a DNC on a task, an LSTM of the same hidden size beside it, and leave behind what there is to see.

A run lives in a folder: `checkpoint.pt`, `metrics.csv`, `learning_curve.png`, `memory.png`, `result.json`. Its
configuration stands in the checkpoint, so that a run that was interrupted goes on from the folder alone. On a CPU it
then ends with the same bits as one that never stopped.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dnc_triton.layer import DNC
from dnc_triton.pictures import draw_learning_curve, draw_memory
from dnc_triton.settings import Settings
from dnc_triton.tasks import Batch, Task
from dnc_triton.tasks.data import TrainingBatches, generator
from dnc_triton.trace import trace

CHECKPOINT_FORMAT = 2
LOG_EVERY = 50  # steps between two rows of metrics.csv, and between two checkpoints
EVALUATION_SEQUENCES = 1000  # per row of the final table, in batches of one length
EVALUATION_BATCH = 200  # sequences at a time


class LSTMBaseline(nn.Module):
    """What a user would take without a DNC: an `nn.LSTM` and a linear layer on top."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, inputs: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """inputs [B, T, input_size] → outputs [B, T, output_size], state; past `lengths` without meaning."""
        hidden, state = self.lstm(inputs)
        return self.output(hidden), state


class Learner:
    """A model, its optimiser and its learning rate's schedule."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.max_gradient_norm = settings.max_gradient_norm
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=settings.steps)

    def learn(self, task: Task, batch: Batch) -> dict[str, Tensor]:
        """One optimisation step: the loss, and the shares of units wrong and of sequences right before it."""
        self.model.train()
        outputs = task.run(self.model, batch)
        units = task.units(batch)
        loss = task.loss(outputs, batch) / units
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        outputs = outputs.detach()
        return {
            "loss": loss.detach(),
            f"{task.unit}_error": task.wrong(outputs, batch).sum() / units,
            "right": task.right(outputs, batch).float().mean(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


class Run:
    """One training run in its folder.

    Args:
        settings: of the run.
        folder: where it lives; made if it is not there.
        device: where it trains.
    """

    def __init__(self, settings: Settings, folder: Path, device: torch.device) -> None:
        self.settings, self.folder, self.device = settings, folder, device
        self.task = settings.make_task()
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Any] = {}  # of the metrics, since the last row
        torch.manual_seed(settings.seed)
        self.lesson = 0
        self.learners = {"dnc": Learner(settings.make_dnc(self.task).to(device), settings)}
        if settings.baseline:
            lstm = LSTMBaseline(self.task.input_size, settings.hidden_size, self.task.output_size)
            self.learners["lstm"] = Learner(lstm.to(device), settings)

    @classmethod
    def resume(cls, folder: Path, device: torch.device) -> Run:
        """The run that left its checkpoint in this folder.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is damaged, or of another version.
        """
        checkpoint = load_checkpoint(folder)
        run = cls(Settings(**checkpoint["settings"]), folder, device)
        for name, learner in run.learners.items():
            learner.load_state_dict(checkpoint["learners"][name])
        for name in ("step", "lesson", "seconds", "rows", "sums"):
            setattr(run, name, checkpoint[name])
        torch.set_rng_state(checkpoint["random"])
        return run

    def save(self) -> None:
        """Write checkpoint and metrics, each whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "settings": asdict(self.settings),
            "step": self.step,
            "lesson": self.lesson,
            "seconds": self.seconds,
            "rows": self.rows,
            "sums": self.sums,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "random": torch.get_rng_state(),
        }
        with _replacing(self.folder / "checkpoint.pt") as path:
            torch.save(checkpoint, path)
        if self.rows:
            with _replacing(self.folder / "metrics.csv") as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)

    def train(self) -> bool:
        """Train to the last step, or until SIGINT or SIGTERM; the run is saved either way.

        Returns:
            whether the last step was reached.

        Raises:
            FloatingPointError: the loss is not finite; the run as it was at the last checkpoint is in the folder.
        """
        settings, unit = self.settings, self.task.unit
        started = time.perf_counter() - self.seconds
        with _asked_to_stop() as stop, self._progress() as progress:
            while self.step < settings.steps and not stop:
                batches = TrainingBatches(self.task, settings.batch_size, settings.seed, self.lesson)
                batch = batches[self.step].to(self.device)
                for name, learner in self.learners.items():
                    for key, value in learner.learn(self.task, batch).items():
                        self.sums[f"{name}_{key}"] = self.sums.get(f"{name}_{key}", 0.0) + value
                self.step += 1
                self.seconds = time.perf_counter() - started
                progress.update()
                if self.step % LOG_EVERY == 0 or self.step == settings.steps:
                    row = self._log()
                    shown = {"loss": f"{row['dnc_loss']:.4f}", f"{unit} error": f"{row[f'dnc_{unit}_error']:.4f}"}
                    progress.set_postfix(shown, refresh=False)
                    self.save()
        self.save()
        return self.step == settings.steps

    def _progress(self) -> Any:
        # A log file gets a line now and then, a terminal a moving bar.
        seconds = 0.1 if sys.stderr.isatty() else 10
        return tqdm(total=self.settings.steps, initial=self.step, unit="step", mininterval=seconds)

    def _log(self) -> dict[str, float]:
        """Close a row of the metrics: the means since the last one."""
        steps = (self.step - 1) % LOG_EVERY + 1
        row = {key: float(value) / steps for key, value in self.sums.items()}
        for key, value in row.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{key} became {value} in steps {self.step - steps + 1} to {self.step}. The checkpoint in "
                    f"{self.folder} is from before; try a lower --learning-rate"
                )
        self.rows.append({"step": self.step, "lesson": self.lesson, **row, "seconds": round(self.seconds, 2)})
        self.sums = {}
        if row["dnc_right"] >= self.settings.advance_at and self.lesson + 1 < len(self.task.lessons):
            self.lesson += 1
        return row

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Shares of sequences right and of units wrong, evaluation → model → share, on sequences no training saw."""
        shares: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        for name, sizes in self.task.evaluations.items():
            right = dict.fromkeys(self.learners, 0)
            wrong = dict.fromkeys(self.learners, 0)
            units = 0
            count = math.ceil(EVALUATION_SEQUENCES / len(sizes))
            for size in sizes:
                batch = self.task.sample(count, size, generator(self.settings.seed, "test", size), split="test")
                for first in range(0, count, EVALUATION_BATCH):
                    part = batch.rows(slice(first, first + EVALUATION_BATCH)).to(self.device)
                    units += int(self.task.units(part))
                    for model, learner in self.learners.items():
                        outputs = self.task.run(learner.model.eval(), part)
                        right[model] += int(self.task.right(outputs, part).sum())
                        wrong[model] += int(self.task.wrong(outputs, part).sum())
            shares[name] = {model: right[model] / (count * len(sizes)) for model in right}
            errors[name] = {model: wrong[model] / units for model in wrong}
        return shares, errors

    def report(self) -> str:
        """Evaluate, draw the pictures, write `result.json`, and say it all in words."""
        shares, errors = self.evaluate()
        sizes = self.task.lessons[-1]
        batch = self.task.sample(1, sizes[-1], generator(self.settings.seed, "validation", 0), split="validation")
        batch = batch.to(self.device)
        dnc = self.learners["dnc"].model.eval()
        assert isinstance(dnc, DNC)
        seen = trace(dnc, batch.inputs.transpose(0, 1))
        outputs = seen.outputs.transpose(0, 1)
        draw_learning_curve(self.rows, self.task.unit, self.folder / "learning_curve.png")
        draw_memory(seen, batch, self.folder / "memory.png")
        with _replacing(self.folder / "result.json") as path:
            result = {
                "sequences_right": shares,
                f"{self.task.unit}s_wrong": errors,
                "seconds": round(self.seconds, 1),
                "settings": asdict(self.settings),
                "date": time.strftime("%Y-%m-%d"),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            path.write_text(json.dumps(result, indent=2) + "\n")

        columns = {"dnc": "DNC", "lstm": "LSTM"}
        width = max(map(len, shares))
        table = [f"{'sequences without an error':<{width}}" + "".join(f"{columns[m]:>10}" for m in self.learners)]
        for name, by_model in shares.items():
            table.append(f"{name:<{width}}" + "".join(f"{share:>10.1%}" for share in by_model.values()))
        if more := self.task.table(errors):
            table += ["", more]
        example = self.task.show(outputs, batch)
        return "\n".join(
            ["An example:", example, "", *table, "", f"{self.seconds:.0f} s of training; see {self.folder}/"]
        )


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What a run left in its folder. Nothing in it is executed: it is read with `weights_only`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged, or of another version.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, with a checkpoint.pt, got none")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: expected a checkpoint of a run, got a file that cannot be read: {error}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path}: expected a checkpoint of format {CHECKPOINT_FORMAT}, got {found!r}")
    return checkpoint


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when all is written: nobody ever sees half a file."""
    temporary = path.with_name(path.name + ".part")
    yield temporary
    os.replace(temporary, path)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives. A second signal does what it would have done."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
