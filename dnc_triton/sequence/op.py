"""The sequence as an operator that PyTorch knows: with a fake implementation, and differentiable once.

Both directions are opaque to `torch.compile`: a sequence is one node of the graph, whatever its length. Neither mutates
or aliases what it is given.

What PyTorch does around such an operator takes longer than a small network. So in eager mode (`is_eager`) `_Sequence`
takes its place, which calls the same two functions, `_run` and `_run_backward`. Who calls whom:

    run_sequence -> _Sequence.forward, eager                -> _run: a replay, or _unroll: Sequence.forward
                    _sequence, the operator

    autograd     -> _Sequence.backward                      -> _run_backward: a replay, or _backward_through_time:
                    _backward -> _sequence_backward, its operator                                Sequence.backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dnc_reference.memory import without_autocast
from dnc_reference.types import MemoryState
from dnc_triton.kernels.launcher import aligned, overlapping
from dnc_triton.kernels.layout import Layout, is_shared
from dnc_triton.ops.eager import is_eager, no_second_backward, on_device, refuse_batched, savable
from dnc_triton.sequence import graphs, pool
from dnc_triton.sequence.carried import Carried
from dnc_triton.sequence.compiled import CompiledSequence, compiled_step_alone
from dnc_triton.sequence.loop import Sequence
from dnc_triton.sequence.one_launch import OneLaunchSequence
from dnc_triton.sequence.parts import zeros
from dnc_triton.sequence.settings import SequenceSettings
from dnc_triton.sequence.step import step_alone

SHAREABLE = tuple(MemoryState._fields.index(name) for name in ("memory", "link"))  # where these are in a state


class Given(NamedTuple):
    """What a sequence is computed from: see `Sequence`."""

    inputs: Tensor
    state: list[Tensor]
    parameters: list[Tensor]
    running: Tensor | None
    reset: Tensor | None
    dropout: list[Tensor]

    def flatten(self) -> list[Tensor]:
        """The tensors that are there, as a list; of what is shared, its one entry."""
        state = (tensor[:1] if is_shared(tensor) else tensor for tensor in self.state)
        masks = [mask for mask in (self.running, self.reset) if mask is not None]
        return [self.inputs, *state, *self.parameters, *masks, *self.dropout]

    def replace(self, tensors: list[Tensor]) -> Given:
        """The same with other tensors in their places, from such a list."""
        remaining = iter(tensors)
        inputs = next(remaining)
        state, parameters = ([next(remaining) for _ in part] for part in (self.state, self.parameters))
        # Hooks on what autograd saves may have expanded what was shared: its own shape says whether it is one entry.
        pairs = zip(state, self.state, strict=True)
        state = [x if x.shape == like.shape else x.expand(like.shape) for x, like in pairs]
        running, reset = (None if mask is None else next(remaining) for mask in (self.running, self.reset))
        return Given(inputs, state, parameters, running, reset, list(remaining))


# What the operators take: the tensors, and `SequenceSettings` field by field, the layout as `Layout.as_operand` has it.
# AOTInductor hands an empty list on as None.
TENSORS = "Tensor inputs, Tensor[] state, Tensor[] parameters, Tensor? lengths, Tensor? reset, Tensor[]? dropout"
SETTINGS = (
    "str controller, SymInt num_layers, float? clip, float? max_activation_gradient, float strength_offset, "
    "bool stop_usage_gradient, ScalarType product_dtype, SymInt checkpoint, bool compiled, SymInt[]? layout"
)


@torch.library.custom_op(
    "dnc_triton::sequence", mutates_args=(), schema=f"({TENSORS}, {SETTINGS}, bool keep) -> Tensor[]"
)
def _sequence(
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor] | None,
    *arguments: Any,
) -> list[Tensor]:
    """Outputs [T, B, output_size], the state after the last step, and with `keep` the history."""
    *operands, keep = arguments
    settings = _settings(*operands)
    return _run(settings, _given(settings, inputs, state, parameters, lengths, reset, dropout), keep)


def _run(settings: SequenceSettings, given: Given, keep: bool) -> list[Tensor]:
    """What the operator computes, by a graph where that is possible."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        return _forward(settings, given.replace(tensors), keep)

    with on_device(given.inputs):
        if settings.compiled or len(given.inputs) > graphs.LONGEST:
            return _forward(settings, given, keep)
        key = settings, keep, len(given.dropout), given.running is None, given.reset is None
        return graphs.forward(key, given.flatten(), run, handed=1 + len(given.state))


def _forward(settings: SequenceSettings, given: Given, keep: bool) -> list[Tensor]:
    with overlapping(settings.layout, given.inputs.device):
        return _unroll(settings, given, keep)


