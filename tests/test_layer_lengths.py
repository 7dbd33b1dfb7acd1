"""The layer told where rows end and begin afresh: lengths, packed sequences and resets."""

from __future__ import annotations

import pytest
import torch
from helpers import total
from small_layer import (
    BATCH,
    CLOSE,
    EXACT,
    LENGTHS,
    OUTPUTS,
    RESETS,
    STEPS,
    gradients,
    make,
    make_inputs,
    row,
    warm_state,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dnc_triton import DNCState

# --- lengths


def rows_together(states: list[DNCState]) -> DNCState:
    leaves, structure = zip(*map(tree_flatten, states), strict=True)
    return tree_unflatten([torch.cat(same) for same in zip(*leaves, strict=True)], structure[0])


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


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -1e30])
def test_padding_changes_nothing(filler, backend):
    dnc, given = make(backend=backend), warm_state(make())
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


def test_lengths_may_change_before_the_backward():
    dnc, inputs, lengths = make(), make_inputs(), torch.tensor(LENGTHS)
    expected = gradients(total(dnc(inputs, lengths=LENGTHS)), list(dnc.parameters()))
    loss = total(dnc(inputs, lengths=lengths))
    lengths.zero_()
    assert_close(gradients(loss, list(dnc.parameters())), expected, **EXACT)


def test_lengths_stay_where_they_are_whatever_the_default_device():
    dnc, inputs, lengths = make(device="cpu"), make_inputs(), torch.tensor(LENGTHS)
    expected = dnc(inputs, lengths=lengths)[0]
    with torch.device("meta"):
        assert_close(dnc(inputs, lengths=lengths)[0], expected, **EXACT)


def test_lengths_that_have_no_values():
    with FakeTensorMode():
        outputs, _ = make()(make_inputs(), lengths=torch.tensor(LENGTHS))
    assert outputs.shape == (BATCH, STEPS, OUTPUTS)


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


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reset_cleans_a_spoilt_state(backend):
    dnc, inputs = make(backend=backend), make_inputs()
    spoilt = warm_state(dnc).detach().map(torch.clone)
    for x in tree_leaves(spoilt):
        x[1] = torch.nan
    spoilt = spoilt.map(lambda x: x.requires_grad_())
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[1, 0] = True
    outputs, state = dnc(inputs, spoilt, reset=reset)
    assert_close((row(outputs, 1), row(state, 1)), dnc(row(inputs, 1)), **CLOSE)
    assert all(x.isfinite().all() for x in gradients(total(outputs, state), spoilt, dnc))


def test_lengths_and_reset_together():
    dnc, inputs = make(), make_inputs().requires_grad_()
    given = warm_state(dnc)
    outputs, state = dnc(inputs, given, lengths=LENGTHS, reset=RESETS)
    expected = rows_alone(dnc, inputs, given, LENGTHS, RESETS)
    assert_close((outputs, state), expected, **CLOSE)
    assert_close(
        gradients(total(outputs, state), inputs, given, dnc), gradients(total(expected), inputs, given, dnc), **CLOSE
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reset_after_the_end_changes_nothing(backend):
    """After its end a row's state stays, whatever `reset` holds in the padding."""
    dnc, inputs, given = make(backend=backend), make_inputs(), warm_state(make())
    padding = torch.arange(STEPS) >= torch.tensor(LENGTHS).unsqueeze(1)
    expected = dnc(inputs, given, lengths=LENGTHS, reset=RESETS & ~padding)
    assert_close(dnc(inputs, given, lengths=LENGTHS, reset=RESETS | padding), expected, **EXACT)
