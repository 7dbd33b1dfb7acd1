"""Random problems: some of them here, a million with `python -m tests.fuzz`; and that a mistake would be seen."""

from __future__ import annotations

import re
from typing import Any

import fuzz
import fuzz_layer
import pytest
import torch
from batched import Kernel, Language, Pointer, Value, batched_interpreter
from helpers import assert_close, assert_same_bits
from parity import Case, Outcome, draw, outcome, pick_layout, rounded_to, run_kernels, run_reference, split_vector
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dnc_reference import memory_step
from dnc_reference.interface import interface_sizes
from dnc_triton.kernels import step_launch


def test_random_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.run(8192, seed=1, engine="batched") == 8192
    assert "8,192 problems, batched, seed 1: all right" in capsys.readouterr().out


def test_random_problems_in_tritons_interpreter() -> None:
    assert fuzz.run(24, seed=2, rows=2, engine="interpreter", report=lambda line: None) == 24


@pytest.mark.parametrize("backend", fuzz_layer.KERNELS)
def test_random_calls_of_the_layer(backend: str) -> None:
    fuzz_layer.run(5, backend, seed=2)


def test_what_is_drawn() -> None:
    _, problem = fuzz.draw_batch(3, 5, 300)
    assert_same_bits(fuzz.draw_batch(3, 5, 300)[1], problem)
    seen = [fuzz.draw_batch(3, index, 60) for index in range(40)]
    batches = [batch for batch, _ in seen]
    assert {batch.dtype for batch in batches} == {torch.float64, torch.float32}
    assert len({batch.slots for batch in batches}) > 8
    assert {(batch.raw, batch.layout.fused) for batch in batches} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert any(batch.slots > batch.layout.rows for batch in batches)
    for options in (dict(stop_usage_gradient=True), dict(strength="softplus"), dict(strength="oneplus", raw=True)):
        assert 3 < sum(batch._replace(**options) == batch for batch in batches) < 35, options
    layouts = {batch.layout for batch in batches}
    for fused in (True, False):
        assert any(layout.fused == fused and layout.backward_rows for layout in layouts)
    for spread, ranks in [(False, False), (False, True), (True, False), (True, True)]:
        assert any((layout.spread, layout.ranks) == (spread, ranks) for layout in layouts)
    assert len({problem.gradients[1].usage[-1, -1].item() for _, problem in seen} - {0.0}) > 0.7 * len(seen)

    activated = [(problem.inputs, problem.state) for batch, problem in seen if not batch.raw and batch.slots > 1]
    for name in ("free_gates", "allocation_gates", "write_gates", "erase_vectors"):
        gates = torch.cat([getattr(interface, name).flatten() for interface, _ in activated])
        shares = [
            (gates == 0).double().mean(),
            (gates == 1).double().mean(),
            ((gates > 0) & (gates < 1)).double().mean(),
        ]
        assert min(shares) > 0.1, name
    ties = [memory_step(interface, state)[1].usage.sort(-1).values.diff() == 0 for interface, state in activated]
    assert 0.1 < torch.cat([row.any(-1) for row in ties]).double().mean() < 0.6
    usages = [memory_step(interface, state)[1].usage.sort(-1).values for interface, state in activated]
    assert some([((x.diff() == 0) & (x[:, 1:] > 0.01) & (x[:, 1:] < 0.99)).any(-1) for x in usages])
    keys = torch.cat([(interface.write_keys == 0).all(-1).flatten() for interface, _ in activated])
    assert 0.05 < keys.double().mean() < 0.4
    assert max(interface.write_strengths.max() for interface, _ in activated) > 100
    same = [(state.memory == interface.write_keys).all(-1).any(-1) for interface, state in activated]
    assert some([x & interface.write_keys.any(-1)[:, 0] for x, (interface, _) in zip(same, activated, strict=True)])
    assert some([(interface.read_modes == 1).any(-1).all(-1) for interface, _ in activated])

    states = [problem.state for _, problem in seen]
    assert some([torch.stack([(x == 0).flatten(1).all(-1) for x in state]).all(0) for state in states])
    assert some([state.memory.abs().amax((1, 2)) > 20 for state in states])
    assert some([(state.memory.abs().amax((1, 2)) < 0.01) & (state.memory != 0).any(-1).any(-1) for state in states])
    assert some([(state.precedence == 1).any(-1) for state in states if state.usage.shape[1] > 1])
    for index in range(7):
        assert some([(tree_leaves(problem.gradients)[index] == 0).flatten(1).all(-1) for _, problem in seen])

    vectors = [problem for batch, problem in seen if batch.raw]
    fields = [dict(zip(SIZES, split_vector(x.inputs, x.state), strict=True)) for x in vectors]
    for name in ("erase_vectors", "free_gates", "allocation_gates", "write_gates", "read_modes"):
        assert some([field[name].abs().amax(-1) > 100 for field in fields]), name
    for name in ("read_strengths", "write_strengths"):
        assert some([field[name].abs().amax(-1) > 12 for field in fields]), name


