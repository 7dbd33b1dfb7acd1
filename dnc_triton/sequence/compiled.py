"""A sequence whose step, and the adjoint of it, is compiled by PyTorch's compiler for a CPU, controller and all.

Where the network is small the time goes into the number of calls, and compiled a step and its adjoint are two of them
instead of some 150. Nothing is written a second time: what is compiled is a step of `Sequence` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dnc_triton.sequence.history import Carried, History, Settings
from dnc_triton.sequence.loop import Before, Sequence

Like = tuple[torch.Size, tuple[int, ...], torch.dtype]  # size, strides and dtype of a tensor


class CompiledSequence(Sequence):
    """As `Sequence`, with compiled steps. It keeps memory and link of every step."""

    def _by_step(self, state: Carried) -> None:
        history = self.history
        self.trails = [trail.unbind(0) for trail in history.trails()]
        cells = (kept for cell in history.cells for kept in cell)
        over_steps = [*history.gates, *cells, history.vectors, *history.memory]
        self.kept = [tensor.unbind(0) for tensor in over_steps]
        self.compiled: dict[tuple[bool, bool], Callable[..., Any]] = {}

    def _at(self, step: int) -> Carried:
        usage, *others = (trail[step] for trail in self.trails)
        memory, link = self.checkpoints[step]
        return Carried.unflatten([memory, usage, link, *others], self.settings.num_layers)

    def _begin_forward(self) -> None:
        """Nothing."""

    def _forward_step(self, step: int) -> None:
        self._run(step, [])

    def _begin_backward(self, before: Before) -> None:
        for cell in self.cells:
            cell.make_d_pre()
        over_steps = (self.d_vectors, *(d_pre for cell in self.cells for d_pre in cell.each_d_pre()))
        self.gradients = [self.d_hidden_out, self.d_words_out, *(tensor.unbind(0) for tensor in over_steps)]

    def _backward_step(self, step: int, d: Carried) -> Carried:
        self._run(step, [*d.flatten(), *(tensor[step] for tensor in self.gradients)])
        return d

    def _run(self, step: int, gradients: list[Tensor]) -> None:
        masked = self.stops[step], self.resets[step]
        running = [self.running[step]] if masked[0] else []  # type: ignore[index]
        reset = [self.reset[step]] if masked[1] else []  # type: ignore[index]
        dropout, kept = [mask[step] for mask in self.dropout], [tensor[step] for tensor in self.kept]
        before, after = self._at(step).flatten(), self._at(step + 1).flatten()
        parts = [self.parameters, running, reset, dropout, before, after, kept, gradients]
        tensors = [tensor for part in parts for tensor in part]
        if masked not in self.compiled:
            likes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
            settings, input_size = self.settings._replace(checkpoint=1), self.inputs.shape[-1]
            self.compiled[masked] = _compile(
                settings, input_size, tuple(map(len, parts)), likes, torch.get_num_threads()
            )
        self.compiled[masked](*tensors)


class _Step(Sequence):
    """One step of a sequence while it is traced, when no number can be asked for.

    What it writes goes to tensors of its own, which are copied at the end, each as a whole: of writes to parts of what
    it is given the compiler loses the order.

    Args:
        settings, parameters: as in `Sequence`.
        input_size: of the network.
        running, reset, dropout: of this step; the first two are empty where no row has ended, or starts from zeros.
        before, after: the states.
        kept: what the step keeps: gates and the rest of the cells, the interface vector, the memory's part.
    """

    def __init__(
        self,
        settings: Settings,
        parameters: list[Tensor],
        input_size: int,
        running: list[Tensor],
        reset: list[Tensor],
        dropout: list[Tensor],
        before: Carried,
        after: Carried,
        kept: list[Tensor],
    ) -> None:
        self.settings, self.states = settings, (before, after)
        self.dropout = [mask.unsqueeze(0) for mask in dropout]
        self.running, self.reset = (mask[0].unsqueeze(0) if mask else None for mask in (running, reset))
        self.stops, self.resets = [bool(running)], [bool(reset)]
        self._products(parameters, input_size)
        remaining = (tensor.unsqueeze(0) for tensor in kept)
        layers, count = range(settings.num_layers), settings.cell.count_kept(settings.clip)
        gates = list(islice(remaining, len(layers)))
        cells = [list(islice(remaining, count)) for _ in layers]
        vectors, *memory = remaining
        nothing = vectors.new_empty(0)
        self.history = History(gates, [], cells, vectors, [], memory, nothing, nothing)
        self.vectors = vectors.unbind(0)
        self.cells = self._make_cells()
        self.memory = self._memory(before.memory.memory, before.words.shape[1])

    def _at(self, step: int) -> Carried:
        return self.states[step]

    def run_forward(self) -> None:
        self._begin_forward()
        self._forward_step(0)

    def run_backward(self, d: Carried, d_hidden_out: Tensor, d_words_out: Tensor) -> list[Tensor]:
        """Overwrites d; returns the gradients by the interface vector and by the gates before their activation."""
        self.d_hidden_out, self.d_words_out = (d_hidden_out,), (d_words_out,)
        self.d_vectors = torch.empty_like(self.history.vectors)
        memory, words, layers = self._before(0)
        carried = [memory.usage, *memory[3:], words]
        self._begin_backward(Before([x.unsqueeze(0) for x in carried], [[x.unsqueeze(0) for x in y] for y in layers]))
        self._backward_step(0, d)
        return [self.d_vectors[0], *(d_pre[0] for cell in self.cells for d_pre in cell.each_d_pre())]


@lru_cache(maxsize=256)
def _compile(
    settings: Settings, input_size: int, counts: tuple[int, ...], likes: tuple[Like, ...], threads: int
) -> Callable[..., Any]:
    """Machine code for these sizes and so many threads, which takes the tensors one by one.

    `torch.compile` would check what it is given at each call, which takes as long as the step.
    """
    num_layers = settings.num_layers

    def traced(*tensors: Tensor) -> tuple[()]:
        remaining = iter(tensors)
        parameters, running, reset, dropout, before, after, kept, gradients = (
            list(islice(remaining, count)) for count in counts
        )
        prev, masks = Carried.unflatten(before, num_layers), (running, reset, dropout)
        if gradients:
            new = Carried.unflatten(after, num_layers)
            d, (d_hidden, d_words, *made) = gradients[: len(after)], gradients[len(after) :]
            step = _Step(settings, parameters, input_size, *masks, prev, new, kept)
            results = step.run_backward(Carried.unflatten(d, num_layers), d_hidden, d_words)
        else:
            own = [torch.empty_like(tensor) for tensor in after]
            own_kept = [torch.empty_like(tensor) for tensor in kept]
            own_kept[:num_layers] = [gates.clone() for gates in kept[:num_layers]]
            _Step(
                settings, parameters, input_size, *masks, prev, Carried.unflatten(own, num_layers), own_kept
            ).run_forward()
            made, results = [*after, *kept], [*own, *own_kept]
        for buffer, result in zip(made, results, strict=True):
            buffer.copy_(result)
        return ()

    examples: list[Any] = [torch.empty_strided(size, stride, dtype=dtype).zero_() for size, stride, dtype in likes]
    graph = make_fx(traced)(*examples)
    # C++ between the kernels too, and threads only for what takes longer than to wake them.
    options = {"config_patches": {"cpp_wrapper": True, "cpp.min_chunk_size": 4096}}
    return torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_example_inputs", options=options)