def _unroll(settings: SequenceSettings, given: Given, keep: bool) -> list[Tensor]:
    kind = _kind(settings)
    inputs, state, parameters, running, reset, dropout = given
    carried = Carried.unflatten(state, settings.num_layers)
    masked = bool(dropout) or running is not None or reset is not None
    if not keep and len(inputs) == 1 and not masked and settings.layout is None:
        alone = compiled_step_alone if settings.compiled else step_alone
        outputs, new_state = alone(settings, inputs[0], carried, parameters)
        return [outputs.unsqueeze(0), *new_state]
    if keep:
        sequence = kind(settings, inputs, carried, parameters, running, reset, dropout)
        outputs, last = sequence.forward()
        return [outputs, *last.flatten(), *sequence.buffers]

    pieces = []
    for start in range(0, inputs.shape[0], kind.chunk):
        steps = slice(start, start + kind.chunk)
        sequence = kind(
            settings._replace(checkpoint=kind.chunk),
            inputs[steps],
            carried,
            parameters,
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
    dropout: list[Tensor] | None,
    *arguments: Any,
) -> list[Tensor]:
    *operands, keep = arguments
    settings = _settings(*operands)
    outputs = inputs.new_empty(*inputs.shape[:2], parameters[-1].shape[0])
    last = [tensor.new_empty(tensor.shape) for tensor in state]
    if not keep:
        return [outputs, *last]
    hidden_size = parameters[-4].shape[1]
    carried = Carried.unflatten(last, settings.num_layers)
    history = _kind(settings).allocate(settings, carried, inputs.shape[0], hidden_size, reset is not None)
    return [outputs, *last, *history]


@torch.library.custom_op(
    "dnc_triton::sequence_backward",
    mutates_args=(),
    schema=f"(Tensor[] gradients, {TENSORS}, Tensor[] last, Tensor[] history, {SETTINGS}) -> Tensor[]",
)
def _sequence_backward(
    gradients: list[Tensor],
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor] | None,
    last: list[Tensor],
    history: list[Tensor],
    *operands: Any,
) -> list[Tensor]:
    """The gradients of inputs, state and parameters, from those of the outputs and the state after the last step."""
    settings = _settings(*operands)
    given = _given(settings, inputs, state, parameters, lengths, reset, dropout)
    everything = [True] * (1 + len(state) + len(parameters))
    return _run_backward(settings, list(gradients), given, (last[0], last[1]), history, everything)


def _run_backward(
    settings: SequenceSettings,
    gradients: list[Tensor | None],
    given: Given,
    last: tuple[Tensor, Tensor],
    history: list[Tensor],
    wanted: list[bool],
) -> list[Any]:
    """What the operator's backward computes. A gradient that is None is zero; what is not wanted may be None.

    `last` is memory and link after the last step, which the forward handed out.
    """

    def run(
        gradients: list[Tensor | None],
        tensors: list[Tensor],
        handed: list[Tensor],
        history: list[Tensor],
        wanted: list[bool],
    ) -> list[Tensor | None]:
        last = _memory_and_link(handed[1:])
        return _backward_through_time(settings, gradients, given.replace(tensors), last, history, wanted)

    # The forward settled what is rounded: a backward that is called within autocast computes the same.
    device = given.inputs.device
    autocast = torch.is_autocast_enabled(device.type)
    with on_device(given.inputs), without_autocast(device) if autocast else nullcontext():
        replayed = None if settings.compiled else graphs.backward(gradients, history, run, wanted)
        if replayed is None:
            return _backward_through_time(settings, gradients, given, last, history, wanted)
        return replayed


def _backward_through_time(
    settings: SequenceSettings,
    gradients: list[Tensor | None],
    given: Given,
    last: tuple[Tensor, Tensor],
    history: list[Tensor],
    wanted: list[bool],
) -> list[Tensor | None]:
    kind, whole = _kind(settings), _whole(settings)
    inputs, state, parameters, running, reset, dropout = given
    # Hooks on what autograd saves may hand it back with other strides.
    memory, link, *history = map(whole, (*last, *history))
    sequence = kind(
        settings,
        inputs,
        Carried.unflatten(state, settings.num_layers),
        parameters,
        running,
        reset,
        dropout,
        history=history,
        last=(memory, link),
    )
    d_outputs, *d_last = gradients
    if d_outputs is None:
        d_outputs = inputs.new_zeros(*inputs.shape[:2], parameters[-1].shape[0])
    d_outputs = d_outputs.contiguous()
    shares = _takes_shared(settings) and running is None
    d_filled = _filled(d_last, state, copied=kind.overwrites, shares=shares)
    d_carried = Carried.unflatten(d_filled, settings.num_layers)
    by_state = wanted[1 : 1 + len(state)]
    with overlapping(settings.layout, inputs.device):
        d_inputs, d_state, d_parameters = sequence.backward(
            d_outputs, d_carried, wants_inputs=wanted[0], wants_state=any(by_state)
        )
    d_states = [None] * len(state) if d_state is None else d_state.flatten()[: len(state)]
    return [d_inputs, *d_states, *d_parameters]


