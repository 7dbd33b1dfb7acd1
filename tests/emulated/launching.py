"""Takes a device's place: a kernel that is launched is compiled for an NVIDIA GPU and run by `machine` on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
from arithmetic import Array
from helpers import has_no_gaps
from machine import Launch
from memory import POISON, Mistake, Window
from ptx import WARP, Program, parse
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from dnc_triton.kernels import gradients, lstm, products, sequence, step_launch

HOPPER = GPUTarget("cuda", 90, WARP)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
PROGRAMS: dict[str, tuple[Program, int]] = {}  # what was compiled, and its bytes of shared memory


class Emulated:
    """Takes the place of a `triton.jit` function: `kernel[grid](...)` on tensors of the CPU.

    A mistake in it is an AssertionError that names the kernel, the line and what happened.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel, self.__name__ = kernel, kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launch(grid, *args, **kwargs)

    def launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        others = {param.name: kwargs.pop(param.name, param.default) for param in self.kernel.params[len(args) :]}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | others
        tensors = [x for x in given.values() if isinstance(x, Tensor)]
        assert all(map(has_no_gaps, tensors)), "an argument has gaps"
        # Each gets memory of its own; what overlaps, as the features before and after each step do, is only to be read.
        only_read = [as_integers(x) for x in tensors if sum(overlap(x, y) for y in tensors) > 1]
        before = [x.copy() for x in only_read]
        program, shared = self.compile(given, kwargs)
        arguments = [
            as_integers(x, reach(name, given)) if isinstance(x, Tensor) else x
            for name, x in self.variables(given).items()
        ]
        arguments += [0] * (len(program.params) - len(arguments))  # scratch of Triton's, which is not used
        run = Launch(program, arguments, shared, grid)
        try:
            for index in product(*map(range, grid)):
                run.block(index)
        except Mistake as mistake:
            raise AssertionError(f"{self.kernel.__name__}: {mistake}") from None
        run.finish()
        assert all(map(np.array_equal, only_read, before)), "arguments overlap, and are written to"

    def variables(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments that are known only at the launch."""
        constant = {name: param.is_constexpr for name, param in zip(given, self.kernel.params, strict=True)}
        return {name: value for name, value in given.items() if not constant[name] and value is not None}

    def compile(self, given: dict[str, Any], options: dict[str, Any]) -> tuple[Program, int]:
        """As Triton does for a device, which knows of pointers if they are aligned to 16 bytes; but without ptxas."""
        variables, signature, attributes = self.variables(given), {}, {}
        for position, name in enumerate(given):
            signature[name] = "constexpr" if name not in variables else "i32"
            if isinstance(value := variables.get(name), Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
                if value.data_ptr() % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                assert name not in variables or self.kernel.params[position].do_not_specialize, name
        constants = {name: value for name, value in given.items() if name not in variables}
        key = repr((id(self.kernel), signature, constants, attributes, options))
        if key not in PROGRAMS:
            # The variable is for the dispatcher alone. Without ptxas, which takes long, there is no machine code, and
            # the cache may be nobody else's: conftest.py sees to that.
            with patch.dict(os.environ), patch.object(CUDABackend, "make_cubin", lambda *_: b""):
                os.environ.pop("TRITON_INTERPRET", None)
                source = ASTSource(self.kernel, signature, constants, attributes)
                compiled = triton.compile(source, target=HOPPER, options=options)
            PROGRAMS[key] = parse(compiled.asm["ptx"]), compiled.metadata.shared
        return PROGRAMS[key]


def overlap(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() < y.data_ptr() + y.nbytes and y.data_ptr() < x.data_ptr() + x.nbytes


def reach(name: str, given: dict[str, Any]) -> tuple[int, int]:
    """How many earlier entries a kernel may read through a pointer, and how many numbers they are apart."""
    behind = given.get("behind", 0)
    if name == "marks_ptr":
        return behind, len(given[name])
    entries = {"precedence_ptr": behind, "write_weights_ptr": max(behind - 1, 0)}
    return entries.get(name, 0), given.get("row", 0) * 16 // given[name].element_size()


def as_integers(tensor: Tensor, earlier: tuple[int, int] = (0, 0)) -> Array | Window:
    """The same memory; with what lies before it, where a kernel may read that."""
    flat, (entries, row) = tensor.detach().as_strided((tensor.numel(),), (1,)), earlier
    before, size = entries * row, flat.element_size()
    whole = flat.as_strided((before + flat.numel(),), (1,), flat.storage_offset() - before)
    integers = whole.view(torch.uint8).numpy().view(UNSIGNED[size])
    if not before:
        return integers
    pieces = [(entry * row * size, (entry * row + flat.numel()) * size) for entry in range(entries + 1)]
    return Window(integers, before * size, pieces)


def poison(tensor: Tensor) -> Tensor:
    """Fill with what counts as not written."""
    if tensor.is_contiguous():
        tensor.detach().view(-1).view(torch.uint8).fill_(POISON)
    return tensor


class Poisoned(TorchFunctionMode):
    """Memory that was not written to holds poison."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return poison(result) if function in (torch.empty, torch.empty_like, Tensor.new_empty) else result


@contextmanager
def emulating() -> Iterator[None]:
    """The project's kernels, launched within, run in the emulator."""
    with pytest.MonkeyPatch.context() as patched, Poisoned():
        for module in (gradients, lstm, products, sequence, step_launch):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patched.setattr(module, name, Emulated(kernel))
        yield
