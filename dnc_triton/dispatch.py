"""Which backend serves a call: one table, what each entry can do, and how one is chosen.

Who is asked first: the `backend` argument of the call or layer, then `use_backend`, then the environment variable
DNC_TRITON_BACKEND, then "auto", which takes the first entry of the table that serves the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import dnc_reference
from dnc_reference import DNCState, MemoryState

ENVIRONMENT_VARIABLE = "DNC_TRITON_BACKEND"


@dataclass(frozen=True)
class Problem:
    """What a backend is asked to do; everything that may decide whether it can.

    Attributes:
        device, dtype: of the state.
        batch, steps: B, and T, which is 1 for a single memory step.
        memory_size, word_size, num_reads, num_writes: N, W, R, K.
        controller: "lstm", "gru", "rnn", "feedforward", "custom"; None for a memory step by itself.
        needs_gradient: whether a backward pass may follow.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    steps: int
    memory_size: int
    word_size: int
    num_reads: int
    num_writes: int
    controller: str | None
    needs_gradient: bool

    def __str__(self) -> str:
        what = "memory step" if self.controller is None else f"sequence, {self.controller} controller"
        return (
            f"{what}, {self.device}, {str(self.dtype).removeprefix('torch.')}, B={self.batch}, T={self.steps}, "
            f"N={self.memory_size}, W={self.word_size}, R={self.num_reads}, K={self.num_writes}, "
            f"{'with' if self.needs_gradient else 'without'} gradients"
        )


@dataclass(frozen=True)
class Backend:
    """One way to compute a DNC.

    Attributes:
        supports: problem → (whether this backend serves it, why or why not).
        memory_step: with the signature of `dnc_reference.memory_step`.
        unroll: with the signature of `dnc_reference.unroll`.
    """

    supports: Callable[[Problem], tuple[bool, str]]
    memory_step: Callable[..., tuple[Tensor, MemoryState]]
    unroll: Callable[..., tuple[Tensor, DNCState]]


# Best first. The last one serves everything.
BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        supports=lambda problem: (True, "plain PyTorch: every device, floating dtype, size and controller"),
        memory_step=dnc_reference.memory_step,
        unroll=dnc_reference.unroll,
    ),
}

_in_use: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that do not name a backend themselves use this one.

    The setting is the process's, as torch's own backend flags are: other threads see it too.

    Args:
        name: a backend's name, or "auto".

    Raises:
        ValueError: no backend has that name.
    """
    check_backend("name", name)
    _in_use.append(name)
    try:
        yield
    finally:
        _in_use.pop()


def choose(problem: Problem, backend: str = "auto") -> Backend:
    """The backend for a problem.

    Args:
        problem: the call.
        backend: what the call or layer asked for.

    Raises:
        ValueError: no backend has the name that was asked for.
        RuntimeError: the backend asked for by name does not serve this problem; its reason is in the message.
    """
    name, asked_by = _asked(backend)
    if name != "auto":
        supported, reason = BACKENDS[name].supports(problem)
        if not supported:
            raise RuntimeError(f"backend {name!r}, asked for by {asked_by}, does not serve this call: {reason}")
        return BACKENDS[name]
    return next(candidate for candidate in BACKENDS.values() if candidate.supports(problem)[0])


def explain_problem(problem: Problem, backend: str = "auto") -> str:
    """The table of backends for a problem, one line each: the chosen one is starred."""
    name, asked_by = _asked(backend)
    answers = {candidate: BACKENDS[candidate].supports(problem) for candidate in BACKENDS}
    chosen = next(candidate for candidate in BACKENDS if answers[candidate][0]) if name == "auto" else name
    lines = [str(problem), f"asked for: {name!r}, by {asked_by}"]
    for candidate, (supported, reason) in answers.items():
        star = "*" if candidate == chosen and supported else " "
        lines.append(f"{star} {candidate:<12} {'serves' if supported else 'declines'}: {reason}")
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
    if _in_use:
        return _in_use[-1], "use_backend"
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    check_backend(ENVIRONMENT_VARIABLE, name)
    return name, f"the environment variable {ENVIRONMENT_VARIABLE}" if name != "auto" else "default"