def _filled(tensors: list[Tensor | None], like: list[Tensor], *, copied: bool, shares: bool) -> list[Tensor]:
    """Zeros for what is None, shared ones if `shares` and both memory and link are; copies of others if `copied`."""
    missing = [index for index, tensor in enumerate(tensors) if tensor is None]
    one_for_all = SHAREABLE if shares and set(SHAREABLE).issubset(missing) else ()
    shapes = [(1, *like[index].shape[1:]) if index in one_for_all else like[index].shape for index in missing]
    made = zip(missing, zeros(shapes, like[0]), strict=True)
    empty = iter([x.expand_as(like[index]) if index in one_for_all else x for index, x in made])
    given = [tensor for tensor in tensors if tensor is not None]
    if given and copied:
        copies = [pool.empty_like(tensor) for tensor in given]
        torch._foreach_copy_(copies, given)
        given = copies
    others = iter(given)
    return [next(empty) if tensor is None else next(others) for tensor in tensors]


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
    nested = [sequence_inputs, state, parameters, lengths, reset, dropout, [*_memory_and_link(last)], history]
    tensors, ctx.structure = tree_flatten(nested)
    ctx.present = [isinstance(tensor, Tensor) for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if isinstance(tensor, Tensor)))
    ctx.settings = settings


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    nested = tree_unflatten([next(saved) if present else None for present in ctx.present], ctx.structure)
    inputs, state, parameters = nested[:3]
    given = _zero_filled(gradients[: 1 + len(state)], inputs, state, parameters)
    d_inputs, *others = _sequence_backward(given, *nested, *ctx.settings)
    d_state = others[: len(state)]
    d_parameters = _without_unused(others[len(state) :], parameters, gradients, inputs.shape[0])
    d_dropout = None if nested[5] is None else [None] * len(nested[5])
    return d_inputs, d_state, d_parameters, None, None, d_dropout, *[None] * (len(ctx.settings) + 1)


def _without_unused(
    given_back: list[Any], parameters: list[Tensor], gradients: Iterable[Tensor | None], steps: int
) -> list[Any]:
    """None for parameters that the loss does not depend on, for zeros would let them decay.

    These are the output layer's, the last two, if the loss saw no outputs; and the interface's, the two before, if it
    saw nothing of the memory either, and there is no next step to read from that. Zeros where a parameter has hooks,
    which autograd would call with None: they expect a gradient.
    """
    by_outputs, *by_state = gradients
    unseen = 0
    if by_outputs is None:
        by_memory = by_state[: 1 + len(MemoryState._fields)]  # and by the words that were read
        unseen = 4 if steps == 1 and all(gradient is None for gradient in by_memory) else 2
    seen = len(given_back) - unseen
    return [*given_back[:seen], *(torch.zeros_like(x) if _has_hooks(x) else None for x in parameters[seen:])]


