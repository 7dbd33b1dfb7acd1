"""Choosing by measurement: what is measured, what is remembered, and what happens to the memory of it.

There is no GPU here: a fake device and a fake clock stand in (straw.py). What the dispatcher makes of it is in
test_tuning_dispatch.py, what fails in test_tuning_failures.py.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from straw import FAST, PROBLEM, REFERENCE, SLOW, STEPS, Clock, _a_gpu_of_straw, _clock, files, forget  # noqa: F401

from dnc_triton import dispatch, tuning
from dnc_triton.kernels import launcher
from dnc_triton.kernels.layout import sequence_layouts
from dnc_triton.problem import Problem
from dnc_triton.sequence import graphs


def test_the_fastest_is_chosen_and_measured_once(clock: Clock) -> None:
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert clock.asked == ["slow", "fast", "reference"]
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert len(clock.asked) == 3


@pytest.mark.parametrize(("steps", "measured"), [(0, 1), (1, 1), (5, 8), (32, 32), (100, 32)])
def test_so_many_steps_are_measured(steps: int, measured: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tuning, "random_call", lambda problem, steps: asked.append(steps))
    tuning.fastest(replace(PROBLEM, steps=steps), STEPS)
    assert asked == [measured]


def test_it_is_measured_on_the_default_stream(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sequence is replayed as a graph, whatever the caller is preparing on another stream."""
    current, during = ["the caller's"], []

    @contextmanager
    def stream(of: object) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    def measure(problem: Problem, run: partial) -> float:
        during.append(current[-1])
        return clock(problem, run)

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"the default of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(tuning, "_measure", measure)
    tuning.fastest(PROBLEM, STEPS)
    assert during == ["the default of cuda:0"] * 3
    assert current == ["the caller's"]


