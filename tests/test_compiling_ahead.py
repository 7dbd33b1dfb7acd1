"""Kernels compile ahead, in threads, and are then those that are launched.

There is no GPU here: kernels compile for a pretended one, in a process of its own, where nothing is interpreted. That
nothing runs is tested in tests/kernels.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from small_layer import PROBLEM
from stand_in import Driver, launch_up_to_running

pytest.importorskip("triton")

import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit
from triton.runtime.jit import JITFunction, KernelInterface

from benchmarks.static.compiling import compiling_map
from dnc_triton import dispatch, trial, tuning
from dnc_triton.kernels import launcher
from dnc_triton.problem import Problem

pytestmark = pytest.mark.usefixtures("_compiled_once")

SMALL = replace(PROBLEM, batch=2, steps=6, num_reads=1)
# Of different sizes, so that all compiles for each: where two problems come to one process, nothing compiles twice.
PROBLEMS = {
    "lstm": SMALL,
    "step": replace(SMALL, controller=None, memory_size=6),
    "gru": replace(SMALL, controller="gru", memory_size=7),
    "two layers": replace(SMALL, num_layers=2, hidden_size=8, memory_size=9),
    "no products of ours": replace(SMALL, batch=65, hidden_size=7, memory_size=10),
    "own controller, bfloat16": replace(SMALL, controller="custom", dtype=torch.bfloat16, memory_size=11),
    "without gradients": replace(SMALL, needs_gradient=False, hidden_size=9, memory_size=12),
    "float64": replace(SMALL, dtype=torch.float64, memory_size=13),
}
BACKENDS = ("triton_sequence", "triton_fused", "triton_split")


def launched_and_compiled(
    problem: Problem, backends: tuple[str, ...] = BACKENDS
) -> tuple[set[str], set[str], set[str], list[str]]:
    """Of a problem's candidates: the kernels that they launch; what compiled ahead, and in which threads; what had to
    compile when it was launched."""
    compiled: list[tuple[str, str]] = []
    launched: set[str] = set()
    compile_it, prepare = JITFunction._do_compile, jit.create_function_from_signature

    def record(kernel: JITFunction, *arguments: object, **keywords: object) -> object:
        compiled.append((kernel.__name__, threading.current_thread().name))
        return compile_it(kernel, *arguments, **keywords)

    def prepare_slowly(*arguments: object) -> object:
        time.sleep(0.1)  # so that two threads that come at once find that nothing is there yet
        return prepare(*arguments)

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> object:
        launched.add(kernel.__name__)
        return launch_up_to_running(kernel, grid)

    triton.runtime.driver.set_active(Driver())
    runs = [trial.Check(problem).launch, trial.random_call(problem, problem.steps)]
    operations = []
    for name in backends:
        backend = dispatch.BACKENDS[name]
        with patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):  # for the dispatcher alone: it is a CPU
            serves, _ = backend.supports(problem)
        for layout in backend.layouts(problem) if serves else []:
            operations.append(((name, layout), getattr(backend.with_layout(layout), trial.tried_as(problem))))
    with (
        patch.object(JITFunction, "_do_compile", record),
        patch.object(jit, "create_function_from_signature", prepare_slowly),
        patch.object(CUDABackend, "make_cubin", lambda *_: b""),  # the assembler takes as long as all before it
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
        patch.object(launcher, "threads", lambda: 2),
    ):
        tuning._compile_ahead(problem, runs, operations)
        before = len(compiled)
        with patch.object(KernelInterface, "__getitem__", launch), tuning._as_measured(problem):
            for _, step in operations:
                for run in runs:
                    run(step)
    names, threads = zip(*compiled[:before], strict=True)
    return launched, set(names), set(threads), [name for name, _ in compiled[before:]]


def check(name: str, found: tuple[set[str], set[str], set[str], list[str]]) -> None:
    launched, compiled, threads, late = found
    assert late == [], name
    assert launched == compiled, name
    assert len(threads) == 2, name
    assert all(thread.startswith("dnc_triton compiling") for thread in threads), name
    assert "step_forward_kernel" in compiled, name


def test_what_compiles_ahead_is_what_is_launched() -> None:
    """All of it, in threads, specialised as for the tensors and numbers of a real launch; and nothing else."""
    split = partial(launched_and_compiled, backends=("triton_split",))  # what compiles fastest
    (found,) = compiling_map(split, [PROBLEMS["lstm"]], jobs=1)
    check("lstm", found)


@pytest.mark.slow
def test_by_every_backend_with_every_controller_and_dtype() -> None:
    for name, found in zip(PROBLEMS, compiling_map(launched_and_compiled, PROBLEMS.values()), strict=True):
        check(name, found)


def test_a_number_that_is_not_specialised_compiles_nothing_more() -> None:
    """The steps of a sequence, which a check and a measurement give by name: other ones are the same kernel."""

    class Kernel:
        do_not_specialize = ("steps",)

        def warmup(self, *_: object, **options: object) -> None:
            compiled.append(options)

    compiled: list[dict[str, object]] = []
    with ThreadPoolExecutor(1) as pool:
        compiling, kernel = launcher.Compiling(pool), Kernel()
        for steps, warps in ((3, 4), (32, 4), (32, 8)):
            compiling.add(kernel, (1,), (torch.zeros(2), 5), dict(steps=steps, num_warps=warps))
    assert [options["num_warps"] for options in compiled] == [4, 8]
