"""Where the buffers of a batch element lie: tuples of pointers, which the kernels' functions take and pass on.

Every buffer is contiguous. The pointers of the memory's state, or of its gradient, are a `MemoryState`; those of an
interface vector, or of its gradient, an `Interface`; both with K = 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from dnc_reference.types import Interface, MemoryState

# How a step of a sequence may mark a batch element: it begins from zeros; it has ended, and its memory and link stay;
# its next step begins from zeros. There are no marks with neither `lengths` nor `reset`.
FRESH, ENDED, LOST = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
# What may be one entry for all elements, as zeros may: memory and link of the state before; both in the gradient.
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
    """How many steps the given link lies behind the state before a step, and where what has updated it since lies."""

    steps: tl.tensor  # how many
    row: tl.tensor  # from an entry of precedence or write weights to that of the next step, in units of 16 bytes
    mark: tl.tensor  # the element's mark at the step, where there are marks
    marks_row: tl.tensor  # bytes from there to its mark at the next step


class ForwardScratch(NamedTuple):
    """The partial sums that the tiles of the link leave for the last phase to add up.

    `usage` lies in the same place: the launch that ranks is over before the tiles begin.
    """

    forward: tl.tensor  # [COLUMN_BLOCKS, R, N], forward weights, for each tile's rows
    backward: tl.tensor  # [ROW_BLOCKS, R, N], backward weights, for each tile's columns
    usage: tl.tensor  # [⌈N / RANKED⌉, N], where slots are ranked: a copy for each program


class BackwardScratch(NamedTuple):
    """Gradients that the backward's phases hand on; in parts where several tiles, or blocks of slots, add to them."""

    d_forward: tl.tensor  # [R, N], of the forward weights
    d_backward: tl.tensor  # [R, N], of the backward weights
    d_similarity: tl.tensor  # [R, N], of the similarities to the read keys
    d_allocation: tl.tensor  # [R, N], work space: a row for each head's program
    d_write_rows: tl.tensor  # [COLUMN_BLOCKS, N], of the write weights; and one last part, from writing
    d_read_rows: tl.tensor  # [COLUMN_BLOCKS, R, N], of the read weights before
    d_write_columns: tl.tensor  # [ROW_BLOCKS, N], of the write weights
    d_precedence: tl.tensor  # [ROW_BLOCKS, N], of the precedence before
    d_read_columns: tl.tensor  # [ROW_BLOCKS, R, N], of the read weights before
    d_vectors: tl.tensor  # [SLOT_BLOCKS, R + 2, W], of the read keys, the erase vector and the write vector


@triton.jit
def interface_at(ptr, entry, sizes: tl.constexpr):
    """The fields of interface vector `entry` of a buffer; `entry` means the same in all functions below."""
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
    """The fields of entry `entry` of a state; memory or link of entry 0, where shared."""
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
    """The state, but zeros for every field if `zero`, and for all but memory and link if `but_large`."""
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
