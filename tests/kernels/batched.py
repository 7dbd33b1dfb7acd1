"""An interpreter for the kernels that runs all programs of a launch at once.

Triton's own takes one program after the other, a tenth of a second each: a million random problems would take days.
This one puts an axis for the programs in front of every block and computes with PyTorch. What it runs are the same
functions, from their source, with `Language` in the place of `tl`. It knows what the kernels use, and no more.

It also checks what neither Triton's interpreter nor a GPU does: that no load and no store leaves its tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from torch import Tensor

from dnc_triton.kernels import addressing, buffers, common, linking, reading, step, step_launch
from dnc_triton.kernels.sizes import TRITON_DTYPES, Sizes


@contextmanager
def batched_interpreter() -> Iterator[None]:
    """What is launched within the block runs here."""
    kernels = {name: Kernel(_translated()[name]) for name in ("step_forward_kernel", "step_backward_kernel")}
    with patch.multiple(step_launch, **kernels):
        yield


class Kernel:
    """Takes the place of a kernel: `kernel[grid](...)` runs it."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(
            *arguments: Tensor | int | None,
            sizes: Sizes,
            num_warps: int,
            enable_fp_fusion: bool,
            maxnreg: int = 0,
            **constants: Any,
        ) -> None:
            compute = next(dtype for dtype, name in TRITON_DTYPES.items() if name == sizes.COMPUTE)
            constants["sizes"] = sizes._replace(COMPUTE=compute)
            # The programs of the second axis, which differ in how far they loop, run one after the other.
            for second in range(grid[1] if len(grid) > 1 else 1):
                Language.program_ids = (Value(torch.arange(grid[0])), second)
                self.function(*(Pointer(x) if isinstance(x, Tensor) else x for x in arguments), **constants)

        return run


@cache
def _translated() -> dict[str, Callable[..., Any]]:
    """Name → each of the kernels' functions, seeing `Language` as `tl` and the other functions translated likewise."""
    scopes: list[dict[str, Any]] = []
    translated: dict[str, Callable[..., Any]] = {}
    for module in (common, buffers, addressing, linking, reading, step):
        constants = {name: x.value if isinstance(x, tl.constexpr) else x for name, x in vars(module).items()}
        scopes.append({**constants, "tl": Language})
        for name, function in vars(module).items():
            source = getattr(function, "fn", None)  # of a function that Triton compiles, or interprets
            if isinstance(source, FunctionType) and source.__module__ == module.__name__:
                translated[name] = FunctionType(source.__code__, scopes[-1], name, source.__defaults__)
    for scope in scopes:
        scope.update({name: function for name, function in translated.items() if name in scope})
    return translated


class Value:
    """A block of numbers in each program: [programs, *block]; the first axis is 1 where all have the same."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def __getitem__(self, index: tuple[Any, ...]) -> Value:
        return Value(self.data[(slice(None), *index)])

    def __neg__(self) -> Value:
        return Value(-self.data)


def _aligned(*values: Any) -> list[Any]:
    """The tensors of values, with as many axes each: the programs' first, and the blocks' aligned at the last."""
    axes = max(value.data.dim() for value in values if isinstance(value, Value))
    return [
        value.data.reshape(value.data.shape[0], *[1] * (axes - value.data.dim()), *value.data.shape[1:])
        if isinstance(value, Value)
        else value
        for value in values
    ]


def _give_operators() -> None:
    for name in ["add", "sub", "mul", "truediv", "and", "or", "lshift", "lt", "le", "gt", "ge", "eq", "ne"]:
        function = getattr(operator, name + "_" * (name in ("and", "or")))

        def method(self: Value, other: Any, function: Callable[..., Any] = function) -> Value:
            return Value(function(*_aligned(self, other)))

        def reflected(self: Value, other: Any, function: Callable[..., Any] = function) -> Value:
            return Value(function(*_aligned(other, self)))

        setattr(Value, f"__{name}__", method)
        if name not in ("lt", "le", "gt", "ge", "eq", "ne"):
            setattr(Value, f"__r{name}__", reflected)


_give_operators()


class Pointer:
    """The places of some of a tensor's elements."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset - offset)

    def places(self, mask: Tensor | None) -> Tensor:
        """Which elements; element 0 where the mask is off."""
        places = self.offset.data
        if mask is not None:
            places = torch.where(mask, places, 0)
        least, most = places.aminmax()
        if least < 0 or most >= self.tensor.numel():
            raise IndexError(f"access to elements {least} to {most} of a tensor of {self.tensor.numel()}")
        return places


