"""What a forward over a sequence keeps for its backward: buffers that are allocated once, with an entry per step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.layout import compute_dtype, kept_shapes
from dnc_triton.sequence import pool
from dnc_triton.sequence.carried import Light
from dnc_triton.sequence.kept import Kept
from dnc_triton.sequence.parts import Parts
from dnc_triton.sequence.settings import SequenceSettings

Pair = tuple[Tensor, Tensor]


class History(NamedTuple):
    """The buffers, cut up. What is `carried`, and `layers`, have T+1 entries, the first from before the sequence.

    Attributes:
        gates: per layer [T, B, G].
        layers: per layer its state, [T+1, B, H] each, the hidden vector first.
        kept_by_cells: per layer what its cell keeps besides.
        vectors: [T, B, S], the raw interface vectors.
        carried: [T+1, B, ...] each.
        kept_by_memory: what the memory's part keeps besides.
        memories, links: [·, B, N, W] and [·, B, 1, N, N], those that are kept of the states between the steps:
            `Checkpoints.counts` of each.
        carried_rows: [T+1, ·], what `carried` and `layers` are cut from.
        kept_rows: [T, ·], what `kept_by_cells` and `kept_by_memory` are cut from, but for what is of another dtype.
    """

    gates: list[Tensor]
    layers: list[list[Tensor]]
    kept_by_cells: list[list[Tensor]]
    vectors: Tensor
    carried: Light
    kept_by_memory: list[Tensor]
    memories: Tensor
    links: Tensor
    carried_rows: Tensor
    kept_rows: Tensor

    def trails(self) -> list[Tensor]:
        """The parts with T+1 entries, in the order of `Carried.light`."""
        states = [trail for layer in self.layers for trail in layer]
        return [*self.carried, *states]


class Checkpoints:
    """Memory and link before every step and after the last one, of which every k-th is kept; the link less often.

    Forward, what is not kept alternates between two spare buffers. Backward with k > 1, the k steps between two that
    are kept are recomputed before the first of them is wanted, with a buffer for each memory and for every
    `settings.link_every`-th link, while the other links alternate between two. Backward with k = 1 nothing is
    recomputed, so a link that was not kept is None: `behind` says how many steps back the nearest kept one is.

    For example, 12 steps and kernels that are given every fourth link: with k = 1 all memories are kept, and the links
    before steps 4 and 8; for step 6 the backward is given the link before step 4, two behind. With k = 8 the memory and
    the link before step 8 are kept; the backward of steps 0 to 7 begins with the forward of 0 to 6, which leaves the
    memories before steps 1 to 7 and the link before step 4.

    Args:
        settings: of the sequence; k is its checkpoint.
        first, last: memory and link before the sequence and after it.
        memories, links: the buffers for those that are kept, of `counts`.
        steps: T.
        forwards: whether it is for the forward.
    """

    def __init__(
        self,
        settings: SequenceSettings,
        first: Pair,
        last: Pair,
        memories: Tensor,
        links: Tensor,
        steps: int,
        *,
        forwards: bool,
    ) -> None:
        self.settings, every = settings, settings.checkpoint
        memory, link = zip(first, last, strict=True)
        in_turn = forwards or every > 1  # a backward with k = 1 makes nothing again that could take turns
        of_memory, of_link = (None, None) if forwards else (1, settings.link_every)
        self._memories = _trail(*memory, memories, steps, every, of_memory, in_turn)
        self._links = _trail(*link, links, steps, settings.link_period, of_link, in_turn)

    @staticmethod
    def counts(settings: SequenceSettings, steps: int) -> tuple[int, int]:
        """How many memories and links are kept between the first and the last."""
        return (steps - 1) // settings.checkpoint, (steps - 1) // settings.link_period

    def __getitem__(self, step: int) -> Pair:
        return self._memories[step], self._links[step]

    def behind(self, step: int) -> int:
        """By how many steps the link that a backward is given lies behind the step."""
        return step % self.settings.link_period % self.settings.link_every


def _trail(
    first: Tensor, last: Tensor, kept: Tensor, steps: int, period: int, within: int | None, in_turn: bool
) -> list[Any]:
    """Where a quantity is before each step and after the last one.

    Args:
        first, last: what it is before the sequence and after it.
        kept: [·, *first.shape], for every `period`-th.
        steps: T.
        period: steps between entries of `kept`.
        within: of those in between every `within`-th has a buffer of its own; None for none.
        in_turn: whether the others alternate between two buffers; else they are None.
    """
    between = min(period, steps) - 1
    own = [pool.empty_like(first) for _ in range(between // within if within else 0)]
    turns = [pool.empty_like(first) for _ in range(min(between - len(own), 2))] if in_turn else [None]
    trail: list[Any] = [first]
    for step in range(1, steps):
        index, offset = divmod(step, period)
        if offset == 0:
            trail.append(kept[index - 1])
        elif within and offset % within == 0:
            trail.append(own[offset // within - 1])
        else:
            trail.append(turns[step % len(turns)])
    return [*trail, last]


class Plan:
    """How the history of a sequence lies in a few buffers: each result of an operator costs time, however small.

    Args:
        settings: see there.
        memory: of the sizes of any state's, [B, N, W].
        reads: R.
        hidden_size: H.
    """

    def __init__(self, settings: SequenceSettings, memory: Tensor, reads: int, hidden_size: int) -> None:
        kind, layers = settings.cell, settings.num_layers
        self.settings, self.num_layers, self.memory, self.reads = settings, layers, memory, reads
        self.states_per_layer, self.kept_per_layer = max(kind.states, 1), kind.count_kept(settings.clip)
        batch, slots, word = memory.shape
        dtype, hidden, row, heads = memory.dtype, (batch, hidden_size), (batch, slots), (batch, reads, slots)
        kept: list[tuple[int, ...]] = []
        if settings.layout is None:
            *kept, free_list = Kept.shapes(batch, slots, word, reads)
            others = [Parts(torch.int64, free_list)]
        else:
            work, free_list = kept_shapes(batch, slots, reads)
            others = [Parts(compute_dtype(dtype), work), Parts(torch.int32, free_list)]
        carried = [row, (batch, 1, slots), heads, (batch, 1, slots), (batch, reads, word)]  # as `Light` has them
        self.carried = Parts(dtype, *carried, *[hidden] * (layers * self.states_per_layer))
        self.kept = Parts(dtype, *[hidden] * (layers * self.kept_per_layer), *kept)
        gates = Parts(dtype, (batch, kind.gates_per_unit * hidden_size))
        vectors = Parts(dtype, (batch, sum(interface_sizes(reads, 1, word).values())))
        self.by_step, self.others = [*[gates] * layers, vectors, self.kept], others
        self.by_checkpoint = [Parts(dtype, memory.shape), Parts(dtype, (batch, 1, slots, slots))]

    def allocate(self, steps: int) -> list[Tensor]:
        """The buffers for T steps. Nothing is filled in."""
        made_again = self.settings.layout is not None and self.settings.checkpoint > 1
        rows = [(self.carried, steps + 1), *((parts, steps) for parts in self.by_step)]
        rows += [(parts, 0 if made_again else steps) for parts in self.others]
        rows += zip(self.by_checkpoint, Checkpoints.counts(self.settings, steps), strict=True)
        return [parts.allocate(entries, self.memory) for parts, entries in rows]

    def work_space(self, steps: int) -> list[Tensor]:
        """What the kernels keep of a number of steps, where that is no part of the history."""
        return [tensor for parts in self.others for tensor in parts.cut(parts.allocate(steps, self.memory))]

    def cut(self, buffers: list[Tensor]) -> History:
        """Such buffers as a history."""
        carried_rows, *by_entry = buffers
        each = zip([*self.by_step, *self.others, *self.by_checkpoint], by_entry, strict=True)
        parts = [parts.cut(buffer) for parts, buffer in each]
        gates, (vectors, kept, *others, memories, links) = parts[: self.num_layers], parts[self.num_layers :]
        carried = self.carried.cut(carried_rows)
        light = len(Light._fields)
        kept_by_cells, kept_by_memory = self.split(kept)
        return History(
            gates=[tensor for (tensor,) in gates],
            layers=self._per_layer(carried[light:], self.states_per_layer),
            kept_by_cells=kept_by_cells,
            vectors=vectors[0],
            carried=Light(*carried[:light]),
            kept_by_memory=[*kept_by_memory, *(tensor for (tensor,) in others)],
            memories=memories[0],
            links=links[0],
            carried_rows=carried_rows,
            kept_rows=by_entry[self.by_step.index(self.kept)],
        )

    def split(self, kept: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The parts of `kept`: what the cell of each layer keeps, and what the memory's part does."""
        count = self.num_layers * self.kept_per_layer
        return self._per_layer(kept[:count], self.kept_per_layer), kept[count:]

    def _per_layer(self, tensors: list[Tensor], count: int) -> list[list[Tensor]]:
        return [tensors[layer * count : (layer + 1) * count] for layer in range(self.num_layers)]
