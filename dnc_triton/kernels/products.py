"""Products with weights for a small batch, and what an LSTM does around them, in one launch each.

For a few rows a library's product is bound by its own set-up, and an LSTM's step is five of them. Here a program holds
a few rows of a weight in registers, lanes along the sum, and goes through the batch with them: a weight is read once
per BATCH rows of the batch. One warp makes each sum, in an order that depends on the weight's sizes alone, so a row of
the batch comes out to the same bits whatever batch it is in. Nothing is rounded to fewer bits than the tensors have.

Weights are packed before the loop over the steps (`pack`): each row is padded with zeros to whole blocks and begins at
a multiple of 16 bytes, whatever slice of a parameter it was.
"""

# Device functions grow tuples, the only kind of list that Triton has: by concatenation, not unpacking, to any length.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.common import begin, clipped
from dnc_triton.kernels.launcher import launch_or_compile
from dnc_triton.kernels.lstm import activated, advance, advance_backward, store_gates
from dnc_triton.kernels.sizes import TRITON_DTYPES


class Tiles(NamedTuple):
    """How a product is cut up. With one warp, nothing but `block` changes a sum.

    Attributes:
        rows: of the weight, or units of the LSTM, in a program: a divisor of `ROWS`.
        block: entries of a sum at a time, at most; a power of two.
        batch: rows of the batch in a program, at most; a power of two.
        at_once: of those, how many are loaded together, at most; a power of two.
        num_warps: of a program. With more than one, sums go through shared memory.
    """

    rows: int
    block: int
    batch: int
    at_once: int
    num_warps: int = 1


ROWS = 8  # packed weights have a multiple of so many rows
LANES = 32  # of the warps that packed weights are laid out for; with any other number results are as right
# Of a dozen cuts each the fastest, or nearly so, on an H200 at all of B, H = 16, 256; 32, 256; 64, 256; 16, 64; 8, 100.
PRODUCT = Tiles(rows=4, block=1024, batch=8, at_once=4)
LSTM_FORWARD = Tiles(rows=1, block=256, batch=8, at_once=4)
LSTM_BACKWARD = Tiles(rows=1, block=512, batch=4, at_once=4)


