"""The memory step as kernels: three phases forward and three backward, in one launch each way or in one per phase.

In one launch a program does a whole step for its batch element, phase after phase; the phases hand over through buffers
that stay in the cache. In three launches the middle phase, which reads and writes the link, has a program per block of
rows. Which one is faster depends on N and B.

K = 1. All tensors are contiguous, of one dtype, on one device; what is kept for the backward is in the dtype of the
arithmetic, float32 unless the tensors are float64.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.addressing import address, address_backward
from dnc_triton.kernels.linking import write_and_link, write_and_link_backward
from dnc_triton.kernels.reading import read, read_backward

# The phases of a direction, and all of them in one launch.
FIRST, MIDDLE, LAST, WHOLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

# What a step of a sequence may mark a batch element with: it begins from zeros; it has ended, and its memory and link
# stay; the next step begins from zeros. A step whose elements all run on has no marks.
FRESH, ENDED, LOST = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def step_forward_kernel(
    interface_ptr,
    memory_ptr,
    usage_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    write_weights_ptr,
    read_words_ptr,
    new_memory_ptr,
    new_usage_ptr,
    new_link_ptr,
    new_precedence_ptr,
    new_read_weights_ptr,
    new_write_weights_ptr,
    kept_ptr,
    free_list_ptr,
    scratch_ptr,
    marks_ptr,
    zeros_ptr,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Grid: (B,), or (B, row blocks) for the middle phase alone.

    With marks [B] come zeros, as many as the largest field of a state has numbers for a batch element.
    """
    INTERFACE: tl.constexpr = R * W + 3 * W + 5 * R + 3
    NUM_BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    element = tl.program_id(0).to(tl.int64)
    interface_ptr += element * INTERFACE
    memory_ptr += element * N * W
    usage_ptr += element * N
    link_ptr += element * N * N
    precedence_ptr += element * N
    read_weights_ptr += element * R * N
    write_weights_ptr += element * N
    read_words_ptr += element * R * W
    new_memory_ptr += element * N * W
    new_usage_ptr += element * N
    new_link_ptr += element * N * N
    new_precedence_ptr += element * N
    new_read_weights_ptr += element * R * N
    new_write_weights_ptr += element * N
    kept_ptr += element * (2 + 3 * R) * N
    free_list_ptr += element * N
    scratch_ptr += element * NUM_BLOCKS * R * N
    allocation_ptr = kept_ptr
    write_similarity_ptr = kept_ptr + N
    read_similarity_ptr = kept_ptr + 2 * N
    forward_ptr = kept_ptr + (2 + R) * N
    backward_ptr = kept_ptr + (2 + 2 * R) * N

    runs = True
    if marks_ptr is not None:
        mark = tl.load(marks_ptr + element)
        runs, fresh = mark & ENDED == 0, mark & FRESH != 0
        memory_ptr = tl.where(fresh, zeros_ptr, memory_ptr)
        usage_ptr = tl.where(fresh, zeros_ptr, usage_ptr)
        link_ptr = tl.where(fresh, zeros_ptr, link_ptr)
        precedence_ptr = tl.where(fresh, zeros_ptr, precedence_ptr)
        read_weights_ptr = tl.where(fresh, zeros_ptr, read_weights_ptr)
        write_weights_ptr = tl.where(fresh, zeros_ptr, write_weights_ptr)

    if PHASE == FIRST or PHASE == WHOLE:
        address(
            interface_ptr,
            memory_ptr,
            usage_ptr,
            precedence_ptr,
            read_weights_ptr,
            write_weights_ptr,
            new_usage_ptr,
            new_precedence_ptr,
            new_write_weights_ptr,
            allocation_ptr,
            write_similarity_ptr,
            free_list_ptr,
            N,
            W,
            R,
            BLOCK_N,
            BLOCK_W,
            ROWS,
            RAW,
            STRENGTH_OFFSET,
            COMPUTE,
        )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == MIDDLE or PHASE == WHOLE:
        first_block = tl.program_id(1)
        for block in range(first_block, NUM_BLOCKS if PHASE == WHOLE else first_block + 1):
            write_and_link(
                block,
                interface_ptr,
                memory_ptr,
                link_ptr,
                precedence_ptr,
                read_weights_ptr,
                new_write_weights_ptr,
                new_memory_ptr,
                new_link_ptr,
                read_similarity_ptr,
                forward_ptr,
                scratch_ptr,
                runs,
                N,
                W,
                R,
                BLOCK_W,
                BLOCK_R,
                ROWS,
                COLUMNS,
                RAW,
                COMPUTE,
            )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == LAST or PHASE == WHOLE:
        read(
            interface_ptr,
            new_memory_ptr,
            read_similarity_ptr,
            forward_ptr,
            scratch_ptr,
            backward_ptr,
            new_read_weights_ptr,
            read_words_ptr,
            N,
            W,
            R,
            BLOCK_N,
            BLOCK_W,
            BLOCK_R,
            ROWS,
            NUM_BLOCKS,
            RAW,
            STRENGTH_OFFSET,
            COMPUTE,
        )


