"""Which candidate is the fastest, measured once and remembered: in the process, and in the user's cache directory.

A problem is remembered by its bucket: the device's model, the versions of what generates code, dtype, N, W, R, K,
whether gradients are needed, and B rounded up to a power of two. T does not matter: a step is measured. Each bucket has
a file of its own, written whole or not at all, so that any number of processes may measure at once; what is in a file
that cannot be understood is measured again.

Environment variables: DNC_TRITON_MEASURE=0 switches measuring off (the first candidate is taken, unless something is
remembered), DNC_TRITON_CACHE names another directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnc_reference import Interface, MemoryState
from dnc_triton.kernels.layout import Layout
from dnc_triton.problem import Problem

Candidate = tuple[str, Layout | None]
Step = Callable[..., tuple[Tensor, MemoryState]]

FORMAT = 1
WARM_UP = 3  # calls, the first of which compiles
REPETITIONS = 15
SECONDS = 1.0  # per candidate, compilation not counted
TOTAL_SECONDS = 60.0  # compilation counted; candidates that are not reached are not chosen

logger = logging.getLogger("dnc_triton")
_known: dict[str, list[tuple[str, Layout | None, float]]] = {}


def fastest(problem: Problem, steps: Mapping[Candidate, Step], *, measure: bool = True) -> Candidate:
    """The fastest candidate for a problem: remembered, else measured, else the first.

    Args:
        problem: the call.
        steps: candidate → its `memory_step`, in the order of preference.
        measure: whether to measure what is not remembered. It is not done while a CUDA graph is captured, nor with
            DNC_TRITON_MEASURE=0.

    Returns:
        one of the candidates.
    """
    times = [row for row in remembered(problem) if row[:2] in steps]
    # What is remembered may know fewer candidates: somebody had named one, say. Then all are measured again.
    if {row[:2] for row in times} != set(steps):
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not measure or capturing or os.environ.get("DNC_TRITON_MEASURE") == "0":
            return next(iter(steps))
        times = _measure_all(problem, steps)
        _remember(problem, times)
    return min(times, key=lambda row: row[2])[:2]


def remembered(problem: Problem) -> list[tuple[str, Layout | None, float]]:
    """What was measured for a problem: backend, layout, µs per step (infinite if it failed). Empty if nothing was."""
    if problem.device.type != "cuda":
        return []
    bucket = _bucket(problem)
    if bucket not in _known:
        times = _read(_path(bucket), bucket)
        if not times:
            return []
        _known[bucket] = times
    return _known[bucket]


def cache_directory() -> Path:
    """Where measurements are kept: $DNC_TRITON_CACHE, else dnc_triton in the user's cache directory."""
    named = os.environ.get("DNC_TRITON_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dnc_triton"


def _bucket(problem: Problem) -> str:
    """The key under which a problem is remembered."""
    import triton

    key = {
        "device": torch.cuda.get_device_name(problem.device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "format": FORMAT,
        "dtype": str(problem.dtype),
        "batch": 1 << max(0, problem.batch - 1).bit_length(),
        "memory_size": problem.memory_size,
        "word_size": problem.word_size,
        "num_reads": problem.num_reads,
        "num_writes": problem.num_writes,
        "needs_gradient": problem.needs_gradient,
    }
    return json.dumps(key, sort_keys=True)


def _path(bucket: str) -> Path:
    return cache_directory() / f"{hashlib.sha256(bucket.encode()).hexdigest()[:32]}.json"


def _read(path: Path, bucket: str) -> list[tuple[str, Layout | None, float]]:
    try:
        record = json.loads(path.read_text())
        if record["bucket"] != bucket:
            return []
        return [
            (str(name), None if layout is None else Layout(*layout), float(microseconds))
            for name, layout, microseconds in record["times"]
        ]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measure again
        return []


def _remember(problem: Problem, times: list[tuple[str, Layout | None, float]]) -> None:
    bucket = _bucket(problem)
    _known[bucket] = times
    path = _path(bucket)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump({"bucket": bucket, "times": times}, file)
        os.replace(file.name, path)
    except OSError as error:  # a read-only home, a full disk: the process still remembers
        logger.warning("cannot keep the measured times in %s: %s", path.parent, error)


def _measure_all(problem: Problem, steps: Mapping[Candidate, Step]) -> list[tuple[str, Layout | None, float]]:
    started = time.perf_counter()
    call = _random_call(problem)
    times = []
    for (name, layout), step in steps.items():
        late = time.perf_counter() - started > TOTAL_SECONDS
        times.append((name, layout, float("inf") if late else _measure(step, *call)))
    name, layout, microseconds = min(times, key=lambda row: row[2])
    logger.info(
        "measured %d candidates for %s in %.1f s: %s %s with %.1f µs per step",
        len(times),
        problem,
        time.perf_counter() - started,
        name,
        tuple(layout) if layout else "",
        microseconds,
    )
    return times


def _random_call(problem: Problem) -> tuple[Interface, MemoryState, bool]:
    """A step of this size, on random data, never the caller's."""
    batch = 1 << max(0, problem.batch - 1).bit_length()
    generator = torch.Generator(problem.device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.rand(shape, generator=generator, device=problem.device, dtype=torch.float32)
        return drawn.to(problem.dtype)

    sizes = (problem.word_size, problem.num_reads, problem.num_writes)
    interface = {name: draw(shape) for name, shape in Interface.shapes(batch, *sizes).items()}
    shapes = MemoryState.shapes(batch, problem.memory_size, *sizes)
    # Weights that sum to less than 1 keep the state in its range.
    state = {name: draw(shape) / problem.memory_size for name, shape in shapes.items()}
    tensors = [*interface.values(), *state.values()]
    for tensor in tensors:
        tensor.requires_grad_(problem.needs_gradient)
    return Interface(**interface), MemoryState(**state), problem.needs_gradient


def _measure(step: Step, interface: Interface, state: MemoryState, needs_gradient: bool) -> float:
    """Median time of a step in µs, of its backward too if it is needed; infinite if it does not fit into memory."""

    def call() -> None:
        with torch.set_grad_enabled(needs_gradient), torch.inference_mode(False):
            read_words, new_state = step(interface, state, stop_usage_gradient=False)
            if needs_gradient:
                outputs: list[Any] = [read_words, *new_state]
                torch.autograd.grad(outputs, [*interface, *state], [torch.ones_like(output) for output in outputs])

    try:
        with torch.cuda.device(state.memory.device):
            for _ in range(WARM_UP):
                call()
            torch.cuda.synchronize()
            times: list[float] = []
            deadline = time.perf_counter() + SECONDS
            while len(times) < REPETITIONS and (not times or time.perf_counter() < deadline):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(1000 * start.elapsed_time(end))
    except torch.OutOfMemoryError:
        return float("inf")
    return statistics.median(times)
