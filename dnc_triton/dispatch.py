"""Which backend serves a call: a table of backends, what each can do, and how one is chosen.

The `backend` argument of the call or layer decides first, then `use_backend`, then the environment variable
DNC_TRITON_BACKEND, then "auto". On a CPU "auto" is plain PyTorch: the sequence operation where it serves, otherwise,
and for a traced single step without gradients, the reference. On CUDA and ROCm it is what measured fastest, on the
first call of a kind (`tuning`). While a CUDA graph is captured, nothing is measured: the fastest that is remembered is
taken, unless the first in rank is not remembered, which then is taken itself. While a graph is traced it is always the
first in rank; with deterministic algorithms too, unless that is known to fail.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import dnc_reference
from dnc_reference import DNCState, MemoryState
from dnc_triton import environment, tuning
from dnc_triton.kernels.layout import (
    MOST_IN_ONE_LAUNCH,
    MOST_SLOTS,
    MOST_SLOTS_IN_FLOAT64,
    Layout,
    layouts,
    sequence_layouts,
)
from dnc_triton.ops.eager import is_transformed
from dnc_triton.ops.kernel_step import kernel_interface_step, kernel_memory_step
from dnc_triton.problem import Problem
from dnc_triton.sequence.stepwise import unroll_stepwise
from dnc_triton.sequence.unroll import unroll_sequence
from dnc_triton.trial import tried_as

SETTLED_BY = (environment.GRAPHS, environment.MEASURE)  # variables that a choice depends on
LEAST_CAPABILITY = (8, 0)
# Looked up once, since it cannot be looked up while a graph is traced.
HAS_TRITON = find_spec("triton") is not None
# The one C++ compiler that PyTorch's compiler looks for.
COMPILER = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
HAS_COMPILER = shutil.which(COMPILER) is not None


@dataclass(frozen=True)
class Backend:
    """One way to compute a DNC.

    Attributes:
        supports: problem → (whether this backend serves it, why or why not).
        unroll: with the signature of `dnc_reference.unroll`, and `checkpoint` as `DNC` has it.
        memory_step, interface_step: with the signatures of those of `dnc_reference`; not used where `supports`
            declines the problem.
        rank: problem → a number; the lowest is taken where nothing was measured.
        layouts: problem → how the work may be split up, the default first. If there are any, the other functions take
            one of them as `layout`.
    """

    supports: Callable[[Problem], tuple[bool, str]]
    unroll: Callable[..., tuple[Tensor, DNCState]]
    memory_step: Callable[..., tuple[Tensor, MemoryState]] = dnc_reference.memory_step
    interface_step: Callable[..., tuple[Tensor, MemoryState]] = dnc_reference.interface_step
    rank: Callable[[Problem], int] = lambda problem: 0
    layouts: Callable[[Problem], list[Layout]] = lambda problem: []

    def with_layout(self, layout: Layout | None, *, stepwise: bool = False) -> Backend:
        """This backend with a fixed layout; if `stepwise`, it unrolls step by step, as parts of the user's own need."""
        if layout is None:
            return self
        unroll, interface_step = partial(self.unroll, layout=layout), partial(self.interface_step, layout=layout)
        if stepwise:
            unroll = partial(unroll_stepwise, interface_step=interface_step)
        memory_step = partial(self.memory_step, layout=layout)
        return replace(self, unroll=unroll, memory_step=memory_step, interface_step=interface_step)


def _sequence_supports(problem: Problem) -> tuple[bool, str]:
    if problem.controller is None:
        return False, "it is a single memory step"
    if problem.trace:
        return False, "a trace is asked for, which the reference keeps step by step"
    if problem.controller == "custom":
        return False, "the controller or another part is the user's own, or has hooks"
    if problem.num_writes > 1:
        return False, f"num_writes is {problem.num_writes}, its backward is written for 1"
    if problem.dtype not in (torch.float32, torch.float64):
        return False, f"dtype is {problem.dtype}, it takes float32 and float64"
    if is_transformed():
        return False, "a transform of torch.func, or torch.jit.trace, is at work"
    return True, "plain PyTorch, with a hand-written backward, which cannot be differentiated again"