@triton.jit
def step_backward_kernel(
    interface_ptr,
    memory_ptr,
    usage_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    write_weights_ptr,
    new_memory_ptr,
    new_usage_ptr,
    new_read_weights_ptr,
    new_write_weights_ptr,
    kept_ptr,
    free_list_ptr,
    d_read_words_ptr,
    d_new_memory_ptr,
    d_new_usage_ptr,
    d_new_link_ptr,
    d_new_precedence_ptr,
    d_new_read_weights_ptr,
    d_new_write_weights_ptr,
    d_interface_ptr,
    d_memory_ptr,
    d_usage_ptr,
    d_link_ptr,
    d_precedence_ptr,
    d_read_weights_ptr,
    d_write_weights_ptr,
    scratch_ptr,
    marks_ptr,
    zeros_ptr,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    STOP_USAGE_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Grid: (B,), or (B, row blocks) for the middle phase alone.

    With marks [B] come zeros, as in the forward. Of what has ended no gradient by the state is written.
    """
    INTERFACE: tl.constexpr = R * W + 3 * W + 5 * R + 3
    NUM_BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    element = tl.program_id(0).to(tl.int64)
    interface_ptr += element * INTERFACE
    memory_ptr += element * N * W
    usage_ptr += element * N
    link_ptr += element * N * N
    precedence_ptr += element * N
    read_weights_ptr += element * R * N
    write_weights_ptr += element * N
    new_memory_ptr += element * N * W
    new_usage_ptr += element * N
    new_read_weights_ptr += element * R * N
    new_write_weights_ptr += element * N
    kept_ptr += element * (2 + 3 * R) * N
    free_list_ptr += element * N
    d_read_words_ptr += element * R * W
    d_new_memory_ptr += element * N * W
    d_new_usage_ptr += element * N
    d_new_link_ptr += element * N * N
    d_new_precedence_ptr += element * N
    d_new_read_weights_ptr += element * R * N
    d_new_write_weights_ptr += element * N
    d_interface_ptr += element * INTERFACE
    d_memory_ptr += element * N * W
    d_usage_ptr += element * N
    d_link_ptr += element * N * N
    d_precedence_ptr += element * N
    d_read_weights_ptr += element * R * N
    d_write_weights_ptr += element * N
    scratch_ptr += element * ((3 + 4 * R) * N + NUM_BLOCKS * ((2 + R) * N + (2 + R) * W))
    allocation_ptr = kept_ptr
    write_similarity_ptr = kept_ptr + N
    read_similarity_ptr = kept_ptr + 2 * N
    forward_ptr = kept_ptr + (2 + R) * N
    backward_ptr = kept_ptr + (2 + 2 * R) * N
    d_forward_ptr = scratch_ptr
    d_backward_ptr = d_forward_ptr + R * N
    d_similarity_ptr = d_backward_ptr + R * N
    d_read_rows_ptr = d_similarity_ptr + R * N
    d_write_rows_ptr = d_read_rows_ptr + R * N
    d_addressing_ptr = d_write_rows_ptr + N
    d_write_columns_ptr = d_addressing_ptr + 2 * N
    d_precedence_columns_ptr = d_write_columns_ptr + NUM_BLOCKS * N
    d_read_columns_ptr = d_precedence_columns_ptr + NUM_BLOCKS * N
    d_words_partial_ptr = d_read_columns_ptr + NUM_BLOCKS * R * N

    runs = True
    if marks_ptr is not None:
        mark = tl.load(marks_ptr + element)
        runs, fresh, lost = mark & ENDED == 0, mark & FRESH != 0, mark & LOST != 0
        memory_ptr = tl.where(fresh, zeros_ptr, memory_ptr)
        usage_ptr = tl.where(fresh, zeros_ptr, usage_ptr)
        link_ptr = tl.where(fresh, zeros_ptr, link_ptr)
        precedence_ptr = tl.where(fresh, zeros_ptr, precedence_ptr)
        read_weights_ptr = tl.where(fresh, zeros_ptr, read_weights_ptr)
        write_weights_ptr = tl.where(fresh, zeros_ptr, write_weights_ptr)
        d_new_memory_ptr = tl.where(lost, zeros_ptr, d_new_memory_ptr)
        d_new_usage_ptr = tl.where(lost, zeros_ptr, d_new_usage_ptr)
        d_new_link_ptr = tl.where(lost, zeros_ptr, d_new_link_ptr)
        d_new_precedence_ptr = tl.where(lost, zeros_ptr, d_new_precedence_ptr)
        d_new_read_weights_ptr = tl.where(lost, zeros_ptr, d_new_read_weights_ptr)
        d_new_write_weights_ptr = tl.where(lost, zeros_ptr, d_new_write_weights_ptr)

    if PHASE == FIRST or PHASE == WHOLE:
        read_backward(
            interface_ptr,
            new_memory_ptr,
            read_similarity_ptr,
            forward_ptr,
            backward_ptr,
            d_read_words_ptr,
            d_new_read_weights_ptr,
            d_interface_ptr,
            d_forward_ptr,
            d_backward_ptr,
            d_similarity_ptr,
            N,
            W,
            R,
            BLOCK_N,
            BLOCK_W,
            BLOCK_R,
            ROWS,
            RAW,
            STRENGTH_OFFSET,
            COMPUTE,
        )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == MIDDLE or PHASE == WHOLE:
        first_block = tl.program_id(1)
        for block in range(first_block, NUM_BLOCKS if PHASE == WHOLE else first_block + 1):
            write_and_link_backward(
                block,
                interface_ptr,
                memory_ptr,
                link_ptr,
                precedence_ptr,
                read_weights_ptr,
                new_memory_ptr,
                new_read_weights_ptr,
                new_write_weights_ptr,
                read_similarity_ptr,
                d_read_words_ptr,
                d_new_memory_ptr,
                d_new_link_ptr,
                d_forward_ptr,
                d_backward_ptr,
                d_similarity_ptr,
                d_memory_ptr,
                d_link_ptr,
                d_write_rows_ptr,
                d_write_columns_ptr,
                d_precedence_columns_ptr,
                d_read_rows_ptr,
                d_read_columns_ptr,
                d_words_partial_ptr,
                runs,
                N,
                W,
                R,
                BLOCK_W,
                BLOCK_R,
                ROWS,
                COLUMNS,
                RAW,
                COMPUTE,
            )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == LAST or PHASE == WHOLE:
        address_backward(
            interface_ptr,
            memory_ptr,
            usage_ptr,
            precedence_ptr,
            read_weights_ptr,
            write_weights_ptr,
            new_usage_ptr,
            new_write_weights_ptr,
            allocation_ptr,
            write_similarity_ptr,
            free_list_ptr,
            d_new_usage_ptr,
            d_new_precedence_ptr,
            d_new_write_weights_ptr,
            d_interface_ptr,
            d_memory_ptr,
            d_usage_ptr,
            d_precedence_ptr,
            d_read_weights_ptr,
            d_write_weights_ptr,
            d_write_rows_ptr,
            d_write_columns_ptr,
            d_precedence_columns_ptr,
            d_read_rows_ptr,
            d_read_columns_ptr,
            d_words_partial_ptr,
            d_addressing_ptr,
            runs,
            N,
            W,
            R,
            BLOCK_N,
            BLOCK_W,
            ROWS,
            NUM_BLOCKS,
            RAW,
            STRENGTH_OFFSET,
            STOP_USAGE_GRADIENT,
            COMPUTE,
        )
