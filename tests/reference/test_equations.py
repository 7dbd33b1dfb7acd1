"""Each equation by itself: values worked out by hand, and its gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import as_leaves, assert_close, random_problem
from torch import Tensor
from torch.autograd import gradcheck

from dnc_reference import Interface, MemoryState, addressing, memory_step
from dnc_reference.interface import activate_interface, interface_sizes

EPSILON = 1e-6  # what all three constants are in DeepMind's published code
B, N, W, R, K = 2, 5, 3, 2, 2


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_hot(*indices: int, slots: int) -> Tensor:
    """[1, len(indices), slots]."""
    return torch.eye(slots, dtype=torch.float64)[list(indices)].unsqueeze(0)


def assert_value(actual: Tensor, expected: Any) -> None:
    """To a few ulps: these cases have no long sums."""
    assert_close(actual, tensor(expected) if not isinstance(expected, Tensor) else expected, rtol=1e-14, atol=1e-15)


# --- values -----------------------------------------------------------------------------------------------------------


def test_the_epsilons_are_deepminds() -> None:
    assert addressing.NORM_EPSILON == addressing.SIMILARITY_EPSILON == addressing.USAGE_EPSILON == EPSILON


@pytest.mark.parametrize("x", [-1000.0, -50.0, -1.0, 0.0, 1.0, 19.0, 21.0, 39.0, 41.0, 1000.0])
def test_strengths(x: float) -> None:
    expected = max(x, 0.0) + math.log1p(math.exp(-abs(x)))
    assert_value(addressing.softplus(tensor(x)), expected)
    assert_value(addressing.oneplus(tensor(x)), 1 + expected)


def test_retention_multiplies_over_the_heads() -> None:
    read_weights = tensor([[[0.5, 0.2, 0.0], [0.0, 0.5, 1.0]]])
    expected = [[1 - 0.8 * 0.5, (1 - 0.8 * 0.2) * (1 - 0.25 * 0.5), 1 - 0.25]]
    assert_value(addressing.retention(tensor([[0.8, 0.25]]), read_weights), expected)


def test_retention_of_a_slot_that_is_freed_entirely_is_zero() -> None:
    assert_value(addressing.retention(tensor([[1.0]]), one_hot(1, slots=3)), [[1.0, 0.0, 1.0]])


def test_usage_grows_by_what_any_head_wrote_and_shrinks_by_what_was_freed() -> None:
    usage, retention = tensor([[0.0, 0.25, 0.5, 1.0]]), tensor([[1.0, 1.0, 0.5, 0.75]])
    write_weights = tensor([[[0.5, 0.0, 0.2, 1.0], [0.5, 0.0, 0.5, 0.0]]])
    expected = [[0.75, 0.25, (0.5 + 0.5 * (1 - 0.8 * 0.5)) * 0.5, 0.75]]
    assert_value(addressing.update_usage(usage, write_weights, retention), expected)


def test_allocation_takes_the_least_used_slots_first() -> None:
    usage = [0.5, 0.125, 0.75]
    u = [EPSILON + (1 - EPSILON) * x for x in usage]

    expected = [[u[1] * (1 - u[0]), 1 - u[1], u[1] * u[0] * (1 - u[2])]]
    assert_value(addressing.allocation_weights(tensor([usage])), expected)


def test_allocation_of_an_empty_memory_starts_at_slot_0() -> None:
    """Each slot leaves ε of itself to the next one."""
    expected = [[1 - EPSILON, (1 - EPSILON) * EPSILON, (1 - EPSILON) * EPSILON**2]]
    assert_close(addressing.allocation_weights(torch.zeros(1, 3, dtype=torch.float64)), tensor(expected), rtol=1e-14)
    assert_value(addressing.allocation_weights(torch.zeros(1, 1, dtype=torch.float64)), [[1 - EPSILON]])


def test_allocation_of_a_full_memory_is_zero() -> None:
    assert_value(addressing.allocation_weights(torch.ones(1, 4, dtype=torch.float64)), [[0.0] * 4])


@pytest.mark.parametrize(
    ("usage", "free_list"),
    [
        ([0.5, 0.25, 0.5, 0.25], [1, 3, 0, 2]),
        ([1.0, 1.0, 0.0, 0.0], [2, 3, 0, 1]),
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
        # Far apart as numbers, yet 1 − u is the same: an empty slot that carries a rounding is still an empty slot.
        ([1e-17, 0.0, 1e-18, 0.5], [0, 1, 2, 3]),
    ],
)
def test_of_equally_used_slots_the_lower_comes_first(usage: list[float], free_list: list[int]) -> None:
    sorted_usage, order = addressing.sort_usage(tensor([usage]))
    assert order.tolist() == [free_list]
    assert_value(sorted_usage, [[EPSILON + (1 - EPSILON) * usage[slot] for slot in free_list]])


def test_ties_stay_in_order_in_a_large_memory() -> None:
    """An unstable sort may still keep the order of a few."""
    usage = torch.arange(1000, dtype=torch.float64).remainder(3).unsqueeze(0) / 4
    _, order = addressing.sort_usage(usage)
    slots = torch.arange(1000)
    assert order.tolist() == [[*slots[0::3].tolist(), *slots[1::3].tolist(), *slots[2::3].tolist()]]


def test_exclusive_product() -> None:
    assert_value(addressing.exclusive_product(tensor([[2.0, 3.0, 5.0, 7.0]])), [[1.0, 2.0, 6.0, 30.0]])
    assert_value(addressing.exclusive_product(tensor([[2.0]])), [[1.0]])


def test_write_heads_allocate_one_after_the_other() -> None:
    """The second head sees what the first will take: gate times allocation times what is left of each slot."""
    usage, allocation_gates, write_gates = [0.5, 0.125], [0.5, 0.25], [0.5, 1.0]
    first = addressing.allocation_weights(tensor([usage]))
    simulated = tensor([usage]) + (1 - tensor([usage])) * 0.25 * first
    expected = torch.stack([first, addressing.allocation_weights(simulated)], dim=1)
    actual = addressing.write_allocation_weights(tensor([usage]), tensor([allocation_gates]), tensor([write_gates]))
    assert_value(actual, expected)


def test_write_heads_with_open_gates_allocate_different_slots() -> None:
    ones = torch.ones(1, 3, dtype=torch.float64)
    allocation = addressing.write_allocation_weights(tensor([[1.0, 0.0, 1.0, 0.1, 0.2]]), ones, ones)
    assert allocation.argmax(-1).tolist() == [[1, 3, 4]]


def test_similarity_has_one_epsilon_in_each_norm_and_one_on_their_product() -> None:
    norms = math.sqrt(25 + EPSILON), math.sqrt(1 + EPSILON)
    expected = [[[3.0 / (norms[0] * norms[1] + EPSILON), 25 / (norms[0] ** 2 + EPSILON), 0.0]]]
    memory, keys = tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]]), tensor([[[3.0, 4.0]]])
    assert_value(addressing.cosine_similarity(memory, keys), expected)


def test_norm_of_nothing() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    assert_value(addressing.norm(x), [math.sqrt(EPSILON)] * 2)
    (gradient,) = torch.autograd.grad(addressing.norm(x).sum(), x)
    assert_value(gradient, torch.zeros_like(x))


def test_content_weights() -> None:
    memory, keys, strengths = tensor([[[1.0, 0.0], [0.0, 2.0]]]), tensor([[[1.0, 0.0]]]), tensor([[3.0]])
    score = math.exp(3.0 / (1 + EPSILON + EPSILON))
    assert_value(addressing.content_weights(memory, keys, strengths), [[[score / (score + 1), 1 / (score + 1)]]])


@pytest.mark.parametrize(("key", "strength"), [(0.0, 5.0), (1.0, 0.0)])
def test_a_zero_key_or_strength_looks_everywhere_alike(key: float, strength: float) -> None:
    memory = torch.randn(1, 4, 3, dtype=torch.float64)
    actual = addressing.content_weights(memory, torch.full_like(memory[:, :1], key), tensor([[strength]]))
    assert_value(actual, [[[0.25] * 4]])


def test_an_infinitely_sharp_key_finds_its_slot() -> None:
    memory = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    assert_value(addressing.content_weights(memory, memory[:, 2:3], tensor([[1000.0]])), one_hot(2, slots=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_words_are_told_apart_in_half_precision(dtype: torch.dtype) -> None:
    """The squares of the third one's numbers add up to more than float16 has."""
    memory = torch.zeros(1, 4, 64, dtype=dtype)
    memory[0, 2] = 40.0
    actual = addressing.content_weights(
        memory, torch.full_like(memory[:, :1], 20.0), torch.full((1, 1), 10.0).to(dtype)
    )
    assert (actual[0, 0, 2] > 0.99).all()
    assert actual.dtype == dtype


