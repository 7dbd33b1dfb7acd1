"""What the layer's constructor chooses, also controllers of your own and dtypes; and what autocast leaves alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import total
from small_layer import (
    BATCH,
    CLOSE,
    EXACT,
    HIDDEN,
    INPUTS,
    LENGTHS,
    OUTPUTS,
    RESETS,
    SIZES,
    STEPS,
    gradients,
    make,
    make_inputs,
    warm_state,
)
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from dnc_reference import DNCCell
from dnc_triton import DNC, DNCState, Interface, memory_step

# --- What the constructor chooses


def test_clip_bounds_controller_and_output():
    free, clipped, loose = make(), make(clip=0.125), make(clip=1e6)
    with torch.no_grad():
        for dnc in (free, clipped, loose):
            dnc.output.weight.mul_(10)
    inputs = make_inputs()
    outputs, state = clipped(inputs)
    for x in (outputs, *state.controller[0]):
        assert x.abs().max() == 0.125
    assert clipped.advance(inputs[:, 0], clipped.initial_state(BATCH))[0][:, :HIDDEN].abs().max() == 0.125
    assert_close(loose(inputs), free(inputs), **EXACT)
    assert free(inputs)[0].abs().max() > 0.125
    # The bound has no gradient beyond it, and the memory is not clipped.
    assert (gradients(outputs[outputs.abs() == 0.125].sum(), clipped)[-1] == 0).all()
    with torch.no_grad():
        clipped.interface.bias.fill_(5)
    assert clipped(inputs)[1].memory.memory.abs().max() > 0.125


@pytest.mark.parametrize("name", ["clip", "max_activation_gradient"])
def test_a_bound_is_kept_as_pythons_own_number(name):
    """A compiler takes no other."""
    dnc = make(**{name: np.float32(0.5)})
    assert type(getattr(dnc, name)) is float
    assert getattr(dnc, name) == 0.5


def test_an_initial_state_for_a_number_of_numpys():
    assert make().initial_state(np.int64(3)).read_words.shape[0] == 3


def test_dropout_acts_between_layers_in_training_only():
    dnc, inputs = make(num_layers=2, dropout=0.5), make_inputs()
    assert not torch.equal(dnc(inputs)[0], dnc(inputs)[0])
    assert_close(dnc.eval()(inputs), make(num_layers=2)(inputs), **EXACT)


def test_dropout_of_a_single_layer_warns_and_does_nothing():
    with pytest.warns(UserWarning, match="dropout: 0.5 has no effect with num_layers=1"):
        dnc = make(dropout=0.5)
    assert_close(dnc(make_inputs()), make()(make_inputs()), **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(num_layers=2, dropout=0.5)


def test_a_warning_is_of_the_line_that_made_the_layer():
    with pytest.warns(UserWarning, match="dropout") as warned:
        DNC(INPUTS, HIDDEN, OUTPUTS, **SIZES, dropout=0.5)
    assert [warning.filename for warning in warned] == [__file__]


def test_strengths_differ():
    inputs = make_inputs()
    assert (make()(inputs)[0] - make(strength="softplus")(inputs)[0]).abs().max() > 1e-6


def test_stop_usage_gradient_changes_gradients_only():
    full, stopped, inputs = make(), make(stop_usage_gradient=True), make_inputs()
    runs = [(dnc, dnc(inputs)) for dnc in (full, stopped)]
    assert_close(runs[0][1], runs[1][1], **EXACT)
    of_full, of_stopped = (gradients(total(*run), dnc) for dnc, run in runs)
    assert max((a - b).abs().max() for a, b in zip(of_full, of_stopped, strict=True)) > 1e-6


@pytest.mark.parametrize("num_writes", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "feedforward"])
def test_every_controller(controller, num_layers, num_writes):
    dnc = make(controller=controller, num_layers=num_layers, num_writes=num_writes)
    inputs = make_inputs()
    outputs, state = dnc(inputs)
    per_layer = {"lstm": 2, "gru": 1, "rnn": 1, "feedforward": 0}[controller]
    assert [len(layer) for layer in state.controller] == [per_layer] * num_layers
    # The layer is its own cell, step by step.
    cell_state, steps = dnc.initial_state(BATCH), []
    for step in range(STEPS):
        output, cell_state = DNCCell.forward(dnc, inputs[:, step], cell_state)
        steps.append(output)
    assert_close((outputs, state), (torch.stack(steps, dim=1), cell_state), **CLOSE)
    assert all(x.abs().max() > 0 for x in gradients(total(outputs, state), dnc))


class OwnController(nn.Module):
    """What a user might write: torch's own cell, with a state that is no tuple of tuples."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.cell = nn.GRUCell(input_size, hidden_size)

    def initial_state(self, batch_size, *, device=None, dtype=None):
        return {"hidden": torch.zeros(batch_size, self.cell.hidden_size, device=device, dtype=dtype)}

    def forward(self, inputs, state):
        hidden = self.cell(inputs, state["hidden"])
        return hidden, {"hidden": hidden}