@pytest.mark.parametrize(("threads", "order"), [(1, "FfSsr"), (2, "FSfsr"), (8, "FSfsr")])
def test_what_compiles_does_so_before_what_is_measured(
    clock: Clock, threads: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many candidates as there are threads; those without kernels of ours have nothing to compile."""
    events = []

    def compiling(operation: str) -> None:
        events.append(operation[0].upper())
        raise RuntimeError("it cannot run, and is measured all the same")

    def measure(problem: Problem, run: partial) -> float:
        events.append(run.args[0][0])
        return clock(problem, run)

    monkeypatch.setattr(launcher, "threads", lambda: threads)
    monkeypatch.setattr(tuning, "random_call", lambda problem, steps: compiling)
    monkeypatch.setattr(tuning, "_measure", measure)
    candidates = {("fused", FAST): "fast", ("split", SLOW): "slow", ("reference", REFERENCE): "reference"}
    assert tuning.fastest(PROBLEM, candidates) == ("fused", FAST)
    assert "".join(events) == order


class Device:
    """A device that works on what it is told in order, and the clock of a Python that takes its time to tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launching: float, working: float, has_room: bool) -> None:
        self.launching, self.working, self.has_room = launching, working, has_room
        self.now = self.busy_until = self.waited = 0.0
        self.replays = 0
        monkeypatch.setattr(graphs, "replays", lambda device: self.replays)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", partial(Mark, self))

    def work(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    def sleep(self, cycles: int) -> None:
        self.waited = cycles / 2e9
        self.work(self.waited)

    def record_event(self) -> Mark:
        event = Mark(self, enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def run(self) -> None:
        self.now += self.launching
        self.work(self.working)
        self.replays += self.has_room and not graphs._launching


class Mark:
    """An event: when the device came by."""

    def __init__(self, device: Device, *, enable_timing: bool) -> None:
        assert enable_timing
        self.device = device

    def record(self) -> None:
        self.when = max(self.device.now, self.device.busy_until)

    def synchronize(self) -> None:
        self.device.synchronize()

    def elapsed_time(self, other: Mark) -> float:
        return 1000 * (other.when - self.when)


EXACT_MEASURE = tuning._measure


@pytest.mark.parametrize(
    ("change", "has_room", "launching", "expected"),
    [
        ({}, True, 0.003, 400.0),
        ({}, False, 0.003, 3400.0),  # launch by launch, Python's time counts too
        ({"controller": None}, True, 0.003, 3400.0),
        ({"steps": 5000}, True, 0.003, 3400.0),
        ({}, True, 1.0, 960_400.0),  # Python takes longer than the device waits for it
    ],
    ids=["replayed", "no room", "a step", "a long one", "slow"],
)
def test_of_what_is_replayed_the_work_of_the_device_counts(
    change: dict, has_room: bool, launching: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, launching=launching, working=0.0004, has_room=has_room)
    assert EXACT_MEASURE(replace(PROBLEM, **change), device.run) == pytest.approx(expected)
    assert device.waited == pytest.approx(0 if expected == 3400.0 else 2 * min(launching, 0.02))
    assert not graphs._launching


@pytest.mark.parametrize(("working", "times"), [(0.01, 15), (0.3, 4), (5.0, 1)])
def test_a_candidate_is_measured_for_a_second(working: float, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow runs fewer times, but at least once."""
    device, runs = Device(monkeypatch, launching=0.0, working=working, has_room=True), []

    def run() -> None:
        runs.append(device.run())

    EXACT_MEASURE(PROBLEM, run)
    assert len(runs) == tuning.WARM_UP + times


def test_a_sequence_too_long_to_be_replayed_has_a_measurement_of_its_own(clock: Clock) -> None:
    tuning.fastest(PROBLEM, STEPS)
    tuning.fastest(replace(PROBLEM, steps=graphs.LONGEST), STEPS)
    measured = len(clock.asked)
    tuning.fastest(replace(PROBLEM, steps=graphs.LONGEST + 1), STEPS)
    assert len(clock.asked) == measured + 3


def test_another_process_reads_what_this_one_measured(clock: Clock) -> None:
    tuning.fastest(PROBLEM, STEPS)
    forget()
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert len(clock.asked) == 3
    assert tuning.remembered(PROBLEM) == {("split", SLOW): 30.0, ("fused", FAST): 10.0, ("reference", None): 900.0}
    assert [path.suffix for path in files()] == [".json"]


def test_another_user_may_read_what_this_one_measured(clock: Clock) -> None:
    """In a directory that several share."""
    before = os.umask(0o022)
    try:
        tuning.fastest(PROBLEM, STEPS)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in files()] == [0o644]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"batch": 17},
        {"memory_size": 17},
        {"word_size": 9},
        {"num_reads": 3},
        {"needs_gradient": False},
        {"controller": "gru"},
        {"controller": None},
        {"controller": "custom"},
        {"hidden_size": 21},
        {"num_layers": 2},
        {"steps": 9},
    ],
    ids=str,
)
def test_another_problem_is_measured_by_itself(clock: Clock, change: dict) -> None:
    tuning.fastest(PROBLEM, STEPS)
    tuning.fastest(replace(PROBLEM, **change), STEPS)
    assert len(clock.asked) == 6


@pytest.mark.parametrize("change", [{"batch": 16}, {"batch": 9}, {"steps": 8}], ids=str)
def test_what_makes_no_difference_is_not_measured_again(clock: Clock, change: dict) -> None:
    tuning.fastest(PROBLEM, STEPS)
    tuning.fastest(replace(PROBLEM, **change), STEPS)
    assert len(clock.asked) == 3


def test_long_sequences_are_alike(clock: Clock) -> None:
    for steps in (30, 33, 1000):
        tuning.fastest(replace(PROBLEM, steps=steps), STEPS)
    for steps in (1, 7):
        tuning.fastest(replace(PROBLEM, steps=steps, controller="custom"), STEPS)
    assert len(clock.asked) == 6


def test_a_step_of_ones_own_controller_is_not_a_memory_step(clock: Clock) -> None:
    """Its kernels activate the interface."""
    for controller in ("custom", None):
        tuning.fastest(replace(PROBLEM, controller=controller), STEPS)
    assert len(clock.asked) == 6


@pytest.mark.parametrize("changed", ["device", "torch", "triton", "dnc_triton"])
def test_another_device_or_version_is_measured_again(
    clock: Clock, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    tuning.fastest(PROBLEM, STEPS)
    forget()
    if changed == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Straw 9001")
    else:
        says_so = {"torch": torch, "triton": triton, "dnc_triton": tuning}
        monkeypatch.setattr(says_so[changed], "__version__", "99.0")
    tuning.fastest(PROBLEM, STEPS)
    assert len(clock.asked) == 6
    assert len(files()) == 2


def test_without_cuda_graphs_it_is_measured_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.fastest(PROBLEM, STEPS)
    monkeypatch.setenv("DNC_TRITON_GRAPHS", "0")
    tuning.fastest(PROBLEM, STEPS)
    assert len(clock.asked) == 6


def test_with_an_allocator_that_allows_none_it_is_measured_as_without_cuda_graphs(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.fastest(PROBLEM, STEPS)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    tuning.fastest(PROBLEM, STEPS)
    assert len(clock.asked) == 6
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setenv("DNC_TRITON_GRAPHS", "0")
    tuning.fastest(PROBLEM, STEPS)
    assert len(clock.asked) == 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"bucket": "another", "outcomes": []}',
        "\x00\xff",
        pytest.param("[" * 10**5, id="deep"),
        None,
    ],
    ids=repr,
)
def test_a_damaged_file_is_measured_again_and_replaced(clock: Clock, content: str | None) -> None:
    tuning.fastest(PROBLEM, STEPS)
    (path,) = files()
    whole = path.read_text()
    if content is None:  # the right key, rows that make no sense
        path.write_text(json.dumps({**json.loads(whole), "outcomes": [["fused"]]}))
    else:
        path.write_text(content)
    forget()
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert len(clock.asked) == 6
    assert path.read_text() == whole


@pytest.mark.parametrize("part", [None, "16", 16.5, [16]], ids=str)
def test_layouts_that_cannot_be_are_measured_again(clock: Clock, part: object) -> None:
    tuning.fastest(PROBLEM, STEPS)
    (path,) = files()
    whole = path.read_text()
    record = json.loads(whole)
    next(layout for _, layout, _ in record["outcomes"] if layout)[1] = part
    path.write_text(json.dumps(record))
    forget()
    dispatch.explain_problem(PROBLEM)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert path.read_text() == whole


@pytest.mark.parametrize(
    "time", [float("nan"), float("inf"), -1.0, 0.0, None, [], pytest.param(10**400, id="huge")], ids=str
)
def test_times_that_cannot_be_are_measured_again(clock: Clock, time: object) -> None:
    tuning.fastest(PROBLEM, STEPS)
    (path,) = files()
    whole = path.read_text()
    record = json.loads(whole)
    record["outcomes"][0][-1] = time
    path.write_text(json.dumps(record))
    forget()
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert path.read_text() == whole


def test_a_file_that_cannot_be_put_in_its_place_leaves_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert not list(tuning.cache_directory().iterdir())


def test_new_candidates_are_measured_beside_the_old(clock: Clock) -> None:
    one = {("split", SLOW): "slow", ("reference", REFERENCE): "reference"}
    assert tuning.fastest(PROBLEM, one) == ("split", SLOW)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert tuning.fastest(PROBLEM, one) == ("split", SLOW), "only what was asked for may be chosen"
    assert clock.asked == ["slow", "reference", "fast"]


def test_asking_by_name_in_turn_measures_each_once(clock: Clock) -> None:
    for _ in range(2):
        for candidate, operation in STEPS.items():
            assert tuning.fastest(PROBLEM, {candidate: operation}) == candidate
    assert clock.asked == ["slow", "fast", "reference"]
    forget()
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert len(clock.asked) == 3, "the file has them all"


def test_what_another_process_measured_meanwhile_is_kept(clock: Clock) -> None:
    tuning.fastest(PROBLEM, {("split", SLOW): "slow"})
    here = dict(tuning._known)
    forget()
    tuning.fastest(PROBLEM, {("fused", FAST): "fast"})
    tuning._known.update(here)
    tuning.fastest(PROBLEM, {("reference", REFERENCE): "reference"})
    forget()
    assert tuning.remembered(PROBLEM).keys() == STEPS.keys()


def test_measuring_can_be_switched_off(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW), "the first"
    assert not clock.asked
    assert not files()


def test_an_empty_variable_switches_nothing_off(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNC_TRITON_MEASURE", "")
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)


@pytest.mark.parametrize("value", ["no", "false", "2"])
def test_a_switch_that_is_none(value: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at every call, even if nothing is left to measure."""
    tuning.fastest(PROBLEM, STEPS)
    monkeypatch.setenv("DNC_TRITON_MEASURE", value)
    with pytest.raises(ValueError, match=f"^DNC_TRITON_MEASURE: expected 0 or 1, got '{value}'"):
        tuning.fastest(PROBLEM, STEPS)


def test_of_what_is_remembered_the_fastest_is_taken_if_the_first_is_among_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, others = {("split", SLOW): "slow"}, {("fused", FAST): "fast"}
    tuning.fastest(PROBLEM, others)
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW), "which may be faster"
    monkeypatch.delenv("DNC_TRITON_MEASURE")
    tuning.fastest(PROBLEM, first)
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert clock.asked == ["fast", "slow"]


def test_nothing_is_measured_during_capture_but_the_memory_is_used(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW), "the first"
    assert not clock.asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuning.fastest(PROBLEM, STEPS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)


def test_nothing_is_measured_where_a_mode_would_see_it(clock: Clock) -> None:
    """Or fake it: what was measured of that would be remembered for calls that are real."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    for mode in (FakeTensorMode, partial(FlopCounterMode, display=False)):
        with mode():
            assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW), "the first"
    assert not clock.asked
    assert not files()
    tuning.fastest(PROBLEM, STEPS)
    with FakeTensorMode():
        assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST), "what is remembered"


def test_it_is_measured_without_the_autocast_of_a_call() -> None:
    """A problem's name in the file says nothing of it."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with tuning._as_measured(PROBLEM):
            assert not torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_it_is_measured_within_an_activation_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks would take what is saved while measuring for what the call saves."""

    def measure(problem: Problem, run: partial) -> float:
        with tuning._as_measured(problem):
            weight = torch.ones(2, requires_grad=True)
            torch.autograd.grad(weight.square().sum(), weight)
        return 1.0

    def square(x: torch.Tensor) -> torch.Tensor:
        tuning.fastest(PROBLEM, STEPS)
        return x.square()

    monkeypatch.setattr(tuning, "_measure", measure)
    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(square, x, use_reentrant=False).sum().backward()
    assert tuning.remembered(PROBLEM) == dict.fromkeys(STEPS, 1.0 / tuning._measured_steps(PROBLEM))
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


def test_an_activation_checkpoint_has_the_same_choice_twice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to measure when the backward runs the call again."""
    chosen = []

    def square(x: torch.Tensor) -> torch.Tensor:
        chosen.append(tuning.fastest(PROBLEM, STEPS))
        return x.square()

    monkeypatch.setattr(tuning, "TOTAL_SECONDS", -1.0)
    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(square, x, use_reentrant=False).sum().backward()
    assert chosen == [("fused", FAST)] * 2


def test_nothing_is_measured_while_tracing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the default for the size is taken, whatever is remembered: a traced function may not look at a file."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.choose(PROBLEM).unroll.keywords["layout"] == sequence_layouts(16, 8)[0]
    assert not clock.asked
    assert not files()


def test_measuring_is_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dnc_triton")
    tuning.fastest(PROBLEM, STEPS)
    tuning.fastest(PROBLEM, STEPS)
    (message,) = caplog.messages
    assert "measured 3 candidates" in message
    assert "N=16" in message
    assert "fused" in message
    assert "10.0 µs" in message


def test_measuring_stops_when_its_time_is_up_and_goes_on_at_the_next_call(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", -1.0)
    assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW), "one is measured, be it late"
    assert clock.asked == ["slow"]
    forget()
    assert tuning.remembered(PROBLEM) == {("split", SLOW): 30.0}, "nothing is said of the others"
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert clock.asked == ["slow", "fast", "reference"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # is multi-threaded, since Python 3.12
def test_many_processes_may_write_at_once(clock: Clock) -> None:
    """Every reader sees a whole file, whoever wrote it last, and no part is left behind."""

    def write() -> None:
        for _ in range(200):
            tuning._remember(PROBLEM, dict.fromkeys(STEPS, 10.0))
            tuning._known.clear()
            assert len(tuning.remembered(PROBLEM)) == 3

    processes = [multiprocessing.get_context("fork").Process(target=write) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.suffix for path in files()] == [".json"]