def _compiled_supports(problem: Problem) -> tuple[bool, str]:
    supported, reason = _sequence_supports(problem)
    if not supported:
        return supported, reason
    if problem.device.type != "cpu":
        return False, f"device is {problem.device.type}, it is made for the CPU"
    if not HAS_COMPILER:
        return False, f"PyTorch's compiler needs a C++ compiler, and there is no {COMPILER!r} (CXX names another)"
    return True, "as torch_sequence, with a step compiled for its sizes, which takes half a minute the first time"


def _kernels_support(problem: Problem) -> tuple[bool, str]:
    """Limits of the kernels of a step, whether it takes one launch or three (or four, forward)."""
    if problem.trace:
        return False, "a trace is asked for, which the reference keeps step by step"
    limits = (
        ("num_writes", problem.num_writes, 1),
        ("memory_size", problem.memory_size, MOST_SLOTS_IN_FLOAT64 if problem.dtype == torch.float64 else MOST_SLOTS),
        ("word_size", problem.word_size, 256),
        ("num_reads", problem.num_reads, 16),
    )
    for name, value, limit in limits:
        if value > limit:
            return False, f"{name} is {value}, the kernels go up to {limit}"
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return False, f"dtype is {problem.dtype}, the kernels take float32, bfloat16, float16 and float64"
    if is_transformed():
        return False, "a transform of torch.func, or torch.jit.trace, is at work"
    if not HAS_TRITON:
        return False, "Triton is not installed"
    if problem.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return False, "device is the CPU, and TRITON_INTERPRET=1 is not set"
        return True, "interpreted, which is slow: for tests"
    if problem.device.type != "cuda":
        return False, f"device is {problem.device.type}, the kernels run on CUDA and ROCm"
    # Not while a graph is traced: tracing cannot follow this.
    if not torch.compiler.is_compiling() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < LEAST_CAPABILITY:
            return False, f"compute capability is {capability}, the kernels need {LEAST_CAPABILITY}"
    return True, "Triton kernels"


def _fused_supports(problem: Problem) -> tuple[bool, str]:
    slots, most = problem.memory_size, MOST_IN_ONE_LAUNCH
    if slots > most:
        return False, f"memory_size is {slots}, one program per batch element goes up to {most}"
    return _kernels_support(problem)


def _one_launch_supports(problem: Problem) -> tuple[bool, str]:
    supported, reason = _sequence_supports(problem)
    if not supported:
        return supported, reason
    if problem.controller != "lstm":
        return False, f"the controller is {problem.controller!r}, the kernel has an LSTM in it"
    # The sizes up to which it compiled for Hopper without spilling, in float32. With W = 256 it spilled up to 2.6 KB a
    # thread, at every step.
    limits = (("num_layers", 1), ("hidden_size", 128), ("memory_size", MOST_IN_ONE_LAUNCH), ("word_size", 64))
    for name, limit in limits:
        if getattr(problem, name) > limit:
            return False, f"{name} is {getattr(problem, name)}, one launch for a sequence goes up to {limit}"
    return _kernels_support(problem)


def _kernels_rank(problem: Problem, rank: int) -> int:
    """On a CPU the kernels are interpreted: last in rank, for those who ask for them by name."""
    return 9 if problem.device.type == "cpu" else rank


