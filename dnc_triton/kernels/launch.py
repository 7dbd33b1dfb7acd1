"""Launching the memory step: how it is cut up into programs, its buffers, and the launches themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.layout import Layout, kept_shapes
from dnc_triton.kernels.step import FIRST, LAST, MIDDLE, WHOLE, step_backward_kernel, step_forward_kernel


class StepResult(NamedTuple):
    """What the forward returns: the step's results, and what the backward wants to have kept."""

    read_words: Tensor
    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor
    kept: Tensor
    free_list: Tensor


class StepGradient(NamedTuple):
    """What the backward returns: gradients of the interface vector and of the state before the step."""

    interface: Tensor
    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor


def step_forward(
    interface: Tensor, state: tuple[Tensor, ...], *, num_reads: int, raw: bool, strength_offset: float, layout: Layout
) -> StepResult:
    """Launch the forward.

    Args:
        interface: [B, S], laid out as `dnc_reference.interface.interface_sizes` has it.
        state: the fields of `MemoryState` in order, contiguous.
        num_reads: R.
        raw: the interface is not activated yet.
        strength_offset: what raw strengths get on top of softplus: 1 for oneplus, 0 for softplus.
        layout: how to cut the step up.
    """
    memory, usage, link, precedence, read_weights, write_weights = state
    batch, slots, word = memory.shape
    kept, free_list = kept_shapes(batch, slots, num_reads)
    result = StepResult(
        read_words=memory.new_empty(batch, num_reads, word),
        memory=torch.empty_like(memory),
        usage=torch.empty_like(usage),
        link=torch.empty_like(link),
        precedence=torch.empty_like(precedence),
        read_weights=torch.empty_like(read_weights),
        write_weights=torch.empty_like(write_weights),
        kept=memory.new_empty(kept, dtype=_compute_dtype(memory)),
        free_list=memory.new_empty(free_list, dtype=torch.int32),
    )
    launch_forward(
        interface,
        state,
        result,
        forward_scratch(memory, num_reads, layout),
        raw=raw,
        strength_offset=strength_offset,
        layout=layout,
    )
    return result


def forward_scratch(memory: Tensor, num_reads: int, layout: Layout) -> Tensor:
    """Work space of `launch_forward`."""
    batch, slots, _ = memory.shape
    blocks = triton.cdiv(slots, layout.rows) + triton.cdiv(slots, layout.columns)
    return memory.new_empty((batch, blocks * num_reads * slots), dtype=_compute_dtype(memory))


