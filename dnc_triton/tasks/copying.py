"""Tasks that ask for what came in, later."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_triton.tasks.base import Batch, Task


class CopyTask(Task):
    """Repeat a sequence of random bit vectors after its end.

    Input: `length` vectors of bits, then one step on whose extra channel a 1 says "now you", then zeros.
    Target: the same vectors in the same order, right after that step; before it, the output does not count.

    Args:
        min_length, max_length: how many vectors a training sequence has.
        num_bits: bits in a vector.

    Source: the copy task of Graves et al. 2014 (NTM) and 2016 (DNC).
    """

    name: ClassVar[str] = "copy"
    unit: ClassVar[str] = "bit"
    defaults: ClassVar[dict[str, Any]] = {"steps": 1000, "memory_size": 32}

    def __init__(self, min_length: int = 1, max_length: int = 10, num_bits: int = 8) -> None:
        if not 1 <= min_length <= max_length:
            raise ValueError(
                f"min_length, max_length: expected 1 ≤ min_length ≤ max_length, got {min_length}, {max_length}"
            )
        if num_bits < 1:
            raise ValueError(f"num_bits: expected at least 1, got {num_bits}")
        self.num_bits = num_bits
        self.input_size, self.output_size = num_bits + 1, num_bits
        self.lengths = range(min_length, max_length + 1)
        self.evaluations = {
            f"{min_length} to {max_length} vectors, as trained": self.lengths,
            f"{max_length + 1} to {2 * max_length} vectors": range(max_length + 1, 2 * max_length + 1),
            f"{2 * max_length} vectors, twice the longest": range(2 * max_length, 2 * max_length + 1),
        }

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> Batch:
        bits = torch.randint(2, (batch_size, length, self.num_bits), generator=generator).float()
        steps = 2 * length + 1
        inputs = torch.zeros(batch_size, steps, self.input_size)
        inputs[:, :length, : self.num_bits] = bits
        inputs[:, length, self.num_bits] = 1
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, length + 1 :] = bits
        return Batch(inputs, targets, torch.arange(steps) > length)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs[:, batch.scored], batch.targets[:, batch.scored])

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        return ((outputs > 0) != (batch.targets > 0.5))[:, batch.scored].flatten(1)

    def show(self, outputs: Tensor, batch: Batch) -> str:
        answer = torch.where(batch.scored.unsqueeze(-1), outputs[0] > 0, False)
        pictures = {"input": batch.inputs[0], "target": batch.targets[0], "output": answer}
        lines = []
        for name, steps in pictures.items():
            rows = ["".join("█" if bit else "·" for bit in channel) for channel in steps.T.tolist()]
            lines += [f"{name if index == 0 else '':<8}{row}" for index, row in enumerate(rows)]
        return "\n".join(lines)


class DelayedCopyTask(Task):
    """Give back a symbol after a fixed number of blanks: ``8 _ _ _ _`` gives ``_ _ _ _ 8``.

    Input: a symbol, then `delay` blanks. Target: `delay` blanks, then the symbol. Every step counts: giving it back
    early is as wrong as forgetting it.

    Args:
        delay: blanks after the symbol.
        num_symbols: how many symbols there are, without the blank.
    """

    name: ClassVar[str] = "delayed_copy"
    unit: ClassVar[str] = "symbol"
    defaults: ClassVar[dict[str, Any]] = {"steps": 500, "memory_size": 8, "controller": "lstm"}

    def __init__(self, delay: int = 4, num_symbols: int = 10) -> None:
        if delay < 1:
            raise ValueError(f"delay: expected at least 1, got {delay}")
        if num_symbols < 2:
            raise ValueError(f"num_symbols: expected at least 2, got {num_symbols}")
        self.num_symbols = num_symbols
        self.input_size = self.output_size = num_symbols + 1  # the last one is the blank
        self.lengths = range(delay, delay + 1)
        self.evaluations = {f"delay {delay}, as trained": self.lengths}

    def sample(self, batch_size: int, length: int, generator: torch.Generator) -> Batch:
        symbols = torch.randint(self.num_symbols, (batch_size,), generator=generator)
        given = torch.full((batch_size, length + 1), self.num_symbols)
        wanted = given.clone()
        given[:, 0] = wanted[:, -1] = symbols
        inputs, targets = (F.one_hot(tokens, self.num_symbols + 1).float() for tokens in (given, wanted))
        return Batch(inputs, targets, scored=torch.ones(length + 1, dtype=torch.bool))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten(0, 1))

    def wrong(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs.argmax(-1) != batch.targets.argmax(-1)

    def show(self, outputs: Tensor, batch: Batch) -> str:
        names = [str(symbol) for symbol in range(self.num_symbols)] + ["_"]
        tokens = {"input": batch.inputs[0], "target": batch.targets[0], "output": outputs[0]}
        return "\n".join(
            f"{name:<8}" + " ".join(names[token] for token in steps.argmax(-1).tolist())
            for name, steps in tokens.items()
        )
