"""What holds for every test: one seed, the same examples each time, and failures that show their values."""

import pytest
import torch
from hypothesis import settings

# A test fails or passes by the code alone, on every machine: no random seed, no clock, no examples from an earlier run.
settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=25)
settings.load_profile("deterministic")

pytest.register_assert_rewrite("helpers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
