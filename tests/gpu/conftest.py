"""The tests of the kernels on a GPU: `pytest -m gpu tests/gpu`. Without one they are skipped."""

import sys
from pathlib import Path

import pytest
import torch

# What is the same on every device is in tests/kernels.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


@pytest.fixture(autouse=True)
def _first_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested does not depend on what is the fastest here: nothing is measured, or remembered."""
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    monkeypatch.setenv("DNC_TRITON_CACHE", "/dev/null/nowhere")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
