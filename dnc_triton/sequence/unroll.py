"""From a layer to the sequence operation: its parameters, whether they say it all, and what to keep of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten, tree_unflatten

from dnc_reference.controller import CONTROLLERS, Controller
from dnc_reference.dnc import DNCCell
from dnc_reference.memory import without_autocast
from dnc_reference.types import DNCState, MemoryState
from dnc_triton.kernels.layout import Layout, default_layout
from dnc_triton.sequence import pool
from dnc_triton.sequence.carried import Carried
from dnc_triton.sequence.cells import CELLS
from dnc_triton.sequence.op import run_sequence
from dnc_triton.sequence.settings import SequenceSettings

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
_OF_LINEAR, _OF_CELL = ("weight", "bias"), ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
SHARE = 0.25  # "auto" keeps what None keeps while that takes at most this part of a GPU's memory


def unroll_sequence(
    cell: DNCCell,
    inputs: Tensor,
    state: DNCState,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    checkpoint: int | str | None = None,
    layout: Layout | None = None,
    step_layout: Callable[[], Layout] | None = None,
    compiled: bool = False,
) -> tuple[Tensor, DNCState]:
    """`dnc_reference.unroll` as one operation, for the built-in controllers and one write head.

    Args:
        cell, inputs, state, lengths, reset: as there.
        checkpoint: k: memory and link are kept for the backward at every k-th step, and made again in between; None
            keeps them at every step, of links every `layout.link_every`-th; "auto" does too while that takes at most a
            quarter of a GPU's memory, or 256 MiB on a CPU, and else takes the square root of T for k.
        layout: of the kernels for the memory's part, or for a whole sequence in one launch, which keeps every step:
            where that is too much, the kernels of a step take over. None for plain PyTorch.
        step_layout: gives the layout in which they take over; the default one if None.
        compiled: whether a step of plain PyTorch is compiled, for a CPU.
    """
    steps, batch = inputs.shape[:2]
    if steps == 0:
        return cell.project(inputs.new_empty(0, batch, cell.feature_size)), state
    parameters = parameters_of(cell)
    dtype, kind = state.read_words.dtype, inputs.device.type
    autocast = kind != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(kind)  # which leaves float64
    product_dtype = torch.get_autocast_dtype(kind) if autocast else dtype
    dropout = []
    drops: Any = cell.controller._modules["dropout"]
    if drops.training and drops.p != 0 and cell.num_layers > 1:  # one that is out of range it refuses
        ones = torch.ones(steps, batch, cell.hidden_size, dtype=dtype, device=inputs.device)
        dropout = [drops(ones) for _ in range(cell.num_layers - 1)]
    controller_state, structure = _flatten(state.controller)
    carried = [*state.memory, state.read_words, *controller_state]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (inputs, *carried, *parameters))
    every = _checkpoint(checkpoint, steps, state.memory, layout) if keep else 1
    if layout is not None and layout.whole_sequence and every > 1:  # one launch for the sequence keeps every step
        layout = step_layout() if step_layout is not None else default_layout(cell.memory_size)
        every = _checkpoint(checkpoint, steps, state.memory, layout)
    settings = SequenceSettings(
        controller=cell.controller_kind,
        num_layers=cell.num_layers,
        clip=cell.clip,
        max_activation_gradient=cell.max_activation_gradient,
        strength_offset=1.0 if cell.strength == "oneplus" else 0.0,
        stop_usage_gradient=cell.stop_usage_gradient,
        product_dtype=product_dtype,
        checkpoint=every,
        compiled=compiled and batch > 0,  # nobody waits for a compiler to have nothing computed
        layout=layout,
    )
    with without_autocast(inputs.device) if autocast else nullcontext():
        outputs, *last = run_sequence(settings, inputs.to(dtype), carried, parameters, lengths, reset, dropout, keep)
    memory, words, layers = Carried.split(last)
    return outputs.to(product_dtype), DNCState(_unflatten(layers, structure), memory, words)


def _flatten(state: Any) -> tuple[list[Tensor], Any]:
    """A controller's state as a list, and what `_unflatten` needs to know of it."""
    if type(state) is tuple and all(type(layer) is tuple for layer in state):
        return [tensor for layer in state for tensor in layer], [len(layer) for layer in state]
    return tree_flatten(state)


def _unflatten(tensors: list[Tensor], structure: Any) -> Any:
    if not isinstance(structure, list):
        return tree_unflatten(tensors, structure)
    remaining = iter(tensors)
    return tuple(tuple(islice(remaining, count)) for count in structure)


