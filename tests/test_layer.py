"""The layer: what goes in, what comes out, what passes from call to call, and how it gets on with the rest of torch."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from dnc_reference import DNCCell
from dnc_triton import DNC, DNCState, Interface, MemoryState, memory_step

BATCH, STEPS, INPUTS, HIDDEN, OUTPUTS = 4, 5, 3, 6, 2
SIZES = dict(memory_size=5, word_size=4, num_reads=2)
# float64: summing in another order then moves the last digits only, so that one bound serves every comparison of two
# ways to the same value. "Bit for bit" is `rtol=0, atol=0`.
CLOSE = dict(rtol=1e-10, atol=1e-12)
EXACT = dict(rtol=0.0, atol=0.0)


def make(**changes) -> DNC:
    torch.manual_seed(0)
    dnc = DNC(INPUTS, HIDDEN, OUTPUTS, **{**SIZES, "dtype": torch.float64, **changes})
    if changes.get("device") != "meta":
        with torch.no_grad():  # as torch initialises it the memory hardly matters: the gates all stand near one half
            dnc.interface.weight.mul_(4)
    return dnc


def make_inputs(batch=BATCH, steps=STEPS, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, steps, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def warm_state(dnc: DNC, batch=BATCH) -> DNCState:
    """A state some steps in, whose tensors are leaves that want a gradient."""
    inputs = torch.randn(batch, 6, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = inputs.to(dnc.output.weight.dtype)
    _, state = dnc(inputs if dnc.batch_first else inputs.transpose(0, 1))
    return state.map(lambda x: x.detach().clone().requires_grad_())


def row(tree, index: int):
    """One row of a batch, as a batch of one."""
    return tree.map(lambda x: x[index : index + 1]) if isinstance(tree, DNCState) else tree[index : index + 1]


def rows_together(states: list[DNCState]) -> DNCState:
    leaves, structure = zip(*map(tree_flatten, states), strict=True)
    return tree_unflatten([torch.cat(same) for same in zip(*leaves, strict=True)], structure[0])


def total(*trees) -> torch.Tensor:
    """A loss that sees every number in them, each with a weight of its own."""
    leaves = tree_leaves(trees)
    return sum(((torch.arange(x.numel(), dtype=x.dtype) + 1).cos() * x.flatten()).sum() for x in leaves)


def gradients(loss: torch.Tensor, *trees) -> tuple[torch.Tensor, ...]:
    leaves = [x for tree in trees for x in (tree.parameters() if isinstance(tree, nn.Module) else tree_leaves(tree))]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


# --- Shapes and order


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (4, 1), (1, 5), (4, 5)])
def test_shapes(batch, steps, batch_first):
    dnc = make(batch_first=batch_first, num_writes=2, num_layers=2)
    inputs = torch.randn(*((batch, steps) if batch_first else (steps, batch)), INPUTS, dtype=torch.float64)
    outputs, state = dnc(inputs)
    assert outputs.shape == (*inputs.shape[:2], OUTPUTS)
    assert isinstance(state, DNCState)
    assert isinstance(state.memory, MemoryState)
    shapes = {name: tuple(x.shape) for name, x in state.memory._asdict().items()}
    assert shapes == MemoryState.shapes(batch, 5, 4, num_reads=2, num_writes=2)
    assert state.read_words.shape == (batch, 2, 4)
    assert [[x.shape for x in layer] for layer in state.controller] == [[(batch, HIDDEN)] * 2] * 2


def test_batch_first_only_swaps_axes():
    rows_first, steps_first = make(), make(batch_first=False)
    inputs, lengths, reset = make_inputs(), [2, 5, 0, 3], torch.rand(BATCH, STEPS) < 0.3
    outputs, state = rows_first(inputs, warm_state(rows_first), lengths=lengths, reset=reset)
    other_outputs, other_state = steps_first(
        inputs.transpose(0, 1), warm_state(steps_first), lengths=lengths, reset=reset.T
    )
    assert_close((outputs, state), (other_outputs.transpose(0, 1), other_state), **EXACT)


def test_the_smallest_of_everything():
    dnc = DNC(1, 1, 1, memory_size=1, word_size=1, num_reads=1, dtype=torch.float64)
    outputs, state = dnc(torch.randn(1, 3, 1, dtype=torch.float64))
    assert outputs.shape == (1, 3, 1)
    assert all(x.isfinite().all() for x in gradients(total(outputs, state), dnc))
    assert state.memory.link.item() == 0  # a slot is never written after itself


@pytest.mark.parametrize("options", [{}, {"lengths": True}, {"reset": True}], ids=["plain", "lengths", "reset"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("batch", "steps"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(batch, steps, batch_first, options):
    dnc = make(batch_first=batch_first)
    shape = (batch, steps) if batch_first else (steps, batch)
    if "lengths" in options:
        options = {"lengths": torch.zeros(batch, dtype=torch.int64)}
    if "reset" in options:
        options = {"reset": torch.ones(shape, dtype=torch.bool)}
    inputs = torch.randn(*shape, INPUTS, dtype=torch.float64, requires_grad=True)
    given = warm_state(dnc, batch)
    for state in (given, None):
        outputs, after = dnc(inputs, state, **options)
        assert outputs.shape == (*shape, OUTPUTS)
        assert_close(after, dnc.initial_state(batch) if state is None else given, **EXACT)
        assert all((x == 0).all() for x in gradients(outputs.sum(), inputs, dnc))


@pytest.mark.parametrize("whose", ["class", "layer", "controller"])
def test_an_initial_state_of_ones_own(whose):
    """By default a call makes one that nobody sees."""

    class Own(DNC):
        def initial_state(self, batch_size):
            return begin(self, batch_size)

    def begin(dnc, batch_size):
        return DNC.initial_state(dnc, batch_size).map(torch.ones_like)

    torch.manual_seed(0)
    dnc = (Own if whose == "class" else DNC)(3, 6, 2, memory_size=5, word_size=4)
    if whose == "layer":
        dnc.initial_state = lambda batch_size: begin(dnc, batch_size)
    elif whose == "controller":
        zeros = dnc.controller.initial_state
        dnc.controller.initial_state = lambda *sizes, **options: tree_map(torch.ones_like, zeros(*sizes, **options))
    inputs = torch.randn(2, 4, 3)
    actual = dnc(inputs)
    assert_close(actual, dnc(inputs, dnc.initial_state(2)), rtol=0, atol=0)
    assert (actual[0] != dnc(inputs, DNC.initial_state(dnc, 2).map(torch.zeros_like))[0]).any()


def test_strided_inputs_and_nothing_is_written_to():
    dnc, inputs = make(), make_inputs()
    state = warm_state(dnc)
    wide = torch.full((BATCH, 2 * STEPS, 2 * INPUTS), torch.nan, dtype=torch.float64)
    wide[:, ::2, 1::2] = inputs
    strided = state.map(lambda x: x.detach().mT.contiguous().mT)
    before = copy.deepcopy((inputs, state))
    assert_close(dnc(wide[:, ::2, 1::2], strided), dnc(inputs, state), **CLOSE)
    assert_close((inputs, state), before, **EXACT)


# --- The state


@pytest.mark.parametrize("chunks", [[2, 3], [1, 1, 1, 1, 1], [0, 5, 0]], ids=str)
@pytest.mark.parametrize("warm", [True, False])
def test_whole_equals_chunks(chunks, warm):
    dnc, inputs = make(num_writes=2), make_inputs().requires_grad_()
    given = warm_state(dnc) if warm else None
    outputs, state = dnc(inputs, given)
    expected = gradients(total(outputs, state), inputs, [] if given is None else given, dnc)

    pieces, chunk_state = [], given
    for chunk in inputs.split(chunks, dim=1):
        piece, chunk_state = dnc(chunk, chunk_state)
        pieces.append(piece)
    assert_close((torch.cat(pieces, dim=1), chunk_state), (outputs, state), **CLOSE)
    got = gradients(total(torch.cat(pieces, dim=1), chunk_state), inputs, [] if given is None else given, dnc)
    assert_close(got, expected, **CLOSE)


def test_detach_cuts_the_graph_and_keeps_the_values():
    dnc, inputs = make(), make_inputs().requires_grad_()
    _, state = dnc(inputs)
    cut = state.detach()
    assert isinstance(cut, DNCState)
    assert_close(cut, state, **EXACT, check_layout=True)
    assert not any(x.requires_grad for x in tree_leaves(cut))
    outputs, _ = dnc(inputs[:, :2], cut)
    whole, _ = dnc(inputs[:, :2], state)
    assert_close(gradients(outputs.sum(), inputs)[0][:, 2:], torch.zeros(BATCH, 3, INPUTS, dtype=torch.float64))
    assert gradients(whole.sum(), inputs)[0][:, 2:].abs().min() > 0


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_states_are_pytrees(controller):
    state = warm_state(make(controller=controller))
    leaves, structure = tree_flatten(state)
    assert len(leaves) == (2 if controller == "lstm" else 0) + 6 + 1
    again = tree_unflatten(leaves, structure)
    for tree in (again, state.map(lambda x: x)):
        assert type(tree) is DNCState
        assert type(tree.memory) is MemoryState
        assert_close(tree, state, **EXACT)
    assert {x.dtype for x in tree_leaves(state.map(lambda x: x.to(torch.float32)))} == {torch.float32}
    assert {x.device.type for x in tree_leaves(state.map(lambda x: x.to("meta")))} == {"meta"}


def test_rows_are_independent():
    """A NaN in one row changes no bit of another."""
    dnc, inputs, state = make(), make_inputs(), warm_state(make()).detach()
    clean = dnc(inputs, state)
    spoilt_inputs, spoilt_state = inputs.clone(), state.map(torch.clone)
    spoilt_inputs[1, 2] = torch.nan
    for x in tree_leaves(spoilt_state):
        x[3] = torch.nan
    outputs, after = dnc(spoilt_inputs, spoilt_state)
    for index in (0, 2):
        assert_close((outputs[index], row(after, index)), (clean[0][index], row(clean[1], index)), **EXACT)
    assert outputs[1, 2:].isnan().all()
    assert outputs[3].isnan().all()


# --- lengths

LENGTHS = [3, 0, 5, 1]


def rows_alone(dnc, inputs, state, lengths, reset=None):
    """Each row by itself, to its own length; outputs after it are 0."""
    outputs, states = [], []
    for index, length in enumerate(lengths):
        own_reset = None if reset is None else row(reset, index)[:, :length]
        output, after = dnc(row(inputs, index)[:, :length], row(state, index), reset=own_reset)
        outputs.append(nn.functional.pad(output, (0, 0, 0, inputs.shape[1] - length)))
        states.append(after)
    return torch.cat(outputs), rows_together(states)


@pytest.mark.parametrize("controller", ["lstm", "gru"])
def test_each_row_as_if_alone(controller):
    dnc, inputs = make(controller=controller, num_layers=2), make_inputs().requires_grad_()
    given = warm_state(dnc)
    outputs, state = dnc(inputs, given, lengths=torch.tensor(LENGTHS))
    expected = rows_alone(dnc, inputs, given, LENGTHS)
    assert_close((outputs, state), expected, **CLOSE)
    assert_close(
        gradients(total(outputs, state), inputs, given, dnc), gradients(total(expected), inputs, given, dnc), **CLOSE
    )
    for index, length in enumerate(LENGTHS):
        assert (outputs[index, length:] == 0).all()
    assert_close(row(state, 1), row(given, 1), **EXACT)


@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -1e30])
def test_padding_changes_nothing(filler):
    dnc, given = make(), warm_state(make())
    padding = torch.arange(STEPS) >= torch.tensor(LENGTHS).unsqueeze(1)

    def run(value):
        inputs = make_inputs().masked_fill(padding.unsqueeze(-1), value).requires_grad_()
        outputs, state = dnc(inputs, given, lengths=LENGTHS)
        return outputs, state, *gradients(total(outputs, state), inputs, given, dnc)

    filled = run(filler)
    assert_close(filled, run(0.5), **EXACT)
    assert (filled[2][padding] == 0).all()


@pytest.mark.parametrize(
    "lengths",
    [tuple(LENGTHS), torch.tensor(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor(LENGTHS).byte()],
    ids=["tuple", "int64", "int32", "uint8"],
)
def test_lengths_of_any_integer_kind(lengths):
    dnc, inputs = make(), make_inputs()
    assert_close(dnc(inputs, lengths=lengths), dnc(inputs, lengths=LENGTHS), **EXACT)


def test_full_lengths_are_no_lengths():
    dnc, inputs = make(), make_inputs()
    assert_close(dnc(inputs, lengths=[STEPS] * BATCH), dnc(inputs), **EXACT)


# --- PackedSequence


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("lengths", "order"),
    [
        ([5, 4, 2, 1], None),
        ([5, 3, 3, 1], None),
        ([2, 5, 1, 4], "by torch"),
        ([3, 5, 3, 5], "by torch"),
        ([3, 5, 3, 5], [3, 1, 0, 2]),
        ([3, 5, 3, 5], [1, 3, 2, 0]),
    ],
    ids=["sorted", "sorted with ties", "unsorted", "ties", "ties by hand", "ties by hand, otherwise"],
)
def test_packed_in_packed_out(lengths, order, batch_first):
    """Equal to a padded run with the same lengths; the state is in the order of the batch, not of the packing."""
    dnc = make(batch_first=batch_first)
    given, padded = warm_state(dnc), make_inputs().requires_grad_()
    inputs = padded if batch_first else padded.transpose(0, 1)
    if isinstance(order, list):
        order = torch.tensor(order)
        packed = pack_padded_sequence(padded[order], torch.tensor(lengths)[order], batch_first=True)
        packed = PackedSequence(packed.data, packed.batch_sizes, order)
    else:
        packed = pack_padded_sequence(inputs, lengths, batch_first=batch_first, enforce_sorted=order is None)

    outputs, state = dnc(packed, given)
    expected_outputs, expected_state = dnc(inputs, given, lengths=lengths)
    assert isinstance(outputs, PackedSequence)
    assert_close(outputs[1:], packed[1:], **EXACT)
    unpacked, unpacked_lengths = pad_packed_sequence(outputs, batch_first=batch_first)
    assert unpacked_lengths.tolist() == lengths
    assert_close((unpacked, state), (expected_outputs, expected_state), **EXACT)
    assert_close(
        gradients(total(unpacked, state), padded, given, dnc),
        gradients(total(expected_outputs, expected_state), padded, given, dnc),
        **CLOSE,
    )


def test_packed_with_reset():
    dnc, inputs, reset = make(), make_inputs(), torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[2, 1] = True
    packed = pack_padded_sequence(inputs, [2, 5, 4, 1], batch_first=True, enforce_sorted=False)
    outputs, state = dnc(packed, reset=reset)
    expected_outputs, expected_state = dnc(inputs, lengths=[2, 5, 4, 1], reset=reset)
    assert_close(pad_packed_sequence(outputs, batch_first=True)[0], expected_outputs, **EXACT)
    assert_close(state, expected_state, **EXACT)


# --- reset


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_reset_starts_a_row_afresh(step, batch_first):
    dnc, inputs = make(batch_first=batch_first), make_inputs().requires_grad_()
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[2, step] = True

    def run(inputs, state=None, reset=None):
        if batch_first:
            return dnc(inputs, state, reset=reset)
        outputs, state = dnc(inputs.transpose(0, 1), state, reset=None if reset is None else reset.T)
        return outputs.transpose(0, 1), state

    given = warm_state(dnc)
    outputs, state = run(inputs, given, reset)
    plain_outputs, plain_state = run(inputs, given)
    fresh_outputs, fresh_state = run(row(inputs, 2)[:, step:])
    assert_close((row(outputs, 2)[:, step:], row(state, 2)), (fresh_outputs, fresh_state), **CLOSE)
    assert_close(outputs[2, :step], plain_outputs[2, :step], **EXACT)
    for index in (0, 1, 3):
        assert_close((outputs[index], row(state, index)), (plain_outputs[index], row(plain_state, index)), **EXACT)
    # Nothing of what came before is in the gradient either.
    d_inputs, *d_given = gradients(total(outputs[2, step:], row(state, 2)), inputs, given)
    assert (d_inputs[2, :step] == 0).all()
    assert all((x == 0).all() for x in d_given)


def test_no_reset_is_no_change():
    dnc, inputs, given = make(), make_inputs(), warm_state(make())
    assert_close(dnc(inputs, given, reset=torch.zeros(BATCH, STEPS, dtype=torch.bool)), dnc(inputs, given), **EXACT)


def test_reset_cleans_a_spoilt_state():
    dnc, inputs = make(), make_inputs()
    spoilt = warm_state(dnc).detach().map(torch.clone)
    for x in tree_leaves(spoilt):
        x[1] = torch.nan
    spoilt = spoilt.map(lambda x: x.requires_grad_())
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[1, 0] = True
    outputs, state = dnc(inputs, spoilt, reset=reset)
    assert_close((row(outputs, 1), row(state, 1)), dnc(row(inputs, 1)), **CLOSE)
    assert all(x.isfinite().all() for x in gradients(total(outputs, state), spoilt, dnc))


RESETS = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_lengths_and_reset_together():
    dnc, inputs = make(), make_inputs().requires_grad_()
    given = warm_state(dnc)
    outputs, state = dnc(inputs, given, lengths=LENGTHS, reset=RESETS)
    expected = rows_alone(dnc, inputs, given, LENGTHS, RESETS)
    assert_close((outputs, state), expected, **CLOSE)
    assert_close(
        gradients(total(outputs, state), inputs, given, dnc), gradients(total(expected), inputs, given, dnc), **CLOSE
    )


def test_reset_after_the_end_changes_nothing():
    """After its end a row's state stays, whatever stands in the padding of `inputs` and of `reset`."""
    dnc, inputs, given = make(), make_inputs(), warm_state(make())
    padding = torch.arange(STEPS) >= torch.tensor(LENGTHS).unsqueeze(1)
    expected = dnc(inputs, given, lengths=LENGTHS, reset=RESETS & ~padding)
    assert_close(dnc(inputs, given, lengths=LENGTHS, reset=RESETS | padding), expected, **EXACT)


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
    """Sees all it said before: its state is one step longer after each step."""

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
def test_a_state_that_grows_is_kept_or_refused(option):
    """Rows cannot be chosen between tensors of different shapes. That is an error, not a shorter state."""
    dnc, inputs = make(controller=GrowingController), make_inputs()
    options = {"lengths": [STEPS] * BATCH} if option == "lengths" else {"reset": RESETS & False}
    with contextlib.suppress(ValueError):
        assert_close(dnc(inputs, **options), dnc(inputs), **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_other_dtypes(dtype, tolerance):
    """The tolerance is some twenty roundings of the dtype: it finds a wrong path, not an imprecise one."""
    exact, _ = make()(make_inputs())
    dnc = make(dtype=dtype)
    dnc.load_state_dict(make().state_dict())
    outputs, state = dnc(make_inputs(dtype=dtype))
    assert {x.dtype for x in tree_leaves((outputs, state))} == {dtype}
    assert_close(outputs.double(), exact, rtol=0, atol=tolerance)
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


def test_shapes_on_meta():
    outputs, state = make(device="meta")(make_inputs().to("meta"))
    assert outputs.shape == (BATCH, STEPS, OUTPUTS)
    assert state.memory.link.shape == (BATCH, 1, 5, 5)


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


# --- Saving and copying


def through_a_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda dnc: pickle.loads(pickle.dumps(dnc)),
        lambda dnc: through_a_file(dnc, weights_only=False),
        lambda dnc: _loaded(dnc.state_dict()),
        lambda dnc: _loaded(through_a_file(dnc.state_dict(), weights_only=True)),
    ],
    ids=["deepcopy", "pickle", "torch.save", "state_dict", "state_dict, weights_only"],
)
def test_a_copy_computes_the_same(again):
    dnc, inputs = make(clip=3.0, num_layers=2), make_inputs()
    dnc(inputs)  # used once: nothing that a call leaves behind is in the way
    copied = again(dnc)
    assert_close(copied(inputs), dnc(inputs), **EXACT)
    assert copied.extra_repr() == dnc.extra_repr()
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in dnc.parameters()}


