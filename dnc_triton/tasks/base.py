"""What the training loop needs of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Batch(NamedTuple):
    """Sequences, and what the network is to answer. U is the number of units of an output step: bits, or symbols.

    Attributes:
        inputs: [B, T, input_size].
        targets: [B, T, U]: bits, 0 or 1 in the dtype of the inputs, or symbols, int64.
        scored: [B, T] bool: the steps at which the output counts.
        lengths: [B] int64, the number of steps of each sequence; None means T for all. Later steps are padding.
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch._make(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)

    def rows(self, rows: slice) -> Batch:
        """Some of the sequences: the share of one process in a distributed run."""
        return Batch._make(None if tensor is None else tensor[rows] for tensor in self)


class Task(ABC):
    """A task: sequences drawn at random, their loss, and which of the outputs are wrong.

    What is drawn depends only on the arguments and the generator, so any worker may draw any batch.

    Attributes:
        name: on the command line.
        summary: one line of help.
        arguments: help for the constructor's arguments, name → text; each becomes a flag.
        unit: what an output is right or wrong about, "bit" say.
        input_size, output_size: of the network.
        lessons: the curriculum, from easy to hard: the sizes from which a training batch is drawn in each lesson.
        evaluations: what to report at the end, name → sizes.

    A size says how hard a sequence is; what it counts is up to the task (vectors to copy, say).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    arguments: ClassVar[dict[str, str]] = {}
    unit: ClassVar[str]
    input_size: int
    output_size: int
    lessons: Sequence[Sequence[int]]
    evaluations: dict[str, Sequence[int]]

    @abstractmethod
    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        """Sequences of one size, drawn with `generator`, on the CPU.

        `split` is "train", "validation" or "test". A task that makes its sequences at random may ignore it, since
        no two splits share a seed; one that reads them from a file, or has few, keeps the splits apart.

        Raises:
            ValueError: the task has no sequence of this size.
        """

    def sample_training(self, batch_size: int, lesson: int, generator: torch.Generator) -> Batch:
        """A batch to train on: its size is drawn evenly from those of the lesson."""
        sizes = self.lessons[lesson]
        pick = int(torch.randint(len(sizes), (1,), generator=generator))
        return self.sample(batch_size, sizes[pick], generator)

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """The outputs [B, T, output_size] of a model, which is called like a `DNC`, for a batch.

        A task in which the network sees its own answers overrides this.
        """
        outputs: Tensor = model(batch.inputs, lengths=batch.lengths)[0]
        return outputs

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss of outputs [B, T, output_size], summed over the scored units."""

    @abstractmethod
    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        """[B, T, U] bool: which of the scored units are wrong in the outputs; False where nothing is scored."""

    @abstractmethod
    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        """The first sequence in words: "input", "target" and "output", one short text per step, "" for nothing."""

    def units(self, batch: Batch) -> Tensor:
        """The number of scored units in a batch, a scalar."""
        return batch.scored.sum() * batch.targets.shape[-1]

    def right(self, outputs: Tensor, batch: Batch) -> Tensor:
        """[B] bool: which sequences were solved; those without a wrong unit unless the task says otherwise."""
        return ~self.wrong(outputs, batch).flatten(1).any(1)

    def table(self, errors: dict[str, dict[str, float]]) -> str:
        """What a report adds to the sequences right. `errors`: evaluation → model → share of units wrong."""
        return ""

    def show(self, outputs: Tensor, batch: Batch) -> str:
        """The first sequence of a batch as text: input, target and output."""
        symbols = self.symbols(outputs, batch)
        widths = [max(map(len, step)) for step in zip(*symbols.values(), strict=True)]
        return "\n".join(
            f"{name:<8}" + " ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True)).rstrip()
            for name, texts in symbols.items()
        )


class BitTask(Task):
    """A task whose outputs are logits of bits, one for each channel."""

    unit: ClassVar[str] = "bit"

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            outputs[batch.scored], batch.targets[batch.scored].to(outputs.dtype), reduction="sum"
        )

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        return ((outputs > 0) != (batch.targets > 0.5)) & batch.scored.unsqueeze(-1)

    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        def text(steps: Tensor, where: Tensor) -> list[str]:
            return [_shades(step) if shown else "" for step, shown in zip(steps, where.tolist(), strict=True)]

        inputs = batch.inputs[0]
        return {
            "input": text(inputs, inputs.any(-1)),
            "target": text(batch.targets[0], batch.scored[0]),
            "output": text(outputs[0] > 0, batch.scored[0]),
        }

    def show(self, outputs: Tensor, batch: Batch) -> str:
        """The first sequence as pictures of input, target and output: time to the right, channels down."""
        answer = (outputs[0] > 0) & batch.scored[0].unsqueeze(-1)
        lines = []
        for name, steps in (("input", batch.inputs[0]), ("target", batch.targets[0]), ("output", answer)):
            rows = [_shades(channel) for channel in steps.T]
            lines += [f"{name if index == 0 else '':<8}{row}" for index, row in enumerate(rows)]
        return "\n".join(lines)


def _shades(values: Tensor) -> str:
    """A character for each value: "·" for 0 and below, "█" for 1 and above."""
    return "".join("·░▒▓█"[shade] for shade in (4 * values.float().clamp(0, 1)).ceil().int().tolist())


class SymbolTask(Task):
    """A task whose outputs are logits of symbols, `len(vocabulary)` for each of the U symbols of a step.

    Attributes:
        vocabulary: the symbols of the targets.
        input_vocabulary: what each input channel stands for; a step is shown by the channels that are on.
    """

    unit: ClassVar[str] = "symbol"
    vocabulary: Sequence[str]
    input_vocabulary: Sequence[str]

    def _logits(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(-1, (-1, len(self.vocabulary)))  # [B, T, U, V]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits, targets = self._logits(outputs)[batch.scored], batch.targets[batch.scored]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (self._logits(outputs).argmax(-1) != batch.targets) & batch.scored.unsqueeze(-1)

    def symbols(self, outputs: Tensor, batch: Batch) -> dict[str, list[str]]:
        def text(symbols: Tensor) -> list[str]:
            return [
                " ".join(self.vocabulary[symbol] for symbol in step) if shown else ""
                for step, shown in zip(symbols.tolist(), batch.scored[0].tolist(), strict=True)
            ]

        on = [[channel for channel, value in enumerate(step) if value] for step in batch.inputs[0].tolist()]
        return {
            "input": [" ".join(self.input_vocabulary[channel] for channel in channels) for channels in on],
            "target": text(batch.targets[0]),
            "output": text(self._logits(outputs[:1]).argmax(-1)[0]),
        }


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a ValueError unless a task's argument is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer, at least {least}, got {value!r}")


def check_range(min_name: str, least: int, max_name: str, most: int) -> None:
    """Raise a ValueError unless two arguments of a task are integers, 1 ≤ least ≤ most."""
    for name, value in ((min_name, least), (max_name, most)):
        check_at_least(name, value, 1)
    if least > most:
        raise ValueError(f"{min_name}, {max_name}: expected {min_name} ≤ {max_name}, got {least}, {most}")
