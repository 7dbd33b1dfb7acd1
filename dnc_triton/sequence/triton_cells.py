"""The LSTM's steps by a kernel: the counterpart of `cells.LSTM`, with the same methods."""

from __future__ import annotations

from torch import Tensor

from dnc_triton.kernels.lstm import lstm_backward, lstm_forward
from dnc_triton.sequence.cells import LSTM


class TritonLSTM(LSTM):
    """As `LSTM`. Besides the gates, which hold tanh(g) as well, only the hidden vector before a clip is kept."""

    more_kept = 0

    @classmethod
    def count_kept(cls, clip: float | None) -> int:
        """As there."""
        return 0 if clip is None else 1

    def forward(self, step: int, below: Tensor, prev: list[Tensor], new: list[Tensor]) -> None:
        unclipped = None if self.clip is None else self.unclipped[0][step]
        lstm_forward(self._gates(step, below, prev), prev[1], new[0], new[1], unclipped, self.clip)

    def begin_backward(self, prev: list[Tensor]) -> None:
        self.make_d_pre()
        self.prev_cells = prev[1].unbind(0)

    def backward(self, step: int, d: list[Tensor], d_above: Tensor | None, d_below: Tensor) -> None:
        d_hidden, d_cell = d
        d_pre = self.d_pre_steps[step]
        given = self.pre[step], self.prev_cells[step], d_hidden, d_above
        lstm_backward(*given, d_cell, d_pre, self.clip, self.max_gradient)
        self.below.backward(d_pre, d_below)
        assert self.recurrent is not None
        self.recurrent.backward(d_pre, d_hidden)
