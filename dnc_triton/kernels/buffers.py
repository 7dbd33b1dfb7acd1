"""Where the buffers of a batch element lie: tuples of pointers, which the functions of the kernels take and hand on.

Every buffer is contiguous. Those of the memory, or of the gradient by it, are a `MemoryState`; those of an interface
vector, or of the gradient by it, an `Interface`; both with K = 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from dnc_reference.types import Interface, MemoryState

# What a step of a sequence may mark a batch element with: it begins from zeros; it has ended, and its memory and link
# stay; the next step begins from zeros. A step whose elements all run on has no marks.
FRESH, ENDED, LOST = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
# What of memory and link is shared by all batch elements, as zeros may be: of the state before, of the gradient after.
MEMORY, LINK, GRADIENT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


class Kept(NamedTuple):
    """What a step leaves for its backward."""

    allocation: tl.tensor  # [N]
    write_similarity: tl.tensor  # [N], of the write key
    read_similarity: tl.tensor  # [R, N], of the read keys
    forward: tl.tensor  # [R, N], forward weights
    backward: tl.tensor  # [R, N], backward weights
    norms: tl.tensor  # [N], of the words before the step
    free_list: tl.tensor  # [N]


class Behind(NamedTuple):
    """How far the link that is given lies behind the state before a step, and where what it was updated with stands."""

    steps: tl.tensor  # so many
    row: tl.tensor  # from an entry of precedence or write weights to that of the next step, in units of 16 bytes
    mark: tl.tensor  # the element's at the step, where there are marks
    marks_row: tl.tensor  # bytes from there to that at the next step


class ForwardScratch(NamedTuple):
    """What the tiles of the link leave for the last phase, which adds it up.

    `usage` lies in the same place: the launch that ranks is over before the tiles begin.
    """

    forward: tl.tensor  # [COLUMN_BLOCKS, R, N], forward weights, of a tile's rows
    backward: tl.tensor  # [ROW_BLOCKS, R, N], backward weights, of a tile's columns
    usage: tl.tensor  # [⌈N / RANKED⌉, N], where slots are ranked, of each program its own


class BackwardScratch(NamedTuple):
    """What the phases of the backward hand on; sums by what the tiles, or the blocks of slots, leave."""

    d_forward: tl.tensor  # [R, N], by the forward weights
    d_backward: tl.tensor  # [R, N], by the backward weights
    d_similarity: tl.tensor  # [R, N], by the similarities of the read keys
    d_allocation: tl.tensor  # [R, N], work space, of each head's program its own
    d_write_rows: tl.tensor  # [COLUMN_BLOCKS, N], by the write weights; and a last part from writing
    d_read_rows: tl.tensor  # [COLUMN_BLOCKS, R, N], by the read weights before
    d_write_columns: tl.tensor  # [ROW_BLOCKS, N], by the write weights
    d_precedence: tl.tensor  # [ROW_BLOCKS, N], by the precedence before
    d_read_columns: tl.tensor  # [ROW_BLOCKS, R, N], by the read weights before
    d_vectors: tl.tensor  # [SLOT_BLOCKS, R + 2, W], by the read keys, the erase vector and the write vector


@triton.jit
def interface_at(ptr, entry, sizes: tl.constexpr):
    """The fields of an interface vector, of `entry` in a buffer of many; so in all of the following."""
    ptr += entry * sizes.INTERFACE
    return Interface(
        ptr + sizes.OFFSETS.read_keys,
        ptr + sizes.OFFSETS.read_strengths,
        ptr + sizes.OFFSETS.write_keys,
        ptr + sizes.OFFSETS.write_strengths,
        ptr + sizes.OFFSETS.erase_vectors,
        ptr + sizes.OFFSETS.write_vectors,
        ptr + sizes.OFFSETS.free_gates,
        ptr + sizes.OFFSETS.allocation_gates,
        ptr + sizes.OFFSETS.write_gates,
        ptr + sizes.OFFSETS.read_modes,
    )


@triton.jit
def state_at(state, entry, sizes: tl.constexpr, memory_shared=False, link_shared=False):
    """With memory or link of the first entry, where these are shared."""
    return MemoryState(
        state.memory + tl.where(memory_shared, 0, entry) * sizes.N * sizes.W,
        state.usage + entry * sizes.N,
        state.link + tl.where(link_shared, 0, entry) * sizes.N * sizes.N,
        state.precedence + entry * sizes.N,
        state.read_weights + entry * sizes.R * sizes.N,
        state.write_weights + entry * sizes.N,
    )


@triton.jit
def zeros_or_state(zero, zeros_ptr, state, but_large=False):
    """Zeros, which stand for every field, or for all but memory and link, or a state."""
    small = zero | but_large
    return MemoryState(
        tl.where(zero, zeros_ptr, state.memory),
        tl.where(small, zeros_ptr, state.usage),
        tl.where(zero, zeros_ptr, state.link),
        tl.where(small, zeros_ptr, state.precedence),
        tl.where(small, zeros_ptr, state.read_weights),
        tl.where(small, zeros_ptr, state.write_weights),
    )


@triton.jit
def kept_at(ptr, free_list_ptr, entry, sizes: tl.constexpr):
    ptr += entry * (3 + 3 * sizes.R) * sizes.N
    return Kept(
        ptr,
        ptr + sizes.N,
        ptr + 2 * sizes.N,
        ptr + (2 + sizes.R) * sizes.N,
        ptr + (2 + 2 * sizes.R) * sizes.N,
        ptr + (2 + 3 * sizes.R) * sizes.N,
        free_list_ptr + entry * sizes.N,
    )


@triton.jit
def forward_scratch_at(ptr, entry, sizes: tl.constexpr):
    ptr += entry * sizes.FORWARD_SCRATCH
    return ForwardScratch(ptr, ptr + sizes.COLUMN_BLOCKS * sizes.R * sizes.N, ptr)


@triton.jit
def backward_scratch_at(ptr, entry, sizes: tl.constexpr):
    HEADS: tl.constexpr = sizes.R * sizes.N  # numbers of all
    d_forward = ptr + entry * sizes.BACKWARD_SCRATCH
    d_backward = d_forward + HEADS
    d_similarity = d_backward + HEADS
    d_allocation = d_similarity + HEADS
    d_write_rows = d_allocation + HEADS
    d_read_rows = d_write_rows + (sizes.COLUMN_BLOCKS + 1) * sizes.N
    d_write_columns = d_read_rows + sizes.COLUMN_BLOCKS * HEADS
    d_precedence = d_write_columns + sizes.ROW_BLOCKS * sizes.N
    d_read_columns = d_precedence + sizes.ROW_BLOCKS * sizes.N
    return BackwardScratch(
        d_forward,
        d_backward,
        d_similarity,
        d_allocation,
        d_write_rows,
        d_read_rows,
        d_write_columns,
        d_precedence,
        d_read_columns,
        d_read_columns + sizes.ROW_BLOCKS * HEADS,
    )
