"""Several tensors in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_triton.sequence import pool


class Parts:
    """Tensors one after the other in each row of a buffer, every one at a multiple of 16 bytes.

    For what does not, kernels would be compiled anew.
    """

    def __init__(self, dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
        unit = 16 // dtype.itemsize
        self.dtype, self.shapes = dtype, shapes
        self.lengths = [-(-math.prod(shape) // unit) * unit for shape in shapes]

    def allocate(self, rows: int, like: Tensor) -> Tensor:
        """A buffer [rows, ·], on the device of `like`. Nothing is filled in."""
        return pool.empty((rows, sum(self.lengths)), like, self.dtype)

    def cut(self, buffer: Tensor) -> list[Tensor]:
        """The parts of a buffer [..., ·]: [..., *shape] each."""
        parts = zip(buffer.split(self.lengths, -1), self.shapes, strict=True)
        return [part[..., : math.prod(shape)].unflatten(-1, shape) for part, shape in parts]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The inverse of `cut` for one row."""
        lengths = zip(tensors, self.lengths, strict=True)
        return torch.cat([F.pad(tensor.flatten(), (0, length - tensor.numel())) for tensor, length in lengths])


def zeros(shapes: Iterable[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Zeros of these shapes, contiguous, in one buffer: a few small ones take longer to fill than a large one."""
    size, places = _places(tuple(shapes), like.dtype)
    buffer = like.new_zeros(size)
    return [buffer.as_strided(*place) for place in places]


@lru_cache(maxsize=1024)
def _places(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> tuple[int, list[tuple[tuple[int, ...], tuple[int, ...], int]]]:
    """The length of a buffer that holds these one after the other, as in `Parts`; shape, strides, offset of each."""
    lengths = Parts(dtype, *shapes).lengths
    offsets = accumulate(lengths, initial=0)
    strides = (tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))) for shape in shapes)
    return sum(lengths), list(zip(shapes, strides, offsets, strict=False))
