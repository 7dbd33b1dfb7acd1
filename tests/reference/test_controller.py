"""The controllers against torch's own cells and layers, and a controller of one's own in a whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import as_leaves, assert_close, assert_same_bits, random_like
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves

from dnc_reference import DNCCell, DNCState, unroll
from dnc_reference.controller import CONTROLLERS, Controller

B, T, INPUT, HIDDEN = 3, 6, 4, 5
RTOL = 1e-13  # the same sums in float64, in another order
ATOL = 1e-15  # and a gradient is a sum of terms of magnitude 1

TORCH_CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
TORCH_LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
each_kind = pytest.mark.parametrize("kind", TORCH_CELLS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(results, leaves, random_like(results)))


# --- as torch's -------------------------------------------------------------------------------------------------------


@each_kind
def test_a_cell_is_torchs(kind: str) -> None:
    theirs = TORCH_CELLS[kind](INPUT, HIDDEN, dtype=torch.float64)
    ours = CONTROLLERS[kind](INPUT, HIDDEN, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())  # strict: the names and shapes are torch's too
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]

    inputs, state = as_leaves((normal(B, INPUT), tuple(normal(B, HIDDEN) for _ in range(ours.states))))
    hidden, new_state = ours(inputs, state)
    expected = theirs(inputs, state if kind == "lstm" else state[0])
    expected_state = expected if kind == "lstm" else (expected,)
    assert_close((hidden, new_state), (expected_state[0], expected_state), rtol=RTOL)
    leaves = [inputs, *state]
    d_ours = gradients(list(new_state), [*leaves, *ours.parameters()])
    d_theirs = gradients(list(expected_state), [*leaves, *theirs.parameters()])
    assert_close(d_ours, d_theirs, rtol=RTOL, atol=ATOL)


@each_kind
def test_under_autocast_a_cell_rounds_its_products_and_no_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CONTROLLERS[kind](INPUT, HIDDEN)
    inputs, state = torch.randn(B, INPUT), tuple(torch.randn(B, HIDDEN) for _ in range(cell.states))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        actual = cell(inputs, state)
        products = [F.linear(inputs, cell.weight_ih, cell.bias_ih), F.linear(state[0], cell.weight_hh, cell.bias_hh)]
    if kind != "gru":  # which uses them one by one
        products = [products[0] + products[1], torch.zeros_like(products[0])]
    rounded = iter(products)
    monkeypatch.setattr(F, "linear", lambda *_: next(rounded).float())
    assert_same_bits(actual, cell(inputs, state))


def load_layers(controller: Controller, layers: nn.RNNBase) -> None:
    for index, cell in enumerate(controller.layers):
        cell.load_state_dict({name: getattr(layers, f"{name}_l{index}") for name in cell.state_dict()})


@each_kind
def test_a_stack_is_torchs(kind: str) -> None:
    theirs = TORCH_LAYERS[kind](INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    ours = Controller(kind, INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    load_layers(ours, theirs)

    inputs, *packed = as_leaves([normal(T, B, INPUT), *(normal(2, B, HIDDEN) for _ in range(ours.states_per_layer))])
    state: Any = tuple(tuple(tensor[layer] for tensor in packed) for layer in range(2))
    outputs = []
    for step_inputs in inputs:
        hidden, state = ours(step_inputs, state)
        outputs.append(hidden)
    expected_outputs, expected_state = theirs(inputs, tuple(packed) if kind == "lstm" else packed[0])

    results = [torch.stack(outputs), *(torch.stack(tensors) for tensors in zip(*state, strict=True))]
    expected = [expected_outputs, *(expected_state if kind == "lstm" else (expected_state,))]
    assert_close(results, expected, rtol=RTOL)
    assert_close(gradients(results, [inputs, *packed]), gradients(expected, [inputs, *packed]), rtol=RTOL, atol=ATOL)


@each_kind
def test_initial_parameters_have_torchs_range(kind: str) -> None:
    """Uniform in ±1/√H, biases too: bounded by it, and filling it."""
    hidden = 64
    bound = hidden**-0.5
    for parameter in Controller(kind, INPUT, hidden, num_layers=2).parameters():
        assert parameter.abs().max() <= bound
        assert parameter.max() > 0.9 * bound
        assert parameter.min() < -0.9 * bound
        # Of a uniform distribution: bound/√3.
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_feedforward_is_one_layer_of_tanh_without_a_state() -> None:
    controller = Controller("feedforward", INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    first, second = controller.layers
    state = controller.initial_state(B)
    assert state == ((), ())
    inputs = normal(B, INPUT)
    hidden, new_state = controller(inputs, state)
    expected = torch.tanh(torch.tanh(inputs @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    assert_close(hidden, expected, rtol=RTOL)
    assert new_state == state


@pytest.mark.parametrize(("kind", "states"), [("lstm", 2), ("gru", 1), ("rnn", 1), ("feedforward", 0)])
def test_the_initial_state_is_zeros_per_layer(kind: str, states: int) -> None:
    state = Controller(kind, INPUT, HIDDEN, num_layers=3).initial_state(B, dtype=torch.float64)
    assert [len(layer) for layer in state] == [states] * 3
    for tensor in tree_leaves(state):
        assert tensor.shape == (B, HIDDEN)
        assert tensor.dtype == torch.float64
        assert not tensor.any()


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_dropout_acts_between_layers_in_training_only(kind: str) -> None:
    controller = Controller(kind, INPUT, HIDDEN, num_layers=2, dropout=0.5, dtype=torch.float64)
    inputs, state = normal(B, INPUT), controller.initial_state(B, dtype=torch.float64)

    controller.eval()
    (hidden, new_state), (again, _) = controller(inputs, state), controller(inputs, state)
    without = Controller(kind, INPUT, HIDDEN, num_layers=2, dtype=torch.float64)
    without.load_state_dict(controller.state_dict())
    assert torch.equal(hidden, again)
    assert torch.equal(hidden, without(inputs, state)[0])

    controller.train()
    dropped, dropped_state = controller(inputs, state)
    assert not torch.equal(dropped, hidden)
    # Neither the input of the first layer is dropped nor the state that is carried on, nor the output.
    assert_close(dropped_state[0], new_state[0])
    assert dropped.all()
    # What gets through is scaled up, and comes from the first layer's output.
    passed = []
    controller.layers[1].register_forward_pre_hook(lambda _, arguments: passed.append(arguments[0]))
    first = controller.layers[0](inputs, state[0])[0]
    controller(inputs, state)
    assert ((passed[0] == 0) | ((passed[0] - 2 * first).abs() < 1e-12)).all()


# --- of one's own -----------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """A perceptron that sees a running mean of its inputs: a nest for a state, and nothing like an LSTM's."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.layers = nn.Sequential(nn.Linear(2 * input_size, 7), nn.Tanh(), nn.Linear(7, hidden_size))

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> dict[str, Any]:
        zeros = torch.zeros(batch_size, self.input_size, device=device, dtype=dtype)
        return {"mean": zeros, "seen": [zeros[:, :1]]}

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        mean = (state["mean"] + inputs) / 2
        return self.layers(torch.cat([inputs, mean], -1)), {"mean": mean, "seen": [state["seen"][0] + 1]}


