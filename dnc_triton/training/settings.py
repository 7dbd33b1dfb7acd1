"""The settings of a training run, from a file and from flags."""

from __future__ import annotations

import inspect
import json
import os
import sys
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnc_reference.controller import CONTROLLERS
from dnc_triton.layer import DNC
from dnc_triton.tasks import TASKS, Task
from dnc_triton.training.baseline import LSTMBaseline

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHOICES = {
    "optimizer": ("adam", "rmsprop"),
    "schedule": ("cosine", "constant"),
    "precision": ("32-true", "bf16-mixed", "64-true"),
    "controller": tuple(CONTROLLERS),
}


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the same settings give the same run on the same machine.

    The metadata of each field says what it means, which the command line shows. `task` is a key of `TASKS`,
    `task_arguments` are the arguments of its class.

    Raises:
        ValueError: an unknown task, an argument that it does not take, a value of another type or out of range.
    """

    task: str
    task_arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = _setting(0, "seed of the weights and of the data")
    steps: int = _setting(1000, "optimisation steps")
    batch_size: int = _setting(16, "sequences per step, over all processes")
    optimizer: str = _setting("adam", "adam (with decoupled weight decay) or rmsprop (momentum 0.9, as in the paper)")
    learning_rate: float = _setting(1e-2, "highest learning rate of the optimizer")
    schedule: str = _setting("cosine", "course of the learning rate: cosine (it falls to 0) or constant")
    warmup: int = _setting(0, "steps in which the learning rate rises to its highest value")
    weight_decay: float = _setting(0.0, "pull of the weights towards 0")
    max_gradient_norm: float = _setting(1.0, "gradients with a larger norm are scaled down to it")
    advance_at: float = _setting(0.95, "share of training sequences right at which training goes on to the next lesson")
    validate_every: int = _setting(200, "steps between validations, on sequences that are not trained on")
    precision: str = _setting("32-true", "32-true, bf16-mixed (autocast) or 64-true")
    controller: str = _setting("feedforward", "lstm, gru, rnn or feedforward")
    hidden_size: int = _setting(64, "hidden size of the controller, and of the LSTM beside it")
    num_layers: int = _setting(1, "layers of the controller, and of the LSTM beside it")
    dropout: float = _setting(0.0, "share of activations dropped between these layers")
    memory_size: int = _setting(32, "slots of the memory")
    word_size: int = _setting(16, "numbers in a slot")
    num_reads: int = _setting(1, "read heads")
    max_activation_gradient: float = _setting(
        10.0, "bound on the gradient with respect to each of the controller's activations, as in the paper; 0: none"
    )
    input_gain: float = _setting(
        1.0, "factor on the initial weights of the input: more where few channels of many are on"
    )
    clip: float = _setting(0.0, "bound on the controller's activations and on the output; 0: none")
    baseline: bool = _setting(True, "train an LSTM of the same hidden size on the same batches")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {self.task!r}")
        known = inspect.signature(TASKS[self.task]).parameters
        for name, value in self.task_arguments.items():
            if name not in known:
                raise ValueError(f"{name}: expected one of the arguments of {self.task}, {', '.join(known)}")
            default = known[name].default
            if value is not default:
                _check_type(name, value, str if default is None else type(default))
        for setting in fields(self):
            if "meaning" in setting.metadata:
                _check_type(setting.name, getattr(self, setting.name), type(setting.default))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2**63 - 1, got {self.seed}")
        for name in ("steps", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_gradient_norm", "input_gain"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "max_activation_gradient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number, at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup: expected at least 0 and less than the {self.steps} steps, got {self.warmup}")
        if not 0 < self.advance_at <= 1:
            raise ValueError(f"advance_at: expected a share above 0 and at most 1, got {self.advance_at}")

    @classmethod
    def read(cls, task: str, path: Path | None = None, /, **changes: Any) -> Settings:
        """The settings in a TOML file, with changes.

        Args:
            task: a key of `TASKS`.
            path: of the file, as `toml` writes it; None: the configuration that comes with the task.
            changes: settings and arguments of the task, which override those in the file.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the file cannot be read.
            ValueError: the file is not TOML, or has an unknown setting; or as `Settings`.
        """
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(map(repr, TASKS))}, got {task!r}")
        source = files("dnc_triton.tasks") / "configurations" / f"{task}.toml" if path is None else path
        try:
            settings = tomllib.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            came = "found none" if isinstance(error, FileNotFoundError) else f"got {error.strerror}"
            raise type(error)(f"{source}: expected a TOML file of settings, {came}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: expected a TOML file: {error}") from error
        arguments = settings.pop("task", {})
        if not isinstance(arguments, dict):
            raise ValueError(
                f"{source}: expected the arguments of the task in a table [task], got task = {arguments!r}"
            )
        if (named := arguments.pop("name", task)) != task:
            raise ValueError(f"{source}: expected settings of the task {task!r}, got those of {named!r}")
        names = {setting.name for setting in fields(cls)} - {"task", "task_arguments"}
        for name, value in changes.items():
            (settings if name in names else arguments)[name] = value
        for name in settings:
            if name not in names:
                raise ValueError(f"{source}: {name} is no setting; expected some of {', '.join(sorted(names))}")
        return cls(task, with_whole_path(arguments), **settings)

    def toml(self) -> str:
        """All settings as the text of a file for `--config`."""
        lines = [f"# python -m dnc_triton train {self.task} --config THIS_FILE"]
        for setting in fields(self):
            if "meaning" in setting.metadata:
                # Numbers, strings, booleans and lists are written alike in JSON and TOML.
                lines.append(f"{setting.name} = {json.dumps(getattr(self, setting.name))}")
        given = {"name": self.task}
        given |= {name: value for name, value in self.task_arguments.items() if value is not None}
        arguments = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
        return "\n".join([*lines, "", "[task]", *arguments, ""])

    def make_task(self) -> Task:
        """The task that these settings name."""
        return TASKS[self.task](**self.task_arguments)

    def make_dnc(self, task: Task) -> DNC:
        """The DNC that these settings describe, with fresh weights."""
        dnc = DNC(
            task.input_size,
            self.hidden_size,
            task.output_size,
            memory_size=self.memory_size,
            word_size=self.word_size,
            num_reads=self.num_reads,
            controller=self.controller,
            num_layers=self.num_layers,
            dropout=self.dropout,
            clip=self.clip or None,
            max_activation_gradient=self.max_activation_gradient or None,
        )
        self._apply_input_gain(dnc.controller, task)
        return dnc

    def make_lstm(self, task: Task) -> LSTMBaseline:
        """The LSTM to compare it with, with fresh weights."""
        lstm = LSTMBaseline(task.input_size, self.hidden_size, task.output_size, self.num_layers, self.dropout)
        self._apply_input_gain(lstm.lstm, task)
        return lstm

    @torch.no_grad()
    def _apply_input_gain(self, network: nn.Module, task: Task) -> None:
        # The first parameter of either network has the weights of the input in its first columns.
        next(network.parameters())[:, : task.input_size] *= self.input_gain


def with_whole_path(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with an absolute `path` of data: a run must find it wherever it is resumed from."""
    path = arguments.get("path")
    return {**arguments, "path": os.path.abspath(path)} if isinstance(path, str) else arguments


def _check_type(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: expected a value of type {kind.__name__}, got {value!r}")
