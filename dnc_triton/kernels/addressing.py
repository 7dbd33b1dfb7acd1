"""Phase one of a step, a program per batch element: usage, allocation, write content lookup, write weights, precedence.

Its adjoint is the last phase of the backward. All pointers are those of one batch element.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.common import (
    NORM_EPSILON,
    SIMILARITY_EPSILON,
    USAGE_EPSILON,
    add_parts,
    d_gate,
    d_strength,
    gate,
    rounded,
    softmax,
    strength,
)


@triton.jit
def in_allocation(usage):
    """Usage as the allocation sees it, ε + (1 − ε)u."""
    return usage * (1.0 - USAGE_EPSILON) + USAGE_EPSILON


@triton.jit
def sort_key(usage, offs_n, mask_n, COMPUTE: tl.constexpr):
    """Integers that sort as the free list does: 1 − u descending, the lower slot first; the slot in the low bits.

    A number that is not negative sorts as its bits do. In float64 the slot takes the place of the last 9 bits, and has
    10. A NaN sorts first, and makes all that comes after it one too.
    """
    free = tl.maximum(1.0 - in_allocation(usage), 0.0)
    free = tl.where(usage == usage, free, 2.0)  # the bits of a NaN may sort anywhere; compiled, the maximum drops it
    if COMPUTE == tl.float64:
        taken = 0x3FF0000000000000 - free.to(tl.int64, bitcast=True)
        key = ((taken << 1) & -1024) | offs_n
    else:
        taken = 0x3F800000 - free.to(tl.int32, bitcast=True)
        key = (taken.to(tl.int64) << 32) | offs_n
    return tl.where(mask_n, key, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def free_slots(usage_ptr, free_list_ptr, offs_n, mask_n, COMPUTE: tl.constexpr):
    """Along the free list: its slots, their usage x and that of the one before (1 before the first).

    Usage comes back through memory: between threads that is as cheap as anything else.
    """
    slots = tl.load(free_list_ptr + offs_n, mask=mask_n, other=0)
    before = tl.load(free_list_ptr + offs_n - 1, mask=mask_n & (offs_n > 0), other=0)
    x = in_allocation(tl.load(usage_ptr + slots, mask=mask_n, other=0.0).to(COMPUTE))
    x_before = in_allocation(tl.load(usage_ptr + before, mask=mask_n, other=0.0).to(COMPUTE))
    return slots, x, tl.where(offs_n > 0, x_before, 1.0)


@triton.jit
def address(
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
    similarity_ptr,
    norm_ptr,
    free_list_ptr,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNK: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Where to write.

    Keeps allocation, similarity of the write key, norm of the words and free list, each [N], for the backward.
    """
    WRITE_KEY: tl.constexpr = R * W
    WRITE_STRENGTH: tl.constexpr = R * W + 2 * W + R
    FREE_GATES: tl.constexpr = WRITE_STRENGTH + 1 + W
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    retention = tl.full([BLOCK_N], 1.0, COMPUTE)
    for head in range(R):
        free_gate = gate(tl.load(interface_ptr + FREE_GATES + head).to(COMPUTE), RAW)
        weights = tl.load(read_weights_ptr + head * N + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        retention = retention * (1.0 - free_gate * weights)
    usage = tl.load(usage_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    written = tl.load(write_weights_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    usage = rounded((usage + (1.0 - usage) * written) * retention, new_usage_ptr)
    tl.store(new_usage_ptr + offs_n, usage, mask=mask_n)

    key = tl.sort(sort_key(usage, offs_n, mask_n, COMPUTE))
    SLOTS: tl.constexpr = 1023 if COMPUTE == tl.float64 else 2047
    tl.store(free_list_ptr + offs_n, (key & SLOTS).to(tl.int32), mask=mask_n)

    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    write_key = tl.load(interface_ptr + WRITE_KEY + offs_w, mask=mask_w, other=0.0).to(COMPUTE)
    key_norm = tl.sqrt(tl.sum(write_key * write_key) + NORM_EPSILON)
    for start in range(0, N, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        mask = (rows < N)[:, None] & mask_w[None, :]
        memory = tl.load(memory_ptr + rows[:, None] * W + offs_w[None, :], mask=mask, other=0.0).to(COMPUTE)
        norm = tl.sqrt(tl.sum(memory * memory, 1) + NORM_EPSILON)
        similarity = tl.sum(memory * write_key[None, :], 1) / (norm * key_norm + SIMILARITY_EPSILON)
        tl.store(similarity_ptr + rows, similarity, mask=rows < N)
        tl.store(norm_ptr + rows, norm, mask=rows < N)

    tl.debug_barrier()  # usage, free list and similarity are read by other threads than wrote them
    slots, x, x_before = free_slots(new_usage_ptr, free_list_ptr, offs_n, mask_n, COMPUTE)
    tl.store(allocation_ptr + slots, (1.0 - x) * tl.cumprod(x_before, 0), mask=mask_n)
    tl.debug_barrier()  # from the order of the free list to that of the slots
    allocation = tl.load(allocation_ptr + offs_n, mask=mask_n, other=0.0)

    similarities = tl.load(similarity_ptr + offs_n, mask=mask_n, other=0.0)
    write_strength = strength(tl.load(interface_ptr + WRITE_STRENGTH).to(COMPUTE), RAW, STRENGTH_OFFSET)
    content = softmax(similarities * write_strength, mask_n, 0)
    allocation_gate = gate(tl.load(interface_ptr + FREE_GATES + R).to(COMPUTE), RAW)
    write_gate = gate(tl.load(interface_ptr + FREE_GATES + R + 1).to(COMPUTE), RAW)
    mixed = allocation_gate * allocation + (1.0 - allocation_gate) * content
    write_weights = rounded(write_gate * mixed, new_write_weights_ptr)
    tl.store(new_write_weights_ptr + offs_n, write_weights, mask=mask_n)

    precedence = tl.load(precedence_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    precedence = (1.0 - tl.sum(write_weights)) * precedence + write_weights
    tl.store(new_precedence_ptr + offs_n, precedence, mask=mask_n)


@triton.jit
def by_write_weights(
    precedence_ptr,
    new_write_weights_ptr,
    d_new_precedence_ptr,
    d_new_write_weights_ptr,
    d_write_rows_ptr,
    d_write_columns_ptr,
    offs_n,
    mask_n,
    N: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The whole gradient of the write weights [BLOCK_N], 0 where there is no slot.

    By row the tiles of the link left COLUMN_BLOCKS parts, and the blocks of slots one more.
    """
    precedence = tl.load(precedence_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_new_precedence = tl.load(d_new_precedence_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_weights = tl.load(d_new_write_weights_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_weights += d_new_precedence - tl.sum(d_new_precedence * precedence)
    d_weights = add_parts(d_weights, d_write_rows_ptr + offs_n, mask_n, N, COLUMN_BLOCKS + 1)
    d_weights = add_parts(d_weights, d_write_columns_ptr + offs_n, mask_n, N, ROW_BLOCKS)
    return tl.where(mask_n, d_weights, 0.0)


@triton.jit
def by_scaled_similarity(
    interface_ptr,
    similarity_ptr,
    d_weights,
    offs_n,
    mask_n,
    W: tl.constexpr,
    R: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Of the write key: the content weights [BLOCK_N], and the gradient by what the softmax makes them from.

    The gates stay outside the difference, as the mode in `read_backward`.
    """
    WRITE_STRENGTH: tl.constexpr = R * W + 2 * W + R
    FREE_GATES: tl.constexpr = WRITE_STRENGTH + 1 + W
    write_strength = strength(tl.load(interface_ptr + WRITE_STRENGTH).to(COMPUTE), RAW, STRENGTH_OFFSET)
    allocation_gate = gate(tl.load(interface_ptr + FREE_GATES + R).to(COMPUTE), RAW)
    write_gate = gate(tl.load(interface_ptr + FREE_GATES + R + 1).to(COMPUTE), RAW)
    similarity = tl.load(similarity_ptr + offs_n, mask=mask_n, other=0.0)
    content = softmax(similarity * write_strength, mask_n, 0)
    d_scaled = write_gate * (1.0 - allocation_gate) * content * (d_weights - tl.sum(d_weights * content))
    return content, d_scaled


@triton.jit
def lookup_backward(
    part,
    interface_ptr,
    memory_ptr,
    similarity_ptr,
    norm_ptr,
    d_weights,
    d_words_partial_ptr,
    d_interface_ptr,
    d_memory_ptr,
    runs,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PLACES: tl.constexpr,
    SLOT_BLOCKS: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The adjoint of looking up the write key, for PLACES numbers of every word, those of this part.

    Adds to the gradient by the memory. Writes that by the write key, and those by the read keys, the erase vector and
    the write vector, of which each block of slots left a part in `d_words_partial` [SLOT_BLOCKS, R + 2, W].
    """
    WRITE_KEY: tl.constexpr = R * W
    WRITE_STRENGTH: tl.constexpr = R * W + 2 * W + R
    offs_n, offs_p, offs_w = tl.arange(0, BLOCK_N), part * PLACES + tl.arange(0, PLACES), tl.arange(0, BLOCK_W)
    mask_n, mask_p = (offs_n < N) & runs, offs_p < W

    VECTORS: tl.constexpr = 2 * BLOCK_R if BLOCK_R > 1 else 4  # R + 2 at least
    vectors = tl.arange(0, VECTORS)
    mask_vectors = (vectors < R + 2)[:, None] & mask_p[None, :]
    parts_ptr = d_words_partial_ptr + vectors[:, None] * W + offs_p[None, :]
    d_vectors = tl.zeros([VECTORS, PLACES], COMPUTE)
    d_vectors = add_parts(d_vectors, parts_ptr, mask_vectors, (R + 2) * W, SLOT_BLOCKS)
    place = tl.where(vectors < R, vectors * W, tl.where(vectors == R, WRITE_STRENGTH + 1, WRITE_KEY + W))
    tl.store(d_interface_ptr + place[:, None] + offs_p[None, :], d_vectors, mask=mask_vectors)

    offsets, mask = offs_n[:, None] * W + offs_p[None, :], mask_n[:, None] & mask_p[None, :]
    memory = tl.load(memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_memory = tl.load(d_memory_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=1.0)
    similarity = tl.load(similarity_ptr + offs_n, mask=mask_n, other=0.0)
    whole_key = tl.load(interface_ptr + WRITE_KEY + offs_w, mask=offs_w < W, other=0.0).to(COMPUTE)
    key = tl.load(interface_ptr + WRITE_KEY + offs_p, mask=mask_p, other=0.0).to(COMPUTE)
    key_norm = tl.sqrt(tl.sum(whole_key * whole_key) + NORM_EPSILON)
    write_strength = strength(tl.load(interface_ptr + WRITE_STRENGTH).to(COMPUTE), RAW, STRENGTH_OFFSET)
    _, d_scaled = by_scaled_similarity(
        interface_ptr, similarity_ptr, d_weights, offs_n, mask_n, W, R, RAW, STRENGTH_OFFSET, COMPUTE
    )
    d_dot = d_scaled * write_strength / (norm * key_norm + SIMILARITY_EPSILON)
    d_norms = -d_dot * similarity
    d_memory += d_dot[:, None] * key[None, :] + (d_norms * key_norm / norm)[:, None] * memory
    tl.store(d_memory_ptr + offsets, d_memory, mask=mask)
    d_key = tl.sum(d_dot[:, None] * memory, 0) + tl.sum(d_norms * norm) / key_norm * key
    tl.store(d_interface_ptr + WRITE_KEY + offs_p, d_key, mask=mask_p)


@triton.jit
def address_backward(
    first_head,
    last_head,
    interface_ptr,
    usage_ptr,
    read_weights_ptr,
    write_weights_ptr,
    new_usage_ptr,
    new_write_weights_ptr,
    allocation_ptr,
    similarity_ptr,
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
    scratch_ptr,
    runs,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    RAW: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    STOP_USAGE_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The adjoint of `address` but for its lookup in memory, after that of linking, from `by_write_weights`.

    Takes in what the tiles left: parts of the gradients by column of the precedence [ROW_BLOCKS, N], and by row
    [COLUMN_BLOCKS, R, N] and by column [ROW_BLOCKS, R, N] of the previous read weights. Of those it writes the heads
    from `first_head` on, up to `last_head`; and all else if the first is among them. `scratch` is [N]. Of an element
    that has ended (not `runs`) no gradient by the state is written.
    """
    WRITE_STRENGTH: tl.constexpr = R * W + 2 * W + R
    FREE_GATES: tl.constexpr = WRITE_STRENGTH + 1 + W
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N) & runs
    allocation_gate = gate(tl.load(interface_ptr + FREE_GATES + R).to(COMPUTE), RAW)
    write_gate = gate(tl.load(interface_ptr + FREE_GATES + R + 1).to(COMPUTE), RAW)
    d_mixed = d_weights * write_gate
    tl.store(scratch_ptr + offs_n, d_mixed * allocation_gate, mask=mask_n)  # by the allocation
    tl.debug_barrier()  # read below along the free list

    # allocation, along the free list: dx_j = −d_j P_j + (Σ_{i>j} d_i a_i) / x_j
    slots, x, x_before = free_slots(new_usage_ptr, free_list_ptr, offs_n, mask_n, COMPUTE)
    product = tl.cumprod(x_before, 0)
    d_allocation = tl.load(scratch_ptr + slots, mask=mask_n, other=0.0)
    # The sum over the later slots: each term from the place before it, so that no sum has to be taken apart again.
    has_next = mask_n & (offs_n < N - 1)
    next_slots = tl.load(free_list_ptr + offs_n + 1, mask=has_next, other=0)
    d_next = tl.load(scratch_ptr + next_slots, mask=has_next, other=0.0)
    allocation_next = tl.load(allocation_ptr + next_slots, mask=has_next, other=0.0)
    later = tl.cumsum(d_next * allocation_next, 0, reverse=True)
    d_x = later / x - d_allocation * product
    tl.debug_barrier()  # all have read the scratch that is written again
    tl.store(scratch_ptr + slots, d_x * (1.0 - USAGE_EPSILON), mask=mask_n)
    tl.debug_barrier()
    d_usage = tl.load(scratch_ptr + offs_n, mask=mask_n, other=0.0)
    d_usage += tl.load(d_new_usage_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)

    # usage: u' = (u + (1 − u) w) ψ, and retention: ψ = ∏_r (1 − f_r w_r)
    usage = tl.load(usage_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    written = tl.load(write_weights_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    retention = tl.full([BLOCK_N], 1.0, COMPUTE)
    for head in range(R):
        free_gate = gate(tl.load(interface_ptr + FREE_GATES + head).to(COMPUTE), RAW)
        weights = tl.load(read_weights_ptr + head * N + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        retention = retention * (1.0 - free_gate * weights)
    d_kept = d_usage * retention
    if first_head == 0:
        tl.store(d_usage_ptr + offs_n, d_kept * (1.0 - written), mask=mask_n)
        d_written = d_kept * (1.0 - usage)
        if STOP_USAGE_GRADIENT:
            d_written = tl.zeros([BLOCK_N], COMPUTE)
        tl.store(d_write_weights_ptr + offs_n, d_written, mask=mask_n)

        # write weights: w = gʷ (gᵃ a + (1 − gᵃ) c)
        content, d_scaled = by_scaled_similarity(
            interface_ptr, similarity_ptr, d_weights, offs_n, mask_n, W, R, RAW, STRENGTH_OFFSET, COMPUTE
        )
        allocation = tl.load(allocation_ptr + offs_n, mask=mask_n, other=0.0)
        similarity = tl.load(similarity_ptr + offs_n, mask=mask_n, other=0.0)
        d_allocation_gate = tl.sum(d_mixed * (allocation - content))
        d_write_gate = tl.sum(d_weights * (allocation_gate * allocation + (1.0 - allocation_gate) * content))
        tl.store(d_interface_ptr + FREE_GATES + R, d_gate(d_allocation_gate, allocation_gate, RAW))
        tl.store(d_interface_ptr + FREE_GATES + R + 1, d_gate(d_write_gate, write_gate, RAW))
        raw_strength = tl.load(interface_ptr + WRITE_STRENGTH).to(COMPUTE)
        d_write_strength = d_strength(tl.sum(d_scaled * similarity), raw_strength, RAW)
        tl.store(d_interface_ptr + WRITE_STRENGTH, d_write_strength)

        # precedence: p' = (1 − Σ w) p + w
        write_weights = tl.load(new_write_weights_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        d_new_precedence = tl.load(d_new_precedence_ptr + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        d_precedence = (1.0 - tl.sum(write_weights)) * d_new_precedence
        d_precedence = add_parts(d_precedence, d_precedence_columns_ptr + offs_n, mask_n, N, ROW_BLOCKS)
        tl.store(d_precedence_ptr + offs_n, d_precedence, mask=mask_n)
    d_retention = d_usage * (usage + (1.0 - usage) * written)
    for head in range(first_head, last_head):
        # The product of the other heads' factors is multiplied out: one's own may be 0.
        others = tl.full([BLOCK_N], 1.0, COMPUTE)
        for other in range(R):
            free_gate = gate(tl.load(interface_ptr + FREE_GATES + other).to(COMPUTE), RAW)
            weights = tl.load(read_weights_ptr + other * N + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
            others = others * tl.where(other == head, 1.0, 1.0 - free_gate * weights)
        d_factor = d_retention * others
        free_gate = gate(tl.load(interface_ptr + FREE_GATES + head).to(COMPUTE), RAW)
        weights = tl.load(read_weights_ptr + head * N + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        tl.store(d_interface_ptr + FREE_GATES + head, d_gate(-tl.sum(d_factor * weights), free_gate, RAW))
        at_head = head * N + offs_n
        d_read = add_parts(-d_factor * free_gate, d_read_rows_ptr + at_head, mask_n, R * N, COLUMN_BLOCKS)
        d_read = add_parts(d_read, d_read_columns_ptr + at_head, mask_n, R * N, ROW_BLOCKS)
        tl.store(d_read_weights_ptr + at_head, d_read, mask=mask_n)
