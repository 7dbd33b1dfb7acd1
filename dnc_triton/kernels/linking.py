"""Phase two of a step: update the link, a program per tile of it, and write to memory, a program per block of slots.

With all phases in one launch a tile is small and in registers as a whole (`link_tile`). In a launch of its own the
phase takes a tile in strips (`link_strips`): the more rows a tile has, the fewer partial sums are left, and while a
strip is computed the next one is being loaded.

Their adjoints are the middle phase of the backward. Sums over rows and columns of the link, which span several tiles,
are left as a partial sum for each tile: nothing is added atomically, so the same call gives the same bits. The tuples
of pointers are those of `buffers`, of one batch element.

Products with the read heads' vectors are made by multiplying and adding up, for HEADS heads at a time: [heads, rows,
columns]. As matrix products, a few heads wide, they would go through shared memory, which took several times as long.
"""

# Device functions grow tuples, the only kind of list that Triton has: by concatenation, not unpacking, to any length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl

from dnc_triton.kernels.buffers import FRESH
from dnc_triton.kernels.common import NORM_EPSILON, SIMILARITY_EPSILON, d_gate, gate, rounded, term, tile_term


@triton.jit
def of_heads(first, by, mask, sizes: tl.constexpr):
    """Offsets in [R, N] of entries `by` of HEADS heads, from head `first` on, and the mask of those that exist."""
    heads = first + tl.arange(0, sizes.HEADS)[:, None]
    return heads * sizes.N + by, (heads < sizes.R) & mask


@triton.jit
def linked(link, rows, columns, write_rows, write_columns, precedence):
    """L' of a tile from L: (1 − w[i] − w[j]) L[i,j] + w[i] p[j], and 0 on the diagonal."""
    link = (1.0 - write_rows - write_columns) * link + write_rows * precedence
    return tl.where(rows == columns, 0.0, link)