@triton.jit
def add_products(
    totals,
    first_ptr,
    second_ptr,
    weight_ptr,
    batch,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """totals + [first second] weightᵀ, as a tuple: for each of COUNT packed rows of the weight, [BATCH].

    `first` [B, FIRST] and `second` [B, SECOND] or None are contiguous. Program axis 0 says which rows of the batch.
    """
    start = tl.program_id(0) * BATCH
    offs_b = tl.arange(0, BATCH)
    LONGER: tl.constexpr = FIRST if FIRST > SECOND else SECOND
    CHUNKS: tl.constexpr = (LONGER + BLOCK - 1) // BLOCK
    PARTS: tl.constexpr = 1 if second_ptr is None else 2
    VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    for chunk in range(CHUNKS):
        in_block = tl.arange(0, BLOCK)
        weights = ()
        for row in tl.static_range(COUNT):
            tile_ptr = weight_ptr + (row * CHUNKS + chunk) * PARTS * BLOCK + in_block
            weights = weights + (load_both(tile_ptr, tile_ptr + BLOCK if PARTS == 2 else None, True, True),)
        if FIRST % VECTOR != 0 or SECOND % VECTOR != 0:  # the order that `pack` makes
            PIECE: tl.constexpr = 32 * VECTOR
            in_block = in_block // PIECE * PIECE + in_block % VECTOR * 32 + in_block % PIECE // VECTOR
        offs_k = chunk * BLOCK + in_block
        for b in range(0, tl.minimum(BATCH, batch - start), AT_ONCE):
            # All loads before any sum: they are waited for together.
            given = ()
            for i in tl.static_range(AT_ONCE):
                at = tl.minimum(start + b + i, batch - 1)
                second_row_ptr = second_ptr + at * SECOND + offs_k if PARTS == 2 else None
                row_ptr = first_ptr + at * FIRST + offs_k
                given = given + (load_both(row_ptr, second_row_ptr, offs_k < FIRST, offs_k < SECOND),)
            for i in tl.static_range(AT_ONCE):
                added = ()
                for row in tl.static_range(COUNT):
                    total = totals[row]
                    added = added + (tl.where(offs_b == b + i, total + tl.sum(given[i] * weights[row]), total),)
                totals = added
    tl.debug_barrier()  # what is overwritten next was read by other threads too: there may be more threads than rows
    return totals


@triton.jit
def load_both(first_ptr, second_ptr, first_mask, second_mask):
    """What is at the first pointers, [BLOCK], or, with second ones, at both, [BLOCK, 2]; zeros where masked out."""
    first = tl.load(first_ptr, mask=first_mask, other=0.0)
    if second_ptr is not None:
        first = tl.join(first, tl.load(second_ptr, mask=second_mask, other=0.0))
    return first


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["addend_ptr"])
def product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    out_ptr,
    second_out_ptr,
    batch,
    K: tl.constexpr,
    OUT: tl.constexpr,
    SECOND_OUT: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: (batch, rows of the weight), both in blocks. x [B, K] → [out second_out], [B, OUT] and [B, SECOND_OUT].

    To `out` are added a bias [OUT], an addend [B, OUT] and, with ADD, what it holds; each of them is optional.
    """
    begin(OVERLAPS)
    first_row = tl.program_id(1) * ROWS
    rows = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    totals = ()
    for row in tl.static_range(ROWS):
        at = first_row + row
        mask = (rows < batch) & (at < OUT)
        total = tl.zeros([BATCH], out_ptr.dtype.element_ty)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + at, mask=at < OUT, other=0.0)
        if addend_ptr is not None:
            total += tl.load(addend_ptr + rows * OUT + at, mask=mask, other=0.0)
        if ADD:
            total += tl.load(out_ptr + rows * OUT + at, mask=mask, other=0.0)
        totals = totals + (total,)
    CHUNKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    weight_ptr += first_row * CHUNKS * BLOCK
    totals = add_products(totals, x_ptr, None, weight_ptr, batch, K, 0, ROWS, BLOCK, BATCH, AT_ONCE)
    for row in tl.static_range(ROWS):
        at = first_row + row
        tl.store(out_ptr + rows * OUT + at, totals[row], mask=(rows < batch) & (at < OUT))
        if second_out_ptr is not None:
            at -= OUT
            mask = (rows < batch) & (at >= 0) & (at < SECOND_OUT)
            tl.store(second_out_ptr + rows * SECOND_OUT + at, totals[row], mask=mask)


@triton.jit(do_not_specialize=["batch"])
def lstm_product_forward_kernel(
    below_ptr,
    hidden_ptr,
    weight_ptr,
    gates_ptr,
    cell_ptr,
    new_hidden_ptr,
    new_cell_ptr,
    unclipped_ptr,
    batch,
    BELOW: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CLIP: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: (batch, hidden units), both in blocks. What `lstm_forward_kernel` does, with the products before it.

    Gates [B, 4H] hold what has been summed up so far. The weight's rows are the four gates of each unit in turn.
    """
    begin(OVERLAPS)
    first_unit = tl.program_id(1) * ROWS
    rows = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    totals = ()
    for row in tl.static_range(4 * ROWS):
        unit = first_unit + row // 4
        at = rows * (4 * H) + row % 4 * H + unit
        totals = totals + (tl.load(gates_ptr + at, mask=(rows < batch) & (unit < H), other=0.0),)
    prev_cells = ()
    for row in tl.static_range(ROWS):
        unit = first_unit + row
        mask = (rows < batch) & (unit < H)
        prev_cells = prev_cells + (tl.load(cell_ptr + rows * H + unit, mask=mask, other=0.0),)
    LONGER: tl.constexpr = BELOW if BELOW > H else H
    CHUNKS: tl.constexpr = (LONGER + BLOCK - 1) // BLOCK
    weight_ptr += first_unit * 4 * CHUNKS * 2 * BLOCK
    totals = add_products(totals, below_ptr, hidden_ptr, weight_ptr, batch, BELOW, H, 4 * ROWS, BLOCK, BATCH, AT_ONCE)
    for row in tl.static_range(ROWS):
        unit = first_unit + row
        mask = (rows < batch) & (unit < H)
        gates = activated(totals[4 * row : 4 * row + 4])
        store_gates(gates_ptr + rows * (4 * H) + unit, gates, mask, H)
        at = rows * H + unit
        cell, hidden = advance(gates, prev_cells[row])
        tl.store(new_cell_ptr + at, clipped(cell, CLIP, COMPUTE), mask=mask)
        tl.store(new_hidden_ptr + at, clipped(hidden, CLIP, COMPUTE), mask=mask)
        if unclipped_ptr is not None:
            tl.store(unclipped_ptr + at, hidden, mask=mask)


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["d_out_ptr"])
def lstm_product_backward_kernel(
    d_vectors_ptr,
    weight_ptr,
    gates_ptr,
    cell_ptr,
    d_hidden_ptr,
    d_out_ptr,
    d_cell_ptr,
    d_gates_ptr,
    batch,
    K: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    CLIP: tl.constexpr,
    MAX_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    OVERLAPS: tl.constexpr = False,
):
    """Grid: as forward. What `lstm_backward_kernel` does for the highest layer, with the product before it.

    The gradient of the new hidden vector is the sum of what state, output (`d_out`) and interface vector send back.
    """
    begin(OVERLAPS)
    first_unit = tl.program_id(1) * ROWS
    rows = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    # All that is loaded is loaded before the product, and waited for together with its weights.
    totals, gates, cells, d_cells = (), (), (), ()
    for row in tl.static_range(ROWS):
        unit = first_unit + row
        mask = (rows < batch) & (unit < H)
        at = rows * H + unit
        total = tl.load(d_hidden_ptr + at, mask=mask, other=0.0)
        totals = totals + (total + tl.load(d_out_ptr + at, mask=mask, other=0.0),)
        for gate in tl.static_range(4):
            at_gate = rows * (4 * H) + gate * H + unit
            gates = gates + (tl.load(gates_ptr + at_gate, mask=mask, other=0.0),)
        cells = cells + (tl.load(cell_ptr + at, mask=mask, other=0.0),)
        d_cells = d_cells + (tl.load(d_cell_ptr + at, mask=mask, other=0.0),)
    CHUNKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    weight_ptr += first_unit * CHUNKS * BLOCK
    totals = add_products(totals, d_vectors_ptr, None, weight_ptr, batch, K, 0, ROWS, BLOCK, BATCH, AT_ONCE)
    for row in tl.static_range(ROWS):
        unit = first_unit + row
        mask = (rows < batch) & (unit < H)
        at, at_gates = rows * H + unit, rows * (4 * H) + unit
        d_gates, d_cell = advance_backward(
            gates[4 * row : 4 * row + 4], cells[row], totals[row], None, d_cells[row], CLIP, MAX_GRADIENT, COMPUTE
        )
        store_gates(d_gates_ptr + at_gates, d_gates, mask, H)
        tl.store(d_cell_ptr + at, d_cell, mask=mask)