@pytest.mark.parametrize(
    ("allocation_gate", "write_gate", "expected"),
    [(1.0, 1.0, [0.0, 1.0]), (0.0, 1.0, [0.5, 0.25]), (0.25, 0.5, [0.1875, 0.21875]), (0.5, 0.0, [0.0, 0.0])],
)
def test_write_weights(allocation_gate: float, write_gate: float, expected: list[float]) -> None:
    content, allocation = tensor([[[0.5, 0.25]]]), tensor([[[0.0, 1.0]]])
    actual = addressing.write_weights(content, allocation, tensor([[allocation_gate]]), tensor([[write_gate]]))
    assert_value(actual, [[expected]])


def test_all_heads_erase_before_any_adds() -> None:
    """The second head erases slot 0 entirely, and yet what the first adds there stays."""
    memory, write_weights = tensor([[[2.0, 3.0], [4.0, 5.0]]]), tensor([[[1.0, 0.5], [1.0, 0.0]]])
    erase_vectors, write_vectors = tensor([[[0.0, 0.5], [1.0, 1.0]]]), tensor([[[7.0, 8.0], [10.0, 20.0]]])
    expected = [[[7 + 10.0, 8 + 20.0], [4 + 0.5 * 7, 5 * 0.75 + 0.5 * 8]]]
    assert_value(addressing.update_memory(memory, write_weights, erase_vectors, write_vectors), expected)


