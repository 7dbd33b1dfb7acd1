"""A DNC over a sequence in one launch each way: the counterpart of `loop.Sequence` for small networks on a GPU.

Products with the inputs are made for all steps before the launch, those of the output layer after it, and the weights'
gradients after the backward launch, one product each over all steps and the batch. Kernels do everything in between.

Letters in every shape: T steps, B batch, H hidden size, N memory slots, W word size, R read heads, S the size of an
interface vector, F = H + R·W that of the features: the controller's output and the words read. K = 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnc_reference.interface import interface_sizes
from dnc_reference.types import MemoryState
from dnc_triton.kernels.launcher import aligned, launch_or_compile
from dnc_triton.kernels.layout import Layout, compute_dtype, kept_shapes
from dnc_triton.sequence.carried import Carried
from dnc_triton.sequence.product import Product
from dnc_triton.sequence.settings import SequenceSettings

# Rows of all steps together, up to which one launch makes the gradients of all weights: a library takes a launch or two
# for each of eight, and as long for few rows as for many. On a CPU the kernel would be interpreted.
MOST_ROWS = {"cuda": 1024}


class OneLaunchHistory(NamedTuple):
    """The buffers, contiguous, in the order in which the forward kernel takes them.

    What a step hands to the next has T+1 entries, the first from before the sequence. With `reset` it has one more, of
    zeros, with which a row begins anew.

    Attributes:
        gates: [T, B, 4H], σ(i), σ(f), tanh(g), σ(o).
        features: [T+1, B, F], the hidden vector and the words read.
        cells: [T+1, B, H], clipped.
        vectors: [T, B, S], the raw interface vectors.
        memory, usage, link, precedence, read_weights, write_weights: [T+1, B, ...], as in `MemoryState`.
        kept, free_list: [T, B, ...], of `layout.kept_shapes`.
    """

    gates: Tensor
    features: Tensor
    cells: Tensor
    vectors: Tensor
    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    read_weights: Tensor
    write_weights: Tensor
    kept: Tensor
    free_list: Tensor

    def trails(self) -> list[Tensor]:
        """The buffers of what is carried on: features, cells, the fields of `MemoryState`."""
        return [self.features, self.cells, *self[4:10]]


class OneLaunchSequence:
    """A network with its weights, a stretch of a sequence, and the buffers of that: forward, and later backward.

    For an LSTM of one layer, which has no dropout. The states of all steps are kept, whatever `settings.checkpoint`.

    Args:
        settings: see there; with a layout.
        inputs: [T, B, input_size], T at least 1.
        state: before the first step.
        parameters: in the order of `DNCCell.parameters()`.
        running: [T, B] bool, or None: where it is False the row has ended, for good, and its state stays.
        reset: [T, B] bool, or None: where it is True the row starts from zeros.
        dropout: not used: it is for layers that are not there.
        history: the buffers that the forward left, for its backward; None for a forward.
        last: not needed.
    """

    overwrites = False
    chunk = 16  # as in `Sequence`; here memory and link are kept for all of them

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
        self.settings, self.parameters, self.running = settings, parameters, running
        if running is not None:
            inputs = torch.where(running.unsqueeze(-1), inputs, 0)
            reset = None if reset is None else reset & running
        self.inputs, self.reset = inputs, reset
        self.lengths = None if running is None else running.sum(0, dtype=torch.int32)
        self.steps, self.batch, input_size = inputs.shape
        _, self.slots, self.word = state.memory.memory.shape
        self.reads = state.words.shape[1]

        dtype = settings.product_dtype
        weight_ih, weight_hh, *self.biases, interface_weight, bias, output_weight, self.output_bias = parameters
        self.interface_bias = aligned(bias)
        self.hidden_size = weight_hh.shape[1]
        self.from_inputs = Product(weight_ih[:, :input_size], dtype)
        self.recurrent = [Product(weight, dtype) for weight in (weight_hh, weight_ih[:, input_size:])]
        self.interface = Product(interface_weight, dtype)
        self.output = Product(output_weight, dtype)

        forwards = history is None
        if history is None:
            history = self.allocate(settings, state, self.steps, self.hidden_size, reset is not None)
        self.buffers, self.history = history, OneLaunchHistory(*history)
        if forwards:
            trails = self.history.trails()
            if running is not None:  # where a row does not run, products with its zero gradients must be zero
                self.history.features.zero_()
            torch._foreach_copy_([trail[0] for trail in trails], self._carried_on(state))
            if reset is not None:
                torch._foreach_zero_([trail[-1] for trail in trails])

    @staticmethod
    def allocate(
        settings: SequenceSettings, state: Carried, steps: int, hidden_size: int, resets: bool
    ) -> list[Tensor]:
        """The buffers for T steps from a state of these sizes. Nothing is filled in."""
        memory = state.memory.memory
        batch, slots, word = memory.shape
        reads = state.words.shape[1]
        entries = steps + 2 if resets else steps + 1
        kept, free_list = kept_shapes(batch, slots, reads)
        compute = compute_dtype(memory.dtype)
        return [
            memory.new_empty(steps, batch, 4 * hidden_size),
            memory.new_empty(entries, batch, hidden_size + reads * word),
            memory.new_empty(entries, batch, hidden_size),
            memory.new_empty(steps, batch, sum(interface_sizes(reads, 1, word).values())),
            *(memory.new_empty(entries, *field.shape) for field in state.memory),
            memory.new_empty((steps, *kept), dtype=compute),
            memory.new_empty((steps, *free_list), dtype=torch.int32),
        ]

    def forward(self) -> tuple[Tensor, Carried]:
        """Returns the outputs [T, B, output_size] and the state after the last step."""
        history = self.history
        self._launch_forward(self.from_inputs(self.inputs, self.biases[0] + self.biases[1]))
        outputs = self._project()
        if self.settings.clip is not None:
            outputs.clamp_(-self.settings.clip, self.settings.clip)
        if self.running is not None:
            outputs = torch.where(self.running.unsqueeze(-1), outputs, 0)
        # Nothing that is returned is a part of the history.
        if self.lengths is None:
            last = [trail[self.steps] for trail in history.trails()]
            copies = [torch.empty_like(entry) for entry in last]
            torch._foreach_copy_(copies, last)
        else:
            rows = torch.arange(self.batch, device=self.lengths.device)
            copies = [trail[self.lengths, rows] for trail in history.trails()]
        return outputs, self._as_carried(copies)

    def backward(
        self, d_outputs: Tensor, d_last: Carried, *, wants_inputs: bool, wants_state: bool
    ) -> tuple[Tensor | None, Carried | None, list[Tensor]]:
        """As that of `Sequence`, but overwrites nothing."""
        history = self.history
        if self.running is not None:
            d_outputs = torch.where(self.running.unsqueeze(-1), d_outputs, 0)
        if self.settings.clip is not None:
            within = self._project().abs() <= self.settings.clip
            d_outputs = torch.where(within, d_outputs, 0)  # infinite ones too

        d_sent_back = self.output.all_backward(d_outputs)
        last = self._carried_on(d_last)
        if self.lengths is None:
            last[0] += d_sent_back[-1]
        else:  # a row that never runs sends back zeros, from any step
            last[0] += d_sent_back[self.lengths - 1, torch.arange(self.batch, device=self.lengths.device)]
        # Two entries that take turns; a third one of zeros for what a reset keeps from going back.
        d_carried = [d.new_empty(2 if self.reset is None else 3, *d.shape) for d in last]
        torch._foreach_copy_([d[self.steps % 2] for d in d_carried], last)
        if self.lengths is not None:  # by its length a row begins with one or the other
            torch._foreach_copy_([d[(self.steps + 1) % 2] for d in d_carried], last)
        if self.reset is not None:
            torch._foreach_zero_([d[2] for d in d_carried])
        d_gates, d_vectors = torch.empty_like(history.gates), torch.empty_like(history.vectors)
        if self.running is not None:
            torch._foreach_zero_([d_gates, d_vectors])
        self._launch_backward([d_sent_back, d_gates, d_vectors, *d_carried])

        d_state = None
        if wants_state:
            d_state = self._as_carried([d[0] for d in d_carried])
            if self.reset is not None:
                for d in d_state.flatten():
                    d.masked_fill_(self.reset[0].view(-1, *[1] * (d.dim() - 1)), 0)
        d_parameters = self._weight_gradients(d_outputs, d_vectors, d_gates)
        return self.from_inputs.all_backward(d_gates) if wants_inputs else None, d_state, d_parameters

    def _project(self) -> Tensor:
        """The output layer over all steps, before the clip."""
        return self.output(self.history.features[1 : self.steps + 1], self.output_bias)

    def _weight_gradients(self, d_outputs: Tensor, d_vectors: Tensor, d_gates: Tensor) -> list[Tensor]:
        """In the order of the parameters: by one launch where that is faster, else by a product each."""
        before, after = self.history.features[: self.steps], self.history.features[1 : self.steps + 1]
        if self.reset is not None:
            before = before.masked_fill(self.reset.unsqueeze(-1), 0)
        rows, dtypes = self.steps * self.batch, {d_gates.dtype, self.settings.product_dtype}
        most = max(x.numel() for x in (self.inputs, d_outputs, *self.parameters))  # the kernel counts in 32 bits
        if dtypes == {torch.float32} and 0 < rows <= MOST_ROWS.get(d_gates.device.type, 0) and most < 2**31:
            from dnc_triton.kernels.gradients import weight_gradients

            return list(weight_gradients(d_gates, d_vectors, aligned(d_outputs), self.inputs, before, after))
        by_both = self.recurrent[0].weight_gradient(d_gates, before)  # both weights' in one product
        by_hidden, by_words = by_both.tensor_split([self.hidden_size], 1)
        by_inputs = self.from_inputs.weight_gradient(d_gates, self.inputs)
        by_bias = d_gates.sum((0, 1))
        return [
            torch.cat([by_inputs, by_words], 1),
            by_hidden.contiguous(),
            by_bias,
            by_bias.clone(),
            self.interface.weight_gradient(d_vectors, after[..., : self.hidden_size]),
            d_vectors.sum((0, 1)),
            self.output.weight_gradient(d_outputs, after),
            d_outputs.sum((0, 1)),
        ]

    def _carried_on(self, state: Carried) -> list[Tensor]:
        """A state, or its gradient, as what the kernels carry on: features, cell, the memory's fields."""
        hidden, cell = state.layers[0]
        return [torch.cat([hidden, state.words.flatten(1)], 1), cell, *state.memory]

    def _as_carried(self, tensors: list[Tensor]) -> Carried:
        """The inverse."""
        features, cell, *memory = tensors
        hidden, words = features.tensor_split([self.hidden_size], 1)
        words = words.unflatten(1, (self.reads, self.word))
        # A copy each: an operator's results share no storage.
        hidden, words = (part.clone(memory_format=torch.contiguous_format) for part in (hidden, words))
        return Carried(MemoryState(*memory), words, [[hidden, cell]])

    # --- the launches; Triton may not be there where nothing is launched ----------------------------------------------

    def _launch_forward(self, pre: Tensor) -> None:
        from dnc_triton.kernels.sequence import sequence_forward_kernel
        from dnc_triton.kernels.step_launch import forward_scratch

        if self.batch == 0:
            return
        by_unit = [product.weight.unflatten(0, (4, -1)).permute(2, 1, 0) for product in self.recurrent]
        interface = self.interface.weight.T
        padding = interface[:, : -len(self.interface_bias) % 4]  # any numbers: what they make is not used
        launch_or_compile(
            sequence_forward_kernel,
            (self.batch,),
            pre.contiguous(),
            *self.history,
            forward_scratch(self.history.memory[0], self.reads, self._layout),
            torch.cat(by_unit),
            torch.cat([interface, padding], 1),
            self.interface_bias,
            **self._arguments(backward=False),
        )

    def _launch_backward(self, gradients: list[Tensor]) -> None:
        from dnc_triton.kernels.sequence import sequence_backward_kernel
        from dnc_triton.kernels.step_launch import backward_scratch

        if self.batch == 0:
            return
        gates, _, *others = self.history
        launch_or_compile(
            sequence_backward_kernel,
            (self.batch,),
            gates,
            *others,
            *gradients,
            backward_scratch(self.history.memory[0], self.reads, self._layout),
            torch.cat([product.weight for product in self.recurrent], 1),
            aligned(self.interface.weight),
            **self._arguments(backward=True),
        )

    def _arguments(self, *, backward: bool) -> dict[str, Any]:
        """What both kernels take."""
        from dnc_triton.kernels.sequence import ControllerSizes
        from dnc_triton.kernels.sizes import Sizes
        from dnc_triton.kernels.step_launch import compile_options

        layout = self._layout.of_backward if backward else self._layout  # by which its work space is measured
        settings, num_warps, compute = self.settings, layout.num_warps, compute_dtype(self.history.memory.dtype)
        sizes = Sizes.of(
            self.slots,
            self.word,
            self.reads,
            layout,
            num_warps,
            strength_offset=settings.strength_offset,
            stop_usage_gradient=backward and settings.stop_usage_gradient,
            compute=compute,
        )
        controller = ControllerSizes.of(
            self.hidden_size,
            self.reads * self.word,
            sizes.INTERFACE,
            layout,
            clip=settings.clip,
            max_gradient=settings.max_activation_gradient if backward else None,
            compute=compute,
        )
        return {
            "lengths_ptr": self.lengths,
            "reset_ptr": None if self.reset is None else self.reset.to(torch.uint8).contiguous(),
            "batch": self.batch,
            "steps": self.steps,
            "sizes": sizes,
            "controller": controller,
            **compile_options(layout, num_warps, backward=backward),
        }

    @property
    def _layout(self) -> Layout:
        assert self.settings.layout is not None
        return self.settings.layout
