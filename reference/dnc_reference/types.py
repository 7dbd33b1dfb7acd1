"""The data in a DNC: what the controller asks for, what the memory holds, what one step passes on to the next.

Letters in every shape: B batch, N memory slots, W word size, R read heads, K write heads.
Every tensor in a state has the batch as its first axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple, tree_map, tree_structure

from dnc_reference.checks import check_open_size, check_tensor


class Interface(NamedTuple):
    """What the controller asks of the memory in one step, already activated.

    Attributes:
        read_keys: [B, R, W], any value.
        read_strengths: [B, R], at least 0.
        write_keys: [B, K, W], any value.
        write_strengths: [B, K], at least 0.
        erase_vectors: [B, K, W], in [0, 1].
        write_vectors: [B, K, W], any value.
        free_gates: [B, R], in [0, 1].
        allocation_gates: [B, K], in [0, 1].
        write_gates: [B, K], in [0, 1].
        read_modes: [B, R, 1+2K], each row sums to 1; in this order: backward along each write head's links, forward
            along each write head's links, content.

    Source: Graves et al. 2016, Methods, "Interface parameters".
    """

    read_keys: Tensor
    read_strengths: Tensor
    write_keys: Tensor
    write_strengths: Tensor
    erase_vectors: Tensor
    write_vectors: Tensor
    free_gates: Tensor
    allocation_gates: Tensor
    write_gates: Tensor
    read_modes: Tensor

    @staticmethod
    def shapes(batch_size: int, word_size: int, num_reads: int, num_writes: int = 1) -> dict[str, tuple[int, ...]]:
        """The shape of each field."""
        return {
            "read_keys": (batch_size, num_reads, word_size),
            "read_strengths": (batch_size, num_reads),
            "write_keys": (batch_size, num_writes, word_size),
            "write_strengths": (batch_size, num_writes),
            "erase_vectors": (batch_size, num_writes, word_size),
            "write_vectors": (batch_size, num_writes, word_size),
            "free_gates": (batch_size, num_reads),
            "allocation_gates": (batch_size, num_writes),
            "write_gates": (batch_size, num_writes),
            "read_modes": (batch_size, num_reads, 1 + 2 * num_writes),
        }


class MemoryState(NamedTuple):
    """What the memory carries from one step to the next.

    Which of several identical slots, empty ones above all, is written to depends on rounding. Computed differently, in
    another batch for example, they may have swapped places; what is read does not show it.

    Attributes:
        memory: [B, N, W], the words.
        usage: [B, N], in [0, 1]; 1 is full.
        link: [B, K, N, N]; link[i, j] is the degree to which slot i was written right after slot j. Zero diagonal.
        precedence: [B, K, N], the degree to which a slot was the last one written.
        read_weights: [B, R, N].
        write_weights: [B, K, N].
    """

    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor

    @staticmethod
    def shapes(
        batch_size: int, memory_size: int, word_size: int, num_reads: int, num_writes: int = 1
    ) -> dict[str, tuple[int, ...]]:
        """The shape of each field."""
        return {
            "memory": (batch_size, memory_size, word_size),
            "usage": (batch_size, memory_size),
            "link": (batch_size, num_writes, memory_size, memory_size),
            "precedence": (batch_size, num_writes, memory_size),
            "read_weights": (batch_size, num_reads, memory_size),
            "write_weights": (batch_size, num_writes, memory_size),
        }

    @classmethod
    def zeros(
        cls,
        batch_size: int,
        memory_size: int,
        word_size: int,
        num_reads: int,
        num_writes: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryState:
        """The state before the first step: all zeros, [B, ...] each.

        Args:
            batch_size, memory_size, word_size, num_reads, num_writes: B, N, W, R, K.
            device, dtype: of the tensors; PyTorch's defaults if not given.

        Raises:
            ValueError: a batch size below 0, another size below 1.
            TypeError: a size that is no integer.
        """
        check_open_size("batch_size", batch_size)
        sizes = dict(memory_size=memory_size, word_size=word_size, num_reads=num_reads, num_writes=num_writes)
        for name, size in sizes.items():
            check_open_size(name, size, least=1)
        shapes = cls.shapes(batch_size, memory_size, word_size, num_reads, num_writes)
        return cls(**{name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()})


class DNCState(NamedTuple):
    """Everything a DNC carries from one step to the next. Returned by every call and accepted by the next one.

    Attributes:
        controller: the controller's state. For the built-in ones a tuple with one entry per layer: (hidden, cell) for
            "lstm", (hidden,) for "gru" and "rnn", () for "feedforward", each tensor [B, H]. For a controller of your
            own, whatever nest of tensors it returns, batch first.
        memory: the `MemoryState`.
        read_words: [B, R, W], what the read heads read last.
    """

    controller: Any
    memory: MemoryState
    read_words: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> DNCState:
        """The same state with `function` applied to every tensor, for example ``lambda x: x.to("cuda")``."""
        return tree_map(function, self)

    def detach(self) -> DNCState:
        """The same values, cut off from the graph: for truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def where(self, rows: Tensor, other: DNCState) -> DNCState:
        """This state in the batch rows where `rows` ([B], bool) is True, `other` in the rest.

        Raises:
            ValueError: `rows` has another length than the batch, or is on another device; or the states differ in
                structure or in shape, as those of a controller that grows its state do.
            TypeError: `rows` is no tensor of bools, `other` no `DNCState`.
        """
        if not isinstance(other, DNCState):
            raise TypeError(f"other: expected a DNCState, got {type(other).__name__}")
        check_tensor("rows", rows, self.read_words.shape[:1], dtype=torch.bool, device=self.read_words.device)
        here, there = tree_structure(self.controller), tree_structure(other.controller)
        if here != there:
            raise ValueError(f"state.controller: expected one structure in every step, got {here} and {there}")

        def pick(a: Tensor, b: Tensor) -> Tensor:
            if a.shape != b.shape:
                raise ValueError(f"state: expected one shape in every step, got {list(a.shape)} and {list(b.shape)}")
            return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

        return tree_map(pick, self, other)


# So that an exported program can be saved.
for _type in (Interface, MemoryState, DNCState):
    _register_namedtuple(_type, serialized_type_name=f"dnc_reference.{_type.__name__}")