def test_a_controller_of_your_own():
    made_with = []

    def factory(input_size, hidden_size):
        made_with.append((input_size, hidden_size))
        return OwnController(input_size, hidden_size)

    own, built_in = make(controller=factory), make(controller="gru")
    assert made_with == [(INPUTS + 2 * 4, HIDDEN)]
    assert {p.dtype for p in own.parameters()} == {torch.float64}
    renamed = {name.replace("layers.0", "cell"): value for name, value in built_in.state_dict().items()}
    own.load_state_dict(renamed)
    inputs, options = make_inputs(), dict(lengths=LENGTHS, reset=RESETS)
    given = warm_state(own)
    outputs, state = own(inputs, given, **options)
    same = DNCState(((given.controller["hidden"],),), given.memory, given.read_words)
    expected_outputs, expected_state = built_in(inputs, same, **options)
    assert_close((outputs, state.memory), (expected_outputs, expected_state.memory), **CLOSE)
    assert_close(state.controller["hidden"], expected_state.controller[0][0], **CLOSE)


class GrowingController(nn.Module):
    """Sees all its earlier outputs: its state is one step longer after each step."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.linear, self.hidden_size = nn.Linear(input_size, hidden_size), hidden_size

    def initial_state(self, batch_size, *, device=None, dtype=None):
        return torch.zeros(batch_size, 0, self.hidden_size, device=device, dtype=dtype)

    def forward(self, inputs, state):
        hidden = torch.tanh(self.linear(inputs)) + state.sum(1)
        return hidden, torch.cat([state, hidden.unsqueeze(1)], dim=1)


def test_a_controller_whose_state_grows():
    dnc, inputs = make(controller=GrowingController), make_inputs()
    outputs, state = dnc(inputs)
    assert state.controller.shape == (BATCH, STEPS, HIDDEN)
    first, between = dnc(inputs[:, :2])
    second, after = dnc(inputs[:, 2:], between)
    assert_close((torch.cat([first, second], dim=1), after), (outputs, state), **CLOSE)


@pytest.mark.parametrize("option", ["lengths", "reset"])
def test_a_state_that_grows_is_refused_where_rows_are_chosen(option):
    """Rows cannot be chosen between tensors of different shapes. That is an error, not a shorter state."""
    dnc, inputs = make(controller=GrowingController), make_inputs()
    options = {"lengths": [STEPS] * BATCH} if option == "lengths" else {"reset": RESETS & False}
    with pytest.raises(ValueError, match="state: expected one shape in every step"):
        dnc(inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    """To one unit in the last place of 1; these outputs, below 1, are off by at most a quarter of that."""
    exact, _ = make()(make_inputs())
    dnc = make(dtype=dtype)
    dnc.load_state_dict(make().state_dict())
    outputs, state = dnc(make_inputs(dtype=dtype))
    assert {x.dtype for x in tree_leaves((outputs, state))} == {dtype}
    assert_close(outputs.double(), exact, rtol=0, atol=torch.finfo(dtype).eps)
    assert all(x.isfinite().all() for x in gradients(total(outputs, state), dnc))
    later = make().to(dtype)
    assert_close(later(make_inputs(dtype=dtype)), (outputs, state), **EXACT)


def test_default_dtype_is_torchs():
    assert {p.dtype for p in make(dtype=None).parameters()} == {torch.float32}


@pytest.mark.parametrize("controller", ["lstm", "feedforward", OwnController], ids=["lstm", "feedforward", "own"])
def test_made_on_meta(controller):
    dnc = make(device="meta", controller=controller)
    assert {x.device.type for x in (*dnc.parameters(), *tree_leaves(dnc.initial_state(2)))} == {"meta"}
    real = dnc.to_empty(device="cpu")
    real.load_state_dict(make(controller=controller).state_dict())
    assert_close(real(make_inputs()), make(controller=controller)(make_inputs()), **EXACT)


@pytest.mark.parametrize("writes", [1, 2])
def test_shapes_on_meta(writes):
    """As one operation, and step by step."""
    outputs, state = make(device="meta", num_writes=writes)(make_inputs().to("meta"))
    assert outputs.shape == (BATCH, STEPS, OUTPUTS)
    assert state.memory.link.shape == (BATCH, writes, 5, 5)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, ""),
        ({"batch_first": False, "backend": "reference"}, ", batch_first=False, backend='reference'"),
        (
            {"num_layers": 2, "dropout": 0.25, "clip": 20.0, "strength": "softplus", "stop_usage_gradient": True},
            ", num_layers=2, dropout=0.25, clip=20.0, strength='softplus', stop_usage_gradient=True",
        ),
    ],
    ids=["defaults", "layer", "cell"],
)
def test_extra_repr_shows_what_is_not_default(changes, more):
    sizes = "3, 6, 2, memory_size=5, word_size=4, num_reads=2, num_writes=1, controller='lstm'"
    assert make(**changes).extra_repr() == sizes + more
    assert sizes in repr(make(**changes))


@pytest.mark.parametrize(
    ("controller", "cell"),
    [("lstm", nn.LSTMCell), ("gru", nn.GRUCell), ("rnn", nn.RNNCell), ("feedforward", nn.Linear)],
)
def test_parameters_start_as_torchs(controller, cell):
    """The same draws in the same order as torch's own modules make them."""
    torch.manual_seed(3)
    dnc = DNC(INPUTS, HIDDEN, OUTPUTS, **SIZES, controller=controller, num_layers=2)
    torch.manual_seed(3)
    read_size = 2 * 4
    modules = [
        cell(INPUTS + read_size, HIDDEN),
        cell(HIDDEN, HIDDEN),
        nn.Linear(HIDDEN, dnc.interface.out_features),
        nn.Linear(HIDDEN + read_size, OUTPUTS),
    ]
    expected = [p for module in modules for p in module.parameters()]
    assert_close(list(dnc.parameters()), expected, **EXACT)


