"""Who holds an instance of a replayed graph, until when, and which is given up for another; with a stand-in."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers import assert_same_bits
from replays import _empty, _without, cache, draw, engine, make, results  # noqa: F401
from stand_in import StandIn
from torch import Tensor

from dnc_triton import DNC, DNCState, environment
from dnc_triton.sequence import graphs

# --- the lease


@pytest.fixture
def leased() -> Iterator[tuple[DNC, Tensor, DNCState]]:
    """A layer that has an instance, with the results of a call that holds it."""
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (instance,) = cache().instances
    assert instance.is_free
    outputs, state = dnc(*draw(dnc, 2))
    assert not instance.is_free
    yield dnc, outputs, state
    del outputs, state
    gc.collect()


def test_a_backward_ends_it(leased: Any) -> None:
    _, outputs, _ = leased
    outputs.sum().backward()
    assert cache().instances[0].is_free


def test_a_backward_that_keeps_the_graph_does_not(leased: Any, without: Any) -> None:
    dnc, outputs, state = leased
    loss, parameters = outputs.square().sum(), list(dnc.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert not cache().instances[0].is_free
    results(dnc, *draw(dnc, 3))  # meanwhile
    again = torch.autograd.grad(loss + state.read_words.sum(), parameters, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, parameters), first)
    assert cache().instances[0].is_free
    outputs, state = without(dnc, *draw(dnc, 2))
    assert_same_bits(torch.autograd.grad(outputs.square().sum(), parameters, retain_graph=True), first)
    assert_same_bits(torch.autograd.grad(outputs.square().sum() + state.read_words.sum(), parameters), again)


def test_more_is_wanted(without: Any) -> None:
    """A graph makes what its first backward wanted; it is made anew for more, and then serves both."""
    dnc = make()
    parameters, (inputs, state) = list(dnc.parameters()), draw(dnc, 0)
    inputs.requires_grad_()
    wants: list[list[Tensor]] = [parameters, [inputs], [*parameters, inputs], [state.memory.link, *parameters]]

    def gradients(leaves: list[Tensor]) -> Any:
        for leaf in (inputs, *parameters, state.memory.link):
            leaf.requires_grad_(any(leaf is other for other in leaves))
        outputs, _ = dnc(inputs, state)
        return torch.autograd.grad(outputs.square().sum(), leaves)

    expected = [without(gradients, leaves) for leaves in wants]
    captures = []
    for index in (0, 0, 0, 1, 0, 2, 3, 1, 2, 3):
        assert_same_bits(gradients(wants[index]), expected[index])
        captures.append(engine().captures)
    assert captures == [0, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    (instance,) = cache().instances
    states = [*state.memory, state.read_words, *state.controller[0]]
    backwards = [*parameters, *parameters, inputs, *parameters, inputs, *states]  # also what was replaced
    d_outputs, *others = instance.gradients
    assert others == [None] * len(states)
    tensors = [*instance.given, *instance.forward.results, d_outputs, *backwards]
    assert instance.size == sum(x.numel() * x.element_size() for x in tensors)


def test_more_is_given(without: Any) -> None:
    """A graph takes the gradients that its first backward was given; it is made anew for others, and then takes all."""
    dnc = make()
    parameters = list(dnc.parameters())

    def gradients(used: list[int]) -> Any:
        outputs, state = dnc(*draw(dnc, 0))
        results = outputs, state.memory.link, state.read_words
        return torch.autograd.grad(sum(results[index].square().sum() for index in used), parameters, allow_unused=True)

    uses = [[0], [0, 1], [2], [0, 1, 2]]
    expected = [without(gradients, used) for used in uses]
    captures, taken = [], []
    for index in (0, 0, 0, 1, 0, 2, 3, 1, 0):
        assert_same_bits(gradients(uses[index]), expected[index])
        captures.append(engine().captures)
        taken.append(sum(x is not None for x in cache().instances[0].gradients) if cache().instances else 0)
    assert captures == [0, 2, 2, 3, 3, 4, 4, 4, 4]
    assert taken == [0, 1, 1, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("last", ["outputs", "state"])
def test_forgotten_results_end_it(last: str) -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    outputs, state = dnc(*draw(dnc, 2))
    (instance,) = cache().instances
    held = {"outputs": outputs, "state": state}[last]
    del outputs, state
    assert not instance.is_free
    del held
    assert instance.is_free


def test_a_backward_that_is_interrupted_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here while a gradient is copied that the next one does not have."""
    dnc = make()

    def gradients(*, of_memory: bool) -> Any:
        outputs, state = dnc(*draw(dnc, 0))
        loss = outputs.sum() + (state.memory.memory.sum() if of_memory else 0)
        return torch.autograd.grad(loss, list(dnc.parameters()))

    expected = [gradients(of_memory=False) for _ in range(3)][-1]
    exact, copies = graphs._copy, []

    def copy(into: list[Tensor], tensors: list[Tensor]) -> None:
        exact(into, tensors)
        copies.append(len(tensors))
        if len(copies) == 3:  # after what the forward is given and what it returns
            raise KeyboardInterrupt

    monkeypatch.setattr(graphs, "_copy", copy)
    with pytest.raises(KeyboardInterrupt):
        gradients(of_memory=True)
    monkeypatch.setattr(graphs, "_copy", exact)
    assert copies[2] == 2
    assert_same_bits(gradients(of_memory=False), expected)


