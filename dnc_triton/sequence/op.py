"""The sequence as an operator that PyTorch knows: with a fake implementation, and differentiable once.

Both directions are opaque to `torch.compile`: a sequence is one node of the graph, whatever its length. Neither mutates
or aliases what it is given.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dnc_reference.controller import CONTROLLERS, Controller
from dnc_reference.dnc import DNCCell
from dnc_reference.memory import without_autocast
from dnc_reference.types import DNCState, MemoryState
from dnc_triton.kernels.layout import Layout
from dnc_triton.ops.fused_step import as_layout, on_device
from dnc_triton.sequence import graphs, pool
from dnc_triton.sequence.compiled import CompiledSequence
from dnc_triton.sequence.history import Carried, Settings
from dnc_triton.sequence.loop import Sequence
from dnc_triton.sequence.one_launch import OneLaunchSequence

SHARE = 4  # all of the history is kept while it takes at most this part of a GPU's memory


class Given(NamedTuple):
    """What a sequence is computed from: see `Sequence`."""

    inputs: Tensor
    state: list[Tensor]
    parameters: list[Tensor]
    dropout: list[Tensor]
    running: Tensor | None
    reset: Tensor | None

    def flatten(self) -> list[Tensor]:
        """Those that are there, as a list."""
        masks = [mask for mask in (self.running, self.reset) if mask is not None]
        return [self.inputs, *self.state, *self.parameters, *self.dropout, *masks]

    def replace(self, tensors: list[Tensor]) -> Given:
        """Others in their places, from such a list."""
        remaining = iter(tensors)
        inputs = next(remaining)
        state, parameters, dropout = (
            [next(remaining) for _ in part] for part in (self.state, self.parameters, self.dropout)
        )
        running, reset = (None if mask is None else next(remaining) for mask in (self.running, self.reset))
        return Given(inputs, state, parameters, dropout, running, reset)


@torch.library.custom_op("dnc_triton::sequence", mutates_args=())
def _sequence(
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor],
    controller: str,
    num_layers: int,
    clip: float | None,
    max_activation_gradient: float | None,
    strength_offset: float,
    stop_usage_gradient: bool,
    product_dtype: torch.dtype,
    checkpoint: int,
    compiled: bool,
    layout: list[int] | None,
    keep: bool,
) -> list[Tensor]:
    """Outputs [T, B, output_size], the state after the last step, and with `keep` the history."""
    settings = _settings(
        controller,
        num_layers,
        clip,
        max_activation_gradient,
        strength_offset,
        stop_usage_gradient,
        product_dtype,
        checkpoint,
        compiled,
        layout,
    )
    given = _given(inputs, state, parameters, lengths, reset, dropout)

    def run(tensors: list[Tensor]) -> list[Tensor]:
        return _forward(settings, given.replace(tensors), keep)

    with on_device(inputs):
        if _kind(settings) is not Sequence or len(inputs) > graphs.LONGEST:  # one launch needs no graph
            return run(given.flatten())
        key = settings, keep, len(dropout), lengths is None, reset is None
        return graphs.forward(key, given.flatten(), run, handed=1 + len(state))


def _forward(settings: Settings, given: Given, keep: bool) -> list[Tensor]:
    kind = _kind(settings)
    inputs, state, parameters, dropout, running, reset = given
    carried = Carried.unflatten(state, settings.num_layers)
    if keep:
        sequence = kind(settings, parameters, inputs, carried, running, reset, dropout)
        outputs, last = sequence.forward()
        return [outputs, *last.flatten(), *sequence.buffers]

    pieces = []
    for start in range(0, inputs.shape[0], kind.chunk):
        steps = slice(start, start + kind.chunk)
        sequence = kind(
            settings._replace(checkpoint=kind.chunk),
            parameters,
            inputs[steps],
            carried,
            None if running is None else running[steps],
            None if reset is None else reset[steps],
            [mask[steps] for mask in dropout],
        )
        outputs, carried = sequence.forward()
        pieces.append(outputs)
    return [torch.cat(pieces), *carried.flatten()]


@_sequence.register_fake
def _(
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor],
    controller: str,
    num_layers: int,
    clip: float | None,
    max_activation_gradient: float | None,
    strength_offset: float,
    stop_usage_gradient: bool,
    product_dtype: torch.dtype,
    checkpoint: int,
    compiled: bool,
    layout: list[int] | None,
    keep: bool,
) -> list[Tensor]:
    settings = _settings(
        controller,
        num_layers,
        clip,
        max_activation_gradient,
        strength_offset,
        stop_usage_gradient,
        product_dtype,
        checkpoint,
        compiled,
        layout,
    )
    outputs = inputs.new_empty(*inputs.shape[:2], parameters[-1].shape[0])
    last = [tensor.new_empty(tensor.shape) for tensor in state]
    if not keep:
        return [outputs, *last]
    hidden_size = parameters[-4].shape[1]
    carried = Carried.unflatten(last, num_layers)
    history = _kind(settings).allocate(settings, carried, inputs.shape[0], hidden_size, reset is not None)
    return [outputs, *last, *history]


@torch.library.custom_op("dnc_triton::sequence_backward", mutates_args=())
def _sequence_backward(
    gradients: list[Tensor],
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor],
    last: list[Tensor],
    history: list[Tensor],
    controller: str,
    num_layers: int,
    clip: float | None,
    max_activation_gradient: float | None,
    strength_offset: float,
    stop_usage_gradient: bool,
    product_dtype: torch.dtype,
    checkpoint: int,
    compiled: bool,
    layout: list[int] | None,
) -> list[Tensor]:
    """The gradients by inputs, state and parameters, from those by the outputs and the state after the last step."""
    settings = _settings(
        controller,
        num_layers,
        clip,
        max_activation_gradient,
        strength_offset,
        stop_usage_gradient,
        product_dtype,
        checkpoint,
        compiled,
        layout,
    )
    given = _given(inputs, state, parameters, lengths, reset, dropout)
    gradients = [gradient.contiguous() for gradient in gradients]

    def run(
        gradients: list[Tensor], tensors: list[Tensor], handed: list[Tensor], history: list[Tensor]
    ) -> list[Tensor]:
        return _backward_through_time(settings, gradients, given.replace(tensors), (handed[1], handed[3]), history)

    with on_device(inputs):
        replayed = graphs.backward(gradients, history, run) if _kind(settings) is Sequence else None
        if replayed is None:
            return _backward_through_time(settings, gradients, given, (last[0], last[1]), history)
        return replayed


def _backward_through_time(
    settings: Settings,
    gradients: list[Tensor],
    given: Given,
    last: tuple[Tensor, Tensor],
    history: list[Tensor],
) -> list[Tensor]:
    kind = _kind(settings)
    inputs, state, parameters, dropout, running, reset = given
    sequence = kind(
        settings,
        parameters,
        inputs,
        Carried.unflatten(state, settings.num_layers),
        running,
        reset,
        dropout,
        history=history,
        last=last,
    )
    d_outputs, *d_last = gradients
    d_last = [pool.empty_like(gradient).copy_(gradient) for gradient in d_last]
    d_inputs, d_state, d_parameters = sequence.backward(d_outputs, Carried.unflatten(d_last, settings.num_layers))
    return [d_inputs, *d_state.flatten()[: len(state)], *d_parameters]


@_sequence_backward.register_fake
def _(
    gradients: list[Tensor], inputs: Tensor, state: list[Tensor], parameters: list[Tensor], *arguments: Any
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (inputs, *state, *parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    sequence_inputs, state, parameters, lengths, reset, dropout, *settings, _ = inputs
    last, history = output[1 : 1 + len(state)], output[1 + len(state) :]
    ctx.mark_non_differentiable(*history)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the history
    nested = [sequence_inputs, state, parameters, lengths, reset, dropout, [last[0], last[2]], history]
    tensors, ctx.structure = tree_flatten(nested)
    ctx.present = [isinstance(tensor, Tensor) for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if isinstance(tensor, Tensor)))
    ctx.settings = settings


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    nested = tree_unflatten([next(saved) if present else None for present in ctx.present], ctx.structure)
    inputs, state, parameters = nested[:3]
    like = [inputs.new_empty(*inputs.shape[:2], parameters[-1].shape[0]), *state]
    given = [
        pool.empty_like(tensor).zero_() if gradient is None else gradient
        for gradient, tensor in zip(gradients[: len(like)], like, strict=True)
    ]
    d_inputs, *others = _sequence_backward(given, *nested, *ctx.settings)
    d_state, d_parameters = others[: len(state)], others[len(state) :]
    return d_inputs, d_state, d_parameters, None, None, [None] * len(nested[5]), *[None] * (len(ctx.settings) + 1)


_sequence.register_autograd(_backward, setup_context=_setup_context)


def _no_second_backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    raise RuntimeError(
        "second derivatives: expected backend='reference', whose backward is differentiable, got a sequence operation, "
        "whose backward is written by hand"
    )


_sequence_backward.register_autograd(_no_second_backward)


def unroll_sequence(
    cell: DNCCell,
    inputs: Tensor,
    state: DNCState,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    checkpoint: int | str | None = None,
    layout: Layout | None = None,
    compiled: bool = False,
) -> tuple[Tensor, DNCState]:
    """`dnc_reference.unroll` as one operation, for the built-in controllers and one write head.

    Args:
        cell, inputs, state, lengths, reset: as there.
        checkpoint: memory and link are kept for the backward at every so many steps, and made again in between; None
            keeps them at every step; "auto" does too while that takes at most a quarter of a GPU's memory, or 256 MiB
            on a CPU, and else takes the square root of T.
        layout: of the kernels for the memory's part, or for all of it, which keeps every step: a step at a time where
            that takes too much; None for plain PyTorch.
    """
    steps, batch = inputs.shape[:2]
    if steps == 0:
        return cell.project(inputs.new_empty(0, batch, cell.output.in_features)), state
    parameters = _parameters(cell)
    dtype, kind = state.read_words.dtype, inputs.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    product_dtype = torch.get_autocast_dtype(kind) if autocast else dtype
    dropout = []
    if cell.training and cell.dropout > 0:
        ones = torch.ones(steps, batch, cell.hidden_size, dtype=dtype, device=inputs.device)
        dropout = [F.dropout(ones, cell.dropout) for _ in range(cell.num_layers - 1)]
    controller_state, structure = tree_flatten(state.controller)
    carried = [*state.memory, state.read_words, *controller_state]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (inputs, *carried, *parameters))
    every = _checkpoint(checkpoint, steps, state.memory)
    if layout is not None and layout.whole and keep and every > 1:
        layout = layout._replace(whole=False)
    with without_autocast(inputs.device):
        outputs, *others = _sequence(
            inputs.to(dtype),
            carried,
            parameters,
            lengths,
            reset,
            dropout,
            cell.controller_kind,
            cell.num_layers,
            cell.clip,
            cell.max_activation_gradient,
            1.0 if cell.strength == "oneplus" else 0.0,
            cell.stop_usage_gradient,
            product_dtype,
            every,
            compiled and (not keep or every == 1),
            None if layout is None else [int(value) for value in layout],
            keep,
        )
    last = others[: len(carried)]
    new_state = DNCState(tree_unflatten(last[7:], structure), MemoryState(*last[:6]), last[6])
    return outputs.to(product_dtype), new_state


def is_plain(cell: DNCCell) -> bool:
    """Whether the layer is made of the parts it was built with and nothing else, so that its weights say it all.

    A controller of the user's, a part that was replaced or parametrized, a hook on a part or a method that a subclass
    overrides: all of these must be called, step by step.
    """
    parts = [cell.interface, cell.output, cell.controller]
    if type(cell.interface) is not nn.Linear or type(cell.output) is not nn.Linear:
        return False
    if cell.controller_kind == "custom" or type(cell.controller) is not Controller:
        return False
    layers = list(cell.controller.layers)
    if any(type(layer) is not CONTROLLERS[cell.controller_kind] for layer in layers):
        return False
    parts += layers
    if any(getattr(part, hooks) for part in parts for hooks in _HOOKS):
        return False
    if any(getattr(type(cell), name) is not getattr(DNCCell, name) for name in ("advance", "control", "project")):
        return False
    weight = cell.output.weight
    return all(x.dtype == weight.dtype and x.device == weight.device for x in _parameters(cell))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _parameters(cell: DNCCell) -> list[Tensor]:
    """Those of a plain cell, as `Sequence` wants them."""
    parts = [*cell.controller.layers, cell.interface, cell.output]  # type: ignore[misc]
    return [parameter for part in parts for parameter in part.parameters(recurse=False)]


def _kind(settings: Settings) -> Any:
    """The class that runs the sequence."""
    if settings.compiled:
        return CompiledSequence
    return OneLaunchSequence if settings.layout is not None and settings.layout.whole else Sequence


def _settings(*arguments: Any) -> Settings:
    settings = Settings(*arguments)
    return settings if settings.layout is None else settings._replace(layout=as_layout(list(settings.layout)))


def _given(
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor],
) -> Given:
    """As the operators take it, the lengths as a mask."""
    running = None
    if lengths is not None:
        running = torch.arange(inputs.shape[0], device=inputs.device).unsqueeze(1) < lengths
    return Given(inputs, [tensor.contiguous() for tensor in state], parameters, dropout, running, reset)


def _checkpoint(checkpoint: int | str | None, steps: int, memory: MemoryState) -> int:
    """Every how many steps to keep memory and link."""
    if isinstance(checkpoint, int):
        return checkpoint
    if checkpoint is None:
        return 1
    per_step = (memory.memory.numel() + memory.link.numel()) * memory.memory.element_size()
    return 1 if steps * per_step <= _most_kept(memory.memory.device) else math.isqrt(steps - 1) + 1


def _most_kept(device: torch.device) -> int:
    """How many bytes of memory and link "auto" keeps."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // SHARE
    return pool.MOST  # what a CPU is given beyond that it must clear first, which takes as long as to make it again
