"""The kernels row by row: the same bits each time, whatever stands in the other rows, and nothing for no rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from parity import Case, Outcome, Problem, draw, margins, outcome, pick_layout, run_kernels, run_reference
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dnc_reference import MemoryState
from dnc_triton.kernels import step_launch

each_layout = pytest.mark.parametrize("layout", ["fused", "split", pytest.param("spread", marks=pytest.mark.slow)])


quietly = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what the interpreter computes


def run(case: Case, problem: Problem, device: torch.device) -> Outcome:
    layout = pick_layout(case.layout, case.slots)
    with margins() as around:
        given = tree_map(lambda x: around.copy(x.to(device)), problem)
        return outcome(run_kernels, given, layout=layout, **case.options)


def rows(nest: Any, which: Any) -> Any:
    return tree_map(lambda x: x[which], nest)


def assert_finite(nest: Any) -> None:
    """What was never written would be NaN, and equal to itself."""
    assert all(tensor.isfinite().all() for tensor in tree_leaves(nest))


@each_layout
@pytest.mark.parametrize(("dtype", "interface"), [("float32", "oneplus"), ("bfloat16", "activated")])
def test_same_call_same_bits(dtype: str, interface: str, layout: str, device: torch.device) -> None:
    case = Case(2, 20, 5, 3, dtype, layout, interface)
    problem = draw(case)
    once = run(case, problem, device)
    assert_finite(once)
    assert_same_bits(run(case, problem, device), once)


@each_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_alone_is_the_row_in_a_batch(dtype: str, layout: str, device: torch.device) -> None:
    case = Case(3, 18, 5, 2, dtype, layout, "activated" if dtype == "float32" else "softplus")
    problem = draw(case)
    together = run(case, problem, device)
    assert_finite(together)
    for row in range(case.batch):
        one = slice(row, row + 1)
        assert_same_bits(run(case, rows(problem, one), device), rows(together, one), name=f"row {row}")
    backwards = torch.tensor([2, 1, 0])
    assert_same_bits(run(case, rows(problem, backwards), device), rows(together, backwards), name="rows turned round")


@quietly
@each_layout
@pytest.mark.parametrize(
    ("interface", "value"),
    [
        ("activated", torch.inf),
        ("oneplus", torch.nan),
        pytest.param("activated", torch.nan, marks=pytest.mark.slow),
        pytest.param("oneplus", torch.inf, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_nan_stays_in_its_row(interface: str, value: float, layout: str, device: torch.device) -> None:
    case = Case(3, 18, 3, 2, "float32", layout, interface)
    problem = draw(case)
    clean = run(case, problem, device)
    assert_finite(clean)
    for spoilt in (0, 1):  # rows on either side of the spoilt one
        inputs = tree_map(torch.clone, problem)
        for tensor in tree_leaves(inputs):
            tensor[spoilt] = value
        result = run(case, inputs, device)
        others = [row for row in range(case.batch) if row != spoilt]
        assert_same_bits(rows(result, others), rows(clean, others), name=f"beside row {spoilt}")


@quietly
@pytest.mark.parametrize(("dtype", "nan"), [("float32", torch.nan), ("float32", -torch.nan), ("float64", torch.nan)])
def test_a_nan_is_not_lost(dtype: str, nan: float, device: torch.device) -> None:
    """Whichever tensor it comes in by, what the oracle makes a NaN of comes out as one: no maximum swallows it."""
    case = Case(1, 5, 3, 2, dtype)
    problem = draw(case)
    leaves, structure = tree_flatten(problem[:2])
    # A row of the batch for each tensor that is spoilt, in its first element.
    batch = [[x.clone() for x in leaves] for _ in leaves]
    for index, row in enumerate(batch):
        row[index].flatten()[0] = nan
    inputs, state = tree_unflatten([torch.cat(same) for same in zip(*batch, strict=True)], structure)
    gradients = tree_map(lambda x: x.expand(len(leaves), *x.shape[1:]), problem.gradients)
    spoilt = Problem(inputs, state, gradients)
    result = run(case, spoilt, device)
    expected = outcome(run_reference, spoilt)
    for name, want in expected.forward.items():
        actual = result.forward[name].cpu()
        missing = want.isnan() & ~actual.isnan()
        assert not missing.any(), f"{name}: {missing.nonzero().tolist()}"
        clean = torch.tensor([not row.isnan().any() for row in want])
        assert actual[clean].isfinite().all(), f"{name}: in rows that the oracle leaves clean"


@each_layout
@pytest.mark.parametrize("interface", ["activated", "oneplus"])
def test_no_rows(interface: str, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched, so nothing is compiled either."""
    monkeypatch.setattr(step_launch, "launch_or_compile", None)
    case = Case(1, 5, 3, 2, "float32", layout, interface)
    problem = rows(draw(case), slice(0))
    result = run(case, problem, device)
    assert {tensor.shape[0] for tensor in tree_leaves(result)} == {0}
    shapes = {name: tuple(result.forward[name].shape) for name in MemoryState._fields}
    assert shapes == MemoryState.shapes(0, 5, 3, 2)
