"""Large buffers of the CPU that are taken again.

What malloc gives back to the system comes back as pages that are mapped and cleared anew, one by one: to write to them
the first time takes nine times as long as the second. A history is given up after every backward and wanted again at
once, so its largest buffers wait here.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**20  # bytes; what is smaller malloc keeps by itself
MOST = 2**28  # bytes that wait at most

_waiting: list[np.ndarray] = []  # the latest last; each change of it is atomic


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor whose memory is taken again once nothing refers to it any more.

    Args:
        shape: of the tensor.
        like: of whose dtype and device it is. Only real ones on a CPU come from here.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter) or size < SMALLEST:
        return like.new_empty(shape)
    block = _take(size)
    lease = block[:]  # the tensor holds it, and nobody else
    weakref.finalize(lease, _give_back, block).atexit = False
    return torch.from_numpy(lease).view(like.dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """As `torch.empty_like`, contiguous."""
    return empty(tensor.shape, tensor)


def _take(size: int) -> np.ndarray:
    for index in reversed(range(len(_waiting))):
        try:
            if _waiting[index].nbytes == size:
                return _waiting.pop(index)
        except IndexError:
            continue
    return np.empty(size, np.uint8)


def _give_back(block: np.ndarray) -> None:
    _waiting.append(block)
    while sum(waiting.nbytes for waiting in list(_waiting)) > MOST:
        _waiting.pop(0)
