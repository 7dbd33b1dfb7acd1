"""What holds whatever is asked of the memory, and however a sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import (
    as_leaves,
    assert_close,
    assert_same_bits,
    gradient_floor,
    random_interface,
    random_like,
    random_problem,
    step_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dnc_reference import DNCCell, DNCState, Interface, MemoryState, memory_step, unroll

# Sums of at most some dozens of numbers below 1, in float64.
SLACK = 1e-13
# The same numbers in another order, or in products of another shape.
RTOL = 1e-12

sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "slots": st.sampled_from([1, 2, 5, 9]),
        "word": st.sampled_from([1, 3]),
        "reads": st.integers(1, 3),
        "writes": st.integers(1, 3),
        "seed": st.integers(0, 99),
    }
)


def extreme(interface: Interface) -> Interface:
    """The same interface with the gates of the first row wide open and those of the last shut, exactly."""
    gates = {name: getattr(interface, name).clone() for name in ("free_gates", "allocation_gates", "write_gates")}
    for gate in gates.values():
        gate[-1] = 0
        gate[0] = 1
    return interface._replace(**gates, read_strengths=100 * interface.read_strengths)


def run(state: MemoryState, interfaces: list[Interface]) -> Iterator[tuple[Tensor, MemoryState]]:
    for interface in interfaces:
        read_words, state = memory_step(interface, state)
        yield read_words, state


# --- ranges -----------------------------------------------------------------------------------------------------------


def assert_at_most_one(weights: Tensor, *, axis: int = -1) -> None:
    """A weighting: nothing negative, and no more than 1 altogether."""
    assert (weights >= -SLACK).all()
    assert (weights.sum(axis) <= 1 + SLACK).all()


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("gates", ["soft", "extreme"])
@given(size=sizes)
def test_the_state_stays_in_range(gates: str, fresh: bool, size: dict[str, int]) -> None:
    _, state = random_problem(**size)
    if fresh:
        state = MemoryState(*map(torch.zeros_like, state))
    rest = {name: size[name] for name in ("batch", "word", "reads", "writes")}
    interfaces = [random_interface(**rest, seed=step) for step in range(12)]
    if gates == "extreme":
        interfaces = [extreme(interface) for interface in interfaces]

    for read_words, new in run(state, interfaces):
        assert all(tensor.isfinite().all() for tensor in (read_words, *new))
        assert ((new.usage >= -SLACK) & (new.usage <= 1 + SLACK)).all()
        assert_at_most_one(new.read_weights)
        assert_at_most_one(new.write_weights)
        assert_at_most_one(new.precedence)
        assert_at_most_one(new.link, axis=-1)
        assert_at_most_one(new.link, axis=-2)
        assert not new.link.diagonal(dim1=-2, dim2=-1).any()


# --- symmetries -------------------------------------------------------------------------------------------------------


def permute_slots(state: MemoryState, order: Tensor) -> MemoryState:
    return MemoryState(
        memory=state.memory[:, order],
        usage=state.usage[:, order],
        link=state.link[:, :, order][:, :, :, order],
        precedence=state.precedence[..., order],
        read_weights=state.read_weights[..., order],
        write_weights=state.write_weights[..., order],
    )


@given(size=sizes)
def test_slots_have_no_names(size: dict[str, int]) -> None:
    """Where no two slots are equally used, another order of the slots is the same memory, and has the same gradient."""
    interface, state = random_problem(**size)
    order = torch.randperm(size["slots"], generator=torch.Generator().manual_seed(size["seed"]))
    read_words, new = memory_step(interface, state)
    assert_close(
        memory_step(interface, permute_slots(state, order)), (read_words, permute_slots(new, order)), rtol=RTOL
    )

    d_read_words, d_new = random_like((read_words, new))
    d_interface, d_state = step_gradients(memory_step, interface, state, d_read_words, d_new)
    assert_close(
        step_gradients(memory_step, interface, permute_slots(state, order), d_read_words, permute_slots(d_new, order)),
        (d_interface, permute_slots(d_state, order)),
        rtol=RTOL,
        atol=gradient_floor(interface, state),
    )


@pytest.mark.parametrize("field", [*Interface._fields, *MemoryState._fields])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_goes_wrong_in_one_row_of_a_step_stays_there(field: str, value: float) -> None:
    problem = random_problem(3, 6, 4, 2, 2)
    others = [0, 2]

    def spoil(nest: Interface | MemoryState) -> Interface | MemoryState:
        if field not in nest._fields:
            return nest
        spoilt = getattr(nest, field).clone()
        spoilt[1] = value
        return nest._replace(**{field: spoilt})

    spoilt = spoil(problem[0]), spoil(problem[1])
    gradients = random_like(memory_step(*problem))
    clean_step, spoilt_step = memory_step(*problem), memory_step(*spoilt)
    assert not all(tensor[1].isfinite().all() for tensor in tree_leaves(spoilt_step))
    assert_same_bits(rows(spoilt_step, others), rows(clean_step, others))
    assert_same_bits(
        rows(step_gradients(memory_step, *spoilt, *gradients), others),
        rows(step_gradients(memory_step, *problem, *gradients), others),
    )


def rows(nest: object, indices: list[int]) -> object:
    return tree_map(lambda x: x[indices], nest)


# --- sequences --------------------------------------------------------------------------------------------------------


def make_cell(controller: str = "lstm", **options: object) -> DNCCell:
    sizes = dict(memory_size=6, word_size=4, num_reads=2, num_writes=2)
    return DNCCell(3, 5, 2, controller=controller, **{"dtype": torch.float64, **sizes, **options})


def random_inputs(steps: int, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_like(torch.empty(steps, batch, 3, dtype=dtype))


def used_state(cell: DNCCell, batch: int) -> DNCState:
    """Zeros nowhere but on the link's diagonal."""
    with torch.no_grad():
        return unroll(cell, random_inputs(4, batch), cell.initial_state(batch))[1]


