"""Train a DNC on a task, and an LSTM of the same hidden size beside it, so that nothing is lost whatever happens.

A run lives in a folder:

    checkpoint.pt     the whole state of the run when it was last saved; the run goes on from this file alone
    best.pt           the same, of the step with the most sequences right in validation
    settings.toml     what it was started with; its first file, which claims the folder for this run alone
    metrics.csv       means over each 50 steps of training; validation.csv, tensorboard/
    failure.pt        if a number was not finite: the batch, and the state of the run before it

All randomness in a step, of batches and dropout, follows from the step's number. So a run that was interrupted at any
step ends, on a CPU, with the same bits as one that never was, and no random state has to be saved.

On several devices `torchrun` starts the same command several times. Every process makes the same batch and takes its
rows of it; together they learn what one process would. Only the first one writes files and prints.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dnc_triton import environment
from dnc_triton.dispatch import BACKENDS, check_backend
from dnc_triton.files import is_full, write, write_table
from dnc_triton.layer import DNC
from dnc_triton.tasks import Batch
from dnc_triton.tasks.data import TrainingBatches, generator, mixed
from dnc_triton.training import checkpoint
from dnc_triton.training.folder import held, let_go
from dnc_triton.training.journal import Journal, say
from dnc_triton.training.learner import Learner, make_fabric
from dnc_triton.training.settings import Settings

LOG_EVERY = 50  # steps between two rows of metrics.csv, and between two checkpoints unless the clock says otherwise
CHECKPOINT_SECONDS = 60.0  # a checkpoint is no older than that, unless writing it takes too long:
CHECKPOINT_SHARE = 0.05  # at most this share of the time goes into checkpoints
VALIDATION_SEQUENCES = 200
VALIDATION_SIZES = 8  # of the last lesson at most, evenly spread
KEPT = ("step", "lesson", "seconds", "rows", "validations", "best")  # attributes that a checkpoint keeps as they are
STOPPING = (signal.SIGINT, signal.SIGTERM)
PARTS = ("data", "logging", "validation", "checkpoints")  # of the time, beside training itself


class Run:
    """One training run in its folder.

    Args:
        settings: of the run.
        folder: where it lives; made if it does not exist.
        device: where it trains, as `make_fabric` takes it.
        workers: processes that draw batches ahead of training; 0: the training process draws them itself.

    Raises:
        ValueError: no such device, more processes than sequences in a batch.
    """

    def __init__(self, settings: Settings, folder: Path, *, device: str = "cpu", workers: int = 0) -> None:
        self.settings, self.folder, self.workers = settings, folder, workers
        self.fabric = make_fabric(device, settings.precision)
        self.task = settings.make_task()
        world = self.fabric.world_size
        if settings.batch_size < world:
            raise ValueError(f"batch_size: expected at least one sequence for each of {world} processes, "
                             f"got {settings.batch_size}")  # fmt: skip
        self.step = 0
        self.lesson = 0
        self.seconds = dict.fromkeys(("all", *PARTS), 0.0)
        self.rows: list[dict[str, float]] = []
        self.sums: dict[str, Tensor] = {}  # of the metrics, since the last row
        self.validations: list[dict[str, float]] = []
        self.best: dict[str, float] = {}  # of the validations
        torch.manual_seed(settings.seed)
        models: dict[str, torch.nn.Module] = {"dnc": settings.make_dnc(self.task)}
        if settings.baseline:
            models["lstm"] = settings.make_lstm(self.task)
        self.learners = {name: Learner(self.task, model, settings, self.fabric) for name, model in models.items()}

    @classmethod
    def resume(cls, folder: Path, *, name: str = "checkpoint.pt", device: str = "cpu", workers: int = 0) -> Run:
        """The run that left a checkpoint in this folder.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is damaged, of another version, or does not fit its own settings.
        """
        content = checkpoint.load(folder / name)
        try:
            settings = Settings(**content["settings"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / name}: its settings are none of this version's: {error}") from error
        run = cls(settings, folder, device=device, workers=workers)
        run.load(content)
        return run

    def load(self, content: dict[str, Any]) -> None:
        """Become the run that a checkpoint holds.

        Raises:
            ValueError: it is of a run with other settings; the message names them.
        """
        here, there = asdict(self.settings), content["settings"]
        if others := sorted(here.keys() ^ there.keys()):  # of another version
            raise ValueError(
                f"checkpoint: expected the settings {', '.join(here)}; these are on one side alone: {', '.join(others)}"
            )
        differing = [f"{name} is {value!r} here and {there[name]!r} there"
                     for name, value in here.items() if value != there[name]]  # fmt: skip
        if differing:
            raise ValueError(f"checkpoint: expected one of a run with the same settings, but {', '.join(differing)}")
        if content["learners"].keys() != self.learners.keys():
            raise ValueError(f"checkpoint: expected {list(self.learners)}, got {list(content['learners'])}")
        for name, learner in self.learners.items():
            learner.load_state_dict(content["learners"][name])
        for name in KEPT:
            setattr(self, name, content[name])
        if self.fabric.is_global_zero:
            self.sums = {name: value.to(self.fabric.device) for name, value in content["sums"].items()}

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the run, as `load` takes it."""
        return {
            "settings": asdict(self.settings),
            **{name: getattr(self, name) for name in KEPT},
            "sums": self.sums,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
        }

    def check_backend(self) -> None:
        """Check that the DNC can run on the backend that the environment asks for, if it names one.

        Raises:
            ValueError: no backend has that name, or it does not serve this DNC on this device.
        """
        name = os.environ.get(environment.BACKEND) or "auto"
        check_backend(environment.BACKEND, name)
        dnc = self.learners["dnc"].model
        assert isinstance(dnc, DNC)
        if name != "auto":
            problem = dnc.problem(dnc.output.weight.new_empty(1, 2, dnc.input_size))
            supported, reason = BACKENDS[name].supports(problem)
            if not supported:
                raise ValueError(f"{environment.BACKEND}: expected 'auto' or a backend that serves this run, "
                                 f"got {name!r}: {reason}")  # fmt: skip

    def train(self) -> bool:
        """Train to the last step, or until SIGINT or SIGTERM; the run is saved either way.

        Returns:
            whether the last step was reached.

        Raises:
            FloatingPointError: a number is not finite; `failure.pt` holds the batch, and the run before it.
            ValueError: another process is training in the folder.
            OSError: the folder cannot be made, before the first step; or the end of the run could not be saved, on a
                full disk say: the message says where it was saved instead.
        """
        settings = self.settings
        if self.step >= settings.steps and not os.access(self.folder, os.W_OK):  # nothing to do, and nowhere to write
            return True
        with ExitStack() as stack:
            if self.fabric.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(self.folder))
            stop = stack.enter_context(_asked_to_stop())
            progress = stack.enter_context(self._progress())
            journal = Journal(self.folder / "tensorboard" if self.fabric.is_global_zero else None, self.step)
            stack.callback(journal.close)
            started = time.perf_counter() - self.seconds["all"]
            saved, saving, stopped = time.perf_counter(), 0.0, False
            batches, lesson = self._batches(), self.lesson
            # Otherwise this process would wait for its workers after an error.
            stack.callback(lambda: batches.close())
            while self.step < settings.steps and not stopped:
                if self.lesson != lesson:
                    batches, lesson = self._batches(), self.lesson
                with self._clock("data"):
                    batch = next(batches)
                row_ends = (self.step + 1) % LOG_EVERY == 0 or self.step + 1 == settings.steps
                since = time.perf_counter() - saved
                due = (row_ends or since > CHECKPOINT_SECONDS) and since * CHECKPOINT_SHARE >= saving
                stopped, due = self._learn(batch, bool(stop), due)
                progress.update()
                self.seconds["all"] = time.perf_counter() - started
                if row_ends:
                    self._close_row(journal, progress)
                if self.step % settings.validate_every == 0 or self.step == settings.steps:
                    self._validate_and_keep(journal)
                if due and not stopped and self.step < settings.steps:
                    before = time.perf_counter()
                    with self._clock("checkpoints"):
                        self._share_sums()
                        journal.flush()
                        written = self._try_to_save("checkpoint.pt")
                    saved = time.perf_counter()
                    saving = saved - before if written else CHECKPOINT_SECONDS * CHECKPOINT_SHARE
                self.seconds["all"] = time.perf_counter() - started
            self._share_sums()
            self._save_the_end()
        return self.step == settings.steps

    def _learn(self, batch: Batch, stop: bool, due: bool) -> tuple[bool, bool]:
        """Train for one step. Returns whether any process wants to stop, and whether any wants to save."""
        world, rank = self.fabric.world_size, self.fabric.global_rank
        seed = mixed(self.settings.seed, self.step, rank)
        torch.manual_seed(seed)
        units, sequences = self.task.units(batch), batch.inputs.shape[0]
        part = batch.rows(slice(rank, None, world)).to(self.fabric.device)
        metrics = {
            f"{name}_{key}": value
            for name, learner in self.learners.items()
            for key, value in learner.backward(part, units, sequences).items()
        }
        # The one point in a step at which the processes and their devices wait for each other.
        watched = [value for key, value in metrics.items() if key.endswith(("_loss", "_gradient_norm"))]
        failed = not bool(torch.stack(watched).isfinite().all())
        if world > 1:
            flags = torch.tensor([failed, stop, due], dtype=torch.float32, device=self.fabric.device)
            failed, stop, due = (flag > 0 for flag in self._total(flags).tolist())
        if failed:
            self._fail(batch, part, units, seed)
        for learner in self.learners.values():
            learner.update()
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.step += 1
        return stop, due

    def _fail(self, batch: Batch, part: Batch, units: Tensor, seed: int) -> None:
        """Say which tensor is not finite, and save all that is needed to reproduce it."""
        torch.manual_seed(seed)
        where, found = "", {}
        for model, learner in self.learners.items():
            found = learner.examine(part, units)
            finite = torch.stack([tensor.isfinite().all() for tensor in found.values()]).int()
            # The first tensor that is not finite in some process; all have the same tensors.
            counts = self._total(finite).tolist()
            names = [name for name, count in zip(found, counts, strict=True) if count < self.fabric.world_size]
            if names:
                where = f"{model}: {names[0]}"
                break
        where = where or "the norm of a gradient"
        step = self.step + 1
        message = f"step {step}: {where} is not finite. "
        if self.fabric.is_global_zero:
            kept = {
                "failed_step": step,
                "failed_tensor": where,
                "batch": {name: tensor for name, tensor in batch._asdict().items() if tensor is not None},
                "tensors": {name: tensor for name, tensor in found.items() if not name.startswith("parameter ")},
                **self.state_dict(),
            }
            try:
                checkpoint.save(self.folder / "failure.pt", kept)
                message += f"{self.folder}/failure.pt holds the batch, the tensors and the run before that step. "
            except OSError as error:
                message += f"The batch could not be kept: {error}. "
        clip = "a lower --clip" if self.settings.clip else "a --clip"  # 0 is none
        raise FloatingPointError(message + f"Try a lower --learning-rate or --max-gradient-norm, or {clip}")

    def _batches(self) -> Generator[Batch, None, None]:
        """The batches of the present lesson, from the present step on, until the generator is closed."""
        try:
            yield from _begin(
                DataLoader(
                    TrainingBatches(self.task, self.settings.batch_size, self.settings.seed, self.lesson),
                    batch_size=None,
                    sampler=range(self.step, self.settings.steps),
                    num_workers=self.workers,
                    pin_memory=self.fabric.device.type == "cuda",
                    worker_init_fn=_leave_to_the_run,
                )
            )
        except Exception as error:
            # A worker's error would keep the loader alive, and so its workers, which outlive this process.
            traceback.clear_frames(error.__traceback__)
            raise

    def _progress(self) -> Any:
        # A terminal gets a moving bar, a log file a line now and then.
        seconds = 0.1 if sys.stderr.isatty() else 10
        hidden = not self.fabric.is_global_zero
        return tqdm(total=self.settings.steps, initial=self.step, unit="step", mininterval=seconds, disable=hidden)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        total = self.fabric.all_reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _share_sums(self) -> None:
        """Give the first process the sums of all processes, as only it writes them."""
        if self.fabric.world_size > 1 and self.sums:
            sums = self._total(torch.stack(list(self.sums.values())))
            self.sums = dict(zip(self.sums, sums if self.fabric.is_global_zero else 0 * sums, strict=True))

    def _close_row(self, journal: Journal, progress: Any) -> None:
        """End a row of the metrics, show it, and go on to the next lesson if the row says so."""
        with self._clock("logging"):
            row = self._log()
            self._advance(row)
            journal.add(row, "training")
            error = row[f"dnc_{self.task.unit}_error"]
            shown = {"loss": f"{row['dnc_loss']:.4f}", f"{self.task.unit} error": f"{error:.4f}"}
            progress.set_postfix(shown, refresh=False)

    def _log(self) -> dict[str, float]:
        """A row of the metrics: the means since the last one."""
        steps = (self.step - 1) % LOG_EVERY + 1
        self._share_sums()
        means = {key: float(value) / steps for key, value in self.sums.items()}
        rate = self.learners["dnc"].optimizer.param_groups[0]["lr"]
        seconds = round(self.seconds["all"], 2)
        row = {"step": self.step, "lesson": self.lesson, **means, "learning_rate": rate, "seconds": seconds}
        self.rows.append(row)
        self.sums = {}
        return row

    def _advance(self, row: dict[str, float]) -> None:
        """Go on to the next lesson, in all processes, if a row of the metrics says that this one is learned."""
        if row["dnc_right"] >= self.settings.advance_at and self.lesson + 1 < len(self.task.lessons):
            self.lesson += 1
        self.lesson = self.fabric.broadcast(self.lesson)

    def _validate_and_keep(self, journal: Journal) -> None:
        """Validate, and save the run if it is the best so far; if that fails, best.pt and `best` stay as they were."""
        with self._clock("validation"):
            row = self._validate()
            journal.add(row, "validation")
        self._share_sums()  # in all processes, whether or not this is the best
        if self._is_best(row):
            last, self.best = self.best, row
            with self._clock("checkpoints"):
                if not self._try_to_save("best.pt"):
                    self.best = last

    def _validate(self) -> dict[str, float]:
        """A row of the validations, on the same sequences each time."""
        sizes = sorted(set(self.task.lessons[-1]))  # a repeated size would bring the same sequences
        spread = np.linspace(0, len(sizes) - 1, min(len(sizes), VALIDATION_SIZES)).round().astype(int)
        row: dict[str, float] = {"step": self.step}
        for name, value in self.score([sizes[index] for index in spread], VALIDATION_SEQUENCES, "validation").items():
            row |= {f"{name}_{key}": share for key, share in value.items()}
        self.validations.append(row)
        return row

    def _is_best(self, row: dict[str, float]) -> bool:
        # Where as many sequences are right, the lower loss is better.
        rank = (row["dnc_right"], -row["dnc_loss"])
        return not self.best or rank > (self.best["dnc_right"], -self.best["dnc_loss"])

    @torch.no_grad()
    def score(self, sizes: list[int], sequences: int, split: str) -> dict[str, dict[str, float]]:
        """How well the models do on sequences that they are not trained on, the same ones each time.

        Args:
            sizes: of the sequences, all equally often.
            sequences: how many to draw at least.
            split: "validation" or "test".

        Returns:
            model → loss per unit, share of units wrong, share of sequences right.
        """
        count = -(-sequences // len(sizes))
        rows = slice(self.fabric.global_rank, None, self.fabric.world_size)
        totals = torch.zeros(len(self.learners), 4, dtype=torch.float32, device=self.fabric.device)
        for size in sizes:
            batch = self.task.sample(count, size, generator(self.settings.seed, split, size), split=split).rows(rows)
            if not len(batch.inputs):
                continue
            batch = batch.to(self.fabric.device)
            for total, learner in zip(totals, self.learners.values(), strict=True):
                outputs = learner.outputs(batch)
                total += torch.stack(
                    [
                        self.task.loss(outputs, batch),
                        self.task.wrong(outputs, batch).sum(),
                        self.task.units(batch),
                        self.task.right(outputs, batch).sum(),
                    ]
                )
        drawn = count * len(sizes)
        return {
            name: {"loss": loss / units, f"{self.task.unit}_error": wrong / units, "right": right / drawn}
            for name, (loss, wrong, units, right) in zip(self.learners, self._total(totals).tolist(), strict=True)
        }

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write the checkpoint, the tables and, unless they are there, the settings, each whole or not at all.

        Raises:
            OSError: one could not be written; the old one is as it was.
        """
        checkpoint.save(self.folder / name, self.state_dict())
        if not (self.folder / "settings.toml").exists():
            write(self.folder / "settings.toml", self.settings.toml().encode())
        for table, rows in (("metrics.csv", self.rows), ("validation.csv", self.validations)):
            if rows:
                write_table(self.folder / table, rows)

    def _try_to_save(self, name: str) -> bool:
        """Save during training: what cannot be written now, on a full disk say, may succeed next time.

        Returns:
            whether the file of this name was written.
        """
        if self.fabric.is_global_zero:
            try:
                self.save(name)
            except OSError as error:
                whole = "The old file is whole, training" if os.path.exists(error.filename) else "Training"
                say(f"{error}. {whole} goes on and tries again in a while" + (": make room" if is_full(error) else ""))
                return bool(error.filename != str(self.folder / name))
        return True

    def _save_the_end(self) -> None:
        if not self.fabric.is_global_zero:
            return
        try:
            self.save()
        except OSError as error:
            checkpoint.rescue(self.folder, self.state_dict(), error)


def _begin(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches, from processes that start with signals blocked.

    Those that are not forked, as on Linux from Python 3.14 on, import for some seconds before they can ignore signals.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        return iter(loader)
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # as starting a process does, which up to Python 3.13 unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_to_the_run(worker: int) -> None:
    """Called first in a worker process: the run's folder and signals are left to the training process."""
    let_go()
    # A terminal sends SIGINT to all processes, but the run still needs the batch of its present step.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # PyTorch watches the process that forked the worker: from Python 3.14 on a server, which outlives the training.
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives. A second signal has its usual effect."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
