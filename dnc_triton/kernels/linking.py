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
    rows, columns = by_row[:, :, None], by_column[:, None, :]
    mask_rows, mask_columns = rows < N, columns < N
    write_rows = tl.load(new_write_weights_ptr + rows, mask=mask_rows, other=0.0).to(COMPUTE)
    write_columns = tl.load(new_write_weights_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
    precedence = tl.load(precedence_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
    at_link, mask = rows * N + columns, mask_rows & mask_columns
    link = tl.load(link_ptr + at_link, mask=mask, other=0.0).to(COMPUTE)
    new_link = linked(link, rows, columns, write_rows, write_columns, precedence)
    link = rounded(tl.where(runs, new_link, link), new_link_ptr)
    tl.store(new_link_ptr + at_link, link, mask=mask)
    for head in range(0, R, HEADS):
        offs_h = head + tl.arange(0, HEADS)[:, None]
        heads, mask_h = offs_h[:, :, None], offs_h < R
        mask_heads = heads < R
        weights_ptr = read_weights_ptr + heads * N
        read_rows = tl.load(weights_ptr + rows, mask=mask_heads & mask_rows, other=0.0).to(COMPUTE)
        read_columns = tl.load(weights_ptr + columns, mask=mask_heads & mask_columns, other=0.0).to(COMPUTE)
        forward, backward = tl.sum(link * read_columns, 2), tl.sum(link * read_rows, 1)
        forward_ptr = forward_partial_ptr + (column_block * R + offs_h) * N + by_row
        tl.store(forward_ptr, forward, mask=mask_h & (by_row < N))
        backward_ptr = backward_partial_ptr + (row_block * R + offs_h) * N + by_column
        tl.store(backward_ptr, backward, mask=mask_h & (by_column < N))


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
    by_slot = block * SLOTS + tl.arange(0, SLOTS)[None, :]
    slots, places = by_slot[:, :, None], tl.arange(0, BLOCK_W)[None, None, :]
    mask_slots, mask_places = slots < N, places < W
    weights = tl.load(new_write_weights_ptr + slots, mask=mask_slots, other=0.0).to(COMPUTE)
    offsets, mask = slots * W + places, mask_slots & mask_places
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    erase = gate(tl.load(interface_ptr + ERASE_VECTOR + places, mask=mask_places, other=0.0).to(COMPUTE), RAW)
    word = tl.load(interface_ptr + WRITE_VECTOR + places, mask=mask_places, other=0.0).to(COMPUTE)
    written = memory * (1.0 - weights * erase) + weights * word
    memory = rounded(tl.where(runs, written, memory), new_memory_ptr)
    tl.store(new_memory_ptr + offsets, memory, mask=mask)

    norm = tl.sqrt(tl.sum(memory * memory, 2) + NORM_EPSILON)
    for head in range(0, R, HEADS):
        offs_h = head + tl.arange(0, HEADS)[:, None]
        heads = offs_h[:, :, None]
        mask_keys = (heads < R) & mask_places
        keys = tl.load(interface_ptr + heads * W + places, mask=mask_keys, other=0.0).to(COMPUTE)
        norms = norm * tl.sqrt(tl.sum(keys * keys, 2) + NORM_EPSILON)
        similarity = tl.sum(memory * keys, 2) / (norms + SIMILARITY_EPSILON)
        tl.store(similarity_ptr + offs_h * N + by_slot, similarity, mask=(offs_h < R) & (by_slot < N))


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
    mask_by_row, mask_by_column = (by_row < N) & runs, by_column < N
    rows, columns = by_row[:, :, None], by_column[:, None, :]
    mask_rows, mask_columns = (rows < N) & runs, columns < N
    at_link, mask = rows * N + columns, mask_rows & mask_columns
    link = tl.load(link_ptr + at_link, mask=mask, other=0.0).to(COMPUTE)
    d_link = tl.load(d_new_link_ptr + at_link, mask=mask, other=0.0).to(COMPUTE)
    write_rows = tl.load(new_write_weights_ptr + rows, mask=mask_rows, other=0.0).to(COMPUTE)
    write_columns = tl.load(new_write_weights_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
    precedence = tl.load(precedence_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
    # S, the gradient of L' after adding what its two readers give back, 0 on the diagonal
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None, None]
        at_rows, mask_at_rows = heads * N + rows, (heads < R) & mask_rows
        at_columns, mask_at_columns = heads * N + columns, (heads < R) & mask_columns
        read_rows = tl.load(read_weights_ptr + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
        read_columns = tl.load(read_weights_ptr + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
        d_forward = tl.load(d_forward_ptr + at_rows, mask=mask_at_rows, other=0.0)
        d_backward = tl.load(d_backward_ptr + at_columns, mask=mask_at_columns, other=0.0)
        d_link += tl.sum(d_forward * read_columns + read_rows * d_backward, 0, keep_dims=True)
    d_link = tl.where(rows == columns, 0.0, d_link)
    tl.store(d_link_ptr + at_link, (1.0 - write_rows - write_columns) * d_link, mask=mask)
    d_write_rows = tl.sum(d_link * (precedence - link), 2)
    tl.store(d_write_rows_ptr + column_block * N + by_row, d_write_rows, mask=mask_by_row)
    at_partial = row_block * N + by_column
    tl.store(d_write_columns_ptr + at_partial, -tl.sum(d_link * link, 1), mask=mask_by_column)
    tl.store(d_precedence_columns_ptr + at_partial, tl.sum(d_link * write_rows, 1), mask=mask_by_column)

    link = linked(link, rows, columns, write_rows, write_columns, precedence)
    for head in range(0, R, HEADS):
        offs_h = head + tl.arange(0, HEADS)[:, None]
        heads, mask_h = offs_h[:, :, None], offs_h < R
        mask_heads = heads < R
        d_forward = tl.load(d_forward_ptr + heads * N + rows, mask=mask_heads & mask_rows, other=0.0)
        d_backward = tl.load(d_backward_ptr + heads * N + columns, mask=mask_heads & mask_columns, other=0.0)
        d_rows, d_columns = tl.sum(link * d_backward, 2), tl.sum(link * d_forward, 1)
        tl.store(d_read_rows_ptr + (column_block * R + offs_h) * N + by_row, d_rows, mask=mask_h & mask_by_row)
        d_columns_ptr = d_read_columns_ptr + (row_block * R + offs_h) * N + by_column
        tl.store(d_columns_ptr, d_columns, mask=mask_h & mask_by_column)


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
    by_slot = block * SLOTS + tl.arange(0, SLOTS)[None, :]
    slots, places = by_slot[:, :, None], tl.arange(0, BLOCK_W)[None, None, :]
    mask_slots, mask_places = (slots < N) & runs, places < W
    offsets, mask = slots * W + places, mask_slots & mask_places
    partial_ptr = d_words_partial_ptr + block * (R + 2) * W + places

    # what reading gives back to the new memory: the words read, and the content lookup
    new_memory = tl.load(new_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_new_memory = tl.load(d_new_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    norm = tl.sqrt(tl.sum(new_memory * new_memory, 2, keep_dims=True) + NORM_EPSILON)
    for head in range(0, R, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None, None]
        at_slots, mask_at_slots = heads * N + slots, (heads < R) & mask_slots
        at_words, mask_words = heads * W + places, (heads < R) & mask_places
        read_weights = tl.load(new_read_weights_ptr + at_slots, mask=mask_at_slots, other=0.0).to(COMPUTE)
        d_words = tl.load(d_read_words_ptr + at_words, mask=mask_words, other=0.0).to(COMPUTE)
        keys = tl.load(interface_ptr + at_words, mask=mask_words, other=0.0).to(COMPUTE)
        similarity = tl.load(similarity_ptr + at_slots, mask=mask_at_slots, other=0.0)
        d_dot = tl.load(d_similarity_ptr + at_slots, mask=mask_at_slots, other=0.0)
        key_norms = tl.sqrt(tl.sum(keys * keys, 2, keep_dims=True) + NORM_EPSILON)
        d_dot = d_dot / (norm * key_norms + SIMILARITY_EPSILON)
        d_norms = -d_dot * similarity
        d_new_memory += tl.sum(read_weights * d_words + d_dot * keys, 0, keep_dims=True)
        d_new_memory += tl.sum(d_norms * key_norms, 0, keep_dims=True) / norm * new_memory
        d_keys = tl.sum(d_dot * new_memory, 1, keep_dims=True)
        d_keys += tl.sum(d_norms * norm, 1, keep_dims=True) / key_norms * keys
        tl.store(partial_ptr + heads * W, d_keys, mask=mask_words)

    # the write: M' = M (1 − w eᵀ) + w vᵀ
    weights = tl.load(new_write_weights_ptr + slots, mask=mask_slots, other=0.0).to(COMPUTE)
    erase = gate(tl.load(interface_ptr + ERASE_VECTOR + places, mask=mask_places, other=0.0).to(COMPUTE), RAW)
    word = tl.load(interface_ptr + WRITE_VECTOR + places, mask=mask_places, other=0.0).to(COMPUTE)
    tl.store(d_memory_ptr + offsets, d_new_memory * (1.0 - weights * erase), mask=mask)
    d_write = tl.sum(d_new_memory * (word - memory * erase), 2)
    tl.store(d_write_ptr + by_slot, d_write, mask=(by_slot < N) & runs)
    d_erase = d_gate(-tl.sum(d_new_memory * memory * weights, 1, keep_dims=True), erase, RAW)
    tl.store(partial_ptr + R * W, d_erase, mask=mask_places)
    d_word = tl.sum(d_new_memory * weights, 1, keep_dims=True)
    tl.store(partial_ptr + (R + 1) * W, d_word, mask=mask_places)
