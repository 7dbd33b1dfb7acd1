"""Phase two of a step: update the link, a program per tile of it, and write to memory, a program per block of rows.

Their adjoints are the middle phase of the backward. All pointers are those of one batch element. What a tile has to say
about its rows and columns, which other tiles have a say in as well, it leaves as a partial sum: nothing is added
atomically, so the same call gives the same bits.

Products with the read heads' vectors are made by multiplying and adding up, for HEADS heads at once: [heads, rows,
columns]. As products of matrices, a few heads wide, they go through shared memory, which took several times as long.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.common import NORM_EPSILON, SIMILARITY_EPSILON, d_gate, gate, rounded


@triton.jit
def linked(link, rows, columns, write_rows, write_columns, precedence):
    """L' of a tile from L: (1 − w[i] − w[j]) L[i,j] + w[i] p[j], and 0 on the diagonal."""
    link = (1.0 - write_rows - write_columns) * link + write_rows * precedence
    return tl.where(rows == columns, 0.0, link)


@triton.jit
def link_tile(
    tile,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    new_write_weights_ptr,
    new_link_ptr,
    forward_partial_ptr,
    backward_partial_ptr,
    runs,
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Update a tile of the link.

    Leaves its part of the forward weights, of its rows, in `forward_partial` [N / COLUMNS, R, N], and that of the
    backward weights, of its columns, in `backward_partial` [N / ROWS, R, N]. Of an element that has ended (not `runs`)
    the link stays.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    row_block, column_block = tile // COLUMN_BLOCKS, tile % COLUMN_BLOCKS
    by_row = row_block * ROWS + tl.arange(0, ROWS)[None, :]
    by_column = column_block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask_rows, mask_columns = by_row < N, by_column < N
    rows, columns = by_row[:, :, None], by_column[:, None, :]
    at_link, mask = rows * N + columns, mask_rows[:, :, None] & mask_columns[:, None, :]
    link = tl.load(link_ptr + at_link, mask=mask, other=0.0).to(COMPUTE)
    write_rows = tl.load(new_write_weights_ptr + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
    write_columns = tl.load(new_write_weights_ptr + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    precedence = tl.load(precedence_ptr + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    new_link = linked(link, rows, columns, write_rows, write_columns, precedence)
    link = rounded(tl.where(runs, new_link, link), new_link_ptr)
    tl.store(new_link_ptr + at_link, link, mask=mask)
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None]
        at_rows, mask_at_rows = heads * N + by_row, (heads < R) & mask_rows
        at_columns, mask_at_columns = heads * N + by_column, (heads < R) & mask_columns
        read_rows = tl.load(read_weights_ptr + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
        read_columns = tl.load(read_weights_ptr + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
        forward, backward = tl.sum(link * read_columns[:, None, :], 2), tl.sum(link * read_rows[:, :, None], 1)
        tl.store(forward_partial_ptr + column_block * R * N + at_rows, forward, mask=mask_at_rows)
        tl.store(backward_partial_ptr + row_block * R * N + at_columns, backward, mask=mask_at_columns)


@triton.jit
def write(
    block,
    interface_ptr,
    memory_ptr,
    new_write_weights_ptr,
    new_memory_ptr,
    similarity_ptr,
    runs,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    RAW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write to the slots of a block, and look up the read keys there: leaves their similarity [R, N].

    Of an element that has ended (not `runs`) the memory stays.
    """
    WRITE_VECTOR: tl.constexpr = R * W + W
    ERASE_VECTOR: tl.constexpr = R * W + 2 * W + R + 1
    by_slot, by_place = block * SLOTS + tl.arange(0, SLOTS)[None, :], tl.arange(0, BLOCK_W)[None, :]
    mask_slots, mask_places = by_slot < N, by_place < W
    offsets = by_slot[:, :, None] * W + by_place[:, None, :]
    mask = mask_slots[:, :, None] & mask_places[:, None, :]
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    weights = tl.load(new_write_weights_ptr + by_slot, mask=mask_slots, other=0.0).to(COMPUTE)[:, :, None]
    erase = gate(tl.load(interface_ptr + ERASE_VECTOR + by_place, mask=mask_places, other=0.0).to(COMPUTE), RAW)
    word = tl.load(interface_ptr + WRITE_VECTOR + by_place, mask=mask_places, other=0.0).to(COMPUTE)
    written = memory * (1.0 - weights * erase[:, None, :]) + weights * word[:, None, :]
    memory = rounded(tl.where(runs, written, memory), new_memory_ptr)
    tl.store(new_memory_ptr + offsets, memory, mask=mask)

    norm = tl.sqrt(tl.sum(memory * memory, 2) + NORM_EPSILON)
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None]
        mask_keys = (heads < R) & mask_places
        keys = tl.load(interface_ptr + heads * W + by_place, mask=mask_keys, other=0.0).to(COMPUTE)
        norms = norm * tl.sqrt(tl.sum(keys * keys, 1, keep_dims=True) + NORM_EPSILON)
        similarity = tl.sum(memory * keys[:, None, :], 2) / (norms + SIMILARITY_EPSILON)
        tl.store(similarity_ptr + heads * N + by_slot, similarity, mask=(heads < R) & mask_slots)


@triton.jit
def link_tile_backward(
    tile,
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
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The adjoint of `link_tile`, after that of reading.

    Writes the gradient of the tile before the step; leaves parts of the gradients of the write weights and the previous
    read weights by row, [N / COLUMNS, N] and [N / COLUMNS, R, N], and of the write weights, the precedence and the
    previous read weights by column, [N / ROWS, N] twice and [N / ROWS, R, N]. Of an element that has ended (not `runs`)
    it reads and writes no rows.
    """
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    row_block, column_block = tile // COLUMN_BLOCKS, tile % COLUMN_BLOCKS
    by_row = row_block * ROWS + tl.arange(0, ROWS)[None, :]
    by_column = column_block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask_rows, mask_columns = (by_row < N) & runs, by_column < N
    rows, columns = by_row[:, :, None], by_column[:, None, :]
    at_link, mask = rows * N + columns, mask_rows[:, :, None] & mask_columns[:, None, :]
    link = tl.load(link_ptr + at_link, mask=mask, other=0.0).to(COMPUTE)
    d_link = tl.load(d_new_link_ptr + at_link, mask=mask, other=0.0).to(COMPUTE)
    write_rows = tl.load(new_write_weights_ptr + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
    write_columns = tl.load(new_write_weights_ptr + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    precedence = tl.load(precedence_ptr + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    # S, the gradient of L' after adding what its two readers give back, 0 on the diagonal
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None]
        at_rows, mask_at_rows = heads * N + by_row, (heads < R) & mask_rows
        at_columns, mask_at_columns = heads * N + by_column, (heads < R) & mask_columns
        read_rows = tl.load(read_weights_ptr + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
        read_columns = tl.load(read_weights_ptr + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
        d_forward = tl.load(d_forward_ptr + at_rows, mask=mask_at_rows, other=0.0)
        d_backward = tl.load(d_backward_ptr + at_columns, mask=mask_at_columns, other=0.0)
        given_back = d_forward[:, :, None] * read_columns[:, None, :] + read_rows[:, :, None] * d_backward[:, None, :]
        d_link += tl.sum(given_back, 0, keep_dims=True)
    d_link = tl.where(rows == columns, 0.0, d_link)
    tl.store(d_link_ptr + at_link, (1.0 - write_rows - write_columns) * d_link, mask=mask)
    d_write_rows = tl.sum(d_link * (precedence - link), 2)
    tl.store(d_write_rows_ptr + column_block * N + by_row, d_write_rows, mask=mask_rows)
    at_partial = row_block * N + by_column
    tl.store(d_write_columns_ptr + at_partial, -tl.sum(d_link * link, 1), mask=mask_columns)
    tl.store(d_precedence_columns_ptr + at_partial, tl.sum(d_link * write_rows, 1), mask=mask_columns)

    link = linked(link, rows, columns, write_rows, write_columns, precedence)
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None]
        at_rows, mask_at_rows = heads * N + by_row, (heads < R) & mask_rows
        at_columns, mask_at_columns = heads * N + by_column, (heads < R) & mask_columns
        d_forward = tl.load(d_forward_ptr + at_rows, mask=mask_at_rows, other=0.0)
        d_backward = tl.load(d_backward_ptr + at_columns, mask=mask_at_columns, other=0.0)
        d_rows, d_columns = tl.sum(link * d_backward[:, None, :], 2), tl.sum(link * d_forward[:, :, None], 1)
        tl.store(d_read_rows_ptr + column_block * R * N + at_rows, d_rows, mask=mask_at_rows)
        tl.store(d_read_columns_ptr + row_block * R * N + at_columns, d_columns, mask=mask_at_columns)


@triton.jit
def write_backward(
    block,
    interface_ptr,
    memory_ptr,
    new_memory_ptr,
    new_read_weights_ptr,
    new_write_weights_ptr,
    similarity_ptr,
    d_read_words_ptr,
    d_new_memory_ptr,
    d_similarity_ptr,
    d_memory_ptr,
    d_write_ptr,
    d_words_partial_ptr,
    runs,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    RAW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The adjoint of `write`, after that of reading.

    Writes the gradient of the block's slots before the step; leaves that of their write weights in `d_write` [N], and
    its part of those of the read keys, the erase vector and the write vector in `d_words_partial`
    [N / SLOTS, R + 2, W]. Of an element that has ended (not `runs`) it reads and writes no slots.
    """
    WRITE_VECTOR: tl.constexpr = R * W + W
    ERASE_VECTOR: tl.constexpr = R * W + 2 * W + R + 1
    by_slot, by_place = block * SLOTS + tl.arange(0, SLOTS)[None, :], tl.arange(0, BLOCK_W)[None, :]
    mask_slots, mask_places = (by_slot < N) & runs, by_place < W
    offsets = by_slot[:, :, None] * W + by_place[:, None, :]
    mask = mask_slots[:, :, None] & mask_places[:, None, :]
    partial_ptr = d_words_partial_ptr + block * (R + 2) * W + by_place

    # what reading gives back to the new memory: the words read, and the content lookup
    new_memory = tl.load(new_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_new_memory = tl.load(d_new_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    norm = tl.sqrt(tl.sum(new_memory * new_memory, 2) + NORM_EPSILON)
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None]
        at_slots, mask_at_slots = heads * N + by_slot, (heads < R) & mask_slots
        at_words, mask_words = heads * W + by_place, (heads < R) & mask_places
        read_weights = tl.load(new_read_weights_ptr + at_slots, mask=mask_at_slots, other=0.0).to(COMPUTE)
        d_words = tl.load(d_read_words_ptr + at_words, mask=mask_words, other=0.0).to(COMPUTE)
        keys = tl.load(interface_ptr + at_words, mask=mask_words, other=0.0).to(COMPUTE)
        similarity = tl.load(similarity_ptr + at_slots, mask=mask_at_slots, other=0.0)
        d_dot = tl.load(d_similarity_ptr + at_slots, mask=mask_at_slots, other=0.0)
        key_norms = tl.sqrt(tl.sum(keys * keys, 1, keep_dims=True) + NORM_EPSILON)
        d_dot = d_dot / (norm * key_norms + SIMILARITY_EPSILON)
        d_norms = -d_dot * similarity
        by_norm = tl.sum(d_norms * key_norms, 0, keep_dims=True) / norm
        by_key_norm = tl.sum(d_norms * norm, 1, keep_dims=True) / key_norms
        given_back = read_weights[:, :, None] * d_words[:, None, :] + d_dot[:, :, None] * keys[:, None, :]
        d_new_memory += tl.sum(given_back, 0, keep_dims=True) + by_norm[:, :, None] * new_memory
        d_keys = tl.sum(d_dot[:, :, None] * new_memory, 1) + by_key_norm * keys
        tl.store(partial_ptr + heads * W, d_keys, mask=mask_words)

    # the write: M' = M (1 − w eᵀ) + w vᵀ
    weights = tl.load(new_write_weights_ptr + by_slot, mask=mask_slots, other=0.0).to(COMPUTE)[:, :, None]
    erase = gate(tl.load(interface_ptr + ERASE_VECTOR + by_place, mask=mask_places, other=0.0).to(COMPUTE), RAW)
    word = tl.load(interface_ptr + WRITE_VECTOR + by_place, mask=mask_places, other=0.0).to(COMPUTE)
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    tl.store(d_memory_ptr + offsets, d_new_memory * (1.0 - weights * erase[:, None, :]), mask=mask)
    d_write = tl.sum(d_new_memory * (word[:, None, :] - memory * erase[:, None, :]), 2)
    tl.store(d_write_ptr + by_slot, d_write, mask=mask_slots)
    d_erase = d_gate(-tl.sum(d_new_memory * memory * weights, 1), erase, RAW)
    tl.store(partial_ptr + R * W, d_erase, mask=mask_places)
    tl.store(partial_ptr + (R + 1) * W, tl.sum(d_new_memory * weights, 1), mask=mask_places)
