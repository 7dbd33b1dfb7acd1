"""The link of a large memory on a CPU, by C++ of our own, link.cpp, which reads and writes it once each way.

PyTorch's compiler does not add up rows and columns of a matrix in one pass, so it reads a link two or three times, and
for a large one that is most of a step's time. `compiled.py` takes these two operators instead.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_NUMBERS = 2**19  # in all links together; for fewer the compiler's own code takes as long
_CHUNK = 128  # rows over which columns are added up at a time, however many threads there are: to the same bits
_NUMBERS = {torch.float32: "float", torch.float64: "double"}


def serves(memory: Tensor) -> bool:
    """Whether the links of such a memory [B, N, W] are large, and the compiler here has vector types as GCC has."""
    batch, slots, _ = memory.shape
    return batch * slots * slots >= LEAST_NUMBERS and memory.dtype in _NUMBERS and sys.platform != "win32"


@torch.library.custom_op("dnc_triton::link_forward", mutates_args=("link",))
def link_forward(
    prev_link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor, link: Tensor
) -> tuple[Tensor, Tensor]:
    """Sets the new link, and returns the backward and the forward weights, [B, R, N] each.

    Args:
        prev_link, link: [B, 1, N, N], buffers and no views of them: before an operator writes to a view the compiler
            copies it.
        precedence, write_weights: [B, 1, N].
        read_weights: [B, R, N], those before the step.
    """
    backward, forward = (read_weights.new_empty(read_weights.shape) for _ in range(2))
    given = [tensor.contiguous() for tensor in (prev_link, precedence, write_weights, read_weights)]
    _call("link_forward", read_weights.shape[1], read_weights.shape[1], [*given, link, backward, forward])
    return backward, forward


@link_forward.register_fake
def _(
    prev_link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor, link: Tensor
) -> tuple[Tensor, Tensor]:
    return read_weights.new_empty(read_weights.shape), read_weights.new_empty(read_weights.shape)


@torch.library.custom_op("dnc_triton::link_backward", mutates_args=("d_link",))
def link_backward(
    prev_link: Tensor, precedence: Tensor, write_weights: Tensor, linked: Tensor, d_link: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns the gradient of the new link, in place, into that of the one before.

    Args:
        prev_link, d_link: [B, N, N].
        precedence, write_weights: [B, 1, N].
        linked: [B, 3R, N]: gradients of the forward weights, read weights before the step, gradients of the backward
            weights.

    Returns:
        the gradients of these read weights [B, R, N], of write weights and precedence, [B, 1, N] each.
    """
    reads = linked.shape[1] // 3
    d_read_weights = linked.new_empty(len(linked), reads, linked.shape[2])
    d_write_weights, d_precedence = (precedence.new_empty(precedence.shape) for _ in range(2))
    given = [tensor.contiguous() for tensor in (prev_link, precedence, write_weights, linked)]
    _call("link_backward", reads, reads + 2, [*given, d_link, d_read_weights, d_write_weights, d_precedence])
    return d_read_weights, d_write_weights, d_precedence


@link_backward.register_fake
def _(
    prev_link: Tensor, precedence: Tensor, write_weights: Tensor, linked: Tensor, d_link: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, slots = linked.shape
    row = precedence.new_empty(precedence.shape)
    return linked.new_empty(batch, heads // 3, slots), row, torch.empty_like(row)


def _call(name: str, reads: int, down: int, tensors: list[Tensor]) -> None:
    """Calls a function of link.cpp, with room for its `down` sums over the rows of each chunk."""
    link = tensors[0]
    batch, slots = len(link), link.shape[-1]
    assert all(tensor.is_contiguous() for tensor in tensors)
    sums = link.new_empty(batch, -(-slots // _CHUNK), down, slots)
    places = [tensor.data_ptr() for tensor in (sums, *tensors)]
    getattr(_library(link.dtype, reads), name)(torch.get_num_threads(), batch, slots, *places)


@lru_cache
def _library(dtype: torch.dtype, reads: int) -> Any:
    """link.cpp, compiled for a dtype and a number of read heads, and kept where PyTorch's compiler keeps its own."""
    import ctypes

    from torch._inductor.codecache import CppCodeCache  # takes a second

    source = Path(__file__).with_name("link.cpp").read_text(encoding="utf-8")
    values = {"NUMBER": _NUMBERS[dtype], "READS": reads, "CHUNK": _CHUNK}
    defined = "".join(f"#define {name} {value}\n" for name, value in values.items())
    library = CppCodeCache.load(defined + source, extra_flags=("-ffp-contract=fast",))
    for name, count in (("link_forward", 8), ("link_backward", 9)):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * count, None
    return library
