"""The products of a controller's step for a small batch: by themselves against plain PyTorch, and in the layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_close, assert_same_bits
from parity import launches_in_margins
from test_kernel_layer import CLOSE, LAYERS, OTHER_LAYERS, make, make_inputs, run, start
from torch import Tensor

from dnc_triton.kernels import products
from dnc_triton.kernels.gradients import WeightGradients, weight_gradients
from dnc_triton.kernels.lstm import lstm_backward, lstm_forward
from dnc_triton.kernels.products import (
    LSTM_BACKWARD,
    LSTM_FORWARD,
    PRODUCT,
    Tiles,
    lstm_product_backward,
    lstm_product_forward,
    pack,
    pack_gates,
    product,
)
from dnc_triton.sequence import small_product
from dnc_triton.sequence.cells import Cell
from dnc_triton.sequence.loop import Sequence
from dnc_triton.sequence.product import Product
from dnc_triton.sequence.small_product import SmallProduct, is_small

TOLERANCE = {torch.float32: dict(rtol=2e-6, atol=1e-6), torch.float64: dict(rtol=1e-14, atol=1e-15)}
# Hidden units, batch, what comes from below, interface vector; the sizes of sums with and without whole vectors, of one
# block and of several, batches of one program and of several.
LARGE = [(64, 1, 64, 23), (100, 1, 9, 13), (2, 16, 517, 3)]
SIZES = [(1, 1, 1, 5), (5, 33, 4, 3), (4, 3, 260, 5), *LARGE]
CASES = [
    # Interpreted the larger ones take seconds, the last one a quarter of a minute.
    pytest.param(
        sizes, dtype, marks=pytest.mark.slow if sizes in LARGE and (dtype == torch.float64 or sizes[2] > 500) else ()
    )
    for sizes in SIZES
    for dtype in TOLERANCE
]


class Problem(NamedTuple):
    """An LSTM's step and its gradients, as drawn. Weights are slices, of odd strides."""

    below_weight: Tensor
    recurrent_weight: Tensor
    interface_weight: Tensor
    bias: Tensor
    below: Tensor
    hidden: Tensor
    cell: Tensor
    pre: Tensor
    d_vectors: Tensor
    d_hidden: Tensor
    d_out: Tensor
    d_cell: Tensor


