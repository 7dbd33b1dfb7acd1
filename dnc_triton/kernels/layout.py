"""How the kernels of a step are cut up, and what they keep. Without Triton: it is asked before anything is compiled."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """How a step is cut up.

    Attributes:
        fused: all phases in one launch; else one launch each.
        rows, columns: of a tile of the link; powers of two.
        num_warps: per program; of three launches of the middle one.
        whole: all steps of a sequence in one launch, the controller's too; else a step at a time. Only if fused.
    """

    fused: bool
    rows: int
    columns: int
    num_warps: int
    whole: bool = False

    def describe(self) -> str:
        """Of layouts of one kind, which."""
        return f"{self.rows}×{self.columns}, {self.num_warps} warp{'s' if self.num_warps > 1 else ''}"


def layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a memory of N slots of W numbers, the default one first."""
    block = max(16, 1 << (memory_size - 1).bit_length())
    columns = min(block, 128)
    split = [Layout(False, 8, columns, 1), Layout(False, 16, columns, 1)]
    if memory_size > 128:
        return [*split, Layout(False, 8, 256, 1)]
    warps = (1, 4) if memory_size <= 16 else (4, 2) if memory_size <= 64 else (8, 4)
    fused = [Layout(True, block, block, num_warps) for num_warps in warps]
    return [*fused, split[0]] if memory_size <= 64 else [*split, *fused]


def sequence_layouts(memory_size: int, word_size: int) -> list[Layout]:
    """The layouts worth measuring for a whole sequence in one launch, the default one first."""
    block = max(16, 1 << (memory_size - 1).bit_length())
    num_warps = 4 if memory_size <= 32 and word_size <= 32 else 8
    return [Layout(True, block, block, num_warps, whole=True)]


def default_layout(memory_size: int, word_size: int) -> Layout:
    """The layout that is taken where nothing was measured."""
    return layouts(memory_size, word_size)[0]


def kept_shapes(batch: int, slots: int, reads: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a step keeps for its backward: `kept`, in the dtype of the arithmetic, and `free_list`, int32."""
    return (batch, (3 + 3 * reads) * slots), (batch, slots)