def test_link_and_precedence_after_two_writes() -> None:
    """Slot 2, then slot 0: one link, from 2 to 0, walked forward and backward."""
    link, precedence = torch.zeros(1, 1, 3, 3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64)
    for slot in (2, 0):
        written = one_hot(slot, slots=3)
        link = addressing.update_link(link, precedence, written)
        precedence = addressing.update_precedence(precedence, written)
    assert_value(link, [[[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]])
    assert_value(precedence, one_hot(0, slots=3))
    read_weights = one_hot(2, 0, slots=3)
    nowhere = [0.0, 0.0, 0.0]
    assert_value(addressing.forward_weights(link, read_weights), [[[[1.0, 0.0, 0.0]], [nowhere]]])
    assert_value(addressing.backward_weights(link, read_weights), [[[nowhere], [[0.0, 0.0, 1.0]]]])


def test_link_decays_by_both_of_its_ends_and_has_no_diagonal() -> None:
    prev_link, precedence = tensor([[[[0.0, 0.5], [0.25, 0.0]]]]), tensor([[[0.75, 0.2]]])
    expected = [[[[0.0, 0.2 * 0.5 + 0.5 * 0.2], [0.2 * 0.25 + 0.3 * 0.75, 0.0]]]]
    assert_value(addressing.update_link(prev_link, precedence, tensor([[[0.5, 0.3]]])), expected)


def test_link_leaves_its_arguments_alone() -> None:
    prev_link = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    addressing.update_link(prev_link, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    assert_value(prev_link, [[[[1.0, 1.0], [1.0, 1.0]]]])


def test_precedence_keeps_what_was_not_overwritten() -> None:
    precedence, written = tensor([[[0.5, 0.25]]]), tensor([[[0.25, 0.5]]])
    assert_value(addressing.update_precedence(precedence, written), [[[0.25 * 0.5 + 0.25, 0.25 * 0.25 + 0.5]]])
    assert_value(addressing.update_precedence(precedence, torch.zeros_like(written)), precedence)


def test_directional_weights_keep_heads_apart() -> None:
    """Distinct numbers everywhere: a swapped axis or head shows."""
    link, read_weights = torch.randn(B, K, N, N, dtype=torch.float64), torch.randn(B, R, N, dtype=torch.float64)
    forward = torch.zeros(B, R, K, N, dtype=torch.float64)
    backward = torch.zeros_like(forward)
    for b, r, k in torch.cartesian_prod(torch.arange(B), torch.arange(R), torch.arange(K)):
        forward[b, r, k] = link[b, k] @ read_weights[b, r]
        backward[b, r, k] = link[b, k].T @ read_weights[b, r]
    assert_value(addressing.forward_weights(link, read_weights), forward)
    assert_value(addressing.backward_weights(link, read_weights), backward)


def test_read_modes_are_backward_then_forward_then_content() -> None:
    """With two write heads; each head looks one way only."""
    ways = torch.randn(5, N, dtype=torch.float64)
    backward, forward, content = (x.unsqueeze(0) for x in (ways[:2], ways[2:4], ways[4]))
    modes = torch.eye(5, dtype=torch.float64).unsqueeze(0)  # five read heads, [1, 5, 5]
    actual = addressing.read_weights(
        content.expand(1, 5, N), forward.expand(1, 5, 2, N), backward.expand(1, 5, 2, N), modes
    )
    assert_value(actual, ways.unsqueeze(0))


def test_read_words() -> None:
    memory, read_weights = tensor([[[1.0, 2.0], [3.0, 4.0]]]), tensor([[[0.5, 0.25], [0.0, 1.0]]])
    assert_value(addressing.read_words(memory, read_weights), [[[1.25, 2.0], [3.0, 4.0]]])


def test_interface_vector_is_laid_out_as_interface_sizes_says() -> None:
    sizes = interface_sizes(R, K, W)
    vector = torch.randn(B, sum(sizes.values()), dtype=torch.float64)
    parts = dict(zip(sizes, vector.split(list(sizes.values()), -1), strict=True))
    shapes = Interface.shapes(B, W, R, K)
    raw = Interface(**{name: parts[name].reshape(shapes[name]) for name in Interface._fields})
    squashed = ("erase_vectors", "free_gates", "allocation_gates", "write_gates")
    expected = raw._replace(
        **{name: 1 / (1 + torch.exp(-getattr(raw, name))) for name in squashed},
        read_modes=raw.read_modes.exp() / raw.read_modes.exp().sum(-1, keepdim=True),
    )
    for strength, offset in (("oneplus", 1), ("softplus", 0)):
        strengths = {
            name: offset + torch.log1p(getattr(raw, name).exp()) for name in ("read_strengths", "write_strengths")
        }
        actual = activate_interface(vector, num_reads=R, num_writes=K, word_size=W, strength=strength)
        assert_close(actual, expected._replace(**strengths), rtol=1e-14)


# --- gradients --------------------------------------------------------------------------------------------------------


def uniform(*shape: int) -> Tensor:
    """Away from 0 and 1, where a difference would leave the range."""
    return torch.empty(*shape, dtype=torch.float64).uniform_(0.05, 0.95)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def distinct_usage() -> Tensor:
    """Gaps far above the step of the differences, so that none changes the order."""
    return torch.stack([torch.linspace(0.1, 0.9, N, dtype=torch.float64)[torch.randperm(N)] for _ in range(B)])


EQUATIONS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "softplus": (addressing.softplus, lambda: (normal(B, R),)),
    "oneplus": (addressing.oneplus, lambda: (normal(B, R),)),
    "retention": (addressing.retention, lambda: (uniform(B, R), uniform(B, R, N))),
    "update_usage": (addressing.update_usage, lambda: (uniform(B, N), uniform(B, K, N), uniform(B, N))),
    "allocation_weights": (addressing.allocation_weights, lambda: (distinct_usage(),)),
    "sort_usage": (lambda usage: addressing.sort_usage(usage)[0], lambda: (distinct_usage(),)),
    "exclusive_product": (addressing.exclusive_product, lambda: (uniform(B, N),)),
    "write_allocation_weights": (
        addressing.write_allocation_weights,
        lambda: (distinct_usage(), uniform(B, K), uniform(B, K)),
    ),
    "cosine_similarity": (addressing.cosine_similarity, lambda: (normal(B, N, W), normal(B, R, W))),
    "norm": (addressing.norm, lambda: (normal(B, N, W),)),
    "content_weights": (addressing.content_weights, lambda: (normal(B, N, W), normal(B, R, W), 5 * uniform(B, R))),
    "write_weights": (
        addressing.write_weights,
        lambda: (uniform(B, K, N), uniform(B, K, N), uniform(B, K), uniform(B, K)),
    ),
    "update_memory": (
        addressing.update_memory,
        lambda: (normal(B, N, W), uniform(B, K, N), uniform(B, K, W), normal(B, K, W)),
    ),
    "update_link": (addressing.update_link, lambda: (uniform(B, K, N, N), uniform(B, K, N), uniform(B, K, N))),
    "update_precedence": (addressing.update_precedence, lambda: (uniform(B, K, N), uniform(B, K, N))),
    "forward_weights": (addressing.forward_weights, lambda: (uniform(B, K, N, N), uniform(B, R, N))),
    "backward_weights": (addressing.backward_weights, lambda: (uniform(B, K, N, N), uniform(B, R, N))),
    "read_weights": (
        addressing.read_weights,
        lambda: (uniform(B, R, N), uniform(B, R, K, N), uniform(B, R, K, N), uniform(B, R, 1 + 2 * K)),
    ),
    "read_words": (addressing.read_words, lambda: (normal(B, N, W), uniform(B, R, N))),
    "activate_interface": (
        lambda vector: activate_interface(vector, num_reads=R, num_writes=K, word_size=W),
        lambda: (normal(B, sum(interface_sizes(R, K, W).values())),),
    ),
}


def test_every_equation_has_its_gradient_checked() -> None:
    public = {
        name
        for name, value in vars(addressing).items()
        if callable(value) and getattr(value, "__module__", None) == addressing.__name__ and not name.startswith("_")
    }
    assert EQUATIONS.keys() == public | {"activate_interface"}


@pytest.mark.parametrize("name", EQUATIONS)
def test_gradient(name: str) -> None:
    equation, arguments = EQUATIONS[name]
    assert gradcheck(equation, as_leaves(arguments()))


@pytest.mark.parametrize("stop_usage_gradient", [False, True])
@pytest.mark.parametrize("writes", [1, 2])
def test_gradient_of_a_step(writes: int, stop_usage_gradient: bool) -> None:
    interface, state = as_leaves(random_problem(1, 4, 2, 2, writes, seed=writes))
    if stop_usage_gradient:  # the values still depend on it
        state = state._replace(write_weights=state.write_weights.detach())

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        read_words, new = memory_step(
            Interface(*tensors[:10]), MemoryState(*tensors[10:]), stop_usage_gradient=stop_usage_gradient
        )
        return read_words, *new

    assert gradcheck(step, (*interface, *state))


def test_stop_usage_gradient_stops_that_gradient_and_changes_no_value() -> None:
    interface, state = as_leaves(random_problem(2, 5, 3, 2, 2))
    stopped, flowing = (memory_step(interface, state, stop_usage_gradient=stop) for stop in (True, False))
    assert_close(stopped, flowing)
    (gradient,) = torch.autograd.grad(flowing[0].sum(), state.write_weights)
    assert gradient.abs().max() > 1e-3
    # They enter nothing but the usage, as weights of the step before.
    assert torch.autograd.grad(stopped[0].sum(), state.write_weights, allow_unused=True) == (None,)
