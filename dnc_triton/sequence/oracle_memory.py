"""The memory's part of a sequence by the oracle's own step and adjoint: the counterpart of `TorchMemory`.

Nothing is written a second time. As it stands it is no faster than the oracle; it is what `compiled` compiles.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dnc_reference.addressing import update_link, update_memory
from dnc_reference.backward import activate_interface_backward, memory_step_backward
from dnc_reference.interface import activate_interface
from dnc_reference.memory import Addressing, memory_step_with_addressing
from dnc_reference.types import Interface, MemoryState


def kept_shapes(batch: int, slots: int, reads: int) -> list[tuple[int, ...]]:
    """What a step leaves for its backward: the shapes of `Addressing` for one write head."""
    row, head, heads, ways = (batch, slots), (batch, 1, slots), (batch, reads, slots), (batch, reads, 1, slots)
    return [row, head, head, heads, ways, ways]


class OracleMemory:
    """Steps forward and backward over one stretch of a sequence.

    Args:
        vectors: [T, B, S], the raw interface vectors, each filled in before its step.
        kept: buffers [T, ...] in the shapes of `kept_shapes`.
        word, reads, strength_offset, stop_usage_gradient: as `TorchMemory` has them.
    """

    def __init__(
        self,
        vectors: Tensor,
        kept: list[Tensor],
        *,
        word: int,
        reads: int,
        strength_offset: float,
        stop_usage_gradient: bool,
    ) -> None:
        self.vectors = vectors.unbind(0)
        self.kept = [Addressing(*tensors) for tensors in zip(*(tensor.unbind(0) for tensor in kept), strict=True)]
        strength = "oneplus" if strength_offset else "softplus"
        self.sizes: dict[str, Any] = {"num_reads": reads, "num_writes": 1, "word_size": word, "strength": strength}
        self.stop_usage_gradient = stop_usage_gradient

    def begin_forward(self) -> None:
        """Before the first step."""

    def forward(self, step: int, prev: MemoryState, new: MemoryState, read_words: Tensor, *, fresh: bool) -> None:
        """As in `TorchMemory`; `fresh` does not matter."""
        words, state, addressing = memory_step_with_addressing(self._interface(step), prev)
        _write((*new, *self.kept[step], read_words), (*state, *addressing, words))

    def replay(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """As in `TorchMemory`."""
        interface, weights = self._interface(step), new.write_weights
        memory = update_memory(prev.memory, weights, interface.erase_vectors, interface.write_vectors)
        _write((new.memory, new.link), (memory, update_link(prev.link, prev.precedence, weights)))

    def begin_backward(self, usage: Tensor, read_weights: Tensor, write_weights: Tensor, d_vectors: Tensor) -> None:
        """As in `TorchMemory`; only `d_vectors` matters."""
        self.d_vectors = d_vectors.unbind(0)

    def backward(
        self, step: int, prev: MemoryState, new: MemoryState, d_read_words: Tensor, d: MemoryState
    ) -> MemoryState:
        """As in `TorchMemory`."""
        interface = self._interface(step)
        d_interface, d_prev = memory_step_backward(
            interface,
            prev,
            d_read_words,
            d,
            stop_usage_gradient=self.stop_usage_gradient,
            kept=(new, self.kept[step]),
        )
        d_vector = activate_interface_backward(d_interface, interface, self.vectors[step])
        _write((self.d_vectors[step], *d), (d_vector, *d_prev))
        return d

    def _interface(self, step: int) -> Interface:
        return activate_interface(self.vectors[step], **self.sizes)


def _write(buffers: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
