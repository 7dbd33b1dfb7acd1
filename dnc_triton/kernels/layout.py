"""How the kernels of a step are cut up, and what they keep. Without Triton: it is asked before anything is compiled."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """How a step is cut up.

    Attributes:
        fused: all phases in one launch; else one launch each.
        rows: slots in a row block; a power of two, at least 16.
        columns: columns of the link taken at once; a power of two, at least 16.
        num_warps: per program.
        whole: all steps of a sequence in one launch, the controller's too; else a step at a time. Only if fused.
    """

    fused: bool
    rows: int
    columns: int
    num_warps: int
    whole: bool = False


def layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a memory of N slots of W numbers, the default one first.

    The order is from counted registers and instructions; none of it has been measured on a GPU. The default ones do not
    spill on sm_90 up to N = 512, W = 64.
    """
    rows = 16 if memory_size <= 16 or word_size > 128 else 32
    if memory_size <= 32:
        fused = [Layout(True, rows, rows, num_warps) for num_warps in (4, 8)]
    else:
        fused = [Layout(True, rows, 16, 8), Layout(True, rows, 32, 8)]
    split = [Layout(False, rows, columns, num_warps) for columns in (32, 64) for num_warps in (8, 4)]
    if memory_size <= 64:
        return fused + split[:1]
    return split + fused[:1] if memory_size <= 128 else split


def sequence_layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a whole sequence in one launch, the default one first."""
    # Of few rows: the pointers that live through the whole loop leave no registers for more. At N = 128 all spill.
    if memory_size <= 32:
        tiles = [(16, 16, 4), (16, 16, 8)]
    else:
        tiles = [(16, 16, 8), (16, 32, 8), (16, 16, 4) if memory_size <= 64 else (32, 16, 8)]
    return [Layout(True, rows, columns, num_warps, whole=True) for rows, columns, num_warps in tiles]


def default_layout(memory_size: int, word_size: int) -> Layout:
    """The layout that is taken where nothing was measured."""
    return layouts(memory_size, word_size)[0]


def kept_shapes(batch: int, slots: int, reads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a step keeps for its backward: `kept`, in the dtype of the arithmetic, and `free_list`, int32."""
    return (batch, (2 + 3 * reads) * slots), (batch, slots)