def pack(*weights: Tensor, most: int, multiple: int = ROWS) -> Tensor:
    """Weights with the same number of rows, side by side, as the kernels take them.

    Args:
        weights: [O, ·] each, of any strides.
        most: entries of a block, see `Tiles.block`.
        multiple: the number of rows is rounded up to a multiple of it.

    Returns:
        [O', C, len(weights), block], C blocks of each row of each weight; O' is O rounded up. Where rows of what they
        are multiplied with begin anywhere, and are loaded entry by entry, the entries of one lane are side by side.
    """
    longest, vector = max(weight.shape[1] for weight in weights), 16 // weights[0].itemsize
    block = block_of(longest, most, itemsize=weights[0].itemsize)
    chunks, more = triton.cdiv(longest, block), -len(weights[0]) % multiple
    padded = [F.pad(weight, (0, chunks * block - weight.shape[1], 0, more)) for weight in weights]
    packed = torch.stack([weight.unflatten(1, (chunks, block)) for weight in padded], 2)
    if any(weight.shape[1] % vector for weight in weights):
        packed = packed.unflatten(3, (-1, vector, LANES)).transpose(4, 5).flatten(3)
    return packed.contiguous()


def block_of(longest: int, most: int, *, itemsize: int) -> int:
    """How many entries of a sum there are in a block, given the longest sum, and `most` at most."""
    return min(most, max(LANES * 16 // itemsize, triton.next_power_of_2(longest)))


def pack_gates(below: Tensor, recurrent: Tensor, *, tiles: Tiles = LSTM_FORWARD) -> Tensor:
    """Both weights of an LSTM, [4H, ·] and [4H, H], the four gates of each unit one after the other."""
    by_unit = [weight.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1) for weight in (below, recurrent)]
    return pack(*by_unit, most=tiles.block, multiple=4 * ROWS)


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    second_out: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    add: bool = False,
    tiles: Tiles = PRODUCT,
) -> None:
    """[out second_out] = x weightᵀ; to `out` are added a bias, an addend and, with `add`, what it holds.

    Args:
        x: [B, K], contiguous as all others.
        weight: as `pack` makes it of [O, K].
        out, second_out: [B, ·] and [B, ·] or None, together of O columns.
        bias, addend: [·], [B, ·] or None.
        tiles: how to cut it up.
    """
    size = out.shape[1]
    second = 0 if second_out is None else second_out.shape[1]
    if grid := _grid(size + second, len(x), tiles):
        launch_or_compile(
            product_kernel, grid,
            x, weight, bias, addend, out, second_out, len(x),
            K=x.shape[1], OUT=size, SECOND_OUT=second, ADD=add, **_constants(weight, len(x), tiles),
        )  # fmt: skip