def _loaded(state_dict) -> DNC:
    dnc = make(clip=3.0, num_layers=2)
    nn.init.zeros_(dnc.output.weight)
    dnc.load_state_dict(state_dict, strict=True)
    return dnc


def test_a_state_survives_a_file():
    state = warm_state(make()).detach()
    for again in (pickle.loads(pickle.dumps(state)), through_a_file(state, weights_only=False), copy.deepcopy(state)):
        assert type(again) is DNCState
        assert type(again.memory) is MemoryState
        assert_close(again, state, **EXACT)


def test_a_state_loads_with_weights_only_once_its_types_are_declared_safe():
    state = warm_state(make()).detach()
    with pytest.raises(pickle.UnpicklingError, match="DNCState"):
        through_a_file(state, weights_only=True)
    with torch.serialization.safe_globals([DNCState, MemoryState]):
        again = through_a_file(state, weights_only=True)
    assert type(again) is DNCState
    assert_close(again, state, **EXACT)


# --- The rest of torch


def run_and_gradients(module, dnc, inputs, given, **options):
    outputs, state = module(inputs, given, **options)
    return outputs, state, *gradients(total(outputs, state), inputs, given, dnc)


LENGTHS_AND_RESET = {"lengths": torch.tensor([1, 2]), "reset": torch.tensor([[0, 0], [0, 1]]).bool()}


