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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dnc_triton.layer import DNC
from dnc_triton.pictures import draw_learning_curve, draw_memory
from dnc_triton.tasks import TASKS, Task

CHECKPOINT_FORMAT = 1
LOG_EVERY = 50  # steps between two rows of metrics.csv, and between two checkpoints
EVALUATION_SEQUENCES = 1000  # per row of the final table, in batches of one length


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the same settings give the same run on the same machine.

    Attributes:
        task: a key of `TASKS`.
        task_arguments: of the task, as its class takes them.
        seed: of the weights and of the data.
        steps: optimisation steps.
        batch_size: sequences per step.
        learning_rate: of Adam at the start; it falls to 0 along a cosine.
        max_gradient_norm: longer gradients are scaled down to it.
        controller, hidden_size, memory_size, word_size, num_reads: of the DNC.
        baseline: train an `nn.LSTM` of the same hidden size on the same batches.
    """

    task: str
    task_arguments: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-2
    max_gradient_norm: float = 1.0
    controller: str = "feedforward"
    hidden_size: int = 64
    memory_size: int = 32
    word_size: int = 16
    num_reads: int = 1
    baseline: bool = True

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {self.task!r}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    def make_task(self) -> Task:
        """The task that these settings name."""
        return TASKS[self.task](**self.task_arguments)

    def make_dnc(self) -> DNC:
        """The DNC that these settings describe, with fresh weights."""
        task = self.make_task()
        return DNC(
            task.input_size,
            self.hidden_size,
            task.output_size,
            memory_size=self.memory_size,
            word_size=self.word_size,
            num_reads=self.num_reads,
            controller=self.controller,
        )


class LSTMBaseline(nn.Module):
    """What a user would take without a DNC: an `nn.LSTM` and a linear layer on top."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Any]:
        """inputs [B, T, input_size] → outputs [B, T, output_size], state."""
        hidden, state = self.lstm(inputs)
        return self.output(hidden), state


class Learner:
    """A model, its optimiser and its learning rate's schedule."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.max_gradient_norm = settings.max_gradient_norm
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=settings.steps)

    def learn(self, task: Task, batch: Any) -> tuple[Tensor, Tensor]:
        """One optimisation step: the loss, and the share of units that were wrong before it."""
        self.model.train()
        outputs, _ = self.model(batch.inputs)
        loss = task.loss(outputs, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach(), task.wrong(outputs.detach(), batch).float().mean()

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
        self.data = torch.Generator().manual_seed(settings.seed)
        self.learners = {"dnc": Learner(settings.make_dnc().to(device), settings)}
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
        for name in ("step", "seconds", "rows", "sums"):
            setattr(run, name, checkpoint[name])
        run.data.set_state(checkpoint["data"])
        torch.set_rng_state(checkpoint["random"])
        return run

    def save(self) -> None:
        """Write checkpoint and metrics, each whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "sums": self.sums,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "data": self.data.get_state(),
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
                batch = self.task.sample_training(settings.batch_size, self.data).to(self.device)
                for name, learner in self.learners.items():
                    loss, wrong = learner.learn(self.task, batch)
                    for key, value in ((f"{name}_loss", loss), (f"{name}_{unit}_error", wrong)):
                        self.sums[key] = self.sums.get(key, 0.0) + value
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
        self.rows.append({"step": self.step, **row, "seconds": round(self.seconds, 2)})
        self.sums = {}
        return row

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Share of sequences without an error, evaluation → model → share, on sequences that no training saw."""
        shares: dict[str, dict[str, float]] = {}
        for name, lengths in self.task.evaluations.items():
            # Seeded apart from the training data, and the same for every model.
            data = torch.Generator().manual_seed(self.settings.seed + 2**32)
            right = dict.fromkeys(self.learners, 0)
            count = math.ceil(EVALUATION_SEQUENCES / len(lengths))
            for length in lengths:
                batch = self.task.sample(count, length, data).to(self.device)
                for model, learner in self.learners.items():
                    outputs, _ = learner.model.eval()(batch.inputs)
                    right[model] += int((~self.task.wrong(outputs, batch)).all(1).sum())
            shares[name] = {model: right[model] / (count * len(lengths)) for model in right}
        return shares

    def report(self) -> str:
        """Evaluate, draw the pictures, write `result.json`, and say it all in words."""
        shares = self.evaluate()
        data = torch.Generator().manual_seed(self.settings.seed + 2**33)
        batch = self.task.sample(1, self.task.lengths[-1], data).to(self.device)
        dnc = self.learners["dnc"].model.eval()
        assert isinstance(dnc, DNC)
        with torch.no_grad():
            outputs, _, trace = dnc(batch.inputs, trace=True)
        draw_learning_curve(self.rows, self.task.unit, self.folder / "learning_curve.png")
        draw_memory(trace, batch.inputs[0], batch.targets[0], self.folder / "memory.png")
        with _replacing(self.folder / "result.json") as path:
            result = {
                "sequences_right": shares,
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
