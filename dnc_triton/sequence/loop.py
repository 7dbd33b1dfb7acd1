"""A DNC over a sequence as one operation: the loop forward, and the loop backward through time, written by hand.

Products with the inputs are made for all steps before the loop, those of the outputs after it, and the weights'
gradients after the backward loop, one product each over all steps and the batch. What a step leaves behind goes to
buffers that are allocated once. Memory and link, by far the largest, are kept at every step, or at every k-th; the
backward then recomputes the others. In plain PyTorch it does so from the kept weights, without any addressing; kernels
do the whole step again, and so keep less of it. In three launches kernels keep only every fourth link, and recompute
the others in registers.

Letters in every shape: T steps, B batch, H hidden size, N memory slots, W word size, R read heads, S the size of an
interface vector. K = 1.
"""

from __future__ import annotations

from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_reference.types import MemoryState
from dnc_triton.sequence import pool
from dnc_triton.sequence.carried import Carried, Light
from dnc_triton.sequence.cells import Cell
from dnc_triton.sequence.history import Checkpoints, Plan
from dnc_triton.sequence.kept import Kept
from dnc_triton.sequence.product import Product
from dnc_triton.sequence.settings import SequenceSettings
from dnc_triton.sequence.torch_memory import TorchMemory


class Before(NamedTuple):
    """What each step starts from, [T, B, ...], with rows that it resets at zero; as `History.carried` and `.layers`."""

    carried: Light
    layers: list[list[Tensor]]