def check_compiled(backend, options):
    torch._dynamo.reset()
    dnc, inputs = make(), make_inputs(2, 2).requires_grad_()
    given = warm_state(dnc, 2)
    compiled = torch.compile(dnc, fullgraph=True, backend=backend)
    got, expected = (run_and_gradients(module, dnc, inputs, given, **options) for module in (compiled, dnc))
    assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, LENGTHS_AND_RESET], ids=["plain", "lengths, reset"])
def test_compiles_to_one_graph(options):
    check_compiled("aot_eager", options)


@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("inductor", LENGTHS_AND_RESET)


def test_exports():
    dnc, inputs = make().eval(), make_inputs(2, 2)
    given = warm_state(dnc, 2).detach()
    program = torch.export.export(dnc, (inputs, given), LENGTHS_AND_RESET)
    other = {"lengths": torch.tensor([2, 0]), "reset": torch.tensor([[1, 0], [0, 0]]).bool()}
    outputs, state = program.module()(-inputs, given, **other)
    assert type(state) is DNCState
    assert_close((outputs, state), dnc(-inputs, given, **other), **CLOSE)


def test_exported_program_survives_a_file():
    dnc, inputs = make(), make_inputs(1, 1)
    file = io.BytesIO()
    torch.export.save(torch.export.export(dnc, (inputs,)), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(inputs), dnc(inputs), **CLOSE)


