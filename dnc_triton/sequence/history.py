"""What a forward over a sequence keeps for its backward: a buffer per quantity, allocated once, with an entry per step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dnc_reference.types import MemoryState

Pair = tuple[Tensor, Tensor]


class History(NamedTuple):
    """The buffers. A quantity that is carried on has T+1 entries, the first for what it was before the sequence.

    Attributes:
        gates: per layer [T, B, G].
        layers: per layer its state, [T+1, B, H] each, the hidden vector first.
        cells: per layer what its cell keeps besides.
        vectors: [T, B, S], the raw interface vectors.
        carried: usage, precedence, read weights, write weights and read words, [T+1, B, ...] each.
        memory: what the memory's part keeps besides.
        memories, links: [·, B, N, W] and [·, B, 1, N, N], those that are kept of the states between the steps.
    """

    gates: list[Tensor]
    layers: list[list[Tensor]]
    cells: list[list[Tensor]]
    vectors: Tensor
    carried: list[Tensor]
    memory: list[Tensor]
    memories: Tensor
    links: Tensor


class Carried(NamedTuple):
    """What one step hands to the next.

    Attributes:
        memory: the `MemoryState`.
        words: [B, R, W], the words read.
        layers: per layer its state, [B, H] each, the hidden vector first.
    """

    memory: MemoryState
    words: Tensor
    layers: list[list[Tensor]]

    def flatten(self) -> list[Tensor]:
        """As a list: the fields of the memory, the words, the layers' states."""
        return [*self.memory, self.words, *(tensor for layer in self.layers for tensor in layer)]

    @classmethod
    def unflatten(cls, tensors: list[Tensor], num_layers: int) -> Carried:
        """The inverse. A layer may have no state."""
        per_layer = (len(tensors) - 7) // num_layers
        layers = [list(tensors[7 + i * per_layer : 7 + (i + 1) * per_layer]) for i in range(num_layers)]
        return cls(MemoryState(*tensors[:6]), tensors[6], layers)


class Checkpoints:
    """Memory and link before every step and after the last one, of which every k-th is kept.

    The others take turns in spare buffers, and stand there until a later one takes their place.

    Args:
        first, last: before the sequence and after it.
        memories, links: the buffers for those that are kept, `count` of them.
        steps: T.
        every: k; 1 keeps all.
        spare: how many spare buffers there may be: 2 while going forwards, k − 1 to have a whole stretch at once.
    """

    def __init__(
        self, first: Pair, last: Pair, memories: Tensor, links: Tensor, steps: int, every: int, spare: int
    ) -> None:
        kept = list(zip(memories.unbind(0), links.unbind(0), strict=True))
        spare = min(spare, every - 1, steps - 1)
        spares = [(torch.empty_like(first[0]), torch.empty_like(first[1])) for _ in range(spare)]
        self.every = every
        self._pairs = [first]
        for step in range(1, steps):
            index, offset = divmod(step, every)
            self._pairs.append(kept[index - 1] if offset == 0 else spares[(offset - 1) % len(spares)])
        self._pairs.append(last)

    @staticmethod
    def count(steps: int, every: int) -> int:
        """How many are kept between the first and the last."""
        return (steps - 1) // every

    def __getitem__(self, step: int) -> Pair:
        return self._pairs[step]
