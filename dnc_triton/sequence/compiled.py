"""A sequence whose step and its adjoint are compiled for a CPU by PyTorch's compiler, controller included.

In a small network the time goes into the number of calls. Compiled, a step and its adjoint are two of them instead of
some 150; recomputing memory and link of a step is a third. What is compiled is the step of `Sequence` itself, except
for the link and what is as large, which `_Memory` reformulates for the compiler. A step by itself is one call, with
what a sequence does before its loop and after it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, reduce
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from dnc_reference.types import MemoryState
from dnc_triton.sequence import native_link, pool
from dnc_triton.sequence.carried import Carried, Light
from dnc_triton.sequence.compiler import Like, like_of, machine_code, sum_down
from dnc_triton.sequence.history import History, Plan
from dnc_triton.sequence.loop import Before, Sequence
from dnc_triton.sequence.native_link import link_backward, link_forward
from dnc_triton.sequence.settings import SequenceSettings
from dnc_triton.sequence.step import Step
from dnc_triton.sequence.torch_memory import TorchMemory

Part = Literal["forward", "backward", "replay"]  # the last recomputes memory and link


class CompiledSequence(Sequence):
    """As `Sequence`, with compiled steps."""

    def _by_step(self, state: Carried) -> None:
        history = self.history
        if self.reset is not None:  # as a user has it, batch first, its strides change with T
            self.reset = self.reset.contiguous()
        rows = history.carried_rows.unbind(0)
        states = [(*self.checkpoints[step], row) for step, row in enumerate(rows)]
        over_steps = [*history.gates, history.vectors, history.kept_rows, history.kept_by_memory[-1]]
        kept = zip(*(tensor.unbind(0) for tensor in over_steps), strict=True)
        self.of_step = [
            (*(mask[step] for mask in self.dropout), *states[step], *states[step + 1], *of_step)
            for step, of_step in enumerate(kept)
        ]
        self.num_kept = len(over_steps)
        self.compiled: dict[tuple[Part, bool, bool], Callable[..., Any]] = {}

    def _begin_forward(self) -> None:
        """Nothing."""

    def _forward_step(self, step: int) -> None:
        self._run("forward", step)

    def _begin_backward(self, before: Before, d: Carried) -> None:
        for cell in self.cells:
            cell.make_d_pre()
        d_pres = (d_pre.unbind(0) for cell in self.cells for d_pre in cell.each_d_pre())
        over_steps = self.d_hidden_out, self.d_words_out, self.d_vectors.unbind(0), *d_pres
        self.gradients = list(zip(*over_steps, strict=True))
        self.carried_back = tuple(d.flatten())

    def _backward_step(self, step: int, d: Carried) -> Carried:
        self._run("backward", step, self.carried_back + self.gradients[step])
        return d

    def _replay(self, first: int, last: int) -> None:
        for step in range(first, last):
            self._run("replay", step)

    def _run(self, part: Part, step: int, gradients: tuple[Tensor, ...] = ()) -> None:
        masked = self.stops[step], self.resets[step]
        key = part, *masked
        masks = [mask[step] for mask, used in zip((self.running, self.reset), masked, strict=True) if used]  # type: ignore[index]
        tensors = (*self.parameters, *masks, *self.of_step[step], *gradients)
        compiled = self.compiled.get(key)
        if compiled is None:
            likes = tuple(map(like_of, tensors))
            counts = (len(self.parameters), *map(int, masked), len(self.dropout), 3, 3, self.num_kept, len(gradients))
            settings, sizes = self.settings._replace(checkpoint=1), (self.inputs.shape[-1], self.plan.reads)
            compiled = _compile(part, settings, *sizes, counts, likes, torch.get_num_threads())
            self.compiled[key] = compiled
        compiled(*tensors)


def compiled_step_alone(
    settings: SequenceSettings, inputs: Tensor, before: Carried, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """As `step_alone`, in one call."""
    state = before.flatten()
    new_memory, new_link = pool.empty_like(before.memory.memory), pool.empty_like(before.memory.link)
    tensors = [inputs.contiguous(), *state, *parameters]
    likes = tuple(map(like_of, tensors))
    counts = 1, len(state), len(parameters)
    compiled = _compile_alone(settings, before.words.shape[1], counts, likes, torch.get_num_threads())
    outputs, usage, *others = compiled(*tensors, new_memory, new_link)
    return outputs, [new_memory, usage, new_link, *others]


class _Memory(TorchMemory):
    """`TorchMemory`, reformulated for the compiler where something is large or would be a call of its own.

    Attributes:
        numbers: [N], the slots' numbers, in floating point: integers take vector code several instructions to compare.
        has_native_link: whether link.cpp makes the link.
    """

    numbers: Tensor
    has_native_link: bool

    def replay(self, step: int, prev: MemoryState, new: MemoryState) -> None:
        """To the same bits: by what made the link the first time; what it also reads from the link is not used."""
        if not self.has_native_link:
            super().replay(step, prev, new)
            return
        self._write(step, prev, new)
        link_forward(*_of_link(prev, new), new.link)

    def _follow(self, prev: MemoryState, new: MemoryState, backward: Tensor, forward: Tensor) -> None:
        if not self.has_native_link:
            super()._follow(prev, new, backward, forward)
            return
        followed = link_forward(*_of_link(prev, new), new.link)
        for weights, made in zip((backward, forward), followed, strict=True):
            weights.copy_(made)

    def _update_link(self, prev_link: Tensor, precedence: Tensor, write_weights: Tensor, link: Tensor) -> None:
        """Without writing the diagonal by itself."""
        updated = prev_link + write_weights.mT * (precedence - prev_link) - write_weights * prev_link
        link.copy_(self._off_diagonal(updated))

    def _link_backward(
        self,
        prev_link: Tensor,
        new_link: Tensor,
        precedence: Tensor,
        write_weights: Tensor,
        d_link: Tensor,
        d_read_weights: Tensor,
        d_write_weights: Tensor,
        d_precedence: Tensor,
    ) -> None:
        """Without writing the diagonal or a sum of outer products by itself; in place, so that less is to be cached."""
        if self.has_native_link:
            d_read, d_write, d_before = link_backward(prev_link, precedence, write_weights, self.linked, d_link)
            d_read_weights.copy_(d_read)
            d_write_weights.add_(d_write)
            d_precedence.add_(d_before)
            return
        linked = self.linked.unbind(1)
        terms = zip(linked[: 2 * self.reads], linked[self.reads :], strict=True)
        by_new = reduce(torch.add, (a.unsqueeze(2) * b.unsqueeze(1) for a, b in terms), d_link)
        d_link.copy_(self._off_diagonal(by_new))
        d_read_weights.copy_(torch.bmm(self.d_forward, new_link) + torch.bmm(self.d_backward, new_link.mT))
        by_row = (d_link * (precedence - prev_link)).sum(2)
        d_write_weights.add_(by_row.unsqueeze(1) - sum_down(d_link * prev_link))
        d_precedence.add_(torch.bmm(write_weights, d_link))
        d_link.mul_(1 - write_weights.mT - write_weights)

    def _off_diagonal(self, link: Tensor) -> Tensor:
        return torch.where(self.numbers == self.numbers.unsqueeze(1), 0, link)

    def _sum_of_later(self, row: Tensor) -> Tensor:
        return torch.where(self.numbers > self.numbers.unsqueeze(1), row.unsqueeze(1), 0).sum(2)


def _of_link(prev: MemoryState, new: MemoryState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the new link, and what is read from it, are made from."""
    return prev.link, prev.precedence, new.write_weights, prev.read_weights


