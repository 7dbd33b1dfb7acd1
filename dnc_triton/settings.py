"""What a training run is made of: settings from a file and from flags."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dnc_triton.layer import DNC
from dnc_triton.tasks import TASKS, Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the same settings give the same run on the same machine.

    Each field says what it means in its metadata, which the command line shows. `task` is a key of `TASKS`,
    `task_arguments` what its class takes.

    Raises:
        ValueError: a task that is not there, an argument it does not have, a number out of range.
    """

    task: str
    task_arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = _setting(0, "of the weights and of the data")
    steps: int = _setting(1000, "optimisation steps")
    batch_size: int = _setting(16, "sequences per step")
    learning_rate: float = _setting(1e-2, "of Adam at the start; it falls to 0 along a cosine")
    max_gradient_norm: float = _setting(1.0, "longer gradients are scaled down to it")
    advance_at: float = _setting(0.95, "share of training sequences right at which the next lesson begins")
    controller: str = _setting("feedforward", "lstm, gru, rnn or feedforward")
    hidden_size: int = _setting(64, "of the controller, and of the LSTM beside it")
    memory_size: int = _setting(32, "slots of the memory")
    word_size: int = _setting(16, "numbers in a slot")
    num_reads: int = _setting(1, "read heads")
    baseline: bool = _setting(True, "train an LSTM of the same hidden size on the same batches")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {self.task!r}")
        known = inspect.signature(TASKS[self.task]).parameters
        for name in self.task_arguments:
            if name not in known:
                raise ValueError(f"{name}: expected one of the arguments of {self.task}, {', '.join(known)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 < self.advance_at <= 1:
            raise ValueError(f"advance_at: expected a share above 0 and at most 1, got {self.advance_at}")

    @classmethod
    def read(cls, task: str, path: Path | None = None, /, **changes: Any) -> Settings:
        """The settings in a TOML file, with changes.

        Args:
            task: a key of `TASKS`.
            path: of the file; None: the configuration that comes with the task.
            changes: settings and arguments of the task, which take the place of those in the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no TOML, or holds what is no setting; what the settings themselves refuse.
        """
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {task!r}")
        source = files("dnc_triton.tasks") / "configurations" / f"{task}.toml" if path is None else path
        try:
            settings = tomllib.loads(source.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: expected a TOML file: {error}") from error
        arguments = settings.pop("task", {})
        names = {setting.name for setting in fields(cls)} - {"task", "task_arguments"}
        for name, value in changes.items():
            (settings if name in names else arguments)[name] = value
        for name in settings:
            if name not in names:
                raise ValueError(f"{source}: {name} is no setting; expected some of {', '.join(sorted(names))}")
        return cls(task, arguments, **settings)

    def make_task(self) -> Task:
        """The task that these settings name."""
        return TASKS[self.task](**self.task_arguments)

    def make_dnc(self, task: Task) -> DNC:
        """The DNC that these settings describe, with fresh weights."""
        return DNC(
            task.input_size,
            self.hidden_size,
            task.output_size,
            memory_size=self.memory_size,
            word_size=self.word_size,
            num_reads=self.num_reads,
            controller=self.controller,
        )
