"""The kernels of the memory step as an operator that PyTorch knows: with a fake implementation, and differentiable.

Both directions are opaque to `torch.compile`, so what happens inside (Triton's own compilation, say) cannot break a
graph. Neither mutates or aliases what it is given.

What PyTorch does around such an operator takes longer than the launches. So in eager mode (`is_eager`) `_Step` takes
its place, which calls the same two functions, `_forward` and `_run_backward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dnc_reference import Interface, MemoryState
from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.launcher import aligned
from dnc_triton.kernels.layout import Layout, compute_dtype, kept_shapes
from dnc_triton.ops.eager import is_eager, no_second_backward, on_device, refuse_batched


@torch.library.custom_op("dnc_triton::step", mutates_args=())
def _step(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    link: Tensor,
    precedence: Tensor,
    read_weights: Tensor,
    write_weights: Tensor,
    raw: bool,
    strength_offset: float,
    stop_usage_gradient: bool,
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`step_forward`: the words read, the new memory state, and what the backward needs (`kept`, `free_list`).

    `stop_usage_gradient` is the backward's, which finds it among the arguments (`_setup_context`).
    """
    state = [memory, usage, link, precedence, read_weights, write_weights]
    return _forward(interface, state, raw, strength_offset, Layout.from_operand(layout))


