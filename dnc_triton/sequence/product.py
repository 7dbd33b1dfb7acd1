"""A product with a weight, and its adjoints, as the loop over a sequence wants them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # bfloat16 numbers in a row of what AMX multiplies at once


class Product:
    """x → x weightᵀ, multiplied in `dtype`, which under autocast is narrower than what it is added to.

    Args:
        weight: [O, I].
        dtype: of the multiplication.
    """

    small = False  # whether it is a `SmallProduct`

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.narrow, self.dtype = weight.dtype != dtype, dtype
        self.weight = weight.to(dtype)
        self._forth, self._back = self.weight.T, self.weight
        if self.narrow and dtype == torch.bfloat16 and weight.device.type == "cpu":
            # With AMX, PyTorch (2.11, 2.13 and 2.15) reads rows that are no whole tiles on into the next, times 0: a
            # NaN of another row of the batch, or of a later step, would come through. So both factors end in zeros.
            outputs, inputs = weight.shape
            whole = F.pad(self.weight, (0, -inputs % TILE, 0, -outputs % TILE))
            self._forth, self._back = whole[:outputs].T, whole[:, :inputs]

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] → [..., O], in the dtype of x, and with the bias [O], if there is one."""
        if bias is None:
            return self._multiply(x, self._forth)
        if self.narrow:
            return self._multiply(x, self._forth).add_(bias)
        return torch.addmm(bias, x.flatten(0, -2), self.weight.T).unflatten(0, x.shape[:-1])

    def add_to(self, base: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """out = base + x weightᵀ, x [B, I]; base may be out."""
        if self.narrow:
            return torch.add(base, self._rounded(x, self._forth) @ self._forth, out=out)
        return torch.addmm(base, x, self.weight.T, out=out)

    def backward(self, d_product: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
        """out = d_product weight, the gradient of x, plus an addend [B, I]; d_product [B, O]."""
        if addend is not None:
            self.add_backward(d_product, out.copy_(addend))
        elif self.narrow:
            out.copy_(self._rounded(d_product, self._back) @ self._back)
        else:
            torch.mm(d_product, self.weight, out=out)

    def add_backward(self, d_product: Tensor, out: Tensor) -> None:
        """out += d_product weight."""
        if self.narrow:
            out.add_(self._rounded(d_product, self._back) @ self._back)
        else:
            out.addmm_(d_product, self.weight)

    def all_backward(self, d_product: Tensor) -> Tensor:
        """The gradient of x for any number of leading axes."""
        return self._multiply(d_product, self._back)

    def weight_gradient(self, d_product: Tensor, x: Tensor) -> Tensor:
        """The gradient of the weight: d_productᵀ x over all leading axes, [O, I]."""
        d_product, x = d_product.flatten(0, -2), x.flatten(0, -2)
        return (d_product.to(self.dtype).T @ x.to(self.dtype)).to(x.dtype)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """One product, whatever the strides. PyTorch's own choice depends on whether the weight wants a gradient."""
        rounded = self._rounded(x.flatten(0, -2), weight)
        return (rounded @ weight).to(x.dtype).unflatten(0, x.shape[:-1])

    def _rounded(self, x: Tensor, weight: Tensor) -> Tensor:
        """The factor x of that weight: in the dtype of the multiplication, with zeros where the weight has some."""
        x, more = x.to(self.dtype), weight.shape[0] - x.shape[-1]
        return F.pad(x, (0, more)) if more else x
