"""The kernels of a step in a replayed graph, with a stand-in for the device; and those that need no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from test_sequence_graphs import _empty, cache, draw, engine, make, train, without  # noqa: F401

from dnc_triton.sequence import graphs


@pytest.mark.parametrize(("backend", "choice"), [("triton_fused", {}), ("triton_split", dict(clip=0.3, checkpoint=2))])
def test_trainings_are_the_same(backend: str, choice: dict[str, Any], without: Callable[..., Any]) -> None:  # noqa: F811
    dnc = make(backend=backend, **choice)
    options = lambda: dict(lengths=[3, 0, 2], reset=torch.rand(3, 3) < 0.3)  # noqa: E731
    assert_same_bits(train(dnc, 2, options, steps=3), without(train, dnc, 2, options, steps=3))
    assert engine().replays == 2
    assert cache().instances[0].is_free


@torch.no_grad()
def test_without_gradients(without: Callable[..., Any]) -> None:  # noqa: F811
    dnc = make(backend="triton_split")
    for seed in range(2):
        assert_same_bits(dnc(*draw(dnc, seed, 2)), without(dnc, *draw(dnc, seed, 2)))
    assert engine().replays == 1


def test_one_launch_needs_no_graph() -> None:
    train(make(backend="triton_sequence"), 2, steps=1)
    assert not graphs._graphs
