"""One step of the memory, on whichever backend serves it."""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_reference import Interface, MemoryState
from dnc_reference.checks import check_bool
from dnc_reference.memory import check_memory_step
from dnc_triton.dispatch import choose
from dnc_triton.problem import Problem


def memory_step(
    interface: Interface, state: MemoryState, *, stop_usage_gradient: bool = False, backend: str = "auto"
) -> tuple[Tensor, MemoryState]:
    """Free, write, link and read: one step of the memory, every row of the batch by itself.

    Letters: B batch, N memory slots, W word size, R read heads, K write heads.

    Args:
        interface: what the controller asks, activated; the shapes are those of `Interface`.
        state: the memory before the step; the shapes are those of `MemoryState`.
        stop_usage_gradient: let no gradient flow from usage to the previous write weights, as DeepMind's published
            code has it. The values are the same.
        backend: "auto", or the name of the backend to use.

    Returns:
        read words [B, R, W] and the memory after the step.

    Raises:
        TypeError: no `Interface` or `MemoryState`; a field that is no floating tensor of the dtype of `state.memory`;
            `stop_usage_gradient` is no bool.
        ValueError: a field does not fit the shapes of the others, or is on another device; an unknown backend.
        RuntimeError: the backend asked for does not serve this call, or is known to fail on this device.

    Source: Graves et al. 2016, Methods. The oracle is `dnc_reference.memory_step`.
    """
    check_memory_step(interface, state)
    check_bool("stop_usage_gradient", stop_usage_gradient)
    batch, slots, word = state.memory.shape
    problem = Problem(
        device=state.memory.device,
        dtype=state.memory.dtype,
        batch=batch,
        steps=1,
        memory_size=slots,
        word_size=word,
        num_reads=interface.read_keys.shape[1],
        num_writes=interface.write_keys.shape[1],
        controller=None,
        needs_gradient=torch.is_grad_enabled() and any(x.requires_grad for x in (*interface, *state)),
    )
    return choose(problem, backend).memory_step(interface, state, stop_usage_gradient=stop_usage_gradient)
