"""What an LSTM does to its gates once the products are there, in one launch each way, element by element."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.ahead import launch_or_compile
from dnc_triton.kernels.common import begin, clipped, d_clipped, sigmoid, tanh
from dnc_triton.kernels.layout import compute_dtype
from dnc_triton.kernels.sizes import TRITON_DTYPES

BLOCK = 256  # elements of a program


@triton.jit(do_not_specialize=["size"])
def lstm_forward_kernel(
    gates_ptr,
    cell_ptr,
    new_hidden_ptr,
    new_cell_ptr,
    unclipped_ptr,
    size,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    CLIP: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: over the [B, H] elements, `size` of them. Gates [B, 4H] are activated in place."""
    begin(OVERLAPS)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    gate_ptr = gates_ptr + element // H * 4 * H + element % H
    i = sigmoid(tl.load(gate_ptr, mask=mask, other=0.0).to(COMPUTE))
    f = sigmoid(tl.load(gate_ptr + H, mask=mask, other=0.0).to(COMPUTE))
    g = tanh(tl.load(gate_ptr + 2 * H, mask=mask, other=0.0).to(COMPUTE))
    o = sigmoid(tl.load(gate_ptr + 3 * H, mask=mask, other=0.0).to(COMPUTE))
    tl.store(gate_ptr, i, mask=mask)
    tl.store(gate_ptr + H, f, mask=mask)
    tl.store(gate_ptr + 2 * H, g, mask=mask)
    tl.store(gate_ptr + 3 * H, o, mask=mask)
    cell = f * tl.load(cell_ptr + element, mask=mask, other=0.0).to(COMPUTE) + i * g
    hidden = o * tanh(cell)
    tl.store(new_cell_ptr + element, clipped(cell, CLIP, COMPUTE), mask=mask)
    tl.store(new_hidden_ptr + element, clipped(hidden, CLIP, COMPUTE), mask=mask)
    if unclipped_ptr is not None:
        tl.store(unclipped_ptr + element, hidden, mask=mask)


@triton.jit(do_not_specialize=["size"])
def lstm_backward_kernel(
    gates_ptr,
    cell_ptr,
    d_hidden_ptr,
    d_above_ptr,
    d_cell_ptr,
    d_gates_ptr,
    size,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: as forward. From the activated gates; the gradient of the cell is overwritten by that of the one before.

    `d_above` is by the hidden vector before it was clipped, which a layer above was given.
    """
    begin(OVERLAPS)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at_gates = element // H * 4 * H + element % H
    i = tl.load(gates_ptr + at_gates, mask=mask, other=0.0).to(COMPUTE)
    f = tl.load(gates_ptr + at_gates + H, mask=mask, other=0.0).to(COMPUTE)
    g = tl.load(gates_ptr + at_gates + 2 * H, mask=mask, other=0.0).to(COMPUTE)
    o = tl.load(gates_ptr + at_gates + 3 * H, mask=mask, other=0.0).to(COMPUTE)
    prev_cell = tl.load(cell_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    cell = f * prev_cell + i * g
    tanh_cell = tanh(cell)
    d_hidden = tl.load(d_hidden_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    d_hidden = d_clipped(d_hidden, o * tanh_cell, CLIP, COMPUTE)
    if d_above_ptr is not None:
        d_hidden += tl.load(d_above_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    d_hidden = clipped(d_hidden, MAX_GRADIENT, COMPUTE)
    d_cell = d_clipped(tl.load(d_cell_ptr + element, mask=mask, other=0.0).to(COMPUTE), cell, CLIP, COMPUTE)
    d_cell += d_hidden * o * (1.0 - tanh_cell * tanh_cell)
    tl.store(d_gates_ptr + at_gates, d_cell * g * i * (1.0 - i), mask=mask)
    tl.store(d_gates_ptr + at_gates + H, d_cell * prev_cell * f * (1.0 - f), mask=mask)
    tl.store(d_gates_ptr + at_gates + 2 * H, d_cell * i * (1.0 - g * g), mask=mask)
    tl.store(d_gates_ptr + at_gates + 3 * H, d_hidden * tanh_cell * o * (1.0 - o), mask=mask)
    tl.store(d_cell_ptr + element, d_cell * f, mask=mask)


def lstm_forward(
    gates: Tensor, cell: Tensor, hidden: Tensor, new_cell: Tensor, unclipped: Tensor | None, clip: float | None
) -> None:
    """Activate gates [B, 4H] in place, and make the new hidden vector and cell [B, H] from them; all contiguous."""
    _launch(lstm_forward_kernel, (gates, cell, hidden, new_cell, unclipped), cell, clip)


def lstm_backward(
    gates: Tensor,
    cell: Tensor,
    d_hidden: Tensor,
    d_above: Tensor | None,
    d_cell: Tensor,
    d_gates: Tensor,
    clip: float | None,
    max_gradient: float | None,
) -> None:
    """The adjoint: from gradients by hidden vector and cell to those by raw gates and, in place, the cell before."""
    tensors = (gates, cell, d_hidden, d_above, d_cell, d_gates)
    _launch(lstm_backward_kernel, tensors, cell, clip, MAX_GRADIENT=max_gradient)


def _launch(
    kernel: triton.JITFunction, tensors: tuple[Tensor | None, ...], cell: Tensor, clip: float | None, **more: Any
) -> None:
    size, constants = cell.numel(), dict(H=cell.shape[1], BLOCK=BLOCK, CLIP=clip, **more)
    if size:
        grid, compute = (triton.cdiv(size, BLOCK),), TRITON_DTYPES[compute_dtype(cell.dtype)]
        launch_or_compile(kernel, grid, *tensors, size, **constants, COMPUTE=compute)
