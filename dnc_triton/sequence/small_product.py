"""`Product` by kernels of our own, for so few rows that a library's set-up takes longer than the product."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dnc_triton.kernels.products import PRODUCT, pack, product
from dnc_triton.sequence.product import Product

MOST_ROWS = 64  # of a batch
# Products of two numbers, by kind of device. With more, a library is faster, as it can use a whole device; on a CPU the
# kernels would be interpreted, one row after the other.
MOST_WORK = {"cuda": 2**25, "cpu": 0}


def is_small(batch: int, *weights: Tensor, dtype: torch.dtype) -> bool:
    """Whether `SmallProduct` serves, and may be expected to be faster, for weights that are used together."""
    like = weights[0]
    if like.dtype != dtype or dtype not in (torch.float32, torch.float64):
        return False
    work = batch * sum(weight.numel() for weight in weights)
    return batch <= MOST_ROWS and work <= MOST_WORK.get(like.device.type, 0)


class SmallProduct(Product):
    """As `Product`, of one step; the products over all steps stay with the library.

    All that is multiplied, and what comes out, is contiguous.
    """

    small = True

    def add_to(self, base: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """As there; base is out or [O]."""
        if base is out:
            product(x, self._packed, out, add=True)
        else:
            product(x, self._packed, out, bias=base)
        return out

    def backward(self, d_product: Tensor, out: Tensor, addend: Tensor | None = None) -> None:
        """As there."""
        product(d_product, self.packed_back, out, addend=addend)

    def add_backward(self, d_product: Tensor, out: Tensor) -> None:
        """As there."""
        product(d_product, self.packed_back, out, add=True)

    @cached_property
    def _packed(self) -> Tensor:
        return pack(self.weight, most=PRODUCT.block)

    @cached_property
    def packed_back(self) -> Tensor:
        """The transpose, for the way back."""
        return pack(self.weight.T, most=PRODUCT.block)
