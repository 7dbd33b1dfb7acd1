"""Launching the memory step: how it is cut up into programs, its buffers, and the launches themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels.buffers import GRADIENT, LINK, MEMORY
from dnc_triton.kernels.launcher import launch_or_compile, overlapping
from dnc_triton.kernels.layout import Layout, compute_dtype, is_shared, kept_shapes
from dnc_triton.kernels.sizes import Sizes
from dnc_triton.kernels.step import FIRST, LAST, MIDDLE, RANK, WHOLE, step_backward_kernel, step_forward_kernel


class StepResult(NamedTuple):
    """What the forward returns: the step's results, and what is kept for the backward."""

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
        strength_offset: what is added to the softplus of raw strengths: 1 for oneplus, 0 for softplus.
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
        kept=memory.new_empty(kept, dtype=compute_dtype(memory.dtype)),
        free_list=memory.new_empty(free_list, dtype=torch.int32),
    )
    with overlapping(layout, memory.device):
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
    batch, slots, word = memory.shape
    sizes = Sizes.of(slots, word, num_reads, layout, layout.num_warps)
    return memory.new_empty((batch, sizes.FORWARD_SCRATCH), dtype=compute_dtype(memory.dtype))


def launch_forward(
    interface: Tensor,
    state: tuple[Tensor, ...],
    result: StepResult,
    scratch: Tensor,
    *,
    raw: bool,
    strength_offset: float,
    layout: Layout,
    marks: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Launch the forward into existing buffers.

    Args:
        interface, state, raw, strength_offset, layout: as in `step_forward`; memory and link may be shared.
        result: where everything goes, contiguous.
        scratch: as `forward_scratch` makes it.
        marks: [B] uint8, of FRESH and ENDED, or None. Rows that have ended keep memory and link; the rest of what they
            leave is undefined.
        zeros: as many as `count_zeros` says, if there are marks.
    """
    memory = state[0]
    batch, slots, word = memory.shape
    num_reads = result.read_words.shape[1]
    options = dict(raw=raw, strength_offset=strength_offset, compute=scratch.dtype)
    shared = _shared_of(state)
    for launch in launches(batch, slots, word, num_reads, layout, **options):
        launch_or_compile(
            step_forward_kernel,
            launch.grid,
            interface,
            *state,
            *result,
            scratch,
            marks,
            zeros,
            shared,
            PHASE=launch.phase,
            sizes=launch.sizes,
            **compile_options(layout, launch.num_warps),
        )


def _shared_of(state: tuple[Tensor, ...]) -> int:
    """Which of memory and link are shared, as the kernels take it."""
    memory, _, link, *_ = state
    return MEMORY.value * is_shared(memory) | LINK.value * is_shared(link)


def count_zeros(slots: int, word: int, num_reads: int) -> int:
    """How many zeros can stand for any field of one batch element's state."""
    return slots * max(slots, word, num_reads)


def step_backward(
    interface: Tensor,
    state: tuple[Tensor, ...],
    result: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    *,
    raw: bool,
    strength_offset: float,
    stop_usage_gradient: bool,
    layout: Layout,
) -> StepGradient:
    """Launch the backward.

    Args:
        interface, state, raw, strength_offset, layout: as they went into `step_forward`.
        result: of what it returned: memory, usage, read weights, write weights, `kept` and `free_list`.
        gradients: of the read words and of the fields of the new `MemoryState`, contiguous.
        stop_usage_gradient: as in `memory_step`.
    """
    gradient = StepGradient(torch.empty_like(interface), *(torch.empty_like(tensor) for tensor in state))
    memory, _, _, _, read_weights, _ = state
    with overlapping(layout, memory.device):
        launch_backward(
            interface,
            state,
            result,
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
    layout = layout.of_backward
    sizes = Sizes.of(slots, word, num_reads, layout, layout.num_warps)
    return memory.new_empty((batch, sizes.BACKWARD_SCRATCH), dtype=compute_dtype(memory.dtype))


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
    behind: int = 0,
    row: int = 0,
) -> None:
    """Launch the backward into existing buffers.

    Args:
        interface, state, raw, strength_offset, stop_usage_gradient, layout: as in `step_backward`.
        result: as in `step_backward`.
        gradients: as in `step_backward`, in other buffers than `gradient`. Those of memory and link may be shared,
            both or neither.
        gradient: where everything goes, contiguous.
        scratch: as `backward_scratch` makes it.
        marks, zeros: as in `launch_forward`, with LOST as well. For ended rows no gradient of the state is written.
        behind: by how many steps of a sequence the link of `state` lies behind the rest of it; in three launches only.
            Precedence and write weights of the steps since lie before those of `state`, their marks before `marks`.
        row: how many numbers apart precedence and write weights are from one step to the next, a multiple of 16 bytes;
            marks are B apart, rounded up to 16.
    """
    assert not (behind and layout.fused)
    assert is_shared(gradients[1]) == is_shared(gradients[3])
    batch, slots, word = state[0].shape
    num_reads, layout = gradients[0].shape[1], layout.of_backward
    options = dict(
        raw=raw,
        strength_offset=strength_offset,
        stop_usage_gradient=stop_usage_gradient,
        far=behind * row >= 2**31,
        compute=scratch.dtype,
    )
    shared = _shared_of(state) | GRADIENT.value * is_shared(gradients[1])
    for launch in launches(batch, slots, word, num_reads, layout, backward=True, **options):
        launch_or_compile(
            step_backward_kernel,
            launch.grid,
            interface,
            *state,
            *result,
            *gradients,
            *gradient,
            scratch,
            marks,
            zeros,
            shared,
            behind,
            row * state[0].element_size() // 16,
            PHASE=launch.phase,
            sizes=launch.sizes,
            **compile_options(
                layout,
                launch.num_warps,
                backward=True,
                capped=is_capped(launch, state[0].dtype),
            ),
        )


class Launch(NamedTuple):
    """One launch of a step.

    Attributes:
        phase: which, or all.
        grid: of programs.
        num_warps: per program.
        sizes: the kernel's.
    """

    phase: int
    grid: tuple[int, ...]
    num_warps: int
    sizes: Sizes


@lru_cache(maxsize=256)  # asked at every step of a sequence
def launches(
    batch: int,
    slots: int,
    word: int,
    num_reads: int,
    layout: Layout,
    *,
    backward: bool = False,
    **options: Any,
) -> tuple[Launch, ...]:
    """The launches of a step in one direction, in order; none for an empty batch. `options` as in `Sizes.of`."""
    assert not (layout.fused and (layout.spread or layout.ranks))
    if batch == 0:
        return ()

    def launch(phase: tl.constexpr, num_warps: int, count: Callable[[Sizes], int]) -> Launch:
        sizes = Sizes.of(slots, word, num_reads, layout, num_warps, backward=backward, **options)
        return Launch(phase.value, (batch, count(sizes)), num_warps, sizes)

    if layout.fused:
        return (launch(WHOLE, layout.num_warps, lambda sizes: 1),)
    middle = launch(MIDDLE, layout.num_warps, lambda sizes: sizes.TILES + sizes.SLOT_BLOCKS)
    # The phases around it wait for memory more than they compute.
    in_first = 8 if slots <= 256 else 16
    in_last = min(16, max(4, triton.next_power_of_2(slots) // 64))
    heads = num_reads if layout.spread else 1  # that have a program each
    if backward:
        first = launch(FIRST, in_first, lambda sizes: heads)
        return first, middle, launch(LAST, in_last, lambda sizes: sizes.PARTS + num_reads + layout.spread)
    first = launch(FIRST, in_first, lambda sizes: 1)
    last = launch(LAST, in_last, lambda sizes: sizes.PARTS * heads)
    if not layout.ranks:
        return first, middle, last
    return launch(RANK, 4, lambda sizes: triton.cdiv(slots, sizes.RANKED)), first, middle, last


def is_capped(launch: Launch, dtype: torch.dtype) -> bool:
    """Whether a launch of the backward is faster with fewer registers, so that a multiprocessor has ten programs.

    The middle one of three takes all registers that it may, which leaves room for eight programs. With many heads or in
    another dtype it would spill if capped.
    """
    return launch.phase == MIDDLE.value and launch.sizes.FEW and dtype == torch.float32


def compile_options(
    layout: Layout,
    num_warps: int,
    *,
    backward: bool = False,
    capped: bool = False,
    hip: bool = torch.version.hip is not None,
) -> dict[str, int]:
    """The options that Triton compiles a kernel with.

    A whole sequence may use every register: NVIDIA's assembler would rather spill than give up room for a second
    program beside this one, and there seldom is one. So may the backward of a step in one launch; but no backward with
    8 warps, where being told so makes it spill. What is `is_capped` may not use all that it would take.
    """
    options = {"num_warps": num_warps}
    if hip:
        return options
    if capped:
        options["maxnreg"] = 200
    elif (layout.whole_sequence or (layout.fused and backward)) and not (backward and num_warps == 8):
        options["maxnreg"] = 255
    return options
