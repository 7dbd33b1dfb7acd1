"""The trace: the reference's own numbers, step by step, in every way the layer can be called."""

from __future__ import annotations

import pytest
import torch
from helpers import total
from small_layer import BATCH, CLOSE, EXACT, STEPS, gradients, make, make_inputs
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from dnc_reference import DNCState, Interface, MemoryState, memory_step_with_addressing
from dnc_reference.interface import activate_interface
from dnc_triton import DNC, use_backend
from dnc_triton.trace import Trace


def by_hand(dnc: DNC, inputs: torch.Tensor, state: DNCState) -> list[tuple[Interface, MemoryState]]:
    """What each step asks, and the memory after it, by the functions of the reference alone."""
    steps = []
    for step_inputs in inputs.unbind(1):
        _, controller, vector = dnc.control(step_inputs, state)
        interface = activate_interface(
            vector, num_reads=dnc.num_reads, num_writes=dnc.num_writes, word_size=dnc.word_size, strength=dnc.strength
        )
        read_words, memory, _ = memory_step_with_addressing(interface, state.memory)
        state = DNCState(controller, memory, read_words)
        steps.append((interface, memory))
    return steps


@pytest.mark.parametrize("changes", [{}, {"num_writes": 2, "strength": "softplus"}, {"controller": "gru"}])
def test_the_trace_is_what_the_reference_computes(changes):
    dnc = make(**changes)
    _, state = dnc(make_inputs())  # not the initial one
    outputs, after, trace = dnc(make_inputs(), state, trace=True)
    steps = by_hand(dnc, make_inputs(), state)
    assert isinstance(trace, Trace)
    for name, field in trace._asdict().items():
        expected = [getattr(interface if name in Interface._fields else memory, name) for interface, memory in steps]
        assert_close(field, torch.stack(expected, dim=1), **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    with use_backend("reference"):
        assert_close((outputs, after), dnc(make_inputs(), state), **EXACT)
    assert_close((outputs, after), dnc(make_inputs(), state), **CLOSE)


def test_batch_comes_first_in_every_layer():
    rows_first, steps_first = make(), make(batch_first=False)
    lengths, reset = [2, 5, 0, 3], torch.rand(BATCH, STEPS) < 0.3
    outputs, state, trace = rows_first(make_inputs(), lengths=lengths, reset=reset, trace=True)
    others = steps_first(make_inputs().transpose(0, 1), lengths=lengths, reset=reset.T, trace=True)
    assert_close((outputs.transpose(0, 1), state, trace), others, **EXACT)


def test_lengths_and_reset_are_those_of_the_rows():
    """Each row by itself, each of its episodes by itself; past a row's end there is nothing, even for NaN inputs."""
    dnc, inputs = make(), make_inputs()
    lengths, resets = [2, 5, 0, 3], {1: 3, 3: 1}  # row → the step before which its state is cleared
    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    for row, step in resets.items():
        reset[row, step] = True
    for row, length in enumerate(lengths):
        inputs[row, length:] = torch.nan
    outputs, state, trace = dnc(inputs, lengths=lengths, reset=reset, trace=True)
    assert_close((outputs, state), dnc(inputs, lengths=lengths, reset=reset), **CLOSE)
    for row, length in enumerate(lengths):
        start = resets.get(row, 0)
        for here in (slice(0, start), slice(start, length)):
            _, _, alone = dnc(inputs[row : row + 1, here], trace=True)
            seen = Trace(*(field[row : row + 1, here] for field in trace))
            assert_close(seen, alone, **CLOSE)
        assert not any(field[row, length:].any() for field in trace)


def test_a_packed_sequence():
    dnc, lengths = make(), [2, 5, 1, 3]
    packed = pack_padded_sequence(make_inputs(), lengths, batch_first=True, enforce_sorted=False)
    outputs, state, trace = dnc(packed, trace=True)
    _, padded_state, padded_trace = dnc(make_inputs(), lengths=lengths, trace=True)
    assert_close((state, trace), (padded_state, padded_trace), **EXACT)
    assert_close(outputs.data, dnc(packed)[0].data, **CLOSE)


@pytest.mark.parametrize(("batch", "steps"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("options", [{}, {"lengths": True}])
def test_nothing_to_do(batch, steps, options):
    dnc = make(num_writes=2)
    options = {name: torch.zeros(batch, dtype=torch.int64) for name in options}
    outputs, state, trace = dnc(make_inputs(batch, steps), **options, trace=True)
    assert outputs.shape == (batch, steps, 2)
    assert_close(state, dnc.initial_state(batch), **EXACT)
    assert {name: tuple(field.shape[2:]) for name, field in trace._asdict().items()} == {
        "write_weights": (2, 5), "read_weights": (2, 5), "allocation_gates": (2,), "write_gates": (2,),
        "free_gates": (2,), "read_modes": (2, 5), "usage": (5,), "link": (2, 5, 5),
    }  # fmt: skip
    assert all(field.shape[:2] == (batch, steps) and field.dtype == torch.float64 for field in trace)


@pytest.mark.parametrize("held", [0.0, torch.nan])
def test_no_row_has_a_step(held):
    """Whatever its state holds."""
    dnc = make()
    given = dnc.initial_state(BATCH).map(lambda x: torch.full_like(x, held))
    outputs, state, trace = dnc(make_inputs(), given, lengths=[0] * BATCH, trace=True)
    assert not any(field.any() for field in (outputs, *trace))
    assert_close(state, given, **EXACT, equal_nan=True)


def test_gradients_flow_through_all_that_is_returned():
    dnc = make()
    outputs, state, trace = dnc(make_inputs(), trace=True)
    plain_outputs, plain_state = dnc(make_inputs())
    loss, plain_loss = (
        o.square().sum() + s.read_words.sum() for o, s in ((outputs, state), (plain_outputs, plain_state))
    )
    for actual, expected in zip(gradients(loss, dnc), gradients(plain_loss, dnc), strict=True):
        assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    # What the last step left is the state's, and so is its gradient.
    _, state, trace = dnc(make_inputs(), trace=True)
    for name, field in trace._asdict().items():
        (actual,) = torch.autograd.grad(field[:, -1].square().sum(), dnc.interface.weight, retain_graph=True)
        assert actual.any(), name
        if name in MemoryState._fields:
            last = getattr(state.memory, name).square().sum()
            (expected,) = torch.autograd.grad(last, dnc.interface.weight, retain_graph=True)
            assert_close(actual, expected, **CLOSE)


def test_no_gradient_from_usage_where_there_is_to_be_none():
    """With a trace as without one."""
    dnc = make(stop_usage_gradient=True)
    _, state, _ = dnc(make_inputs(), trace=True)
    _, plain_state = dnc(make_inputs())
    actual, expected = gradients(total(state), dnc), gradients(total(plain_state), dnc)
    assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_hooks_are_called():
    """As often as without a trace."""
    dnc, calls = make(), []
    dnc.interface.register_forward_hook(lambda *_: calls.append(1))
    outputs, _, _ = dnc(make_inputs(), trace=True)
    assert len(calls) == STEPS
    assert_close(outputs, make()(make_inputs())[0], **CLOSE)


@pytest.mark.parametrize("trace", [1, 0, None, "yes", torch.tensor(True)])
def test_trace_is_a_bool(trace):
    with pytest.raises(TypeError, match=r"^trace: expected a bool, got "):
        make()(make_inputs(), trace=trace)


@pytest.mark.parametrize("backend", ["torch_sequence", "triton_fused", "triton_split"])
def test_a_backend_that_keeps_no_trace_says_so(backend):
    with pytest.raises(RuntimeError, match=rf"^backend '{backend}', asked for by .*: a trace is asked for"):
        make(backend=backend)(make_inputs(), trace=True)
    with use_backend(backend), pytest.raises(RuntimeError, match="asked for by use_backend"):
        make()(make_inputs(), trace=True)
    make(backend="reference")(make_inputs(), trace=True)


def test_under_torch_compile():
    dnc = make()
    compiled = torch.compile(dnc, fullgraph=True, backend="eager")
    assert_close(compiled(make_inputs(), trace=True), dnc(make_inputs(), trace=True), **EXACT)
