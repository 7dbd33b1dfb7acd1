"""Where every kernel is launched, one after another or overlapping; or compiled ahead instead, several at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor

from dnc_triton.kernels.layout import Layout

# A product and a sum in one instruction, rounded once. Kernels got that without asking; Triton 3.9 warns that from 3.10
# on they will not.
FMA = {"enable_fp_fusion": True}
MOST_THREADS = 8  # more would gain little: the longest kernel takes a fifth of the time of all


class Compiling:
    """Kernels that compile in threads. Triton, LLVM and the assembler let other threads go on meanwhile.

    Args:
        pool: the threads.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.begun: dict[Any, Future[Any]] = {}

    def add(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Begin to compile what this launch needs, unless that has begun."""
        # Triton compiles for types; a dtype counts as a tensor that begins at a multiple of 16 bytes. Numbers do not
        # count, but constants and options do: the kernels ask for no number to be specialized.
        given = [argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments]
        types = tuple(type(x) if isinstance(x, int) else x for x in given)
        numbers = getattr(kernel, "do_not_specialize", None) or ()
        constants = tuple((name, type(x) if name in numbers else x) for name, x in options.items())
        key = kernel, types, constants
        if key not in self.begun:
            from triton.runtime import JITFunction, driver

            if isinstance(kernel, JITFunction):
                # Triton makes what it keeps of a kernel per device at the first use. Two threads that come at once
                # would make it twice, and what one of them compiles would be lost.
                kernel.device_caches[driver.active.get_current_device()]
            self.begun[key] = self.pool.submit(kernel.warmup, *given, grid=grid, **options)


def aligned(tensor: Tensor) -> Tensor:
    """A caller's tensor as the kernels take it, copied if need be.

    Contiguous, with negation resolved (`torch.Tensor.resolve_neg`), and beginning at a multiple of 16 bytes. For any
    other alignment Triton would compile once more: to loads of one number each, which are then spread over several
    threads, whose sums differ (`kernels.common.term`).
    """
    tensor = tensor.resolve_neg().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


class _Launches(local):
    """How this thread launches. Not in context variables: without the global lock a thread inherits its parent's."""

    compiling: Compiling | None = None
    overlap = False


_launches = _Launches()
# Triton 3.7 takes a kernel for loaded while another thread is still loading it (triton-lang/triton#11518).
_one_at_a_time = Lock()


def launch_or_compile(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), or what `compiling_ahead` makes of it."""
    compiling = _launches.compiling
    options |= FMA
    if _launches.overlap:
        options |= {"OVERLAPS": True, "launch_pdl": True}
    if compiling is None:
        with _one_at_a_time:
            kernel[grid](*arguments, **options)
    else:
        compiling.add(kernel, grid, arguments, options)


@contextmanager
def overlapping(layout: Layout | None, device: torch.device) -> Iterator[None]:
    """In the block a launch begins while the one before it ends, if the layout says so and the device can.

    It waits for that one's end before it touches memory (`common.begin`): what is saved is the time until its programs
    have started. NVIDIA calls it programmatic dependent launch, and has it from Hopper on.

    Args:
        layout: of a step, or None.
        device: where the block launches.
    """
    before, _launches.overlap = _launches.overlap, layout is not None and layout.overlaps and can_overlap(device)
    try:
        yield
    finally:
        _launches.overlap = before


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether launches can overlap on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def is_compiling_ahead() -> bool:
    """Whether this thread's launches run nothing."""
    return _launches.compiling is not None


def threads() -> int:
    """How many kernels compile at once."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # on Linux
    return min(MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """In the block launches by this thread run nothing: what they would run is compiled by the end of the block.

    Results of the block are meaningless, since no kernel writes to its buffers. A backward in it must stay in this
    thread (`torch.autograd.set_multithreading_enabled(False)`). What fails to compile fails again when it is launched.

    Args:
        device: to compile for.
    """
    prepare = None
    if device.type == "cuda":  # without a number it is the current one, and a new thread may have another
        prepare = partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device.index)
    with ThreadPoolExecutor(threads(), "dnc_triton compiling", prepare) as pool:
        before, _launches.compiling = _launches.compiling, Compiling(pool)
        try:
            yield
        finally:
            _launches.compiling = before
