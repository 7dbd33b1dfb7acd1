"""How a step's kernels are cut up, what they take and keep. Needs no Triton: it is used before any kernel compiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The most slots for which there are layouts in one launch; that the kernels take; and that they take in float64, where
# the sort key has fewer bits for the slot (`addressing.sort_key`).
MOST_IN_ONE_LAUNCH, MOST_SLOTS, MOST_SLOTS_IN_FLOAT64 = 128, 2048, 1024
LINK_EVERY = 4  # in three launches; chosen for memory use: 1 and 8 took the same time on an H200


class Layout(NamedTuple):
    """How a step is cut up.

    Attributes:
        fused: all phases in one launch; else one launch each.
        rows, columns: of a tile of the link; powers of two.
        num_warps: per program; with three launches, in the middle one.
        whole_sequence: all steps in one launch, controller included; else a step at a time. Only if fused.
        backward_rows: of the backward's tiles, if it differs from `rows`; else 0.
        overlaps: a launch begins while the one before it ends, where the device can (`launcher.overlapping`).
        spread: the phase that reads, and its adjoint, have a program for each read head. Only if not fused.
        ranks: many programs rank the slots in a launch of its own, before the others, instead of one sorting them.
            Only if not fused.
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
        """The backward's layout by itself: its rows are `rows`."""
        return self._replace(rows=self.backward_rows or self.rows, backward_rows=0)

    @property
    def link_every(self) -> int:
        """Steps between the links that a sequence keeps; the backward recomputes tiles of the others, in registers.

        Writing a large link costs memory and time. Saving a small one is not worth the extra updates.
        """
        return 1 if self.fused else LINK_EVERY

    def as_operand(self) -> list[int]:
        """As the integers that an operator takes."""
        return [int(value) for value in self]

    @classmethod
    def from_operand(cls, values: list[int]) -> Layout:
        """The inverse."""
        fused, rows, columns, num_warps, whole_sequence, backward_rows, *others = values
        return cls(bool(fused), rows, columns, num_warps, bool(whole_sequence), backward_rows, *map(bool, others))

    def describe(self) -> str:
        """What tells it from other layouts of its kind."""
        tiles = " and ".join(f"{rows}×{self.columns}" for rows in (self.rows, self.backward_rows) if rows)
        warps = f"{self.num_warps} warp{'s' if self.num_warps > 1 else ''}"
        return ", ".join([tiles, warps, *(name for name in ("spread", "ranks") if getattr(self, name))])


def layouts(memory_size: int, *, hip: bool = torch.version.hip is not None) -> list[Layout]:
    """The layouts worth measuring for a memory of N slots, the default one first; `hip` for one of AMD's GPUs.

    Choice and order come from times on an H200, at B = 16 and 64. In three launches one warp, which needs no shared
    memory, was the fastest; how many rows were the best depends on B: more rows leave fewer partial sums for the last
    launch to add up, but make fewer programs. One launch was faster than three at N = 16 and slower at N = 128;
    overlapping gained it a tenth at N = 16, and lost as much at N = 64. Above 1024 slots 64 rows were faster than 32 at
    B = 8; 128 were not tried. Spread layouts have not been measured yet: the phases around the link took 89 of 313 µs
    at B = 8, N = 2048, in a few programs per element.
    """
    block = _block(memory_size)
    split = Layout(False, 16, min(block, 128), 1, overlaps=True)
    if memory_size > 256:
        rows = 32 if memory_size <= 1024 else 64
        wide = [split._replace(rows=count) for count in (rows, 2 * rows, rows // 2)]
        spread = [layout._replace(spread=True, ranks=True) for layout in wide[:2]]
        # There a program for all heads would take 64 KB of shared memory, all there is; 128 for many heads in 16 bits.
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
    """The side of a tile that covers the whole link."""
    return max(16, 1 << (memory_size - 1).bit_length())


def default_layout(memory_size: int) -> Layout:
    """The layout that a step's kernels take where nothing was measured."""
    return layouts(memory_size)[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, for tensors of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor [B, ...] is one entry, expanded to stand for all batch elements."""
    return tensor.stride(0) == 0 and tensor.shape[0] > 1


def kept_shapes(batch: int, slots: int, reads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of what a step keeps for its backward: `kept`, in the dtype of the arithmetic, and `free_list`, int32."""
    return (batch, (3 + 3 * reads) * slots), (batch, slots)
