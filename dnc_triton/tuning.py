"""Which candidate is the fastest, measured once and remembered: in the process, and in the user's cache directory.

What has kernels of ours is checked against the reference before it is measured: what is wrong on this device is not
taken.

A sequence is measured as a sequence of at most `STEPS` steps, with a controller of its kind; a memory step, or what
must run step by step, as a step. Where a sequence is replayed as a CUDA graph, only the time that the device works
counts: Python's part is the same for every candidate, and longer than a small network's kernels. In a graph that the
user captures, the device takes just as long. Where a sequence is launched, the time of the whole call counts.

A problem is remembered by its bucket: the device's model, the versions of this package and of what generates code,
dtype, N, W, R, K, the controller, whether gradients are needed, and B and T rounded up to powers of two; for a sequence
also whether CUDA graphs are used. Each bucket has a file of its own, written whole or not at all, so that any number of
processes may measure at once; a file that cannot be understood counts as empty. What a bucket lacks,
because it was not asked for before or time ran out, is measured when it is next asked for; what failed for want of
something that may be there another time, memory say, in the next process. Most of the time goes into compiling kernels,
so those of several candidates compile at once, before they are measured.

Environment variables: DNC_TRITON_MEASURE=0 switches measuring off (the first candidate is taken, unless its time is
remembered), DNC_TRITON_CACHE names another directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dnc_reference.memory import without_autocast
from dnc_triton import environment, files
from dnc_triton.kernels import launcher
from dnc_triton.kernels.layout import Layout
from dnc_triton.problem import Problem
from dnc_triton.sequence import engine, graphs
from dnc_triton.trial import (
    Check,
    Operation,
    WrongResult,
    measures_sequence,
    power_of_two,
    random_call,
    tried_as,
    wait_for,
)
from dnc_triton.version import __version__

Candidate = tuple[str, Layout | None]
Outcome = float | str  # µs per step, or in a line why it failed for good

FORMAT = 12  # of what is remembered; to be changed when old times mislead, as after large changes to kernels
STEPS = 32  # of a measured sequence, at most
WARM_UP = 3  # calls, the first of which compiles
REPETITIONS = 15
SECONDS = 1.0  # per candidate, compilation not counted
# How long the device sleeps before a replay is timed: CYCLES clock cycles for each second that Python takes to enqueue
# the work (at 2 GHz twice that time), of which at most LONGEST_WAIT seconds count.
CYCLES, LONGEST_WAIT = 4e9, 0.02
# Per call, compilation included; candidates that are not reached wait for the next call. None waits where hooks act on
# what is saved for a backward.
TOTAL_SECONDS = 60.0

logger = logging.getLogger("dnc_triton")


class NothingWorks(RuntimeError):
    """All that was asked for failed for good on this device."""


_known: dict[str, dict[Candidate, Outcome]] = {}
_measurements = 0  # in this process
_failed_for_now: dict[str, set[Candidate]] = {}  # in this process; the next one tries it again


def fastest(problem: Problem, operations: Mapping[Candidate, Operation], *, measure: bool = True) -> Candidate:
    """The fastest of the candidates measured for a problem, now or before; the first one if it was not measured.

    Args:
        problem: the call.
        operations: candidate → its function of the name `tried_as`; in the order of preference.
        measure: whether to measure what is not remembered. Nothing is measured while a CUDA graph is captured or a
            mode or tracer sees each operator, nor with DNC_TRITON_MEASURE=0.

    Returns:
        one of the candidates. If none works, the first that failed for want of memory, say: the call itself may find
        enough, or raises an error that says what is wrong.

    Raises:
        ValueError: DNC_TRITON_MEASURE or DNC_TRITON_GRAPHS is neither 0 nor 1.
        NothingWorks: every candidate failed for good, now or before; the message says of each why.
        Exception: CUDA can no longer be used.
    """
    measured = _measured(problem)
    missing = {candidate: operation for candidate, operation in operations.items() if candidate not in measured}
    if environment.is_on(environment.MEASURE) and measure and missing and not _captures():
        # On the stream where sequences are replayed as graphs: the user may be about to capture the current one.
        with torch.cuda.stream(torch.cuda.default_stream(problem.device)):
            if new := _measure_all(problem, missing):
                _remember(problem, new)
        measured = _measured(problem)
    first = next(iter(operations))
    if first not in measured:  # it may be faster than what is remembered
        return first
    known = remembered(problem)
    if times := _times({candidate: known[candidate] for candidate in operations if candidate in known}):
        return min(times, key=lambda candidate: times[candidate])
    return first_working(problem, operations)  # not measured, or failed for now


def first_working(problem: Problem, candidates: Iterable[Candidate]) -> Candidate:
    """The first of the candidates that is not known to fail for good.

    Raises:
        NothingWorks: all of them are; the message says of each why.
    """
    known, reasons = remembered(problem), []
    for candidate in candidates:
        outcome = known.get(candidate)
        if not isinstance(outcome, str):
            return candidate
        reasons.append(f"{_describe(candidate)}: {outcome}")
    raise NothingWorks(
        f"nothing that is asked for works on this device for {problem}: {'; '.join(reasons)}. "
        f"To try again, start again without {_path(_bucket(problem))}"
    )


def _times(outcomes: Mapping[Candidate, Outcome]) -> dict[Candidate, float]:
    """The µs per step of what worked."""
    return {candidate: outcome for candidate, outcome in outcomes.items() if isinstance(outcome, float)}


def _describe(candidate: Candidate) -> str:
    name, layout = candidate
    return f"{name} {layout.describe()}" if layout else name


def _captures() -> bool:
    """Whether measurements would be recorded by a CUDA graph, a mode or a tracer."""
    if is_in_torch_dispatch_mode() or torch.jit.is_tracing():  # they would see each operator, or fake it
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_settled(problem: Problem, operations: Mapping[Candidate, Operation]) -> bool:
    """Whether `fastest` has none of these left to measure in this process, or must not measure."""
    return not environment.is_on(environment.MEASURE) or _measured(problem) >= operations.keys()


def measurements() -> int:
    """How often something was measured in this process; each time the choice may change."""
    return _measurements


def _measured(problem: Problem) -> set[Candidate]:
    return remembered(problem).keys() | _failed_for_now.get(_bucket(problem), set())


def remembered(problem: Problem) -> dict[Candidate, Outcome]:
    """What was measured for a problem: candidate → µs per step, or why it failed. Empty if nothing was."""
    if problem.device.type != "cuda":
        return {}
    bucket = _bucket(problem)
    if bucket not in _known:
        outcomes = _read(_path(bucket), bucket)
        if not outcomes:
            return {}
        _known[bucket] = outcomes
    return _known[bucket]


def cache_directory() -> Path:
    """Where measurements are kept: $DNC_TRITON_CACHE, else dnc_triton in the user's cache directory."""
    named = os.environ.get(environment.CACHE)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if named:
            return Path(named).expanduser()  # a variable is not always set by a shell
        # The XDG specification asks to ignore a relative path.
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "dnc_triton"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / "dnc_triton"