def launch_forward(
    interface: Tensor,
    state: tuple[Tensor, ...],
    result: StepResult,
    scratch: Tensor,
    *,
    raw: bool,
    strength_offset: float,
    layout: Layout,
    replay: bool = False,
    marks: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Launch the forward into buffers that are there already.

    Args:
        interface, state, raw, strength_offset, layout: as in `step_forward`.
        result: where everything goes, contiguous.
        scratch: as `forward_scratch` makes it.
        replay: only the middle phase, which writes memory and link, with the write weights that `result` has.
        marks: [B] uint8, of FRESH and ENDED, or None. Of what has ended memory and link stay, and all else is nobody's.
        zeros: as many as `count_zeros` says, with marks.
    """
    memory = state[0]
    batch, slots, word = memory.shape
    num_reads = result.read_words.shape[1]
    for launch in launches(batch, slots, word, num_reads, layout, only_middle=replay):
        step_forward_kernel[launch.grid](
            interface,
            *state,
            *result,
            scratch,
            marks,
            zeros,
            **launch.sizes,
            RAW=raw,
            STRENGTH_OFFSET=strength_offset,
            COMPUTE=_COMPUTE[scratch.dtype],
            PHASE=launch.phase,
            **compile_options(layout, launch.num_warps),
        )


def count_zeros(slots: int, word: int, num_reads: int) -> int:
    """How many zeros stand for any field of a state, for one batch element."""
    return slots * max(slots, word, num_reads)


def step_backward(
    interface: Tensor,
    state: tuple[Tensor, ...],
    *,
    memory: Tensor,
    usage: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    kept: Tensor,
    free_list: Tensor,
    gradients: tuple[Tensor, ...],
    raw: bool,
    strength_offset: float,
    stop_usage_gradient: bool,
    layout: Layout,
) -> StepGradient:
    """Launch the backward.

    Args:
        interface, state, raw, strength_offset, layout: as they went into `step_forward`.
        memory, usage, read_weights, write_weights, kept, free_list: of the result that it returned.
        gradients: of the read words and of the fields of the new `MemoryState`, contiguous.
        stop_usage_gradient: as in `memory_step`.
    """
    gradient = StepGradient(torch.empty_like(interface), *(torch.empty_like(tensor) for tensor in state))
    launch_backward(
        interface,
        state,
        (memory, usage, read_weights, write_weights, kept, free_list),
        gradients,
        gradient,
        backward_scratch(memory, read_weights.shape[1], layout),
        raw=raw,
        strength_offset=strength_offset,
        stop_usage_gradient=stop_usage_gradient,
        layout=layout,
    )
    return gradient


def backward_scratch(memory: Tensor, num_reads: int, layout: Layout) -> Tensor:
    """Work space of `launch_backward`."""
    batch, slots, word = memory.shape
    rows, columns = triton.cdiv(slots, layout.rows), triton.cdiv(slots, layout.columns)
    blocks = triton.cdiv(slots, piece_sizes(slots, word, num_reads, layout, layout.num_warps)["SLOTS"])
    by_slot = 1 + 4 * num_reads + columns * (1 + num_reads) + rows * (2 + num_reads)
    size = by_slot * slots + blocks * (2 + num_reads) * word
    return memory.new_empty((batch, size), dtype=_compute_dtype(memory))


def launch_backward(
    interface: Tensor,
    state: tuple[Tensor, ...],
    result: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    gradient: StepGradient,
    scratch: Tensor,
    *,
    raw: bool,
    strength_offset: float,
    stop_usage_gradient: bool,
    layout: Layout,
    marks: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Launch the backward into buffers that are there already.

    Args:
        interface, state, raw, strength_offset, stop_usage_gradient, layout: as in `step_backward`.
        result: of the forward: memory, usage, read weights, write weights, `kept` and `free_list`.
        gradients: as in `step_backward`; not where `gradient` goes.
        gradient: where everything goes, contiguous.
        scratch: as `backward_scratch` makes it.
        marks, zeros: as in `launch_forward`, LOST as well. Of what has ended no gradient by the state is written.
    """
    batch, slots, word = state[0].shape
    num_reads = gradients[0].shape[1]
    for launch in launches(batch, slots, word, num_reads, layout, backward=True):
        step_backward_kernel[launch.grid](
            interface,
            *state,
            *result,
            *gradients,
            *gradient,
            scratch,
            marks,
            zeros,
            **launch.sizes,
            RAW=raw,
            STRENGTH_OFFSET=strength_offset,
            STOP_USAGE_GRADIENT=stop_usage_gradient,
            COMPUTE=_COMPUTE[scratch.dtype],
            PHASE=launch.phase,
            **compile_options(layout, launch.num_warps),
        )


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of the arithmetic."""
    return torch.promote_types(tensor.dtype, torch.float32)


_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


class Launch(NamedTuple):
    """One launch of a step.

    Attributes:
        phase: which, or all.
        grid: of programs.
        num_warps: per program.
        sizes: the kernel's constants.
    """

    phase: int
    grid: tuple[int, ...]
    num_warps: int
    sizes: dict[str, int]


@lru_cache(maxsize=256)  # asked at every step of a sequence
def launches(
    batch: int,
    slots: int,
    word: int,
    num_reads: int,
    layout: Layout,
    *,
    backward: bool = False,
    only_middle: bool = False,
) -> tuple[Launch, ...]:
    """The launches of a step in one direction, in order; none for an empty batch."""
    if batch == 0:
        return ()

    def launch(phase: int, num_warps: int, count: Callable[[dict[str, int]], int]) -> Launch:
        sizes = piece_sizes(slots, word, num_reads, layout, num_warps)
        return Launch(phase, (batch, count(sizes)), num_warps, sizes)

    if layout.fused and not only_middle:
        return (launch(WHOLE.value, layout.num_warps, lambda sizes: 1),)
    tiles = triton.cdiv(slots, layout.rows) * triton.cdiv(slots, layout.columns)
    middle = launch(MIDDLE.value, layout.num_warps, lambda sizes: tiles + triton.cdiv(slots, sizes["SLOTS"]))
    if only_middle:
        return (middle,)
    # Of the phases around it, which wait for memory more than they compute.
    first = launch(FIRST.value, 8, lambda sizes: 1)
    warps = min(16, max(4, triton.next_power_of_2(slots) // 64))
    last = launch(LAST.value, warps, lambda sizes: triton.cdiv(word, sizes["PLACES"]) + backward * num_reads)
    return first, middle, last


def piece_sizes(slots: int, word: int, num_reads: int, layout: Layout, num_warps: int) -> dict[str, int]:
    """A kernel's constants: the sizes of a step, and of the pieces that a program of so many warps takes at once.

    Those keep 32 numbers in a thread's registers, 64 where nothing else is there.
    """
    block_n, block_w = (max(16, triton.next_power_of_2(size)) for size in (slots, word))
    block_r, numbers = triton.next_power_of_2(num_reads), 32 * 32 * num_warps
    written = min(block_n, max(1, 16 * 32 * layout.num_warps // block_w))  # which all phases must agree on
    return {
        "N": slots,
        "W": word,
        "R": num_reads,
        "BLOCK_N": block_n,
        "BLOCK_W": block_w,
        "BLOCK_R": block_r,
        "ROWS": layout.rows,
        "COLUMNS": layout.columns,
        "SLOTS": written,
        "HEADS": min(block_r, max(1, numbers // max(layout.rows * layout.columns, block_n * block_w))),
        "CHUNK": min(block_n, max(1, 2 * numbers // block_w)),
        "PLACES": min(block_w, max(4, 4 * numbers // (block_n * max(4, block_r)))),
    }


def compile_options(
    layout: Layout, num_warps: int, *, backward: bool = False, hip: bool = torch.version.hip is not None
) -> dict[str, int]:
    """What Triton is told of how to compile a kernel.

    A whole sequence may have every register: NVIDIA's assembler would rather spill than give up room for a second
    program beside this one, which there seldom is. Not its backward with 8 warps, where being told so makes it spill.
    """
    options = {"num_warps": num_warps}
    if layout.whole and not hip and not (backward and num_warps == 8):
        options["maxnreg"] = 255
    return options
