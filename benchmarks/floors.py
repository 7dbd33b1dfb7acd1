"""The least a time step can take: the bytes that must move, at the speed of a copy."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.configurations import Case
from benchmarks.modes import TRAINS

# Copying device memory, as measured; of other devices the copy's speed is measured in the run itself.
KNOWN_BYTES_PER_SECOND = {"NVIDIA H200": 4.3e12}
L2_BYTES_PER_SECOND = {"NVIDIA H200": 6e12}  # about; the least for what fits into that cache
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}  # larger than any cache
COPIES = 7


def floor_bytes(case: Case, mode: str) -> int:
    """The bytes of link and memory that a time step in float32 must read and write, for the whole batch.

    Forward both are read and written: 8 N² + 8 N W. Backward the old link is read, its adjoint read and written, and so
    is the memory's adjoint: 12 N² + 8 N W. What fits into a cache may be faster than memory.
    """
    slots, words = case.memory_size**2, case.memory_size * case.word_size
    forward, backward = 8 * slots + 8 * words, 12 * slots + 8 * words
    return case.batch * (forward + backward if mode in TRAINS else forward)


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of one tensor copied onto another; the median of a few."""
    source = torch.zeros(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPIES + 1):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED_BYTES[device.type] / statistics.median(seconds[1:])  # the first one maps the pages


def bytes_per_second(device: torch.device) -> float:
    """What the floor is reckoned with: the known speed of this GPU's memory, else the copy's."""
    known = KNOWN_BYTES_PER_SECOND.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or copy_speed(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
