"""Around the operators: whether a compiler, a mode or a transform is at work, what is refused, on which device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_map

ORDINARY = (Tensor, nn.Parameter)  # tensors, of no kind of its own


def is_eager(tensors: list[Tensor]) -> bool:
    """Whether no compiler, mode, transform or other kind of tensor has to see which operators are called."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler follows nothing of the rest
        and not is_in_torch_dispatch_mode()
        and not is_transformed()
        and not tensors[0].is_meta
        and all(type(tensor) in ORDINARY for tensor in tensors)
    )


def is_transformed() -> bool:
    """Whether vmap, grad or their like of `torch.func`, forward-mode differentiation, or `torch.jit.trace` are at work.

    They look into what is called, which an operator of its own does not let them; and a trace, taken with gradients, is
    checked without, where the operator is called otherwise. A compiler that traces knows of those of `torch.func`,
    forward-mode differentiation by it among them.
    """
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or (
        not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or torch.jit.is_tracing())
    )


def savable(x: Any) -> Any:
    """A copy of a tensor of inference mode, which cannot be saved for a backward; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def all_savable(nest: Any) -> Any:
    """`savable` of all in a nest, where there may be a backward; a compiler does not follow what that asks."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nest
    return tree_map(savable, nest)


def refuse_batched(gradients: list[Tensor]) -> None:
    """Raise RuntimeError if gradients are many in one, which a backward written by hand cannot take apart."""
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, gradients)):
        raise RuntimeError(
            "is_grads_batched, vectorize: expected backend='reference', whose backward takes gradients in batches, got "
            "an operation whose backward is written by hand"
        )


def no_second_backward(what: str) -> Callable[..., Any]:
    """The backward of a backward that is written by hand: it raises RuntimeError, with the remedy."""

    def refuse(*arguments: Any) -> Any:
        raise RuntimeError(
            f"second derivatives: expected backend='reference', whose backward is differentiable, got {what}, whose "
            "backward is written by hand"
        )

    return refuse


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