class _TracedStep(Step):
    """One step of a sequence while it is traced, when no tensor can be asked for its numbers.

    Args:
        settings, parameters: as in `Sequence`.
        input_size: of the network.
        running, reset, dropout: of this step; the first two are empty where no row has ended, or starts from zeros.
        before, after: the states.
        gates: per layer, what is added up before the loop.
        vector: [B, S], the raw interface vector.
        cells, memory: what the step keeps.
        numbers: [N], as `_Memory` wants them.
    """

    torch_memory = _Memory

    def __init__(
        self,
        settings: SequenceSettings,
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
        numbers: Tensor,
    ) -> None:
        gates, vectors, memory = [x.unsqueeze(0) for x in gates], vector.unsqueeze(0), [x.unsqueeze(0) for x in memory]
        cells, nothing = [[x.unsqueeze(0) for x in kept] for kept in cells], vector.new_empty(0)
        history = History(gates, [], cells, vectors, Light(*[nothing] * 5), memory, *[nothing] * 4)
        super().__init__(settings, history, before.memory.memory, before.words.shape[1])
        self.memory.numbers, self.memory.has_native_link = numbers, native_link.serves(before.memory.memory)
        self.dropout = [mask.unsqueeze(0) for mask in dropout]
        self.running, self.reset = (mask[0].unsqueeze(0) if mask else None for mask in (running, reset))
        self.stops, self.resets = [bool(running)], [bool(reset)]
        self.bind(parameters, input_size, before, after)

    def run_replay(self) -> None:
        """Memory and link alone, from the write weights."""
        self._replay(0, 1)

    def run_backward(self, d: Carried, d_hidden_out: Tensor, d_words_out: Tensor) -> list[Tensor]:
        """Overwrites d; returns the gradients of the interface vector and of the raw gates."""
        self.d_hidden_out, self.d_words_out = (d_hidden_out,), (d_words_out,)
        self.d_vectors = torch.empty_like(self.history.vectors)
        memory, words, layers = self._before(0)
        light = Light.of(memory, words)
        by_step = Before(Light(*(x.unsqueeze(0) for x in light)), [[x.unsqueeze(0) for x in y] for y in layers])
        self._begin_backward(by_step, d)
        self._backward_step(0, d)
        return [self.d_vectors[0], *(d_pre[0] for cell in self.cells for d_pre in cell.each_d_pre())]


