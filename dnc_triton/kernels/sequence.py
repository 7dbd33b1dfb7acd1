"""A DNC over a whole sequence as one kernel each way: a program per batch element loops over time.

The controller is an LSTM of one layer, in here as well. What goes from one step to the next goes through buffers with
an entry per step, which are the history that the backward wants; of a small network they stay in the cache, and so do
the weights. The memory's part of a step is the same device functions as in `step`.

All buffers are contiguous; T steps, B batch, H hidden size, N slots, W word size, R read heads. F = H + R·W is the size
of what a step leaves to the next controller and to the output layer: hidden vector and words read. S is the size of an
interface vector. K = 1.
"""

import triton
import triton.language as tl

from dnc_triton.kernels.addressing import address, address_backward, by_write_weights, lookup_backward
from dnc_triton.kernels.common import clipped, d_clipped, rounded, sigmoid, tanh
from dnc_triton.kernels.layout import Layout
from dnc_triton.kernels.linking import link_tile, link_tile_backward, write, write_backward
from dnc_triton.kernels.reading import read, read_backward


def weight_tiles(layout: Layout) -> dict[str, int]:
    """The part of a weight that a program multiplies at a time: 32 numbers a thread."""
    return {"BLOCK_IN": 16 * layout.num_warps, "BLOCK_OUT": 64}