def is_plain(cell: DNCCell) -> bool:
    """Whether the layer is made of the parts it was built with and nothing else, so that its weights say it all.

    A controller of the user's, a part that was replaced or parametrized, or has no bias, a hook on a part or on all
    modules, a method that a subclass or an object overrides: all of these must be called, step by step. So must parts
    of other sizes than the layer's, which then say so, and those with a weight made of other tensors (quantized, as by
    torchao, say), which knows PyTorch's operators and not ours.
    """
    # At every call: a hook may come at any time. Asking `nn.Module` by name is slower than asking its dictionaries.
    interface, output, controller = (cell._modules.get(name) for name in ("interface", "output", "controller"))
    if type(interface) is not nn.Linear or type(output) is not nn.Linear:
        return False
    if cell.controller_kind == "custom" or type(controller) is not Controller:
        return False
    layers = list(controller._modules["layers"]._modules.values())  # type: ignore[union-attr]
    kind = CONTROLLERS[cell.controller_kind]
    if len(layers) != cell.num_layers or any(type(layer) is not kind for layer in layers):
        return False
    dropout = controller._modules["dropout"]
    if type(dropout) is not nn.Dropout or dropout.inplace:
        return False
    part: Any
    for part in (interface, output, controller, dropout, *layers):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return False
        if "forward" in part.__dict__:
            return False
    if any(getattr(torch_module, f"_global_{name}_hooks") for name in _HOOKS):
        return False
    overridden = type(cell)
    for name in ("advance", "control", "project", "_clip"):
        if getattr(overridden, name) is not getattr(DNCCell, name) or name in cell.__dict__:
            return False
    tensors = _parameters_by_name(cell)
    if (first := tensors[0]) is None:
        return False
    dtype, device = first.dtype, first.device
    if any(x is None or x.dtype != dtype or x.device != device or _is_composed(x) for x in tensors):
        return False
    return [x.shape for x in tensors if x is not None] == _shapes(cell)


def _is_composed(x: Tensor) -> bool:
    """Whether a tensor is made of others. Not one that is sharded over devices: what shards it makes it whole."""
    kind = type(x)  # of which a compiler sees what it does not see of the tensor
    return hasattr(kind, "__tensor_flatten__") and not hasattr(kind, "placements")


def _shapes(cell: DNCCell) -> list[tuple[int, ...]]:
    """The shapes of `_parameters_by_name`; the output layer's own weight says how many outputs there are."""
    hidden, read, interface = cell.hidden_size, cell.num_reads * cell.word_size, cell.interface_size
    rows = CELLS[cell.controller_kind].gates_per_unit * hidden
    shapes: list[tuple[int, ...]] = []
    for below in (cell.input_size + read, *[hidden] * (cell.num_layers - 1)):
        if cell.controller_kind == "feedforward":
            shapes += [(rows, below), (rows,)]
        else:
            shapes += [(rows, below), (rows, hidden), (rows,), (rows,)]
    outputs = cell.output.weight.shape[0]
    return [*shapes, (interface, hidden), (interface,), (outputs, hidden + read), (outputs,)]


def begins_with_zeros(cell: DNCCell) -> bool:
    """Whether no class and no object overrides the initial state of a plain cell."""
    kinds: tuple[tuple[Any, Any], ...] = ((cell, DNCCell), (cell.controller, Controller))
    return all(
        type(x).initial_state is kind.initial_state and "initial_state" not in x.__dict__  # which a compiler follows
        for x, kind in kinds
    )


def parameters_of(cell: DNCCell) -> list[Tensor]:
    """Those of a plain cell, as `Sequence` wants them."""
    return [tensor for tensor in _parameters_by_name(cell) if tensor is not None]


def _parameters_by_name(cell: DNCCell) -> list[Tensor | None]:
    """In the order of `Sequence`, which need not be a module's own: removing a pruning puts one at the end."""
    modules: Any = cell._modules
    layers = modules["controller"]._modules["layers"]._modules.values()
    of_layer = _OF_LINEAR if cell.controller_kind == "feedforward" else _OF_CELL
    tensors = [layer._parameters.get(name) for layer in layers for name in of_layer]
    parts = (modules["interface"], modules["output"])
    return tensors + [part._parameters.get(name) for part in parts for name in _OF_LINEAR]


def _checkpoint(checkpoint: int | str | None, steps: int, memory: MemoryState, layout: Layout | None) -> int:
    """Every how many steps to keep memory and link."""
    link_every = 1 if layout is None else layout.link_every
    if isinstance(checkpoint, int):
        return checkpoint
    if checkpoint is None:
        return 1
    per_step = (memory.memory.numel() + memory.link.numel() // link_every) * memory.memory.element_size()
    kept, most = steps * per_step, _most_kept(memory.memory.device)
    if torch.compiler.is_exporting():  # a program for sizes that are left open must not ask how large they are
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes half a second

        if not statically_known_true(kept > most):
            return 1
    elif kept <= most:
        return 1
    root = torch.sym_int(torch.sym_sqrt(steps - 1))  # of a number of steps that a compiler leaves open, too
    return max(link_every, root + 1)  # a shorter interval would store more links than are kept without checkpoints


def _most_kept(device: torch.device) -> int:
    """How many bytes of memory and link "auto" keeps."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * SHARE)
    return pool.MOST  # memory beyond that a CPU must clear first, which takes as long as to make the states again