def make_cell(**options: Any) -> DNCCell:
    sizes = dict(memory_size=3, word_size=2, num_reads=1, dtype=torch.float64)
    return DNCCell(2, HIDDEN, 2, controller=TwoLayers, **sizes, **options)


def test_a_controller_of_ones_own() -> None:
    cell = make_cell()
    assert isinstance(cell.controller, TwoLayers)
    assert cell.controller.input_size == 2 + 1 * 2  # the input and what was read
    assert {parameter.dtype for parameter in cell.parameters()} == {torch.float64}

    outputs, state = unroll(cell, normal(T, B, 2), cell.initial_state(B))
    assert outputs.shape == (T, B, 2)
    assert isinstance(state, DNCState)
    assert state.controller["seen"][0].tolist() == [[T]] * B


def test_gradients_through_a_controller_of_ones_own() -> None:
    cell = make_cell()
    inputs = normal(3, 1, 2).requires_grad_()
    # gradcheck changes its arguments in place, so the cell sees its parameters change.
    assert gradcheck(lambda *_: unroll(cell, inputs, cell.initial_state(1))[0], (inputs, *cell.parameters()))


def test_lengths_and_reset_reach_the_state_of_a_controller_of_ones_own() -> None:
    cell = make_cell()
    reset = torch.zeros(T, 2, dtype=torch.bool)
    reset[3, 1] = True
    _, state = unroll(cell, normal(T, 2, 2), cell.initial_state(2), lengths=torch.tensor([4, T]), reset=reset)
    assert state.controller["seen"][0].tolist() == [[4], [3]]