@triton.jit
def made_again(link, rows, columns, by_row, by_column, mask_rows, mask_columns, old, behind, sizes: tl.constexpr):
    """A tile of the link before a step, recomputed from the one that lies behind it, to the bits that steps left."""
    COMPUTE: tl.constexpr = sizes.COMPUTE
    for done in range(behind.steps):
        row = behind.row.to(tl.int64) if sizes.FAR else behind.row
        back, row = behind.steps - done, row * (128 // old.precedence.dtype.element_ty.primitive_bitwidth)
        write_ptr, precedence_ptr = old.write_weights - (back - 1) * row, old.precedence - back * row
        write_rows = tl.load(write_ptr + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
        write_columns = tl.load(write_ptr + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
        precedence = tl.load(precedence_ptr + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
        if behind.mark is not None:
            fresh = tl.load(behind.mark - back * behind.marks_row) & FRESH != 0
            link, precedence = tl.where(fresh, 0.0, link), tl.where(fresh, 0.0, precedence)
        link = rounded(linked(link, rows, columns, write_rows, write_columns, precedence), old.link)
    return link


@triton.jit
def link_tile(tile, old, new, scratch, runs, sizes: tl.constexpr):
    """Update a tile of the link, and leave its part of forward and backward weights.

    The link of an element that has ended (not `runs`) stays as it is.
    """
    N: tl.constexpr = sizes.N
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    row_block, column_block = tile // sizes.COLUMN_BLOCKS, tile % sizes.COLUMN_BLOCKS
    by_row = row_block * sizes.ROWS + tl.arange(0, sizes.ROWS)[None, :]
    by_column = column_block * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)[None, :]
    mask_rows, mask_columns = by_row < N, by_column < N
    rows, columns = by_row[:, :, None], by_column[:, None, :]
    at_link, mask = rows * N + columns, mask_rows[:, :, None] & mask_columns[:, None, :]
    link = tl.load(old.link + at_link, mask=mask, other=0.0).to(COMPUTE)
    write_rows = tl.load(new.write_weights + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
    write_columns = tl.load(new.write_weights + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    precedence = tl.load(old.precedence + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    new_link = linked(link, rows, columns, write_rows, write_columns, precedence)
    link = rounded(tl.where(runs, new_link, link), new.link)
    for head in range(0, R, sizes.HEADS):
        at_rows, mask_at_rows = of_heads(head, by_row, mask_rows, sizes)
        at_columns, mask_at_columns = of_heads(head, by_column, mask_columns, sizes)
        read_rows = tl.load(old.read_weights + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
        read_columns = tl.load(old.read_weights + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
        forward = tl.sum(tile_term(link, read_columns[:, None, :], sizes), 2)
        backward = tl.sum(tile_term(link, read_rows[:, :, None], sizes), 1)
        tl.store(scratch.forward + column_block * R * N + at_rows, forward, mask=mask_at_rows)
        tl.store(scratch.backward + row_block * R * N + at_columns, backward, mask=mask_at_columns)
    tl.store(new.link + at_link, link, mask=mask)


@triton.jit
def link_strips(tile, old, new, scratch, runs, sizes: tl.constexpr):
    """As `link_tile`, one strip of the tile's rows after another, the next one's link being loaded meanwhile.

    Sums for the columns are added up over the strips in registers, and stored once.
    """
    N: tl.constexpr = sizes.N
    R: tl.constexpr = sizes.R
    HEADS: tl.constexpr = sizes.HEADS
    COMPUTE: tl.constexpr = sizes.COMPUTE
    row_block, column_block = tile // sizes.COLUMN_BLOCKS, tile % sizes.COLUMN_BLOCKS
    by_column = column_block * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)[None, :]
    mask_columns, columns = by_column < N, by_column[:, None, :]
    write_columns = tl.load(new.write_weights + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    precedence = tl.load(old.precedence + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    totals = ()
    for _ in tl.static_range(0, R, HEADS):
        totals = totals + (tl.full([HEADS, sizes.COLUMNS], 0.0, COMPUTE),)
    end = tl.minimum((row_block + 1) * sizes.ROWS, N)
    by_row = row_block * sizes.ROWS + tl.arange(0, sizes.STRIP)[None, :]
    at_link, mask = by_row[:, :, None] * N + columns, (by_row < end)[:, :, None] & mask_columns[:, None, :]
    next_link = tl.load(old.link + at_link, mask=mask, other=0.0)
    for _ in range(0, sizes.ROWS, sizes.STRIP):
        rows, mask_rows, link = by_row[:, :, None], by_row < end, next_link.to(COMPUTE)
        at_link, mask = rows * N + columns, mask_rows[:, :, None] & mask_columns[:, None, :]
        if sizes.ROWS > sizes.STRIP:
            at_next = at_link + sizes.STRIP * N
            mask_next = (rows + sizes.STRIP < end) & mask_columns[:, None, :]
            next_link = tl.load(old.link + at_next, mask=mask_next, other=0.0)
        write_rows = tl.load(new.write_weights + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
        new_link = linked(link, rows, columns, write_rows, write_columns, precedence)
        link = rounded(tl.where(runs, new_link, link), new.link)
        forward, added = (), ()
        for group in tl.static_range(0, R, HEADS):
            at_rows, mask_at_rows = of_heads(group, by_row, mask_rows, sizes)
            at_columns, mask_at_columns = of_heads(group, by_column, mask_columns, sizes)
            read_rows = tl.load(old.read_weights + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
            read_columns = tl.load(old.read_weights + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
            forward = forward + (tl.sum(tile_term(link, read_columns[:, None, :], sizes), 2),)
            added = added + (totals[group // HEADS] + tl.sum(tile_term(link, read_rows[:, :, None], sizes), 1),)
        totals = added
        tl.store(new.link + at_link, link, mask=mask)
        for group in tl.static_range(0, R, HEADS):
            at_rows, mask_at_rows = of_heads(group, by_row, mask_rows, sizes)
            tl.store(scratch.forward + column_block * R * N + at_rows, forward[group // HEADS], mask=mask_at_rows)
        by_row += sizes.STRIP
    for group in tl.static_range(0, R, HEADS):
        at_columns, mask_at_columns = of_heads(group, by_column, mask_columns, sizes)
        tl.store(scratch.backward + row_block * R * N + at_columns, totals[group // HEADS], mask=mask_at_columns)


@triton.jit
def write(block, interface, old, new, kept, runs, sizes: tl.constexpr):
    """Write to the slots of a block, and keep the similarity of their new words to the read keys.

    The memory of an element that has ended (not `runs`) stays as it is.
    """
    N: tl.constexpr = sizes.N
    W: tl.constexpr = sizes.W
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    by_slot, by_place = block * sizes.SLOTS + tl.arange(0, sizes.SLOTS)[None, :], tl.arange(0, sizes.BLOCK_W)[None, :]
    mask_slots, mask_places = by_slot < N, by_place < W
    offsets = by_slot[:, :, None] * W + by_place[:, None, :]
    mask = mask_slots[:, :, None] & mask_places[:, None, :]
    memory = tl.load(old.memory + offsets, mask=mask, other=0.0).to(COMPUTE)
    weights = tl.load(new.write_weights + by_slot, mask=mask_slots, other=0.0).to(COMPUTE)[:, :, None]
    erase = gate(tl.load(interface.erase_vectors + by_place, mask=mask_places, other=0.0).to(COMPUTE), sizes)
    word = tl.load(interface.write_vectors + by_place, mask=mask_places, other=0.0).to(COMPUTE)
    written = memory * (1.0 - weights * erase[:, None, :]) + weights * word[:, None, :]
    memory = rounded(tl.where(runs, written, memory), new.memory)

    norm = tl.sqrt(tl.sum(tile_term(memory, memory, sizes), 2) + NORM_EPSILON)
    for head in range(0, R, sizes.HEADS):
        heads = head + tl.arange(0, sizes.HEADS)[:, None]
        mask_keys = (heads < R) & mask_places
        keys = tl.load(interface.read_keys + heads * W + by_place, mask=mask_keys, other=0.0).to(COMPUTE)
        norms = norm * tl.sqrt(tl.sum(term(keys, keys), 1, keep_dims=True) + NORM_EPSILON)
        similarity = tl.sum(tile_term(memory, keys[:, None, :], sizes), 2) / (norms + SIMILARITY_EPSILON)
        tl.store(kept.read_similarity + heads * N + by_slot, similarity, mask=(heads < R) & mask_slots)
    tl.store(new.memory + offsets, memory, mask=mask)


@triton.jit
def link_tile_backward(tile, old, new, d_new, d_old, scratch, runs, sizes: tl.constexpr):
    """The adjoint of `link_tile`, after that of reading.

    Writes the gradient of the tile before the step; leaves parts of the gradients of the write weights, the precedence
    and the previous read weights. For an element that has ended (not `runs`) it reads and writes no rows.
    """
    N: tl.constexpr = sizes.N
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    row_block, column_block = tile // sizes.COLUMN_BLOCKS, tile % sizes.COLUMN_BLOCKS
    by_row = row_block * sizes.ROWS + tl.arange(0, sizes.ROWS)[None, :]
    by_column = column_block * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)[None, :]
    mask_rows, mask_columns = (by_row < N) & runs, by_column < N
    rows, columns = by_row[:, :, None], by_column[:, None, :]
    at_link, mask = rows * N + columns, mask_rows[:, :, None] & mask_columns[:, None, :]
    link = tl.load(old.link + at_link, mask=mask, other=0.0).to(COMPUTE)
    d_link = tl.load(d_new.link + at_link, mask=mask, other=0.0).to(COMPUTE)
    write_rows = tl.load(new.write_weights + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
    write_columns = tl.load(new.write_weights + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    precedence = tl.load(old.precedence + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    # S, the gradient of L' plus what forward and backward weights send back to it, 0 on the diagonal
    for head in tl.range(0, R, sizes.HEADS, loop_unroll_factor=1):  # unrolled, it would not fit in registers
        at_rows, mask_at_rows = of_heads(head, by_row, mask_rows, sizes)
        at_columns, mask_at_columns = of_heads(head, by_column, mask_columns, sizes)
        read_rows = tl.load(old.read_weights + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
        read_columns = tl.load(old.read_weights + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
        d_forward = tl.load(scratch.d_forward + at_rows, mask=mask_at_rows, other=0.0)
        d_backward = tl.load(scratch.d_backward + at_columns, mask=mask_at_columns, other=0.0)
        d_link += tl.sum(tile_term(d_forward[:, :, None], read_columns[:, None, :], sizes), 0, keep_dims=True)
        d_link += tl.sum(tile_term(read_rows[:, :, None], d_backward[:, None, :], sizes), 0, keep_dims=True)
    d_link = tl.where(rows == columns, 0.0, d_link)
    tl.store(d_old.link + at_link, (1.0 - write_rows - write_columns) * d_link, mask=mask)
    d_write_rows = tl.sum(tile_term(d_link, precedence - link, sizes), 2)
    tl.store(scratch.d_write_rows + column_block * N + by_row, d_write_rows, mask=mask_rows)
    at_partial = row_block * N + by_column
    tl.store(scratch.d_write_columns + at_partial, -tl.sum(tile_term(d_link, link, sizes), 1), mask=mask_columns)
    tl.store(scratch.d_precedence + at_partial, tl.sum(tile_term(d_link, write_rows, sizes), 1), mask=mask_columns)

    link = linked(link, rows, columns, write_rows, write_columns, precedence)
    for head in tl.range(0, R, sizes.HEADS, loop_unroll_factor=1):
        at_rows, mask_at_rows = of_heads(head, by_row, mask_rows, sizes)
        at_columns, mask_at_columns = of_heads(head, by_column, mask_columns, sizes)
        d_forward = tl.load(scratch.d_forward + at_rows, mask=mask_at_rows, other=0.0)
        d_backward = tl.load(scratch.d_backward + at_columns, mask=mask_at_columns, other=0.0)
        d_rows = tl.sum(tile_term(link, d_backward[:, None, :], sizes), 2)
        d_columns = tl.sum(tile_term(link, d_forward[:, :, None], sizes), 1)
        tl.store(scratch.d_read_rows + column_block * R * N + at_rows, d_rows, mask=mask_at_rows)
        tl.store(scratch.d_read_columns + row_block * R * N + at_columns, d_columns, mask=mask_at_columns)


@triton.jit
def link_strips_backward(tile, old, new, d_new, d_old, scratch, runs, behind, sizes: tl.constexpr):
    """As `link_tile_backward`, in strips like `link_strips`; the old link may lie `behind`."""
    N: tl.constexpr = sizes.N
    R: tl.constexpr = sizes.R
    HEADS: tl.constexpr = sizes.HEADS
    COMPUTE: tl.constexpr = sizes.COMPUTE
    row_block, column_block = tile // sizes.COLUMN_BLOCKS, tile % sizes.COLUMN_BLOCKS
    by_column = column_block * sizes.COLUMNS + tl.arange(0, sizes.COLUMNS)[None, :]
    mask_columns, columns = by_column < N, by_column[:, None, :]
    write_columns = tl.load(new.write_weights + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    precedence = tl.load(old.precedence + by_column, mask=mask_columns, other=0.0).to(COMPUTE)[:, None, :]
    d_write_columns, d_precedence = tl.full([1, sizes.COLUMNS], 0.0, COMPUTE), tl.full([1, sizes.COLUMNS], 0.0, COMPUTE)
    totals = ()
    for _ in tl.static_range(0, R, HEADS):
        totals = totals + (tl.full([HEADS, sizes.COLUMNS], 0.0, COMPUTE),)
    end = tl.where(runs, tl.minimum((row_block + 1) * sizes.ROWS, N), 0)
    by_row = row_block * sizes.ROWS + tl.arange(0, sizes.STRIP)[None, :]
    at_link, mask = by_row[:, :, None] * N + columns, (by_row < end)[:, :, None] & mask_columns[:, None, :]
    next_link = tl.load(old.link + at_link, mask=mask, other=0.0)
    if sizes.FEW:
        next_d_link = tl.load(d_new.link + at_link, mask=mask, other=0.0)
    for _ in range(0, sizes.ROWS, sizes.STRIP):
        rows, mask_rows = by_row[:, :, None], by_row < end
        link = next_link.to(COMPUTE)
        at_link, mask = rows * N + columns, mask_rows[:, :, None] & mask_columns[:, None, :]
        if sizes.FEW:
            d_link = next_d_link.to(COMPUTE)
        else:  # too many heads: no registers to load it ahead
            d_link = tl.load(d_new.link + at_link, mask=mask, other=0.0).to(COMPUTE)
        if sizes.ROWS > sizes.STRIP:
            at_next = at_link + sizes.STRIP * N
            mask_next = (rows + sizes.STRIP < end) & mask_columns[:, None, :]
            next_link = tl.load(old.link + at_next, mask=mask_next, other=0.0)
            if sizes.FEW:
                next_d_link = tl.load(d_new.link + at_next, mask=mask_next, other=0.0)
        link = made_again(link, rows, columns, by_row, by_column, mask_rows, mask_columns, old, behind, sizes)
        write_rows = tl.load(new.write_weights + by_row, mask=mask_rows, other=0.0).to(COMPUTE)[:, :, None]
        for group in tl.static_range(0, R, HEADS):
            at_rows, mask_at_rows = of_heads(group, by_row, mask_rows, sizes)
            at_columns, mask_at_columns = of_heads(group, by_column, mask_columns, sizes)
            read_rows = tl.load(old.read_weights + at_rows, mask=mask_at_rows, other=0.0).to(COMPUTE)
            read_columns = tl.load(old.read_weights + at_columns, mask=mask_at_columns, other=0.0).to(COMPUTE)
            d_forward = tl.load(scratch.d_forward + at_rows, mask=mask_at_rows, other=0.0)
            d_backward = tl.load(scratch.d_backward + at_columns, mask=mask_at_columns, other=0.0)
            d_link += tl.sum(tile_term(d_forward[:, :, None], read_columns[:, None, :], sizes), 0, keep_dims=True)
            d_link += tl.sum(tile_term(read_rows[:, :, None], d_backward[:, None, :], sizes), 0, keep_dims=True)
        d_link = tl.where(rows == columns, 0.0, d_link)
        d_write_rows = tl.sum(tile_term(d_link, precedence - link, sizes), 2)
        d_write_columns -= tl.sum(tile_term(d_link, link, sizes), 1)
        d_precedence += tl.sum(tile_term(d_link, write_rows, sizes), 1)
        link = linked(link, rows, columns, write_rows, write_columns, precedence)
        d_rows, added = (), ()
        for group in tl.static_range(0, R, HEADS):
            at_rows, mask_at_rows = of_heads(group, by_row, mask_rows, sizes)
            at_columns, mask_at_columns = of_heads(group, by_column, mask_columns, sizes)
            d_forward = tl.load(scratch.d_forward + at_rows, mask=mask_at_rows, other=0.0)
            d_backward = tl.load(scratch.d_backward + at_columns, mask=mask_at_columns, other=0.0)
            d_rows = d_rows + (tl.sum(tile_term(link, d_backward[:, None, :], sizes), 2),)
            added = added + (totals[group // HEADS] + tl.sum(tile_term(link, d_forward[:, :, None], sizes), 1),)
        totals = added
        tl.store(d_old.link + at_link, (1.0 - write_rows - write_columns) * d_link, mask=mask)
        tl.store(scratch.d_write_rows + column_block * N + by_row, d_write_rows, mask=mask_rows)
        for group in tl.static_range(0, R, HEADS):
            at_rows, mask_at_rows = of_heads(group, by_row, mask_rows, sizes)
            tl.store(scratch.d_read_rows + column_block * R * N + at_rows, d_rows[group // HEADS], mask=mask_at_rows)
        by_row += sizes.STRIP
    at_partial = row_block * N + by_column
    tl.store(scratch.d_write_columns + at_partial, d_write_columns, mask=mask_columns)
    tl.store(scratch.d_precedence + at_partial, d_precedence, mask=mask_columns)
    for group in tl.static_range(0, R, HEADS):
        at_columns, mask_at_columns = of_heads(group, by_column, mask_columns, sizes)
        tl.store(scratch.d_read_columns + row_block * R * N + at_columns, totals[group // HEADS], mask=mask_at_columns)


@triton.jit
def write_backward(
    block, interface, old, new, kept, d_read_words_ptr, d_new, d_old, scratch, runs, sizes: tl.constexpr
):
    """The adjoint of `write`, after that of reading.

    Writes the gradient of the block's words before the step; leaves that of their slots' write weights, and its part of
    those of the read keys, the erase vector and the write vector. For an element that has ended (not `runs`) it reads
    and writes no slots.
    """
    N: tl.constexpr = sizes.N
    W: tl.constexpr = sizes.W
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    by_slot, by_place = block * sizes.SLOTS + tl.arange(0, sizes.SLOTS)[None, :], tl.arange(0, sizes.BLOCK_W)[None, :]
    mask_slots, mask_places = (by_slot < N) & runs, by_place < W
    offsets = by_slot[:, :, None] * W + by_place[:, None, :]
    mask = mask_slots[:, :, None] & mask_places[:, None, :]
    partial_ptr = scratch.d_vectors + block * (R + 2) * W + by_place

    # what reading sends back to the new memory: through the words read, and through the content lookup
    new_memory = tl.load(new.memory + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_new_memory = tl.load(d_new.memory + offsets, mask=mask, other=0.0).to(COMPUTE)
    memory = tl.load(old.memory + offsets, mask=mask, other=0.0).to(COMPUTE)
    weights = tl.load(new.write_weights + by_slot, mask=mask_slots, other=0.0).to(COMPUTE)[:, :, None]
    erase = gate(tl.load(interface.erase_vectors + by_place, mask=mask_places, other=0.0).to(COMPUTE), sizes)
    word = tl.load(interface.write_vectors + by_place, mask=mask_places, other=0.0).to(COMPUTE)
    norm = tl.sqrt(tl.sum(tile_term(new_memory, new_memory, sizes), 2) + NORM_EPSILON)
    for head in range(0, R, sizes.HEADS):
        heads = head + tl.arange(0, sizes.HEADS)[:, None]
        at_slots, mask_at_slots = heads * N + by_slot, (heads < R) & mask_slots
        at_words, mask_words = heads * W + by_place, (heads < R) & mask_places
        read_weights = tl.load(new.read_weights + at_slots, mask=mask_at_slots, other=0.0).to(COMPUTE)
        d_words = tl.load(d_read_words_ptr + at_words, mask=mask_words, other=0.0).to(COMPUTE)
        keys = tl.load(interface.read_keys + at_words, mask=mask_words, other=0.0).to(COMPUTE)
        similarity = tl.load(kept.read_similarity + at_slots, mask=mask_at_slots, other=0.0)
        d_dot = tl.load(scratch.d_similarity + at_slots, mask=mask_at_slots, other=0.0)
        key_norms = tl.sqrt(tl.sum(term(keys, keys), 1, keep_dims=True) + NORM_EPSILON)
        d_dot = d_dot / (norm * key_norms + SIMILARITY_EPSILON)
        d_norms = -d_dot * similarity
        by_norm = tl.sum(term(d_norms, key_norms), 0, keep_dims=True) / norm
        by_key_norm = tl.sum(term(d_norms, norm), 1, keep_dims=True) / key_norms
        d_new_memory += tl.sum(tile_term(read_weights[:, :, None], d_words[:, None, :], sizes), 0, keep_dims=True)
        by_keys = tl.sum(tile_term(d_dot[:, :, None], keys[:, None, :], sizes), 0, keep_dims=True)
        d_new_memory += by_keys + by_norm[:, :, None] * new_memory
        d_keys = tl.sum(tile_term(d_dot[:, :, None], new_memory, sizes), 1) + by_key_norm * keys
        tl.store(partial_ptr + heads * W, d_keys, mask=mask_words)

    # the write: M' = M (1 − w eᵀ) + w vᵀ
    tl.store(d_old.memory + offsets, d_new_memory * (1.0 - weights * erase[:, None, :]), mask=mask)
    d_write = tl.sum(tile_term(d_new_memory, word[:, None, :] - memory * erase[:, None, :], sizes), 2)
    tl.store(scratch.d_write_rows + sizes.COLUMN_BLOCKS * N + by_slot, d_write, mask=mask_slots)
    d_erase = d_gate(-tl.sum(tile_term(d_new_memory * memory, weights, sizes), 1), erase, sizes)
    tl.store(partial_ptr + R * W, d_erase, mask=mask_places)
    tl.store(partial_ptr + (R + 1) * W, tl.sum(tile_term(d_new_memory, weights, sizes), 1), mask=mask_places)
