"""From a case to its code: the kernel, its constants and types, and processes in which kernels compile."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
import triton
from triton.compiler import ASTSource

from benchmarks.static.cases import CONTROLLER, FEATURES, TARGETS, TRITON_TYPES, Case, tiles_of, weight_tiles
from dnc_triton.kernels import gradients
from dnc_triton.kernels.gradients import weight_gradients_kernel
from dnc_triton.kernels.launcher import FMA
from dnc_triton.kernels.lstm import BLOCK, lstm_backward_kernel, lstm_forward_kernel
from dnc_triton.kernels.products import (
    block_of,
    lstm_product_backward_kernel,
    lstm_product_forward_kernel,
    product_kernel,
)
from dnc_triton.kernels.sequence import ControllerSizes, sequence_backward_kernel, sequence_forward_kernel
from dnc_triton.kernels.sizes import TRITON_DTYPES
from dnc_triton.kernels.step import step_backward_kernel, step_forward_kernel
from dnc_triton.kernels.step_launch import compile_options, is_capped

Item = TypeVar("Item")
Result = TypeVar("Result")

# Pointers to other than floating point numbers.
POINTERS = {"free_list_ptr": "*i32", "lengths_ptr": "*i32", "reset_ptr": "*u8", "marks_ptr": "*u8"}
WEIGHTS = ("recurrent_ptr", "interface_weight_ptr", "recurrent_t_ptr", "interface_weight_t_ptr")


def compile_case(case: Case) -> tuple[dict[str, Any], int]:
    """The code at each stage of the compilation, and the bytes of shared memory."""
    kernel, constants = _kernel(case)
    if "OVERLAPS" in kernel.arg_names:
        constants["OVERLAPS"] = case.overlaps
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if not name.endswith("_ptr"):
            signature[name] = "i32"
            continue
        widened = "float64" if case.dtype == "float64" else "float32"
        dtype = TRITON_TYPES[widened if name in ("kept_ptr", "scratch_ptr") else case.dtype]
        if case.variant == "autocast" and name in WEIGHTS:
            dtype = TRITON_TYPES["bfloat16"]
        signature[name] = POINTERS.get(name, f"*{dtype}")
        # At a launch tensors begin at multiples of 16 bytes, except where the kernel says that they need not.
        if not kernel.params[position].do_not_specialize_on_alignment:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[case.target],
        options=compile_options(
            case.layout,
            case.num_warps,
            backward=case.direction == "backward",
            capped=case.direction == "backward"
            and case.phase not in CONTROLLER
            and is_capped(case.launch, getattr(torch, case.dtype)),
            hip=case.target.startswith("gfx"),
        )
        | FMA
        | ({"launch_pdl": True} if case.overlaps else {}),
    )
    return compiled.asm, compiled.metadata.shared


def _kernel(case: Case) -> tuple[triton.JITFunction, dict[str, Any]]:
    """The kernel and its constants."""
    forward = case.direction == "forward"
    clip, max_gradient = (None, None) if case.variant == "unclipped" else (20.0, 10.0)
    constants: dict[str, Any]
    if case.phase == "sequence":
        sizes, words = case.launch.sizes, case.shape[1] * case.shape[2]
        kernel = sequence_forward_kernel if forward else sequence_backward_kernel
        bounds = dict(clip=clip, max_gradient=None if forward else max_gradient, compute=case.compute)
        controller = ControllerSizes.of(case.hidden_size, words, sizes.INTERFACE, case.layout, **bounds)
        absent = {f"{name}_ptr": None for name in ("lengths", "reset") if name not in case.variant}
        return kernel, dict(absent, sizes=sizes, controller=controller)
    if case.phase not in CONTROLLER:
        kernel, launch = step_forward_kernel if forward else step_backward_kernel, case.launch
        constants = {} if case.variant == "marked" else dict(marks_ptr=None, zeros_ptr=None)
        return kernel, dict(constants, PHASE=launch.phase, sizes=launch.sizes)
    if case.phase == "weights":
        return weight_gradients_kernel, _weights(case)
    if case.phase == "lstm":
        kernel = lstm_forward_kernel if forward else lstm_backward_kernel
        constants = dict(H=case.hidden_size, BLOCK=BLOCK)
    else:
        kernel, constants = _small_product(case)
    if case.phase != "product":
        constants |= dict(COMPUTE=TRITON_DTYPES[case.compute], CLIP=clip)
        constants |= {} if forward else dict(MAX_GRADIENT=max_gradient)
    return kernel, constants


def _weights(case: Case) -> dict[str, Any]:
    _, word, reads = case.shape
    sizes = dict(H=case.hidden_size, F=case.hidden_size + word * reads, S=case.interface_size)
    return dict(sizes, INPUTS=FEATURES, OUTPUTS=FEATURES, BLOCK=gradients.BLOCK, ENDS=weight_tiles(case))


def _small_product(case: Case) -> tuple[triton.JITFunction, dict[str, Any]]:
    """The kernel, and its constants except those of its arithmetic."""
    _, word, reads = case.shape
    below, size, vector, tiles = word * reads, case.hidden_size, case.interface_size, tiles_of(case)
    constants: dict[str, Any]
    if case.phase == "lstm product" and case.direction == "forward":
        kernel, constants, longest = lstm_product_forward_kernel, dict(BELOW=below, H=size), max(below, size)
    elif case.phase == "lstm product":
        kernel, constants, longest = lstm_product_backward_kernel, dict(K=vector, H=size), vector
    elif case.direction == "forward":  # the interface vector
        absent = dict(addend_ptr=None, second_out_ptr=None)
        kernel, constants, longest = product_kernel, dict(K=size, OUT=vector, SECOND_OUT=0, ADD=False, **absent), size
    else:
        wide = dict(K=4 * size, OUT=below, SECOND_OUT=size, ADD=False, bias_ptr=None)
        kernel, constants, longest = product_kernel, wide, 4 * size
    block = block_of(longest, tiles.block, itemsize=4)
    return kernel, dict(constants, ROWS=tiles.rows, BLOCK=block, BATCH=tiles.batch, AT_ONCE=tiles.at_once)


def compiling_map(function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int = 2) -> Generator[Result]:
    """Map a function over items, in order, in processes in which kernels compile.

    In one started with TRITON_INTERPRET=1, as that of the tests is, they do not.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(function, items)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
