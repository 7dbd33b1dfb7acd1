"""Tasks that ask to repeat the input later."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from dnc_triton.tasks.base import Batch, BitTask, SymbolTask, check_at_least, check_range


class CopyTask(BitTask):
    """Repeat a sequence of random bit vectors after its end.

    Input: `size` vectors of bits, then one step with a 1 on an extra channel, which says "now you", then zeros.
    Target: the same vectors in the same order, right after that step; before it, the output does not count.

    Args:
        min_length, max_length: how many vectors a training sequence has.
        num_bits: bits in a vector.

    Source: the copy task of Graves et al. 2014 (NTM), 4.1, with 1 to 20 vectors of 8 bits, and 2016 (DNC).
    """

    name: ClassVar[str] = "copy"
    summary: ClassVar[str] = "repeat a sequence of random bit vectors after its end"
    arguments: ClassVar[dict[str, str]] = {
        "min_length": "vectors in the shortest training sequence",
        "max_length": "vectors in the longest training sequence",
        "num_bits": "bits in a vector",
    }

    def __init__(self, min_length: int = 1, max_length: int = 10, num_bits: int = 8) -> None:
        check_range("min_length", min_length, "max_length", max_length)
        check_at_least("num_bits", num_bits, 1)
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
        check_at_least("size", size, 1)
        bits = torch.randint(2, (batch_size, size, self.num_bits), generator=generator).float()
        steps = 2 * size + 1
        inputs = torch.zeros(batch_size, steps, self.input_size)
        inputs[:, :size, : self.num_bits] = bits
        inputs[:, size, self.num_bits] = 1
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, size + 1 :] = bits
        return Batch(inputs, targets, (torch.arange(steps) > size).expand(batch_size, -1))


class RepeatCopyTask(BitTask):
    """Repeat a sequence of random bit vectors as often as asked, then say that it is over.

    Input, num_bits + 2 channels: a step with 1 on channel num_bits, "here it begins"; `length` steps of bits; a step
    with repeats / norm_max on the last channel; zeros. Target, num_bits + 1 channels, from the step after that one on:
    the vectors, `repeats` times over, then a step with 1 on the last channel alone, "the end". Earlier outputs do not
    count.

    A size is 1000 · length + repeats: 3004 is three vectors, four times.

    Args:
        min_length, max_length: how many vectors a training sequence has.
        min_repeats, max_repeats: how often they are asked for in training.
        num_bits: bits in a vector.
        norm_max: the number of repetitions that is encoded as 1.

    Source: `RepeatCopy` in DeepMind's published code, which draws length and repetitions anew for each sequence of a
    batch and pads; here all sequences of a batch share both, which leaves nothing to pad.
    """

    name: ClassVar[str] = "repeat_copy"
    summary: ClassVar[str] = "repeat a sequence of random bit vectors as often as asked, then mark the end"
    arguments: ClassVar[dict[str, str]] = {
        "min_length": "vectors in the shortest training sequence",
        "max_length": "vectors in the longest training sequence",
        "min_repeats": "fewest repetitions in training",
        "max_repeats": "most repetitions in training",
        "num_bits": "bits in a vector",
        "norm_max": "number of repetitions that is encoded as 1",
    }

    def __init__(
        self,
        min_length: int = 1,
        max_length: int = 2,
        min_repeats: int = 1,
        max_repeats: int = 2,
        num_bits: int = 4,
        norm_max: int = 10,
    ) -> None:
        check_range("min_length", min_length, "max_length", max_length)
        check_range("min_repeats", min_repeats, "max_repeats", max_repeats)
        check_at_least("num_bits", num_bits, 1)
        check_at_least("norm_max", norm_max, 1)
        if max_repeats > 499:
            raise ValueError(f"max_repeats: expected at most 499, got {max_repeats}")
        self.num_bits, self.norm_max = num_bits, norm_max
        self.input_size, self.output_size = num_bits + 2, num_bits + 1

        def sizes(lengths: range, repeats: range) -> list[int]:
            return [1000 * length + repeat for length in lengths for repeat in repeats]

        lengths, repeats = range(min_length, max_length + 1), range(min_repeats, max_repeats + 1)
        longer, more = range(max_length + 1, 2 * max_length + 1), range(max_repeats + 1, 2 * max_repeats + 1)
        self.lessons = [sizes(lengths, repeats)]
        self.evaluations = {
            f"{min_length} to {max_length} vectors, {min_repeats} to {max_repeats} times, as trained": self.lessons[0],
            f"{longer[0]} to {longer[-1]} vectors": sizes(longer, repeats),
            f"{more[0]} to {more[-1]} times": sizes(lengths, more),
        }

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        length, repeats = divmod(size, 1000)
        if length < 1 or repeats < 1:
            raise ValueError(f"size: expected 1000 · length + repeats, 3004 say, both at least 1, got {size}")
        bits = torch.randint(2, (batch_size, length, self.num_bits), generator=generator).float()
        asked, steps = length + 1, length * (repeats + 1) + 3
        inputs = torch.zeros(batch_size, steps, self.input_size)
        inputs[:, 0, self.num_bits] = 1
        inputs[:, 1:asked, : self.num_bits] = bits
        inputs[:, asked, self.num_bits + 1] = repeats / self.norm_max
        targets = torch.zeros(batch_size, steps, self.output_size)
        targets[:, asked + 1 : -1, : self.num_bits] = bits.repeat(1, repeats, 1)
        targets[:, -1, self.num_bits] = 1
        return Batch(inputs, targets, (torch.arange(steps) > asked).expand(batch_size, -1))


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
        check_at_least("delay", delay, 1)
        check_at_least("num_symbols", num_symbols, 2)
        self.num_symbols = num_symbols
        self.vocabulary = self.input_vocabulary = [*map(str, range(num_symbols)), "_"]
        self.input_size = self.output_size = num_symbols + 1
        self.lessons = [[delay]]
        self.evaluations = {f"delay {delay}, as trained": [delay]}

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        check_at_least("size", size, 1)
        symbols = torch.randint(self.num_symbols, (batch_size,), generator=generator)
        given = torch.full((batch_size, size + 1), self.num_symbols)
        wanted = given.clone()
        given[:, 0] = wanted[:, -1] = symbols
        inputs = F.one_hot(given, self.input_size).float()
        return Batch(inputs, wanted.unsqueeze(-1), torch.ones_like(given, dtype=torch.bool))
