"""The least time a time step can take: the bytes that must move, at the speed of a copy; and its operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.configurations import Case
from benchmarks.modes import TRAINS
from dnc_reference.interface import interface_sizes

# Measured speed of copying device memory; for other devices it is measured in the run itself.
KNOWN_BYTES_PER_SECOND = {"NVIDIA H200": 4.3e12}
L2_BYTES_PER_SECOND = {"NVIDIA H200": 6e12}  # about; gives the floor for what fits into that cache
L2_BYTES = {"NVIDIA H200": 50 * 2**20}
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}  # larger than any cache
MULTIPLIED = {"cpu": 2048, "cuda": 8192}  # rows and columns of square matrices
REPEATS = 7


def step_bytes(batch: int, slots: int, word: int) -> tuple[int, int]:
    """The bytes of link and memory that a step in float32 must read and write, forward and backward.

    Forward, both are read and written: 8 N² + 8 N W. Backward, the old ones are read, their adjoints read and written:
    12 N² + 12 N W. What fits into a cache may be faster than memory.
    """
    numbers = batch * slots * (slots + word)
    return 8 * numbers, 12 * numbers


def floor_bytes(case: Case, mode: str) -> int:
    """The bytes of `step_bytes` for a time step in a mode, for the whole batch."""
    forward, backward = step_bytes(case.batch, case.memory_size, case.word_size)
    return forward + backward if mode in TRAINS else forward


def products(case: Case) -> int:
    """Additions and multiplications in a time step's products, for the whole batch; its adjoint has twice as many.

    The products: those with the weights of controller, interface and output; forward and backward weighting; lookups;
    reading.
    """
    slots, words, reads, hidden = case.memory_size, case.word_size, case.num_reads, case.hidden_size
    read, interface = reads * words, sum(interface_sizes(reads, 1, words).values())
    controller = 4 * hidden * (case.input_size + read + hidden) + (case.num_layers - 1) * 8 * hidden**2
    weights = controller + hidden * interface + (hidden + read) * case.output_size
    return 2 * case.batch * (weights + 2 * reads * slots**2 + (2 * reads + 1) * slots * words)


def operations(case: Case, mode: str) -> int:
    """Operations in a time step's products and, approximately, in its passes over link and memory.

    Per number, updating the link takes 4, memory 4 and the norms of its words 2; the adjoints 9, 8 and 4.
    """
    links, words = case.batch * case.memory_size**2, case.batch * case.memory_size * case.word_size
    forward, backward = products(case) + 4 * links + 6 * words, 2 * products(case) + 9 * links + 12 * words
    return forward + backward if mode in TRAINS else forward


def copy_speed(device: torch.device) -> float:
    """Bytes read and written per second when a tensor is copied onto another; the median of a few."""
    source = torch.zeros(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES[device.type] / _seconds(lambda: target.copy_(source), device)


def product_speed(device: torch.device) -> float:
    """Additions and multiplications per second in a product of large float32 matrices; the median of a few."""
    size = MULTIPLIED[device.type]
    a, b = torch.randn(2, size, size, device=device)
    product = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=product), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of a few calls."""
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one maps pages


def bytes_per_second(device: torch.device) -> float:
    """The speed that the floor is computed with: the known one of this GPU's memory, else a copy's."""
    known = KNOWN_BYTES_PER_SECOND.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or copy_speed(device)


def cache_bytes_per_second(device: torch.device, size: int) -> float | None:
    """The same for its L2 cache; None if `size` bytes do not fit, or its speed is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return L2_BYTES_PER_SECOND[name] if size <= L2_BYTES.get(name, 0) else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
