"""The network to compare a DNC with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class LSTMBaseline(nn.Module):
    """What a user would take instead of a DNC: an `nn.LSTM` and a linear layer on top."""

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        dropout = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, dropout=dropout)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, inputs: Tensor, state: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        """inputs [B, T, input_size] → outputs [B, T, output_size], state; called like a `DNC`."""
        if lengths is None:
            hidden, state = self.lstm(inputs, state)
        else:
            packed = pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, state = self.lstm(packed, state)
            hidden, _ = pad_packed_sequence(packed, batch_first=True, total_length=inputs.shape[1])
        return self.output(hidden), state
