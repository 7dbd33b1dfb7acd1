"""What one step of a sequence hands to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dnc_reference.types import MemoryState


class Light(NamedTuple):
    """What the memory's part hands on, but for memory and link, which are by far the largest.

    Attributes:
        usage, precedence, read_weights, write_weights: as in `MemoryState`.
        words: [B, R, W], the words read.
    """

    usage: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor
    words: Tensor

    @classmethod
    def of(cls, memory: MemoryState, words: Tensor) -> Light:
        """Of a state."""
        return cls(memory.usage, memory.precedence, memory.read_weights, memory.write_weights, words)


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

    def light(self) -> list[Tensor]:
        """All but memory and link: what is in `Light`, and the layers' states."""
        return [*Light.of(self.memory, self.words), *(tensor for layer in self.layers for tensor in layer)]

    @classmethod
    def of(cls, memory: Tensor, link: Tensor, light: list[Tensor], num_layers: int) -> Carried:
        """From memory, link and all the others."""
        usage, *others = light
        return cls.unflatten([memory, usage, link, *others], num_layers)

    @classmethod
    def unflatten(cls, tensors: list[Tensor], num_layers: int) -> Carried:
        """The inverse. A layer may have no state."""
        memory, words, states = cls.split(tensors)
        per_layer = len(states) // num_layers
        return cls(memory, words, [states[i * per_layer : (i + 1) * per_layer] for i in range(num_layers)])

    @staticmethod
    def split(tensors: list[Tensor]) -> tuple[MemoryState, Tensor, list[Tensor]]:
        """The same list as the memory, the words, and the layers' states one after the other."""
        fields = len(MemoryState._fields)
        return MemoryState(*tensors[:fields]), tensors[fields], tensors[fields + 1 :]
