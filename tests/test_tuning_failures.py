"""What becomes of a measurement that fails, finds no memory or cannot be kept, and of a candidate that is wrong; with
the fake device of straw.py."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from straw import (  # noqa: F401
    FAST,
    PROBLEM,
    REFERENCE,
    SLOW,
    STEPS,
    Clock,
    StrawCheck,
    _a_gpu_of_straw,
    _clock,
    files,
    forget,
)

from dnc_triton import tuning
from dnc_triton.kernels import launcher
from dnc_triton.problem import Problem
from dnc_triton.sequence import graphs
from dnc_triton.trial import WrongResult

EXACT_CHECK = tuning._check


def keeps_no_error(caplog: pytest.LogCaptureFixture) -> bool:
    """An error's frames hold memory."""
    return not any(isinstance(x, BaseException) for record in caplog.records for x in record.args or ())


def test_a_cache_that_cannot_be_written_is_said_and_survived(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DNC_TRITON_CACHE", str(tmp_path / "file" / "cache"))
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert "cannot keep the measured times" in caplog.text
    assert keeps_no_error(caplog)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert len(clock.asked) == 3
    tuning.fastest(replace(PROBLEM, batch=99), {("split", SLOW): "slow"})
    tuning.fastest(replace(PROBLEM, batch=99), STEPS)
    assert clock.asked[3:] == ["slow", "fast", "reference"], "what was measured in part is remembered, too"
    assert tuning.is_settled(replace(PROBLEM, batch=99), STEPS)


def out_of(what: str) -> Exception:
    """As for shared memory, a block that wants more than a multiprocessor has does compile, and fails at its launch."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if what == "memory":
        return torch.OutOfMemoryError("CUDA out of memory")
    if what == "shared memory":
        return OutOfResources(100_352, 65_536, "shared memory")
    if what == "the assembler":
        return PTXASError("`ptxas` failed with error code -9")  # it was killed
    return CompilationError(None, ast.parse("code").body[0], f"no {what}")


@pytest.mark.parametrize("what", ["shared memory", "code for this"])
def test_what_fails_is_not_chosen_and_said_once(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(fast=out_of(what), slow=30.0, reference=900.0)
    monkeypatch.setattr(tuning, "_measure", clock)
    for _ in range(2):
        assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)
        forget()
    assert len(clock.asked) == 3, "the failure survives the file"
    (message,) = caplog.messages
    assert message.startswith("fused 16×16, 4 warps is not taken for sequence")
    assert message.endswith(str(out_of(what)))
    assert keeps_no_error(caplog)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        "the assembler",
    ],
    ids=["PyTorch", "Triton", "cuBLAS", "compiler", "disk", "permission", "assembler"],
)
def test_what_may_work_another_time_is_not_chosen_in_this_process(
    error: Exception | str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another one may have a compiler, or more memory, of which a measurement takes up to twice as much."""
    if isinstance(error, str):
        error = out_of(error)
    clock = Clock(fast=error, slow=30.0, reference=900.0)
    monkeypatch.setattr(tuning, "_measure", clock)
    for _ in range(2):
        assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)
        assert tuning.is_settled(PROBLEM, STEPS)
    (message,) = caplog.messages
    assert message.endswith(str(error))
    forget()
    assert not tuning.is_settled(PROBLEM, STEPS)
    clock.microseconds["fast"] = 10.0
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert clock.asked == ["slow", "fast", "reference", "fast"]


def test_where_nothing_works_for_now_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself says what is wrong, if it still is."""
    clock = Clock(**dict.fromkeys(("slow", "fast", "reference"), OSError(28, "No space left on device")))
    monkeypatch.setattr(tuning, "_measure", clock)
    for _ in range(2):
        assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)
    assert clock.asked == ["slow", "fast", "reference"]
    assert not files()
    forget()
    clock.microseconds.update(slow=30.0, fast=10.0, reference=900.0)
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)


@pytest.mark.parametrize("what", ["nothing", "nothing but what does not compile"])
def test_where_memory_suffices_for_nothing_the_first_is_taken(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call itself may still find room."""
    failures = dict.fromkeys(("slow", "fast", "reference"), out_of("memory"))
    if what != "nothing":
        failures["slow"] = failures["reference"] = out_of("code for this")
    clock = Clock(**failures)
    monkeypatch.setattr(tuning, "_measure", clock)
    for _ in range(2):
        assert tuning.fastest(PROBLEM, STEPS) == (("split", SLOW) if what == "nothing" else ("fused", FAST))
    assert clock.asked == ["slow", "fast", "reference"]
    assert tuning.is_settled(PROBLEM, STEPS)


