"""What the tests compare with sees a difference: helpers.py, with values whose difference is known."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from helpers import (
    GOLDEN_NAMES,
    Golden,
    as_leaves,
    assert_close,
    assert_same_bits,
    columns_first,
    gradient_floor,
    has_no_gaps,
    load_golden,
    negated_when_read,
    random_interface,
    random_like,
    random_problem,
    replace_parameters,
    total,
)
from torch.utils._pytree import tree_leaves

ONE_OF_MANY = torch.zeros(100, dtype=torch.float64).index_fill(0, torch.tensor(3), 1)


@pytest.mark.parametrize(
    ("expected", "error", "limit"),
    [
        pytest.param(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 0.0, 1.0]), dict(rtol=0.5), id="rtol"),
        pytest.param(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), dict(atol=1.0), id="atol"),
        pytest.param(torch.tensor([4.0]), torch.tensor([-1.0]), dict(rtol=0.125, atol=0.5), id="their sum"),
        pytest.param(torch.ones(100), ONE_OF_MANY, dict(rtol=1.0), id="one element in many"),
        pytest.param(ONE_OF_MANY, torch.full((100,), 0.1), dict(rtol=1.0), id="all but where it is large"),
    ],
)
def test_close_is_within_the_limit(expected: torch.Tensor, error: torch.Tensor, limit: dict[str, float]) -> None:
    """An error of `error` is just allowed, whichever tensor of a nest has it; a little more is not."""
    expected, error = expected.double(), error.double()
    for place in range(3):
        wanted = [expected] * 3
        assert_close([x + 0.999 * error * (i == place) for i, x in enumerate(wanted)], wanted, **limit)
        with pytest.raises(AssertionError, match=rf"^nest\[{place}\]\[\d+\]: got .* elements off"):
            assert_close([x + 1.001 * error * (i == place) for i, x in enumerate(wanted)], wanted, **limit, name="nest")


@pytest.mark.parametrize("compare", [assert_close, assert_same_bits])
@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ((torch.zeros(2),), (torch.zeros(2), torch.zeros(2))),
        ((torch.zeros(2), None), (torch.zeros(2), torch.zeros(2))),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(0)),
        (torch.tensor([0.0, torch.nan]), torch.zeros(2)),
        (torch.tensor([0.0, torch.inf]), torch.zeros(2)),
        (torch.zeros(2), torch.tensor([0.0, torch.nan])),
        (torch.zeros(2), torch.tensor([0.0, torch.inf])),
    ],
    ids=["fewer", "none", "other names", "shape", "size", "nan", "infinite", "nan expected", "infinite expected"],
)
def test_what_is_never_equal(compare: Any, actual: Any, expected: Any) -> None:
    with pytest.raises((AssertionError, AttributeError)):  # None has no shape
        compare(actual, expected, **dict(rtol=0.5, atol=0.5) if compare is assert_close else {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_close_is_not_to_what_is_not_finite(value: float) -> None:
    """Nor within a limit that is not: an error of the reference, say, in a number that has overflowed."""
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(torch.tensor([value]), torch.tensor([value]), rtol=1.0)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(torch.zeros(1), torch.zeros(1), atol=value)


def test_the_same_bits() -> None:
    x = torch.tensor([1.0, torch.nan, -3.0])
    assert_same_bits([x, x], [x.clone(), x.clone()])
    for other in (x.nextafter(torch.zeros(3)), x.double(), -x):
        for pair in ([other, x], [x, other]):
            with pytest.raises(AssertionError, match=r"^nest\[[01]\]: "):
                assert_same_bits(pair, [x, x], name="nest")


# --- what is drawn, and sent back


def test_a_loss_sees_every_number() -> None:
    """Each has a gradient of its own."""
    nests = {"a": torch.zeros(3, 4), "b": [torch.zeros(5), torch.zeros(1)]}
    leaves = [x.requires_grad_() for x in tree_leaves(nests)]
    found = torch.cat([x.flatten() for x in torch.autograd.grad(total(nests["a"], nests["b"]), leaves)])
    assert len(found) == 18
    assert found.abs().min() > 1e-3
    assert (found[:, None] - found).abs().fill_diagonal_(1).min() > 1e-3


def test_no_two_numbers_are_drawn_alike() -> None:
    interface, state = random_problem(3, 7, 5, 2, 2)
    for tensor in tree_leaves((interface, state, random_like(state), random_interface(3, 5, 2))):
        drawn = tensor[tensor != 0]  # all but the diagonal of a link
        assert len(drawn) >= 0.8 * tensor.numel()
        assert len(drawn.unique()) == len(drawn)
    other = random_problem(3, 7, 5, 2, 2, seed=1)
    for x, y in zip(tree_leaves((interface, state)), tree_leaves(other), strict=True):
        assert not (x == y)[x != 0].any()
    for x, y in zip(tree_leaves(random_like(state)), tree_leaves(random_like(state, seed=1)), strict=True):
        assert not (x == y).any()


def test_other_orders_and_signs_in_memory() -> None:
    x = torch.randn(3, 4)
    turned, negated = columns_first(x), negated_when_read(x)
    assert turned.stride() == (1, 3)
    assert negated.is_neg()
    assert_same_bits([turned, negated], [x, x])
    leaf = as_leaves([negated])[0]
    assert_same_bits(leaf.detach(), x)
    assert leaf.requires_grad
    assert leaf.data_ptr() != negated.data_ptr()  # else what is written to one would be written to the other
    layer = torch.nn.Sequential(torch.nn.Linear(3, 4))
    before = copy.deepcopy(layer)
    replace_parameters(layer, lambda parameter: 2 * parameter)
    assert_same_bits(list(layer.parameters()), [2 * x.detach() for x in before.parameters()])


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(3, 4).mT, True),
        (torch.zeros(0, 4)[:, :2], True),
        (torch.zeros(3, 4)[:, 1:], False),
        (torch.zeros(3, 4)[::2], False),
        (torch.zeros(1, 4).expand(3, 4), False),
    ],
)
def test_gaps(tensor: torch.Tensor, expected: bool) -> None:
    assert has_no_gaps(tensor) is expected


def test_a_gradients_floor_is_some_roundings_of_its_terms() -> None:
    interface, state = random_problem(1, 7, 5, 2, dtype=torch.float32)
    ordinary = gradient_floor(interface, state)
    assert 4 * 2**-23 <= ordinary < 100 * 2**-23
    steep = gradient_floor(interface._replace(read_strengths=1000 * interface.read_strengths), state)
    assert 100 * ordinary < steep < 2000 * ordinary


# --- goldens

ORDINARY, NOT_FINITE = "memory_step_B2N16W8R2K1_usage01_s105", "memory_step_B2N8W4R1K1_saturated_s119"
FRESH = "dnc_cell_rollout_B2N24W6R2K2_fresh_clip20_s306"


def own(golden: Golden, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A file's own results."""
    differences = golden.meta["nonfinite_grad_keys"]
    keys = golden.meta["f32_self_diff"]
    return {key: (golden._differences(key) if key in differences else golden.tensor(key)).to(dtype) for key in keys}


