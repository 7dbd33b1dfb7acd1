"""The layer: what goes in, what comes out, what passes from call to call, and what is differentiated."""

from __future__ import annotations

import pytest
import torch
from helpers import total
from small_layer import (
    BATCH,
    CLOSE,
    EXACT,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    STEPS,
    gradients,
    make,
    make_inputs,
    row,
    warm_state,
)
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dnc_triton import DNC, DNCState, MemoryState

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


def test_without_steps_the_initial_state_is_made_of_tensors_of_their_own():
    """Otherwise keeping one of them would keep all, and a file of one would hold all."""
    dnc = make()
    _, state = dnc(make_inputs(steps=0))
    tensors = tree_leaves(state)
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


@pytest.mark.parametrize("whose", ["class", "layer", "controller"])
def test_an_initial_state_of_ones_own(whose):
    """A call without a state does not call the default method, but must call one that was overridden."""

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
    assert_close(actual, dnc(inputs, dnc.initial_state(2)), **EXACT)
    assert (actual[0] != dnc(inputs, DNC.initial_state(dnc, 2).map(torch.zeros_like))[0]).any()


def test_a_state_has_the_structure_of_the_initial_one():
    dnc = make()
    zeros = dnc.controller.initial_state
    dnc.controller.initial_state = lambda *sizes, **options: [*zeros(*sizes, **options)]
    _, state = dnc(make_inputs())
    assert type(state.controller) is list
    _, state = dnc(make_inputs(), state)  # which is taken as it was handed out
    assert type(state.controller) is list


@pytest.mark.parametrize("whose", ["class", "layer", "controller"])
def test_a_reset_to_an_initial_state_of_ones_own(whose):
    """One that learns, too."""
    start = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    class Own(DNC):
        def initial_state(self, batch_size):
            return begin(self, batch_size)

    def begin(dnc, batch_size):
        state = DNC.initial_state(dnc, batch_size)
        return state._replace(read_words=state.read_words + start)

    torch.manual_seed(0)
    sizes = dict(memory_size=5, word_size=4, num_reads=2, dtype=torch.float64)
    dnc = (Own if whose == "class" else DNC)(3, 6, 2, **sizes)
    if whose == "layer":
        dnc.initial_state = lambda batch_size: begin(dnc, batch_size)
    elif whose == "controller":
        zeros = dnc.controller.initial_state
        dnc.controller.initial_state = lambda *sizes, **options: tree_map(
            lambda x: x + start.mean(), zeros(*sizes, **options)
        )
    inputs, reset = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]]).bool()
    given, computed = warm_state(DNC(3, 6, 2, **sizes), 2).detach(), []
    for dnc.backend in ("auto", "reference"):
        outputs, _ = dnc(inputs, given, reset=reset)
        computed.append((outputs, *torch.autograd.grad(outputs.square().sum(), [start, *dnc.parameters()])))
    assert computed[0][1].any()
    assert_close(*computed, **CLOSE)


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


# --- Gradients


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
    """The gradients of inputs, initial state and parameters are compared with differences of the forward."""
    torch.manual_seed(5)
    dnc = DNC(2, 2, 1, memory_size=3, word_size=2, num_reads=1, dtype=torch.float64, **changes)
    inputs = torch.randn(2, 3, 2, dtype=torch.float64)
    # After some steps no two slots are used equally, so that a small change does not change the free list.
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