def test_used_twice_in_one_graph(without: Any) -> None:
    """And several forwards before their backwards: the second finds no instance at first."""
    dnc = make()

    def run(rounds: int) -> list[Any]:
        seen = []
        for seed in range(rounds):
            inputs, state = draw(dnc, seed)
            outputs, state = dnc(inputs, state)
            more, state = dnc(inputs.flip(1), state)
            seen.append(torch.autograd.grad(outputs.sum() + more.square().sum(), list(dnc.parameters())))
        first, second = (dnc(*draw(dnc, seed))[0].square().sum() for seed in (5, 6))
        return [*seen, *(torch.autograd.grad(loss, list(dnc.parameters())) for loss in (first, second))]

    assert_same_bits(run(8), without(run, 8))
    assert len(cache().instances) == 2
    assert all(instance.is_free and instance.backward is not None for instance in cache().instances)


def test_those_who_hold_many_results_cost_few_captures() -> None:
    dnc = make()
    held = [dnc(*draw(dnc, seed)) for seed in range(40)]
    assert engine().captures == len(cache().instances) == 4  # after 2, 4, 8 and 16 calls
    del held


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool, without: Any) -> None:
    dnc = make()

    def run() -> list[Any]:
        seen = []
        for seed in range(5):
            inputs, state = draw(dnc, seed)
            inputs.requires_grad_()
            outputs, _ = torch.utils.checkpoint.checkpoint(dnc, inputs, state, use_reentrant=use_reentrant)
            seen.append(torch.autograd.grad(outputs.square().sum(), inputs) if not use_reentrant else None)
            if use_reentrant:
                outputs.square().sum().backward()
                seen[-1] = (inputs.grad,)
        return seen

    assert_same_bits(run(), without(run))
    assert engine().replays > 0
    assert all(instance.is_free for instance in cache().instances)


# --- the bound


