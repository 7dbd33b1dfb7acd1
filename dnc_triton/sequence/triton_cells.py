"""The LSTM's steps by kernels: the counterpart of `cells.LSTM`, with the same methods."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from dnc_triton.kernels.lstm import lstm_backward, lstm_forward
from dnc_triton.kernels.products import PRODUCT, lstm_product_backward, lstm_product_forward, pack, pack_gates, product
from dnc_triton.sequence.cells import LSTM
from dnc_triton.sequence.product import Product
from dnc_triton.sequence.small_product import SmallProduct


class TritonLSTM(LSTM):
    """As `LSTM`. Besides the gates, which hold tanh(g) as well, only the hidden vector before a clip is kept.

    Where the batch is small the products are made in the same launches.
    """

    more_kept = 0

    @classmethod
    def count_kept(cls, clip: float | None) -> int:
        """As there."""
        return 0 if clip is None else 1

    def forward(self, step: int, below: Tensor, prev: list[Tensor], new: list[Tensor]) -> None:
        unclipped = None if self.clip is None else self.unclipped[0][step]
        if self.below.small:
            given = below, prev[0], self._packed, self.pre[step]
            lstm_product_forward(*given, prev[1], new[0], new[1], unclipped, self.clip)
        else:
            lstm_forward(self._gates(step, below, prev), prev[1], new[0], new[1], unclipped, self.clip)

    def begin_backward(self, prev: list[Tensor]) -> None:
        self.make_d_pre()
        self.prev_cells = prev[1].unbind(0)

    def backward(
        self, step: int, d: list[Tensor], d_above: Tensor | None, d_below: Tensor, addend: Tensor | None
    ) -> None:
        d_hidden, d_cell = d
        given = self.pre[step], self.prev_cells[step], d_hidden, d_above
        lstm_backward(*given, d_cell, self.d_pre_steps[step], self.clip, self.max_gradient)
        self._products_backward(step, d_hidden, d_below, addend)

    def backward_highest(
        self,
        step: int,
        d: list[Tensor],
        d_out: Tensor,
        interface: Product,
        d_vectors: Tensor,
        d_below: Tensor,
        addend: Tensor | None,
    ) -> None:
        if not isinstance(interface, SmallProduct):
            super().backward_highest(step, d, d_out, interface, d_vectors, d_below, addend)
            return
        d_hidden, d_cell = d
        given = d_vectors, interface.packed_back, self.pre[step], self.prev_cells[step]
        bounds = self.clip, self.max_gradient
        lstm_product_backward(*given, d_hidden, d_out, d_cell, self.d_pre_steps[step], *bounds)
        self._products_backward(step, d_hidden, d_below, addend)

    def _products_backward(self, step: int, d_hidden: Tensor, d_below: Tensor, addend: Tensor | None) -> None:
        """From the gradient of the gates to those of what the weights were multiplied with."""
        d_pre = self.d_pre_steps[step]
        if self.below.small:
            product(d_pre, self._packed_back, d_below, d_hidden, addend=addend)
            return
        self.below.backward(d_pre, d_below, addend)
        assert self.recurrent is not None
        self.recurrent.backward(d_pre, d_hidden)

    @cached_property
    def _packed(self) -> Tensor:
        assert self.recurrent is not None
        return pack_gates(self.below.weight, self.recurrent.weight)

    @cached_property
    def _packed_back(self) -> Tensor:
        assert self.recurrent is not None
        return pack(torch.cat([self.below.weight, self.recurrent.weight], 1).T, most=PRODUCT.block)
