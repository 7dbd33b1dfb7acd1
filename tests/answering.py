"""What the tests of the reasoning tasks share: seeded draws, and a stand-in for a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Answering(nn.Module):
    """Stands in for a network: gives what it was told to, and remembers what it was shown."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers, self.shown = answers, answers.new_zeros(len(answers), 0, 0)

    def forward(self, inputs: torch.Tensor, state: int | None = None, *, lengths: Any = None) -> tuple:
        start = 0 if state is None else state
        seen = inputs if state is None else torch.cat([self.shown, inputs], 1)
        self.shown = seen
        return self.answers[:, start : start + inputs.shape[1]], start + inputs.shape[1]
