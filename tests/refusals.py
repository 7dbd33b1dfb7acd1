"""What the tests of bad input share: a layer and its inputs, one row of a table, and how a refusal reads."""

from __future__ import annotations

import re

import pytest
import torch

from dnc_triton import DNC

SIZES = dict(memory_size=5, word_size=4, num_reads=2, num_writes=1)
BACKENDS = "'auto' or one of '"
BATCH, STEPS = 4, 7
INPUTS = torch.randn(BATCH, STEPS, 3)


def make(**changes) -> DNC:
    return DNC(**{**dict(input_size=3, hidden_size=6, output_size=2, **SIZES), **changes})


def refuses(error: type[Exception], argument: str, expected: str, came: str):
    """Every message reads "argument: expected …, got …"."""
    pattern = rf"(?s)^{re.escape(argument)}: expected .*{re.escape(expected)}.*, got .*{re.escape(came)}"
    return pytest.raises(error, match=pattern)


def case(*values, id: str):
    """One row of a table."""
    return pytest.param(*values, id=id)
