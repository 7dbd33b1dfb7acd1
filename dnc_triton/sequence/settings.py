"""What does not change over a sequence, and decides what computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dnc_triton.kernels.layout import Layout
from dnc_triton.sequence.cells import CELLS, Cell


class SequenceSettings(NamedTuple):
    """What does not change over a sequence.

    Attributes:
        controller: a key of `CELLS`.
        num_layers: of the controller.
        clip: bound on the controller's state and on the output, or None.
        max_activation_gradient: bound on each element of the gradient of a layer's hidden vector, or None.
        strength_offset: what is added to the softplus of raw strengths: 1 for oneplus, 0 for softplus.
        stop_usage_gradient: as in `dnc_reference.memory_step`.
        product_dtype: of the products with weights: the parameters' or, under autocast, a narrower one.
        checkpoint: k: memory and link are kept at every k-th step; 1 keeps all, but of links every `link_every`-th.
        compiled: whether a step, controller included, is compiled by PyTorch's compiler.
        layout: of the kernels; None for plain PyTorch.
    """

    controller: str
    num_layers: int
    clip: float | None
    max_activation_gradient: float | None
    strength_offset: float
    stop_usage_gradient: bool
    product_dtype: torch.dtype
    checkpoint: int
    compiled: bool
    layout: Layout | None

    @property
    def link_every(self) -> int:
        """Steps between the links that a backward is given; it recomputes those in between as it goes."""
        return 1 if self.layout is None else self.layout.link_every

    @property
    def link_period(self) -> int:
        """Steps between the links that a forward stores for it."""
        return self.link_every if self.checkpoint == 1 else self.checkpoint

    @property
    def cell(self) -> type[Cell]:
        """What runs a layer of the controller."""
        if self.layout is None or self.controller != "lstm":
            return CELLS[self.controller]
        from dnc_triton.sequence.triton_cells import TritonLSTM  # Triton need not be there

        return TritonLSTM