def _has_hooks(parameter: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(
        parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    )


def _zero_filled(
    gradients: Iterable[Tensor | None], inputs: Tensor, state: list[Tensor], parameters: list[Tensor]
) -> list[Tensor]:
    """The gradients of the outputs and of each part of the last state, with zeros where there is none."""
    like = [inputs.new_empty(*inputs.shape[:2], parameters[-1].shape[0]), *state]
    return [
        pool.empty_like(tensor).zero_() if gradient is None else gradient
        for gradient, tensor in zip(gradients, like, strict=True)
    ]


_sequence.register_autograd(_backward, setup_context=_setup_context)
_sequence_backward.register_autograd(no_second_backward("a sequence operation"))


class _Sequence(torch.autograd.Function):
    """The operator for autograd in eager mode: without lists, schemas and checks."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: SequenceSettings,
        counts: tuple[int, int],
        lengths: Tensor | None,
        reset: Tensor | None,
        inputs: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        """Outputs and the state after the last step. `others`: states and parameters, `counts` of each, and dropout."""
        state, parameters, dropout = _divide(others, counts)
        with torch._C._AutoDispatchBelowADInplaceOrView():  # as in an operator
            results = _run(settings, _given(settings, inputs, state, parameters, lengths, reset, dropout), True)
        handed, history = results[: 1 + len(state)], results[1 + len(state) :]
        if not any(ctx.needs_input_grad[4 : 3 + len(state) + len(parameters)]):  # only the output layer learns
            ctx.mark_non_differentiable(*handed[1:])
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.counts = settings, (*counts, len(dropout))
        ctx.save_for_backward(inputs, lengths, reset, *_memory_and_link(handed[1:]), *others, *history)
        return tuple(handed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, lengths, reset, memory, link, *others = ctx.saved_tensors
        state, parameters, dropout, history = _divide(others, ctx.counts)
        tensors = inputs, state, parameters, lengths, reset, dropout
        sent_back = [gradient for gradient in gradients if gradient is not None]
        refuse_batched(sent_back)
        # The operator where the backward is itself differentiated, traced or transformed.
        if torch.is_grad_enabled() or not is_eager([inputs, *others, *sent_back]):
            zero_filled = _zero_filled(gradients, inputs, state, parameters)
            d_given = _sequence_backward(zero_filled, *tensors, [memory, link], history, *_as_operands(ctx.settings))
        else:
            wanted = list(ctx.needs_input_grad[4 : 5 + len(state) + len(parameters)])
            with torch._C._AutoDispatchBelowAutograd():
                given = _given(ctx.settings, *tensors)
                d_given = _run_backward(ctx.settings, list(gradients), given, (memory, link), history, wanted)
        d_parameters = _without_unused(d_given[1 + len(state) :], parameters, gradients, inputs.shape[0])
        return None, None, None, None, *d_given[: 1 + len(state)], *d_parameters, *[None] * len(dropout)


def _memory_and_link(state: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the tensors of a state."""
    memory, link = (state[index] for index in SHAREABLE)
    return memory, link


def _divide(tensors: Iterable[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """Parts of these lengths, and what remains."""
    remaining = iter(tensors)
    parts = [list(islice(remaining, count)) for count in counts]
    return [*parts, list(remaining)]


def run_sequence(
    settings: SequenceSettings,
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor],
    keep: bool,
) -> list[Tensor]:
    """Outputs and the state after the last step, by the operator or what takes its place; `keep` is for a backward."""
    tensors = [inputs, *state, *parameters]
    if not is_eager(tensors):
        results = _sequence(inputs, state, parameters, lengths, reset, dropout, *_as_operands(settings), keep)
        outputs, *last = results[: 1 + len(state)]
        if keep and not any(tensor.requires_grad for tensor in tensors[:-2]):  # only the output layer learns
            last = [tensor.detach() for tensor in last]
        return [outputs, *last]
    if keep:
        counts = len(state), len(parameters)
        return list(_Sequence.apply(settings, counts, lengths, savable(reset), *map(savable, tensors), *dropout))
    with torch._C._AutoDispatchBelowAutograd():
        return _run(settings, _given(settings, inputs, state, parameters, lengths, reset, dropout), False)


def _kind(settings: SequenceSettings) -> type[Sequence] | type[OneLaunchSequence]:
    """The class that runs the sequence."""
    if settings.compiled:
        return CompiledSequence
    return OneLaunchSequence if settings.layout is not None and settings.layout.whole_sequence else Sequence


def _settings(*arguments: Any) -> SequenceSettings:
    settings = SequenceSettings(*arguments)
    return settings if settings.layout is None else settings._replace(layout=Layout.from_operand(list(settings.layout)))


def _as_operands(settings: SequenceSettings) -> list[Any]:
    """The inverse: as the operators take them."""
    *others, layout = settings
    return [*others, None if layout is None else layout.as_operand()]


def _takes_shared(settings: SequenceSettings) -> bool:
    """Whether memory and link before the first step, and the gradients of those after the last, may be shared."""
    return settings.layout is not None and not settings.layout.whole_sequence


def _given(
    settings: SequenceSettings,
    inputs: Tensor,
    state: list[Tensor],
    parameters: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    dropout: list[Tensor] | None,
) -> Given:
    """From what the operators take, the lengths as a mask; with negation resolved, for what reads memory as it is."""
    running = None
    if lengths is not None:
        running = torch.arange(inputs.shape[0], device=inputs.device).unsqueeze(1) < lengths
    shared = {index for index in SHAREABLE if _takes_shared(settings) and is_shared(state[index])}
    inputs, *parameters = (x.resolve_neg() for x in (inputs, *parameters))
    whole = _whole(settings)
    state = [whole(x[:1]).expand_as(x) if i in shared else whole(x) for i, x in enumerate(state)]
    return Given(inputs, state, parameters, running, reset, dropout or [])


def _whole(settings: SequenceSettings) -> Callable[[Tensor], Tensor]:
    """The function that makes of a tensor one that the backend can read as it lies in memory."""
    return _contiguous if settings.layout is None else aligned


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()
