"""The memory's part of a sequence as the oracle's own step and adjoint, compiled by PyTorch's compiler for a CPU.

Where the memory is small the time goes into the number of calls, and compiled a step and its adjoint are two of them
instead of some 110. Nothing is written a second time: what is compiled is `dnc_reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from dnc_reference.backward import activate_interface_backward, memory_step_backward
from dnc_reference.interface import activate_interface, interface_sizes
from dnc_reference.memory import Addressing, memory_step_with_addressing
from dnc_reference.types import MemoryState

Compiled = Callable[..., Any]


def kept_shapes(batch: int, slots: int, reads: int) -> Addressing:
    """What a step leaves for its backward: the shapes of `Addressing` for one write head."""
    row, head, heads, ways = (batch, slots), (batch, 1, slots), (batch, reads, slots), (batch, reads, 1, slots)
    return Addressing(row, head, head, heads, ways, ways)  # type: ignore[arg-type]


class CompiledMemory:
    """Steps forward and backward over one stretch of a sequence; in the place of `TorchMemory`, but it does not replay.

    All tensors of a step are contiguous: the compiled code does not look.

    Args:
        vectors: [T, B, S], the raw interface vectors, each filled in before its step.
        kept: buffers [T, ...] in the shapes of `kept_shapes`.
        memory: [B, N, W], the first one.
        reads, strength_offset, stop_usage_gradient: as `TorchMemory` has them.
    """

    def __init__(
        self,
        vectors: Tensor,
        kept: list[Tensor],
        memory: Tensor,
        *,
        reads: int,
        strength_offset: float,
        stop_usage_gradient: bool,
    ) -> None:
        self.vectors = vectors.unbind(0)
        self.kept = list(zip(*(tensor.unbind(0) for tensor in kept), strict=True))
        strength = "oneplus" if strength_offset else "softplus"
        self.sizes = (*memory.shape, reads, memory.dtype, strength)
        self.stop_usage_gradient = stop_usage_gradient

    def begin_forward(self) -> None:
        """Before the first step."""
        self.step = _compiled_step(*self.sizes)

    def forward(self, step: int, prev: MemoryState, new: MemoryState, read_words: Tensor, *, fresh: bool) -> None:
        """As in `TorchMemory`; `fresh` does not matter."""
        self.step(self.vectors[step], *prev, *new, *self.kept[step], read_words)

    def begin_backward(self, usage: Tensor, read_weights: Tensor, write_weights: Tensor, d_vectors: Tensor) -> None:
        """As in `TorchMemory`; only `d_vectors` matters."""
        self.d_vectors = d_vectors.unbind(0)
        self.step_backward = _compiled_step_backward(*self.sizes, self.stop_usage_gradient)

    def backward(
        self, step: int, prev: MemoryState, new: MemoryState, d_read_words: Tensor, d: MemoryState
    ) -> MemoryState:
        """As in `TorchMemory`."""
        self.step_backward(self.vectors[step], *prev, *new, *self.kept[step], d_read_words, *d, self.d_vectors[step])
        return d


@lru_cache(maxsize=64)
def _compiled_step(batch: int, slots: int, word: int, reads: int, dtype: torch.dtype, strength: str) -> Compiled:
    """A step that writes the new memory, what a backward wants of it and the words read to where it is told."""
    options: dict[str, Any] = {"num_reads": reads, "num_writes": 1, "word_size": word, "strength": strength}

    def step(vector: Tensor, prev: MemoryState, new: MemoryState, kept: Addressing, read_words: Tensor) -> None:
        words, state, addressing = memory_step_with_addressing(activate_interface(vector, **options), prev)
        _write((*new, *kept, read_words), (*state, *addressing, words))

    vector, state, kept, words = _examples(batch, slots, word, reads, dtype)
    return _compile(step, (vector, state(), state(), kept, words))


@lru_cache(maxsize=64)
def _compiled_step_backward(
    batch: int, slots: int, word: int, reads: int, dtype: torch.dtype, strength: str, stop_usage_gradient: bool
) -> Compiled:
    """Its adjoint, which writes the gradient by the memory before over that by the memory after."""
    options: dict[str, Any] = {"num_reads": reads, "num_writes": 1, "word_size": word, "strength": strength}

    def step_backward(
        vector: Tensor,
        prev: MemoryState,
        new: MemoryState,
        kept: Addressing,
        d_read_words: Tensor,
        d: MemoryState,
        d_vector: Tensor,
    ) -> None:
        interface = activate_interface(vector, **options)
        d_interface, d_prev = memory_step_backward(
            interface, prev, d_read_words, d, stop_usage_gradient=stop_usage_gradient, kept=(new, kept)
        )
        _write((d_vector, *d), (activate_interface_backward(d_interface, interface, vector), *d_prev))

    vector, state, kept, words = _examples(batch, slots, word, reads, dtype)
    return _compile(step_backward, (vector, state(), state(), kept, words, state(), torch.zeros_like(vector)))


def _write(buffers: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def _examples(
    batch: int, slots: int, word: int, reads: int, dtype: torch.dtype
) -> tuple[Tensor, Callable[[], MemoryState], Addressing, Tensor]:
    """An interface vector, memories, what is kept and words read, to be traced with."""

    def zeros(shape: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    shapes = MemoryState.shapes(batch, slots, word, reads, 1).values()
    return (
        zeros((batch, sum(interface_sizes(reads, 1, word).values()))),
        lambda: MemoryState(*map(zeros, shapes)),
        Addressing(*map(zeros, kept_shapes(batch, slots, reads))),
        zeros((batch, reads, word)),
    )


def _compile(function: Callable[..., None], examples: tuple[Any, ...]) -> Compiled:
    """Machine code for these sizes, which takes the tensors one by one.

    `torch.compile` would check what it is given at each call, which takes as long as the step.
    """
    flat, structure = tree_flatten(examples)

    def traced(*tensors: Tensor) -> tuple[()]:
        function(*tree_unflatten(list(tensors), structure))
        return ()

    with torch.no_grad():
        graph = make_fx(traced)(*flat)
        return torch._inductor.standalone_compile(
            graph,
            flat,
            dynamic_shapes="from_example_inputs",
            options={"config_patches": {"cpp_wrapper": True}},  # C++ between the kernels too
        )