@triton.jit
def product(
    vector_ptr,
    weight_ptr,
    offs_out,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Some numbers [BLOCK_OUT] of vector [IN] @ weight [IN, OUT], whose rows are STRIDE apart.

    A thread adds up numbers of its own columns, so that little is left to add up across threads. As with autocast,
    where the weight is narrower than the vector, the vector and the result are rounded to its dtype.
    """
    total = tl.zeros([BLOCK_IN, BLOCK_OUT], COMPUTE)
    for start in range(0, IN, BLOCK_IN):
        offs_in = start + tl.arange(0, BLOCK_IN)
        vector = rounded(tl.load(vector_ptr + offs_in, mask=offs_in < IN, other=0.0).to(COMPUTE), weight_ptr)
        mask = (offs_in < IN)[:, None] & (offs_out < OUT)[None, :]
        weight = tl.load(weight_ptr + offs_in[:, None] * STRIDE + offs_out[None, :], mask=mask, other=0.0).to(COMPUTE)
        total += vector[:, None] * weight
    return rounded(tl.sum(total, 0), weight_ptr)


@triton.jit
def control(
    pre_ptr,
    gates_ptr,
    features_ptr,
    cell_ptr,
    new_features_ptr,
    new_cell_ptr,
    interface_ptr,
    recurrent_t_ptr,
    interface_weight_t_ptr,
    interface_bias_ptr,
    H: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CLIP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The controller's part of a step, and the interface vector.

    i, f, g, o = pre + W [h, r];  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c').

    Pre, from the inputs, and what is left in `gates`, σ(i), σ(f), tanh(g), σ(o), are [4, H]. The weights are turned
    over: [F, 4H], and [H, S] with rows that begin at multiples of four numbers.
    """
    PADDED_S: tl.constexpr = (S + 3) // 4 * 4
    for start in range(0, H, BLOCK_OUT):
        units = start + tl.arange(0, BLOCK_OUT)
        mask = units < H
        i = product(features_ptr, recurrent_t_ptr, units, F, H, 4 * H, BLOCK_IN, BLOCK_OUT, COMPUTE)
        f = product(features_ptr, recurrent_t_ptr + H, units, F, H, 4 * H, BLOCK_IN, BLOCK_OUT, COMPUTE)
        g = product(features_ptr, recurrent_t_ptr + 2 * H, units, F, H, 4 * H, BLOCK_IN, BLOCK_OUT, COMPUTE)
        o = product(features_ptr, recurrent_t_ptr + 3 * H, units, F, H, 4 * H, BLOCK_IN, BLOCK_OUT, COMPUTE)
        i = sigmoid(i + tl.load(pre_ptr + units, mask=mask, other=0.0).to(COMPUTE))
        f = sigmoid(f + tl.load(pre_ptr + H + units, mask=mask, other=0.0).to(COMPUTE))
        g = tanh(g + tl.load(pre_ptr + 2 * H + units, mask=mask, other=0.0).to(COMPUTE))
        o = sigmoid(o + tl.load(pre_ptr + 3 * H + units, mask=mask, other=0.0).to(COMPUTE))
        tl.store(gates_ptr + units, i, mask=mask)
        tl.store(gates_ptr + H + units, f, mask=mask)
        tl.store(gates_ptr + 2 * H + units, g, mask=mask)
        tl.store(gates_ptr + 3 * H + units, o, mask=mask)
        cell = f * tl.load(cell_ptr + units, mask=mask, other=0.0).to(COMPUTE) + i * g
        tl.store(new_cell_ptr + units, clipped(cell, CLIP, COMPUTE), mask=mask)
        tl.store(new_features_ptr + units, clipped(o * tanh(cell), CLIP, COMPUTE), mask=mask)
    tl.debug_barrier()  # every row of the interface vector takes all of the hidden vector
    for start in range(0, S, BLOCK_OUT):
        places = start + tl.arange(0, BLOCK_OUT)
        bias = tl.load(interface_bias_ptr + places, mask=places < S, other=0.0).to(COMPUTE)
        asked = product(new_features_ptr, interface_weight_t_ptr, places, H, S, PADDED_S, BLOCK_IN, BLOCK_OUT, COMPUTE)
        tl.store(interface_ptr + places, asked + bias, mask=places < S)


@triton.jit
def control_backward(
    gates_ptr,
    cell_ptr,
    d_interface_ptr,
    d_new_features_ptr,
    d_new_cell_ptr,
    d_sent_back_ptr,
    d_features_ptr,
    d_cell_ptr,
    d_gates_ptr,
    recurrent_ptr,
    interface_weight_ptr,
    kept,
    has_sender,
    H: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The adjoint of `control`, from its gates, after that of the memory's part.

    Leaves the gradient of pre in `d_gates`, and that of the features the step before left: what the output layer
    `sent_back` to them, if there was such a step (`has_sender`), and what went to this one, unless it was reset (not
    `kept`).
    """
    for start in range(0, H, BLOCK_OUT):
        units = start + tl.arange(0, BLOCK_OUT)
        mask = units < H
        d_hidden = product(d_interface_ptr, interface_weight_ptr, units, S, H, H, BLOCK_IN, BLOCK_OUT, COMPUTE)
        d_hidden += tl.load(d_new_features_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        d_cell = tl.load(d_new_cell_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        i = tl.load(gates_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        f = tl.load(gates_ptr + H + units, mask=mask, other=0.0).to(COMPUTE)
        g = tl.load(gates_ptr + 2 * H + units, mask=mask, other=0.0).to(COMPUTE)
        o = tl.load(gates_ptr + 3 * H + units, mask=mask, other=0.0).to(COMPUTE)
        prev_cell = tl.load(cell_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        cell = f * prev_cell + i * g
        tanh_cell = tanh(cell)
        d_hidden = clipped(d_clipped(d_hidden, o * tanh_cell, CLIP, COMPUTE), MAX_GRADIENT, COMPUTE)
        d_cell = d_clipped(d_cell, cell, CLIP, COMPUTE) + d_hidden * o * (1.0 - tanh_cell * tanh_cell)
        tl.store(d_cell_ptr + units, d_cell * f, mask=mask)
        tl.store(d_gates_ptr + units, d_cell * g * i * (1.0 - i), mask=mask)
        tl.store(d_gates_ptr + H + units, d_cell * prev_cell * f * (1.0 - f), mask=mask)
        tl.store(d_gates_ptr + 2 * H + units, d_cell * i * (1.0 - g * g), mask=mask)
        tl.store(d_gates_ptr + 3 * H + units, d_hidden * tanh_cell * o * (1.0 - o), mask=mask)
    tl.debug_barrier()  # every feature went to all of the gates
    for start in range(0, F, BLOCK_OUT):
        places = start + tl.arange(0, BLOCK_OUT)
        mask = places < F
        d_features = tl.load(d_sent_back_ptr + places, mask=mask & has_sender, other=0.0).to(COMPUTE)
        d_recurrent = product(d_gates_ptr, recurrent_ptr, places, 4 * H, F, F, BLOCK_IN, BLOCK_OUT, COMPUTE)
        tl.store(d_features_ptr + places, d_features + tl.where(kept, d_recurrent, 0.0), mask=mask)


@triton.jit(do_not_specialize=["batch", "steps"])
def sequence_forward_kernel(
    pre_ptr,
    gates_ptr,
    features_ptr,
    cells_ptr,
    interface_ptr,
    memory_ptr,
    usage_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    write_weights_ptr,
    kept_ptr,
    free_list_ptr,
    scratch_ptr,
    recurrent_t_ptr,
    interface_weight_t_ptr,
    interface_bias_ptr,
    lengths_ptr,
    reset_ptr,
    batch,
    steps,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    CLIP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid: (B,).

    Of a quantity that is carried on, entry t of [T + 1, B, ...] is what step t begins with. With `reset` [T, B] there
    is one more, of zeros, for the steps that it marks. With `lengths` [B] a row ends early.
    """
    S: tl.constexpr = R * W + 3 * W + 5 * R + 3
    F: tl.constexpr = H + R * W
    ROW_BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = ROW_BLOCKS * COLUMN_BLOCKS
    SLOT_BLOCKS: tl.constexpr = (N + SLOTS - 1) // SLOTS
    PARTS: tl.constexpr = (W + PLACES - 1) // PLACES
    element = tl.program_id(0).to(tl.int64)
    scratch_ptr += element * (ROW_BLOCKS + COLUMN_BLOCKS) * R * N
    backward_partial_ptr = scratch_ptr + COLUMN_BLOCKS * R * N
    length = steps
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + element)
    for step in range(length):
        now = step * batch + element  # in int64: times N² it may not fit in 32 bits
        before = now
        if reset_ptr is not None:
            before = tl.where(tl.load(reset_ptr + now) != 0, (steps + 1) * batch + element, now)
        after = now + batch
        step_interface_ptr = interface_ptr + now * S
        step_kept_ptr = kept_ptr + now * (3 + 3 * R) * N
        read_similarity_ptr = step_kept_ptr + 2 * N
        forward_ptr = step_kept_ptr + (2 + R) * N
        control(
            pre_ptr + now * 4 * H,
            gates_ptr + now * 4 * H,
            features_ptr + before * F,
            cells_ptr + before * H,
            features_ptr + after * F,
            cells_ptr + after * H,
            step_interface_ptr,
            recurrent_t_ptr,
            interface_weight_t_ptr,
            interface_bias_ptr,
            H,
            F,
            S,
            BLOCK_IN,
            BLOCK_OUT,
            CLIP,
            COMPUTE,
        )
        tl.debug_barrier()
        address(
            step_interface_ptr,
            memory_ptr + before * N * W,
            usage_ptr + before * N,
            precedence_ptr + before * N,
            read_weights_ptr + before * R * N,
            write_weights_ptr + before * N,
            usage_ptr + after * N,
            precedence_ptr + after * N,
            write_weights_ptr + after * N,
            step_kept_ptr,
            step_kept_ptr + N,
            step_kept_ptr + (2 + 3 * R) * N,
            free_list_ptr + now * N,
            N,
            W,
            R,
            BLOCK_N,
            BLOCK_W,
            CHUNK,
            True,
            STRENGTH_OFFSET,
            COMPUTE,
        )
        tl.debug_barrier()
        for tile in range(TILES):
            link_tile(
                tile,
                link_ptr + before * N * N,
                precedence_ptr + before * N,
                read_weights_ptr + before * R * N,
                write_weights_ptr + after * N,
                link_ptr + after * N * N,
                scratch_ptr,
                backward_partial_ptr,
                True,
                N,
                R,
                ROWS,
                COLUMNS,
                HEADS,
                COMPUTE,
            )
        for block in range(SLOT_BLOCKS):
            write(
                block,
                step_interface_ptr,
                memory_ptr + before * N * W,
                write_weights_ptr + after * N,
                memory_ptr + after * N * W,
                read_similarity_ptr,
                True,
                N,
                W,
                R,
                BLOCK_W,
                SLOTS,
                HEADS,
                True,
                COMPUTE,
            )
        tl.debug_barrier()
        for part in range(PARTS):
            read(
                part,
                step_interface_ptr,
                memory_ptr + after * N * W,
                read_similarity_ptr,
                scratch_ptr,
                backward_partial_ptr,
                forward_ptr,
                step_kept_ptr + (2 + 2 * R) * N,
                read_weights_ptr + after * R * N,
                features_ptr + after * F + H,
                N,
                W,
                R,
                BLOCK_N,
                BLOCK_R,
                PLACES,
                ROW_BLOCKS,
                COLUMN_BLOCKS,
                True,
                STRENGTH_OFFSET,
                COMPUTE,
            )
        tl.debug_barrier()


@triton.jit(do_not_specialize=["batch", "steps"])
def sequence_backward_kernel(
    gates_ptr,
    cells_ptr,
    interface_ptr,
    memory_ptr,
    usage_ptr,
    link_ptr,
    precedence_ptr,
    read_weights_ptr,
    write_weights_ptr,
    kept_ptr,
    free_list_ptr,
    d_sent_back_ptr,
    d_gates_ptr,
    d_interface_ptr,
    d_features_ptr,
    d_cells_ptr,
    d_memory_ptr,
    d_usage_ptr,
    d_link_ptr,
    d_precedence_ptr,
    d_read_weights_ptr,
    d_write_weights_ptr,
    scratch_ptr,
    recurrent_ptr,
    interface_weight_ptr,
    lengths_ptr,
    reset_ptr,
    batch,
    steps,
    N: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STRENGTH_OFFSET: tl.constexpr,
    STOP_USAGE_GRADIENT: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid: (B,).

    The gradient of what is carried on takes turns in two entries: entry t % 2 of [2, B, ...] is that of what step t
    begins with. With `reset` all but the features have a third, of zeros, instead of what a step that it marks sends
    back. `d_sent_back` [T, B, F] is what the output layer sends back to the features, to the last ones excepted, whose
    gradient it is a part of already.
    """
    S: tl.constexpr = R * W + 3 * W + 5 * R + 3
    F: tl.constexpr = H + R * W
    ROW_BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = ROW_BLOCKS * COLUMN_BLOCKS
    SLOT_BLOCKS: tl.constexpr = (N + SLOTS - 1) // SLOTS
    PARTS: tl.constexpr = (W + PLACES - 1) // PLACES
    element = tl.program_id(0).to(tl.int64)
    scratch_ptr += element * (
        (4 * R + (COLUMN_BLOCKS + 1) + COLUMN_BLOCKS * R + ROW_BLOCKS * (2 + R)) * N + SLOT_BLOCKS * (2 + R) * W
    )
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
    length = steps
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + element)
    for steps_done in range(length):
        step = length - 1 - steps_done
        now = step * batch + element  # in int64: times N² it may not fit in 32 bits
        after = now + batch
        d_before = step % 2 * batch + element
        d_after = (step + 1) % 2 * batch + element
        d_new_features_ptr = d_features_ptr + d_after * F
        d_words_ptr = d_new_features_ptr + H
        before, kept = now, True
        if reset_ptr is not None:
            kept = tl.load(reset_ptr + now) == 0
            before = tl.where(kept, now, (steps + 1) * batch + element)
            lost = tl.load(reset_ptr + after, mask=step + 1 < length, other=0) != 0
            d_after = tl.where(lost, 2 * batch + element, d_after)
        step_interface_ptr = interface_ptr + now * S
        d_step_interface_ptr = d_interface_ptr + now * S
        step_kept_ptr = kept_ptr + now * (3 + 3 * R) * N
        read_similarity_ptr = step_kept_ptr + 2 * N
        read_backward(
            step_interface_ptr,
            memory_ptr + after * N * W,
            read_similarity_ptr,
            step_kept_ptr + (2 + R) * N,
            step_kept_ptr + (2 + 2 * R) * N,
            d_words_ptr,
            d_read_weights_ptr + d_after * R * N,
            d_step_interface_ptr,
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
            True,
            STRENGTH_OFFSET,
            COMPUTE,
        )
        tl.debug_barrier()
        for tile in range(TILES):
            link_tile_backward(
                tile,
                link_ptr + before * N * N,
                precedence_ptr + before * N,
                read_weights_ptr + before * R * N,
                write_weights_ptr + after * N,
                d_link_ptr + d_after * N * N,
                d_forward_ptr,
                d_backward_ptr,
                d_link_ptr + d_before * N * N,
                d_write_rows_ptr,
                d_read_rows_ptr,
                d_write_columns_ptr,
                d_precedence_columns_ptr,
                d_read_columns_ptr,
                True,
                N,
                R,
                ROWS,
                COLUMNS,
                HEADS,
                COMPUTE,
            )
        for block in range(SLOT_BLOCKS):
            write_backward(
                block,
                step_interface_ptr,
                memory_ptr + before * N * W,
                memory_ptr + after * N * W,
                read_weights_ptr + after * R * N,
                write_weights_ptr + after * N,
                read_similarity_ptr,
                d_words_ptr,
                d_memory_ptr + d_after * N * W,
                d_similarity_ptr,
                d_memory_ptr + d_before * N * W,
                d_write_rows_ptr + COLUMN_BLOCKS * N,
                d_words_partial_ptr,
                True,
                N,
                W,
                R,
                BLOCK_W,
                SLOTS,
                HEADS,
                True,
                COMPUTE,
            )
        tl.debug_barrier()
        offs_n = tl.arange(0, BLOCK_N)
        d_weights = by_write_weights(
            precedence_ptr + before * N,
            write_weights_ptr + after * N,
            d_precedence_ptr + d_after * N,
            d_write_weights_ptr + d_after * N,
            d_write_rows_ptr,
            d_write_columns_ptr,
            offs_n,
            offs_n < N,
            N,
            ROW_BLOCKS,
            COLUMN_BLOCKS,
            COMPUTE,
        )
        for part in range(PARTS):
            lookup_backward(
                part,
                step_interface_ptr,
                memory_ptr + before * N * W,
                step_kept_ptr + N,
                step_kept_ptr + (2 + 3 * R) * N,
                d_weights,
                d_words_partial_ptr,
                d_step_interface_ptr,
                d_memory_ptr + d_before * N * W,
                True,
                N,
                W,
                R,
                BLOCK_N,
                BLOCK_W,
                BLOCK_R,
                PLACES,
                SLOT_BLOCKS,
                True,
                STRENGTH_OFFSET,
                COMPUTE,
            )
        address_backward(
            0,
            R,
            step_interface_ptr,
            usage_ptr + before * N,
            read_weights_ptr + before * R * N,
            write_weights_ptr + before * N,
            usage_ptr + after * N,
            write_weights_ptr + after * N,
            step_kept_ptr,
            step_kept_ptr + N,
            free_list_ptr + now * N,
            d_weights,
            d_usage_ptr + d_after * N,
            d_precedence_ptr + d_after * N,
            d_step_interface_ptr,
            d_usage_ptr + d_before * N,
            d_precedence_ptr + d_before * N,
            d_read_weights_ptr + d_before * R * N,
            d_write_weights_ptr + d_before * N,
            d_precedence_columns_ptr,
            d_read_rows_ptr,
            d_read_columns_ptr,
            d_addressing_ptr,
            True,
            N,
            W,
            R,
            BLOCK_N,
            ROW_BLOCKS,
            COLUMN_BLOCKS,
            True,
            STRENGTH_OFFSET,
            STOP_USAGE_GRADIENT,
            COMPUTE,
        )
        tl.debug_barrier()
        control_backward(
            gates_ptr + now * 4 * H,
            cells_ptr + before * H,
            d_step_interface_ptr,
            d_new_features_ptr,
            d_cells_ptr + d_after * H,
            d_sent_back_ptr + (now - batch) * F,
            d_features_ptr + d_before * F,
            d_cells_ptr + d_before * H,
            d_gates_ptr + now * 4 * H,
            recurrent_ptr,
            interface_weight_ptr,
            kept,
            step > 0,
            H,
            F,
            S,
            BLOCK_IN,
            BLOCK_OUT,
            CLIP,
            MAX_GRADIENT,
            COMPUTE,
        )
        tl.debug_barrier()
