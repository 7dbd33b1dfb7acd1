"""Launching the memory step: how it is cut up into programs, its buffers, and the launches themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.layout import Layout
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
    compute = torch.promote_types(memory.dtype, torch.float32)
    result = StepResult(
        read_words=memory.new_empty(batch, num_reads, word),
        memory=torch.empty_like(memory),
        usage=torch.empty_like(usage),
        link=torch.empty_like(link),
        precedence=torch.empty_like(precedence),
        read_weights=torch.empty_like(read_weights),
        write_weights=torch.empty_like(write_weights),
        kept=memory.new_empty((batch, (2 + 3 * num_reads) * slots), dtype=compute),
        free_list=memory.new_empty((batch, slots), dtype=torch.int32),
    )
    blocks = triton.cdiv(slots, layout.rows)
    scratch = memory.new_empty((batch, blocks * num_reads * slots), dtype=compute)
    for phase, grid in _launches(batch, blocks, layout):
        step_forward_kernel[grid](
            interface,
            *state,
            *result,
            scratch,
            **_sizes(slots, word, num_reads, layout),
            RAW=raw,
            STRENGTH_OFFSET=strength_offset,
            COMPUTE=_COMPUTE[compute],
            PHASE=phase,
            num_warps=layout.num_warps,
        )
    return result


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
    batch, slots, word = memory.shape
    num_reads = read_weights.shape[1]
    blocks = triton.cdiv(slots, layout.rows)
    gradient = StepGradient(torch.empty_like(interface), *(torch.empty_like(tensor) for tensor in state))
    scratch_size = (3 + 4 * num_reads) * slots + blocks * (2 + num_reads) * (slots + word)
    scratch = memory.new_empty((batch, scratch_size), dtype=kept.dtype)
    for phase, grid in _launches(batch, blocks, layout):
        step_backward_kernel[grid](
            interface,
            *state,
            memory,
            usage,
            read_weights,
            write_weights,
            kept,
            free_list,
            *gradients,
            *gradient,
            scratch,
            **_sizes(slots, word, num_reads, layout),
            RAW=raw,
            STRENGTH_OFFSET=strength_offset,
            STOP_USAGE_GRADIENT=stop_usage_gradient,
            COMPUTE=_COMPUTE[kept.dtype],
            PHASE=phase,
            num_warps=layout.num_warps,
        )
    return gradient


_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _sizes(slots: int, word: int, num_reads: int, layout: Layout) -> dict[str, int]:
    return {
        "N": slots,
        "W": word,
        "R": num_reads,
        "BLOCK_N": max(16, triton.next_power_of_2(slots)),
        "BLOCK_W": max(16, triton.next_power_of_2(word)),
        "BLOCK_R": max(16, triton.next_power_of_2(num_reads)),
        "ROWS": layout.rows,
        "COLUMNS": layout.columns,
    }


def _launches(batch: int, blocks: int, layout: Layout) -> list[tuple[int, tuple[int, ...]]]:
    """Phase and grid of each launch; none for an empty batch."""
    if batch == 0:
        return []
    if layout.fused:
        return [(WHOLE.value, (batch,))]
    return [(FIRST.value, (batch,)), (MIDDLE.value, (batch, blocks)), (LAST.value, (batch,))]
