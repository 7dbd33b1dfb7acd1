"""Triton's interpreter in less than half the time, to the same bits.

Little of its time goes into what it computes, most into what it repeats: at each launch, at each call of a device
function, at every single operation.
"""

from __future__ import annotations

import math
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quick() -> None:
    """Once, in a process where Triton's functions are interpreted."""
    _prepare_once_per_launch()
    _remember_numpy_dtypes()
    _remember_shapes()
    # To see whether integers overflow takes as many operations again, in 64 bits, and more. None here is large.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _prepare_once_per_launch() -> None:
    """The interpreter replaces the functions of `tl` at each launch, and again at each call of a device function.

    But those of one module share one `tl`: once per launch and module is enough.
    """
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[int] = set()

    def prepare_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in prepared:
            return None  # what would be undone after the launch: the first one does it
        prepared.add(module)
        return prepare(function)

    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_anew


def _remember_numpy_dtypes() -> None:
    """The interpreter looks each up in a table that it makes anew each time."""
    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        name = str(dtype)
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered


def _remember_shapes() -> None:
    """A shape is one of Triton's tuples (for a tensor, of Triton constants), made anew and compared at each operation.

    Here types of one shape share one tuple, so that two can be seen to be the same without looking inside.
    """
    of_types: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    init_type, broadcast = tl.block_type.__init__, TritonSemantic.broadcast_impl_value

    def init_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if sizes not in of_types:
            init_type(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = of_types[sizes]
        self.name = f"<{text}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in of_tensors:
            of_tensors[sizes] = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    def broadcast_unless_alike(self: Any, left: Any, right: Any) -> Any:
        if left.type.is_block() and right.type.is_block() and left.type.shape is right.type.shape:
            return left, right
        return broadcast(self, left, right)

    tl.block_type.__init__, tl.tensor.__init__ = init_type_once, init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_unless_alike