def off(golden: Golden, key: str, dtype: torch.dtype) -> float:
    """What a file's tolerance is, by FORMAT.md and the comments in helpers.py."""
    if key.removeprefix("grad_") in golden.meta["grad_identically_zero_because_stopped"]:
        return 0.0
    gradient, largest = key.startswith("grad_"), own(golden, torch.float64)[key].abs().max().item()
    difference = 1e-6 if key in golden.meta["nonfinite_grad_keys"] else 0.0
    scale = max(largest, 1.0) if gradient else largest
    if dtype == torch.float64:
        return difference + (1e-9 if gradient else 1e-10) * largest + 2**-52 * scale
    return difference + 4 * golden.meta["f32_self_diff"][key][0] + 4 * 2**-23 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [ORDINARY, NOT_FINITE])
def test_goldens_hold_every_result_to_its_tolerance(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    results = own(golden, dtype)
    golden.check(results)
    for key, result in results.items():
        allowed = off(golden, key, dtype)
        # In float32 the tolerance is a few units in the last place, to which a change is rounded.
        for factor in (0.9, 1.1) if dtype == torch.float64 else (0.5, 2.0):
            changed = result.clone()
            changed.view(-1)[int(changed.abs().argmin())] += factor * allowed or (factor > 1) * 1e-30
            if factor < 1:
                golden.check({**results, key: changed})
                continue
            with pytest.raises(AssertionError, match=rf"1 of {len(results)} tensors:\n *{re.escape(key)}\b"):
                golden.check({**results, key: changed})
        with pytest.raises(AssertionError, match=f"not computed: {{'{key}'}}"):
            golden.check({other: x for other, x in results.items() if other != key})
        golden.check({other: x for other, x in results.items() if other != key}, without=(key,))


def test_goldens_pass_over_what_has_slots_only_where_their_order_is_open() -> None:
    for name in GOLDEN_NAMES:
        golden = load_golden(name)
        for dtype, safe in ((torch.float64, "slot_order_safe_f64"), (torch.float32, "slot_order_safe_f32")):
            kept, every = golden.results(dtype), set(golden.meta["f32_self_diff"])
            assert kept == every if golden.meta[safe] else kept < every
    golden = load_golden(FRESH)
    results = own(golden, torch.float64)
    for key in ("final_memory", "grad_init_link", "mid_allocation_weights", "traj_usage"):
        spoilt = {**results, key: 0 * results[key]}
        golden.check(spoilt)
        with pytest.raises(AssertionError, match=key):
            golden.check(spoilt, forced=True)
    for key in ("out_y", "loss", "final_hidden", "final_access_output", "grad_var.dnc.memory_access.read_keys.w"):
        with pytest.raises(AssertionError, match=key):
            golden.check({**results, key: results[key] + 1})
