"""Phase three of a step, a program per part of the words: read content weights, read weights, the words read.

In a spread layout it has a program per part and read head. Its adjoint is the first phase of the backward. The tuples
of pointers are those of `buffers`, of one batch element.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.common import add_parts, d_strength, read_modes, rounded, softmax, strength, term, tile_term


@triton.jit
def read(part, first_head, interface, new, kept, scratch, read_words_ptr, sizes: tl.constexpr):
    """Where HEADS_READ heads read, and what they read: this part's PLACES numbers of every word.

    Adds up the partial sums of the link's tiles. Part 0 also stores forward weights, backward weights and read weights.
    """
    N: tl.constexpr = sizes.N
    W: tl.constexpr = sizes.W
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    offs_n, offs_r = tl.arange(0, sizes.BLOCK_N), first_head + tl.arange(0, sizes.HEADS_READ)
    offs_p = part * sizes.PLACES + tl.arange(0, sizes.PLACES)
    mask_r, mask_n, mask_p = offs_r < R, offs_n < N, offs_p < W
    offsets = offs_r[:, None] * N + offs_n[None, :]
    mask = mask_r[:, None] & mask_n[None, :]
    at_memory = offs_n[None, None, :] * W + offs_p[None, :, None]
    mask_memory = mask_n[None, None, :] & mask_p[None, :, None]
    memory = tl.load(new.memory + at_memory, mask=mask_memory, other=0.0).to(COMPUTE)

    nothing = tl.full([sizes.HEADS_READ, sizes.BLOCK_N], 0.0, COMPUTE)
    backward = add_parts(nothing, scratch.backward + offsets, mask, R * N, sizes.ROW_BLOCKS, sizes.AT_ONCE)
    forward = add_parts(nothing, scratch.forward + offsets, mask, R * N, sizes.COLUMN_BLOCKS, sizes.AT_ONCE)
    strengths = tl.load(interface.read_strengths + offs_r, mask=mask_r, other=0.0).to(COMPUTE)
    strengths = strength(strengths, sizes)
    similarity = tl.load(kept.read_similarity + offsets, mask=mask, other=0.0)
    content = softmax(similarity * strengths[:, None], mask, 1)
    mode_b, mode_f, mode_c = read_modes(interface.read_modes, offs_r, mask_r, sizes)
    weights = mode_b[:, None] * backward + mode_f[:, None] * forward + mode_c[:, None] * content
    weights = rounded(weights, new.read_weights)
    if part == 0:
        tl.store(kept.forward + offsets, forward, mask=mask)
        tl.store(kept.backward + offsets, backward, mask=mask)
        tl.store(new.read_weights + offsets, weights, mask=mask)
    words = tl.sum(tile_term(tl.where(mask, weights, 0.0)[:, None, :], memory, sizes), 2)
    at_words, mask_words = offs_r[:, None] * W + offs_p[None, :], mask_r[:, None] & mask_p[None, :]
    tl.store(read_words_ptr + at_words, words, mask=mask_words)


@triton.jit
def read_backward(first_head, interface, new, kept, d_read_words_ptr, d_new, d_interface, scratch, sizes: tl.constexpr):
    """The adjoint of `read`: gradients of the forward weights, the backward weights and the similarity of its heads.

    What the words read send back to the memory is left to `linking.write_backward`.
    """
    N: tl.constexpr = sizes.N
    W: tl.constexpr = sizes.W
    R: tl.constexpr = sizes.R
    COMPUTE: tl.constexpr = sizes.COMPUTE
    HEADS: tl.constexpr = sizes.HEADS if sizes.HEADS < sizes.HEADS_READ else sizes.HEADS_READ
    offs_n, offs_w = tl.arange(0, sizes.BLOCK_N), tl.arange(0, sizes.BLOCK_W)
    offs_r = first_head + tl.arange(0, sizes.HEADS_READ)
    mask_r, mask_w = offs_r < R, offs_w < W

    # words: r = w M'; the gradient of w goes through scratch, from chunks of slots to whole heads
    for start in range(0, N, sizes.CHUNK):
        by_slot = start + tl.arange(0, sizes.CHUNK)[None, :]
        slots, places = by_slot[:, :, None], offs_w[None, None, :]
        mask_memory = (slots < N) & mask_w[None, None, :]
        memory = tl.load(new.memory + slots * W + places, mask=mask_memory, other=0.0).to(COMPUTE)
        for head in range(first_head, first_head + 1 if sizes.SPREAD else R, HEADS):
            offs_h = head + tl.arange(0, HEADS)[:, None]
            heads, at_heads = offs_h[:, :, None], offs_h * N + by_slot
            mask_words, mask_heads = (heads < R) & mask_w[None, None, :], (offs_h < R) & (by_slot < N)
            d_words = tl.load(d_read_words_ptr + heads * W + places, mask=mask_words, other=0.0).to(COMPUTE)
            given = tl.load(d_new.read_weights + at_heads, mask=mask_heads, other=0.0).to(COMPUTE)
            d_weights = given + tl.sum(tile_term(memory, d_words, sizes), 2)
            tl.store(scratch.d_similarity + at_heads, d_weights, mask=mask_heads)
    tl.debug_barrier()

    offsets = offs_r[:, None] * N + offs_n[None, :]
    mask = mask_r[:, None] & (offs_n < N)[None, :]
    d_weights = tl.load(scratch.d_similarity + offsets, mask=mask, other=0.0)
    backward = tl.load(kept.backward + offsets, mask=mask, other=0.0)
    forward = tl.load(kept.forward + offsets, mask=mask, other=0.0)
    similarity = tl.load(kept.read_similarity + offsets, mask=mask, other=0.0)
    raw_strengths = tl.load(interface.read_strengths + offs_r, mask=mask_r, other=0.0).to(COMPUTE)
    strengths = strength(raw_strengths, sizes)
    content = softmax(similarity * strengths[:, None], mask, 1)

    mode_b, mode_f, mode_c = read_modes(interface.read_modes, offs_r, mask_r, sizes)
    d_mode_b = tl.sum(term(d_weights, backward), 1)
    d_mode_f = tl.sum(term(d_weights, forward), 1)
    d_mode_c = tl.sum(term(d_weights, content), 1)
    if sizes.RAW:
        mean = mode_b * d_mode_b + mode_f * d_mode_f + mode_c * d_mode_c
        d_mode_b, d_mode_f, d_mode_c = (
            mode_b * (d_mode_b - mean),
            mode_f * (d_mode_f - mean),
            mode_c * (d_mode_c - mean),
        )
    d_modes_ptr = d_interface.read_modes + 3 * offs_r
    tl.store(d_modes_ptr, d_mode_b, mask=mask_r)
    tl.store(d_modes_ptr + 1, d_mode_f, mask=mask_r)
    tl.store(d_modes_ptr + 2, d_mode_c, mask=mask_r)

    tl.store(scratch.d_forward + offsets, mode_f[:, None] * d_weights, mask=mask)
    tl.store(scratch.d_backward + offsets, mode_b[:, None] * d_weights, mask=mask)
    # The mode stays outside the difference, which for one-hot content is zero: multiplied in, and fused with the
    # subtraction by a compiler, it would leave a product's rounding over, to be multiplied by the strength.
    d_scaled = mode_c[:, None] * content * (d_weights - tl.sum(term(d_weights, content), 1, keep_dims=True))
    d_strengths = d_strength(tl.sum(term(d_scaled, similarity), 1), raw_strengths, sizes)
    tl.store(d_interface.read_strengths + offs_r, d_strengths, mask=mask_r)
    tl.debug_barrier()  # all have read the gradient of the weights, which is now overwritten
    tl.store(scratch.d_similarity + offsets, d_scaled * strengths[:, None], mask=mask)