def lstm_product_forward(
    below: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gates: Tensor,
    cell: Tensor,
    new_hidden: Tensor,
    new_cell: Tensor,
    unclipped: Tensor | None,
    clip: float | None,
    *,
    tiles: Tiles = LSTM_FORWARD,
) -> None:
    """A step of an LSTM, products included, where `lstm_forward` is given gates with all of these; all contiguous.

    Args:
        below, hidden: what the weights are multiplied with, [B, ·] and [B, H].
        weight: as `pack_gates` makes it.
        gates: [B, 4H], the other summands; the activated gates when this returns.
        cell, new_hidden, new_cell, unclipped, clip: as there.
        tiles: how to cut it up.
    """
    batch, size = cell.shape
    if grid := _grid(size, batch, tiles):
        launch_or_compile(
            lstm_product_forward_kernel, grid,
            below, hidden, weight, gates, cell, new_hidden, new_cell, unclipped, batch,
            BELOW=below.shape[1], H=size, CLIP=clip, COMPUTE=TRITON_DTYPES[cell.dtype],
            **_constants(weight, batch, tiles),
        )  # fmt: skip


def lstm_product_backward(
    d_vectors: Tensor,
    weight: Tensor,
    gates: Tensor,
    cell: Tensor,
    d_hidden: Tensor,
    d_out: Tensor,
    d_cell: Tensor,
    d_gates: Tensor,
    clip: float | None,
    max_gradient: float | None,
    *,
    tiles: Tiles = LSTM_BACKWARD,
) -> None:
    """The adjoint of the highest layer's step: as `lstm_backward`, with the hidden vector's gradient in three parts.

    Args:
        d_vectors: gradient of the interface vector, [B, S].
        weight: of the interface, [S, H]: its transpose as `pack` makes it.
        d_hidden, d_out: gradients of the hidden vector, by way of the state and of the output, [B, H]; neither changes.
        gates, cell, d_cell, d_gates, clip, max_gradient: as there.
        tiles: how to cut it up.
    """
    batch, size = cell.shape
    if grid := _grid(size, batch, tiles):
        launch_or_compile(
            lstm_product_backward_kernel, grid,
            d_vectors, weight, gates, cell, d_hidden, d_out, d_cell, d_gates, batch,
            K=d_vectors.shape[1], H=size, CLIP=clip, MAX_GRADIENT=max_gradient, COMPUTE=TRITON_DTYPES[cell.dtype],
            **_constants(weight, batch, tiles),
        )  # fmt: skip


def _grid(rows: int, batch: int, tiles: Tiles) -> tuple[int, int] | None:
    """None where there is nothing to do."""
    if rows == 0 or batch == 0:
        return None
    return triton.cdiv(batch, _batch(batch, tiles)), triton.cdiv(rows, tiles.rows)


def _batch(batch: int, tiles: Tiles) -> int:
    """Rows of the batch in a program: fewer where there are few, for the sake of more programs."""
    return min(tiles.batch, triton.next_power_of_2(batch), max(4, triton.next_power_of_2(batch) // 4))


def _constants(weight: Tensor, batch: int, tiles: Tiles) -> dict[str, Any]:
    block = _batch(batch, tiles)
    return {
        "ROWS": tiles.rows,
        "BLOCK": weight.shape[-1],
        "BATCH": block,
        "AT_ONCE": min(tiles.at_once, block),
        "num_warps": tiles.num_warps,
    }
