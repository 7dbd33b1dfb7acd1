"""That parity.py sees mistakes: in what a step computes, beside a buffer, in what is not aligned. Without kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import parity
import pytest
import torch
from helpers import assert_same_bits
from parity import (
    Case,
    LaunchesInMargins,
    Margins,
    Outcome,
    Problem,
    assert_parity,
    draw,
    launches_in_margins,
    launches_of_aligned,
    margins,
    outcome,
    pairwise,
    pick_layout,
    rounded_to,
    run_reference,
    slot_order_is_safe,
)
from torch import Tensor

from dnc_reference import Interface, MemoryState, addressing
from dnc_triton.kernels import launcher, step_launch

# --- what error is allowed

NAMES = ["read_words", *MemoryState._fields, *(f"d_{name}" for name in (*Interface._fields, *MemoryState._fields))]


@cache
def exact(dtype: str, interface: str, stop: bool = False) -> tuple[Outcome, Problem, dict[str, Any]]:
    """What the oracle makes of a problem of that dtype, in float64."""
    case = Case(2, 7, 3, 2, dtype, interface=interface, stop_usage_gradient=stop)
    problem = draw(case)
    return outcome(run_reference, rounded_to(problem, torch.float64), **case.options), problem, case.options


def changed(result: Outcome, name: str, change: Callable[[Tensor], Tensor]) -> Outcome:
    return Outcome(*({key: change(x.clone()) if key == name else x for key, x in part.items()} for part in result))


def with_a_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


# By how much more than its largest number allows a result may be off before that is seen, at the most; a gradient is
# a sum of terms that may be as large as 1.
MOST = {"float64": (2e-13, 2e-12), "float32": (1.5e-6, 1.5e-5), "float16": (0.005, 0.005), "bfloat16": (0.05, 0.05)}


@pytest.mark.parametrize("dtype", MOST)
def test_a_mistake_is_seen_in_each_result(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN, or numbers that are off by far more than twice the reference's error: all of them, or a row's."""
    result, problem, options = exact(dtype, "activated")
    assert [*result.forward, *result.backward] == NAMES
    assert_parity(result, problem, **options)
    own = outcome(run_reference, problem, **options)
    monkeypatch.setattr(
        parity, "outcome", lambda _, given, **__: result if given.state.memory.dtype.itemsize == 8 else own
    )
    for name, before in zip(NAMES, [NAMES[-1], *NAMES], strict=False):
        largest = (result.forward | result.backward)[name].abs().max().item()
        error = MOST[dtype][0] * largest if name in result.forward else MOST[dtype][1] * max(largest, 1.0)
        for change in (with_a_nan, lambda x, by=error: torch.cat([x[:1], x[1:] + by])):
            wrong = changed(result, name, change)
            with pytest.raises(AssertionError, match=rf"^{name}\[[\d, ]+\]: got .* elements off"):
                assert_parity(wrong, problem, **options)
        with pytest.raises(AssertionError, match=f"^{name}"):
            assert_parity(wrong, problem, only=name, **options)
        assert_parity(wrong, problem, only=before, **options)


@pytest.mark.parametrize("interface", ["softplus", "oneplus"])
def test_the_oracle_is_asked_what_the_kernels_are(interface: str) -> None:
    """Another strength, or a gradient that is not stopped, is a mistake."""
    result, problem, options = exact("float64", interface, stop=True)
    assert options == dict(strength=interface, stop_usage_gradient=True)
    assert_parity(result, problem, **options)
    with pytest.raises(AssertionError, match=r"^read_words"):
        assert_parity(result, problem, strength={"softplus": "oneplus", "oneplus": "softplus"}[interface])
    with pytest.raises(AssertionError, match=r"^d_"):
        assert_parity(result, problem, strength=interface)
    with pytest.raises(AssertionError):  # a result that is missing
        assert_parity(Outcome(result.forward, {"d_memory": result.backward["d_memory"]}), problem, **options)