def _bucket(problem: Problem) -> str:
    """The key under which a problem is remembered."""
    key = {
        "device": torch.cuda.get_device_name(problem.device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "dnc_triton": __version__,
        "format": FORMAT,
        "operation": tried_as(problem),
        "dtype": str(problem.dtype),
        "batch": power_of_two(problem.batch),
        "memory_size": problem.memory_size,
        "word_size": problem.word_size,
        "num_reads": problem.num_reads,
        "num_writes": problem.num_writes,
        "needs_gradient": problem.needs_gradient,
    }
    if measures_sequence(problem):
        key["controller"] = f"{problem.num_layers}×{problem.controller} {problem.hidden_size}"
        key["steps"] = _measured_steps(problem)
        key["graphs"] = _are_replayed(problem)
    return json.dumps(key, sort_keys=True)


def triton_version() -> str:
    """Triton's own version, whatever its package is called (it differs for ROCm). Empty where there is no Triton."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _path(bucket: str) -> Path:
    return cache_directory() / f"{hashlib.sha256(bucket.encode()).hexdigest()[:32]}.json"


def _read(path: Path, bucket: str) -> dict[Candidate, Outcome]:
    try:
        record = json.loads(path.read_text())
        if record["bucket"] != bucket:
            return {}
        outcomes = {
            (str(name), None if layout is None else Layout(*layout)): x if isinstance(x, str) else float(x)
            for name, layout, x in record["outcomes"]
        }
        whole = all(type(x) in (bool, int) for _, layout in outcomes for x in layout or ())
        return outcomes if whole and all(0 < time < math.inf for time in _times(outcomes).values()) else {}
    # Missing or damaged: measure again.
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}


def _remember(problem: Problem, outcomes: dict[Candidate, Outcome]) -> None:
    """Add to what is known, here and in the file, to which another process may have added something too.

    What two processes add at the same moment may be kept of one alone; the rest is measured again when it is asked for.
    """
    global _measurements
    _measurements += 1
    bucket = _bucket(problem)
    path = _path(bucket)
    _known[bucket] = _read(path, bucket) | _known.get(bucket, {}) | outcomes
    rows = [(name, layout, outcome) for (name, layout), outcome in _known[bucket].items()]
    try:
        files.write(path, json.dumps({"bucket": bucket, "outcomes": rows}).encode())
    except OSError as error:  # a read-only home, a full disk: the process still remembers
        logger.warning("cannot keep the measured times in %s: %s", path.parent, str(error))


def _are_replayed(problem: Problem) -> bool:
    """Whether calls are replayed as CUDA graphs once they have come twice, if there is room for the graphs."""
    asked = environment.is_on(environment.GRAPHS)
    return asked and measures_sequence(problem) and problem.steps <= graphs.LONGEST and engine.has_pools()


def _measured_steps(problem: Problem) -> int:
    return min(STEPS, power_of_two(problem.steps)) if measures_sequence(problem) else 1


def _measure_all(problem: Problem, operations: Mapping[Candidate, Operation]) -> dict[Candidate, Outcome]:
    """What becomes of each candidate that is reached; what fails for now is missing."""
    started = time.perf_counter()
    failed_for_now = _failed_for_now.setdefault(_bucket(problem), set())
    try:
        with torch.inference_mode(False), torch.cuda.device(problem.device):
            run = random_call(problem, _measured_steps(problem))
    except torch.OutOfMemoryError as error:
        logger.warning("nothing is measured for %s: %s", problem, str(error))
        failed_for_now.update(operations)
        return {}
    check = _check(problem) if any(layout is not None for _, layout in operations) else None
    runs: list[Callable[[Operation], None]] = [run] if check is None else [check.launch, run]
    outcomes: dict[Candidate, Outcome] = {}
    # The hooks may be an activation checkpoint's, which runs the call again later and must get the same choice.
    most = math.inf if _are_hooks_at_work() else TOTAL_SECONDS
    at_once = launcher.threads()  # enough to keep them busy; more would delay measuring
    for index, (candidate, operation) in enumerate(operations.items()):
        # Until one works there is nothing to choose, however late it is.
        if _times(outcomes) and time.perf_counter() - started > most:
            break
        if index % at_once == 0:
            _compile_ahead(problem, runs, list(operations.items())[index : index + at_once])
        try:
            if check is not None and candidate[1] is not None:
                _try(check, problem, operation)
            outcomes[candidate] = _measure(problem, partial(run, operation)) / _measured_steps(problem)
        except torch.AcceleratorError:  # CUDA may be unusable
            raise
        # It does not compile, or does not fit into memory, or a block into a multiprocessor; or it is wrong.
        except Exception as error:
            wait_for(problem.device)  # raises if CUDA is unusable
            # As a string: a handler that keeps records would keep all that the error's frames hold.
            logger.warning("%s is not taken for %s: %s", _describe(candidate), problem, str(error))
            # What is wrong, and Triton's own errors, are for good. Memory, a compiler or disk space may be there
            # another time; NVIDIA's assembler also fails for want of these.
            of_triton = type(error).__module__.startswith("triton.") and type(error).__name__ != "PTXASError"
            if of_triton or isinstance(error, WrongResult):
                outcomes[candidate] = _reason(error)
            else:
                failed_for_now.add(candidate)
    if times := _times(outcomes):
        best = min(times, key=lambda candidate: times[candidate])
        logger.info(
            "measured %d candidates for %s in %.1f s: %s with %.1f µs per step",
            len(times),
            problem,
            time.perf_counter() - started,
            _describe(best),
            times[best],
        )
    return outcomes


def _reason(error: BaseException) -> str:
    """Why something failed, in a line. Triton quotes a kernel first, and has the reason last or in the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _check(problem: Problem) -> Check | None:
    """What candidates are checked with; None if the reference finds no memory, say."""
    try:
        with _as_measured(problem):
            return Check(problem)
    except torch.AcceleratorError:  # CUDA may be unusable
        raise
    except Exception as error:
        wait_for(problem.device)  # raises if CUDA is unusable
        logger.warning("what is measured for %s is not checked: %s", problem, str(error))
        return None


def _try(check: Check, problem: Problem, operation: Operation) -> None:
    """Check a candidate as it is measured. What finds no memory beside the check is not checked."""
    try:
        with _as_measured(problem), graphs.launching():
            check(operation)
    except torch.OutOfMemoryError as error:
        logger.warning("what is measured for %s is not checked: %s", problem, str(error))


def _compile_ahead(
    problem: Problem, runs: list[Callable[[Operation], None]], operations: list[tuple[Candidate, Operation]]
) -> None:
    """Compile what the candidates launch, several kernels at once instead of each when it is launched."""
    with (
        _as_measured(problem),
        torch.autograd.set_multithreading_enabled(False),
        launcher.compiling_ahead(problem.device),
    ):
        for (_, layout), operation in operations:
            if layout is not None:  # without a layout there are no kernels of ours
                for run in runs:
                    with suppress(Exception):  # it is raised again when that candidate is measured
                        run(operation)


@contextmanager
def _as_measured(problem: Problem) -> Iterator[None]:
    """The settings under which a candidate is measured, whatever is in force at the caller."""
    with (
        torch.cuda.device(problem.device),
        torch.inference_mode(False),
        torch.set_grad_enabled(problem.needs_gradient),
        without_autocast(problem.device),
        _without_hooks(),
    ):
        yield


def _without_hooks() -> AbstractContextManager[Any]:
    """Tensors are saved for a backward as they are, without hooks: an activation checkpoint's would run the call again
    from within it, and count what is saved here as part of the call."""
    if not _are_hooks_at_work():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)  # only the innermost act


def _are_hooks_at_work() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _measure(problem: Problem, run: Callable[[], None]) -> float:
    """Median time of a run in µs."""
    # A candidate is measured as it would be used, in a graph or not, and leaves no memory behind.
    launched = nullcontext() if _are_replayed(problem) else graphs.launching()
    with _as_measured(problem), graphs.forgetting(), launched:
        for _ in range(WARM_UP):
            replays, begun = graphs.replays(problem.device), time.perf_counter()
            run()
            told = time.perf_counter() - begun
            wait_for(problem.device)
        is_replayed = graphs.replays(problem.device) > replays
        wait = int(CYCLES * min(told, LONGEST_WAIT)) if is_replayed else 0
        times: list[float] = []
        deadline = time.perf_counter() + SECONDS
        while len(times) < REPETITIONS and (not times or time.perf_counter() < deadline):
            times.append(device_time(run, wait))
    return statistics.median(times)


def device_time(run: Callable[[], Any], wait: int = 0) -> float:
    """The µs between two events on the device, before a run and after it.

    Args:
        run: what is timed, on the current stream.
        wait: clock cycles for which the device sleeps first. Meanwhile Python enqueues the work; otherwise the time of
            a short run would be Python's.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if wait:
        torch.cuda._sleep(wait)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)
