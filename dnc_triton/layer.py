"""The public layer: a DNC over a sequence, used like `nn.LSTM`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten

from dnc_reference import DNCCell, DNCState, MemoryState
from dnc_reference.checks import check_bool, check_bound, check_dense, check_size, check_tensor
from dnc_reference.controller import CONTROLLERS
from dnc_reference.interface import check_strength
from dnc_reference.memory import check_memory_state
from dnc_triton.dispatch import check_backend, choose, explain_problem
from dnc_triton.kernels.layout import MOST_IN_ONE_LAUNCH, MOST_SLOTS
from dnc_triton.ops.eager import is_eager, is_transformed
from dnc_triton.problem import Problem
from dnc_triton.sequence.parts import zeros
from dnc_triton.sequence.unroll import begins_with_zeros, is_plain
from dnc_triton.trace import Trace, traced_unroll

# Memory sizes N for which memory and link begin as zeros of one batch element, expanded over the batch. Smaller ones
# may be served by one launch for the sequence, larger ones by plain PyTorch; both need zeros for each element.
SHARED = {"cuda": range(MOST_IN_ONE_LAUNCH + 1, MOST_SLOTS + 1)}


class DNC(DNCCell):
    """A Differentiable Neural Computer over sequences.

    Args:
        input_size, hidden_size, output_size: of the input, of each controller layer, of the output.
        memory_size: N, slots of the memory.
        word_size: W, numbers in a slot.
        num_reads: R, read heads.
        num_writes: K, write heads; the paper has 1.
        controller: "lstm", "gru", "rnn", "feedforward", or a factory ``(input_size, hidden_size) -> nn.Module`` of
            your own. The module it returns needs ``initial_state(batch_size, *, device, dtype)``, which returns a nest
            of tensors, batch first, and ``forward(inputs [B, I], state) -> (hidden [B, H], state)``. I is the size of
            the step's input plus R·W, for the words read in the step before.
        num_layers, dropout: of a built-in controller, as in `nn.LSTM`: dropout acts between layers.
        batch_first: inputs and outputs are [B, T, ·]; else [T, B, ·].
        clip: bound on the absolute value of the controller's output and state and of the layer's output; None for none.
        strength: "oneplus", as in the paper, or "softplus", as in DeepMind's published code.
        stop_usage_gradient: no gradient from usage to earlier writes, as in DeepMind's published code.
        max_activation_gradient: bound on each element of the gradient with respect to the hidden vectors of a built-in
            controller, at every step, which bounds what flows back through time; None for none. The paper has 10.
            If the loss is scaled, as by a `GradScaler`, the scaled gradient is bounded: scale
            ``controller.max_activation_gradient`` by the same factor.
        checkpoint: at which steps memory and link, by far the largest tensors, are kept for the backward. None: at
            every step (the backend "triton_split" keeps every fourth link). An integer k: at every k-th; the backward
            computes the others again, to the same bits, which takes time. It calls parts of your own and hooks again,
            so whatever these change is changed twice; where the layer runs step by step, parameters, the given state
            and the mode, train or eval, must stay as they are until then. "auto": at every step while that takes at
            most 256 MiB on a CPU or a quarter of a GPU's memory, else at every √T-th; always at every step where the
            layer runs step by step, as with several write heads or parts of your own, and in a program that is
            exported with the batch size or T left open.
        backend: "auto", or the name of the backend to use; see `explain`.
        device, dtype: of the parameters and the state; None for torch's defaults.

    Parameters are initialised as torch initialises its own recurrent cells and linear layers.

    Raises:
        ValueError: a size or checkpoint below 1; an unknown controller, strength or backend; dropout, clip or
            max_activation_gradient out of range; num_layers, dropout or max_activation_gradient with a controller of
            your own.
        TypeError: a size or checkpoint that is no integer, a flag that is no bool, dropout or a bound that is no
            number, a dtype that PyTorch does not compute in; a controller that is neither a name nor a factory of one.

    Example:
        >>> dnc = DNC(input_size=8, hidden_size=64, output_size=8, memory_size=16, word_size=16)
        >>> outputs, state = dnc(torch.randn(4, 20, 8))
        >>> more_outputs, state = dnc(torch.randn(4, 20, 8), state.detach())

    Source: Graves et al., "Hybrid computing using a neural network with dynamic external memory", Nature 538 (2016).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        memory_size: int = 128,
        word_size: int = 64,
        num_reads: int = 4,
        num_writes: int = 1,
        controller: str | Callable[[int, int], nn.Module] = "lstm",
        num_layers: int = 1,
        dropout: float = 0.0,
        batch_first: bool = True,
        clip: float | None = None,
        strength: str = "oneplus",
        stop_usage_gradient: bool = False,
        max_activation_gradient: float | None = None,
        checkpoint: int | str | None = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_backend("backend", backend)
        _check_checkpoint(checkpoint)
        check_bool("batch_first", batch_first)
        super().__init__(
            input_size,
            hidden_size,
            output_size,
            memory_size=memory_size,
            word_size=word_size,
            num_reads=num_reads,
            num_writes=num_writes,
            controller=controller,
            num_layers=num_layers,
            dropout=dropout,
            clip=clip,
            strength=strength,
            stop_usage_gradient=stop_usage_gradient,
            max_activation_gradient=max_activation_gradient,
            device=device,
            dtype=dtype,
        )
        self.batch_first = batch_first
        self.checkpoint = checkpoint
        self.backend = backend

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor | PackedSequence,
        state: DNCState | None = None,
        *,
        lengths: Tensor | list[int] | None = None,
        reset: Tensor | None = None,
        trace: bool = False,
    ) -> tuple[Tensor | PackedSequence, DNCState] | tuple[Tensor | PackedSequence, DNCState, Trace]:
        """Run the layer over a batch of sequences.

        Args:
            inputs: [B, T, input_size] ([T, B, input_size] if not batch_first), or a `PackedSequence`.
            state: what an earlier call returned, or None for the initial state. Gradients flow into it; call
                `state.detach()` to truncate them.
            lengths: [B] integers in 0…T: row b runs for lengths[b] steps. After that its outputs are 0 and its state
                stays the same, whatever the inputs hold there, even NaN.
            reset: bool, [B, T] ([T, B] if not batch_first): True puts that row's state back to the initial one before
                that step.
            trace: return the `Trace` as well: where every step wrote and read, its gates, usage and link. The backend
                "reference" computes it step by step and keeps all of it, whatever `checkpoint` is; its link alone is
                B·T·K·N² numbers.

        Returns:
            outputs [B, T, output_size] ([T, B, output_size] if not batch_first, packed if the inputs were packed), and
            the state after each row's last step. With B = 0 or T = 0 the outputs are empty and the state is as it was.
            With `trace` also the `Trace`, [B, T, ...] in all its fields, whatever `batch_first` is.

        Raises:
            ValueError: a tensor of the wrong shape or on another device than the parameters, lengths outside 0…T (not
                checked while anything traces or a transform of `torch.func` is at work, nor on a GPU while a CUDA graph
                is captured) or given with a `PackedSequence`, which has its own; an unknown backend, in the environment
                variable say.
            TypeError: inputs that are no dense tensor, a tensor of the wrong dtype, lengths that are no integers, a
                state that is no `DNCState`, a trace that is no bool.
            Both: an attribute since set to a value that the constructor refuses, unless it is a size of the weights.
            RuntimeError: the backend asked for does not serve this call (with `trace` only "reference" does), or is
                known to fail on this device.
        """
        check_bool("trace", trace)
        if isinstance(inputs, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: expected None with a PackedSequence, which has its own lengths")
            padded, packed_lengths = pad_packed_sequence(inputs, batch_first=self.batch_first)
            outputs, *rest = self._run(padded, state, packed_lengths, reset, trace)
            return _pack_like(inputs, outputs, packed_lengths, self.batch_first), *rest
        return self._run(inputs, state, lengths, reset, trace)

    def step(self, inputs: Tensor, state: DNCState | None = None) -> tuple[Tensor, DNCState]:
        """One step, for streams: what `forward` does with a sequence of one step.

        Unlike `dnc(...)`, it does not call hooks on the layer itself. Under PyTorch's FSDP2 it has to be registered:
        `torch.distributed.fsdp.register_fsdp_forward_method(dnc, "step")`.

        Args:
            inputs: [B, input_size].
            state: what the step before returned, or None for the initial state.

        Returns:
            outputs [B, output_size], and the state after the step.

        Raises:
            as `forward`.
        """
        check_dense("inputs", inputs, "a tensor [B, input_size]")
        if inputs.dim() != 2:
            raise ValueError(f"inputs: expected 2 dimensions [B, input_size], got shape {list(inputs.shape)}")
        if inputs.shape[1] != self.input_size:
            raise ValueError(
                f"inputs: expected [B, input_size] with input_size {self.input_size}, got shape {list(inputs.shape)}"
            )
        time = 1 if self.batch_first else 0
        outputs, state = self._run(inputs.unsqueeze(time), state, None, None, trace=False)
        return outputs.squeeze(time), state

    def _run(
        self,
        inputs: Tensor,
        state: DNCState | None,
        lengths: Tensor | list[int] | None,
        reset: Tensor | None,
        trace: bool,
    ) -> Any:
        _check_checkpoint(self.checkpoint)  # attributes may have been changed since
        check_bool("batch_first", self.batch_first)
        check_size("memory_size", self.memory_size)
        check_strength(self.strength)
        check_bool("stop_usage_gradient", self.stop_usage_gradient)
        check_bound("clip", self.clip)
        check_bound("max_activation_gradient", self.max_activation_gradient)
        problem = self.problem(inputs)
        batch, steps = problem.batch, problem.steps
        if state is None:
            state = self._begin(problem)
            if self.controller_kind == "custom":  # its initial state may be anything
                self._check_controller_state(state.controller, batch)
        else:
            self._check_state(state, batch)
        if lengths is not None:
            lengths = _check_lengths(lengths, batch, steps).to(inputs.device)
        if reset is not None:
            shape = (batch, steps) if self.batch_first else (steps, batch)
            check_tensor("reset", reset, shape, dtype=torch.bool, device=inputs.device)
            if problem.controller != "custom" and not begins_with_zeros(self):  # a reset will call `initial_state`
                problem = replace(problem, controller="custom")
        if self.batch_first:
            inputs, reset = inputs.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
        if trace:
            choose(replace(problem, trace=True), self.backend)  # raises if a backend asked for by name does not serve
            outputs, *rest = traced_unroll(self, inputs, state, lengths=lengths, reset=reset)
        else:
            outputs, *rest = choose(problem, self.backend).unroll(
                self, inputs, state, lengths=lengths, reset=reset, checkpoint=self.checkpoint
            )
        return outputs.transpose(0, 1) if self.batch_first else outputs, *rest

    def problem(self, inputs: Tensor | PackedSequence) -> Problem:
        """The `Problem` that this input poses. Raises the errors that `forward` documents for `inputs`."""
        if isinstance(inputs, PackedSequence):
            inputs, _ = pad_packed_sequence(inputs, batch_first=self.batch_first)
        order = "[B, T, input_size]" if self.batch_first else "[T, B, input_size]"
        weight = self.like()
        check_dense("inputs", inputs, f"a tensor {order} or a PackedSequence")
        if inputs.dim() != 3:
            raise ValueError(f"inputs: expected 3 dimensions {order}, got shape {list(inputs.shape)}")
        if inputs.shape[-1] != self.input_size:
            raise ValueError(
                f"inputs: expected {order} with input_size {self.input_size}, got shape {list(inputs.shape)}"
            )
        if inputs.device != weight.device:
            raise ValueError(f"inputs: expected a tensor on {weight.device}, as the parameters, got {inputs.device}")
        kind = inputs.device.type
        if inputs.dtype != weight.dtype and not (
            kind != "meta" and torch.is_autocast_enabled(kind) and inputs.dtype == torch.get_autocast_dtype(kind)
        ):
            raise TypeError(f"inputs: expected {weight.dtype}, as the parameters, got {inputs.dtype}")
        batch, steps = inputs.shape[:2] if self.batch_first else (inputs.shape[1], inputs.shape[0])
        return Problem(
            device=inputs.device,
            dtype=weight.dtype,
            batch=batch,
            steps=steps,
            memory_size=self.memory_size,
            word_size=self.word_size,
            num_reads=self.num_reads,
            num_writes=self.num_writes,
            controller=self.controller_kind if is_plain(self) else "custom",
            needs_gradient=torch.is_grad_enabled(),
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
        )

    def _begin(self, problem: Problem) -> DNCState:
        """`initial_state` in one buffer, for a call that does not return it; rows may share memory and link."""
        weight, batch = self.like(), problem.batch
        ours = problem.controller != "custom" and begins_with_zeros(self)
        if not ours or problem.steps == 0 or not is_eager([weight]):
            return self.initial_state(batch)
        shapes = MemoryState.shapes(batch, self.memory_size, self.word_size, self.num_reads, self.num_writes)
        shared = self.memory_size in SHARED.get(weight.device.type, ())
        if shared:
            shapes |= {name: (1, *shapes[name][1:]) for name in ("memory", "link")}
        per_layer = CONTROLLERS[self.controller_kind].states
        states = [(batch, self.hidden_size)] * (self.num_layers * per_layer)
        words = (batch, self.num_reads, self.word_size)
        read_words, *tensors = zeros([words, *shapes.values(), *states], weight.detach())
        remaining = iter(tensors[len(shapes) :])
        layers = tuple(tuple(islice(remaining, per_layer)) for _ in range(self.num_layers))
        memory = MemoryState(*tensors[: len(shapes)])
        if shared:
            memory = memory._replace(
                memory=memory.memory.expand(batch, -1, -1), link=memory.link.expand(batch, -1, -1, -1)
            )
        return DNCState(layers, memory, read_words)

    def _check_state(self, state: DNCState, batch: int) -> None:
        if not isinstance(state, DNCState):
            raise TypeError(f"state: expected a DNCState or None, got {type(state).__name__}")
        if not isinstance(state.memory, MemoryState):
            raise TypeError(f"state.memory: expected a MemoryState, got {type(state.memory).__name__}")
        shapes = MemoryState.shapes(batch, self.memory_size, self.word_size, self.num_reads, self.num_writes)
        weight = self.like()
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        check_memory_state("state.memory", state.memory, shapes, **like)
        check_tensor("state.read_words", state.read_words, (batch, self.num_reads, self.word_size), **like)
        self._check_controller_state(state.controller, batch)

    def _check_controller_state(self, state: Any, batch: int) -> None:
        if self._is_state_of_layers(state, batch):
            return
        tensors, structure = tree_flatten(state)
        weight = self.like()
        if self.controller_kind == "custom":  # may grow its state as it goes: only the batch is known
            for tensor in tensors:
                if not isinstance(tensor, Tensor):
                    raise TypeError(f"state.controller: expected a nest of tensors, got {type(tensor).__name__} in it")
                if tensor.shape[:1] != (batch,):
                    raise ValueError(f"state.controller: expected batch {batch} first, got shape {list(tensor.shape)}")
                dtype = weight.dtype if tensor.is_floating_point() else tensor.dtype
                check_tensor("state.controller", tensor, tensor.shape, dtype=dtype, device=weight.device)
            return
        expected = self.controller.initial_state(batch, device=weight.device, dtype=weight.dtype)  # type: ignore[operator]
        expected_tensors, expected_structure = tree_flatten(expected)
        if structure != expected_structure:
            count = CONTROLLERS[self.controller_kind].states
            raise ValueError(
                f"state.controller: expected a tuple of {len(expected)} layer(s) of {self.controller_kind!r}, each a "
                f"tuple of {count} tensor(s) [B, hidden_size], got {_outline(state)}"
            )
        for tensor, like in zip(tensors, expected_tensors, strict=True):
            check_tensor("state.controller", tensor, like.shape, dtype=like.dtype, device=like.device)

    def _is_state_of_layers(self, state: Any, batch: int) -> bool:
        """Whether this is the state of a built-in controller, without creating one to compare it with."""
        if self.controller_kind == "custom" or type(state) is not tuple or len(state) != self.num_layers:
            return False
        count, weight = CONTROLLERS[self.controller_kind].states, self.like()
        if any(type(layer) is not tuple or len(layer) != count for layer in state):
            return False
        shape, dtype, device = (batch, self.hidden_size), weight.dtype, weight.device
        return all(
            isinstance(x, Tensor)
            and not x.is_nested
            and x.layout == torch.strided
            and x.shape == shape
            and x.dtype == dtype
            and x.device == device
            for layer in state
            for x in layer
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if not self.batch_first:
            text += ", batch_first=False"
        if self.checkpoint != "auto":
            text += f", checkpoint={self.checkpoint!r}"
        return text if self.backend == "auto" else text + f", backend={self.backend!r}"


def explain(dnc: DNC, inputs: Tensor | PackedSequence) -> str:
    """Which backend would run `dnc(inputs)`, and whether each backend serves that call, with the reason.

    Args:
        dnc: the layer.
        inputs: as for `DNC.forward`.

    Returns:
        a table to print, with a line for each backend; a star marks the one that would run.

    Raises:
        ValueError, TypeError: as `DNC.forward` for `inputs` and backends; TypeError if `dnc` is no `DNC`.
    """
    # A compiled layer is no `DNC`, but forwards attributes to the one it wraps.
    if isinstance(dnc, type) or not callable(getattr(dnc, "problem", None)):
        raise TypeError(f"dnc: expected a DNC, got {type(dnc).__name__}")
    return explain_problem(dnc.problem(inputs), dnc.backend)


def _check_checkpoint(checkpoint: Any) -> None:
    if checkpoint is None or (isinstance(checkpoint, str) and checkpoint == "auto"):
        return
    if isinstance(checkpoint, bool) or not isinstance(checkpoint, int):
        raise TypeError(f"checkpoint: expected 'auto', None or an integer, got {checkpoint!r}")
    if checkpoint < 1:
        raise ValueError(f"checkpoint: expected at least 1 step, got {checkpoint}")


def _outline(nest: Any) -> str:
    """A nest in one line: its containers, and each tensor's shape."""
    if isinstance(nest, Tensor):
        return str(list(nest.shape))
    if isinstance(nest, (tuple, list)):
        return f"{type(nest).__name__}({', '.join(map(_outline, nest))})"
    return type(nest).__name__


def _check_lengths(lengths: Tensor | list[int], batch: int, steps: int) -> Tensor:
    # While a compiler traces, `as_tensor` of a list makes its numbers part of the program; `tensor` of an array warns.
    convert: Any = torch.tensor if isinstance(lengths, (list, tuple)) else torch.as_tensor
    try:  # a tensor stays on its device, whatever the default device is
        lengths = lengths if isinstance(lengths, Tensor) else convert(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        came = f"a {type(lengths).__name__} ({error})"
        raise TypeError(f"lengths: expected a tensor or a list of integers, got {came}") from error
    check_dense("lengths", lengths)
    if lengths.is_meta:
        raise ValueError("lengths: expected a tensor with values, got one on the meta device")
    integers = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not integers and lengths.numel() > 0:  # an empty list has no integers to infer a dtype from
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    lengths = lengths.to(torch.long, copy=True)  # a copy: the backward needs the values as they are now
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape [{batch}], one per row of the batch, got {list(lengths.shape)}")
    # Values cannot be read while a graph is captured or a transform is at work, and fake tensors have none.
    hidden = torch.compiler.is_compiling() or is_transformed() or type(lengths) is not Tensor
    hidden = hidden or (lengths.is_cuda and torch.cuda.is_current_stream_capturing())
    if batch > 0 and not hidden:
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < 0 or longest > steps:
            wrong = shortest if shortest < 0 else longest
            raise ValueError(f"lengths: expected values in 0…{steps}, the number of steps, got {wrong}")
    return lengths


def _pack_like(packed: PackedSequence, outputs: Tensor, lengths: Tensor, batch_first: bool) -> PackedSequence:
    """Outputs, given in the order of the batch, packed as the inputs were, with ties of length in the same order."""
    order = packed.sorted_indices
    if order is not None:
        outputs, lengths = outputs.index_select(0 if batch_first else 1, order), lengths[order.cpu()]
    again = pack_padded_sequence(outputs, lengths, batch_first=batch_first)
    return PackedSequence(again.data, packed.batch_sizes, order, packed.unsorted_indices)
