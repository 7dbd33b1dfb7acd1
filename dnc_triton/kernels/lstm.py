"""An LSTM's element-wise equations, and kernels that compute no more than these, in one launch each way.

`products` and `sequence`, whose kernels compute the products too, take the equations from here.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.common import begin, clipped, d_clipped, sigmoid, tanh
from dnc_triton.kernels.launcher import launch_or_compile
from dnc_triton.kernels.layout import compute_dtype
from dnc_triton.kernels.sizes import TRITON_DTYPES

BLOCK = 256  # elements of a program


@triton.jit
def activated(gates):
    """σ(i), σ(f), tanh(g), σ(o), from what the products gave."""
    i, f, g, o = gates
    return sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)


@triton.jit
def advance(gates, cell):
    """c' = f c + i g, and h' = o tanh(c'), from activated gates; neither is clipped yet."""
    i, f, g, o = gates
    cell = f * cell + i * g
    return cell, o * tanh(cell)


@triton.jit
def advance_backward(
    gates, cell, d_hidden, d_above, d_cell, CLIP: tl.constexpr, MAX_GRADIENT: tl.constexpr, COMPUTE: tl.constexpr
):
    """The adjoint of `activated` and `advance`: the gradients of the raw gates, and of `cell`, the one before the step.

    `d_hidden` and `d_cell` are gradients of the clipped vectors; `d_above`, or None, is that of the hidden vector
    before the clip, which the layer above was given.
    """
    i, f, g, o = gates
    new_cell = f * cell + i * g
    tanh_cell = tanh(new_cell)
    d_hidden = d_clipped(d_hidden, o * tanh_cell, CLIP, COMPUTE)
    if d_above is not None:
        d_hidden += d_above
    d_hidden = clipped(d_hidden, MAX_GRADIENT, COMPUTE)
    d_cell = d_clipped(d_cell, new_cell, CLIP, COMPUTE) + d_hidden * o * (1.0 - tanh_cell * tanh_cell)
    d_i, d_f = d_cell * g * i * (1.0 - i), d_cell * cell * f * (1.0 - f)
    d_g, d_o = d_cell * i * (1.0 - g * g), d_hidden * tanh_cell * o * (1.0 - o)
    return (d_i, d_f, d_g, d_o), d_cell * f


@triton.jit
def load_gates(ptr, mask, H: tl.constexpr, COMPUTE: tl.constexpr):
    """The four gates of each unit, H apart; `ptr` points at the first of them."""
    i = tl.load(ptr, mask=mask, other=0.0).to(COMPUTE)
    f = tl.load(ptr + H, mask=mask, other=0.0).to(COMPUTE)
    g = tl.load(ptr + 2 * H, mask=mask, other=0.0).to(COMPUTE)
    o = tl.load(ptr + 3 * H, mask=mask, other=0.0).to(COMPUTE)
    return i, f, g, o


@triton.jit
def store_gates(ptr, gates, mask, H: tl.constexpr):
    """To where `load_gates` finds them."""
    i, f, g, o = gates
    tl.store(ptr, i, mask=mask)
    tl.store(ptr + H, f, mask=mask)
    tl.store(ptr + 2 * H, g, mask=mask)
    tl.store(ptr + 3 * H, o, mask=mask)


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
    gates = activated(load_gates(gate_ptr, mask, H, COMPUTE))
    store_gates(gate_ptr, gates, mask, H)
    cell, hidden = advance(gates, tl.load(cell_ptr + element, mask=mask, other=0.0).to(COMPUTE))
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
    """Grid: as forward. Takes activated gates; overwrites the gradient of the cell with that of the cell before.

    `d_above` is the gradient of the hidden vector before the clip, which the layer above was given.
    """
    begin(OVERLAPS)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    at_gates = element // H * 4 * H + element % H
    gates = load_gates(gates_ptr + at_gates, mask, H, COMPUTE)
    cell = tl.load(cell_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    d_hidden = tl.load(d_hidden_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    d_above = None
    if d_above_ptr is not None:
        d_above = tl.load(d_above_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    d_cell = tl.load(d_cell_ptr + element, mask=mask, other=0.0).to(COMPUTE)
    d_gates, d_cell = advance_backward(gates, cell, d_hidden, d_above, d_cell, CLIP, MAX_GRADIENT, COMPUTE)
    store_gates(d_gates_ptr + at_gates, d_gates, mask, H)
    tl.store(d_cell_ptr + element, d_cell, mask=mask)


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
    """The adjoint: from gradients of hidden vector and cell to those of the raw gates and, in place, the old cell."""
    tensors = (gates, cell, d_hidden, d_above, d_cell, d_gates)
    _launch(lstm_backward_kernel, tensors, cell, clip, MAX_GRADIENT=max_gradient)


def _launch(
    kernel: triton.JITFunction, tensors: tuple[Tensor | None, ...], cell: Tensor, clip: float | None, **more: Any
) -> None:
    size, constants = cell.numel(), dict(H=cell.shape[1], BLOCK=BLOCK, CLIP=clip, **more)
    if size:
        grid, compute = (triton.cdiv(size, BLOCK),), TRITON_DTYPES[compute_dtype(cell.dtype)]
        launch_or_compile(kernel, grid, *tensors, size, **constants, COMPUTE=compute)
