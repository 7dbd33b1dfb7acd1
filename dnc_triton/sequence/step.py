"""One step of a sequence by itself, in plain PyTorch, of which nothing is kept: as a stream wants it.

To prepare a sequence, its buffers and their views, takes as long as such a step. On a CPU they are reused here.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from dnc_triton.sequence import pool
from dnc_triton.sequence.carried import Carried
from dnc_triton.sequence.history import History, Plan
from dnc_triton.sequence.loop import Sequence
from dnc_triton.sequence.settings import SequenceSettings

LARGEST = 2**22  # bytes of buffers that are reused: preparing a larger step is a small part of its time


class Step(Sequence):
    """One step, on buffers that hold nothing of another one.

    Args:
        settings: of the sequence.
        history: buffers of one step.
        memory: [B, N, W], of the sizes of any state's.
        reads: R.
    """

    def __init__(self, settings: SequenceSettings, history: History, memory: Tensor, reads: int) -> None:
        self.settings, self.history, self.vectors = settings, history, history.vectors.unbind(0)
        self.dropout: list[Tensor] = []
        self.running, self.reset = None, None
        self.stops, self.resets = [False], [False]
        self.memory = self._memory(memory, reads)

    def bind(self, parameters: list[Tensor], input_size: int, before: Carried, after: Carried) -> None:
        """Set the network, as in `Sequence`, and the states that the step goes from and to."""
        self.states = before, after
        self._products(parameters, input_size)
        self.cells = self._make_cells()

    def _at(self, step: int) -> Carried:
        return self.states[step]

    def run_forward(self) -> None:
        """The step, after its gates have been begun (`_begin_gates`)."""
        self._begin_forward()
        self._forward_step(0)

    def run_alone(self, inputs: Tensor) -> Tensor:
        """With what a sequence does before its loop and after it: inputs [B, I] to outputs [B, O]."""
        self.inputs = inputs.unsqueeze(0)
        self._begin_gates()
        self.run_forward()
        after = self.states[1]
        return self._clip(self._project(after.layers[-1][0], after.words.flatten(1)))


def step_alone(
    settings: SequenceSettings, inputs: Tensor, before: Carried, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One step, and nothing kept: inputs [B, I] and a state to outputs [B, O] and the state after it, a list."""
    memory, reads, state = before.memory.memory, before.words.shape[1], before.flatten()
    sizes = settings, memory.shape, reads, parameters[-4].shape[1], memory.dtype, memory.device
    again = memory.device.type == "cpu"  # on a GPU each graph and each stream wants its own
    again = again and _bytes(settings, memory, reads, *parameters[-4].shape) <= LARGEST
    prepared, shapes = _prepared(*sizes, get_ident()) if again else _prepare(*sizes)
    step = copy(prepared)  # so that what waits holds no state and no parameter
    light = [memory.new_empty(shape) for shape in shapes]
    large = pool.empty_like(memory), pool.empty_like(before.memory.link)
    after = Carried.of(*large, light, settings.num_layers)
    step.bind(parameters, inputs.shape[-1], before, after)
    return step.run_alone(inputs), after.flatten()[: len(state)]


def _bytes(settings: SequenceSettings, memory: Tensor, reads: int, interface_size: int, hidden_size: int) -> int:
    """About what the buffers of a step take, of an LSTM with a clip; other controllers take less."""
    batch, slots, word = memory.shape
    by_slot, by_unit = word + 12 * reads + 20, 12 * settings.num_layers
    return batch * (slots * by_slot + hidden_size * by_unit + 2 * interface_size) * memory.element_size()


def _prepare(
    settings: SequenceSettings,
    shape: torch.Size,
    reads: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Step, tuple[tuple[int, ...], ...]]:
    """A step on buffers of these sizes; and the shapes of what it hands on, in the order of `Carried.light`."""
    with torch.inference_mode(False):  # outside of which they could not be written to
        memory = torch.empty(shape, dtype=dtype, device=device)
        plan = Plan(settings, memory, reads, hidden_size)
        return Step(settings, plan.cut(plan.allocate(1)), memory, reads), plan.carried.shapes


@lru_cache(maxsize=32)
def _prepared(*arguments: Any) -> tuple[Step, tuple[tuple[int, ...], ...]]:
    """The same, made once per thread, which is the last argument."""
    *sizes, _ = arguments
    return _prepare(*sizes)
