"""The kernels pass the check that the dispatcher makes before it takes them; what does not is in test_trial.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dnc_triton import dispatch, trial
from dnc_triton.problem import Problem
from dnc_triton.trial import Check

PROBLEM = Problem(
    device=torch.device("cpu"),
    dtype=torch.float32,
    batch=3,
    steps=5,
    memory_size=5,
    word_size=3,
    num_reads=2,
    num_writes=1,
    controller="lstm",
    needs_gradient=True,
    hidden_size=4,
    num_layers=1,
)
STEP = replace(PROBLEM, controller=None)
OWN = replace(PROBLEM, controller="custom")
# Words of a single number have the same cosine to every key: gradients with respect to keys are rounding.
SHORT = replace(STEP, memory_size=3, word_size=1, num_reads=1)


def candidates(problem: Problem) -> list[Any]:
    """All that has kernels."""
    operation = trial.tried_as(problem)
    serving = [backend for backend in dispatch.BACKENDS.values() if backend.supports(problem)[0]]
    return [getattr(backend.with_layout(x), operation) for backend in serving for x in backend.layouts(problem)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", [PROBLEM, STEP, OWN, SHORT], ids=["sequence", "step", "own", "short words"])
def test_the_kernels_pass(problem: Problem, dtype: torch.dtype) -> None:
    """And far from what is wrong: another compiler, or another GPU, rounds otherwise."""
    check, found = Check(replace(problem, dtype=dtype)), candidates(replace(problem, dtype=dtype))
    far = 10 if dtype == torch.float32 else 3
    check.expected.allowed = {name: allowed / far for name, allowed in check.expected.allowed.items()}
    for operation in found:
        assert check.expected.compare(operation) is None
    assert len(found) == 3 + (problem is PROBLEM and dtype == torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [130, 300])
def test_kernels_that_spread_and_rank_pass(slots: int) -> None:
    problem = replace(STEP, memory_size=slots, num_reads=5, batch=1)
    check, found = Check(problem), candidates(problem)
    for operation in found:
        check(operation)
    assert len(found) >= 4
