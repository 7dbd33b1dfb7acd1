"""Takes the place of a CUDA device in the tests: a replay runs what was recorded once more, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dnc_triton.sequence.engine import Captured


class StandIn:
    """Takes the place of `engine.Engine`. As there, a capture computes nothing: its results are NaN until a replay.

    Attributes:
        captures, replays, waits: how many there were.
        kept: addresses of what plain launches may still read.
        is_ready: what `ready` answers.
        failure: what a capture raises, if anything.
        extra: bytes of work space of each capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = self.waits = self.extra = 0
        self.kept: list[int] = []
        self.is_ready = True
        self.failure: Exception | None = None

    def ready(self) -> bool:
        return self.is_ready

    def memory(self) -> int:
        return 2**30

    def wait(self) -> None:
        self.waits += 1

    def keep_until_launched(self, tensors: Sequence[Tensor]) -> None:
        self.kept += [tensor.data_ptr() for tensor in tensors]

    def capture(self, call: Callable[[], list[Tensor]], pool: Any = None) -> Captured:
        if self.failure is not None:
            raise self.failure
        self.captures += 1
        results = call()
        for tensor in results:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

        def replay() -> None:
            self.replays += 1
            for old, new in zip(results, call(), strict=True):
                old.copy_(new)

        size = sum(tensor.numel() * tensor.element_size() for tensor in results)
        return Captured(results, replay, size + self.extra, pool)


def launch_up_to_running(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Takes the place of `kernel[grid]` where kernels compile and nothing can run them."""
    return lambda *arguments, **options: kernel.run(*arguments, grid=grid, warmup=True, **options)


class Driver:
    """Takes the place of Triton's driver, for a device that is compiled for and does nothing else."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
