"""The memory's part of a sequence by the kernels: the counterpart of `TorchMemory`, with the same methods.

The kernels themselves see to rows that a step resets, and to those that have ended: they are given the memory before a
step as the step before left it, and likewise the gradient of the memory after it as the next step left it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_reference.types import MemoryState
from dnc_triton.kernels.buffers import ENDED, FRESH, LOST
from dnc_triton.kernels.layout import Layout, is_shared
from dnc_triton.kernels.step_launch import (
    StepGradient,
    StepResult,
    backward_scratch,
    count_zeros,
    forward_scratch,
    launch_backward,
    launch_forward,
)


class TritonMemory:
    """Steps forward and backward over one stretch of a sequence.

    Args:
        vectors: [T, B, S], the raw interface vectors, each filled in before its step.
        kept: `kept` and `free_list` of `layout.kept_shapes`, with T in front; or fewer, in which steps take turns.
        memory: any state's memory, [B, N, W].
        running, reset: [T, B] bool, or None: the rows that have not ended, and those that a step resets.
        reads: R.
        strength_offset: what is added to the softplus of raw strengths: 1 for oneplus, 0 for softplus.
        stop_usage_gradient: as in `dnc_reference.memory_step`.
        layout: of the kernels.
        behind: step → by how many steps the link that its backward is given lies behind.
        row: numbers from an entry of precedence or write weights to that of the next step.
    """

    def __init__(
        self,
        vectors: Tensor,
        kept: list[Tensor],
        memory: Tensor,
        running: Tensor | None = None,
        reset: Tensor | None = None,
        *,
        reads: int,
        strength_offset: float,
        stop_usage_gradient: bool,
        layout: Layout,
        behind: Callable[[int], int] = lambda step: 0,
        row: int = 0,
    ) -> None:
        self.vectors, self.reads, self.layout = vectors.unbind(0), reads, layout
        self.strength_offset, self.stop_usage_gradient = strength_offset, stop_usage_gradient
        self.kept, self.free_list = (tensor.unbind(0) for tensor in kept)
        self.behind, self.row = behind, row
        self.like, self.ends = memory, running is not None
        self.marks = _marks(running, reset)
        self.zeros = None
        if self.marks is not None:
            _, slots, word = memory.shape
            self.zeros = memory.new_zeros(count_zeros(slots, word, reads))
        self.aside: tuple[MemoryState, Tensor] | None = None  # for what is recomputed and not used

    def begin_forward(self) -> None:
        """Before the first step: nothing."""

    def forward(self, step: int, prev: MemoryState, new: MemoryState, read_words: Tensor, *, fresh: bool) -> None:
        """As in `TorchMemory`; `fresh` does not matter."""
        self._launch(step, prev, new, read_words)

    def replay(self, step: int, prev: MemoryState, new: MemoryState | None) -> None:
        """Run the step once more, to the same bits, for what it keeps and, if `new` is given, for its memory and link.

        Nothing else that the forward left is written to.
        """
        if self.aside is None:
            batch, _, word = self.like.shape
            fields = MemoryState(*(self.like.new_empty(x.shape) for x in prev))
            self.aside = fields, self.like.new_empty(batch, self.reads, word)
        fields, words = self.aside
        if new is not None:
            fields = fields._replace(memory=new.memory, link=new.link)
        self._launch(step, prev, fields, words)

    def begin_backward(self, usage: Tensor, read_weights: Tensor, write_weights: Tensor, d_vectors: Tensor) -> None:
        """As in `TorchMemory`; only `d_vectors` matters."""
        self.d_vectors = d_vectors.unbind(0)
        self.spare: MemoryState | None = None

    def backward(
        self, step: int, prev: MemoryState, new: MemoryState, d_read_words: Tensor, d: MemoryState
    ) -> MemoryState:
        """As in `TorchMemory`. What is given and what is returned alternate between two sets of buffers.

        For a row that has ended neither is written to, so both begin as copies of the gradient of its last state. What
        is shared, one entry for all rows, cannot be written to and is not reused.
        """
        if self.spare is None:
            empty = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in d)
            self.spare = MemoryState(*(x.clone() for x in d) if self.ends else empty)
        spare = self.spare
        launch_backward(
            self.vectors[step],
            tuple(prev),
            (new.memory, new.usage, new.read_weights, new.write_weights, *self._kept(step)),
            (d_read_words, *d),
            StepGradient(self.d_vectors[step], *spare),
            self._backward_scratch,
            raw=True,
            strength_offset=self.strength_offset,
            stop_usage_gradient=self.stop_usage_gradient,
            layout=self.layout,
            marks=None if self.marks is None else self.marks[step],
            zeros=self.zeros,
            behind=self.behind(step),
            row=self.row,
        )
        self.spare = None if is_shared(d.memory) else d
        return spare

    def _kept(self, step: int) -> tuple[Tensor, Tensor]:
        turn = step % len(self.kept)
        return self.kept[turn], self.free_list[turn]

    # Work space, made on demand: steps that are recomputed are launched between those back, and may take more.

    @cached_property
    def _forward_scratch(self) -> Tensor:
        return forward_scratch(self.like, self.reads, self.layout)

    @cached_property
    def _backward_scratch(self) -> Tensor:
        return backward_scratch(self.like, self.reads, self.layout)

    def _launch(self, step: int, prev: MemoryState, new: MemoryState, read_words: Tensor) -> None:
        launch_forward(
            self.vectors[step],
            tuple(prev),
            StepResult(read_words, *new, *self._kept(step)),
            self._forward_scratch,
            raw=True,
            strength_offset=self.strength_offset,
            layout=self.layout,
            marks=None if self.marks is None else self.marks[step],
            zeros=self.zeros,
        )


def _marks(running: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """What the kernels are told of the rows at each step: [T, B], B rounded up to 16, uint8; or None.

    So each step's marks begin at a multiple of 16 bytes: for others kernels would be compiled anew.
    """
    marks = None
    if running is not None:
        marks = ~running * ENDED.value
    if reset is not None:
        lost = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        resets = reset * FRESH.value + lost * LOST.value
        marks = resets if marks is None else marks + resets
    return None if marks is None else F.pad(marks.to(torch.uint8), (0, -marks.shape[1] % 16)).contiguous()
