"""The dispatcher by measurement: what it takes, what it settles, what it measures at all. With a device of straw."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from straw import PROBLEM, Clock, StrawCheck, _a_gpu_of_straw, _clock  # noqa: F401

import dnc_reference
from dnc_reference import DNCCell
from dnc_triton import dispatch, tuning
from dnc_triton.kernels.layout import Layout, default_layout, layouts, sequence_layouts
from dnc_triton.ops.kernel_step import kernel_interface_step
from dnc_triton.problem import Problem
from dnc_triton.sequence import unroll
from dnc_triton.sequence.settings import SequenceSettings
from dnc_triton.trial import WrongResult

# --- through the dispatcher


def fake_times(microseconds: Callable[[Layout | None], float]) -> Callable[[Problem, partial], float]:
    """A clock that looks at the layout of what it measures, µs per step."""

    def measure(problem: Problem, run: partial) -> float:
        layout = getattr(run.args[0], "keywords", {}).get("layout")
        return microseconds(layout) * tuning._measured_steps(problem)

    return measure


def test_the_dispatcher_takes_the_fastest_with_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = layouts(16)[-1]
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 5.0 if layout == wanted else 50.0))
    chosen = dispatch.choose(PROBLEM)
    assert chosen.unroll.keywords["layout"] == wanted
    assert chosen.memory_step.keywords["layout"] == wanted
    lines = dispatch.explain_problem(PROBLEM).splitlines()
    (starred,) = [line for line in lines if line.startswith("*")]
    assert "triton_split" in starred
    assert f"{wanted.describe()}: 5.0 µs" in starred
    assert sum("50.0 µs" in line for line in lines) == 4


def test_explain_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(operation: partial) -> None:
        if operation.keywords["layout"].fused:
            raise WrongResult("wrong results: link off by 0.5")

    monkeypatch.setattr(tuning, "_check", lambda problem: StrawCheck(check))
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 5.0))
    dispatch.choose(PROBLEM)
    lines = dispatch.explain_problem(PROBLEM).splitlines()
    (fused,) = [line for line in lines if line.strip().startswith("triton_fused")]
    wrong = "failed: wrong results: link off by 0.5"
    assert fused.endswith(f"; measured per step: 16×16, 4 warps: {wrong}; 16×16, 1 warp: {wrong}")
    (split,) = [line for line in lines if "triton_split" in line]
    assert split.startswith("*")
    assert split.endswith(": 5.0 µs")
    with pytest.raises(
        RuntimeError, match=f"nothing that is asked for works .* triton_fused 16×16, 4 warps: {wrong[8:]}"
    ):
        dispatch.choose(PROBLEM, "triton_fused")
    *lines, last = dispatch.explain_problem(PROBLEM, "triton_fused").splitlines()
    assert last == "nothing runs: the backend asked for by name failed on this device, and the call would raise"
    assert not any(line.startswith("*") for line in lines)


def test_explain_is_a_line_for_each_however_long_an_error_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton quotes a kernel, then says what is wrong."""
    (only,) = dispatch.BACKENDS["triton_split"].layouts(PROBLEM)

    def measure(problem: Problem, run: partial) -> float:
        from triton.compiler.errors import CompilationError

        if getattr(run.args[0], "keywords", {}).get("layout") == only:
            inner = CompilationError("one\ntwo", ast.parse("x").body[0], "no such thing")
            raise CompilationError("one\ntwo", ast.parse("x").body[0], None) from inner  # as for a function in a kernel
        return 5.0

    monkeypatch.setattr(tuning, "_measure", measure)
    dispatch.choose(PROBLEM)
    with pytest.raises(RuntimeError, match="no such thing"):
        dispatch.choose(PROBLEM, "triton_split")
    lines = dispatch.explain_problem(PROBLEM).splitlines()
    assert len(lines) == 2 + len(dispatch.BACKENDS)
    (split,) = [line for line in lines if "triton_split" in line]
    assert split.endswith(": failed: no such thing")


