"""Random problems: some of them here, a million with `python -m tests.fuzz`. And that it would see a mistake."""

from __future__ import annotations

import re
from typing import Any

import fuzz
import pytest
import torch
from batched import Pointer, Value, batched_interpreter
from helpers import assert_close, assert_same_bits
from parity import Case, draw, outcome, pick_layout, run_kernels

from dnc_reference import memory_step


def test_random_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.run(8192, seed=1, engine="batched") == 8192
    assert "8,192 problems, batched, seed 1: all right" in capsys.readouterr().out


def test_random_problems_in_tritons_interpreter() -> None:
    assert fuzz.run(24, seed=2, rows=2, engine="interpreter", report=lambda line: None) == 24


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
    keys = torch.cat([(interface.write_keys == 0).all(-1).flatten() for interface, _ in activated])
    assert 0.05 < keys.double().mean() < 0.4
    assert max(interface.write_strengths.max() for interface, _ in activated) > 100


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
    layout = pick_layout(case.layout, case.slots, case.word)
    expected = outcome(run_kernels, problem, layout=layout, **case.options)
    with batched_interpreter():
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