def test_where_there_is_no_memory_to_measure_in_the_first_is_taken(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(problem: Problem, steps: int) -> None:
        raise out_of("memory")

    monkeypatch.setattr(tuning, "random_call", fail)
    for _ in range(2):
        assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)
    (message,) = caplog.messages
    assert message.startswith("nothing is measured for")
    assert keeps_no_error(caplog)
    assert not clock.asked
    assert not files()


def test_where_nothing_works_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tried, late or not, but once: until the file is deleted every call says so, in other processes too."""
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", -1.0)
    clock = Clock(slow=out_of("first"), fast=out_of("second"), reference=out_of("third"))
    monkeypatch.setattr(tuning, "_measure", clock)
    for measure in (True, True, False):
        with pytest.raises(tuning.NothingWorks) as raised:
            tuning.fastest(PROBLEM, STEPS, measure=measure)
        (path,) = files()
        message = str(raised.value)
        assert message.startswith(f"nothing that is asked for works on this device for {PROBLEM}: split ")
        assert ": split 16×32, 8 warps: no first; fused 16×16, 4 warps: no second; reference: no third. To" in message
        assert message.endswith(f"without {path}")
        forget()
    assert clock.asked == ["slow", "fast", "reference"]
    path.unlink()
    clock.microseconds["slow"] = 30.0
    assert tuning.fastest(PROBLEM, {("split", SLOW): "slow"}) == ("split", SLOW)
    assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)


def test_what_failed_is_not_taken_before_what_is_not_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """During a capture, when nothing is measured, with what is known of a part of the candidates."""
    clock.microseconds["slow"] = out_of("code for this")
    with pytest.raises(tuning.NothingWorks):
        tuning.fastest(PROBLEM, {("split", SLOW): "slow"})
    assert tuning.fastest(PROBLEM, STEPS, measure=False) == ("fused", FAST)
    assert clock.asked == ["slow"]


def test_what_leaves_cuda_unusable_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether PyTorch tells of it, or Triton, whose errors are RuntimeErrors: then the next synchronization tells."""
    told = torch.AcceleratorError("CUDA error: unspecified launch failure")
    monkeypatch.setattr(tuning, "_measure", Clock(slow=30.0, fast=told, reference=900.0))
    with pytest.raises(torch.AcceleratorError, match="unspecified"):
        tuning.fastest(PROBLEM, STEPS)

    def wait(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    told = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    monkeypatch.setattr(tuning, "_measure", Clock(slow=30.0, fast=told, reference=900.0))
    monkeypatch.setattr(tuning, "wait_for", wait)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        tuning.fastest(PROBLEM, STEPS)
    assert not files()


# --- what is wrong


def refuse(*wrong: str) -> Callable[[Problem], StrawCheck]:
    """A check that some candidates do not pass."""

    def check(operation: str) -> None:
        if operation in wrong:
            raise WrongResult(f"wrong results: link off by 0.5, in {operation}")

    return lambda problem: StrawCheck(check)


def test_what_is_wrong_is_neither_measured_nor_taken(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor tried again, by another process either, until something is of another version."""
    monkeypatch.setattr(tuning, "_check", refuse("fast"))
    for _ in range(2):
        assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)
        assert tuning.is_settled(PROBLEM, STEPS)
        forget()
    assert clock.asked == ["slow", "reference"]
    (message,) = caplog.messages
    assert message.startswith("fused 16×16, 4 warps is not taken for sequence")
    assert message.endswith("wrong results: link off by 0.5, in fast")
    assert keeps_no_error(caplog)


def test_where_all_kernels_are_wrong_plain_pytorch_is_taken(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the oracle, or close to it: it is not checked. Asked for by name, what is wrong is an error, each time."""
    monkeypatch.setattr(tuning, "_check", refuse("fast", "slow", "reference"))
    assert tuning.fastest(PROBLEM, STEPS) == ("reference", REFERENCE)
    assert clock.asked == ["reference"]
    for problem in (PROBLEM, replace(PROBLEM, word_size=9)):  # wrong before, and now
        for _ in range(2):
            with pytest.raises(tuning.NothingWorks, match="split 16×32, 8 warps: wrong results: link off by "):
                tuning.fastest(problem, {("split", SLOW): "slow"})
            forget()


def test_without_kernels_nothing_is_checked(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_check", lambda problem: pytest.fail("there is nothing to check"))
    assert tuning.fastest(PROBLEM, {("reference", REFERENCE): "reference"}) == ("reference", REFERENCE)


def test_without_memory_for_the_oracle_it_is_measured_unchecked(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(problem: Problem) -> None:
        raise error

    monkeypatch.setattr(tuning, "_check", EXACT_CHECK)
    monkeypatch.setattr(tuning, "Check", fail)
    error: Exception = out_of("memory")
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    (message,) = caplog.messages
    assert message.startswith("what is measured for sequence")
    assert message.endswith("is not checked: CUDA out of memory")
    assert keeps_no_error(caplog)
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(torch.AcceleratorError, match="unspecified"):
        tuning.fastest(replace(PROBLEM, word_size=9), STEPS)

    def wait(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "wait_for", wait)
    error = RuntimeError("cuBLAS failed")  # after which waiting tells that CUDA is unusable
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        tuning.fastest(replace(PROBLEM, word_size=10), STEPS)


def test_a_check_is_launched_as_it_is_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, without the caller's autocast, and not kept as a graph."""
    seen = []

    def check(operation: str) -> None:
        seen.append((operation, torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), bool(graphs._launching)))

    monkeypatch.setattr(tuning, "_check", lambda problem: StrawCheck(check))
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.no_grad():
            tuning.fastest(PROBLEM, STEPS)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [("slow", True, False, True), ("fast", True, False, True)]


def test_without_memory_beside_the_check_a_candidate_is_measured_unchecked(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(operation: str) -> None:
        raise out_of("memory")

    monkeypatch.setattr(tuning, "_check", lambda problem: StrawCheck(check))
    assert tuning.fastest(PROBLEM, STEPS) == ("fused", FAST)
    assert clock.asked == ["slow", "fast", "reference"]
    assert len(caplog.messages) == 2
    assert all(message.endswith("is not checked: CUDA out of memory") for message in caplog.messages)


def test_what_seems_wrong_and_cannot_be_tried_again_is_not_measured(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Check` raises a RuntimeError then. In the next process it may turn out to be right."""

    def check(operation: str) -> None:
        if operation == "fast":
            raise RuntimeError("wrong results: link off by 0.5; there is no memory to try other numbers")

    monkeypatch.setattr(tuning, "_check", lambda problem: StrawCheck(check))
    assert tuning.fastest(PROBLEM, STEPS) == ("split", SLOW)
    assert clock.asked == ["slow", "reference"]
    assert ("fused", FAST) not in tuning.remembered(PROBLEM)


def test_the_oracle_runs_as_what_is_measured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, without the caller's autocast; and what a check launches is compiled ahead, before the rest."""
    ran = []

    class Recorded(StrawCheck):
        def __init__(self, problem: Problem) -> None:
            ran.append(("oracle", torch.is_grad_enabled(), torch.is_autocast_enabled("cuda")))

    def compile_ahead(problem: Problem, runs: list, operations: list) -> None:
        ran.append([getattr(run, "__name__", "") for run in runs])

    monkeypatch.setattr(tuning, "_check", EXACT_CHECK)
    monkeypatch.setattr(tuning, "Check", Recorded)
    monkeypatch.setattr(tuning, "_compile_ahead", compile_ahead)
    monkeypatch.setattr(tuning, "_try", lambda *_: None)
    monkeypatch.setattr(launcher, "threads", lambda: 8)
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.no_grad():
            tuning.fastest(PROBLEM, STEPS)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert ran == [("oracle", True, False), ["launch", "print"]]
