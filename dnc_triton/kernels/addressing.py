"""Phase one of a step, a program per batch element: usage, allocation, write content lookup, write weights, precedence.

In a layout that ranks, what can be done for a few slots at a time is done before it, by many programs (`rank`). The
adjoint is the last phase of the backward. The tuples of pointers are those of `buffers`, of one batch element.
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
    term,
    tile_term,
)


@triton.jit
def in_allocation(usage):
    """Usage as the allocation sees it, ε + (1 − ε)u."""
    return usage * (1.0 - USAGE_EPSILON) + USAGE_EPSILON


@triton.jit
def taken(usage, COMPUTE: tl.constexpr):
    """Integers that sort as the free list does, 1 − u descending: in float32 from −2²³ to 127·2²³, in float64 longer.

    A float that is not negative sorts as its bits do. A NaN sorts first, and makes all that comes after it NaN too.
    """
    free = tl.maximum(1.0 - in_allocation(usage), 0.0)
    free = tl.where(usage == usage, free, 2.0)  # the bits of a NaN may sort anywhere; compiled, the maximum drops it
    if COMPUTE == tl.float64:
        bits = 0x3FF0000000000000 - free.to(tl.int64, bitcast=True)
    else:
        bits = 0x3F800000 - free.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def sort_key(usage, offs_n, mask_n, COMPUTE: tl.constexpr):
    """`taken` with the slot in the low bits, the lower slot first.

    In float64 the slot has 10 bits, which take the place of the last 9: of usages that differ in those alone the lower
    slot comes first, whereas `rank` still tells them apart.
    """
    if COMPUTE == tl.float64:
        key = ((taken(usage, COMPUTE) << 1) & -1024) | offs_n
    else:
        key = (taken(usage, COMPUTE).to(tl.int64) << 32) | offs_n
    return tl.where(mask_n, key, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def free_slots(usage_ptr, free_list_ptr, offs_n, mask_n, COMPUTE: tl.constexpr):
    """In the free list's order: the slots, the usage x of each and of the one before it (1 before the first).

    Usage is read back from memory, which is as cheap as any other exchange between threads.
    """
    slots = tl.load(free_list_ptr + offs_n, mask=mask_n, other=0)
    before = tl.load(free_list_ptr + offs_n - 1, mask=mask_n & (offs_n > 0), other=0)
    x = in_allocation(tl.load(usage_ptr + slots, mask=mask_n, other=0.0).to(COMPUTE))
    x_before = in_allocation(tl.load(usage_ptr + before, mask=mask_n, other=0.0).to(COMPUTE))
    return slots, x, tl.where(offs_n > 0, x_before, 1.0)


@triton.jit
def update_usage(interface, old, new, usage_ptr, offs_n, mask_n, sizes: tl.constexpr):
    """The usage of all slots [BLOCK_N] after the step, which it stores at `usage_ptr` as well."""
    COMPUTE: tl.constexpr = sizes.COMPUTE
    usage = tl.load(old.usage + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    written = tl.load(old.write_weights + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    retention = tl.full([sizes.BLOCK_N], 1.0, COMPUTE)
    for head in range(sizes.R):
        free_gate = gate(tl.load(interface.free_gates + head).to(COMPUTE), sizes)
        weights = tl.load(old.read_weights + head * sizes.N + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        retention = retention * (1.0 - free_gate * weights)
    usage = rounded((usage + (1.0 - usage) * written) * retention, new.usage)
    tl.store(usage_ptr + offs_n, usage, mask=mask_n)
    return usage


@triton.jit
def look_up(first, end, CHUNK: tl.constexpr, interface, old, kept, sizes: tl.constexpr):
    """Keeps the norms of the words before the step and their similarity to the write key, of slots `first` to `end`."""
    W: tl.constexpr = sizes.W
    COMPUTE: tl.constexpr = sizes.COMPUTE
    offs_w = tl.arange(0, sizes.BLOCK_W)
    mask_w = offs_w < W
    write_key = tl.load(interface.write_keys + offs_w, mask=mask_w, other=0.0).to(COMPUTE)
    key_norm = tl.sqrt(tl.sum(term(write_key, write_key)) + NORM_EPSILON)
    for start in range(first, end, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        mask = (rows < sizes.N)[:, None] & mask_w[None, :]
        memory = tl.load(old.memory + rows[:, None] * W + offs_w[None, :], mask=mask, other=0.0).to(COMPUTE)
        norm = tl.sqrt(tl.sum(tile_term(memory, memory, sizes), 1) + NORM_EPSILON)
        similarity = tl.sum(tile_term(memory, write_key[None, :], sizes), 1) / (norm * key_norm + SIMILARITY_EPSILON)
        tl.store(kept.write_similarity + rows, similarity, mask=rows < sizes.N)
        tl.store(kept.norms + rows, norm, mask=rows < sizes.N)


@triton.jit
def rank(block, interface, old, new, kept, scratch, sizes: tl.constexpr):
    """For RANKED slots, and in a launch before it, what `address` otherwise begins with: usage, free list and lookup.

    A slot's place in the free list is how many slots stand before it. Every program works out the usage of all slots
    itself, in a work space of its own: waiting for one another would take another launch.
    """
    N: tl.constexpr = sizes.N
    COMPUTE: tl.constexpr = sizes.COMPUTE
    LAST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if COMPUTE == tl.float64 else 0x7FFFFFFF
    offs_n = tl.arange(0, sizes.BLOCK_N)
    usage_ptr = scratch.usage + block * N
    update_usage(interface, old, new, usage_ptr, offs_n, offs_n < N, sizes)
    tl.debug_barrier()  # read by other threads than wrote it
    rows = block * sizes.RANKED + tl.arange(0, sizes.RANKED)
    usage = tl.load(usage_ptr + rows, mask=rows < N, other=0.0)
    tl.store(new.usage + rows, usage, mask=rows < N)
    slot_taken = taken(usage, COMPUTE)
    before = tl.full([sizes.RANKED, sizes.AGAINST], 0, tl.int32)
    others = tl.arange(0, sizes.AGAINST)
    next_usage = tl.load(usage_ptr + others, mask=others < N, other=0.0)
    for start in range(0, N, sizes.AGAINST):
        other_taken = tl.where(others < N, taken(next_usage, COMPUTE), LAST)[None, :]
        next_usage = tl.load(usage_ptr + others + sizes.AGAINST, mask=others + sizes.AGAINST < N, other=0.0)
        first = block * sizes.RANKED - start  # of the rows, among those they are compared with
        if (first >= 0) & (first < sizes.AGAINST):
            among = (other_taken == slot_taken[:, None]) & (others[None, :] < rows[:, None])
            before += ((other_taken < slot_taken[:, None]) | among).to(tl.int32)
        else:  # these others all precede the rows, and equal ones count as well, or all follow them
            up_to = slot_taken + (first > 0).to(tl.int32)
            before += (other_taken < up_to[:, None]).to(tl.int32)
        others += sizes.AGAINST
    tl.store(kept.free_list + tl.sum(before, 1), rows, mask=rows < N)
    look_up(block * sizes.RANKED, (block + 1) * sizes.RANKED, sizes.RANKED, interface, old, kept, sizes)


@triton.jit
def address(interface, old, new, kept, sizes: tl.constexpr):
    """Decides where to write; in a layout that ranks, after `rank`."""
    N: tl.constexpr = sizes.N
    COMPUTE: tl.constexpr = sizes.COMPUTE
    offs_n = tl.arange(0, sizes.BLOCK_N)
    mask_n = offs_n < N
    precedence = tl.load(old.precedence + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    write_strength = strength(tl.load(interface.write_strengths).to(COMPUTE), sizes)
    allocation_gate = gate(tl.load(interface.allocation_gates).to(COMPUTE), sizes)
    write_gate = gate(tl.load(interface.write_gates).to(COMPUTE), sizes)
    if not sizes.RANKS:
        usage = update_usage(interface, old, new, new.usage, offs_n, mask_n, sizes)
        key = tl.sort(sort_key(usage, offs_n, mask_n, COMPUTE))
        SLOTS: tl.constexpr = 1023 if COMPUTE == tl.float64 else 2047
        tl.store(kept.free_list + offs_n, (key & SLOTS).to(tl.int32), mask=mask_n)
        look_up(0, N, sizes.CHUNK, interface, old, kept, sizes)
        tl.debug_barrier()  # usage, free list and similarity are read by other threads than wrote them
    slots, x, x_before = free_slots(new.usage, kept.free_list, offs_n, mask_n, COMPUTE)
    tl.store(kept.allocation + slots, (1.0 - x) * tl.cumprod(x_before, 0), mask=mask_n)
    tl.debug_barrier()  # from the order of the free list to that of the slots
    allocation = tl.load(kept.allocation + offs_n, mask=mask_n, other=0.0)

    similarities = tl.load(kept.write_similarity + offs_n, mask=mask_n, other=0.0)
    content = softmax(similarities * write_strength, mask_n, 0)
    mixed = allocation_gate * allocation + (1.0 - allocation_gate) * content
    write_weights = rounded(term(write_gate, mixed), new.write_weights)
    tl.store(new.write_weights + offs_n, write_weights, mask=mask_n)

    precedence = (1.0 - tl.sum(write_weights)) * precedence + write_weights
    tl.store(new.precedence + offs_n, precedence, mask=mask_n)


@triton.jit
def by_write_weights(old, d_new, scratch, offs_n, mask_n, sizes: tl.constexpr):
    """The whole gradient of the write weights [BLOCK_N], 0 where there is no slot."""
    N: tl.constexpr = sizes.N
    COMPUTE: tl.constexpr = sizes.COMPUTE
    precedence = tl.load(old.precedence + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_new_precedence = tl.load(d_new.precedence + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_weights = tl.load(d_new.write_weights + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_weights = add_parts(d_weights, scratch.d_write_rows + offs_n, mask_n, N, sizes.COLUMN_BLOCKS + 1)
    d_weights = add_parts(d_weights, scratch.d_write_columns + offs_n, mask_n, N, sizes.ROW_BLOCKS)
    d_weights += d_new_precedence - tl.sum(term(d_new_precedence, precedence))
    return tl.where(mask_n, d_weights, 0.0)


@triton.jit
def by_scaled_similarity(interface, kept, d_weights, offs_n, mask_n, sizes: tl.constexpr):
    """For the write key: the content weights [BLOCK_N], and the gradient of what the softmax makes them from.

    The gates stay outside the difference, as the mode does in `read_backward`.
    """
    COMPUTE: tl.constexpr = sizes.COMPUTE
    write_strength = strength(tl.load(interface.write_strengths).to(COMPUTE), sizes)
    allocation_gate = gate(tl.load(interface.allocation_gates).to(COMPUTE), sizes)
    write_gate = gate(tl.load(interface.write_gates).to(COMPUTE), sizes)
    similarity = tl.load(kept.write_similarity + offs_n, mask=mask_n, other=0.0)
    content = softmax(similarity * write_strength, mask_n, 0)
    d_scaled = write_gate * (1.0 - allocation_gate) * content * (d_weights - tl.sum(term(d_weights, content)))
    return content, d_scaled


@triton.jit
def lookup_backward(part, interface, old, kept, d_weights, scratch, d_interface, d_old, runs, sizes: tl.constexpr):
    """The adjoint of looking up the write key, for this part's PLACES numbers of every word.

    Adds to the gradient of the memory. Writes those of the write key, and of the read keys, the erase vector and the
    write vector, of which each block of slots left a part.
    """
    N: tl.constexpr = sizes.N
    W: tl.constexpr = sizes.W
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    offs_n, offs_w = tl.arange(0, sizes.BLOCK_N), tl.arange(0, sizes.BLOCK_W)
    offs_p = part * sizes.PLACES + tl.arange(0, sizes.PLACES)
    mask_n, mask_p = (offs_n < N) & runs, offs_p < W
    offsets, mask = offs_n[:, None] * W + offs_p[None, :], mask_n[:, None] & mask_p[None, :]
    memory = tl.load(old.memory + offsets, mask=mask, other=0.0).to(COMPUTE)
    d_memory = tl.load(d_old.memory + offsets, mask=mask, other=0.0).to(COMPUTE)
    norm = tl.load(kept.norms + offs_n, mask=mask_n, other=1.0)
    similarity = tl.load(kept.write_similarity + offs_n, mask=mask_n, other=0.0)
    whole_key = tl.load(interface.write_keys + offs_w, mask=offs_w < W, other=0.0).to(COMPUTE)
    key = tl.load(interface.write_keys + offs_p, mask=mask_p, other=0.0).to(COMPUTE)
    write_strength = strength(tl.load(interface.write_strengths).to(COMPUTE), sizes)

    VECTORS: tl.constexpr = 2 * sizes.BLOCK_R if sizes.BLOCK_R > 1 else 4  # R + 2 at least
    vectors = tl.arange(0, VECTORS)
    mask_vectors = (vectors < R + 2)[:, None] & mask_p[None, :]
    parts_ptr = scratch.d_vectors + vectors[:, None] * W + offs_p[None, :]
    d_vectors = tl.full([VECTORS, sizes.PLACES], 0.0, COMPUTE)
    d_vectors = add_parts(d_vectors, parts_ptr, mask_vectors, (R + 2) * W, sizes.SLOT_BLOCKS)
    place = tl.where(
        vectors < R, vectors * W, tl.where(vectors == R, sizes.OFFSETS.erase_vectors, sizes.OFFSETS.write_vectors)
    )
    tl.store(d_interface.read_keys + place[:, None] + offs_p[None, :], d_vectors, mask=mask_vectors)

    key_norm = tl.sqrt(tl.sum(term(whole_key, whole_key)) + NORM_EPSILON)
    _, d_scaled = by_scaled_similarity(interface, kept, d_weights, offs_n, mask_n, sizes)
    d_dot = d_scaled * write_strength / (norm * key_norm + SIMILARITY_EPSILON)
    d_norms = -d_dot * similarity
    d_memory += d_dot[:, None] * key[None, :] + (d_norms * key_norm / norm)[:, None] * memory
    tl.store(d_old.memory + offsets, d_memory, mask=mask)
    d_key = tl.sum(tile_term(d_dot[:, None], memory, sizes), 0) + tl.sum(term(d_norms, norm)) / key_norm * key
    tl.store(d_interface.write_keys + offs_p, d_key, mask=mask_p)


@triton.jit
def mixture_backward(interface, new, kept, d_weights, d_new, d_interface, d_old, scratch, runs, sizes: tl.constexpr):
    """The part of the adjoint of `address` that does not follow the free list, from what `by_write_weights` returns.

    Writes the gradients of the gates and the strength that make the write weights, and of the precedence.
    """
    N: tl.constexpr = sizes.N
    COMPUTE: tl.constexpr = sizes.COMPUTE
    offs_n = tl.arange(0, sizes.BLOCK_N)
    mask_n = (offs_n < N) & runs
    allocation_gate = gate(tl.load(interface.allocation_gates).to(COMPUTE), sizes)
    write_gate = gate(tl.load(interface.write_gates).to(COMPUTE), sizes)
    d_mixed = d_weights * write_gate
    # write weights: w = gʷ (gᵃ a + (1 − gᵃ) c)
    content, d_scaled = by_scaled_similarity(interface, kept, d_weights, offs_n, mask_n, sizes)
    allocation = tl.load(kept.allocation + offs_n, mask=mask_n, other=0.0)
    similarity = tl.load(kept.write_similarity + offs_n, mask=mask_n, other=0.0)
    d_allocation_gate = tl.sum(term(d_mixed, allocation - content))
    mixed = allocation_gate * allocation + (1.0 - allocation_gate) * content
    d_write_gate = tl.sum(term(d_weights, mixed))
    tl.store(d_interface.allocation_gates, d_gate(d_allocation_gate, allocation_gate, sizes))
    tl.store(d_interface.write_gates, d_gate(d_write_gate, write_gate, sizes))
    raw_strength = tl.load(interface.write_strengths).to(COMPUTE)
    d_write_strength = d_strength(tl.sum(term(d_scaled, similarity)), raw_strength, sizes)
    tl.store(d_interface.write_strengths, d_write_strength)

    # precedence: p' = (1 − Σ w) p + w
    write_weights = tl.load(new.write_weights + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_new_precedence = tl.load(d_new.precedence + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    d_precedence = (1.0 - tl.sum(write_weights)) * d_new_precedence
    d_precedence = add_parts(d_precedence, scratch.d_precedence + offs_n, mask_n, N, sizes.ROW_BLOCKS)
    tl.store(d_old.precedence + offs_n, d_precedence, mask=mask_n)


@triton.jit
def address_backward(
    first_head,
    interface,
    old,
    new,
    kept,
    d_weights,
    d_new,
    d_interface,
    d_old,
    scratch,
    runs,
    HEADS: tl.constexpr,
    sizes: tl.constexpr,
):
    """The adjoint of `address` but its lookup in memory, after that of linking, from what `by_write_weights` returns.

    Adds up what the tiles left of the gradient of the previous read weights. Writes the gradients of HEADS heads' read
    weights and free gates, from `first_head` on; if that is head 0, all else too, except in a spread layout what
    `mixture_backward` writes. For an element that has ended (not `runs`) no gradient of the state is written.
    """
    N: tl.constexpr = sizes.N
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    work_ptr = scratch.d_allocation + first_head * N
    offs_n = tl.arange(0, sizes.BLOCK_N)
    mask_n = (offs_n < N) & runs
    # What follows is loaded before the first barrier, which no load moves across: so it is waited for only once.
    slots, x, x_before = free_slots(new.usage, kept.free_list, offs_n, mask_n, COMPUTE)
    has_next = mask_n & (offs_n < N - 1)
    next_slots = tl.load(kept.free_list + offs_n + 1, mask=has_next, other=0)
    allocation_next = tl.load(kept.allocation + next_slots, mask=has_next, other=0.0)
    d_new_usage = tl.load(d_new.usage + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    usage = tl.load(old.usage + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    written = tl.load(old.write_weights + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
    # retention: ψ = ∏_r (1 − f_r w_r)
    retention = tl.full([sizes.BLOCK_N], 1.0, COMPUTE)
    # The product of the other heads' factors is multiplied out, not divided out: a head's own factor may be 0.
    heads = first_head + tl.arange(0, HEADS)
    others = tl.full([HEADS, sizes.BLOCK_N], 1.0, COMPUTE)
    for head in range(R):
        free_gate = gate(tl.load(interface.free_gates + head).to(COMPUTE), sizes)
        weights = tl.load(old.read_weights + head * N + offs_n, mask=mask_n, other=0.0).to(COMPUTE)
        factor = 1.0 - free_gate * weights
        retention = retention * factor
        others = others * tl.where((heads == head)[:, None], 1.0, factor[None, :])
    allocation_gate = gate(tl.load(interface.allocation_gates).to(COMPUTE), sizes)
    write_gate = gate(tl.load(interface.write_gates).to(COMPUTE), sizes)
    d_mixed = d_weights * write_gate
    tl.store(work_ptr + offs_n, d_mixed * allocation_gate, mask=mask_n)  # the allocation's gradient
    tl.debug_barrier()  # read below along the free list

    # allocation, along the free list: dx_j = −d_j P_j + (Σ_{i>j} d_i a_i) / x_j
    product = tl.cumprod(x_before, 0)
    d_allocation = tl.load(work_ptr + slots, mask=mask_n, other=0.0)
    # The sum over the later slots: each place adds the next one's term, so that its own need not be taken out again.
    d_next = tl.load(work_ptr + next_slots, mask=has_next, other=0.0)
    later = tl.cumsum(d_next * allocation_next, 0, reverse=True)
    d_x = later / x - d_allocation * product
    tl.debug_barrier()  # all have read the scratch that is written again
    tl.store(work_ptr + slots, d_x * (1.0 - USAGE_EPSILON), mask=mask_n)
    tl.debug_barrier()
    d_usage = tl.load(work_ptr + offs_n, mask=mask_n, other=0.0) + d_new_usage

    mask_heads = heads < R
    at_heads, mask = heads[:, None] * N + offs_n[None, :], mask_heads[:, None] & mask_n[None, :]
    free_gates = gate(tl.load(interface.free_gates + heads, mask=mask_heads, other=0.0).to(COMPUTE), sizes)
    weights = tl.load(old.read_weights + at_heads, mask=mask, other=0.0).to(COMPUTE)
    d_read = tl.full([HEADS, sizes.BLOCK_N], 0.0, COMPUTE)
    d_read = add_parts(d_read, scratch.d_read_rows + at_heads, mask, R * N, sizes.COLUMN_BLOCKS)
    d_read = add_parts(d_read, scratch.d_read_columns + at_heads, mask, R * N, sizes.ROW_BLOCKS)
    # usage: u' = (u + (1 − u) w) ψ
    d_kept = d_usage * retention
    if first_head == 0:
        tl.store(d_old.usage + offs_n, d_kept * (1.0 - written), mask=mask_n)
        d_written = d_kept * (1.0 - usage)
        if sizes.STOP_USAGE_GRADIENT:
            d_written = tl.full([sizes.BLOCK_N], 0.0, COMPUTE)
        tl.store(d_old.write_weights + offs_n, d_written, mask=mask_n)

        if not sizes.SPREAD:
            mixture_backward(interface, new, kept, d_weights, d_new, d_interface, d_old, scratch, runs, sizes)
    d_retention = d_usage * (usage + (1.0 - usage) * written)
    d_factors = d_retention[None, :] * others
    d_free_gates = d_gate(-tl.sum(term(d_factors, weights), 1), free_gates, sizes)
    tl.store(d_interface.free_gates + heads, d_free_gates, mask=mask_heads)
    tl.store(d_old.read_weights + at_heads, d_read - d_factors * free_gates[:, None], mask=mask)