def test_a_backend_with_one_layout_is_checked_and_measured_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As any other: else it would run where it is wrong."""
    (only,) = dispatch.BACKENDS["triton_split"].layouts(PROBLEM)
    refuse(monkeypatch)
    chosen = dispatch.choose(PROBLEM, "triton_split")
    assert chosen.unroll.keywords["layout"] == only
    assert tuning.remembered(PROBLEM) == {("triton_split", only): 50.0}
    assert dispatch.choose(PROBLEM, "triton_split") is chosen, "it is settled"
    refuse(monkeypatch, only)
    with pytest.raises(tuning.NothingWorks, match=r"triton_split 8×16, 1 warp: wrong results: link off by 0\.5"):
        dispatch.choose(replace(PROBLEM, batch=60), "triton_split")


def test_the_dispatcher_may_find_plain_pytorch_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 50.0 if layout else 5.0))
    assert dispatch.choose(PROBLEM) is dispatch.BACKENDS["torch_sequence"]


@pytest.mark.parametrize(
    ("slots", "hidden", "name"),
    [
        (16, 20, "triton_sequence"),
        (32, 64, "triton_sequence"),
        (32, 65, "triton_fused"),
        (64, 20, "triton_fused"),
        (100, 20, "triton_split"),
    ],
)
def test_without_measuring_the_default_is_taken(
    slots: int, hidden: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    problem = replace(PROBLEM, memory_size=slots, hidden_size=hidden)
    default = sequence_layouts(slots, 8)[0] if name == "triton_sequence" else default_layout(slots)
    assert dispatch.choose(problem).unroll.keywords["layout"] == default
    assert f"* {name}" in dispatch.explain_problem(problem)


def test_a_controller_of_ones_own_is_measured_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels that activate its interface."""
    measured = []

    def measure(problem: Problem, run: partial) -> float:
        measured.append(run.args[0])
        return 5.0

    monkeypatch.setattr(tuning, "_measure", measure)
    chosen = dispatch.choose(replace(PROBLEM, controller="custom"))
    step = chosen.unroll.keywords["interface_step"]
    assert (step.func, step.keywords) in [(x.func, x.keywords) for x in measured[:-1]]
    assert {x.func for x in measured[:-1]} == {kernel_interface_step}
    assert measured[-1] is dnc_reference.interface_step


def test_deterministic_algorithms_leave_nothing_to_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a measurement nor the memory of one decides, and a row gets the same layout in every batch."""
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 50.0 if layout else 5.0))
    assert dispatch.choose(PROBLEM) is dispatch.BACKENDS["torch_sequence"]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for batch in (1, 12, 500):
        chosen = dispatch.choose(replace(PROBLEM, batch=batch))
        assert chosen.unroll.keywords["layout"] == sequence_layouts(16, 8)[0]


def refuse(monkeypatch: pytest.MonkeyPatch, *wrong: Layout) -> None:
    """Let some layouts fail the check, and a sequence in one launch be the fastest of the rest."""

    def check(operation: partial) -> None:
        if operation.keywords["layout"] in wrong:
            raise WrongResult("wrong results: link off by 0.5")

    monkeypatch.setattr(tuning, "_check", lambda problem: StrawCheck(check))
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda x: 5.0 if x and x.whole_sequence else 50.0))


def test_deterministic_algorithms_do_not_take_what_is_known_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PROBLEM, memory_size=40)
    refuse(monkeypatch, *layouts(40))
    dispatch.choose(problem)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert dispatch.choose(problem).unroll.keywords["layout"].whole_sequence
    assert "* triton_sequence" in dispatch.explain_problem(problem)
    with pytest.raises(RuntimeError, match=r"^backend 'triton_fused', asked for by the argument backend: nothing that"):
        dispatch.choose(problem, "triton_fused")


@pytest.mark.parametrize("how", ["auto", "triton_sequence", "deterministic"])
@pytest.mark.parametrize("failing", range(len(layouts(16)) + 1))
def test_a_sequence_does_not_hand_over_to_what_is_known_to_fail(
    failing: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a call that keeps only some of the steps. One that keeps all needs nothing else to work."""
    ran: list[Layout] = []

    def run(settings: SequenceSettings, inputs: torch.Tensor, carried: list[torch.Tensor], *_: object) -> tuple:
        ran.append(settings.layout)
        return inputs, *carried

    monkeypatch.setattr(unroll, "run_sequence", run)
    refuse(monkeypatch, *layouts(16)[:failing])
    chosen = dispatch.choose(PROBLEM)
    if how == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if how != "auto":
        chosen = dispatch.choose(PROBLEM, "triton_sequence" if how == "triton_sequence" else "auto")
    cell = DNCCell(3, 4, 20, memory_size=16, word_size=8, num_reads=2, controller="lstm")
    call = partial(chosen.unroll, cell, torch.randn(6, 2, 3), cell.initial_state(2))
    call(checkpoint=1)
    assert ran.pop().whole_sequence
    if failing == len(layouts(16)):
        with pytest.raises(RuntimeError, match="nothing that is asked for works"):
            call(checkpoint=2)
    else:
        call(checkpoint=2)
        assert ran.pop() == layouts(16)[failing]


