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
        ahead: loads are moved ahead of the products that they are for, which takes shared memory; never so if whole.
    """

    fused: bool
    rows: int
    columns: int
    num_warps: int
    whole: bool = False
    ahead: bool = True

    def describe(self) -> str:
        """Of layouts of one kind, which."""
        return f"{self.rows}×{self.columns}, {self.num_warps} warps" + ("" if self.ahead else ", unpipelined")


def layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a memory of N slots of W numbers, the default one first.

    The order is from counted registers and instructions; none of it has been measured on a GPU. None spills on sm_90 up
    to N = 512, W = 64, whatever the dtype (float64 apart), nor at N = 2048, W = 32; wider tiles would, a few bytes in
    some kernel or other. (With Triton 3.6.0 some do, 8 bytes, on the way back through ended or reset rows.)
    """
    tall = 16 if word_size > 128 else 32
    split = [Layout(False, tall, 16, 8), Layout(False, 16, 32, 8), Layout(False, 16, 32, 4)]
    if memory_size <= 16:
        found = [Layout(True, 16, 16, 4 if word_size <= 32 else 8), Layout(False, 16, 16, 8)]
    elif memory_size <= 64:
        found = [Layout(True, tall, 16, 8), Layout(True, 16, 32, 8), split[0]]
    elif memory_size <= 128:
        found = [*split, Layout(True, 16, 16, 8)]
    else:
        found = split if memory_size <= 1024 else split[:2]
    # Where a link has no further columns there is no loop, and all of wide words would be loaded ahead: more than the
    # 99 KiB of shared memory that a block has on GPUs of capability 8.6, 8.9 and 12.0.
    found = [layout._replace(ahead=word_size <= 128 or memory_size > layout.columns) for layout in found]
    # Whether that pays is measured where there are loops to speak of; with fewer slots it would spill.
    return [*found, found[0]._replace(ahead=False)] if memory_size > 64 else found


def sequence_layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a whole sequence in one launch, the default one first.

    On sm_90 and in float32 none spills at the shapes on record.
    """
    # Of few rows: the pointers that live through the whole loop leave no registers for more.
    num_warps = 4 if memory_size <= 32 and word_size <= 32 else 8
    return [Layout(True, 16, 16, num_warps, whole=True)]


def default_layout(memory_size: int, word_size: int) -> Layout:
    """The layout that is taken where nothing was measured."""
    return layouts(memory_size, word_size)[0]


def kept_shapes(batch: int, slots: int, reads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a step keeps for its backward: `kept`, in the dtype of the arithmetic, and `free_list`, int32."""
    return (batch, (2 + 3 * reads) * slots), (batch, slots)