SIZES = list(interface_sizes(1, 1, 1))


def some(rows: list[Tensor]) -> bool:
    """Whether it is so in some rows, and not in most."""
    return 0.01 < torch.cat([row.flatten() for row in rows]).double().mean() < 0.5


# --- what is compared


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_result_of_every_row_is_compared(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    index = next(index for index in range(20) if fuzz.draw_batch(3, index, 4)[0].dtype == dtype)
    batch, problem = fuzz.draw_batch(3, index, 4)
    options = dict(strength=batch.strength, stop_usage_gradient=batch.stop_usage_gradient)
    right = outcome(run_reference, problem, **options)
    assert fuzz.compare(batch, problem, right) is None
    theirs = {x: outcome(run_reference, rounded_to(problem, x), **options) for x in (torch.float64, torch.float32)}
    monkeypatch.setattr(fuzz, "outcome", lambda _, given, **__: theirs[given.state.memory.dtype])
    for part in right:
        for name, result in part.items():
            for row, value in ((0, 1e6), (3, torch.nan)):
                part[name] = result.clone()
                part[name][row].view(-1)[-1] = value
                mismatch = fuzz.compare(batch, problem, right)
                assert mismatch is not None
                assert mismatch.row == row
                assert mismatch.text.startswith(f"{name}[")
            part[name] = result[:, :0]
            mismatch = fuzz.compare(batch, problem, right)
            assert mismatch is not None
            assert mismatch.text.startswith(f"{name}: expected shape")
            part[name] = result


def test_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per row, at its largest number: twice the error in the same dtype, plus 16 ulps times a condition."""
    want, error = torch.tensor([[0.5, 0.1], [4.0, -2.0]]).double(), torch.tensor([[0.0, 1e-3], [1e-2, 0.0]]).double()
    exact, theirs = Outcome({"x": want}, {"d_x": want}), Outcome({"x": want + error}, {"d_x": want - error})
    monkeypatch.setattr(fuzz, "outcome", lambda _, given, **__: exact if given.dtype == torch.float64 else theirs)
    monkeypatch.setattr(fuzz, "_condition", lambda *_: (torch.tensor([100.0, 1.0]), torch.tensor([1.0, 50.0])))
    ulp = 2**-23
    limits = {"x": [1600 * ulp + 2e-3, 16 * ulp * 4 + 2e-2], "d_x": [1600 * ulp + 2e-3, 16 * 50 * ulp * 4 + 2e-2]}
    batch = fuzz.draw_batch(0, 0, 1)[0]._replace(dtype=torch.float32)
    for name, rows in limits.items():
        for row, limit in enumerate(rows):
            for factor, expected in ((0.999, None), (1.001, row)):
                ours = [{key: x.clone() for key, x in part.items()} for part in exact]
                ours[name == "d_x"][name][row, 1] += factor * limit
                mismatch = fuzz.compare(batch, torch.zeros(1), Outcome(*ours))
                assert (mismatch and mismatch.row) == expected
    theirs.forward["x"][1, 0] = torch.inf  # allows nothing
    ours = Outcome({"x": want + torch.tensor([[0.0], [1e-4]])}, exact.backward)
    assert fuzz.compare(batch, torch.zeros(1), ours)


def test_an_ordinary_row_is_well_conditioned() -> None:
    problem = draw(Case(4, 7, 3, 2, "float64"))
    batch = fuzz.draw_batch(0, 0, 1)[0]._replace(dtype=torch.float64, strength="oneplus")
    lookup, gradient = fuzz._condition(batch, problem, outcome(run_reference, problem))
    assert 1 < lookup.min() < lookup.max() < 40
    assert 1 < gradient.min() < gradient.max() < 600


def test_as_many_problems_as_asked_for_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def check(index: int, *, rows: int, **_: Any) -> tuple[int, str]:
        asked.append(index)
        return rows, "" if index < 3 else "wrong"

    monkeypatch.setattr(fuzz, "check_batch", check)
    assert fuzz.run(150, rows=64, report=lambda line: None) == 192
    assert asked == [0, 1, 2]
    with pytest.raises(AssertionError, match=r"after 192 problems that are right:\nwrong"):
        fuzz.run(193, rows=64, report=lambda line: None)


@pytest.mark.parametrize("error", ["gradient", "nan"])
def test_a_mistake_ends_it_and_can_be_repeated(
    error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(*args: Any, **kwargs: Any) -> Any:
        read_words, state = run_kernels(*args, **kwargs)
        if error == "nan":
            state.usage.data[:, -1] = torch.nan
        if error == "gradient":
            read_words.register_hook(lambda gradient: torch.where(gradient > 1, gradient * (1 + 1e-3), gradient))
        return read_words, state

    monkeypatch.setattr(fuzz, "run_kernels", mistaken)
    assert fuzz.main(["--count", "2000", "--seed", "3", "--rows", "100"]) == 1
    told = capsys.readouterr().out
    name = "usage" if error == "nan" else "d_"
    assert re.search(rf"^after [\d,]+ problems that are right:\n{name}.*got .*, expected .*, off by", told), told
    command = re.search(r"^again: python -m tests.fuzz (.*)$", told, re.MULTILINE)
    assert command, told
    assert fuzz.main(command[1].split()) == 1
    repeated = capsys.readouterr().out
    assert repeated.splitlines()[0].split(":")[0] == told.splitlines()[1].split(":")[0]
    monkeypatch.undo()
    assert fuzz.main(command[1].split()) == 0


# --- the interpreter for whole batches


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 5, 3, 2, "float64", "fused", "softplus"),
        Case(2, 40, 3, 1, "float64", "split", "activated"),
        Case(1, 33, 17, 3, "float32", "spread", "oneplus", stop_usage_gradient=True),
        Case(2, 1, 1, 1, "bfloat16", "fused", "oneplus"),
    ],
    ids=str,
)
def test_batched_is_as_tritons(case: Case) -> None:
    problem = draw(case)
    layout = pick_layout(case.layout, case.slots)
    expected = outcome(run_kernels, problem, layout=layout, **case.options)
    with batched_interpreter():
        assert isinstance(step_launch.step_forward_kernel, Kernel)
        assert isinstance(step_launch.step_backward_kernel, Kernel)
        actual = outcome(run_kernels, problem, layout=layout, **case.options)
    ulp = torch.finfo(getattr(torch, case.dtype)).eps
    assert_close(actual, expected, rtol=16 * ulp, atol=16 * ulp, name="")


@pytest.mark.parametrize("offset", [-1, 3])
def test_batched_stays_inside(offset: int) -> None:
    """Elements −1 and 0, or 3 and 4, of a tensor of 4: one is there, the other is not."""
    pointer = Pointer(torch.zeros(2, 2)) + Value(torch.arange(2)) + offset
    there = torch.tensor([offset == 3, offset == -1])
    assert (pointer.places(there) - torch.where(there, offset + torch.arange(2), 0) == 0).all()
    for mask in (None, ~there, torch.ones(2, dtype=torch.bool)):
        with pytest.raises(IndexError, match="of a tensor of 4"):
            pointer.places(mask)


def test_batched_makes_a_nan_of_what_a_mask_keeps_out_and_loses_it_in_a_maximum() -> None:
    tensor, mask = torch.arange(3.0), Value(torch.tensor([[True, False, True]]))
    loaded = Language.load(Pointer(tensor) + Value(torch.arange(3).unsqueeze(0)), mask)
    assert loaded.data.isnan().tolist() == [[False, True, False]]
    assert Language.maximum(loaded, 1.0).data.tolist() == [[1, 1, 2]]
    assert Language.max(loaded, 0).data.tolist() == [2]
    assert Language.sum(loaded, 0).data.isnan().all()
    with pytest.raises(IndexError, match="of a tensor of 3"):
        Language.store(Pointer(tensor) + Value(torch.arange(1, 4).unsqueeze(0)), loaded)
    Language.store(Pointer(tensor) + Value(torch.arange(1, 4).unsqueeze(0)), loaded, Value(mask.data.roll(1)))
    assert tensor.tolist()[1] == 0
    assert tensor[2].isnan()