def test_functional_calls():
    dnc, inputs = make(), make_inputs()
    parameters = {name: p.detach() for name, p in dnc.named_parameters()}

    def loss(parameters, inputs):
        return total(torch.func.functional_call(dnc, parameters, (inputs,), {"lengths": LENGTHS}))

    got = torch.func.grad(loss)(parameters, inputs)
    expected = gradients(total(dnc(inputs, lengths=LENGTHS)), dnc)
    assert list(got) == [name for name, _ in dnc.named_parameters()]
    assert_close(list(got.values()), list(expected), **CLOSE)


def test_gradients_of_each_sample():
    dnc, inputs = make(), make_inputs()
    parameters = {name: p.detach() for name, p in dnc.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(dnc, parameters, (sample.unsqueeze(0),))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    for index in range(BATCH):
        alone = gradients(dnc(row(inputs, index))[0].square().sum(), dnc)
        assert_close([x[index] for x in each.values()], list(alone), **CLOSE)


def test_activation_checkpointing():
    dnc, inputs, given = make(num_layers=2, dropout=0.5), make_inputs().requires_grad_(), warm_state(make(num_layers=2))

    def run(call):
        torch.manual_seed(4)  # dropout draws the same numbers again when the segment is recomputed
        outputs, state = call(inputs[:, :3], given)
        more, state = call(inputs[:, 3:], state)
        return gradients(total(outputs, more, state), inputs, given, dnc)

    assert_close(run(lambda *args: checkpoint(dnc, *args, use_reentrant=False)), run(dnc), **CLOSE)


def test_twice_in_one_graph():
    dnc, inputs = make(), make_inputs()
    both = gradients(total(dnc(inputs)) + total(dnc(-inputs)), dnc)
    one, other = gradients(total(dnc(inputs)), dnc), gradients(total(dnc(-inputs)), dnc)
    assert_close(both, tuple(a + b for a, b in zip(one, other, strict=True)), **CLOSE)


def test_without_gradients():
    dnc, inputs = make(), make_inputs()
    expected = dnc(inputs)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            outputs, state = dnc(inputs)
            again = dnc(inputs, state)[0]
        assert not any(x.requires_grad for x in tree_leaves((outputs, state, again)))
        assert_close((outputs, state), expected, **EXACT)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"num_writes": 2, "strength": "softplus", "controller": "gru"}, {}),
        ({"clip": 0.5, "num_layers": 2}, {"lengths": [3, 2], "reset": torch.tensor([[0, 0, 1], [0, 1, 0]]).bool()}),
    ],
    ids=["paper", "two write heads", "clip, lengths, reset"],
)
def test_gradcheck(changes, options):
    """Inputs, initial state and parameters against differences of the forward."""
    torch.manual_seed(5)
    dnc = DNC(2, 2, 1, memory_size=3, word_size=2, num_reads=1, dtype=torch.float64, **changes)
    inputs = torch.randn(2, 3, 2, dtype=torch.float64)
    # Some steps in no two slots are used equally, so that a small change does not change the free list.
    _, state = dnc(torch.randn(2, 4, 2, dtype=torch.float64))
    state_leaves, structure = tree_flatten(state.detach())
    names, parameters = zip(*dnc.named_parameters(), strict=True)

    def run(inputs, *leaves):
        state, parameters = leaves[: len(state_leaves)], leaves[len(state_leaves) :]
        arguments = (inputs, tree_unflatten(list(state), structure))
        result = torch.func.functional_call(dnc, dict(zip(names, parameters, strict=True)), arguments, options)
        return tuple(tree_leaves(result))

    leaves = (x.detach().clone().requires_grad_() for x in (inputs, *state_leaves, *parameters))
    assert torch.autograd.gradcheck(run, tuple(leaves))