def test_plain_pytorch_by_name_asks_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to measure, and nothing that could be known of it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked"))
    for name in ("reference", "torch_sequence"):
        assert dispatch.choose(PROBLEM, name) is dispatch.BACKENDS[name]


def test_what_is_settled_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 50.0 if layout else 5.0))
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    default = dispatch.choose(PROBLEM)
    monkeypatch.setenv("DNC_TRITON_MEASURE", "1")
    fastest = dispatch.choose(PROBLEM)
    assert (default.unroll.keywords["layout"], fastest) == (
        sequence_layouts(16, 8)[0],
        dispatch.BACKENDS["torch_sequence"],
    )
    named = dispatch.choose(PROBLEM, "triton_fused")
    assert dispatch.choose(PROBLEM) is fastest
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    assert dispatch.choose(PROBLEM) is fastest  # which is remembered by now
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        settled = dispatch.choose(PROBLEM)
    monkeypatch.setenv("DNC_TRITON_MEASURE", "1")

    def work(*arguments: object, **keywords: object) -> None:
        raise AssertionError("worked out again")

    monkeypatch.setattr(dispatch, "_best", work)
    assert dispatch.choose(replace(PROBLEM)) is fastest
    assert dispatch.choose(PROBLEM, "triton_fused") is named
    with monkeypatch.context() as patch:
        patch.setenv("DNC_TRITON_GRAPHS", "0")
        with pytest.raises(AssertionError, match="again"):
            dispatch.choose(PROBLEM)
    with monkeypatch.context() as patch:
        patch.setenv("DNC_TRITON_MEASURE", "0")
        assert dispatch.choose(PROBLEM) is fastest
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert dispatch.choose(PROBLEM) is settled
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(AssertionError, match="again"):
        dispatch.choose(PROBLEM, "triton_fused")


def test_what_time_did_not_reach_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 50.0 if layout else 5.0))
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", -1.0)
    chosen = [dispatch.choose(PROBLEM) for _ in range(5)]
    assert chosen[0].unroll.keywords["layout"].whole_sequence
    assert chosen[-1] is dispatch.BACKENDS["torch_sequence"]


def test_what_another_thread_measures_on_the_way_is_not_settled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here this one may not measure, since it captures a graph."""
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 50.0 if layout else 5.0))
    captures = [True]
    monkeypatch.setattr(tuning, "_captures", lambda: captures[0])
    is_settled = tuning.is_settled

    def measured_meanwhile(*arguments: object) -> bool:
        if captures[0]:
            captures[0] = False
            dispatch.choose(PROBLEM)
        return is_settled(*arguments)

    monkeypatch.setattr(tuning, "is_settled", measured_meanwhile)
    dispatch.choose(PROBLEM)
    assert dispatch.choose(PROBLEM) is dispatch.BACKENDS["torch_sequence"]


def test_explain_measures_nothing(clock: Clock) -> None:
    dispatch.explain_problem(PROBLEM)
    assert not clock.asked


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_writes": 2}, "num_writes is 2"),
        ({"memory_size": 2049}, "memory_size is 2049"),
        ({"word_size": 257}, "word_size is 257"),
        ({"num_reads": 17}, "num_reads is 17"),
        ({"dtype": torch.float8_e5m2}, "float8_e5m2"),
        ({"device": torch.device("mps")}, "device is mps"),
        ({"device": torch.device("cpu")}, "device is the CPU"),
    ],
    ids=str,
)
def test_the_kernels_decline_with_a_reason(change: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = replace(PROBLEM, **change)
    supported, answer = dispatch.BACKENDS["triton_split"].supports(problem)
    assert not supported
    assert reason in answer
    with pytest.raises(RuntimeError, match="does not serve this call"):
        dispatch.choose(problem, "triton_split")


def test_old_gpus_and_a_missing_triton_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "(7, 5)" in dispatch.BACKENDS["triton_fused"].supports(PROBLEM)[1]
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert "not installed" in dispatch.BACKENDS["triton_fused"].supports(PROBLEM)[1]
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    assert dispatch.choose(PROBLEM) is dispatch.BACKENDS["torch_sequence"]


@pytest.mark.parametrize("measure", ["0", "1"])
def test_without_triton_plain_pytorch_is_measured(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setenv("DNC_TRITON_MEASURE", measure)
    monkeypatch.setattr(tuning, "_measure", fake_times(lambda layout: 5.0))
    assert "* torch_sequence" in dispatch.explain_problem(PROBLEM)
    assert dispatch.choose(PROBLEM) is dispatch.BACKENDS["torch_sequence"]
    assert len(tuning.remembered(PROBLEM)) == (2 if measure == "1" else 0)
