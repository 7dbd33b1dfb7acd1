"""The kernels on a GPU: what tests/kernels holds them to in the interpreter, and what only a device has."""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted", allow_module_level=True)

import fuzz
from helpers import as_leaves, assert_same_bits
from parity import Case, Problem, assert_parity, draw, outcome, pick_layout, run_kernels
from test_compiling_ahead import SMALL

# The tests themselves, to be run again here.
# ruff: noqa: F401
from test_kernel_buffers import (
    test_a_state_of_one_element_for_all,
    test_what_is_negated_when_it_is_read,
    test_zeros_of_one_element_for_all,
)
from test_kernel_functions import test_precision, test_ranks_are_the_order_of_a_sort, test_where_there_is_no_number
from test_kernel_goldens import test_cell_rollout, test_memory_rollout, test_memory_step
from test_kernel_kept import (
    test_a_lean_backward_twice,
    test_a_long_sequence_without_gradients_keeps_little,
    test_checkpoints_are_for_the_kernels_of_a_step,
    test_lean_is_full_to_the_last_bit,
    test_links_that_are_not_kept,
)
from test_kernel_layer import (
    test_autocast,
    test_checkpoint,
    test_compile,
    test_from_zeros,
    test_named_in_the_layer,
    test_the_layer,
)
from test_kernel_operator import (
    test_a_gradient_of_one_input,
    test_a_loss_of_one_output,
    test_autocast_changes_nothing,
    test_gradcheck,
    test_no_gradient_wanted,
    test_nothing_is_aliased,
    test_opcheck,
    test_second_derivatives_raise,
    test_used_twice,
    test_what_the_backward_needs_may_not_change,
)
from test_kernel_operator import test_checkpoint as test_checkpointed_step
from test_kernel_operator import test_compile as test_compiled_step
from test_kernel_parity import (
    all_gradients,
    test_each_gradient,
    test_every_layout,
    test_gradients_of_each_output,
    test_limits,
    test_parity,
    test_products_are_not_rounded,
    test_sixteen_bits_are_for_storage,
    test_stopped_usage_gradient,
)
from test_kernel_products import test_a_row_alone_is_the_row_in_a_batch as test_products_of_a_row_alone
from test_kernel_products import (
    test_a_sum_of_several_blocks,
    test_the_cut_changes_no_sum,
    test_weight_gradients,
    test_what_is_added,
)
from test_kernel_products import test_parity as test_products
from test_kernel_products import test_the_layer as test_the_layer_with_small_products
from test_kernel_rollouts import (
    test_a_layer_in_bfloat16,
    test_fifty_steps,
    test_torch_sequence,
    test_torch_sequence_step_by_step,
)
from test_kernel_rows import (
    test_a_nan_is_not_lost,
    test_a_nan_stays_in_its_row,
    test_a_row_alone_is_the_row_in_a_batch,
    test_no_rows,
    test_same_call_same_bits,
)
from test_kernel_sequence import (
    test_a_row_does_not_depend_on_the_others_and_twice_is_the_same,
    test_an_empty_batch,
    test_declines,
    test_float32,
    test_lengths_and_resets_leave_nothing_unwritten,
    test_sizes,
)
from test_kernel_sequence import test_opcheck as test_opcheck_of_the_sequence
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import JITFunction
from two_processes import train_in_two_processes

from benchmarks.modes import aside
from dnc_triton import DNC, memory_step, tuning
from dnc_triton.dispatch import BACKENDS, choose
from dnc_triton.kernels.layout import Layout
from dnc_triton.sequence import graphs
from dnc_triton.trial import Check, random_call

pytestmark = pytest.mark.gpu

each_layout = pytest.mark.parametrize("layout", ["fused", "split"])


def on(device: torch.device, problem: Problem) -> Problem:
    return tree_map(lambda x: x.to(device), problem)


def test_random_problems() -> None:
    assert fuzz.run(10_000, seed=1, engine="gpu") >= 10_000


@each_layout
def test_many_programs_same_bits(layout: str, device: torch.device) -> None:
    """More programs than run at once, time after time."""
    case = Case(512, 64, 32, 4, "float32", layout, "oneplus")
    problem = on(device, draw(case._replace(batch=4)))
    problem = tree_map(lambda x: x.repeat(128, *[1] * (x.dim() - 1)), problem)
    chosen = pick_layout(layout, case.slots)
    first = outcome(run_kernels, problem, layout=chosen)
    assert_same_bits(tree_map(lambda x: x[:4].repeat(128, *[1] * (x.dim() - 1)), first), first, name="all rows alike")
    for _ in range(5):
        assert_same_bits(outcome(run_kernels, problem, layout=chosen), first)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_precision_whatever_is_allowed(precision: str, device: torch.device) -> None:
    """Letting PyTorch round the factors of its products does not affect ours."""
    case = Case(2, 128, 64, 4, "float32", "split", "oneplus")
    problem = draw(case)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        actual = outcome(run_kernels, on(device, problem), layout=pick_layout("split", 128))
    finally:
        torch.set_float32_matmul_precision(before)
    assert_parity(actual, problem)


