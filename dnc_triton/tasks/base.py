"""What the training loop asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Sequences of one length, and what is asked of the network.

    Attributes:
        inputs: [B, T, input_size].
        targets: [B, T, output_size].
        scored: [T] bool: the steps at which the output counts.
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(tensor.to(device) for tensor in self))


class Task(ABC):
    """A task: sequences drawn at random, their loss, and which of the outputs are wrong.

    Attributes:
        name: on the command line.
        unit: what an output is right or wrong about, "bit" say.
        defaults: the training settings that are known to work for it.
        input_size, output_size: of the network.
        lengths: those it is trained on.
        evaluations: what to report at the end, name → lengths.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    input_size: int
    output_size: int
    lengths: range
    evaluations: dict[str, range]

    @abstractmethod
    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> Batch:
        """Sequences of one length, drawn with `generator`, on the CPU."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean loss over what is scored, for outputs [B, T, output_size]."""

    @abstractmethod
    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        """[B, S] bool: which of each sequence's S scored units the outputs have wrong."""

    @abstractmethod
    def show(self, outputs: Tensor, batch: Batch) -> str:
        """The first sequence of a batch as text: input, target and output."""

    def sample_training(self, batch_size: int, generator: torch.Generator) -> Batch:
        """A batch to train on: its length is drawn evenly from `lengths`."""
        pick = int(torch.randint(len(self.lengths), (1,), generator=generator))
        return self.sample(batch_size, self.lengths[pick], generator)