# --- Autocast


@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "feedforward"])
@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_state_in_float32(controller, inputs_dtype):
    dnc = make(dtype=torch.float32, controller=controller, num_layers=2)
    inputs = make_inputs(dtype=inputs_dtype)
    expected, _ = dnc(inputs.float(), lengths=LENGTHS)
    given = warm_state(dnc)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, state = dnc(inputs, lengths=LENGTHS)
        again, state = dnc(inputs, state)
        empty, _ = dnc(inputs[:, :0])
    assert outputs.dtype == again.dtype == empty.dtype == torch.bfloat16  # as nn.Linear's are
    assert {x.dtype for x in tree_leaves(state)} == {torch.float32}
    # bfloat16 has 8 bits; the products of a handful of steps and layers add up to a few roundings.
    assert_close(outputs.float(), expected, rtol=0, atol=5e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = total(dnc(inputs, given))
    assert all(x.isfinite().all() for x in gradients(loss, given, dnc))


class LinearController(OwnController):
    """Plain products, which autocast leaves in bfloat16."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size)
        self.linear = nn.Linear(input_size, hidden_size)

    def forward(self, inputs, state):
        hidden = torch.tanh(self.linear(inputs))
        return hidden, {"hidden": hidden}


@pytest.mark.parametrize("choice", [dict(), dict(backend="reference"), dict(num_writes=2)], ids=str)
def test_autocast_loses_no_gradients_of_many_steps(choice):
    """Added up in bfloat16 over all steps, those of the weights came out wrong by 2 to 9 % here."""
    inputs = make_inputs(steps=200, dtype=torch.float32)

    def run(enabled):
        dnc = make(dtype=torch.float32, **choice)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs, _ = dnc(inputs)
        return gradients((outputs.float() - 1).square().mean(), dnc)

    for rounded, exact in zip(run(True), run(False), strict=True):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_a_rounded_weight_serves_several_steps(monkeypatch):
    """A copy for every step would take much memory."""
    forgotten = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: forgotten.append(1))
    dnc = make(dtype=torch.float32, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dnc(make_inputs(steps=33, dtype=torch.float32))
        assert len(forgotten) == 3  # before the steps 0, 16 and 32


def test_autocast_keeps_a_state_of_your_own_in_float32():
    dnc = make(dtype=torch.float32, controller=LinearController)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = dnc(make_inputs(dtype=torch.float32))
    assert {x.dtype for x in tree_leaves(state)} == {torch.float32}


def test_autocast_leaves_a_single_memory_step_alone():
    interface = Interface(**{name: torch.rand(shape) for name, shape in Interface.shapes(BATCH, 4, 2).items()})
    state = warm_state(make(dtype=torch.float32)).memory
    expected = memory_step(interface, memory_step(interface, state)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = memory_step(interface, memory_step(interface, state)[1])
    assert_close(got, expected, **EXACT)
