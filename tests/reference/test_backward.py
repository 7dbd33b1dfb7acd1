"""The adjoints derived by hand against autograd of the equations, also where a factor is 0 or an order is a tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import as_leaves, assert_close, gradient_floor, random_like, random_problem, step_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dnc_reference import Interface, MemoryState, addressing, backward, memory_step, memory_step_with_addressing
from dnc_reference.interface import activate_interface, interface_sizes

RTOL = 1e-10

Problem = tuple[Interface, MemoryState]


# --- problems at the edges --------------------------------------------------------------------------------------------


def usage_is(usage: Callable[[Tensor], Tensor]) -> Callable[[Interface, MemoryState], Problem]:
    """Exactly this usage after the step's own update too: nothing was written, nothing is freed."""

    def edge(interface: Interface, state: MemoryState) -> Problem:
        return (
            interface._replace(free_gates=torch.zeros_like(interface.free_gates)),
            state._replace(usage=usage(state.usage), write_weights=torch.zeros_like(state.write_weights)),
        )

    return edge


def gates_are(value: float) -> Callable[[Interface, MemoryState], Problem]:
    def edge(interface: Interface, state: MemoryState) -> Problem:
        names = ("free_gates", "allocation_gates", "write_gates")
        gates = {name: torch.full_like(getattr(interface, name), value) for name in names}
        return interface._replace(**gates), state

    return edge


def blank_memory(interface: Interface, state: MemoryState) -> Problem:
    return interface, state._replace(memory=torch.zeros_like(state.memory))


def blank_keys(interface: Interface, state: MemoryState) -> Problem:
    keys = {name: torch.zeros_like(getattr(interface, name)) for name in ("read_keys", "write_keys")}
    return interface._replace(**keys), state


def fresh_state(interface: Interface, state: MemoryState) -> Problem:
    return interface, MemoryState(*map(torch.zeros_like, state))


def slots_freed(interface: Interface, state: MemoryState) -> Problem:
    """One-hot read weights and free gates of exactly 1: factors of exactly 0 in the retention, two of them if R > 1."""
    weights = F.one_hot(torch.zeros(state.read_weights.shape[:2], dtype=torch.long), state.usage.shape[1])
    return (
        interface._replace(free_gates=torch.ones_like(interface.free_gates)),
        state._replace(read_weights=weights.to(state.usage.dtype)),
    )


def slot_erased(interface: Interface, state: MemoryState) -> Problem:
    """Every head writes to the first slot with a weight of exactly 1 and erases it entirely.

    The other slots hold the opposite of the keys, so that the softmax underflows to exactly one-hot.
    """
    key = interface.write_keys[:, :1] + 3
    signs = torch.ones_like(state.memory)
    signs[:, 1:] = -1
    interface = interface._replace(
        write_keys=key.expand_as(interface.write_keys),
        write_strengths=torch.full_like(interface.write_strengths, 1000.0),
        erase_vectors=torch.ones_like(interface.erase_vectors),
        allocation_gates=torch.zeros_like(interface.allocation_gates),
        write_gates=torch.ones_like(interface.write_gates),
    )
    return interface, state._replace(memory=signs * key)


def sharp_strengths(interface: Interface, state: MemoryState) -> Problem:
    names = ("read_strengths", "write_strengths")
    return interface._replace(**{name: 1000 * getattr(interface, name) for name in names}), state


def one_way_modes(interface: Interface, state: MemoryState) -> Problem:
    modes = interface.read_modes
    return interface._replace(read_modes=F.one_hot(modes.argmax(-1), modes.shape[-1]).to(modes.dtype)), state


EDGES: dict[str, Callable[[Interface, MemoryState], Problem]] = {
    "none": lambda interface, state: (interface, state),
    "usage_ties": usage_is(lambda usage: (2 * usage).round() / 2),
    "usage_zero": usage_is(torch.zeros_like),
    "usage_one": usage_is(torch.ones_like),
    "gates_zero": gates_are(0.0),
    "gates_one": gates_are(1.0),
    "blank_memory": blank_memory,
    "blank_keys": blank_keys,
    "fresh_state": fresh_state,
    "slots_freed": slots_freed,
    "slot_erased": slot_erased,
    "sharp_strengths": sharp_strengths,
    "one_way_modes": one_way_modes,
}