@lru_cache(maxsize=256)
def _compile(
    part: Part,
    settings: SequenceSettings,
    input_size: int,
    reads: int,
    counts: tuple[int, ...],
    likes: tuple[Like, ...],
    threads: int,
) -> Callable[..., Any]:
    """A part of a sequence's step, compiled; `machine_code` compiles for as many threads as there are, `threads`."""
    layers = settings.num_layers

    def traced(numbers: Tensor, *tensors: Tensor) -> tuple[()]:
        remaining = iter(tensors)
        parameters, running, reset, dropout, before, after, kept, gradients = (
            list(islice(remaining, count)) for count in counts
        )
        memory, prev_link, row = before
        hidden_size = parameters[-2].shape[1] - reads * memory.shape[-1]
        plan = Plan(settings, memory, reads, hidden_size)
        of_network = settings, parameters, input_size, running, reset, dropout
        prev = Carried.of(memory, prev_link, plan.carried.cut(row), layers)
        # What the forward writes goes to tensors of its own, which are copied at the end, each buffer as a whole: the
        # compiler loses the order of writes to parts of what it is given.
        own_memory, own_link = after[:2] if part == "backward" else map(torch.empty_like, (memory, prev_link))
        own_link = after[1] if native_link.serves(memory) else own_link
        if part == "forward":
            light, own = ([row.new_empty(shape) for shape in parts.shapes] for parts in (plan.carried, plan.kept))
            gates, others = [tensor.clone() for tensor in kept[:layers]], list(map(torch.empty_like, kept[layers:]))
            vector, _, free_list = others
            cells, of_memory = plan.split(own)
            new = Carried.of(own_memory, own_link, light, layers)
            _TracedStep(*of_network, prev, new, gates, vector, cells, [*of_memory, free_list], numbers).run_forward()
            made = [*after, *kept]
            results = [own_memory, own_link, plan.carried.join(light), *gates, vector, plan.kept.join(own), free_list]
        else:
            new = Carried.of(own_memory, own_link, plan.carried.cut(after[2]), layers)
            *gates, vector, kept_row, free_list = kept
            cells, of_memory = plan.split(plan.kept.cut(kept_row))
            step = _TracedStep(*of_network, prev, new, gates, vector, cells, [*of_memory, free_list], numbers)
            if part == "replay":
                step.run_replay()
                made, results = after[:2], [own_memory, own_link]
            else:
                d, (d_hidden, d_words, *made) = gradients[: len(prev.flatten())], gradients[len(prev.flatten()) :]
                results = step.run_backward(Carried.unflatten(d, layers), d_hidden, d_words)
        _copy_all(made, results)
        return ()

    return machine_code(traced, likes, likes[sum(counts[:4])])


@lru_cache(maxsize=256)
def _compile_alone(
    settings: SequenceSettings, reads: int, counts: tuple[int, ...], likes: tuple[Like, ...], threads: int
) -> Callable[..., Any]:
    """A step by itself, of which nothing is kept, compiled; `threads` as in `_compile`.

    The compiled function takes buffers for memory and link last, and returns the outputs and the rest of the new state.
    """

    def traced(numbers: Tensor, *tensors: Tensor) -> list[Tensor]:
        remaining = iter(tensors)
        (inputs,), state, parameters, large = (list(islice(remaining, count)) for count in (*counts, 2))
        prev = Carried.unflatten(state, settings.num_layers)
        memory, prev_link = prev.memory.memory, prev.memory.link
        plan = Plan(settings, memory, reads, parameters[-2].shape[1] - reads * memory.shape[-1])
        carried, (free_list,), *each, kept = (
            [memory.new_empty(shape, dtype=parts.dtype) for shape in parts.shapes]
            for parts in (plan.carried, *plan.others, *plan.by_step)
        )
        *gates, vector = (tensor for (tensor,) in each)
        own_link = large[1] if native_link.serves(memory) else torch.empty_like(prev_link)
        new = Carried.of(torch.empty_like(memory), own_link, carried, settings.num_layers)
        cells, of_memory = plan.split(kept)
        written = gates, vector, cells, [*of_memory, free_list]
        step = _TracedStep(settings, parameters, inputs.shape[-1], [], [], [], prev, new, *written, numbers)
        outputs, states = step.run_alone(inputs), new.flatten()[: len(state)]
        _copy_all(large, [states.pop(0), states.pop(1)])
        return [outputs, *states]

    return machine_code(traced, (*likes, likes[1], likes[3]), likes[1], returns=True)


def _copy_all(buffers: list[Tensor], results: list[Tensor]) -> None:
    for buffer, result in zip(buffers, results, strict=True):
        if buffer is not result:
            buffer.copy_(result)