def test_the_least_recently_used_is_given_up(monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    dnc = make()
    for steps in (2, 3):
        for seed in range(2):
            results(dnc, *draw(dnc, seed, steps))
    short, long = cache().instances
    results(dnc, *draw(dnc, 2, 2))
    assert cache().instances == [long, short]
    monkeypatch.setattr(StandIn, "memory", lambda self: int((short.size + 2 * long.size) / graphs.SHARE))
    for seed in range(2):
        assert_same_bits(results(dnc, *draw(dnc, seed, 4)), without(results, dnc, *draw(dnc, seed, 4)))
    assert cache().instances[0] is short
    assert len(cache().instances) == 2
    assert engine().waits == 1  # for what it replays
    assert not engine().kept
    assert sum(instance.size for instance in cache().instances) <= cache().bound()
    captures = engine().captures
    for seed in range(3):  # what was given up waits for more calls than before
        results(dnc, *draw(dnc, seed, 3))
    assert engine().captures == captures


def test_of_two_that_are_free_the_one_used_last_is_taken_again() -> None:
    """So that the other may be given up."""
    dnc = make()
    held = [dnc(*draw(dnc, seed)) for seed in range(6)]
    first, second = cache().instances
    del held
    results(dnc, *draw(dnc, 6))
    assert cache().instances == [first, second]


def test_room_is_made_for_a_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backward follows that would ask for room."""
    dnc = make()
    with torch.no_grad():
        for steps in (2, 3):
            for seed in range(2):
                dnc(*draw(dnc, seed, steps))
        first, second = cache().instances
        monkeypatch.setattr(StandIn, "memory", lambda self: int((first.size + second.size) / graphs.SHARE) + 4)
        for seed in range(2):
            dnc(*draw(dnc, seed, 4))
    assert len(cache().instances) < 3
    assert sum(instance.size for instance in cache().instances) <= cache().bound()


def test_bytes_are_those_of_the_tensors() -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (instance,) = cache().instances
    taken = [x for x in instance.gradients if x is not None]
    tensors = [*instance.given, *instance.forward.results, *taken, *instance.backward.results]
    assert instance.size == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 4), (1, 3)), ((3, 1, 2), (2, 7, 1)), ((1, 3), (5, 1)), ((0, 3), (7, 2))]
)
def test_an_alias_has_the_place_of_what_it_stands_for(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Down to the stride of an axis of length 1; and it has a storage of its own."""
    tensor = torch.empty_strided(shape, strides)
    alias = graphs._alias(tensor)
    assert (alias.shape, alias.stride(), alias.data_ptr()) == (tensor.shape, strides, tensor.data_ptr())
    assert alias.numel() == 0 or alias.untyped_storage()._cdata != tensor.untyped_storage()._cdata


@pytest.mark.parametrize("bound", ["0", "1"])
def test_more_than_the_bound(
    bound: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without: Any
) -> None:
    """Known before a capture, or only after it: one line, and the rest runs."""
    monkeypatch.setenv(environment.GRAPH_MEMORY, bound)
    dnc = make()
    results(dnc, *draw(dnc, 0))
    engine().extra = 2**21
    for seed in range(1, 12):
        assert_same_bits(results(dnc, *draw(dnc, seed)), without(results, dnc, *draw(dnc, seed)))
    assert not cache().instances
    assert engine().captures == int(bound)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    size = "2.0" if bound == "1" else "0.0"
    assert f"{size} MiB beside 0.0 MiB in use would exceed the bound of {bound}.0 MiB" in record.getMessage()
    assert environment.GRAPH_MEMORY in record.getMessage()


def test_a_backward_beyond_the_bound(monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    dnc = make()
    monkeypatch.setenv(environment.GRAPH_MEMORY, "1")
    results(dnc, *draw(dnc, 0))
    outputs, _ = dnc(*draw(dnc, 1))
    (instance,) = cache().instances
    engine().extra = 2**20
    actual = torch.autograd.grad(outputs.sum(), list(dnc.parameters()))
    assert not cache().instances
    assert engine().waits == 1
    assert instance.size > cache().bound()
    assert engine().kept == [tensor.data_ptr() for tensor in instance.history], "which plain launches read"
    assert_same_bits(actual, without(lambda: torch.autograd.grad(dnc(*draw(dnc, 1))[0].sum(), list(dnc.parameters()))))


def test_what_is_leased_is_not_given_up(leased: Any, monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    dnc, outputs, _ = leased
    (instance,) = cache().instances
    monkeypatch.setattr(StandIn, "memory", lambda self: int(instance.size / graphs.SHARE))
    for seed in range(4):
        results(dnc, *draw(dnc, seed, 2))
    assert cache().instances == [instance]
    monkeypatch.setattr(StandIn, "memory", lambda self: int(2 * instance.size / graphs.SHARE))
    for steps in (2, 3):  # one comes, and goes for the other; both are younger
        for seed in range(7):
            results(dnc, *draw(dnc, seed, steps))
    assert cache().instances[0] is instance
    assert len(cache().instances) == 2
    actual = torch.autograd.grad(outputs.square().sum(), list(dnc.parameters()))
    again = without(lambda: torch.autograd.grad(dnc(*draw(dnc, 2))[0].square().sum(), list(dnc.parameters())))
    assert_same_bits(actual, again)
    results(dnc, *draw(dnc, 4, 2))
    assert cache().instances != [instance]


@pytest.mark.parametrize(
    ("variable", "expected", "value"),
    [
        *(("DNC_TRITON_GRAPH_MEMORY", "a whole number of MiB", value) for value in ("much", "-1", "1.5")),
        *(("DNC_TRITON_GRAPHS", "0 or 1", value) for value in ("no", "false", "2")),
    ],
)
def test_a_variable_that_cannot_be_understood(
    variable: str, expected: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    dnc = make()
    with pytest.raises(ValueError, match=f"^{variable}: expected {expected}, got '{value}'"):
        dnc(*draw(dnc, 0))


def test_few_signatures_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were used last."""
    monkeypatch.setattr(graphs, "SIGNATURES", 2)
    dnc = make()
    for steps in (1, 2, 3, 2):
        results(dnc, *draw(dnc, 0, steps))
    assert len(cache().signatures) == 2
    assert len(cache().instances) == 1  # of two steps, captured when they came again: they had not been forgotten


def test_forgetting() -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (known,) = cache().instances
    with graphs.forgetting():
        for seed in range(2):
            results(dnc, *draw(dnc, seed, 2))
        assert len(cache().instances) == 2
        assert engine().waits == 0
    assert cache().instances == [known]
    assert engine().waits == 1
    assert list(cache().signatures.values()) == [known.signature]
    for seed in range(2):  # captured from the second call on, as if nothing had been measured
        results(dnc, *draw(dnc, seed, 2))
    assert len(cache().instances) == 2
