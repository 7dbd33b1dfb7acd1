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

from dnc_triton.sequence.history import Carried, History, Plan, Settings
from dnc_triton.sequence.loop import Before, Sequence

Like = tuple[torch.Size, tuple[int, ...], torch.dtype]  # size, strides and dtype of a tensor


class CompiledSequence(Sequence):
    """As `Sequence`, with compiled steps. It keeps memory and link of every step."""

    def _by_step(self, state: Carried) -> None:
        history = self.history
        over_steps = [*history.gates, history.vectors, history.kept_rows, history.memory[-1]]
        self.rows, self.kept = history.carried_rows.unbind(0), [tensor.unbind(0) for tensor in over_steps]
        self.compiled: dict[tuple[bool, bool], Callable[..., Any]] = {}

    def _at(self, step: int) -> Carried:
        light = self.plan.carried.cut(self.rows[step])
        return Carried.of(*self.checkpoints[step], light, self.settings.num_layers)

    def _begin_forward(self) -> None:
        """Nothing."""

    def _forward_step(self, step: int) -> None:
        self._run(step, [])

    def _begin_backward(self, before: Before, d: Carried) -> None:
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
        before, after = ([*self.checkpoints[i], self.rows[i]] for i in (step, step + 1))
        parts = [self.parameters, running, reset, dropout, before, after, kept, gradients]
        tensors = [tensor for part in parts for tensor in part]
        if masked not in self.compiled:
            likes = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
            settings, sizes = self.settings._replace(checkpoint=1), (self.inputs.shape[-1], self.plan.reads)
            self.compiled[masked] = _compile(settings, *sizes, tuple(map(len, parts)), likes, torch.get_num_threads())
        self.compiled[masked](*tensors)


class _Step(Sequence):
    """One step of a sequence while it is traced, when no number can be asked for.

    Args:
        settings, parameters: as in `Sequence`.
        input_size: of the network.
        running, reset, dropout: of this step; the first two are empty where no row has ended, or starts from zeros.
        before, after: the states.
        gates: per layer, what is added up before the loop.
        vector: [B, S], the raw interface vector.
        cells, memory: what the step keeps.
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
        gates: list[Tensor],
        vector: Tensor,
        cells: list[list[Tensor]],
        memory: list[Tensor],
    ) -> None:
        self.settings, self.states = settings, (before, after)
        self.dropout = [mask.unsqueeze(0) for mask in dropout]
        self.running, self.reset = (mask[0].unsqueeze(0) if mask else None for mask in (running, reset))
        self.stops, self.resets = [bool(running)], [bool(reset)]
        self._products(parameters, input_size)
        gates, vectors, memory = [x.unsqueeze(0) for x in gates], vector.unsqueeze(0), [x.unsqueeze(0) for x in memory]
        cells, nothing = [[x.unsqueeze(0) for x in kept] for kept in cells], vector.new_empty(0)
        self.history = History(gates, [], cells, vectors, [], memory, *[nothing] * 4)
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
        by_step = Before([x.unsqueeze(0) for x in carried], [[x.unsqueeze(0) for x in y] for y in layers])
        self._begin_backward(by_step, d)
        self._backward_step(0, d)
        return [self.d_vectors[0], *(d_pre[0] for cell in self.cells for d_pre in cell.each_d_pre())]


@lru_cache(maxsize=256)
def _compile(
    settings: Settings, input_size: int, reads: int, counts: tuple[int, ...], likes: tuple[Like, ...], threads: int
) -> Callable[..., Any]:
    """Machine code for these sizes and so many threads, which takes the tensors one by one.

    `torch.compile` would check what it is given at each call, which takes as long as the step.
    """
    layers = settings.num_layers

    def traced(*tensors: Tensor) -> tuple[()]:
        remaining = iter(tensors)
        parameters, running, reset, dropout, before, after, kept, gradients = (
            list(islice(remaining, count)) for count in counts
        )
        memory, link, row = before
        hidden_size = parameters[-2].shape[1] - reads * memory.shape[-1]
        plan = Plan(settings, memory, reads, hidden_size)
        of_network = settings, parameters, input_size, running, reset, dropout
        prev = Carried.of(memory, link, plan.carried.cut(row), layers)
        if gradients:
            new = Carried.of(after[0], after[1], plan.carried.cut(after[2]), layers)
            *gates, vector, kept_row, free_list = kept
            cells, of_memory = plan.split(plan.kept.cut(kept_row))
            d, (d_hidden, d_words, *made) = gradients[: len(prev.flatten())], gradients[len(prev.flatten()) :]
            step = _Step(*of_network, prev, new, gates, vector, cells, [*of_memory, free_list])
            results = step.run_backward(Carried.unflatten(d, layers), d_hidden, d_words)
        else:
            # What is written goes to tensors of its own, which are copied at the end, each buffer as a whole: of writes
            # to parts of what it is given the compiler loses the order.
            own_memory, own_link = torch.empty_like(memory), torch.empty_like(link)
            light, own = ([row.new_empty(shape) for shape in parts.shapes] for parts in (plan.carried, plan.kept))
            gates, others = [tensor.clone() for tensor in kept[:layers]], list(map(torch.empty_like, kept[layers:]))
            vector, _, free_list = others
            cells, of_memory = plan.split(own)
            new = Carried.of(own_memory, own_link, light, layers)
            _Step(*of_network, prev, new, gates, vector, cells, [*of_memory, free_list]).run_forward()
            made = [*after, *kept]
            results = [own_memory, own_link, plan.carried.join(light), *gates, vector, plan.kept.join(own), free_list]
        for buffer, result in zip(made, results, strict=True):
            buffer.copy_(result)
        return ()

    examples: list[Any] = [torch.empty_strided(size, stride, dtype=dtype).zero_() for size, stride, dtype in likes]
    graph = make_fx(traced, decomposition_table=_DECOMPOSITIONS)(*examples)
    # C++ between the kernels too, and threads only for what takes longer than to wake them.
    options = {"config_patches": {"cpp_wrapper": True, "cpp.min_chunk_size": 4096}}
    return torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_example_inputs", options=options)


def _product(a: Tensor, b: Tensor) -> Tensor | None:
    """A row times a matrix, or a matrix times a column, as a sum: that the compiler fuses with what is around it."""
    if a.shape[1] == 1:
        return (a.mT * b).sum(1, keepdim=True)
    if b.shape[2] == 1:
        return (a * b.mT).sum(2, keepdim=True)
    return None


def _bmm(a: Tensor, b: Tensor) -> Any:
    product = _product(a, b)
    return NotImplemented if product is None else product


def _bmm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Any:
    product = _product(a, b)
    return NotImplemented if product is None else out.copy_(product)


def _baddbmm_(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _product(a, b)
    return NotImplemented if product is None else base.mul_(beta).add_(product, alpha=alpha)


_aten = torch.ops.aten
_DECOMPOSITIONS: Any = {_aten.bmm.default: _bmm, _aten.bmm.out: _bmm_out, _aten.baddbmm_.default: _baddbmm_}
