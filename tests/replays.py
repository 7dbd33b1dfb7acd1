"""What the tests of replayed graphs share: a small layer, its trainings, and the stand-in in the place of a device."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from stand_in import StandIn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dnc_triton import DNC, DNCState, environment
from dnc_triton.sequence import graphs

BATCH, STEPS, INPUTS = 3, 5, 3


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.ENGINES, "cpu", StandIn)
    monkeypatch.setattr(graphs, "_graphs", {})
    monkeypatch.delenv(environment.GRAPHS, raising=False)
    monkeypatch.delenv(environment.GRAPH_MEMORY, raising=False)


@pytest.fixture(name="without")
def _without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function by plain launches."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv(environment.GRAPHS, "0")
            return function(*arguments, **options)

    return call


def cache() -> graphs.GraphCache:
    return graphs._graphs[torch.device("cpu")]


def engine() -> StandIn:
    return cache().engine  # type: ignore[return-value]


def make(**options: Any) -> DNC:
    torch.manual_seed(0)
    sizes = dict(memory_size=5, word_size=4, num_reads=2)
    return DNC(INPUTS, 6, 2, **{**sizes, "dtype": torch.float64, "backend": "torch_sequence", **options})


def draw(dnc: DNC, seed: int, steps: int = STEPS) -> tuple[Tensor, DNCState]:
    """Inputs and a state; another seed gives other numbers throughout."""
    torch.manual_seed(seed)
    weight = dnc.output.weight
    state = dnc.initial_state(BATCH).map(lambda x: torch.rand_like(x) / 4)
    inputs = torch.randn(BATCH, steps, INPUTS, dtype=weight.dtype, device=weight.device)
    return inputs if dnc.batch_first else inputs.transpose(0, 1).contiguous(), state


def results(dnc: DNC, inputs: Tensor, state: DNCState | None, **options: Any) -> Any:
    """Outputs, last state, and all gradients."""
    inputs = inputs.detach().requires_grad_()
    state = None if state is None else tree_map(lambda x: x.detach().requires_grad_(), state)
    outputs, last = dnc(inputs, state, **options)
    leaves = [inputs, *dnc.parameters(), *([] if state is None else tree_leaves(state))]
    loss = sum((i + 1) * x.square().sum() for i, x in enumerate(tree_leaves((outputs, last))))
    return outputs.detach(), last.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)


def train(
    dnc: DNC,
    rounds: int,
    options: Callable[[], dict[str, Any]] = dict,
    *,
    steps: int = STEPS,
    context: Callable[[], Any] = nullcontext,
) -> list[Any]:
    """Rounds, each with other numbers and other weights."""
    dnc, seen = copy.deepcopy(dnc), []
    for seed in range(rounds):
        inputs, state = draw(dnc, seed, steps)
        with context():
            seen.append(results(dnc, inputs, state, **options()))
        with torch.no_grad():
            for parameter, gradient in zip(dnc.parameters(), seen[-1][2][1:], strict=False):
                parameter.sub_(gradient.sign(), alpha=0.01)
    return tree_map(torch.clone, seen)


def check_two_threads(dnc: DNC, without: Callable[..., Any]) -> None:
    """Two threads that use a layer at once get what one gets by plain launches."""
    drawn = [draw(dnc, seed) for seed in range(30)]
    expected = [without(results, dnc, *given) for given in drawn]
    actual: list[Any] = [None, None]

    def run(index: int) -> None:
        actual[index] = [results(dnc, *given) for given in drawn]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(actual, [expected, expected])
