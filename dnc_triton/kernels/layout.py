"""How the kernels of a step are cut up, what they take and keep. Without Triton: it is asked before any is compiled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Slots up to which there are layouts of one launch; up to which the kernels go; and in float64, where a slot has fewer
# bits of what is sorted (`addressing.sort_key`).
MOST_IN_ONE_LAUNCH, MOST_SLOTS, MOST_SLOTS_IN_FLOAT64 = 128, 2048, 1024
LINK_EVERY = 4  # with three launches; chosen for the memory: 1 and 8 took the same time on an H200


class Layout(NamedTuple):
    """How a step is cut up.

    Attributes:
        fused: all phases in one launch; else one launch each.
        rows, columns: of a tile of the link; powers of two.
        num_warps: per program; of three launches of the middle one.
        whole_sequence: all steps in one launch, the controller's too; else a step at a time. Only if fused.
        backward_rows: of the backward's tiles, where they are not as many; else 0.
        overlaps: a launch begins while the one before it ends, where the device can (`launcher.overlapping`).
        spread: the phases that read have a program for each read head. Only if not fused.
        ranks: the slots are ranked in a launch of its own, before the others, by many programs, instead of sorted by
            one. Only if not fused.
    """

    fused: bool
    rows: int
    columns: int
    num_warps: int
    whole_sequence: bool = False
    backward_rows: int = 0
    overlaps: bool = False
    spread: bool = False
    ranks: bool = False

    @property
    def of_backward(self) -> Layout:
        """How the backward is cut up, as if that were all there is."""
        return self._replace(rows=self.backward_rows or self.rows, backward_rows=0)

    @property
    def link_every(self) -> int:
        """Every how many steps a sequence keeps the link; in between the backward makes its tiles again, in registers.

        To write a large link costs memory and time. A small one is not worth an update more.
        """
        return 1 if self.fused else LINK_EVERY

    def as_operand(self) -> list[int]:
        """As an operator takes it."""
        return [int(value) for value in self]

    @classmethod
    def from_operand(cls, values: list[int]) -> Layout:
        """The inverse."""
        fused, rows, columns, num_warps, whole_sequence, backward_rows, *others = values
        return cls(bool(fused), rows, columns, num_warps, bool(whole_sequence), backward_rows, *map(bool, others))

    def describe(self) -> str:
        """Of layouts of one kind, which."""
        tiles = " and ".join(f"{rows}×{self.columns}" for rows in (self.rows, self.backward_rows) if rows)
        warps = f"{self.num_warps} warp{'s' if self.num_warps > 1 else ''}"
        return ", ".join([tiles, warps, *(name for name in ("spread", "ranks") if getattr(self, name))])


def layouts(memory_size: int, *, hip: bool = torch.version.hip is not None) -> list[Layout]:
    """The layouts worth measuring for a memory of N slots, the default one first; `hip` for one of AMD's GPUs.

    The order and the choice are from times on an H200, at B = 16 and 64: in three launches one warp, which needs no
    shared memory, was the fastest, and which rows depends on B: the more there are the fewer parts are left to be added
    up in the last launch, and the fewer programs. One launch was faster than three at N = 16 and slower at N = 128;
    where it was tried, it gained nothing by overlapping at N = 64, and a tenth at N = 16. Above 1024 slots
    64 rows were faster than 32 at B = 8; 128 were not tried. What is spread was not measured yet: the phases around the
    link took 89 of 313 µs at B = 8, N = 2048, in a few programs for an element.
    """
    block = _block(memory_size)
    split = Layout(False, 16, min(block, 128), 1, overlaps=True)
    if memory_size > 256:
        rows = 32 if memory_size <= 1024 else 64
        wide = [split._replace(rows=count) for count in (rows, 2 * rows, rows // 2)]
        spread = [layout._replace(spread=True, ranks=True) for layout in wide[:2]]
        # A program for all heads would take 64 KB of shared memory there, which is all, and 128 for many in 16 bits.
        return spread if hip and memory_size > 1024 else [*wide, *spread]
    if memory_size > 64:
        one = memory_size <= MOST_IN_ONE_LAUNCH
        others = [Layout(True, 16, block, 8)] if one else [split._replace(spread=True)]
        return [split, split._replace(backward_rows=32), split._replace(rows=8), *others]
    warps = (4, 1) if memory_size <= 16 else (4, 8)
    return [*(Layout(True, block, block, num_warps) for num_warps in warps), split._replace(rows=8)]


def sequence_layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a whole sequence in one launch, the default one first."""
    block = _block(memory_size)
    rows = min(block, 32)  # with more or fewer its backward spills more at N = 128
    return [Layout(True, rows, block, 4 if memory_size <= 32 and word_size <= 32 else 8, whole_sequence=True)]


def _block(memory_size: int) -> int:
    """The side of a tile that is all of the link."""
    return max(16, 1 << (memory_size - 1).bit_length())


def default_layout(memory_size: int) -> Layout:
    """The layout that a step's kernels take where nothing was measured."""
    return layouts(memory_size)[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the arithmetic, for tensors of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor [B, ...] has one entry that stands for all batch elements, expanded."""
    return tensor.stride(0) == 0 and tensor.shape[0] > 1


def kept_shapes(batch: int, slots: int, reads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a step keeps for its backward: `kept`, in the dtype of the arithmetic, and `free_list`, int32."""
    return (batch, (3 + 3 * reads) * slots), (batch, slots)
