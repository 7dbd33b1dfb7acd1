"""The gradients of all weights of a small network, summed over steps and batch, in one launch.

A library takes a launch or two for each weight and each bias, and as long for a few hundred rows as for thousands. Sums
go over the rows in their order, so the same call gives the same bits. Nothing is rounded to fewer bits than float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.launcher import aligned, launch_or_compile

BLOCK = 32  # rows of a weight, its columns, and rows of the batch at a time
NUM_WARPS = 8


class WeightGradients(NamedTuple):
    """The gradients of the parameters, in the order of `DNCCell.parameters()`."""

    below: Tensor  # [4H, I + R·W], columns for the inputs and the words read before
    hidden: Tensor  # [4H, H]
    bias: Tensor  # [4H]
    second_bias: Tensor  # [4H]
    interface: Tensor  # [S, H]
    interface_bias: Tensor  # [S]
    output: Tensor  # [O, F]
    output_bias: Tensor  # [O]


@triton.jit
def tile_of_product(tile, d_ptr, x_ptr, out_ptr, bias_ptr, second_bias_ptr, rows, batch, by_step, by_row,
                    D: tl.constexpr, X: tl.constexpr, OUT_ROW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A tile of dᵀ x, [D, X], rows OUT_ROW apart. The tiles of the first columns also sum the bias, if there is one.

    The rows of d are contiguous; row r of x is row r % batch of step r // batch.
    """
    COLUMN_BLOCKS: tl.constexpr = (X + BLOCK - 1) // BLOCK
    at_d = tile // COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    at_x = tile % COLUMN_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    total, bias = tl.full([BLOCK, BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        d = tl.load(d_ptr + row * D + at_d[None, :], mask=(row < rows) & (at_d < D)[None, :], other=0.0)
        offsets = row // batch * by_step + row % batch * by_row
        x = tl.load(x_ptr + offsets + at_x[None, :], mask=(row < rows) & (at_x < X)[None, :], other=0.0)
        total = tl.dot(tl.trans(d), x, total, input_precision="ieee")
        bias += tl.sum(d, 0)
    mask = (at_d < D)[:, None] & (at_x < X)[None, :]
    tl.store(out_ptr + at_d[:, None] * OUT_ROW + at_x[None, :], total, mask=mask)
    if bias_ptr is not None:
        mask_bias = (at_d < D) & (tile % COLUMN_BLOCKS == 0)
        tl.store(bias_ptr + at_d, bias, mask=mask_bias)
        if second_bias_ptr is not None:
            tl.store(second_bias_ptr + at_d, bias, mask=mask_bias)


@triton.jit(do_not_specialize=["rows", "batch", "inputs_by_step", "inputs_by_row"])
def weight_gradients_kernel(
    d_gates_ptr,
    d_vectors_ptr,
    d_outputs_ptr,
    inputs_ptr,
    before_ptr,
    after_ptr,
    below_ptr,
    hidden_ptr,
    bias_ptr,
    second_bias_ptr,
    interface_ptr,
    interface_bias_ptr,
    output_ptr,
    output_bias_ptr,
    rows,
    batch,
    inputs_by_step,
    inputs_by_row,
    INPUTS: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Grid: the tiles of five products, one after the other; ENDS has where each product's tiles end."""
    tile = tl.program_id(0)
    G: tl.constexpr = 4 * H
    BELOW: tl.constexpr = INPUTS + F - H
    if tile < ENDS[0]:
        tile_of_product(
            tile, d_gates_ptr, inputs_ptr, below_ptr, None, None,
            rows, batch, inputs_by_step, inputs_by_row, G, INPUTS, BELOW, BLOCK,
        )  # fmt: skip
    elif tile < ENDS[1]:
        tile_of_product(
            tile - ENDS[0], d_gates_ptr, before_ptr + H, below_ptr + INPUTS, None, None,
            rows, batch, batch * F, F, G, F - H, BELOW, BLOCK,
        )  # fmt: skip
    elif tile < ENDS[2]:
        tile_of_product(
            tile - ENDS[1], d_gates_ptr, before_ptr, hidden_ptr, bias_ptr, second_bias_ptr,
            rows, batch, batch * F, F, G, H, H, BLOCK,
        )  # fmt: skip
    elif tile < ENDS[3]:
        tile_of_product(
            tile - ENDS[2], d_vectors_ptr, after_ptr, interface_ptr, interface_bias_ptr, None,
            rows, batch, batch * F, F, S, H, H, BLOCK,
        )  # fmt: skip
    else:
        tile_of_product(
            tile - ENDS[3], d_outputs_ptr, after_ptr, output_ptr, output_bias_ptr, None,
            rows, batch, batch * F, F, OUTPUTS, F, F, BLOCK,
        )  # fmt: skip


def weight_gradients(
    d_gates: Tensor, d_vectors: Tensor, d_outputs: Tensor, inputs: Tensor, before: Tensor, after: Tensor
) -> WeightGradients:
    """The gradients of the weights of a network with one LSTM layer.

    Args:
        d_gates, d_vectors, d_outputs: of the gates, the interface vectors and the outputs, [T, B, ·], contiguous.
        inputs: [T, B, I], of any strides.
        before, after: the features that each step begins with and those that it leaves, [T, B, F], contiguous.
    """
    steps, batch, size = inputs.shape
    gates, features, vector, out = (x.shape[-1] for x in (d_gates, before, d_vectors, d_outputs))
    hidden = gates // 4
    reach = sum((n - 1) * stride for n, stride in zip(inputs.shape, inputs.stride(), strict=True))
    # The kernel takes a row's numbers side by side, offsets in 32 bits, and would be recompiled for another alignment.
    if inputs.stride(2) != 1 or reach >= 2**31 or inputs.data_ptr() % 16:
        inputs = aligned(inputs)
    results = WeightGradients(
        *(
            inputs.new_empty(shape)
            for shape in (
                (gates, size + features - hidden), (gates, hidden), (gates,), (gates,),
                (vector, hidden), (vector,), (out, features), (out,),
            )
        )
    )  # fmt: skip
    ends = tiles_of_products(size, hidden, features, vector, out)
    launch_or_compile(
        weight_gradients_kernel, (ends[-1],),
        d_gates, d_vectors, d_outputs, inputs, before, after, *results, steps * batch, batch, *inputs.stride()[:2],
        INPUTS=size, H=hidden, F=features, S=vector, OUTPUTS=out, BLOCK=BLOCK, ENDS=ends, num_warps=NUM_WARPS,
    )  # fmt: skip
    return results


def tiles_of_products(size: int, hidden: int, features: int, vector: int, out: int) -> tuple[int, ...]:
    """Where the tiles of each product end."""
    gates = 4 * hidden
    products = (gates, size), (gates, features - hidden), (gates, hidden), (vector, hidden), (out, features)
    ends, end = [], 0
    for rows, columns in products:
        end += triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK)
        ends.append(end)
    return tuple(ends)
