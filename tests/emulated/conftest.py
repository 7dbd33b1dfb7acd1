"""The kernels as they are compiled for an NVIDIA GPU, emulated on the CPU: `make emulate`.

Triton decides when it is imported whether its functions are interpreted, and for the other tests they are. So these
are collected only by a process that is asked for nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
VARIABLE = "TRITON_INTERPRET"

# What is run here is in tests/kernels.
sys.path.insert(0, str(HERE.parent / "kernels"))


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if not all(path.is_relative_to(HERE) for path in asked):
        return True
    if os.environ.get(VARIABLE) == "1":
        raise pytest.UsageError(f"{VARIABLE}=1: the kernels would be interpreted, not compiled")
    return None


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[None]:
    from launching import emulating, poison
    from parity import Margins

    place = Margins.place

    def place_poisoned(self: Margins, *args: object) -> Tensor:
        inside = place(self, *args)
        for part in (inside, *self.buffers[-1]):
            poison(part)
        return inside

    monkeypatch.setattr(Margins, "place", place_poisoned)
    monkeypatch.setenv(VARIABLE, "1")  # the dispatcher takes the kernels on a CPU
    # A cache of its own: what is in it has no machine code.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(pytestconfig.rootpath / ".pytest_cache/emulated"))
    with emulating():
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
