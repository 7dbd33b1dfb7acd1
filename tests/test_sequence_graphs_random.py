"""Random programs around layers by replayed graphs, with a stand-in for the device; on one they run in tests/gpu."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import assert_same_bits
from random_programs import ERRORS, Program
from replays import _empty, _without, engine, make  # noqa: F401

from dnc_triton import DNC, environment
from dnc_triton.sequence import graphs

CHOICES: list[dict[str, Any]] = [
    dict(),
    dict(controller="gru", num_layers=2, clip=0.3),
    dict(controller="feedforward", num_layers=2, checkpoint=2),
    dict(controller="rnn", max_activation_gradient=0.05, stop_usage_gradient=True),
]


def layers(seed: int) -> list[DNC]:
    return [make(memory_size=size, **CHOICES[(seed + size) % len(CHOICES)]) for size in (3, 4)]


@pytest.mark.parametrize("seed", range(4))
def test_random_programs(seed: int, without: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that are reached, captures that fail and streams that are captured make no difference either."""

    def disturb(number: int) -> None:
        if not graphs._graphs:
            return
        pick = random.Random(number)
        monkeypatch.setenv(environment.GRAPH_MEMORY, pick.choice(["1000", "1000", "1", "0"]))
        engine().failure = pick.choice([None, None, None, RuntimeError("no memory")])
        engine().is_ready = pick.random() < 0.8

    expected, actual = Program(seed, layers(seed), lambda number: None), Program(seed, layers(seed), disturb)
    without(expected.run, 300)
    assert not graphs._graphs
    actual.run(300)
    assert_same_bits(actual.record, expected.record)
    assert actual.errors == expected.errors
    assert engine().captures > 5
    assert engine().replays > 10


def test_what_happens_in_them(without: Any) -> None:
    """Hundreds of results, gradients that are None among them, and every error."""
    programs = [Program(seed, layers(seed), lambda number: None) for seed in range(3)]
    for program in programs:
        without(program.run, 300)
    results = [result for program in programs for result in program.record]
    assert len(results) > 3 * 100
    assert any(x.numel() == 0 for result in results for x in result)
    errors = {error.split(": ")[1] for program in programs for error in program.errors}
    assert errors == set(ERRORS)
