"""What holds for every test: one seed, the same examples each time, and failures that show their values."""

from importlib.util import find_spec

import pytest
import torch

# A test fails or passes by the code alone, on every machine: no random seed, no clock, no examples from an earlier run.
# The tests on a GPU do without hypothesis, so that nothing has to be installed there.
if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=25)
    settings.load_profile("deterministic")

pytest.register_assert_rewrite("helpers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