def unroll_in_chunks(cell: DNCCell, inputs: Tensor, state: DNCState, chunks: list[int]) -> tuple[Tensor, DNCState]:
    outputs = []
    for chunk in inputs.split(chunks):
        chunk_outputs, state = unroll(cell, chunk, state)
        outputs.append(chunk_outputs)
    return torch.cat(outputs), state


def unroll_by_hand(cell: DNCCell, inputs: Tensor, state: DNCState) -> tuple[Tensor, DNCState]:
    outputs = []
    for step_inputs in inputs:
        step_outputs, state = cell(step_inputs, state)
        outputs.append(step_outputs)
    return torch.stack(outputs), state


@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "feedforward"])
@pytest.mark.parametrize("chunks", [[4, 1, 3], [1] * 8, [0, 8], None], ids=str)
def test_a_sequence_may_be_cut_anywhere(chunks: list[int] | None, controller: str) -> None:
    cell = make_cell(controller, clip=2.0)
    inputs, state = as_leaves((random_inputs(8, 2), used_state(cell, 2)))
    leaves = [*tree_leaves((inputs, state)), *cell.parameters()]

    whole = unroll(cell, inputs, state)
    cut = unroll_by_hand(cell, inputs, state) if chunks is None else unroll_in_chunks(cell, inputs, state, chunks)
    assert_close(cut, whole, rtol=RTOL)

    weights = random_like(tree_leaves(whole))
    d_cut, d_whole = (torch.autograd.grad(tree_leaves(result), leaves, weights) for result in (cut, whole))
    assert_close(d_cut, d_whole, rtol=RTOL, atol=SLACK)


@pytest.mark.parametrize("spoilt", ["inputs", "state"])
def test_what_goes_wrong_in_one_row_of_a_sequence_stays_there(spoilt: str) -> None:
    cell, others = make_cell(), [0, 2]
    inputs, state = random_inputs(5, 3), used_state(cell, 3)
    results = []
    for spoil in (False, True):
        leaves = as_leaves((inputs, state))
        with torch.no_grad():
            if spoil and spoilt == "inputs":
                leaves[0][2, 1] = torch.nan
            elif spoil:
                for tensor in tree_leaves(leaves[1]):
                    tensor[1] = torch.nan
        outputs, final = unroll(cell, *leaves)
        flat = [outputs.transpose(0, 1), *tree_leaves(final)]  # batch first
        d_inputs, *d_state = torch.autograd.grad(flat, tree_leaves(leaves), random_like(flat))
        assert outputs[:, 1].isfinite().all() != spoil
        results.append(rows([*flat, d_inputs.transpose(0, 1), *d_state], others))
    assert_same_bits(results[1], results[0])


# --- dtypes and empty batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_step_keeps_the_dtype_and_is_as_accurate_as_it_allows(dtype: torch.dtype) -> None:
    interface, state = random_problem(2, 5, 4, 2, 2, dtype=dtype)
    # Usages so far apart that no rounding changes the order.
    usage = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.7], [0.9, 0.7, 0.1, 0.5, 0.3]], dtype=dtype)
    state = state._replace(usage=usage, write_weights=torch.zeros_like(state.write_weights))
    interface = interface._replace(free_gates=interface.free_gates / 8)
    gradients = random_like(memory_step(interface, state))
    actual = memory_step(interface, state), step_gradients(memory_step, interface, state, *gradients)
    assert {tensor.dtype for tensor in tree_leaves(actual)} == {dtype}

    interface, state, gradients = tree_map(lambda x: x.double(), (interface, state, gradients))
    expected = memory_step(interface, state), step_gradients(memory_step, interface, state, *gradients)
    assert_close(actual, expected, rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "feedforward"])
def test_a_sequence_keeps_the_dtype(controller: str, dtype: torch.dtype) -> None:
    cell = make_cell(controller, dtype=dtype)
    inputs = random_inputs(4, 2, dtype).requires_grad_()
    outputs, state = unroll(cell, inputs, cell.initial_state(2))
    outputs.sum().backward()
    results = [outputs, *tree_leaves(state), inputs.grad, *(parameter.grad for parameter in cell.parameters())]
    assert {tensor.dtype for tensor in results} == {dtype}
    assert all(tensor.isfinite().all() for tensor in results)


def test_a_step_of_an_empty_batch() -> None:
    interface, state = random_problem(2, 5, 4, 2, 2)
    interface, state = tree_map(lambda x: x[:0], (interface, state))
    read_words, new = memory_step(interface, state)
    assert read_words.shape == (0, 2, 4)
    assert {name: tensor.shape for name, tensor in new._asdict().items()} == MemoryState.shapes(0, 5, 4, 2, 2)
    d_interface, d_state = step_gradients(memory_step, interface, state, read_words, new)
    assert_same_bits((d_interface, d_state), (interface, state))  # that is, the shapes


@pytest.mark.parametrize(("steps", "batch"), [(3, 0), (0, 2), (0, 0)])
def test_an_empty_sequence(steps: int, batch: int) -> None:
    cell = make_cell()
    inputs, state = as_leaves((random_inputs(steps, batch), cell.initial_state(batch)))
    outputs, final = unroll(cell, inputs, state)
    assert outputs.shape == (steps, batch, 2)
    assert_same_bits(final, state)
    (outputs.sum() + sum(tensor.sum() for tensor in tree_leaves(final))).backward()
    assert (inputs.grad is None) == (steps == 0)  # the sum of no steps' outputs does not depend on them
    assert all(leaf.grad is not None for leaf in tree_leaves(state))