@pytest.mark.parametrize(
    ("reference", "ours", "floor", "times"),
    [("one", "one", 0.0, 2), ("all", "all", 0.0, 2), ("one", "all", 0.0, 2), ("none", "one", 0.5, 0.5)],
)
def test_what_is_allowed_is_twice_what_the_reference_makes(
    reference: str, ours: str, floor: float, times: float
) -> None:
    """Of the worst element, and of the RMS, which is the same for an error of 1 in one of 100 and one of 0.1 in all."""
    one = torch.zeros(100, dtype=torch.float64).index_fill(0, torch.tensor(3), 1.0)
    errors = {"one": one, "all": torch.full_like(one, 0.1), "none": 0 * one}
    want = torch.linspace(-1, 1, 100, dtype=torch.float64)
    for scale, expected in ((0.999, ""), (1.001, "x")):
        error = scale * times * errors[ours]
        assert parity._complaint("x", want + error, want, want + errors[reference], 0.0, floor)[:1] == expected


def test_an_infinite_error_of_the_reference_allows_nothing() -> None:
    want = torch.ones(3, dtype=torch.float64)
    assert "not finite" in parity._complaint("x", want, want, want * torch.inf, 0.0, 0.0)


# --- what is drawn


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_what_is_drawn(dtype: str) -> None:
    """Usages that are equal in each row, and no others whose order a rounding might change."""
    problem = draw(Case(3, 18, 3, 2, dtype))
    assert problem.state.memory.dtype == getattr(torch, dtype)
    usage, own = (run_reference(*rounded_to(problem[:2], x))[1].usage for x in (torch.float64, getattr(torch, dtype)))
    gaps = usage.sort(-1).values.diff()
    assert (gaps == 0).any(-1).all()
    assert gaps[gaps > 0].min() > {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-3}[dtype]
    assert_same_bits(addressing.sort_usage(own)[1], addressing.sort_usage(usage)[1])


def test_an_order_of_slots_that_is_open_is_told() -> None:
    problem = draw(Case(3, 5, 3, 2, "float32"), tie=False)
    still = dict(read_weights=torch.zeros(3, 2, 5), write_weights=torch.zeros(3, 1, 5))
    usage = torch.tensor([[0.5, 0.1, 0.9, 0.1, 0.3], [0.5, 0.1, 0.9, 0.1 + 1e-6, 0.3], [0.5, 0.1, 0.9, 0.2, 0.3]])
    state = problem.state._replace(usage=usage, **still)
    assert slot_order_is_safe(problem._replace(state=state), torch.float32).tolist() == [True, False, True]


def test_layouts_and_options_are_those_that_are_asked_for() -> None:
    fused, split, spread = (pick_layout(name, 18) for name in ("fused", "split", "spread"))
    assert (fused.fused, fused.spread) == (True, False)
    assert (split.fused, split.spread) == (False, False)
    assert (spread.fused, spread.spread, spread.ranks, spread.columns) == (False, True, True, 16)
    assert Case(1, 5, 3, 2, interface="softplus", stop_usage_gradient=True).options == {
        "strength": "softplus",
        "stop_usage_gradient": True,
    }


def test_pairs() -> None:
    factors = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (4, 5)}
    rows = pairwise(factors)
    assert len(rows) < 20  # of 36
    for first in factors:
        for second in factors:
            met = {(row[first], row[second]) for row in rows}
            assert len(met) == len(factors[first]) * (1 if first == second else len(factors[second]))


# --- what surrounds a buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
@pytest.mark.parametrize("place", [-1, 6, -64, 69])
def test_what_is_written_beside_a_tensor_is_seen(place: int, dtype: torch.dtype) -> None:
    around = Margins()
    tensors = [around.place((2, 3), dtype, torch.device("cpu")) for _ in range(3)]
    for tensor in tensors:
        assert tensor.isnan().all() if dtype.is_floating_point else (tensor.to(torch.int8) == -1).all()
        tensor.fill_(0)
    around.check()
    for tensor in tensors:
        beside = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())[Margins.SIZE + place]
        before = beside.clone()
        beside.fill_(0)
        with pytest.raises(AssertionError, match="beside a tensor"):
            around.check()
        beside.copy_(before)


@pytest.mark.parametrize("strides", ["contiguous", "expanded", "transposed", "gaps"])
def test_copies_lie_as_they_are_asked_to(strides: str) -> None:
    around, x = Margins(), torch.randn(1, 4, 5).expand(3, 4, 5)
    copy = around.copy(x, strides)
    assert_same_bits(copy, x)
    assert (
        copy.stride()
        == dict(contiguous=(20, 5, 1), expanded=(0, 5, 1), transposed=(1, 3, 12), gaps=(64, 16, 3))[strides]
    )
    whole = torch.empty(0).set_(copy.untyped_storage())
    elements = 20 if strides == "expanded" else 60
    assert (~whole.isnan()).sum() == elements
    assert len(whole) == 128 + (192 if strides == "gaps" else elements)


