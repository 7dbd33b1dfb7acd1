"""A fake device and a fake clock, with which measuring is tested: everything else is real."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_layer
import torch

from dnc_triton import dispatch, tuning
from dnc_triton.kernels import launcher
from dnc_triton.kernels.layout import Layout
from dnc_triton.problem import Problem

PROBLEM = replace(
    small_layer.PROBLEM, device=torch.device("cuda", 0), batch=12, memory_size=16, word_size=8, hidden_size=20
)
FAST, SLOW, REFERENCE = Layout(True, 16, 16, 4), Layout(False, 16, 32, 8), None


class Clock:
    """Answers with made-up times, and counts how often it was asked."""

    def __init__(self, **microseconds: float | Exception) -> None:
        self.microseconds, self.asked = microseconds, []

    def __call__(self, problem: Problem, run: partial) -> float:
        """µs for a run, or the error that it ends with; the dictionary has µs per step."""
        (operation,) = run.args
        self.asked.append(operation)
        answer = self.microseconds[str(operation)]
        if isinstance(answer, Exception):
            raise answer
        return answer * tuning._measured_steps(problem)


class StrawCheck:
    """Looks at a candidate by a function, which raises if it is wrong."""

    def __init__(self, look: Callable[[Any], None]) -> None:
        self.look = look

    def __call__(self, operation: Any) -> None:
        self.look(operation)

    def launch(self, operation: Any) -> None:
        """There is nothing to compile."""


@pytest.fixture(autouse=True)
def _a_gpu_of_straw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Straw 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    ended = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: ended))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(tuning, "random_call", lambda problem, steps: print)
    monkeypatch.setattr(tuning, "_check", lambda problem: None)
    monkeypatch.setattr(launcher, "compiling_ahead", lambda device: nullcontext())
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_failed_for_now", {})
    monkeypatch.setattr(dispatch, "_settled", {})
    monkeypatch.setenv("DNC_TRITON_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DNC_TRITON_MEASURE", raising=False)
    monkeypatch.delenv("DNC_TRITON_BACKEND", raising=False)


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(fast=10.0, slow=30.0, reference=900.0)
    monkeypatch.setattr(tuning, "_measure", clock)
    return clock


STEPS = {("split", SLOW): "slow", ("fused", FAST): "fast", ("reference", REFERENCE): "reference"}


def forget() -> None:
    """What a new process knows: nothing but the files."""
    tuning._known.clear()
    tuning._failed_for_now.clear()


def files() -> list[Path]:
    return sorted(tuning.cache_directory().glob("*"))
