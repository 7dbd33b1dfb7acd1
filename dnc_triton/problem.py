"""What a backend is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """Everything that may decide whether a backend can serve a call, and which one is the best for it.

    Attributes:
        device, dtype: of the state.
        batch, steps: B, and T, which is 1 for a single memory step.
        memory_size, word_size, num_reads, num_writes: N, W, R, K.
        controller: "lstm", "gru", "rnn", "feedforward"; "custom" where a controller or part is the user's own or has
            hooks, so that it must be called step by step; None for a memory step by itself.
        needs_gradient: whether a backward pass may follow.
        hidden_size, num_layers: of the controller, 0 for a memory step by itself.
        trace: whether a `Trace` is asked for.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    steps: int
    memory_size: int
    word_size: int
    num_reads: int
    num_writes: int
    controller: str | None
    needs_gradient: bool
    hidden_size: int = 0
    num_layers: int = 0
    trace: bool = False

    def __str__(self) -> str:
        what = "memory step"
        if self.controller is not None:
            what = f"sequence, {self.controller} controller, {self.num_layers}×{self.hidden_size}"
        return (
            f"{what}, {self.device}, {str(self.dtype).removeprefix('torch.')}, B={self.batch}, T={self.steps}, "
            f"N={self.memory_size}, W={self.word_size}, R={self.num_reads}, K={self.num_writes}, "
            f"{'with' if self.needs_gradient else 'without'} gradients"
        )