def test_clip_bounds_the_state_of_a_controller_of_ones_own() -> None:
    cell = make_cell(clip=0.25)
    _, state = unroll(cell, 100 * normal(T, B, 2), cell.initial_state(B))
    assert max(tensor.abs().max().item() for tensor in tree_leaves(state.controller)) == 0.25


def test_a_clip_lets_the_gradient_of_what_stands_at_its_bound_through() -> None:
    """Of outputs at either bound, within, and beyond; whatever PyTorch's clamp does."""
    cell = DNCCell(2, 3, 5, memory_size=4, word_size=2, num_reads=1, clip=0.5, dtype=torch.float64)
    with torch.no_grad():
        cell.output.weight.zero_()
        cell.output.bias.copy_(torch.tensor([-0.5, 0.5, 0.25, -0.75, torch.nan]))
    outputs, _ = cell(normal(B, 2), cell.initial_state(B))
    assert_same_bits(outputs, torch.tensor([-0.5, 0.5, 0.25, -0.5, torch.nan], dtype=torch.float64).expand(B, -1))
    (gradient,) = torch.autograd.grad(outputs.sum(), cell.output.bias)
    assert gradient.tolist() == [B, B, B, 0, 0]


# --- bounded gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_the_gradient_by_each_hidden_vector_is_bounded(kind: str) -> None:
    """As if the loss had been that of the bounded gradient."""
    bound, rows = 0.25, 3
    controller = Controller(kind, INPUT, HIDDEN, max_activation_gradient=bound).double()
    free = Controller(kind, INPUT, HIDDEN).double()
    free.load_state_dict(controller.state_dict())
    inputs, state = (
        normal(rows, INPUT),
        tuple(tuple(normal(rows, HIDDEN) for _ in layer) for layer in free.initial_state(rows, dtype=torch.float64)),
    )
    weight = torch.linspace(-1, 1, rows * HIDDEN, dtype=torch.float64).view(rows, HIDDEN)
    (hidden, _), (expected, _) = controller(inputs, state), free(inputs, state)
    assert torch.equal(hidden, expected)
    actual = torch.autograd.grad((hidden * weight).sum(), list(controller.parameters()))
    wanted = torch.autograd.grad((expected * weight.clamp(-bound, bound)).sum(), list(free.parameters()))
    assert_close(actual, wanted, rtol=RTOL)
    assert (weight.abs() > bound).any()
    assert (weight.abs() < bound).any()


def test_all_that_a_hidden_vector_goes_to_counts_against_the_bound() -> None:
    """Its output and its place in the state give one gradient, which is bounded once."""
    controller = Controller("rnn", INPUT, HIDDEN, max_activation_gradient=1.0).double()
    free = Controller("rnn", INPUT, HIDDEN).double()
    free.load_state_dict(controller.state_dict())
    inputs, state = normal(B, INPUT), ((normal(B, HIDDEN),),)
    hidden, ((carried,),) = controller(inputs, state)
    actual = torch.autograd.grad((0.75 * hidden + 0.75 * carried).sum(), list(controller.parameters()))
    wanted = torch.autograd.grad(free(inputs, state)[0].sum(), list(free.parameters()))
    assert_close(actual, wanted, rtol=RTOL)


def test_the_gradient_of_each_sample_is_bounded() -> None:
    controller = Controller("feedforward", INPUT, HIDDEN, max_activation_gradient=0.25).double()
    inputs = normal(B, INPUT).requires_grad_()

    def loss(rows: Tensor) -> Tensor:
        return controller(rows, ((),))[0].sum()

    each = torch.func.vmap(torch.func.grad(lambda row: loss(row.unsqueeze(0))))(inputs.detach())
    (together,) = torch.autograd.grad(loss(inputs), inputs)
    assert_close(each, together, rtol=RTOL)


def test_a_bound_is_for_the_built_in_ones() -> None:
    with pytest.raises(ValueError, match=r"max_activation_gradient: expected None .* got 10"):
        DNCCell(2, 3, 1, controller=lambda i, h: Controller("rnn", i, h), max_activation_gradient=10.0)