@pytest.mark.parametrize("name", ["step_forward", "step_backward"])
def test_buffers_of_launches_are_in_margins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are checked in the end for what has been written beside them."""

    def step(like: Tensor, by: int) -> list[Tensor]:
        results = [like.new_empty(3), torch.empty_like(like)]
        assert all(x.isnan().all() for x in results)
        for x in results:
            x.as_strided((3 + by,), (1,)).zero_()
        return results

    monkeypatch.setattr(step_launch, name, step)
    for by in (0, 1):
        around = margins()
        assert len(around.__enter__().buffers) == 0
        getattr(step_launch, name)(torch.zeros(3), by)
        if by == 0:
            around.__exit__(None, None, None)
        else:
            with pytest.raises(AssertionError, match="beside a tensor"):
                around.__exit__(None, None, None)
    assert getattr(step_launch, name) is step


class Kernel:
    """Stands in for a kernel: a function says what it does to its two tensors."""

    __name__ = "kernel"
    arg_names = ("first_ptr", "second_ptr")

    def __init__(self, function: Callable[[Tensor, Tensor], None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid == (2,)
        return self.function


LAUNCHING = sorted(
    name
    for name, module in sys.modules.items()
    if name.startswith("dnc_triton") and getattr(module, "launch_or_compile", None) and module is not launcher
)


@pytest.mark.parametrize("name", LAUNCHING)
def test_every_launch_is_in_margins(name: str) -> None:
    module: Any = sys.modules[name]
    x, y = torch.zeros(3), torch.zeros(4)

    def copying(first: Tensor, second_ptr: Tensor, *, at: int) -> None:
        second_ptr[:3] = first.as_strided((3,), (1,), first.storage_offset() + at)

    def beside(first: Tensor, second_ptr: Tensor, *, at: int) -> None:
        second_ptr.as_strided((1,), (1,), second_ptr.storage_offset() + at).zero_()

    with launches_in_margins() as around:
        assert isinstance(around, LaunchesInMargins)
        module.launch_or_compile(Kernel(copying), (2,), x + 1, second_ptr=y, at=0)
        assert y.tolist() == [1, 1, 1, 0]
        module.launch_or_compile(Kernel(copying), (2,), x + 1, second_ptr=y, at=1)
        assert y.isnan().tolist() == [False, False, True, False]
        assert around.seen == {"kernel"}
        for at in (-1, 4):
            with pytest.raises(AssertionError, match="kernel wrote beside a tensor"):
                module.launch_or_compile(Kernel(beside), (2,), x, second_ptr=y, at=at)
    assert module.launch_or_compile is launcher.launch_or_compile


@pytest.mark.parametrize("name", LAUNCHING)
def test_every_launch_of_what_is_not_aligned_is_seen(name: str) -> None:
    """Except those of a controller's step, whose kernels take tensors as they come."""
    module: Any = sys.modules[name]
    x, y = parity.beside_16_bytes(torch.ones(3)), torch.zeros(8)
    assert x.data_ptr() % 16 == 4
    assert_same_bits(x, torch.ones(3))
    if name.rsplit(".", 1)[1] in ("lstm", "products"):
        with launches_of_aligned():
            module.launch_or_compile(Kernel(lambda first, **_: first.fill_(2)), (2,), x, second_ptr=y)
        assert x.tolist() == [2, 2, 2]
        return
    with launches_of_aligned():
        module.launch_or_compile(Kernel(lambda first, second_ptr: first.copy_(second_ptr)), (2,), y + 2, second_ptr=y)
        for given in ((x, y), (y, x)):
            for named in (False, True):
                arguments = (given[0],) if named else given
                options = {"second_ptr": given[1]} if named else {}
                with pytest.raises(AssertionError, match="_ptr"):
                    module.launch_or_compile(Kernel(lambda *_, **__: None), (2,), *arguments, **options)
    assert module.launch_or_compile is launcher.launch_or_compile


def test_which_modules_launch() -> None:
    assert [name.rsplit(".", 1)[1] for name in LAUNCHING] == [
        "gradients",
        "lstm",
        "products",
        "step_launch",
        "one_launch",
    ]
