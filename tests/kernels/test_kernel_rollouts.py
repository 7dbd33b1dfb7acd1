"""Fifty steps in float32, a layer in bfloat16, and PyTorch's own sequence on the device, against the float64 oracle.

All start from a memory in which no two slots are used equally, and nowhere on the way are two used so equally that a
rounding could change their order.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close
from sequence_parity import least_gap
from test_kernel_layer import CLOSE, INPUTS, each_backend, start
from test_kernel_sequence import draw, make, run
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dnc_triton import DNC, DNCState, use_backend

Problem = tuple[DNC, Tensor, DNCState]


def problem(device: torch.device, sizes: tuple[int, int, int], steps: int, seed: int) -> Problem:
    """With one row: the fewer usages there are, the farther apart they are."""
    dnc = make(device, hidden=32, sizes=sizes)
    drawn = torch.randn(1, steps, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dnc, drawn.to(device), start(dnc, 1)


def rounded(dnc: DNC, inputs: Tensor, state: DNCState, dtype: torch.dtype) -> Problem:
    """The same numbers in another dtype; inputs and state are leaves."""
    inputs, state = tree_map(lambda x: x.detach().to(dtype).requires_grad_(), (inputs, state))
    return copy.deepcopy(dnc).to(dtype), inputs, state


def gap(dnc: DNC, inputs: Tensor, state: DNCState) -> float:
    with torch.no_grad():
        return least_gap(dnc, inputs.transpose(0, 1), state)


def assert_as_good(given: Problem, backend: str, dtype: torch.dtype, *, least: float) -> None:
    """Outputs, final state and gradients at most twice as far from the oracle as the reference in that dtype."""
    dnc, inputs, state = rounded(*given, dtype)
    exact = rounded(dnc, inputs, state, torch.float64)
    assert gap(*exact) > least, "a rounding may change the order of slots"
    expected = run(*exact, "reference")
    theirs, ours = (run(dnc, inputs, state, name) for name in ("reference", backend))
    ulp = torch.finfo(dtype).eps
    for name, values in expected.items():
        for want, other, actual in zip(*map(tree_leaves, (values, theirs[name], ours[name])), strict=True):
            floor = 8 * ulp * max(want.abs().max().item(), 0.0 if name in ("outputs", "final") else 1.0)
            assert actual.dtype == dtype
            assert_close(actual, want, atol=2 * (other - want).abs().max().item() + floor, name=name)


# The seeds are those of some dozens for which usages stay farthest apart.
@pytest.mark.slow  # in the interpreter
@pytest.mark.parametrize(("sizes", "seed"), [((16, 16, 4), 4), ((24, 12, 2), 11)], ids=str)
@each_backend
def test_fifty_steps(backend: str, sizes: tuple[int, int, int], seed: int, device: torch.device) -> None:
    assert_as_good(problem(device, sizes, 50, seed), backend, torch.float32, least=5e-6)


@pytest.mark.parametrize("backend", ["triton_fused", "triton_split"])
def test_a_layer_in_bfloat16(backend: str, device: torch.device) -> None:
    dnc, inputs, state = problem(device, (5, 16, 2), 2, 26)
    usage = state.memory.usage.new_tensor([[0.1, 0.7, 0.3, 0.9, 0.5]])
    state = state._replace(memory=state.memory._replace(usage=usage))
    assert_as_good((dnc, inputs, state), backend, torch.bfloat16, least=0.04)


@pytest.mark.parametrize("controller", ["lstm", "gru"])
def test_torch_sequence(controller: str, device: torch.device) -> None:
    """Rows that end early, or never run, and rows that begin anew."""
    dnc = make(device, sizes=(16, 8, 2), controller=controller, num_layers=2, clip=0.4)
    inputs, state = draw(dnc, 6, batch=3)
    reset = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool, device=device)
    call: dict[str, Any] = {"lengths": [6, 0, 4], "reset": reset}
    assert_close(
        run(dnc, inputs, state, "torch_sequence", **call),
        run(dnc, inputs, state, "reference", **call),
        **CLOSE,
        name="",
    )


@torch.no_grad()
def test_torch_sequence_step_by_step(device: torch.device) -> None:
    """On a GPU the first is launched, the others are replayed."""
    dnc = make(device, sizes=(16, 8, 2), num_layers=2)
    inputs, state = draw(dnc, 6, batch=3)
    outputs = []
    with use_backend("torch_sequence"):
        expected = dnc(inputs, state)
        for given in inputs.unbind(1):
            output, state = dnc.step(given, state)
            outputs.append(output)
    assert_close((torch.stack(outputs, 1), state), expected, **CLOSE, name="")
