"""One step of the memory: the paper's equations in the paper's order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_reference import addressing
from dnc_reference.checks import check_bool, check_dense, check_floating, check_tensor
from dnc_reference.types import Interface, MemoryState


class Addressing(NamedTuple):
    """How a step arrived at its weights: intermediate results, which it does not pass on.

    Attributes:
        retention: [B, N], ψ.
        allocation_weights: [B, K, N], before the gates.
        write_content_weights: [B, K, N].
        read_content_weights: [B, R, N].
        forward_weights: [B, R, K, N].
        backward_weights: [B, R, K, N].
    """

    retention: Tensor
    allocation_weights: Tensor
    write_content_weights: Tensor
    read_content_weights: Tensor
    forward_weights: Tensor
    backward_weights: Tensor


def memory_step(
    interface: Interface, state: MemoryState, *, stop_usage_gradient: bool = False
) -> tuple[Tensor, MemoryState]:
    """Free, write, link and read: one step of the memory, every row of the batch by itself.

    Args:
        interface: what the controller asks, activated; the shapes are those of `Interface`.
        state: the memory before the step; the shapes are those of `MemoryState`.
        stop_usage_gradient: let no gradient flow from usage to the previous write weights, as DeepMind's published
            code has it. The values are the same.

    Returns:
        read words [B, R, W] and the memory after the step. Nothing is clamped or renormalised.

    Raises:
        TypeError: no `Interface` or `MemoryState`; a field that is no floating tensor of the dtype of `state.memory`;
            `stop_usage_gradient` is no bool.
        ValueError: a field does not fit the shapes of the others, or is on another device.

    Source: Graves et al. 2016, Methods.
    """
    read_words, new_state, _ = memory_step_with_addressing(interface, state, stop_usage_gradient=stop_usage_gradient)
    return read_words, new_state


def memory_step_with_addressing(
    interface: Interface, state: MemoryState, *, stop_usage_gradient: bool = False
) -> tuple[Tensor, MemoryState, Addressing]:
    """`memory_step`, which also returns how it arrived at its weights.

    Args:
        interface, state, stop_usage_gradient: as in `memory_step`.

    Returns:
        read words [B, R, W], the memory after the step, and the step's `Addressing`.

    Raises:
        as `memory_step`.
    """
    check_memory_step(interface, state)
    check_bool("stop_usage_gradient", stop_usage_gradient)
    with without_autocast(state.memory.device):
        return _memory_step(interface, state, stop_usage_gradient)


def _memory_step(
    interface: Interface, prev: MemoryState, stop_usage_gradient: bool
) -> tuple[Tensor, MemoryState, Addressing]:
    prev_write_weights = prev.write_weights.detach() if stop_usage_gradient else prev.write_weights

    retention = addressing.retention(interface.free_gates, prev.read_weights)
    usage = addressing.update_usage(prev.usage, prev_write_weights, retention)
    allocation = addressing.write_allocation_weights(usage, interface.allocation_gates, interface.write_gates)
    write_content = addressing.content_weights(prev.memory, interface.write_keys, interface.write_strengths)
    write_weights = addressing.write_weights(
        write_content, allocation, interface.allocation_gates, interface.write_gates
    )
    memory = addressing.update_memory(prev.memory, write_weights, interface.erase_vectors, interface.write_vectors)

    link = addressing.update_link(prev.link, prev.precedence, write_weights)
    precedence = addressing.update_precedence(prev.precedence, write_weights)
    forward = addressing.forward_weights(link, prev.read_weights)
    backward = addressing.backward_weights(link, prev.read_weights)

    read_content = addressing.content_weights(memory, interface.read_keys, interface.read_strengths)
    read_weights = addressing.read_weights(read_content, forward, backward, interface.read_modes)
    read_words = addressing.read_words(memory, read_weights)

    return (
        read_words,
        MemoryState(memory, usage, link, precedence, read_weights, write_weights),
        Addressing(retention, allocation, write_content, read_content, forward, backward),
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: what accumulates over the steps of a sequence must not be rounded at each of them."""
    if device.type == "meta":  # which has no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_memory_step(interface: Interface, state: MemoryState) -> None:
    """Raise the errors that `memory_step` documents, naming the field, what was expected and what came."""
    if not isinstance(interface, Interface):
        raise TypeError(f"interface: expected an Interface, got {type(interface).__name__}")
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState, got {type(state).__name__}")
    # The sizes are taken from these three; everything else is checked against them.
    for name, tensor, letters in (
        ("state.memory", state.memory, "[B, N, W]"),
        ("interface.read_keys", interface.read_keys, "[B, R, W]"),
        ("interface.write_keys", interface.write_keys, "[B, K, W]"),
    ):
        check_dense(name, tensor, f"a tensor {letters}")
        if tensor.dim() != 3 or 0 in tensor.shape[1:]:
            raise ValueError(f"{name}: expected {letters}, all but B at least 1, got shape {list(tensor.shape)}")
    batch, slots, word = state.memory.shape
    reads, writes = interface.read_keys.shape[1], interface.write_keys.shape[1]
    dtype, device = state.memory.dtype, state.memory.device
    check_floating("state.memory", dtype)

    for name, shape in Interface.shapes(batch, word, reads, writes).items():
        check_tensor(f"interface.{name}", getattr(interface, name), shape, dtype=dtype, device=device)
    check_memory_state(
        "state", state, MemoryState.shapes(batch, slots, word, reads, writes), dtype=dtype, device=device
    )


def check_memory_state(
    prefix: str, state: MemoryState, shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise an error that names the field unless all of them have these shapes, this dtype and this device."""
    for name, shape in shapes.items():
        check_tensor(f"{prefix}.{name}", getattr(state, name), shape, dtype=dtype, device=device)
