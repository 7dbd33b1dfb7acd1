"""Tasks that ask for what came in, later."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_triton.tasks.base import Batch, BitTask, SymbolTask


class CopyTask(BitTask):
    """Repeat a sequence of random bit vectors after its end.

    Input: `size` vectors of bits, then one step on whose extra channel a 1 says "now you", then zeros.
    Target: the same vectors in the same order, right after that step; before it, the output does not count.

    Args:
        min_length, max_length: how many vectors a training sequence has.
        num_bits: bits in a vector.

    Source: the copy task of Graves et al. 2014 (NTM) and 2016 (DNC).
    """

    name: ClassVar[str] = "copy"
    summary: ClassVar[str] = "repeat a sequence of random bit vectors after its end"
    arguments: ClassVar[dict[str, str]] = {
        "min_length": "vectors in the shortest training sequence",
        "max_length": "vectors in the longest training sequence",
        "num_bits": "bits in a vector",
    }

    def __init__(self, min_length: int = 1, max_length: int = 10, num_bits: int = 8) -> None:
        if not 1 <= min_length <= max_length:
            raise ValueError(
                f"min_length, max_length: expected 1 ≤ min_length ≤ max_length, got {min_length}, {max_length}"
            )
        if num_bits < 1:
            raise ValueError(f"num_bits: expected at least 1, got {num_bits}")
        self.num_bits = num_bits
        self.input_size, self.output_size = num_bits + 1, num_bits
        trained = range(min_length, max_length + 1)
        self.lessons = [trained]
        self.evaluations = {
            f"{min_length} to {max_length} vectors, as trained": trained,
            f"{max_length + 1} to {2 * max_length} vectors": range(max_length + 1, 2 * max_length + 1),
            f"{2 * max_length} vectors, twice the longest": [2 * max_length],
        }

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        bits = torch.randint(2, (batch_size, size, self.num_bits), generator=generator).float()
        steps = 2 * size + 1
        inputs = torch.zeros(batch_size, steps, self.input_size)
        inputs[:, :size, : self.num_bits] = bits
        inputs[:, size, self.num_bits] = 1
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, size + 1 :] = bits
        return Batch(inputs, targets, (torch.arange(steps) > size).expand(batch_size, -1))

    def show(self, outputs: Tensor, batch: Batch) -> str:
        answer = torch.where(batch.scored[0].unsqueeze(-1), outputs[0] > 0, False)
        pictures = {"input": batch.inputs[0], "target": batch.targets[0], "output": answer}
        lines = []
        for name, steps in pictures.items():
            rows = ["".join("█" if bit else "·" for bit in channel) for channel in steps.T.tolist()]
            lines += [f"{name if index == 0 else '':<8}{row}" for index, row in enumerate(rows)]
        return "\n".join(lines)


class DelayedCopyTask(SymbolTask):
    """Give back a symbol after a fixed number of blanks: ``8 _ _ _ _`` gives ``_ _ _ _ 8``.

    Input: a symbol, then `delay` blanks. Target: `delay` blanks, then the symbol. Every step counts: giving it back
    early is as wrong as forgetting it.

    Args:
        delay: blanks after the symbol.
        num_symbols: how many symbols there are, without the blank.
    """

    name: ClassVar[str] = "delayed_copy"
    summary: ClassVar[str] = "give back a symbol after blanks: 8 _ _ _ _ gives _ _ _ _ 8"
    arguments: ClassVar[dict[str, str]] = {
        "delay": "blanks after the symbol",
        "num_symbols": "how many symbols there are, without the blank",
    }

    def __init__(self, delay: int = 4, num_symbols: int = 10) -> None:
        if delay < 1:
            raise ValueError(f"delay: expected at least 1, got {delay}")
        if num_symbols < 2:
            raise ValueError(f"num_symbols: expected at least 2, got {num_symbols}")
        self.num_symbols = num_symbols
        self.vocabulary = self.input_vocabulary = [*map(str, range(num_symbols)), "_"]
        self.input_size = self.output_size = num_symbols + 1
        self.lessons = [[delay]]
        self.evaluations = {f"delay {delay}, as trained": [delay]}

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        symbols = torch.randint(self.num_symbols, (batch_size,), generator=generator)
        given = torch.full((batch_size, size + 1), self.num_symbols)
        wanted = given.clone()
        given[:, 0] = wanted[:, -1] = symbols
        inputs = F.one_hot(given, self.input_size).float()
        return Batch(inputs, wanted.unsqueeze(-1), torch.ones_like(given, dtype=torch.bool))
