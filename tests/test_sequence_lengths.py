"""The sequence as one operation, where rows end or begin afresh on the way and where one call follows another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import as_leaves, assert_close, assert_same_bits
from sequence_parity import (
    BATCH,
    CONTROLLERS,
    FORWARD,
    GRADIENT,
    STEPS,
    Outcome,
    assert_equal_outcomes,
    assert_parity,
    draw,
    make,
    operation,
    oracle,
    outcome,
    total,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dnc_reference import DNCState
from dnc_triton import DNC

# --- lengths and reset


def resets(*steps_and_rows: tuple[int, int]) -> Tensor:
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    for step, row in steps_and_rows:
        reset[step, row] = True
    return reset


OPTIONS = {
    "plain": {},
    "lengths": dict(lengths=[3, 0, 5]),
    "no steps": dict(lengths=[0, 0, 0]),
    "full lengths": dict(lengths=[5, 5, 5]),
    "reset first": dict(reset=resets((0, 1))),
    "reset last": dict(reset=resets((4, 0), (4, 2))),
    "reset in the middle": dict(reset=resets((1, 0), (2, 2), (3, 2))),
    "reset all": dict(reset=torch.ones(STEPS, BATCH, dtype=torch.bool)),
    "both": dict(lengths=[3, 4, 2], reset=resets((0, 0), (2, 0), (3, 0), (2, 1), (4, 1), (0, 2), (1, 2))),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "choice",
    [
        dict(),
        dict(checkpoint=2, controller="gru", num_layers=2),
        dict(checkpoint=3, controller="rnn", clip=0.3),
        dict(checkpoint=2, controller="feedforward", clip=0.3, stop_usage_gradient=True),
    ],
    ids=lambda choice: ", ".join(map(str, choice.values())) or "lstm",
)
def test_lengths_and_reset(choice, options):
    """A reset row's memory is all zeros: only what does not see the order of its slots is compared."""
    dnc = make(**choice)
    inputs, given = draw(dnc)

    def loss(outputs: Tensor, state: DNCState) -> Tensor:
        return total(outputs, state.controller, state.read_words)

    if "reset" not in options:
        assert_parity(dnc, inputs, given, **options)
        return
    actual, expected = (outcome(run, dnc, inputs, given, loss=loss, **options) for run in (operation, oracle))
    assert_close(actual.outputs, expected.outputs, **FORWARD)
    assert_close(actual.state._replace(memory=()), expected.state._replace(memory=()), **FORWARD)
    assert_close(actual.gradients, expected.gradients, **GRADIENT)


@pytest.mark.parametrize("checkpoint", [None, 2])
def test_padding_changes_nothing(checkpoint):
    dnc = make(checkpoint=checkpoint)
    inputs, given = draw(dnc)
    lengths = [3, 0, 5]
    padding = torch.arange(STEPS).unsqueeze(1) >= torch.tensor(lengths)
    reset = resets((1, 0), (3, 2))
    filled = inputs.masked_fill(padding.unsqueeze(-1), torch.nan)
    actual = outcome(operation, dnc, filled, given, lengths=lengths, reset=reset | padding)
    assert_same_bits(actual, outcome(operation, dnc, inputs, given, lengths=lengths, reset=reset))
    assert not actual.gradients["inputs"][padding].any()
    assert not actual.outputs[padding].any()
    assert_same_bits(row(actual.state, 1), row(given, 1))


@pytest.mark.parametrize("checkpoint", [None, 30])
def test_a_row_that_has_ended_does_not_grow(checkpoint):
    """Whatever its link is: the gradients of the weights are those of its steps alone."""
    dnc = make(checkpoint=checkpoint)
    _, given = draw(dnc)
    given = given._replace(memory=given.memory._replace(link=torch.full_like(given.memory.link, 1e3)))
    inputs = torch.zeros(120, BATCH, dnc.input_size, dtype=torch.float64)
    actual, expected = (outcome(run, dnc, inputs, given, lengths=[1, 0, 1]) for run in (operation, oracle))
    assert_close(actual, expected, **GRADIENT)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_what_overflows_behind_the_end_of_a_row_is_in_no_gradient(controller):
    """What such a state reads is finite, and what goes on from there is not."""
    dnc = make(controller=controller, num_layers=2, dtype=torch.float32)
    inputs, given = draw(dnc)
    with torch.no_grad():
        given.memory.link[1], given.memory.memory[1] = 1e31, 1e7 * given.memory.memory[1]
        next(dnc.controller.parameters()).mul_(100)
    runs = (operation, oracle)
    actual, expected = (outcome(run, dnc, inputs, given, lengths=[5, 0, 3]) for run in runs)
    for name, gradient in expected.gradients.items():
        assert gradient.isfinite().all()
        assert actual.gradients[name].isfinite().all(), name


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_reset_cleans_a_spoilt_state(controller, checkpoint):
    dnc = make(controller=controller, checkpoint=checkpoint)
    inputs, given = draw(dnc)
    given = spoilt(given, 1)
    actual, expected = (outcome(run, dnc, inputs, given, reset=resets((0, 1))) for run in (operation, oracle))
    assert_close(actual.outputs, expected.outputs, **FORWARD)
    assert all(x.isfinite().all() for x in tree_leaves(actual))
    assert not any(row(x, 1).any() for name, x in actual.gradients.items() if name.startswith("state"))
    # A row that was spoilt on the way goes on from the reset as if nothing had been.
    inputs[1, 2] = torch.nan
    outputs, state = dnc(inputs, given, reset=resets((0, 1), (3, 2)))
    assert outputs[1:3, 2].isnan().all()
    assert_close((outputs[3:, 2:], row(state, 2)), dnc(inputs[3:, 2:]), **FORWARD)


