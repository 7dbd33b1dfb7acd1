"""What a forward over a sequence keeps for its backward: buffers that are allocated once, with an entry per step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dnc_reference.interface import interface_sizes
from dnc_reference.types import MemoryState
from dnc_triton.kernels.layout import Layout, kept_shapes
from dnc_triton.sequence import pool
from dnc_triton.sequence.cells import CELLS, Cell
from dnc_triton.sequence.torch_memory import Kept

Pair = tuple[Tensor, Tensor]


class Settings(NamedTuple):
    """What does not change over a sequence.

    Attributes:
        controller: a key of `CELLS`.
        num_layers: of the controller.
        clip: bound on the controller's state and on the output, or None.
        max_activation_gradient: bound on each element of the gradient by a layer's hidden vector, or None.
        strength_offset: what raw strengths get on top of softplus: 1 for oneplus, 0 for softplus.
        stop_usage_gradient: as in `dnc_reference.memory_step`.
        product_dtype: of the products with weights: the parameters' or, under autocast, a narrower one.
        checkpoint: memory and link are kept every so many steps; 1 keeps all.
        compiled: whether the memory's step is made by PyTorch's compiler.
        layout: of the kernels; None for plain PyTorch.
    """

    controller: str
    num_layers: int
    clip: float | None
    max_activation_gradient: float | None
    strength_offset: float
    stop_usage_gradient: bool
    product_dtype: torch.dtype
    checkpoint: int
    compiled: bool
    layout: Layout | None

    @property
    def cell(self) -> type[Cell]:
        """What runs a layer of the controller."""
        if self.layout is None or self.controller != "lstm":
            return CELLS[self.controller]
        from dnc_triton.sequence.triton_cells import TritonLSTM  # Triton need not be there

        return TritonLSTM


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

    def trails(self) -> list[Tensor]:
        """The buffers that begin with what was before the sequence, in the order of `Carried.light`."""
        states = [trail for layer in self.layers for trail in layer]
        return [*self.carried, *states]

    def flatten(self) -> list[Tensor]:
        """As a list."""
        nested = [self.gates, *self.layers, *self.cells, [self.vectors], self.carried, self.memory]
        return [*(tensor for tensors in nested for tensor in tensors), self.memories, self.links]

    @classmethod
    def unflatten(cls, tensors: list[Tensor], settings: Settings) -> History:
        """The inverse."""
        remaining = iter(tensors)
        kind, layers = settings.cell, range(settings.num_layers)

        def take(count: int) -> list[Tensor]:
            return [next(remaining) for _ in range(count)]

        gates = take(settings.num_layers)
        states = [take(max(kind.states, 1)) for _ in layers]
        cells = [take(kind.count_kept(settings.clip)) for _ in layers]
        vectors, carried = next(remaining), take(5)
        *memory, memories, links = remaining
        return cls(gates, states, cells, vectors, carried, memory, memories, links)


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
        """All but memory and link."""
        _, usage, _, *others = self.memory
        return [usage, *others, self.words, *(tensor for layer in self.layers for tensor in layer)]

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
        spares = [(pool.empty_like(first[0]), pool.empty_like(first[1])) for _ in range(spare)]
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


def allocate(settings: Settings, state: Carried, steps: int, hidden_size: int) -> History:
    """Buffers for T steps from a state of these sizes. Nothing is filled in."""
    kind = settings.cell
    memory, link = state.memory.memory, state.memory.link
    batch, slots, word = memory.shape
    reads = state.words.shape[1]
    vector_size = sum(interface_sizes(reads, 1, word).values())
    count = Checkpoints.count(steps, settings.checkpoint)

    def over_steps(entries: int, *shape: int, dtype: torch.dtype = memory.dtype) -> Tensor:
        """[entries, *shape], each entry at a multiple of 16 bytes: kernels are compiled anew for what is not."""
        size = math.prod(shape)
        unit = max(1, 16 // dtype.itemsize)
        stride = -(-size // unit) * unit
        return pool.empty((entries, stride), memory, dtype)[:, :size].unflatten(1, shape)

    if settings.layout is None:
        kept = list(Kept.empty(memory, steps, batch, slots, word, reads))
    else:
        shapes = kept_shapes(batch, slots, reads)
        kept = [
            over_steps(steps, *shapes[0], dtype=torch.promote_types(memory.dtype, torch.float32)),
            over_steps(steps, *shapes[1], dtype=torch.int32),
        ]
    states = range(max(kind.states, 1))
    hidden = (batch, hidden_size)
    return History(
        gates=[over_steps(steps, batch, kind.gates_per_unit * hidden_size) for _ in state.layers],
        layers=[[over_steps(steps + 1, *hidden) for _ in states] for _ in state.layers],
        cells=[[over_steps(steps, *hidden) for _ in range(kind.count_kept(settings.clip))] for _ in state.layers],
        vectors=over_steps(steps, batch, vector_size),
        carried=[over_steps(steps + 1, *x.shape) for x in Carried(state.memory, state.words, []).light()],
        memory=kept,
        memories=over_steps(count, *memory.shape),
        links=over_steps(count, *link.shape),
    )
