"""The kernels as compiled: what tests/kernels holds them to in the interpreter."""

from __future__ import annotations

import fuzz
import pytest
import test_kernel_goldens
import test_kernel_parity
import test_kernel_products
import test_kernel_sequence
import torch
from helpers import load_golden
from parity import Case

# The tests themselves, to be run again here.
# ruff: noqa: F401
from test_kernel_kept import test_lean_is_full_to_the_last_bit, test_links_that_are_not_kept
from test_kernel_parity import (
    test_products_are_not_rounded,
    test_sixteen_bits_are_for_storage,
    test_stopped_usage_gradient,
)
from test_kernel_products import test_a_sum_of_several_blocks, test_the_cut_changes_no_sum
from test_kernel_rows import (
    test_a_nan_is_not_lost,
    test_a_nan_stays_in_its_row,
    test_a_row_alone_is_the_row_in_a_batch,
    test_no_rows,
    test_same_call_same_bits,
)
from test_kernel_sequence import test_lengths_and_resets_leave_nothing_unwritten

pytestmark = pytest.mark.slow

# Compiling takes most of the time: few sizes, each with all that there is of it.
GOLDENS = [
    case for case in test_kernel_goldens.CASES if load_golden(case.values[0]).meta["config"]["memory_size"] <= 16
]
RANKED = [Case(1, slots, 3, 1, layout="spread", interface="oneplus") for slots in (140, 257)]
# Of each dtype and layout the smallest case: it comes last, and so stays.
PARITY = {
    (case.dtype, case.layout): case
    for case in sorted(test_kernel_parity.CASES, key=lambda case: case.slots * case.word, reverse=True)
    if case.slots > 1
}


@pytest.mark.parametrize(("name", "dtype", "backend"), GOLDENS)
def test_memory_step(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    test_kernel_goldens.test_memory_step(name, dtype, backend, device)


@pytest.mark.parametrize("case", PARITY.values(), ids=str)
def test_parity(case: Case, device: torch.device) -> None:
    test_kernel_parity.test_parity(case, device)


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_ranks_by_several_programs(case: Case, device: torch.device) -> None:
    """Each of which compares its slots with the others in several turns."""
    test_kernel_parity.test_parity(case, device)


@pytest.mark.parametrize("dtype", test_kernel_products.TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(5, 33, 4, 3), (4, 3, 260, 5)], ids=str)
def test_products(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    test_kernel_products.test_parity(sizes, dtype, device)


def test_products_of_a_row_alone(device: torch.device) -> None:
    test_kernel_products.test_a_row_alone_is_the_row_in_a_batch((2, 19, 13, 3), device)


@pytest.mark.parametrize("sizes", [(3, 5, 6, 8, 12, 21, 5), (7, 16, 9, 33, 16, 40, 35)], ids=str)
def test_weight_gradients(sizes: tuple[int, ...], device: torch.device) -> None:
    test_kernel_products.test_weight_gradients(*sizes, device)


def test_a_sequence_of_several_tiles(device: torch.device) -> None:
    """Of units, of interface numbers and of features, in one launch; in float32, where products and sums are fused."""
    test_kernel_sequence.test_float32((4, 64, 3), 66, 2, device)


def test_random_problems() -> None:
    assert fuzz.run(6, seed=2, rows=2, engine="interpreter", report=lambda line: None) == 6