class Sequence:
    """A network with its weights, a stretch of a sequence, and the buffers of that: forward, and later backward.

    Args:
        settings: see there.
        inputs: [T, B, input_size], T at least 1.
        state: before the first step.
        parameters: in the order of `DNCCell.parameters()`.
        running: [T, B] bool, or None: where it is False the row has ended, for good, and its state stays.
        reset: [T, B] bool, or None: where it is True the row starts from zeros.
        dropout: per layer but the first what its input is multiplied by, [T, B, H] each; or empty.
        history: the buffers that the forward left, for its backward; None for a forward.
        last: memory and link after the last step, for a backward; None for a forward.

    `OneLaunchSequence` has the same methods, and may stand in its place.
    """

    torch_memory = TorchMemory
    overwrites = True  # whether `backward` overwrites the gradients of the last state, which it is given
    chunk = 64  # steps at a time where nothing is kept for a backward, so that memory does not grow with the sequence

    def __init__(
        self,
        settings: SequenceSettings,
        inputs: Tensor,
        state: Carried,
        parameters: list[Tensor],
        running: Tensor | None,
        reset: Tensor | None,
        dropout: list[Tensor],
        *,
        history: list[Tensor] | None = None,
        last: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.settings, self.dropout, self.running = settings, dropout, running
        self.steps, self.batch, input_size = inputs.shape
        if running is not None and reset is not None:
            reset = reset & running
        self.inputs, self.reset = self._without_ended(inputs), reset
        self.stops = _any_by_step(None if running is None else ~running, self.steps)
        self.resets = _any_by_step(reset, self.steps)
        self.parameters = parameters
        self._products(parameters, input_size)

        forwards = history is None
        self.stretch = 1 if forwards else settings.checkpoint  # steps whose work space the kernels have at once
        self.plan = plan = self._plan(settings, state, self.interface.weight.shape[1])
        self.buffers = plan.allocate(self.steps) if history is None else history
        self.history = plan.cut(self.buffers)
        if forwards:
            starts = state.light()
            # In layers without a state the hidden vector before is not used, but it is passed on with the others.
            if settings.cell.states == 0:
                starts += [torch.zeros_like(layer[0][0]) for layer in self.history.layers]
            for trail, start in zip(self.history.trails(), starts, strict=True):
                trail[0] = start
        first = state.memory.memory, state.memory.link
        last = (pool.empty_like(first[0]), pool.empty_like(first[1])) if last is None else last
        between = self.history.memories, self.history.links
        self.checkpoints = Checkpoints(settings, first, last, *between, self.steps, forwards=forwards)
        self.cells = self._make_cells()
        self._by_step(state)

    @staticmethod
    def allocate(
        settings: SequenceSettings, state: Carried, steps: int, hidden_size: int, resets: bool
    ) -> list[Tensor]:
        """The buffers for T steps from a state of these sizes. Nothing is filled in."""
        return Sequence._plan(settings, state, hidden_size).allocate(steps)

    @staticmethod
    def _plan(settings: SequenceSettings, state: Carried, hidden_size: int) -> Plan:
        return Plan(settings, state.memory.memory, state.words.shape[1], hidden_size)

    def forward(self) -> tuple[Tensor, Carried]:
        """Returns the outputs [T, B, output_size] and the state after the last step."""
        history = self.history
        self._begin_gates()
        self._begin_forward()
        for step in range(self.steps):
            self._forward_step(step)
        outputs = self._without_ended(self._clip(self._project(*self._before_output())))
        # Nothing that is returned is a part of the history.
        if self.running is None:
            light = [trail[-1].clone() for trail in history.trails()]
        else:  # in the history a row that has ended runs on
            last, rows = self.running.sum(0), torch.arange(self.batch, device=self.inputs.device)
            light = [trail[last, rows] for trail in history.trails()]
        if self.settings.cell.states == 0:
            del light[len(history.carried) :]
        return outputs, Carried.of(*self.checkpoints[self.steps], light, self.settings.num_layers)

    def backward(
        self, d_outputs: Tensor, d_last: Carried, *, wants_inputs: bool, wants_state: bool
    ) -> tuple[Tensor | None, Carried | None, list[Tensor]]:
        """From the gradients of what `forward` returned to those of inputs, state and parameters.

        Overwrites `d_last`. Of inputs and state, what is not wanted is None.
        """
        settings, history = self.settings, self.history
        d_outputs = self._without_ended(d_outputs)
        if settings.clip is not None:
            within = self._project(*self._before_output()).abs() <= settings.clip
            d_outputs = torch.where(within, d_outputs, 0)  # infinite ones too
        self.d_hidden_out = self.from_hidden.all_backward(d_outputs).unbind(0)
        d_words_out = self.from_words.all_backward(d_outputs)
        self.d_words_out = d_words_out.unflatten(-1, d_last.words.shape[1:]).unbind(0)
        vectors = history.vectors  # laid out like these, for their alignment
        self.d_vectors = vectors.new_empty_strided(vectors.shape, vectors.stride())

        d_layers = d_last.layers
        if settings.cell.states == 0:
            d_layers = [[torch.zeros_like(layer[0][0])] for layer in history.layers]
        d = Carried(d_last.memory, d_last.words, d_layers)
        before = Before(
            Light(*(self._start(trail[:-1]) for trail in history.carried)),
            [[self._start(trail[:-1]) for trail in layer] for layer in history.layers],
        )
        self._begin_backward(before, d)
        for step in reversed(range(self.steps)):
            if settings.checkpoint > 1 and (step == self.steps - 1 or (step + 1) % settings.checkpoint == 0):
                self._replay(step - step % settings.checkpoint, step)
            d = self._backward_step(step, d)
        self._finish_rows(d)
        d_parameters = self._weight_gradients(d_outputs, before)
        d_inputs = self.from_inputs.all_backward(self.cells[0].d_pre) if wants_inputs else None
        return d_inputs, d if wants_state else None, d_parameters

    def _by_step(self, state: Carried) -> None:
        """Cut the history into steps, for the loop and for the memory's part."""
        history = self.history
        self.carried = [trail.unbind(0) for trail in history.carried]
        self.layers = [[trail.unbind(0) for trail in layer] for layer in history.layers]
        self.vectors = history.vectors.unbind(0)
        self.memory = self._memory(state.memory.memory, state.words.shape[1])

    def _begin_gates(self) -> None:
        """What does not depend on the step before: the part of the inputs, and the biases."""
        for layer, (gates, biases) in enumerate(zip(self.history.gates, self.biases, strict=True)):
            # The GRU's second bias stands apart.
            bias = biases[0] if self.settings.controller == "gru" else reduce(torch.add, biases)
            torch.add(self.from_inputs(self.inputs), bias, out=gates) if layer == 0 else gates.copy_(bias)

    def _begin_forward(self) -> None:
        self.memory.begin_forward()

    def _forward_step(self, step: int) -> None:
        before, after = self._before(step), self._after(step)
        below = before.words.flatten(1)
        for layer, cell in enumerate(self.cells):
            if layer and self.dropout:
                below = torch.mul(below, self.dropout[layer - 1][step], out=self._dropped)
            cell.forward(step, below, before.layers[layer], after.layers[layer])
            below = cell.above(step, after.layers[layer])
        self.interface.add_to(self.interface_bias, after.layers[-1][0], self.vectors[step])
        self.memory.forward(step, before.memory, after.memory, after.words, fresh=self.resets[step])
        # All fields, not memory and link alone: a caller's link need not be one that writing makes, and weights that
        # went on following it after a row's end would grow without bound.
        self._hold(step, before.memory, after.memory, *MemoryState._fields)

    def _begin_backward(self, before: Before, d: Carried) -> None:
        # What passes through the steps after a row's end: the gradient of its last state.
        self.held = [tensor.clone() for tensor in d.flatten()[self.by_kernel :]] if any(self.stops) else []
        light = before.carried
        self.memory.begin_backward(light.usage, light.read_weights, light.write_weights, self.d_vectors)
        self.d_below = torch.empty_like(before.layers[0][0][0])
        # The product that makes the gradient of the words read before a step can add the output layer's part, unless
        # rows are put back after it (lengths, reset).
        self.adds_ahead = self.below[0].small and self.running is None and self.reset is None
        for cell, layer_before in zip(self.cells, before.layers, strict=True):
            cell.begin_backward(layer_before)

    def _backward_step(self, step: int, d: Carried) -> Carried:
        """From the gradient of the state after a step, which is overwritten, to that of the state before it."""
        memory, after = self._memory_before(step), self._after(step)
        if not self.adds_ahead or step == self.steps - 1:
            d.words.add_(self.d_words_out[step])
        if self.settings.link_every > 1:
            memory = memory._replace(link=self.checkpoints[step - self.checkpoints.behind(step)][1])
        d = d._replace(memory=self.memory.backward(step, memory, after.memory, d.words, d.memory))
        d_above = None
        for layer in reversed(range(self.settings.num_layers)):
            cell = self.cells[layer]
            d_below = self.d_below if layer else d.words.flatten(1)
            ahead = self.d_words_out[step - 1] if self.adds_ahead and layer == 0 and step else None
            if layer == self.settings.num_layers - 1:
                given = self.d_hidden_out[step], self.interface, self.d_vectors[step]
                cell.backward_highest(step, d.layers[layer], *given, d_below, ahead)
            else:
                cell.backward(step, d.layers[layer], d_above, d_below, ahead)
            d_above = d_below.mul_(self.dropout[layer - 1][step]) if layer and self.dropout else d_below
        own = d.flatten()[self.by_kernel :]
        if self.stops[step]:
            self._keep_ended(step, own, self.held)
        if self.resets[step]:
            for gradient in own:
                gradient.masked_fill_(_rows(self.reset[step], gradient), 0)  # type: ignore[index]
        return d

    def _products(self, parameters: list[Tensor], input_size: int) -> None:
        """The parameters as the products they are used in."""
        dtype = self.settings.product_dtype
        count = 2 if self.settings.cell.states else 1  # weights of a layer, and biases: of what is below, of the state
        remaining = [tensor if tensor.dim() > 1 else tensor.contiguous() for tensor in parameters]
        weights: list[list[Tensor]] = []
        self.biases: list[list[Tensor]] = []
        for _ in range(self.settings.num_layers):
            weights.append([remaining.pop(0) for _ in range(count)])
            self.biases.append([remaining.pop(0) for _ in range(count)])
        interface_weight, self.interface_bias, output_weight, self.output_bias = remaining
        lowest = weights[0][0]
        self.from_inputs, weights[0][0] = Product(lowest[:, :input_size], dtype), lowest[:, input_size:]
        by_step = self._product_by_step(weights)
        self.below = [by_step(below, dtype) for below, *_ in weights]
        self.recurrent = [by_step(recurrent[0], dtype) if recurrent else None for _, *recurrent in weights]
        self.interface = by_step(interface_weight, dtype)
        self.from_hidden = Product(output_weight[:, : interface_weight.shape[1]], dtype)
        self.from_words = Product(output_weight[:, interface_weight.shape[1] :], dtype)

    def _product_by_step(self, weights: list[list[Tensor]]) -> type[Product]:
        """The class of a step's products: by our own kernels if the memory's part is, and the batch small."""
        if self.settings.layout is None:
            return Product
        from dnc_triton.sequence.small_product import SmallProduct, is_small

        dtype = self.settings.product_dtype
        small = all(is_small(self.batch, *of_layer, dtype=dtype) for of_layer in weights)
        return SmallProduct if small else Product

    def _make_cells(self) -> list[Cell]:
        settings, history = self.settings, self.history
        return [
            settings.cell(gates, below, recurrent, biases[-1], settings.clip, settings.max_activation_gradient, kept)
            for gates, below, recurrent, biases, kept in zip(
                history.gates, self.below, self.recurrent, self.biases, history.kept_by_cells, strict=True
            )
        ]

    @property
    def by_kernel(self) -> int:
        """How many tensors of `Carried.flatten` (the memory's) kernels themselves reset, and hold after a row's end."""
        return 0 if self.settings.layout is None else len(MemoryState._fields)

    def _memory(self, memory: Tensor, reads: int) -> Any:
        """The memory's part, by kernels if there is a layout, else in plain PyTorch."""
        settings, history = self.settings, self.history
        options: dict[str, Any] = {
            "strength_offset": settings.strength_offset,
            "stop_usage_gradient": settings.stop_usage_gradient,
            "reads": reads,
        }
        if settings.layout is None:
            _, slots, word = memory.shape
            return self.torch_memory(history.vectors, Kept(*history.kept_by_memory), slots=slots, word=word, **options)
        from dnc_triton.sequence.triton_memory import TritonMemory

        # Where steps are recomputed, so is what they keep: it is no part of the history.
        again = settings.checkpoint > 1
        kept = self.plan.work_space(min(self.stretch, self.steps)) if again else history.kept_by_memory
        masks, row = (self.running, self.reset), history.carried_rows.stride(0)
        options |= {"layout": settings.layout, "behind": self.checkpoints.behind, "row": row}
        return TritonMemory(history.vectors, kept, memory, *masks, **options)

    def _before(self, step: int) -> Carried:
        """What goes into a step, with rows that it resets at zero, except in what the kernels reset."""
        state = self._at(step)
        if not self.resets[step]:
            return state
        rows, tensors = self.reset[step], state.flatten()  # type: ignore[index]
        for tensor, fresh in zip(tensors[self.by_kernel :], self._fresh, strict=True):
            torch.where(_rows(rows, tensor), self._zero, tensor, out=fresh)
        return Carried.unflatten([*tensors[: self.by_kernel], *self._fresh], len(state.layers))

    def _memory_before(self, step: int) -> MemoryState:
        """The memory's part of `_before`, which is all that the backward asks for."""
        return (self._at if self.by_kernel else self._before)(step).memory

    # Work space, made on demand.

    @cached_property
    def _fresh(self) -> list[Tensor]:
        """Buffers for a state with rows that begin from zeros, without what the kernels reset."""
        return [pool.empty_like(tensor) for tensor in self._at(0).flatten()[self.by_kernel :]]

    @cached_property
    def _zero(self) -> Tensor:
        return self.history.vectors.new_zeros(())

    @cached_property
    def _dropped(self) -> Tensor:
        """What a layer but the first is given, after dropout, [B, H]."""
        return torch.empty_like(self.dropout[0][0])

    def _after(self, step: int) -> Carried:
        return self._at(step + 1)

    def _at(self, step: int) -> Carried:
        memory, link = self.checkpoints[step]
        usage, precedence, read_weights, write_weights, words = (entries[step] for entries in self.carried)
        return Carried(
            MemoryState(memory, usage, link, precedence, read_weights, write_weights),
            words,
            [[trail[step] for trail in layer] for layer in self.layers],
        )

    def _start(self, trail: Tensor) -> Tensor:
        """A quantity as it goes into each step: [T, B, ...], rows that a step resets at zero."""
        return trail if self.reset is None else trail.masked_fill(_rows(self.reset, trail), 0)

    def _replay(self, first: int, last: int) -> None:
        """Recompute memory and link before the steps after `first`, which is kept, up to `last`.

        Kernels run step `last` as well, for what its backward needs to be kept.
        """
        for step in range(first, last):
            before, after = self._memory_before(step), self._after(step).memory
            self.memory.replay(step, before, after)
            self._hold(step, before, after, "memory", "link")
        if self.by_kernel:
            self.memory.replay(last, self._memory_before(last), None)

    def _before_output(self) -> tuple[Tensor, Tensor]:
        """What outputs are made from: hidden vectors [T, B, H] and words read [T, B, R W]."""
        return self.history.layers[-1][0][1:], self.history.carried.words[1:].flatten(2)

    def _project(self, hidden: Tensor, words: Tensor) -> Tensor:
        """The output layer, before the clip."""
        return self.from_hidden(hidden, self.output_bias).add_(self.from_words(words))

    def _clip(self, outputs: Tensor) -> Tensor:
        return outputs if self.settings.clip is None else outputs.clamp_(-self.settings.clip, self.settings.clip)

    def _weight_gradients(self, d_outputs: Tensor, before: Before) -> list[Tensor]:
        """One product each, in the order of the parameters."""
        words_before = self._without_ended(before.carried.words)
        gradients: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            if layer == 0:
                from_inputs = self.from_inputs.weight_gradient(cell.d_pre, self.inputs)
                from_words = self.below[0].weight_gradient(cell.d_pre, words_before.flatten(2))
                gradients.append(torch.cat([from_inputs, from_words], 1))
            else:
                under = self.cells[layer - 1]
                below = self.history.layers[layer - 1][0][1:] if under.clip is None else under.unclipped[0]
                below = below * self.dropout[layer - 1] if self.dropout else below
                gradients.append(self.below[layer].weight_gradient(cell.d_pre, self._without_ended(below)))
            recurrent = self.recurrent[layer]
            if recurrent is not None:
                hidden_before = self._without_ended(before.layers[layer][0])
                gradients.append(recurrent.weight_gradient(cell.d_pre_hidden, hidden_before))
                gradients.append(cell.d_pre.sum((0, 1)))
            gradients.append(cell.d_pre_hidden.sum((0, 1)))
        hidden, words = map(self._without_ended, self._before_output())
        gradients += [self.interface.weight_gradient(self.d_vectors, hidden), self.d_vectors.sum((0, 1))]
        from_hidden = self.from_hidden.weight_gradient(d_outputs, hidden)
        from_words = self.from_words.weight_gradient(d_outputs, words)
        return [*gradients, torch.cat([from_hidden, from_words], 1), d_outputs.sum((0, 1))]

    def _without_ended(self, x: Tensor) -> Tensor:
        """[T, B, ...], zeros where a row has ended, NaN or not: what overflows as it runs on is NaN even times 0."""
        return x if self.running is None else torch.where(_rows(self.running, x), x, 0)

    def _hold(self, step: int, before: MemoryState, after: MemoryState, *fields: str) -> None:
        """These fields of rows that have ended stay. All else runs on, and is not used."""
        if not self.by_kernel and self.stops[step]:
            self._keep_ended(step, *([getattr(state, field) for field in fields] for state in (after, before)))

    def _keep_ended(self, step: int, tensors: list[Tensor], kept: list[Tensor]) -> None:
        """Put rows that have ended back to what they were."""
        rows = self.running[step]  # type: ignore[index]
        for tensor, old in zip(tensors, kept, strict=True):
            torch.where(_rows(rows, tensor), tensor, old, out=tensor)

    def _finish_rows(self, d: Carried) -> None:
        """After the loop back: no gradient from steps past a row's end, nor of a state that the first step reset."""
        if self.running is not None:
            for gradient in (self.d_vectors, *(d_pre for cell in self.cells for d_pre in cell.each_d_pre())):
                gradient.masked_fill_(~self.running.unsqueeze(-1), 0)
        if self.reset is not None:
            for gradient in d.flatten()[: self.by_kernel]:
                gradient.masked_fill_(_rows(self.reset[0], gradient), 0)


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    """A mask [B], or [T, B], that applies to [B, ...], or [T, B, ...]."""
    return rows.view(*rows.shape, *[1] * (like.dim() - rows.dim()))


def _any_by_step(mask: Tensor | None, steps: int) -> list[bool]:
    """Whether a step has any row marked. Only a CPU is asked; from a GPU the answer would have to be waited for."""
    if mask is None:
        return [False] * steps
    if mask.device.type != "cpu":
        return [True] * steps
    answers: list[bool] = mask.any(1).tolist()
    return answers