each_edge = pytest.mark.parametrize("edge", EDGES)
sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "slots": st.sampled_from([1, 2, 3, 5, 8]),
        "word": st.sampled_from([1, 2, 5]),
        "reads": st.integers(1, 3),
        "writes": st.integers(1, 3),
        "seed": st.integers(0, 99),
    }
)


def problem_at(edge: str, size: dict[str, int]) -> Problem:
    return EDGES[edge](*random_problem(**size, steps=2))


def test_the_edges_are_where_they_claim_to_be() -> None:
    size = dict(batch=2, slots=5, word=3, reads=2, writes=2, seed=0)

    interface, state = problem_at("usage_ties", size)
    _, new = memory_step(interface, state)
    assert all(len(row.unique()) < len(row) for row in new.usage)

    interface, state = problem_at("slots_freed", size)
    assert (addressing.retention(interface.free_gates, state.read_weights)[:, 0] == 0).all()

    interface, state = problem_at("slot_erased", size)
    _, new = memory_step(interface, state)
    assert (new.write_weights[:, :, 0] == 1).all()
    assert_close(new.memory[:, 0], interface.write_vectors.sum(1), rtol=1e-15)


# --- one equation -----------------------------------------------------------------------------------------------------

# Equation → its arguments in a step, from the interface, the state before and after, and the way from one to the other.
ARGUMENTS: dict[str, Callable[[Interface, MemoryState, MemoryState, Any], tuple[Tensor, ...]]] = {
    "softplus": lambda i, prev, new, way: (i.read_keys,),
    "retention": lambda i, prev, new, way: (i.free_gates, prev.read_weights),
    "update_usage": lambda i, prev, new, way: (prev.usage, prev.write_weights, way.retention),
    "allocation_weights": lambda i, prev, new, way: (new.usage,),
    "write_allocation_weights": lambda i, prev, new, way: (new.usage, i.allocation_gates, i.write_gates),
    "cosine_similarity": lambda i, prev, new, way: (prev.memory, i.write_keys),
    "content_weights": lambda i, prev, new, way: (new.memory, i.read_keys, i.read_strengths),
    "write_weights": lambda i, prev, new, way: (
        way.write_content_weights,
        way.allocation_weights,
        i.allocation_gates,
        i.write_gates,
    ),
    "update_memory": lambda i, prev, new, way: (prev.memory, new.write_weights, i.erase_vectors, i.write_vectors),
    "update_link": lambda i, prev, new, way: (prev.link, prev.precedence, new.write_weights),
    "update_precedence": lambda i, prev, new, way: (prev.precedence, new.write_weights),
    "forward_weights": lambda i, prev, new, way: (new.link, prev.read_weights),
    "backward_weights": lambda i, prev, new, way: (new.link, prev.read_weights),
    "read_weights": lambda i, prev, new, way: (
        way.read_content_weights,
        way.forward_weights,
        way.backward_weights,
        i.read_modes,
    ),
    "read_words": lambda i, prev, new, way: (new.memory, new.read_weights),
}


