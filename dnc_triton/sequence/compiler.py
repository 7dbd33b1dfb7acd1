"""How PyTorch's compiler is used, and how to call what it makes: machine code for a CPU, for one set of sizes.

Small operations are compiled into the code instead of called: products, sorts and running products of few numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dnc_triton.lock import ForkSafeLock

FEW = 8  # rows up to which a product, and root of the count up to which a sort, is no call of its own
BLOCK = 16  # rows that are added up at a time
SMALL = 2**16  # bytes of memory and link, up to which what lies between two kernels is put on the stack
Like = tuple[torch.Size, tuple[int, ...], torch.dtype]  # size, strides and dtype of a tensor


def like_of(tensor: Tensor) -> Like:
    """What code is compiled for. The stride of an axis of length 1 is never used."""
    strides = tensor.stride()
    if 1 in tensor.shape:
        strides = tuple(stride if size > 1 else 1 for size, stride in zip(tensor.shape, strides, strict=True))
    return tensor.shape, strides, tensor.dtype


_one_at_a_time = ForkSafeLock()  # PyTorch's compiler does not serve two threads at once


def machine_code(
    traced: Callable[..., Any], likes: tuple[Like, ...], memory: Like, *, returns: bool = False
) -> Callable[..., Any]:
    """A function compiled for the sizes of its arguments and the current number of threads; it takes tensors singly.

    `torch.compile` would check its arguments at each call, which takes as long as the step.

    Args:
        traced: of numbers [N], and of the tensors.
        likes: of the tensors.
        memory: of the memory among them.
        returns: whether it returns tensors.
    """
    with _one_at_a_time.held(), torch.device("cpu"):  # whatever the default one is
        # Both take a second.
        from torch._inductor.compile_fx import compile_fx_inner

        from dnc_triton.sequence.write_once import WriteOnce

        examples: list[Any] = [torch.empty_strided(size, stride, dtype=dtype).zero_() for size, stride, dtype in likes]
        (batch, slots, word), _, dtype = memory
        # Allocating a small tensor takes longer than filling it, so small intermediate ones go on the stack; not where
        # tensors are returned, for the next call reuses the stack's memory.
        on_stack = not returns and batch * slots * (slots + word) * dtype.itemsize <= SMALL
        numbers = torch.arange(slots, dtype=dtype)
        examples = [numbers, *examples]
        graph = make_fx(traced, decomposition_table=_DECOMPOSITIONS)(*examples)
        patches = {
            "cpp_wrapper": True,  # C++ between the kernels too
            "cpp.min_chunk_size": 4096,  # threads only for what takes longer than to wake them
            "aot_inductor.allow_stack_allocation": on_stack,
            "realize_acc_reads_threshold": 64,  # a sum of many outer products is one pass
            "post_grad_custom_post_pass": WriteOnce(),
        }
        made: list[Any] = []

        def compile_inner(*arguments: Any, **options: Any) -> Any:
            made.append(compile_fx_inner(*arguments, **options))
            return made[0]

        options = {"config_patches": patches, "inner_compile": compile_inner}
        # What wraps the machine code, for gradients for example (not wanted here), takes as long as a small network.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            torch._inductor.standalone_compile(graph, examples, dynamic_shapes="from_example_inputs", options=options)
    call = made[0].current_callable
    return lambda *tensors: call([numbers, *tensors])


def _product(a: Tensor, b: Tensor) -> Tensor | None:
    """A product [B, M, K] × [B, K, N] not worth a call, or that is fused with what is around it; else None."""
    _, rows, depth = a.shape
    columns = b.shape[2]
    if columns == 1:
        return (a * b.mT).sum(2, keepdim=True)
    if b.stride(1) == 1 and rows <= FEW:  # a row of the result at a time: each reads along b as it lies in memory
        return torch.stack([(row.unsqueeze(1) * b.mT).sum(2) for row in a.unbind(1)], 1)
    if rows == 1:
        return sum_down(a.mT * b)
    if depth <= 2 * FEW:  # outer products
        return reduce(torch.add, (a[:, :, k : k + 1] * b[:, k : k + 1] for k in range(depth)))
    return None


def sum_down(products: Tensor) -> Tensor:
    """The sum over the rows of [B, K, N], K large: some rows at a time, so that all is read as it lies in memory."""
    if products.shape[1] % BLOCK == 0:
        products = products.unflatten(1, (-1, BLOCK)).sum(2)
    return products.sum(1, keepdim=True)


def _bmm(a: Tensor, b: Tensor) -> Any:
    product = _product(a, b)
    return NotImplemented if product is None else product


def _bmm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Any:
    product = _product(a, b)
    return NotImplemented if product is None else out.copy_(product)


def _baddbmm_(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _product(a, b)
    return NotImplemented if product is None else base.mul_(beta).add_(product, alpha=alpha)


def _sort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    """Of few numbers: each goes to the place that the count of those before it gives."""
    if x.dim() != 2 or dim != -1 or not descending or x.shape[1] > FEW * FEW:
        return NotImplemented
    numbers = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    keys = torch.where(x == x, x, torch.inf)  # a NaN comes first
    own, other = keys.unsqueeze(2), keys.unsqueeze(1)
    before = (other > own) | ((other == own) & (numbers < numbers.unsqueeze(1)))
    places = before.to(x.dtype).sum(2).long()
    order = torch.zeros_like(places).scatter(1, places, numbers.long().expand_as(places))
    return x.gather(1, order), order


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Of few numbers: each result is a product by itself."""
    if x.shape[dim] > FEW * FEW:
        return NotImplemented
    numbers = torch.arange(x.shape[dim], dtype=x.dtype, device=x.device)
    others = x.movedim(dim, -1).unsqueeze(-2)
    return torch.where(numbers > numbers.unsqueeze(1), 1, others).prod(-1).movedim(-1, dim)


def _cumprod_out(x: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Tensor) -> Any:
    product = _cumprod(x, dim)
    return NotImplemented if product is NotImplemented else out.copy_(product)


def _select(tensor: Tensor, dim: int, index: int) -> Any:
    return tensor.squeeze(dim) if tensor.shape[dim] == 1 else NotImplemented


def _unbind(tensor: Tensor, dim: int = 0) -> Any:
    return [tensor.squeeze(dim)] if tensor.shape[dim] == 1 else NotImplemented


_aten = torch.ops.aten
_DECOMPOSITIONS: Any = {
    _aten.bmm.default: _bmm,
    _aten.bmm.out: _bmm_out,
    _aten.baddbmm_.default: _baddbmm_,
    _aten.sort.stable: _sort,
    _aten.cumprod.default: _cumprod,
    _aten.cumprod.out: _cumprod_out,
    # Of one step: to write to the only part of a tensor is to write all of it, which the compiler does not see.
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
}