class Language:
    """What the kernels use of `triton.language`."""

    program_ids: tuple[Any, ...] = ()
    float64, int32, int64 = torch.float64, torch.int32, torch.int64

    @staticmethod
    def program_id(axis: int) -> Any:
        return Language.program_ids[axis]

    @staticmethod
    def debug_barrier() -> None:
        pass

    @staticmethod
    def arange(start: int, end: int) -> Value:
        return Value(torch.arange(start, end).unsqueeze(0))

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: torch.dtype) -> Value:
        return Value(torch.full((1, *shape), value, dtype=dtype))

    @staticmethod
    def load(pointer: Pointer, mask: Value | None = None, other: float | None = None) -> Value:
        if mask is None:
            return Value(pointer.tensor.view(-1)[pointer.places(None)])
        offset, where = _aligned(pointer.offset, mask)
        loaded = pointer.tensor.view(-1)[Pointer(pointer.tensor, Value(offset)).places(where)]
        return Value(torch.where(where, loaded, torch.nan if other is None else other))

    @staticmethod
    def store(pointer: Pointer, value: Value, mask: Value | None = None) -> None:
        everywhere = Value(torch.ones(1, dtype=torch.bool))
        offset, numbers, where = torch.broadcast_tensors(*_aligned(pointer.offset, value, mask or everywhere))
        places = Pointer(pointer.tensor, Value(offset)).places(where)
        pointer.tensor.view(-1)[places[where]] = numbers[where].to(pointer.tensor.dtype)

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        if isinstance(condition, bool):
            return yes if condition else no
        return Value(torch.where(*_aligned(condition, yes, no)))

    @staticmethod
    def maximum(a: Value, b: Any) -> Value:
        """Of a number and a NaN, the number, as when compiled; likewise in `max`."""
        return Value(torch.fmax(*(torch.as_tensor(x, dtype=a.dtype) for x in _aligned(a, b))))

    @staticmethod
    def fma(a: Value, b: Value, c: float) -> Value:
        return a * b + c

    minimum = min  # of numbers that all elements share

    static_range = range

    @staticmethod
    def range(*bounds: int, loop_unroll_factor: int) -> range:
        return range(*bounds)

    @staticmethod
    def sum(x: Value, axis: int | None = None, keep_dims: bool = False) -> Value:
        axes = range(1, x.data.dim()) if axis is None else [axis + 1]
        return Value(x.data.sum(tuple(axes), keepdim=keep_dims))

    @staticmethod
    def max(x: Value, axis: int, keep_dims: bool = False) -> Value:
        numbers = torch.where(x.data.isnan(), -torch.inf, x.data)
        return Value(numbers.amax(axis + 1, keepdim=keep_dims))

    @staticmethod
    def cumsum(x: Value, axis: int, reverse: bool = False) -> Value:
        turned = x.data.flip(axis + 1) if reverse else x.data
        total = turned.cumsum(axis + 1)
        return Value(total.flip(axis + 1) if reverse else total)

    @staticmethod
    def cumprod(x: Value, axis: int) -> Value:
        return Value(x.data.cumprod(axis + 1))

    @staticmethod
    def sort(x: Value) -> Value:
        return Value(x.data.sort().values)

    @staticmethod
    def abs(x: Value) -> Value:
        return Value(x.data.abs())

    @staticmethod
    def exp(x: Value) -> Value:
        return Value(x.data.exp())

    @staticmethod
    def exp2(x: Value) -> Value:
        return Value(x.data.exp2())

    @staticmethod
    def floor(x: Value) -> Value:
        return Value(x.data.floor())

    @staticmethod
    def log(x: Value) -> Value:
        return Value(x.data.log())

    @staticmethod
    def sqrt(x: Value) -> Value:
        return Value(x.data.sqrt())
