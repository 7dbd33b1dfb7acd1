"""What the tests of the sequence operation share: problems, and how it is held against `dnc_reference.unroll`.

A problem starts from a memory in which no two slots are used equally, and the layer is time first, as the oracle is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from helpers import as_leaves, assert_close, assert_same_bits, random_like, random_problem, total
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from dnc_reference import DNCState, MemoryState, unroll
from dnc_reference.dnc import interface_step
from dnc_triton import DNC
from dnc_triton.sequence import pool

CONTROLLERS = ["lstm", "gru", "rnn", "feedforward"]
STEPS, BATCH = 5, 3
SIZES = dict(input_size=3, hidden_size=6, output_size=2, memory_size=5, word_size=4, num_reads=2)
# float64: sums in another order move the last digits only. What is exactly 0 in one may be an ulp of 1 in the other.
FORWARD, GRADIENT = dict(rtol=1e-12, atol=1e-15), dict(rtol=1e-10, atol=1e-12)

CHOICES: list[dict[str, Any]] = [  # one of each kind of controller, and each strength
    dict(num_layers=2, clip=0.1, max_activation_gradient=0.5),
    dict(strength="softplus"),
    dict(controller="gru", num_layers=2),
    dict(controller="rnn", clip=0.2),
    dict(controller="feedforward", num_layers=2),
]
NAMES = ["lstm", "softplus", "gru", "rnn", "feedforward"]

Run = Callable[..., tuple[Tensor, DNCState]]


def make(backend: str = "torch_sequence", **changes: Any) -> DNC:
    torch.manual_seed(0)
    dnc = DNC(**{**SIZES, "dtype": torch.float64, "batch_first": False, "backend": backend, **changes})
    with torch.no_grad():  # as torch initialises it the memory hardly matters: the gates all stand near one half
        dnc.interface.weight.mul_(4)
    return dnc


def draw(dnc: DNC, steps: int = STEPS, batch: int = BATCH, *, seed: int = 1) -> tuple[Tensor, DNCState]:
    """Inputs [T, B, I] and a state to start from. The same numbers, rounded, in every dtype."""
    weight = dnc.output.weight
    _, memory = random_problem(batch, dnc.memory_size, dnc.word_size, dnc.num_reads, dnc.num_writes, seed=seed)
    state = dnc.initial_state(batch)
    controller, words = random_like((state.controller, state.read_words), seed=seed)
    inputs = random_like(torch.empty(steps, batch, dnc.input_size, dtype=torch.float64), seed=seed + 1)
    return tree_map(lambda x: x.to(weight.dtype), (inputs, DNCState(controller, memory, words)))


def operation(dnc: DNC, inputs: Tensor, state: DNCState | None, **options: Any) -> tuple[Tensor, DNCState]:
    """The layer, which runs on the backend it was made with."""
    return dnc(inputs, state, **options)


def oracle(
    dnc: DNC, inputs: Tensor, state: DNCState | None, *, lengths: list[int] | None = None, reset: Tensor | None = None
) -> tuple[Tensor, DNCState]:
    """The same parameters, step by step, differentiated by autograd."""
    state = dnc.initial_state(inputs.shape[1]) if state is None else state
    return unroll(dnc, inputs, state, lengths=None if lengths is None else torch.tensor(lengths), reset=reset)


class Outcome(NamedTuple):
    """All that a run computes, forward and backward; each gradient under the name of what it is of."""

    outputs: Tensor
    state: DNCState
    gradients: dict[str, Tensor]


def outcome(
    run: Run, dnc: DNC, inputs: Tensor, given: DNCState | None, *, loss: Callable[..., Tensor] = total, **options: Any
) -> Outcome:
    inputs, given = as_leaves(inputs), None if given is None else as_leaves(given)
    outputs, state = run(dnc, inputs, given, **options)
    leaves = {"inputs": inputs, **dict(dnc.named_parameters())}
    if given is not None:
        leaves |= {"state" + keystr(path): leaf for path, leaf in tree_flatten_with_path(given)[0]}
    gradients = torch.autograd.grad(loss(outputs, state), list(leaves.values()), materialize_grads=True)
    return Outcome(outputs.detach(), state.detach(), dict(zip(leaves, gradients, strict=True)))


def assert_equal_outcomes(actual: Outcome, expected: Outcome) -> None:
    assert_close(actual[:2], expected[:2], **FORWARD)
    assert_close(actual.gradients, expected.gradients, **GRADIENT, name="gradient")


def assert_parity(dnc: DNC, inputs: Tensor, given: DNCState | None, **options: Any) -> Outcome:
    """Assert that the operation computes what the oracle does. Returns what that is."""
    expected = outcome(oracle, dnc, inputs, given, **options)
    assert_equal_outcomes(outcome(operation, dnc, inputs, given, **options), expected)
    return expected


def assert_parity_of_single_steps(backend: str, **options: Any) -> None:
    """Three steps by themselves, and one with a NaN in its inputs; what they are given stays as it is."""
    dnc, reference = (make(name, **options) for name in (backend, "reference"))
    inputs, state = draw(dnc)
    with torch.no_grad():
        for step in range(3):
            given = inputs[step].mT.contiguous().mT  # not contiguous
            before = tree_map(torch.clone, state)
            outputs, new_state = dnc.step(given, state)
            expected = reference.step(given, state)
            assert_same_bits(before, state)
            torch.testing.assert_close((outputs, new_state), expected, rtol=1e-11, atol=1e-13)
            state = new_state
        with torch.inference_mode():
            assert_same_bits(dnc.step(given, before), (outputs, new_state))
        given[1, 0] = torch.nan
        spoilt, of_spoilt = dnc.step(given, before)
    assert spoilt[1].isnan().all()
    assert of_spoilt.memory.memory[1].isnan().all()
    for row in (0, 2):
        assert_same_bits(spoilt[row], outputs[row])
        assert_same_bits(of_spoilt.memory.link[row], new_state.memory.link[row])


def least_gap(dnc: DNC, inputs: Tensor, given: DNCState) -> float:
    """The smallest difference between two usages of a row that are sorted on the way."""
    gaps = []

    def watched(*arguments: Any, **keywords: Any) -> tuple[Tensor, MemoryState]:
        read_words, memory = interface_step(*arguments, **keywords)
        gaps.append(memory.usage.sort(-1).values.diff().min().item())
        return read_words, memory

    unroll(dnc, inputs, given, interface_step=watched)
    return min(gaps)


def most_allocated(run: Callable[[], Any]) -> int:
    """The most bytes that a run has allocated at once; on the CPU, whose profiler counts them.

    It does not see what comes from `pool`, so nothing is taken from there.
    """
    with pytest.MonkeyPatch.context() as patch, torch.profiler.profile(profile_memory=True) as profile:
        patch.setattr(pool, "SMALLEST", sys.maxsize)
        results = run()
    del results
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
