"""A DNC over a whole sequence as one kernel each way: a program per batch element loops over time.

The controller, an LSTM of one layer, runs in here as well. A step hands on its results through buffers with an entry
per step, which are also the history that the backward needs; in a small network they stay in the cache, and so do the
weights. For the memory's part of a step it calls the device functions of `step`.

All buffers are contiguous; T steps, B batch, H hidden size, N slots, W word size, R read heads. F = H + R·W is the size
of the features, which a step leaves to the next step's controller and to the output layer: hidden vector and words
read. S is the size of an interface vector. K = 1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dnc_reference.types import MemoryState
from dnc_triton.kernels.buffers import backward_scratch_at, forward_scratch_at, interface_at, kept_at, state_at
from dnc_triton.kernels.common import clipped, rounded
from dnc_triton.kernels.layout import Layout
from dnc_triton.kernels.lstm import activated, advance, advance_backward, load_gates, store_gates
from dnc_triton.kernels.sizes import TRITON_DTYPES
from dnc_triton.kernels.step import WHOLE, memory_step, memory_step_backward


class ControllerSizes(NamedTuple):
    """The constants of the controller's part, as `Sizes` are those of the memory's.

    Attributes:
        H: hidden size.
        F: features, hidden vector and words read.
        S: numbers of an interface vector.
        UNITS: hidden units that are computed at a time.
        BLOCK_S, BLOCK_F: likewise numbers of the interface vector and features.
        TILE: numbers of a weight that are multiplied at a time.
        CLIP, MAX_GRADIENT: bounds, or None; the second one for a backward.
        COMPUTE: the type of the arithmetic.
    """

    H: int
    F: int
    S: int
    UNITS: int
    BLOCK_S: int
    BLOCK_F: int
    TILE: int
    CLIP: float | None
    MAX_GRADIENT: float | None
    COMPUTE: tl.dtype

    @classmethod
    def of(
        cls,
        hidden_size: int,
        words: int,
        interface: int,
        layout: Layout,
        *,
        clip: float | None,
        max_gradient: float | None = None,
        compute: torch.dtype = torch.float32,
    ) -> "ControllerSizes":
        """Each thread multiplies 16 numbers of a weight at a time."""
        units, block_s, block_f = (
            max(16, min(most, triton.next_power_of_2(size)))
            for size, most in ((hidden_size, 64), (interface, 256), (hidden_size + words, 256))
        )
        return cls(
            H=hidden_size,
            F=hidden_size + words,
            S=interface,
            UNITS=units,
            BLOCK_S=block_s,
            BLOCK_F=block_f,
            TILE=16 * 32 * layout.num_warps,
            CLIP=clip,
            MAX_GRADIENT=max_gradient,
            COMPUTE=TRITON_DTYPES[compute],
        )


@triton.jit
def product(
    vector_ptr,
    weight_ptr,
    offs_out,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    controller: tl.constexpr,
):
    """The numbers `offs_out` of vector [IN] @ weight [IN, OUT], whose rows are STRIDE apart.

    A thread adds up numbers of its own columns, so that little is left to add up across threads. As with autocast,
    where the weight is narrower than the vector, the vector and the result are rounded to its dtype.
    """
    BLOCK_OUT: tl.constexpr = offs_out.shape[0]
    BLOCK_IN: tl.constexpr = controller.TILE // BLOCK_OUT
    COMPUTE: tl.constexpr = controller.COMPUTE
    total = tl.full([BLOCK_IN, BLOCK_OUT], 0.0, COMPUTE)
    # Unrolled, lest each part be waited for before the next one is asked for.
    for start in tl.range(0, IN, BLOCK_IN, loop_unroll_factor=2):
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
    controller: tl.constexpr,
):
    """The controller's part of a step, and the interface vector.

    i, f, g, o = pre + W [h, r];  c' = σ(f) c + σ(i) tanh(g);  h' = σ(o) tanh(c').

    `pre`, from the inputs, and what is left in `gates`, σ(i), σ(f), tanh(g), σ(o), are [4, H]. The weights are
    transposed: [F, H, 4], with a unit's gates side by side, so that one thread adds them up; and [H, S] with rows that
    begin at multiples of four numbers.
    """
    H: tl.constexpr = controller.H
    F: tl.constexpr = controller.F
    S: tl.constexpr = controller.S
    UNITS: tl.constexpr = controller.UNITS
    CLIP: tl.constexpr = controller.CLIP
    COMPUTE: tl.constexpr = controller.COMPUTE
    PADDED_S: tl.constexpr = (S + 3) // 4 * 4
    for start in range(0, H, UNITS):
        units = start + tl.arange(0, UNITS)
        mask = units < H
        # What does not wait for the product is loaded before it: behind its barriers it would be waited for again.
        pre_i, pre_f, pre_g, pre_o = load_gates(pre_ptr + units, mask, H, COMPUTE)
        cell = tl.load(cell_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        sums = product(features_ptr, recurrent_t_ptr, 4 * start + tl.arange(0, 4 * UNITS), F, 4 * H, 4 * H, controller)
        i_g, f_o = tl.split(tl.reshape(sums, [UNITS, 2, 2]))
        i, g = tl.split(i_g)
        f, o = tl.split(f_o)
        gates = activated((i + pre_i, f + pre_f, g + pre_g, o + pre_o))
        store_gates(gates_ptr + units, gates, mask, H)
        cell, hidden = advance(gates, cell)
        tl.store(new_cell_ptr + units, clipped(cell, CLIP, COMPUTE), mask=mask)
        tl.store(new_features_ptr + units, clipped(hidden, CLIP, COMPUTE), mask=mask)
    tl.debug_barrier()  # every number of the interface vector takes all of the hidden vector
    for start in range(0, S, controller.BLOCK_S):
        places = start + tl.arange(0, controller.BLOCK_S)
        bias = tl.load(interface_bias_ptr + places, mask=places < S, other=0.0).to(COMPUTE)
        asked = product(new_features_ptr, interface_weight_t_ptr, places, H, PADDED_S, PADDED_S, controller)
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
    controller: tl.constexpr,
):
    """The adjoint of `control`, from its gates, after that of the memory's part.

    Leaves the gradient of `pre` in `d_gates`, and in `d_features` that of the features that the step before left: what
    the output layer sent back to them, if there was such a step (`has_sender`), plus what this step sends back, unless
    it was reset (not `kept`).
    """
    H: tl.constexpr = controller.H
    F: tl.constexpr = controller.F
    S: tl.constexpr = controller.S
    CLIP: tl.constexpr = controller.CLIP
    COMPUTE: tl.constexpr = controller.COMPUTE
    for start in range(0, H, controller.UNITS):
        units = start + tl.arange(0, controller.UNITS)
        mask = units < H
        d_hidden = tl.load(d_new_features_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        d_cell = tl.load(d_new_cell_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        gates = load_gates(gates_ptr + units, mask, H, COMPUTE)
        cell = tl.load(cell_ptr + units, mask=mask, other=0.0).to(COMPUTE)
        d_hidden += product(d_interface_ptr, interface_weight_ptr, units, S, H, H, controller)
        d_gates, d_cell = advance_backward(gates, cell, d_hidden, None, d_cell, CLIP, controller.MAX_GRADIENT, COMPUTE)
        tl.store(d_cell_ptr + units, d_cell, mask=mask)
        store_gates(d_gates_ptr + units, d_gates, mask, H)
    tl.debug_barrier()  # every feature went to all of the gates
    for start in range(0, F, controller.BLOCK_F):
        places = start + tl.arange(0, controller.BLOCK_F)
        mask = places < F
        d_features = tl.load(d_sent_back_ptr + places, mask=mask & has_sender, other=0.0).to(COMPUTE)
        d_recurrent = product(d_gates_ptr, recurrent_ptr, places, 4 * H, F, F, controller)
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
    sizes: tl.constexpr,
    controller: tl.constexpr,
):
    """Grid: (B,).

    For whatever is carried on, entry t of [T + 1, B, ...] is what step t begins with. With `reset` [T, B] there is one
    more entry, of zeros, for the steps that it marks. With `lengths` [B] a row ends early.
    """
    H: tl.constexpr = controller.H
    F: tl.constexpr = controller.F
    element = tl.program_id(0).to(tl.int64)
    states = MemoryState(memory_ptr, usage_ptr, link_ptr, precedence_ptr, read_weights_ptr, write_weights_ptr)
    scratch = forward_scratch_at(scratch_ptr, element, sizes)
    length = steps
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + element)
    for step in range(length):
        now = step * batch + element  # in int64: times N² it may not fit in 32 bits
        before = now
        if reset_ptr is not None:
            before = tl.where(tl.load(reset_ptr + now) != 0, (steps + 1) * batch + element, now)
        after = now + batch
        control(
            pre_ptr + now * 4 * H,
            gates_ptr + now * 4 * H,
            features_ptr + before * F,
            cells_ptr + before * H,
            features_ptr + after * F,
            cells_ptr + after * H,
            interface_ptr + now * sizes.INTERFACE,
            recurrent_t_ptr,
            interface_weight_t_ptr,
            interface_bias_ptr,
            controller,
        )
        tl.debug_barrier()
        memory_step(
            interface_at(interface_ptr, now, sizes),
            state_at(states, before, sizes),
            state_at(states, after, sizes),
            kept_at(kept_ptr, free_list_ptr, now, sizes),
            scratch,
            features_ptr + after * F + H,
            True,
            WHOLE,
            sizes,
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
    sizes: tl.constexpr,
    controller: tl.constexpr,
):
    """Grid: (B,).

    Gradients of what is carried on alternate between two entries: entry t % 2 of [2, B, ...] is that of what step t
    begins with. With `reset` all but the features have a third, of zeros, in place of what a step that it marks sends
    back. `d_sent_back` [T, B, F] is what the output layer sends back to the features; for the last ones, their gradient
    includes it already.
    """
    H: tl.constexpr = controller.H
    F: tl.constexpr = controller.F
    element = tl.program_id(0).to(tl.int64)
    states = MemoryState(memory_ptr, usage_ptr, link_ptr, precedence_ptr, read_weights_ptr, write_weights_ptr)
    gradients = MemoryState(
        d_memory_ptr, d_usage_ptr, d_link_ptr, d_precedence_ptr, d_read_weights_ptr, d_write_weights_ptr
    )
    scratch = backward_scratch_at(scratch_ptr, element, sizes)
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
        before, kept = now, True
        if reset_ptr is not None:
            kept = tl.load(reset_ptr + now) == 0
            before = tl.where(kept, now, (steps + 1) * batch + element)
            lost = tl.load(reset_ptr + after, mask=step + 1 < length, other=0) != 0
            d_after = tl.where(lost, 2 * batch + element, d_after)
        memory_step_backward(
            interface_at(interface_ptr, now, sizes),
            state_at(states, before, sizes),
            state_at(states, after, sizes),
            kept_at(kept_ptr, free_list_ptr, now, sizes),
            d_new_features_ptr + H,
            state_at(gradients, d_after, sizes),
            interface_at(d_interface_ptr, now, sizes),
            state_at(gradients, d_before, sizes),
            scratch,
            True,
            None,
            WHOLE,
            sizes,
        )
        tl.debug_barrier()
        control_backward(
            gates_ptr + now * 4 * H,
            cells_ptr + before * H,
            d_interface_ptr + now * sizes.INTERFACE,
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
            controller,
        )
        tl.debug_barrier()
