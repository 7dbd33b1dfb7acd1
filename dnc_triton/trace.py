"""A look into the memory: what every step asked, and where it wrote and read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dnc_reference import DNCCell, DNCState, memory_step_with_addressing
from dnc_reference.interface import activate_interface


class Trace(NamedTuple):
    """What a DNC did with its memory, step by step. The first two axes are [T, B].

    Attributes:
        outputs: [T, B, output_size].
        usage: [T, B, N].
        write_weights: [T, B, K, N].
        read_weights: [T, B, R, N].
        allocation_gates: [T, B, K].
        write_gates: [T, B, K].
        free_gates: [T, B, R].
        read_modes: [T, B, R, 1+2K], in the order of `Interface`.
    """

    outputs: Tensor
    usage: Tensor
    write_weights: Tensor
    read_weights: Tensor
    allocation_gates: Tensor
    write_gates: Tensor
    free_gates: Tensor
    read_modes: Tensor


@torch.no_grad()
def trace(dnc: DNCCell, inputs: Tensor, state: DNCState | None = None) -> Trace:
    """Run a DNC step by step on the reference and keep what it did.

    Args:
        dnc: the network.
        inputs: [T, B, input_size], time first, T at least 1.
        state: before the first step, or None for the initial one.

    Returns:
        the `Trace`, without gradients.
    """
    state = dnc.initial_state(inputs.shape[1]) if state is None else state
    steps = []
    for step_inputs in inputs:
        hidden, controller_state, vector = dnc.control(step_inputs, state)
        interface = activate_interface(
            vector,
            num_reads=dnc.num_reads,
            num_writes=dnc.num_writes,
            word_size=dnc.word_size,
            strength=dnc.strength,
        )
        read_words, memory, _ = memory_step_with_addressing(interface, state.memory)
        outputs = dnc.project(torch.cat([hidden, read_words.flatten(1)], dim=-1))
        state = DNCState(controller_state, memory, read_words)
        steps.append(
            Trace(
                outputs=outputs,
                usage=memory.usage,
                write_weights=memory.write_weights,
                read_weights=memory.read_weights,
                allocation_gates=interface.allocation_gates,
                write_gates=interface.write_gates,
                free_gates=interface.free_gates,
                read_modes=interface.read_modes,
            )
        )
    return Trace(*(torch.stack(tensors) for tensors in zip(*steps, strict=True)))
