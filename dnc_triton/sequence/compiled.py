"""A sequence whose step, and the adjoint of it, is compiled by PyTorch's compiler for a CPU, controller and all.

Where the network is small the time goes into the number of calls, and compiled a step and its adjoint are two of them
instead of some 150. Nothing is written a second time: what is compiled is `Sequence` itself over a single step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dnc_reference.types import MemoryState
from dnc_triton.sequence.history import Carried, History, Settings
from dnc_triton.sequence.loop import Before, Sequence

Like = tuple[torch.Size, tuple[int, ...], torch.dtype]  # size, strides and dtype of a tensor


class CompiledSequence(Sequence):
    """As `Sequence`, with compiled steps. It keeps memory and link of every step."""

    def _by_step(self, state: Carried) -> None:
        # What goes into a step and what it leaves is the history of a sequence of one step.
        trails = (tensor.unfold(0, len(tensor) - self.steps + 1, 1) for tensor in self.history.flatten()[:-2])
        self.by_step = [trail.movedim(-1, 1).unbind(0) for trail in trails]
        self.by_step += [tensor.split(1) for tensor in self.dropout]
        self.compiled: dict[tuple[bool, bool], Callable[..., Any]] = {}

    def _at(self, step: int) -> Carried:
        history = self.history
        memory, link = self.checkpoints[step]
        usage, *others, words = (trail[step] for trail in history.carried)
        layers = [[trail[step] for trail in layer] for layer in history.layers]
        return Carried(MemoryState(memory, usage, link, *others), words, layers)

    def _begin_forward(self) -> None:
        """Nothing."""

    def _forward_step(self, step: int) -> None:
        self._run(step, [])

    def _begin_backward(self, before: Before) -> None:
        for cell in self.cells:
            cell.make_d_pre()
        over_steps = [self.d_vectors, *(d_pre for cell in self.cells for d_pre in cell.each_d_pre())]
        self.gradients = [self.d_hidden_out, self.d_words_out, *(tensor.split(1) for tensor in over_steps)]

    def _backward_step(self, step: int, d: Carried) -> Carried:
        self._run(step, [*d.flatten(), *(tensor[step] for tensor in self.gradients)])
        return d

    def _run(self, step: int, gradients: list[Tensor]) -> None:
        masked = self.stops[step], self.resets[step]
        given = zip((self.running, self.reset), masked, strict=True)
        masks = [mask[step : step + 1] for mask, used in given if used and mask is not None]
        states = [*self.checkpoints[step], *self.checkpoints[step + 1]]
        tensors = [self.inputs[:1], *masks, *states, *self.parameters, *(x[step] for x in self.by_step), *gradients]
        if masked not in self.compiled:
            history = len(self.by_step) - len(self.dropout)
            counts = len(masks), 4, len(self.parameters), history, len(self.dropout), len(gradients)
            likes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
            settings = self.settings._replace(checkpoint=1)
            self.compiled[masked] = _compile(settings, masked, counts, likes, torch.get_num_threads())
        self.compiled[masked](*tensors)


class _Step(Sequence):
    """A sequence of one step while it is traced, when no tensor's numbers can be asked for."""

    @staticmethod
    def _any_by_step(mask: Tensor | None, steps: int) -> list[bool]:
        return [mask is not None]

    def run_forward(self) -> None:
        self._begin_forward()
        self._forward_step(0)

    def run_backward(self, gradients: list[Tensor]) -> None:
        size = 7 + self.settings.num_layers * max(self.settings.cell.states, 1)
        d = Carried.unflatten(gradients[:size], self.settings.num_layers)
        d_hidden_out, d_words_out, self.d_vectors, *given = gradients[size:]
        self.d_hidden_out, self.d_words_out = (d_hidden_out,), (d_words_out,)
        self._begin_backward(self._befores())
        self._backward_step(0, d)
        made = (d_pre for cell in self.cells for d_pre in cell.each_d_pre())
        for buffer, d_pre in zip(given, made, strict=True):
            buffer.copy_(d_pre)


@lru_cache(maxsize=256)
def _compile(
    settings: Settings, masked: tuple[bool, bool], counts: tuple[int, ...], likes: tuple[Like, ...], threads: int
) -> Callable[..., Any]:
    """Machine code for these sizes and so many threads, which takes the tensors one by one.

    `torch.compile` would check what it is given at each call, which takes as long as the step.
    """

    def traced(inputs: Tensor, *others: Tensor) -> tuple[()]:
        remaining = iter(others)
        masks, states, parameters, kept, dropout, gradients = (list(islice(remaining, count)) for count in counts)
        running, reset = (masks.pop(0) if wanted else None for wanted in masked)
        memory, link, last_memory, last_link = states
        history = History.unflatten([*kept, memory.unsqueeze(0)[:0], link.unsqueeze(0)[:0]], settings)
        usage, precedence, read_weights, write_weights, words = (trail[0] for trail in history.carried)
        state = Carried(MemoryState(memory, usage, link, precedence, read_weights, write_weights), words, [])
        step = _Step(
            settings, parameters, inputs, state, running, reset, dropout, history=history, last=(last_memory, last_link)
        )
        if gradients:
            step.run_backward(gradients)
        else:
            step.run_forward()
        return ()

    examples: list[Any] = [torch.empty_strided(size, stride, dtype=dtype).zero_() for size, stride, dtype in likes]
    graph = make_fx(traced)(*examples)
    # C++ between the kernels too, and threads only for what takes longer than to wake them.
    options = {"config_patches": {"cpp_wrapper": True, "cpp.min_chunk_size": 4096}}
    return torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_example_inputs", options=options)
