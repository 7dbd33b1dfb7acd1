"""Large buffers on the CPU that are reused.

What malloc gives back to the system comes back as pages that are mapped and cleared anew, one by one: writing to them
takes nine times as long the first time as the second. A history is given up after every backward and wanted again at
once, so its largest buffers wait here.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dnc_triton.lock import ForkSafeLock

SMALLEST = 2**20  # bytes; what is smaller malloc keeps by itself
MOST = 2**28  # bytes that wait at most

_waiting: dict[int, np.ndarray] = {}  # by id, the latest last; 256 at most, as large as they are
# Guards `_waiting` between threads. It can be taken twice, since the garbage collector may drop a tensor, and so call
# `_give_back`, in a thread that holds it: what is done here is one atomic step at a time, on a copy of what waits.
_lock = ForkSafeLock()


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `like.new_empty(shape)`, but a large buffer on a CPU is reused once no tensor refers to it any more.

    PyTorch cannot resize the storage of such a tensor.
    """
    dtype = dtype or like.dtype
    size = math.prod(shape) * dtype.itemsize
    # A mode must see what it traces or fakes; and a size that is not known yet must not be asked how large it is.
    if like.device.type != "cpu" or type(like) is not Tensor or is_in_torch_dispatch_mode() or size < SMALLEST:
        return like.new_empty(shape, dtype=dtype)
    block = _take(size)
    lease = block[:]  # which the tensor's storage alone holds
    weakref.finalize(lease, _give_back, block).atexit = False
    return torch.from_numpy(lease).view(dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """As `torch.empty_like`, and contiguous."""
    return empty(tensor.shape, tensor)


def _take(size: int) -> np.ndarray:
    with _lock.held():
        for block in reversed(list(_waiting.values())):
            if block.nbytes == size and _waiting.pop(id(block), None) is not None:
                return block
    return np.empty(size, np.uint8)


def _give_back(block: np.ndarray) -> None:
    with _lock.held():
        _waiting[id(block)] = block
        blocks = list(_waiting.values())
        excess = sum(waiting.nbytes for waiting in blocks) - MOST
        for oldest in blocks:
            if excess <= 0:
                break
            _waiting.pop(id(oldest), None)
            excess -= oldest.nbytes
