"""A product with a weight, and its adjoints, as the loop over a sequence wants them."""

from __future__ import annotations

import torch
from torch import Tensor


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

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., I] → [..., O], in the dtype of x, and with the bias [O], if there is one."""
        if bias is None:
            return self._multiply(x, self.weight.T)
        if self.narrow:
            return self._multiply(x, self.weight.T).add_(bias)
        return torch.addmm(bias, x.flatten(0, -2), self.weight.T).unflatten(0, x.shape[:-1])

    def add_to(self, base: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """out = base + x weightᵀ, x [B, I]; base may be out."""
        if self.narrow:
            return torch.add(base, x.to(self.dtype) @ self.weight.T, out=out)
        return torch.addmm(base, x, self.weight.T, out=out)

    def backward(self, d_product: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
        """out = d_product weight, the gradient of x, plus an addend [B, I]; d_product [B, O]."""
        if addend is not None:
            self.add_backward(d_product, out.copy_(addend))
        elif self.narrow:
            out.copy_(d_product.to(self.dtype) @ self.weight)
        else:
            torch.mm(d_product, self.weight, out=out)

    def add_backward(self, d_product: Tensor, out: Tensor) -> None:
        """out += d_product weight."""
        if self.narrow:
            out.add_(d_product.to(self.dtype) @ self.weight)
        else:
            out.addmm_(d_product, self.weight)

    def all_backward(self, d_product: Tensor) -> Tensor:
        """The gradient of x for any number of leading axes."""
        return self._multiply(d_product, self.weight)

    def weight_gradient(self, d_product: Tensor, x: Tensor) -> Tensor:
        """The gradient of the weight: d_productᵀ x over all leading axes, [O, I]."""
        d_product, x = d_product.flatten(0, -2), x.flatten(0, -2)
        return (d_product.to(self.dtype).T @ x.to(self.dtype)).to(x.dtype)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """One product, whatever the strides. PyTorch's own choice depends on whether the weight wants a gradient."""
        return (x.flatten(0, -2).to(self.dtype) @ weight).to(x.dtype).unflatten(0, x.shape[:-1])
