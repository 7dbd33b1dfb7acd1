"""A look into the memory: what every step asked of it, and where it wrote and read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from dnc_reference import DNCCell, DNCState, Interface, MemoryState, memory_step, unroll
from dnc_reference.interface import activate_interface
from dnc_triton.ops.eager import all_savable


class Trace(NamedTuple):
    """What a DNC did with its memory, step by step: ``outputs, state, trace = dnc(inputs, trace=True)``.

    The first two axes are batch and time, whatever `batch_first` is. Index [b, t] holds what step t asked for (gates,
    modes) and what it left behind (weights, usage, link) in row b; past the row's length all is 0, as the outputs are.
    Gradients flow through it. The reference computes it: identical slots may be in other places than in the state of a
    call without a trace, see `MemoryState`.

    Attributes:
        write_weights: [B, T, K, N].
        read_weights: [B, T, R, N].
        allocation_gates: [B, T, K], in [0, 1].
        write_gates: [B, T, K], in [0, 1].
        free_gates: [B, T, R], in [0, 1].
        read_modes: [B, T, R, 1+2K], in the order of `Interface`.
        usage: [B, T, N], in [0, 1].
        link: [B, T, K, N, N], link[..., i, j] the degree to which slot i was written right after slot j. By far the
            largest: 6.6 MB per row in float32 with T = 100, K = 1, N = 128.
    """

    write_weights: Tensor
    read_weights: Tensor
    allocation_gates: Tensor
    write_gates: Tensor
    free_gates: Tensor
    read_modes: Tensor
    usage: Tensor
    link: Tensor


def check_trace(trace: Any) -> None:
    """Raise TypeError or ValueError unless it is a trace with something to draw."""
    if not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace, got {type(trace).__name__}")
    batch, steps = trace.usage.shape[:2]
    if batch == 0 or steps == 0:
        raise ValueError(f"trace: expected at least 1 row and 1 step, got {batch} and {steps}")


# So that an exported program can be saved.
_register_namedtuple(Trace, serialized_type_name="dnc_triton.Trace")


def traced_unroll(
    cell: DNCCell, inputs: Tensor, state: DNCState, *, lengths: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, DNCState, Trace]:
    """`dnc_reference.unroll`, and the `Trace` of what it did. Takes the same arguments, time first."""
    seen: list[dict[str, Tensor]] = []

    def interface_step(
        vector: Tensor, memory: MemoryState, *, stop_usage_gradient: bool, **keywords: Any
    ) -> tuple[Tensor, MemoryState]:
        interface = activate_interface(vector, word_size=cell.word_size, **keywords)
        read_words, memory = memory_step(interface, memory, stop_usage_gradient=stop_usage_gradient)
        seen.append(interface._asdict() | memory._asdict())
        return read_words, memory

    state, reset = all_savable((state, reset))
    outputs, new_state = unroll(cell, inputs, state, lengths=lengths, reset=reset, interface_step=interface_step)

    steps, batch = inputs.shape[:2]
    sizes = (batch, cell.word_size, cell.num_reads, cell.num_writes)
    shapes = Interface.shapes(*sizes) | MemoryState.shapes(batch, cell.memory_size, *sizes[1:])
    fields = []
    for name in Trace._fields:
        if steps == 0:
            field = state.read_words.new_zeros(batch, 0, *shapes[name][1:])
        else:
            field = torch.stack([step[name] for step in seen], dim=1)
        if lengths is not None:
            running = torch.arange(steps, device=inputs.device) < lengths.unsqueeze(1)  # [B, T]
            field = torch.where(running.view(batch, steps, *[1] * (field.dim() - 2)), field, 0)
        fields.append(field)
    return outputs, new_state, Trace(*fields)