def adjoint(name: str, d_value: Tensor, value: Tensor, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The equation's `*_backward`, all of which but one take the equation's arguments in their order."""
    if name == "write_allocation_weights":
        usage, *gates = arguments
        arguments = (usage, value, *gates)
    gradients = getattr(backward, f"{name}_backward")(d_value, *arguments)
    return (gradients,) if isinstance(gradients, Tensor) else gradients


def test_every_adjoint_is_tested() -> None:
    adjoints = {name.removesuffix("_backward") for name in vars(backward) if name.endswith("_backward")}
    assert adjoints == ARGUMENTS.keys() | {"memory_step", "activate_interface"}


@each_edge
@settings(max_examples=15)
@given(size=sizes)
def test_adjoint_of_each_equation(edge: str, size: dict[str, int]) -> None:
    interface, prev = problem_at(edge, size)
    _, new, way = memory_step_with_addressing(interface, prev)
    for name, pick in ARGUMENTS.items():
        arguments = as_leaves(pick(interface, prev, new, way))
        value = getattr(addressing, name)(*arguments)
        d_value = random_like(value, seed=size["seed"])
        # With one write head the allocation does not depend on the gates: zeros, not None.
        expected = torch.autograd.grad(value, arguments, d_value, materialize_grads=True)
        with torch.no_grad():
            actual = adjoint(name, d_value, value, arguments)
        assert_close(actual, expected, rtol=RTOL, atol=gradient_floor(interface, prev), name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_adjoint_of_a_lookup_has_room_for_squares_that_16_bits_have_not(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(0)
    memory, keys = as_leaves(
        tuple((100 * torch.randn(shape, generator=drawn)).to(dtype) for shape in ((2, 5, 16), (2, 3, 16)))
    )
    value = addressing.cosine_similarity(memory, keys)
    d_value = random_like(value, seed=1)
    expected = torch.autograd.grad(value, (memory, keys), d_value)
    with torch.no_grad():
        actual = backward.cosine_similarity_backward(d_value, memory, keys)
    assert [gradient.dtype for gradient in actual] == [dtype, dtype]
    assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("strength", ["oneplus", "softplus"])
@settings(max_examples=15)
@given(size=sizes)
def test_adjoint_of_the_activations(strength: str, size: dict[str, int]) -> None:
    interface, _ = random_problem(**size, steps=1)
    (batch, reads, word), writes = interface.read_keys.shape, interface.write_keys.shape[1]
    length = sum(interface_sizes(reads, writes, word).values())
    vector = as_leaves(random_like(torch.empty(batch, length, dtype=torch.float64), seed=size["seed"]))
    activated = activate_interface(vector, num_reads=reads, num_writes=writes, word_size=word, strength=strength)
    d_interface = random_like(activated, seed=size["seed"] + 1)
    (expected,) = torch.autograd.grad(list(activated), vector, list(d_interface))
    with torch.no_grad():
        actual = backward.activate_interface_backward(d_interface, activated, vector)
    assert_close(actual, expected, rtol=RTOL, atol=1e-14)


# --- the whole step ---------------------------------------------------------------------------------------------------


@each_edge
@pytest.mark.parametrize("stop_usage_gradient", [False, True])
@settings(max_examples=15)
@given(size=sizes)
def test_adjoint_of_a_step(edge: str, stop_usage_gradient: bool, size: dict[str, int]) -> None:
    interface, state = problem_at(edge, size)
    d_read_words, d_state = random_like(memory_step(interface, state), seed=size["seed"])
    expected = step_gradients(
        memory_step, interface, state, d_read_words, d_state, stop_usage_gradient=stop_usage_gradient
    )
    actual = backward.memory_step_backward(
        interface, state, d_read_words, d_state, stop_usage_gradient=stop_usage_gradient
    )
    assert_close(actual, expected, rtol=RTOL, atol=gradient_floor(interface, state), name=edge)
    if stop_usage_gradient:
        assert not actual[1].write_weights.any()


@settings(max_examples=25)
@given(size=sizes, edges=st.lists(st.sampled_from(sorted(EDGES)), min_size=2, max_size=4, unique=True))
def test_adjoint_of_a_step_with_several_edges_at_once(size: dict[str, int], edges: list[str]) -> None:
    problem = random_problem(**size, steps=2)
    for edge in edges:
        problem = EDGES[edge](*problem)
    gradients = random_like(memory_step(*problem), seed=size["seed"])
    expected = step_gradients(memory_step, *problem, *gradients)
    assert_close(
        backward.memory_step_backward(*problem, *gradients), expected, rtol=RTOL, atol=gradient_floor(*problem)
    )