@pytest.mark.parametrize("backend", ["triton_fused", "triton_split"])
def test_cuda_graph(backend: str, device: torch.device) -> None:
    """Forward and backward are captured once, and computed for other numbers."""
    case = Case(3, 20, 8, 2)
    first, second = (on(device, draw(case._replace(batch=batch))) for batch in (3, 6))
    second = tree_map(lambda x: x[3:], second)
    inputs = as_leaves(first[:2])
    sent_back = tree_map(torch.clone, first.gradients)

    def step() -> Any:
        results = memory_step(*inputs, backend=backend)
        gradients = torch.autograd.grad(tree_leaves(results), tree_leaves(inputs), tree_leaves(sent_back))
        return tree_map(torch.Tensor.detach, results), gradients

    def fill(problem: Problem) -> None:
        with torch.no_grad():
            for place, numbers in zip(tree_leaves((*inputs, sent_back)), tree_leaves(tuple(problem)), strict=True):
                place.copy_(numbers)

    with aside():
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for problem in (second, first, second):
        fill(problem)
        graph.replay()
        replayed = tree_map(torch.clone, captured)
        assert_same_bits(replayed, step())


@each_layout
def test_two_streams(layout: str, device: torch.device) -> None:
    """Launches go to the current stream, and each has its own scratch."""
    chosen = pick_layout(layout, 64)
    problems = [on(device, draw(Case(16, 64, 32, 4, "float32", layout, kind))) for kind in ("oneplus", "activated")]
    expected = [outcome(run_kernels, problem, layout=chosen) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(10):
        results = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(outcome(run_kernels, problem, layout=chosen))
        torch.cuda.synchronize()
        assert_same_bits(results, expected)


@pytest.mark.parametrize("backend", ["triton_sequence", "triton_fused", "triton_split"])
def test_what_compiles_ahead_is_what_is_launched(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward too, which then stays in this thread."""
    compiled, compile_it = [], JITFunction._do_compile

    def record(kernel: JITFunction, *arguments: Any) -> Any:
        compiled.append(threading.current_thread().name)
        return compile_it(kernel, *arguments)

    monkeypatch.setattr(JITFunction, "_do_compile", record)
    problem = replace(SMALL, device=device, memory_size=14)
    run, check, chosen = random_call(problem, problem.steps), Check(problem), BACKENDS[backend]
    candidates = [((backend, x), chosen.with_layout(x).unroll) for x in chosen.layouts(problem)]
    tuning._compile_ahead(problem, [check.launch, run], candidates)
    assert compiled
    assert all(name.startswith("dnc_triton compiling") for name in compiled), compiled
    compiled.clear()
    for _, unroll in candidates:
        check(unroll)
        run(unroll)
    assert not compiled


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 16, "hidden_size": 64},
        {"controller": None, "batch": 4, "memory_size": 192, "word_size": 64},
        {"controller": "custom"},
    ],
    ids=["sequence", "step", "own"],
)
def test_nothing_that_is_measured_is_wrong(
    change: dict,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A first call, with nothing remembered: every candidate is checked on the device, and none is refused."""
    monkeypatch.setenv("DNC_TRITON_MEASURE", "1")
    monkeypatch.setenv("DNC_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "TOTAL_SECONDS", math.inf)
    problem = replace(SMALL, device=device, num_reads=4, **change)
    choose(problem)
    assert not caplog.messages
    outcomes = tuning.remembered(problem)
    serving = [(name, backend) for name, backend in BACKENDS.items() if backend.supports(problem)[0]]
    expected = {(name, layout) for name, backend in serving for layout in backend.layouts(problem)}
    assert len(expected) >= 3
    assert {candidate for candidate in outcomes if candidate[1] is not None} == expected
    assert all(isinstance(outcome, float) for outcome in outcomes.values()), outcomes


def test_python_is_no_part_of_what_a_replay_takes(device: torch.device) -> None:
    dnc = DNC(4, 4, 4, memory_size=4, word_size=4, device=device, backend="triton_fused")
    inputs = torch.zeros(1, 4, 4, device=device)

    def run() -> None:
        time.sleep(0.005)
        with torch.no_grad():
            dnc(inputs)

    # The least of three: beside other processes, as in `make gpu`, their kernels may come in between.
    replayed = min(tuning._measure(dnc.problem(inputs), run) for _ in range(3))
    with graphs.launching():
        launched = tuning._measure(dnc.problem(inputs), run)
    assert launched > 5000  # µs
    assert 0 < replayed < launched / 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@each_layout
def test_on_a_device_that_is_not_the_current_one(layout: str) -> None:
    case = Case(2, 20, 8, 2, "float32", layout, "oneplus")
    problem = draw(case)
    chosen = pick_layout(layout, case.slots)
    with torch.cuda.device(0):
        actual = outcome(run_kernels, on(torch.device("cuda", 1), problem), layout=chosen)
    assert {tensor.device.index for tensor in tree_leaves(actual)} == {1}
    assert_parity(actual, problem)
    with torch.cuda.device(1):
        assert_same_bits(outcome(run_kernels, on(torch.device("cuda", 1), problem), layout=chosen), actual)


@pytest.mark.parametrize("backend", ["triton_sequence", "triton_fused", "triton_split", "torch_sequence"])
def test_two_processes_have_the_gradients_of_one(backend: str, tmp_path: Path) -> None:
    """On a GPU each, or both on the only one."""
    train_in_two_processes(backend, "cuda", tmp_path)


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    """The links of all rows together; what is computed of the last row is what is computed of it alone."""
    slots, batch = 1024, 2**31 // 1024**2 + 8
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    layout = Layout(False, 32, 32, 8)
    few = on(device, draw(Case(1, slots, 4, 1, "bfloat16", "split", "oneplus")))
    many = tree_map(lambda x: x.expand(batch, *x.shape[1:]).contiguous(), few[:2])
    with torch.no_grad():
        actual, expected = run_kernels(*many, layout=layout), run_kernels(*few[:2], layout=layout)
    assert actual[1].link.numel() > 2**31
    for row in (0, batch // 2, batch - 1):
        assert_same_bits(tree_map(lambda x, row=row: x[row : row + 1], actual), expected, name=f"row {row}")