BACKENDS: dict[str, Backend] = {
    "triton_sequence": Backend(
        supports=_one_launch_supports,
        unroll=unroll_sequence,
        rank=lambda problem: _kernels_rank(
            problem, 0 if problem.memory_size <= 32 and problem.hidden_size <= 64 else 3
        ),
        layouts=lambda problem: sequence_layouts(problem.memory_size, problem.word_size),
    ),
    "triton_fused": Backend(
        supports=_fused_supports,
        memory_step=kernel_memory_step,
        interface_step=kernel_interface_step,
        unroll=unroll_sequence,
        rank=lambda problem: _kernels_rank(problem, 1 if problem.memory_size <= 64 else 3),
        layouts=lambda problem: [x for x in layouts(problem.memory_size) if x.fused],
    ),
    "triton_split": Backend(
        supports=_kernels_support,
        memory_step=kernel_memory_step,
        interface_step=kernel_interface_step,
        unroll=unroll_sequence,
        rank=lambda problem: _kernels_rank(problem, 2),
        layouts=lambda problem: [x for x in layouts(problem.memory_size) if not x.fused],
    ),
    "torch_sequence": Backend(
        supports=_sequence_supports,
        unroll=unroll_sequence,
        # A compiler makes more of a single step without a backward where it can see inside what is called.
        rank=lambda problem: (
            6 if torch.compiler.is_compiling() and problem.steps == 1 and not problem.needs_gradient else 4
        ),
    ),
    "torch_compiled": Backend(
        supports=_compiled_supports,
        unroll=partial(unroll_sequence, compiled=True),
        # It compiles for half a minute: only on request.
        rank=lambda problem: 8,
    ),
    "reference": Backend(
        supports=lambda problem: (True, "plain PyTorch: every device, floating dtype, size and controller"),
        unroll=unroll_stepwise,
        rank=lambda problem: 5,
    ),
}


@dataclass(eq=False)  # blocks of the same name must be told apart
class _InUse:
    """A block of `use_backend`."""

    name: str


_in_use: list[_InUse] = []  # shared by all threads: each change to it is one atomic step
_settled: dict[tuple[Any, ...] | None, Backend] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, layers and calls that do not name a backend themselves use this one.

    The setting applies to the whole process, as torch's own backend flags do: other threads see it too. `explain` lists
    the backends, and says which of them serve a layer.

    Args:
        name: a backend's name, or "auto", whatever the environment variable says.

    Raises:
        ValueError: no backend has that name.
    """
    check_backend("name", name)
    block = _InUse(name)
    _in_use.append(block)
    try:
        yield
    finally:
        _in_use.remove(block)  # not always the last: blocks of several threads may overlap


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend for a problem, with its layout.

    Args:
        problem: the call.
        backend: what the call or layer asked for.

    Raises:
        ValueError: no backend has the name that was asked for.
        RuntimeError: the backend asked for by name does not serve this problem, or failed on this device however it
            was cut up; the reason is in the message.
    """
    asked, asked_by = _asked(backend)
    # Every call passes here, on a GPU even every step: a settled choice is not worked out again.
    if (known := _settled.get(_key(problem, asked))) is not None:
        return known
    if asked == "auto":
        serving = _serving(problem)
    else:
        supported, reason = BACKENDS[asked].supports(problem)
        if not supported:
            raise RuntimeError(f"backend {asked!r}, asked for by {asked_by}, does not serve this call: {reason}")
        serving = [asked]
    try:
        (name, layout), settled = _best(problem, serving)
    except tuning.NothingWorks as error:
        raise tuning.NothingWorks(f"backend {asked!r}, asked for by {asked_by}: {error}") from None
    key = _key(problem, asked)  # more may have been measured meanwhile, by other threads too
    settled = settled and key is not None
    if settled:  # the choice among all that the key stands for
        (name, layout), _ = _best(problem, serving, measure=False)
    chosen = BACKENDS[name].with_layout(layout, stepwise=problem.controller == "custom")
    if layout is not None and layout.whole_sequence and _settles(problem):
        chosen = replace(chosen, unroll=partial(chosen.unroll, step_layout=partial(_step_layout, problem)))
    if settled:
        if len(_settled) >= 1000:  # when each call has a new batch size or length
            _settled.clear()
        _settled[key] = chosen
    return chosen