def draw(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    size, batch, below, vector = sizes
    generator = torch.Generator().manual_seed(size)
    shapes = [(4 * size, below + 3), (4 * size, size), (vector, size), (vector,)]
    shapes += [(batch, columns) for columns in (below, size, size, 4 * size, vector, size, size, size)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors = [(x / 4 if index < 3 else x).to(device, dtype) for index, x in enumerate(tensors)]
    return Problem(tensors[0][:, 3:], *tensors[1:])


def expected(given: Problem, clip: float | None, max_gradient: float | None) -> dict[str, Tensor]:
    """In float64, gradients by autograd. The cell before is a leaf, and so are the gates before their activation."""
    given = Problem(*(x.double() for x in given))
    raw = given.pre + given.below @ given.below_weight.T + given.hidden @ given.recurrent_weight.T
    raw, cell = raw.requires_grad_(), given.cell.requires_grad_()
    i, f, g, o = raw.chunk(4, 1)
    gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)
    i, f, g, o = gates.chunk(4, 1)
    new_cell = f * cell + i * g
    unclipped = o * new_cell.tanh()
    hidden, kept = (x if clip is None else x.clamp(-clip, clip) for x in (unclipped, new_cell))
    d_hidden = given.d_hidden + given.d_out + given.d_vectors @ given.interface_weight
    (d_unclipped,) = torch.autograd.grad(hidden, unclipped, d_hidden, retain_graph=True)
    if max_gradient is not None:
        d_unclipped = d_unclipped.clamp(-max_gradient, max_gradient)
    d_gates, d_cell = torch.autograd.grad((unclipped, kept), (raw, cell), (d_unclipped, given.d_cell))
    results = {"gates": gates, "hidden": hidden, "cell": kept, "unclipped": unclipped}
    results |= {"vectors": given.bias + hidden @ given.interface_weight.T, "d_gates": d_gates, "d_cell": d_cell}
    results["d_below"], results["d_before"] = d_gates @ given.below_weight, d_gates @ given.recurrent_weight
    return {name: x.detach() for name, x in results.items()}


def outcome(
    given: Problem,
    clip: float | None = None,
    max_gradient: float | None = None,
    tiles: tuple[Tiles, Tiles, Tiles] = (LSTM_FORWARD, PRODUCT, LSTM_BACKWARD),
) -> dict[str, Tensor]:
    """The same by the kernels. What they write to holds NaN beforehand."""
    forward, general, backward = tiles
    gates, d_cell = given.pre.clone(), given.d_cell.clone()
    hidden, cell, unclipped, d_before = (torch.full_like(given.cell, torch.nan) for _ in range(4))
    vectors, d_gates, d_below = (torch.full_like(x, torch.nan) for x in (given.d_vectors, given.pre, given.below))
    packed = pack_gates(given.below_weight, given.recurrent_weight, tiles=forward)
    results = hidden, cell, None if clip is None else unclipped, clip
    lstm_product_forward(given.below, given.hidden, packed, gates, given.cell, *results, tiles=forward)
    product(hidden, pack(given.interface_weight, most=general.block), vectors, bias=given.bias, tiles=general)
    packed = pack(given.interface_weight.T, most=backward.block)
    d = given.d_hidden, given.d_out, d_cell, d_gates, clip, max_gradient
    lstm_product_backward(given.d_vectors, packed, gates, given.cell, *d, tiles=backward)
    packed = pack(torch.cat([given.below_weight, given.recurrent_weight], 1).T, most=general.block)
    product(d_gates, packed, d_below, d_before, tiles=general)
    results = {"gates": gates, "hidden": hidden, "cell": cell, "unclipped": hidden if clip is None else unclipped}
    results |= {"vectors": vectors, "d_gates": d_gates, "d_cell": d_cell, "d_below": d_below, "d_before": d_before}
    return results


@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
def test_parity(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    given = draw(sizes, dtype, device)
    clips = (0.3, 0.5) if sizes[1] > 1 else (None, None)
    assert_close(
        {name: x.double() for name, x in outcome(given, *clips).items()},
        expected(given, *clips),
        **TOLERANCE[dtype],
        name="",
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nothing_beside_a_tensor_is_touched(dtype: torch.dtype, device: torch.device) -> None:
    given, clips = draw((5, 9, 4, 3), dtype, device), (0.3, 0.5)
    with launches_in_margins() as around:
        actual = {name: x.double() for name, x in outcome(given, *clips).items()}
    assert around.seen == {"product_kernel", "lstm_product_forward_kernel", "lstm_product_backward_kernel"}
    assert_close(actual, expected(given, *clips), **TOLERANCE[dtype], name="")


def test_what_is_touched_beside_a_tensor_is_seen(device: torch.device) -> None:
    """As if a kernel were given a tensor that is too small, or part of another: a write fails, a read makes NaN."""
    gates, cell, d_gates = (torch.ones(2, columns, device=device) for columns in (16, 4, 16))
    for hidden in (torch.ones(1, 4, device=device), torch.ones(2, 5, device=device)[:1, :4]):
        with launches_in_margins(), pytest.raises(AssertionError, match="lstm_forward_kernel wrote beside a tensor"):
            lstm_forward(gates, cell, hidden, cell.clone(), None, None)
        with launches_in_margins():
            lstm_backward(gates, cell, hidden, None, cell.clone(), d_gates, None, None)
        assert d_gates[0].isfinite().all()
        assert d_gates[1].isnan().all()


@pytest.mark.parametrize("sizes", [(5, 6, 4, 3), (2, 19, 13, 3)], ids=str)
def test_a_row_alone_is_the_row_in_a_batch(sizes: tuple[int, int, int, int], device: torch.device) -> None:
    """Whatever the other rows hold, and however many there are."""
    given = draw(sizes, torch.float32, device)
    together, weights = outcome(given, 0.3), given[:4]
    assert all(x.isfinite().all() for x in together.values())
    poisoned = Problem(*weights, *(x.clone() for x in given[4:]))
    row = sizes[1] - 2
    for x in poisoned[4:]:
        x[:row] = torch.nan
    alone = Problem(*weights, *(x[row : row + 1].contiguous() for x in given[4:]))
    assert_same_bits(outcome(alone, 0.3), {name: x[row : row + 1] for name, x in together.items()})
    beside = outcome(poisoned, 0.3)
    assert_same_bits({name: x[row:] for name, x in beside.items()}, {name: x[row:] for name, x in together.items()})


def test_the_cut_changes_no_sum(device: torch.device) -> None:
    """Except for its blocks."""
    given = draw((6, 5, 4, 3), torch.float32, device)
    smallest = Tiles(1, 256, 1, 1), Tiles(1, 1024, 2, 1), Tiles(1, 512, 1, 1)
    largest = Tiles(2, 256, 8, 8), Tiles(8, 1024, 4, 4), Tiles(4, 512, 8, 2)
    assert_same_bits(outcome(given, tiles=largest), outcome(given, tiles=smallest))
    assert all(products.ROWS % tiles.rows == 0 for tiles in (LSTM_FORWARD, LSTM_BACKWARD, PRODUCT))


@pytest.mark.parametrize("columns", [4, 7])
def test_what_is_added(columns: int, device: torch.device) -> None:
    """The same as by `Product`."""
    generator = torch.Generator().manual_seed(0)
    weight, x, d, base = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((5, columns), (3, columns), (3, 5), (3, 5))
    )
    outcomes = []
    for kind in (Product, SmallProduct):
        made, results = kind(weight, torch.float64), [base.clone(), torch.empty_like(base)]
        made.add_to(results[0], x, results[0])
        made.add_to(base[0], x, results[1])
        results += [torch.empty_like(x), torch.empty_like(x), x.clone()]
        made.backward(d, results[2])
        made.backward(d, results[3], x)
        made.add_backward(d, results[4])
        outcomes.append(results)
    assert_close(*outcomes, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("columns", [256, 301])
def test_a_sum_of_several_blocks(columns: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(3, columns, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    out, tiles = x.new_full((3, 3), torch.nan), PRODUCT._replace(block=128)
    product(x, pack(weight, most=tiles.block), out, tiles=tiles)
    assert_close(out, x @ weight.T, rtol=1e-14)


def test_no_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched."""
    monkeypatch.setattr(products, "launch_or_compile", None)
    assert outcome(draw((4, 0, 4, 3), torch.float32, device))["vectors"].shape == (0, 3)


LAYER_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": LAYERS["plain"],
    "lstm_all": LAYERS["lstm_all"],
    "dropout": ({"num_layers": 2, "dropout": 0.5}, {}),
    **OTHER_LAYERS,
}


@pytest.mark.parametrize("name", LAYER_CASES)
def test_the_layer(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, call = LAYER_CASES[name]
    dnc = make(device, **layer)
    if "reset" in call:
        reset = torch.tensor(call["reset"], device=device)
        call = {**call, "reset": reset if dnc.batch_first else reset.T}
    inputs, state = make_inputs(dnc), start(dnc)
    torch.manual_seed(2)
    monkeypatch.setenv("DNC_TRITON_GRAPHS", "0")  # on a GPU an earlier test may have left a graph that serves this one
    wanted = run(dnc, inputs, state, "torch_sequence" if name == "dropout" else "reference", **call)
    monkeypatch.setattr(small_product, "MOST_WORK", {device.type: 2**20})
    packings = []
    monkeypatch.setattr(SmallProduct, "__init__", lambda *given: (packings.append(given), Product.__init__(*given))[1])
    torch.manual_seed(2)
    assert_close(run(dnc, inputs, state, "triton_fused", **call), wanted, **CLOSE, name="")
    assert packings


@pytest.mark.parametrize(
    ("steps", "batch", "size", "hidden", "words", "vector", "out"),
    [(3, 5, 6, 8, 12, 21, 5), (2, 1, 1, 1, 1, 8, 1), (7, 16, 9, 33, 16, 40, 35)],
)
def test_weight_gradients(
    steps: int, batch: int, size: int, hidden: int, words: int, vector: int, out: int, device: torch.device
) -> None:
    """Sums over part of a block and over several, and likewise tiles; inputs batch first, as a user has them."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    d_gates, d_vectors, d_outputs = (draw(steps, batch, n) for n in (4 * hidden, vector, out))
    inputs, features = draw(batch, steps, size).transpose(0, 1), draw(steps + 1, batch, hidden + words)
    given = d_gates, d_vectors, d_outputs, inputs, features[:-1], features[1:]
    with launches_in_margins() as around:
        actual = weight_gradients(*given)
    assert around.seen == {"weight_gradients_kernel"}
    d_gates, d_vectors, d_outputs, inputs, before, after = (x.double().flatten(0, 1) for x in given)
    expected = WeightGradients(
        torch.cat([d_gates.T @ inputs, d_gates.T @ before[:, hidden:]], 1),
        d_gates.T @ before[:, :hidden],
        d_gates.sum(0),
        d_gates.sum(0),
        d_vectors.T @ after[:, :hidden],
        d_vectors.sum(0),
        d_outputs.T @ after,
        d_outputs.sum(0),
    )
    assert_close(actual, expected, rtol=2e-6, atol=2e-5, name="")
    d_gates, d_vectors, d_outputs, inputs, before, after = given
    wide = torch.full((*inputs.shape, 2), torch.nan, device=device)
    wide[..., 1] = inputs
    assert_same_bits(weight_gradients(d_gates, d_vectors, d_outputs, wide[..., 1], before, after), actual)


def test_what_is_small() -> None:
    assert not is_small(1, torch.empty(4, 4, device="meta"), dtype=torch.float32)

    class Weight:
        device, dtype = torch.device("cuda"), torch.float32

        def __init__(self, size: int) -> None:
            self.size = size

        def numel(self) -> int:
            return self.size

    small: Any = Weight(1024 * 512)
    assert is_small(64, small, dtype=torch.float32)
    assert not is_small(64, small, small, dtype=torch.float32)
    assert not is_small(65, small, dtype=torch.float32)
    assert not is_small(1, small, dtype=torch.bfloat16)


@pytest.mark.parametrize(("given", "small"), [([16, 16], True), ([8, 32], False), ([32, 8], False)])
def test_products_are_small_where_those_of_every_layer_are(
    given: list[int], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a feedforward controller. The first layer's product with the network's input is none of a step's products."""
    monkeypatch.setattr(small_product, "MOST_WORK", {"cpu": 3 * 4 * 16})
    sequence: Any = Sequence.__new__(Sequence)
    sequence.batch = 3
    sequence.settings = SimpleNamespace(layout=object(), num_layers=2, product_dtype=torch.float32, cell=Cell)
    sizes = [(4, 100 + given[0]), (4,), (4, given[1]), (4,), (9, 4), (9,), (2, 4), (2,)]
    sequence._products([torch.empty(size) for size in sizes], 100)
    assert [isinstance(product, SmallProduct) for product in (*sequence.below, sequence.interface)] == [small] * 3
