"""The kernels in a replayed graph, with a stand-in for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from replays import BATCH, _empty, _without, cache, draw, engine, make, train  # noqa: F401
from torch import Tensor

from dnc_triton import layer
from dnc_triton.kernels.layout import is_shared
from dnc_triton.sequence.one_launch import OneLaunchSequence


@pytest.mark.parametrize(
    ("backend", "choice"),
    [
        pytest.param("triton_fused", {}, marks=pytest.mark.slow),  # in the interpreter
        ("triton_split", dict(clip=0.3, checkpoint=2)),
    ],
)
def test_trainings_are_the_same(backend: str, choice: dict[str, Any], without: Callable[..., Any]) -> None:
    dnc = make(backend=backend, **choice)
    options = lambda: dict(lengths=[2, 0, 1], reset=torch.rand(3, 2) < 0.3)  # noqa: E731
    assert_same_bits(train(dnc, 2, options, steps=2), without(train, dnc, 2, options, steps=2))
    assert engine().replays == 2
    assert cache().instances[0].is_free


def test_zeros_of_one_element_for_all(without: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "SHARED", {"cpu": [5]})
    dnc = make(backend="triton_split")
    parameters = list(dnc.parameters())

    def gradients(seed: int) -> Any:
        return torch.autograd.grad(dnc(draw(dnc, seed, 1)[0])[0].square().sum(), parameters)

    for seed in range(3):
        assert_same_bits(gradients(seed), without(gradients, seed))
    assert engine().replays == 2 * 2
    (instance,) = cache().instances
    assert {len(tensor) for tensor in instance.given[1:7]} == {1, BATCH}


def test_a_state_that_a_hook_makes_whole(without: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a forward that was replayed and the capture of its backward, as a hook that moves large tensors may."""
    monkeypatch.setattr(layer, "SHARED", {"cpu": [5]})
    dnc = make(backend="triton_split")
    shared: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        shared.append(is_shared(tensor))
        return tensor.contiguous() if shared[-1] else tensor

    def gradients(seed: int) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs, _ = dnc(draw(dnc, seed, 1)[0])
        return torch.autograd.grad(outputs.square().sum(), list(dnc.parameters()))

    for seed in range(3):
        assert_same_bits(gradients(seed), without(gradients, seed))
    assert engine().replays == 2 * 2
    assert any(shared)


@torch.no_grad()
def test_without_gradients(without: Callable[..., Any]) -> None:
    dnc = make(backend="triton_split")
    for seed in range(2):
        assert_same_bits(dnc(*draw(dnc, seed, 2)), without(dnc, *draw(dnc, seed, 2)))
    assert engine().replays == 1


@pytest.mark.parametrize("choice", [pytest.param({}, marks=pytest.mark.slow), dict(clip=0.3)], ids=str)
def test_one_launch_and_what_is_around_it(choice: dict[str, Any], without: Callable[..., Any]) -> None:
    dnc = make(backend="triton_sequence", **choice)
    options = lambda: dict(lengths=[2, 0, 1], reset=torch.rand(3, 2) < 0.3) if choice else {}  # noqa: E731
    assert_same_bits(train(dnc, 3, options, steps=2), without(train, dnc, 3, options, steps=2))
    assert (engine().captures, engine().replays) == (2, 2 * 2)
    assert cache().instances[0].is_free


@torch.no_grad()
def test_one_launch_without_gradients(without: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneLaunchSequence, "chunk", 2)
    dnc = make(backend="triton_sequence")
    for seed in range(3):
        assert_same_bits(dnc(*draw(dnc, seed, 3)), without(dnc, *draw(dnc, seed, 3)))
    assert engine().replays == 2