def _forward(
    interface: Tensor, state: list[Tensor], raw: bool, strength_offset: float, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dnc_triton.kernels.step_launch import step_forward

    with on_device(interface):
        return step_forward(
            aligned(interface),
            tuple(map(aligned, state)),
            num_reads=state[4].shape[1],
            raw=raw,
            strength_offset=strength_offset,
            layout=layout,
        )


@_step.register_fake
def _(interface: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    memory, *_ = state = arguments[:6]
    batch, slots, word = memory.shape
    reads = state[4].shape[1]
    kept, free_list = kept_shapes(batch, slots, reads)
    return (
        memory.new_empty(batch, reads, word),
        *(tensor.new_empty(tensor.shape) for tensor in state),
        memory.new_empty(kept, dtype=compute_dtype(memory.dtype)),
        memory.new_empty(free_list, dtype=torch.int32),
    )


@torch.library.custom_op("dnc_triton::step_backward", mutates_args=())
def _step_backward(
    interface: Tensor,
    state: list[Tensor],
    result: list[Tensor],
    gradients: list[Tensor],
    raw: bool,
    strength_offset: float,
    stop_usage_gradient: bool,
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`step_backward`: gradients of the interface vector and of the fields of the state."""
    return _run_backward(
        interface, state, result, gradients, raw, strength_offset, stop_usage_gradient, Layout.from_operand(layout)
    )


def _run_backward(
    interface: Tensor,
    state: list[Tensor],
    result: list[Tensor],
    gradients: list[Tensor],
    raw: bool,
    strength_offset: float,
    stop_usage_gradient: bool,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dnc_triton.kernels.step_launch import step_backward

    with on_device(interface):
        return step_backward(
            aligned(interface),
            tuple(map(aligned, state)),
            tuple(map(aligned, result)),  # hooks on what autograd saves may hand it back with other strides
            tuple(map(aligned, gradients)),
            raw=raw,
            strength_offset=strength_offset,
            stop_usage_gradient=stop_usage_gradient,
            layout=layout,
        )


@_step_backward.register_fake
def _(interface: Tensor, state: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (interface, *state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    interface, *state = inputs[:7]
    _, memory, usage, _, _, read_weights, write_weights, kept, free_list = output
    ctx.mark_non_differentiable(kept, free_list)
    ctx.set_materialize_grads(False)  # else autograd makes zeros for these two as well
    ctx.save_for_backward(interface, *state, memory, usage, read_weights, write_weights, kept, free_list)
    ctx.arguments = inputs[7:]


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    interface, *saved = ctx.saved_tensors
    state, result = saved[:6], saved[6:]
    # In the order of the outputs; one that was not used may come without a gradient.
    given = _zero_filled(gradients[:7], state)
    return *_step_backward(interface, state, result, given, *ctx.arguments), None, None, None, None


def _zero_filled(gradients: tuple[Tensor | None, ...], state: list[Tensor]) -> list[Tensor]:
    """The gradients of the words read and of the new state's fields, with zeros where there is none."""
    memory, read_weights = state[0], state[4]
    shapes = [(memory.shape[0], read_weights.shape[1], memory.shape[2]), *(tensor.shape for tensor in state)]
    return [
        memory.new_zeros(shape) if gradient is None else gradient
        for gradient, shape in zip(gradients, shapes, strict=True)
    ]


_step.register_autograd(_backward, setup_context=_setup_context)
_step_backward.register_autograd(no_second_backward("the step's kernels"))


class _Step(torch.autograd.Function):
    """The operator for autograd in eager mode: without schemas and checks."""

    @staticmethod
    def forward(
        ctx: Any,
        interface: Tensor,
        raw: bool,
        strength_offset: float,
        stop_usage_gradient: bool,
        layout: Layout,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """The words read and the new memory state."""
        with torch._C._AutoDispatchBelowAutograd():  # as in an operator
            *results, kept, free_list = _forward(interface, list(state), raw, strength_offset, layout)
        _, memory, usage, _, _, read_weights, write_weights = results
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(interface, *state, memory, usage, read_weights, write_weights, kept, free_list)
        ctx.arguments = raw, strength_offset, stop_usage_gradient, layout
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        interface, *saved = ctx.saved_tensors
        raw, strength_offset, stop_usage_gradient, layout = ctx.arguments
        refuse_batched([gradient for gradient in gradients if gradient is not None])
        given = interface, saved[:6], saved[6:], _zero_filled(gradients, saved[:6]), raw, strength_offset
        # The operator where the backward is itself differentiated, traced or transformed.
        if torch.is_grad_enabled() or not is_eager([interface, *saved]):
            d_given = _step_backward(*given, stop_usage_gradient, layout.as_operand())
        else:
            with torch._C._AutoDispatchBelowAutograd():
                d_given = _run_backward(*given, stop_usage_gradient, layout)
        d_interface, *d_state = d_given
        return d_interface, None, None, None, None, *d_state


def kernel_memory_step(
    interface: Interface, state: MemoryState, *, stop_usage_gradient: bool, layout: Layout
) -> tuple[Tensor, MemoryState]:
    """`dnc_reference.memory_step` by the kernels."""
    fields = interface_sizes(state.read_weights.shape[1], 1, state.memory.shape[-1])
    vector = torch.cat([getattr(interface, field).flatten(1) for field in fields], dim=1)
    return _run(vector, state, False, 0.0, stop_usage_gradient, layout)


def kernel_interface_step(
    vector: Tensor,
    state: MemoryState,
    *,
    num_reads: int,
    num_writes: int,
    strength: str,
    stop_usage_gradient: bool,
    layout: Layout,
) -> tuple[Tensor, MemoryState]:
    """`dnc_reference.interface_step` by the kernels, which activate the interface themselves."""
    return _run(vector, state, True, 1.0 if strength == "oneplus" else 0.0, stop_usage_gradient, layout)


def _run(
    vector: Tensor, state: MemoryState, raw: bool, strength_offset: float, stop_usage_gradient: bool, layout: Layout
) -> tuple[Tensor, MemoryState]:
    tensors = [vector, *state]
    if not is_eager(tensors):
        result = _step(*tensors, raw, strength_offset, stop_usage_gradient, layout.as_operand())
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result = _Step.apply(vector, raw, strength_offset, stop_usage_gradient, layout, *state)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            result = _forward(vector, list(state), raw, strength_offset, layout)
    return result[0], MemoryState(*result[1:7])
