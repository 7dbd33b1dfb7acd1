"""The memory step as kernels: three phases forward and three backward, in one launch each way or in one per phase.

In one launch a program does a whole step for its batch element, phase after phase; the phases hand over through buffers
that stay in the cache. In three launches the middle phase, which reads and writes the link, has a program per tile of
it, and the phases that read words have one per part of those. Which one is faster depends on N and B.

K = 1. All tensors are contiguous, of one dtype, on one device; what is kept for the backward is in the dtype of the
arithmetic, float32 unless the tensors are float64.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.addressing import address, address_backward, by_write_weights, lookup_backward
from dnc_triton.kernels.linking import link_tile, link_tile_backward, write, write_backward
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
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Grid: (B,) for all phases; else (B, programs of the phase): `launch` has it.

    With marks [B] come zeros, as many as the largest field of a state has numbers for a batch element.
    """
    INTERFACE: tl.constexpr = R * W + 3 * W + 5 * R + 3
    ROW_BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = ROW_BLOCKS * COLUMN_BLOCKS
    SLOT_BLOCKS: tl.constexpr = (N + SLOTS - 1) // SLOTS
    PARTS: tl.constexpr = (W + PLACES - 1) // PLACES
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
    kept_ptr += element * (3 + 3 * R) * N
    free_list_ptr += element * N
    scratch_ptr += element * (ROW_BLOCKS + COLUMN_BLOCKS) * R * N
    allocation_ptr = kept_ptr
    write_similarity_ptr = kept_ptr + N
    read_similarity_ptr = kept_ptr + 2 * N
    forward_ptr = kept_ptr + (2 + R) * N
    backward_ptr = kept_ptr + (2 + 2 * R) * N
    norm_ptr = kept_ptr + (2 + 3 * R) * N
    forward_partial_ptr = scratch_ptr
    backward_partial_ptr = scratch_ptr + COLUMN_BLOCKS * R * N

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
            norm_ptr,
            free_list_ptr,
            N,
            W,
            R,
            BLOCK_N,
            BLOCK_W,
            CHUNK,
            RAW,
            STRENGTH_OFFSET,
            COMPUTE,
        )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == MIDDLE or PHASE == WHOLE:
        first = tl.program_id(1)
        for piece in range(first, TILES + SLOT_BLOCKS if PHASE == WHOLE else first + 1):
            if piece < TILES:
                link_tile(
                    piece,
                    link_ptr,
                    precedence_ptr,
                    read_weights_ptr,
                    new_write_weights_ptr,
                    new_link_ptr,
                    forward_partial_ptr,
                    backward_partial_ptr,
                    runs,
                    N,
                    R,
                    ROWS,
                    COLUMNS,
                    HEADS,
                    COMPUTE,
                )
            else:
                write(
                    piece - TILES,
                    interface_ptr,
                    memory_ptr,
                    new_write_weights_ptr,
                    new_memory_ptr,
                    read_similarity_ptr,
                    runs,
                    N,
                    W,
                    R,
                    BLOCK_W,
                    SLOTS,
                    HEADS,
                    RAW,
                    COMPUTE,
                )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == LAST or PHASE == WHOLE:
        first = tl.program_id(1)
        for part in range(first, PARTS if PHASE == WHOLE else first + 1):
            read(
                part,
                interface_ptr,
                new_memory_ptr,
                read_similarity_ptr,
                forward_partial_ptr,
                backward_partial_ptr,
                forward_ptr,
                backward_ptr,
                new_read_weights_ptr,
                read_words_ptr,
                N,
                W,
                R,
                BLOCK_N,
                BLOCK_R,
                PLACES,
                ROW_BLOCKS,
                COLUMN_BLOCKS,
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
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    STOP_USAGE_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Grid: (B,) for all phases; else (B, programs of the phase): `launch` has it.

    With marks [B] come zeros, as in the forward. Of what has ended no gradient by the state is written.
    """
    INTERFACE: tl.constexpr = R * W + 3 * W + 5 * R + 3
    ROW_BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = ROW_BLOCKS * COLUMN_BLOCKS
    SLOT_BLOCKS: tl.constexpr = (N + SLOTS - 1) // SLOTS
    PARTS: tl.constexpr = (W + PLACES - 1) // PLACES
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
    kept_ptr += element * (3 + 3 * R) * N
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
    scratch_ptr += element * (
        (4 * R + (COLUMN_BLOCKS + 1) + COLUMN_BLOCKS * R + ROW_BLOCKS * (2 + R)) * N + SLOT_BLOCKS * (2 + R) * W
    )
    allocation_ptr = kept_ptr
    write_similarity_ptr = kept_ptr + N
    read_similarity_ptr = kept_ptr + 2 * N
    forward_ptr = kept_ptr + (2 + R) * N
    backward_ptr = kept_ptr + (2 + 2 * R) * N
    norm_ptr = kept_ptr + (2 + 3 * R) * N
    d_forward_ptr = scratch_ptr
    d_backward_ptr = d_forward_ptr + R * N
    d_similarity_ptr = d_backward_ptr + R * N
    d_addressing_ptr = d_similarity_ptr + R * N
    d_write_rows_ptr = d_addressing_ptr + R * N
    d_read_rows_ptr = d_write_rows_ptr + (COLUMN_BLOCKS + 1) * N
    d_write_columns_ptr = d_read_rows_ptr + COLUMN_BLOCKS * R * N
    d_precedence_columns_ptr = d_write_columns_ptr + ROW_BLOCKS * N
    d_read_columns_ptr = d_precedence_columns_ptr + ROW_BLOCKS * N
    d_words_partial_ptr = d_read_columns_ptr + ROW_BLOCKS * R * N

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
            CHUNK,
            HEADS,
            RAW,
            STRENGTH_OFFSET,
            COMPUTE,
        )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == MIDDLE or PHASE == WHOLE:
        first = tl.program_id(1)
        for piece in range(first, TILES + SLOT_BLOCKS if PHASE == WHOLE else first + 1):
            if piece < TILES:
                link_tile_backward(
                    piece,
                    link_ptr,
                    precedence_ptr,
                    read_weights_ptr,
                    new_write_weights_ptr,
                    d_new_link_ptr,
                    d_forward_ptr,
                    d_backward_ptr,
                    d_link_ptr,
                    d_write_rows_ptr,
                    d_read_rows_ptr,
                    d_write_columns_ptr,
                    d_precedence_columns_ptr,
                    d_read_columns_ptr,
                    runs,
                    N,
                    R,
                    ROWS,
                    COLUMNS,
                    HEADS,
                    COMPUTE,
                )
            else:
                write_backward(
                    piece - TILES,
                    interface_ptr,
                    memory_ptr,
                    new_memory_ptr,
                    new_read_weights_ptr,
                    new_write_weights_ptr,
                    read_similarity_ptr,
                    d_read_words_ptr,
                    d_new_memory_ptr,
                    d_similarity_ptr,
                    d_memory_ptr,
                    d_write_rows_ptr + COLUMN_BLOCKS * N,
                    d_words_partial_ptr,
                    runs,
                    N,
                    W,
                    R,
                    BLOCK_W,
                    SLOTS,
                    HEADS,
                    RAW,
                    COMPUTE,
                )
    if PHASE == WHOLE:
        tl.debug_barrier()
    if PHASE == LAST or PHASE == WHOLE:
        offs_n = tl.arange(0, BLOCK_N)
        d_weights = by_write_weights(
            precedence_ptr,
            new_write_weights_ptr,
            d_new_precedence_ptr,
            d_new_write_weights_ptr,
            d_write_rows_ptr,
            d_write_columns_ptr,
            offs_n,
            (offs_n < N) & runs,
            N,
            ROW_BLOCKS,
            COLUMN_BLOCKS,
            COMPUTE,
        )
        first = tl.program_id(1)
        for part in range(first, PARTS if PHASE == WHOLE else tl.minimum(first + 1, PARTS)):
            lookup_backward(
                part,
                interface_ptr,
                memory_ptr,
                write_similarity_ptr,
                norm_ptr,
                d_weights,
                d_words_partial_ptr,
                d_interface_ptr,
                d_memory_ptr,
                runs,
                N,
                W,
                R,
                BLOCK_N,
                BLOCK_W,
                BLOCK_R,
                PLACES,
                SLOT_BLOCKS,
                RAW,
                STRENGTH_OFFSET,
                COMPUTE,
            )
        if PHASE == WHOLE or first >= PARTS:
            address_backward(
                0 if PHASE == WHOLE else first - PARTS,
                R if PHASE == WHOLE else first - PARTS + 1,
                interface_ptr,
                usage_ptr,
                read_weights_ptr,
                write_weights_ptr,
                new_usage_ptr,
                new_write_weights_ptr,
                allocation_ptr,
                write_similarity_ptr,
                free_list_ptr,
                d_weights,
                d_new_usage_ptr,
                d_new_precedence_ptr,
                d_interface_ptr,
                d_usage_ptr,
                d_precedence_ptr,
                d_read_weights_ptr,
                d_write_weights_ptr,
                d_precedence_columns_ptr,
                d_read_rows_ptr,
                d_read_columns_ptr,
                d_addressing_ptr + (0 if PHASE == WHOLE else (first - PARTS) * N),
                runs,
                N,
                W,
                R,
                BLOCK_N,
                ROW_BLOCKS,
                COLUMN_BLOCKS,
                RAW,
                STRENGTH_OFFSET,
                STOP_USAGE_GRADIENT,
                COMPUTE,
            )
