"""A sequence step by step: the reference's unroll, with autograd's own checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import dnc_reference
from dnc_reference import DNCCell, DNCState
from dnc_triton.ops.eager import all_savable, is_transformed


def unroll_stepwise(
    cell: DNCCell,
    inputs: Tensor,
    state: DNCState,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    checkpoint: int | str | None = None,
    **keywords: Any,
) -> tuple[Tensor, DNCState]:
    """`dnc_reference.unroll`, with checkpoints.

    Args:
        cell, inputs, state, lengths, reset, keywords: as there.
        checkpoint: k: the backward has the states of every k-th step, and runs the steps in between again; "auto" and
            None keep every step.
    """
    inputs, state, reset = all_savable((inputs, state, reset))  # inputs for the sake of checkpoints
    # A transform of torch.func takes no checkpoints.
    if not isinstance(checkpoint, int) or not torch.is_grad_enabled() or is_transformed():
        return dnc_reference.unroll(cell, inputs, state, lengths=lengths, reset=reset, **keywords)
    pieces = []
    for start in range(0, max(1, inputs.shape[0]), checkpoint):
        here = slice(start, start + checkpoint)
        run: Any = dnc_reference.unroll  # of which a compiler takes care
        if not torch.compiler.is_compiling():
            run = _again(cell, [reset, *tree_leaves(state)])
        outputs, state = torch.utils.checkpoint.checkpoint(
            run,
            cell,
            inputs[here],
            state,
            lengths=None if lengths is None else lengths - start,
            reset=None if reset is None else reset[here],
            **keywords,
            use_reentrant=False,
        )
        pieces.append(outputs)
    return torch.cat(pieces), state


class _Unroll(nn.Module):
    """`dnc_reference.unroll` as a module of its cell."""

    def __init__(self, cell: DNCCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, DNCState]:
        return dnc_reference.unroll(self.cell, *arguments, **keywords)


def _again(cell: DNCCell, given: list[Any]) -> Callable[..., tuple[Tensor, DNCState]]:
    """`dnc_reference.unroll` for a checkpoint, which calls it now, and again from the backward.

    By then the cell may have other parameters and buffers, as after a `functional_call`: it is run with those of the
    forward. One that was changed in place meanwhile is an error, as for what autograd saves, even where no gradient
    needs its value. (Inputs are checked by the checkpoint itself.)
    """
    parameters = _whole(cell.named_parameters(remove_duplicate=False))
    tensors = parameters | _whole(cell.named_buffers(remove_duplicate=False))
    # Those of inference mode have no version.
    counted = [x for x in (*parameters.values(), *given) if isinstance(x, Tensor) and not x.is_inference()]
    versions = [x._version for x in counted]

    def run(cell: DNCCell, *arguments: Any, **keywords: Any) -> tuple[Tensor, DNCState]:
        if [x._version for x in counted] != versions:
            raise RuntimeError(
                "checkpoint: parameters, state and reset must stay as they are until the backward, which computes from "
                "them again, but one has been modified by an inplace operation"
            )
        here = dict(cell.named_parameters(remove_duplicate=False)) | dict(cell.named_buffers(remove_duplicate=False))
        if all(here.get(name) is tensor for name, tensor in tensors.items()):
            return dnc_reference.unroll(cell, *arguments, **keywords)
        named = {f"cell.{name}": tensor for name, tensor in tensors.items()}
        unrolled: tuple[Tensor, DNCState] = functional_call(
            _Unroll(cell), named, arguments, keywords, tie_weights=False
        )
        return unrolled

    return run


def _whole(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Without those that are sharded over devices (`DTensor`): what shards them gathers them for a backward itself."""
    return {name: tensor for name, tensor in named if not hasattr(tensor, "placements")}
