"""Phase two of a step, a program per block of rows: write to memory, look up the read keys, update the link.

Its adjoint is the middle phase of the backward. All pointers are those of one batch element. What a block has to say
about columns, which other blocks have a say in as well, it leaves as a partial sum: nothing is added atomically, so the
same call gives the same bits.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.common import (
    NORM_EPSILON,
    SIMILARITY_EPSILON,
    d_gate,
    gate,
    matmul,
    rounded,
)


@triton.jit
def linked(link, rows, columns, write_rows, write_columns, precedence_columns):
    """L' of a tile [ROWS, COLUMNS] from L: (1 − w[i] − w[j]) L[i,j] + w[i] p[j], and 0 on the diagonal."""
    link = (1.0 - write_rows[:, None] - write_columns[None, :]) * link
    link += write_rows[:, None] * precedence_columns[None, :]
    return tl.where(rows[:, None] == columns[None, :], 0.0, link)


@triton.jit
def write_and_link(
    block,
    interface_ptr,
    memory_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    new_write_weights_ptr,
    new_memory_ptr,
    new_link_ptr,
    similarity_ptr,
    forward_ptr,
    backward_partial_ptr,
    runs,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write to the rows of a block, and link them.

    Leaves the read keys' similarity [R, N] and the forward weights [R, N] of its rows, and its part of the backward
    weights [R, N] in `backward_partial` [NUM_BLOCKS, R, N]. Of an element that has ended (not `runs`) memory and link
    stay.
    """
    WRITE_VECTOR: tl.constexpr = R * W + W
    ERASE_VECTOR: tl.constexpr = R * W + 2 * W + R + 1
    rows = block * ROWS + tl.arange(0, ROWS)
    offs_w = tl.arange(0, BLOCK_W)
    offs_r = tl.arange(0, BLOCK_R)
    mask_rows, mask_w, mask_r = rows < N, offs_w < W, offs_r < R
    write_rows = tl.load(new_write_weights_ptr + rows, mask=mask_rows, other=0.0).to(COMPUTE)

    offsets = rows[:, None] * W + offs_w[None, :]
    mask = mask_rows[:, None] & mask_w[None, :]
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    erase = gate(tl.load(interface_ptr + ERASE_VECTOR + offs_w, mask=mask_w, other=0.0).to(COMPUTE), RAW)
    write = tl.load(interface_ptr + WRITE_VECTOR + offs_w, mask=mask_w, other=0.0).to(COMPUTE)
    written = memory * (1.0 - write_rows[:, None] * erase[None, :]) + write_rows[:, None] * write[None, :]
    memory = rounded(tl.where(runs, written, memory), new_memory_ptr)
    tl.store(new_memory_ptr + offsets, memory, mask=mask)

    mask = mask_r[None, :] & mask_w[:, None]
    keys = tl.load(interface_ptr + offs_r[None, :] * W + offs_w[:, None], mask=mask, other=0.0).to(COMPUTE)
    key_norms = tl.sqrt(tl.sum(keys * keys, 0) + NORM_EPSILON)
    norm = tl.sqrt(tl.sum(memory * memory, 1) + NORM_EPSILON)
    similarity = matmul(memory, keys) / (norm[:, None] * key_norms[None, :] + SIMILARITY_EPSILON)
    by_rows = offs_r[None, :] * N + rows[:, None]  # [ROWS, BLOCK_R] of a tensor [R, N]
    mask_by_rows = mask_r[None, :] & mask_rows[:, None]
    tl.store(similarity_ptr + by_rows, similarity, mask=mask_by_rows)

    read_rows = tl.load(read_weights_ptr + by_rows, mask=mask_by_rows, other=0.0).to(COMPUTE)
    forward = tl.zeros([ROWS, BLOCK_R], COMPUTE)
    for start in range(0, N, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask_columns = columns < N
        write_columns = tl.load(new_write_weights_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
        precedence = tl.load(precedence_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
        at_link = rows[:, None] * N + columns[None, :]
        mask_link = mask_rows[:, None] & mask_columns[None, :]
        link = tl.load(link_ptr + at_link, mask=mask_link, other=0.0).to(COMPUTE)
        new_link = linked(link, rows, columns, write_rows, write_columns, precedence)
        link = rounded(tl.where(runs, new_link, link), new_link_ptr)
        tl.store(new_link_ptr + at_link, link, mask=mask_link)

        by_columns = offs_r[None, :] * N + columns[:, None]
        mask_by_columns = mask_r[None, :] & mask_columns[:, None]
        read_columns = tl.load(read_weights_ptr + by_columns, mask=mask_by_columns, other=0.0).to(COMPUTE)
        forward += matmul(link, read_columns)
        backward = matmul(tl.trans(link), read_rows)
        tl.store(backward_partial_ptr + block * R * N + by_columns, backward, mask=mask_by_columns)
    tl.store(forward_ptr + by_rows, forward, mask=mask_by_rows)


@triton.jit
def write_and_link_backward(
    block,
    interface_ptr,
    memory_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    new_memory_ptr,
    new_read_weights_ptr,
    new_write_weights_ptr,
    similarity_ptr,
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
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The adjoint of `write_and_link` for the rows of a block, after that of reading.

    Writes the gradient of its rows of the memory and link before the step; leaves gradients of the write weights by row
    [N] and by column [NUM_BLOCKS, N], of the precedence by column, of the previous read weights by row [R, N] and by
    column [NUM_BLOCKS, R, N], and its part [R + 2, W] of the gradients of the read keys, the erase vector and the write
    vector in `d_words_partial` [NUM_BLOCKS, R + 2, W]. Of an element that has ended (not `runs`) it reads and writes no
    rows.
    """
    WRITE_VECTOR: tl.constexpr = R * W + W
    ERASE_VECTOR: tl.constexpr = R * W + 2 * W + R + 1
    rows = block * ROWS + tl.arange(0, ROWS)
    offs_w = tl.arange(0, BLOCK_W)
    offs_r = tl.arange(0, BLOCK_R)
    mask_rows, mask_w, mask_r = (rows < N) & runs, offs_w < W, offs_r < R
    by_rows = offs_r[None, :] * N + rows[:, None]  # [ROWS, BLOCK_R] of a tensor [R, N]
    mask_by_rows = mask_r[None, :] & mask_rows[:, None]
    words = offs_r[:, None] * W + offs_w[None, :]  # [BLOCK_R, BLOCK_W] of a tensor [R, W]
    mask_words = mask_r[:, None] & mask_w[None, :]

    # what reading gives back to the new memory: the words read, and the content lookup
    offsets = rows[:, None] * W + offs_w[None, :]
    mask = mask_rows[:, None] & mask_w[None, :]
    new_memory = tl.load(new_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_new_memory = tl.load(d_new_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    new_read_rows = tl.load(new_read_weights_ptr + by_rows, mask=mask_by_rows, other=0.0).to(COMPUTE)
    d_read_words = tl.load(d_read_words_ptr + words, mask=mask_words, other=0.0).to(COMPUTE)
    d_new_memory += matmul(new_read_rows, d_read_words)

    keys = tl.load(interface_ptr + words, mask=mask_words, other=0.0).to(COMPUTE)
    key_norms = tl.sqrt(tl.sum(keys * keys, 1) + NORM_EPSILON)
    norm = tl.sqrt(tl.sum(new_memory * new_memory, 1) + NORM_EPSILON)
    similarity = tl.load(similarity_ptr + by_rows, mask=mask_by_rows, other=0.0)
    d_dot = tl.load(d_similarity_ptr + by_rows, mask=mask_by_rows, other=0.0)
    d_dot = d_dot / (norm[:, None] * key_norms[None, :] + SIMILARITY_EPSILON)
    d_norms = -d_dot * similarity
    d_new_memory += matmul(d_dot, keys)
    d_new_memory += (tl.sum(d_norms * key_norms[None, :], 1) / norm)[:, None] * new_memory
    d_keys = matmul(tl.trans(d_dot), new_memory)
    d_keys += (tl.sum(d_norms * norm[:, None], 0) / key_norms)[:, None] * keys
    partial_ptr = d_words_partial_ptr + block * (R + 2) * W
    tl.store(partial_ptr + words, d_keys, mask=mask_words)

    # the write: M' = M (1 − w eᵀ) + w vᵀ
    write_rows = tl.load(new_write_weights_ptr + rows, mask=mask_rows, other=0.0).to(COMPUTE)
    erase = gate(tl.load(interface_ptr + ERASE_VECTOR + offs_w, mask=mask_w, other=0.0).to(COMPUTE), RAW)
    write = tl.load(interface_ptr + WRITE_VECTOR + offs_w, mask=mask_w, other=0.0).to(COMPUTE)
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_memory = d_new_memory * (1.0 - write_rows[:, None] * erase[None, :])
    tl.store(d_memory_ptr + offsets, d_memory, mask=mask)
    d_write_rows = tl.sum(d_new_memory * (write[None, :] - memory * erase[None, :]), 1)
    d_erase = d_gate(-tl.sum(d_new_memory * memory * write_rows[:, None], 0), erase, RAW)
    tl.store(partial_ptr + R * W + offs_w, d_erase, mask=mask_w)
    tl.store(partial_ptr + (R + 1) * W + offs_w, tl.sum(d_new_memory * write_rows[:, None], 0), mask=mask_w)

    # the link, with S the gradient of L' after adding what its two readers give back, 0 on the diagonal
    read_rows = tl.load(read_weights_ptr + by_rows, mask=mask_by_rows, other=0.0).to(COMPUTE)
    d_forward_rows = tl.load(d_forward_ptr + by_rows, mask=mask_by_rows, other=0.0)
    d_read_rows = tl.zeros([ROWS, BLOCK_R], COMPUTE)
    for start in range(0, N, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask_columns = columns < N
        write_columns = tl.load(new_write_weights_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
        precedence = tl.load(precedence_ptr + columns, mask=mask_columns, other=0.0).to(COMPUTE)
        by_columns = offs_r[:, None] * N + columns[None, :]  # [BLOCK_R, COLUMNS] of a tensor [R, N]
        mask_by_columns = mask_r[:, None] & mask_columns[None, :]
        read_columns = tl.load(read_weights_ptr + by_columns, mask=mask_by_columns, other=0.0).to(COMPUTE)
        d_backward_columns = tl.load(d_backward_ptr + by_columns, mask=mask_by_columns, other=0.0)

        at_link = rows[:, None] * N + columns[None, :]
        mask_link = mask_rows[:, None] & mask_columns[None, :]
        link = tl.load(link_ptr + at_link, mask=mask_link, other=0.0).to(COMPUTE)
        d_link = tl.load(d_new_link_ptr + at_link, mask=mask_link, other=0.0).to(COMPUTE)
        d_link += matmul(d_forward_rows, read_columns) + matmul(read_rows, d_backward_columns)
        d_link = tl.where(rows[:, None] == columns[None, :], 0.0, d_link)
        decay = 1.0 - write_rows[:, None] - write_columns[None, :]
        tl.store(d_link_ptr + at_link, decay * d_link, mask=mask_link)

        d_write_rows += tl.sum(d_link * (precedence[None, :] - link), 1)
        at_columns = block * N + columns
        tl.store(d_write_columns_ptr + at_columns, -tl.sum(d_link * link, 0), mask=mask_columns)
        d_precedence = tl.sum(d_link * write_rows[:, None], 0)
        tl.store(d_precedence_columns_ptr + at_columns, d_precedence, mask=mask_columns)

        link = linked(link, rows, columns, write_rows, write_columns, precedence)
        d_read_rows += matmul(link, tl.trans(d_backward_columns))
        d_read_columns = matmul(tl.trans(d_forward_rows), link)
        tl.store(d_read_columns_ptr + block * R * N + by_columns, d_read_columns, mask=mask_by_columns)
    tl.store(d_write_rows_ptr + rows, d_write_rows, mask=mask_rows)
    tl.store(d_read_rows_ptr + by_rows, d_read_rows, mask=mask_by_rows)