def explain_problem(problem: Problem, backend: str = "auto") -> str:
    """The table of backends for a problem, a line each, with what was measured; the chosen one is starred."""
    asked, asked_by = _asked(backend)
    answers = {name: BACKENDS[name].supports(problem) for name in BACKENDS}
    serving = [name for name in _ranked(problem) if answers[name][0] and asked in ("auto", name)]
    chosen, nothing = None, "the backend asked for by name does not serve this call, which would raise"
    try:
        if serving:
            chosen = _best(problem, serving, measure=False)[0][0]
    except tuning.NothingWorks:
        nothing = "the backend asked for by name failed on this device, and the call would raise"
    lines = [str(problem), f"asked for: {asked!r}, by {asked_by}"]
    for name, (supported, reason) in answers.items():
        measured = [
            (f"{layout.describe()}: " if layout else "")
            + (f"{outcome:.1f} µs" if isinstance(outcome, float) else f"failed: {outcome}")
            for (other, layout), outcome in tuning.remembered(problem).items()
            if other == name
        ]
        lines.append(
            f"{'*' if name == chosen else ' '} {name:<15} {'serves' if supported else 'declines'}: {reason}"
            + (f"; measured per step: {'; '.join(measured)}" if measured else "")
        )
    if chosen is None:
        lines.append(f"nothing runs: {nothing}")
    return "\n".join(lines)


def check_backend(argument: str, name: str) -> None:
    """Raise ValueError, naming the argument, unless a backend has this name."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"{argument}: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def _asked(backend: str) -> tuple[str, str]:
    """Which backend is asked for, and by whom."""
    if backend != "auto":
        check_backend("backend", backend)
        return backend, "the argument backend"
    if latest := _in_use[-1:]:
        return latest[0].name, "use_backend"
    name = os.environ.get(environment.BACKEND) or "auto"
    check_backend(environment.BACKEND, name)
    return name, f"the environment variable {environment.BACKEND}" if name != "auto" else "default"


def _settles(problem: Problem) -> bool:
    """Whether one choice may be made for all calls of a kind."""
    # Tracing is checked first: a traced function may look at neither a file nor a clock.
    return not torch.compiler.is_compiling() and problem.device.type == "cuda" and not is_transformed()


def _key(problem: Problem, asked: str) -> tuple[Any, ...] | None:
    """All that a choice depends on; None where each call must be decided anew."""
    if not _settles(problem):
        return None
    deterministic, measured = torch.are_deterministic_algorithms_enabled(), tuning.measurements()
    return problem, asked, deterministic, measured, *map(os.environ.get, SETTLED_BY)


def _ranked(problem: Problem) -> list[str]:
    """All backends by rank: the first that serves is taken where nothing was measured."""
    return sorted(BACKENDS, key=lambda name: BACKENDS[name].rank(problem))


def _serving(problem: Problem) -> list[str]:
    """The backends that serve, by rank; where each call decides anew, only the first: those behind it are not asked."""
    settles, serving = _settles(problem), []
    for name in _ranked(problem):
        if BACKENDS[name].supports(problem)[0]:
            serving.append(name)
            if not settles:
                break
    return serving


def _best(problem: Problem, serving: list[str], *, measure: bool = True) -> tuple[tuning.Candidate, bool]:
    """The fastest of those that serve, given by rank, with its layout; and whether nothing is left to measure."""
    candidates: list[tuning.Candidate] = []
    for name in serving:
        candidates += [(name, layout) for layout in BACKENDS[name].layouts(problem)] or [(name, None)]
    if not _settles(problem) or candidates == [(serving[0], None)]:  # plain PyTorch alone
        return candidates[0], True
    if torch.are_deterministic_algorithms_enabled():  # layouts differ in their last bits
        return tuning.first_working(problem, candidates), True
    backends = {(name, layout): BACKENDS[name].with_layout(layout) for name, layout in candidates}
    operations = {candidate: getattr(backend, tried_as(problem)) for candidate, backend in backends.items()}
    best = tuning.fastest(problem, operations, measure=measure)
    return best, tuning.is_settled(problem, operations)


def _step_layout(problem: Problem) -> Layout:
    """That of the kernels of a step to which a sequence in one launch hands over: the default, unless it is known to
    fail."""
    candidates = [("triton_fused" if x.fused else "triton_split", x) for x in layouts(problem.memory_size)]
    _, layout = tuning.first_working(problem, candidates)
    assert layout is not None
    return layout
