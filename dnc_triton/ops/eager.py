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

ORDINARY = (Tensor, nn.Parameter)  # tensors of no special kind


def is_eager(tensors: list[Tensor]) -> bool:
    """Whether no compiler, mode, transform or other kind of tensor has to see which operators are called."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler can follow nothing of the rest
        and not is_in_torch_dispatch_mode()
        and not is_transformed()
        and not tensors[0].is_meta
        and all(type(tensor) in ORDINARY for tensor in tensors)
    )


def is_transformed() -> bool:
    """Whether vmap, grad or the like of `torch.func`, forward-mode differentiation, or `torch.jit.trace` is at work.

    They have to look inside what is called, which a custom operator does not allow; and a trace that was taken with
    gradients is checked without, where the operator is called differently. A compiler that traces knows of those of
    `torch.func`, including its forward-mode differentiation.
    """
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or (
        not torch.compiler.is_compiling() and (forward_ad._current_level >= 0 or torch.jit.is_tracing())
    )


def savable(x: Any) -> Any:
    """A copy of an inference-mode tensor, which cannot be saved for a backward; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def all_savable(nest: Any) -> Any:
    """`savable` of all in a nest, if there may be a backward; not for a compiler, which cannot follow its checks."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nest
    return tree_map(savable, nest)


def refuse_batched(gradients: list[Tensor]) -> None:
    """Raise RuntimeError if gradients are batched, many in one, which a hand-written backward cannot take apart."""
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
    """Makes a tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