@pytest.mark.parametrize(
    "options", [{}, dict(lengths=[5, 4, 5], reset=resets((2, 2)))], ids=["plain", "lengths, reset"]
)
def test_rows_are_independent(options):
    """A NaN in one row changes no bit of another: not of its outputs, its state, or its gradients."""
    dnc = make(num_layers=2)
    inputs, given = draw(dnc)
    clean = outcome(operation, dnc, inputs, given, **options)
    inputs[1, 0] = torch.nan
    actual = outcome(operation, dnc, inputs, spoilt(given, 1), **options)
    of_rows = {"inputs", *(name for name in clean.gradients if name.startswith("state"))}
    for these in (actual, clean):
        for name in these.gradients.keys() - of_rows:
            del these.gradients[name]
    assert actual.outputs[:4, 1].isnan().all()
    assert_same_bits(third_row(actual), third_row(clean))


def third_row(results: Outcome) -> Any:
    gradients = dict(results.gradients)
    return results.outputs[:, 2], row(results.state, 2), gradients.pop("inputs")[:, 2], row(gradients, 2)


def row(nest: Any, index: int) -> Any:
    """One row of everything, as a batch of one."""
    return tree_map(lambda x: x[index : index + 1], nest)


def spoilt(state: DNCState, index: int) -> DNCState:
    rows = torch.arange(state.read_words.shape[0]) == index
    return state.map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), torch.nan))


# --- from call to call


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("chunks", [[2, 3], [1] * STEPS, [0, 5, 0]], ids=str)
@pytest.mark.parametrize("options", ["plain", "both"])
def test_whole_equals_chunks(chunks, checkpoint, options):
    dnc = make(checkpoint=checkpoint, num_layers=2)

    def in_chunks(
        dnc: DNC, inputs: Tensor, state: DNCState, *, lengths: list[int] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, DNCState]:
        pieces, start = [], 0
        for piece in inputs.split(chunks):
            end = start + len(piece)
            here: dict[str, Any] = {}
            if lengths is not None and reset is not None:
                here = dict(lengths=[min(max(x - start, 0), end - start) for x in lengths], reset=reset[start:end])
            outputs, state = dnc(piece, state, **here)
            pieces.append(outputs)
            start = end
        return torch.cat(pieces), state

    arguments, keywords = (dnc, *draw(dnc)), OPTIONS[options]
    assert_equal_outcomes(outcome(in_chunks, *arguments, **keywords), outcome(operation, *arguments, **keywords))


@pytest.mark.parametrize("batch_first", [True, False])
def test_step_by_step(batch_first):
    dnc = make(batch_first=batch_first)

    def streamed(dnc: DNC, inputs: Tensor, state: DNCState | None) -> tuple[Tensor, DNCState]:
        outputs = []
        for step in inputs:
            output, state = dnc.step(step, state)
            outputs.append(output)
        return torch.stack(outputs), state

    inputs, given = draw(dnc)
    assert_equal_outcomes(outcome(streamed, dnc, inputs, given), outcome(oracle, dnc, inputs, given))
    assert_close(streamed(dnc, inputs, None)[0], oracle(dnc, inputs, None)[0], **FORWARD)


def test_a_detached_state_cuts_the_gradient():
    dnc = make()
    inputs, given = as_leaves(draw(dnc))
    _, between = dnc(inputs[:2], given)
    outputs, _ = dnc(inputs[2:], between.detach())
    assert not torch.autograd.grad(total(outputs), inputs)[0][:2].any()
