"""The small functions that the kernels share, by themselves."""

from __future__ import annotations

import mmap
import re
from importlib import import_module

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from dnc_reference.interface import interface_sizes
from dnc_reference.types import MemoryState
from dnc_triton.kernels import step
from dnc_triton.kernels.common import exp, sigmoid, softplus, tanh
from dnc_triton.kernels.layout import Layout, default_layout, kept_shapes
from dnc_triton.kernels.step_launch import StepGradient, backward_scratch, launch_backward, step_forward

FUNCTIONS = {"exp": torch.exp, "sigmoid": torch.sigmoid, "softplus": torch.nn.functional.softplus, "tanh": torch.tanh}
BLOCK = 1024
MAP_NORESERVE = 0x4000  # of Linux, which Python names from 3.13 on


def function_kernel(x_ptr, out_ptr, size, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    if NAME == "exp":
        y = exp(x)
    elif NAME == "sigmoid":
        y = sigmoid(x)
    elif NAME == "softplus":
        y = softplus(x)
    else:
        y = tanh(x)
    tl.store(out_ptr + i, y, mask=i < size)


def masked_kernel(x_ptr, out_ptr, count):
    i = tl.arange(0, 4)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=(i < 3) & (tl.program_id(0) < count), other=-1.0))


def bounds_kernel(x_ptr, out_ptr):
    i = tl.arange(0, 2)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, 1.0))
    tl.store(out_ptr + 2 + i, tl.minimum(2.0, x))


def run(name: str, x: Tensor) -> Tensor:
    """Whether the kernel is interpreted is decided here, in a test, as for the functions it calls."""
    out = torch.full_like(x, torch.nan)
    triton.jit(function_kernel)[(triton.cdiv(len(x), BLOCK),)](x, out, len(x), NAME=name, BLOCK=BLOCK)
    return out


def test_a_nan_is_lost_in_a_maximum_and_a_minimum(device: torch.device) -> None:
    """In the interpreter as on a device: otherwise it would not show that a kernel loses one."""
    out = torch.zeros(4, device=device)
    triton.jit(bounds_kernel)[(1,)](torch.tensor([torch.nan, 3.0], device=device), out)
    assert out.tolist() == [1, 3, 2, 2]


def test_the_table_of_equations_names_functions_that_are_there():
    """At the top of `step`, each behind its module's name, or behind another function of that module."""
    table = step.__doc__.partition("    equation ")[2]
    assert "update_usage" in table
    for names in re.findall(r"[a-z]+\.[a-z_]+(?:, \.[a-z_]+)*", table):
        module, *functions = re.split(r", \.|\.", names)
        for function in functions:
            assert callable(getattr(import_module(f"dnc_triton.kernels.{module}"), function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """A few units in the last place, however large or small the argument: the error is relative."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 1.9, 4000, dtype=torch.float64)  # up to 79: e⁻ˣ is no subnormal
    x = (size * (torch.randint(0, 2, size.shape, generator=generator) * 2 - 1)).to(dtype)
    if name == "softplus":
        exact = torch.logaddexp(x.double(), torch.zeros_like(x, dtype=torch.float64))
    else:
        exact = FUNCTIONS[name](x.double())
    error = (run(name, x.to(device)).cpu().double() - exact).abs() / exact.abs()
    assert error.max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_there_is_no_number(name: str, device: torch.device) -> None:
    x = torch.tensor([-torch.inf, -200.0, -0.0, 0.0, 200.0, torch.inf, torch.nan], device=device)
    torch.testing.assert_close(run(name, x), FUNCTIONS[name](x), equal_nan=True, rtol=1e-6, atol=0.0)
    assert run(name, torch.tensor([88.37], device=device)).isfinite().all()


@pytest.mark.parametrize(("count", "expected"), [(1, [1.0, 2.0, 3.0, -1.0]), (0, [-1.0] * 4)])
def test_a_mask_of_what_holds_for_all_of_a_block(count: int, expected: list[float], monkeypatch) -> None:
    """Interpreted, it is a mask of booleans: from 3.9 on Triton takes no other."""
    load, masks = InterpreterBuilder.create_masked_load, []

    def load_and_look(self, pointers, mask, *others):
        masks.append(mask.data.dtype)
        return load(self, pointers, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load_and_look)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = torch.full_like(x, torch.nan)
    triton.jit(masked_kernel)[(1,)](x, out, count)
    assert out.tolist() == expected
    assert masks == [bool]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ranks_are_the_order_of_a_sort(dtype: torch.dtype, device: torch.device) -> None:
    """Of many that are equal, even far apart, the lower slot comes first; and NaN before all others."""
    slots = 300
    levels = torch.randint(0, 5, (1, slots), generator=torch.Generator().manual_seed(0)) / 4
    levels[0, [3, 140, 299]] = torch.nan
    shapes = MemoryState.shapes(1, slots, 2, 1)
    state = MemoryState(**{name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})
    state = state._replace(usage=levels.to(device, dtype))
    interface = torch.zeros(1, sum(interface_sizes(1, 1, 2).values()), dtype=dtype, device=device)
    # Large tiles save the interpreter time; a device has no room for them.
    layout = Layout(False, 256, 256, 4) if device.type == "cpu" else default_layout(slots)
    options = dict(num_reads=1, raw=True, strength_offset=1.0)
    lists = [
        step_forward(interface, tuple(state), **options, layout=layout._replace(ranks=ranks)).free_list
        for ranks in (False, True)
    ]
    assert torch.equal(*lists)
    expected = levels.nan_to_num(-1.0).sort(stable=True).indices
    assert torch.equal(lists[0].cpu().long(), expected)


def test_what_lies_far_behind() -> None:
    """The link of three steps before, made again from entries that are more than 2³¹ numbers away."""
    close, far = (_gradient_of_a_step(row) for row in (64, 2**31 // 3 // 64 * 64 + 64))
    for expected, actual in zip(close, far, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(actual, expected)


def _gradient_of_a_step(row: int) -> StepGradient:
    """With the link three steps behind, and `row` numbers between the entries of one step and the next."""
    slots, word, behind, layout = 16, 4, 3, Layout(False, 8, 16, 1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) / slots

    # Address space, backed by memory only where it is written to.
    addresses = mmap.mmap(-1, 4 * row * (behind + 2), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    entries = torch.frombuffer(addresses, dtype=torch.float32).unflatten(0, (behind + 2, row))
    entries[:, : 2 * slots] = draw(behind + 2, 2 * slots)
    precedence, write_weights = (entries[:, None, None, i * slots : (i + 1) * slots].unbind(0) for i in range(2))
    memory, usage, link, read_weights = (
        draw(1, slots, word),
        draw(1, slots),
        draw(1, 1, slots, slots),
        draw(1, 1, slots),
    )
    state = memory, usage, link, precedence[behind], read_weights, write_weights[behind]
    kept, free_list = draw(*kept_shapes(1, slots, 1)[0]), torch.arange(slots, dtype=torch.int32).unsqueeze(0)
    result = draw(1, slots, word), draw(1, slots), draw(1, 1, slots), write_weights[behind + 1], kept, free_list
    vector, gradients = (
        draw(1, sum(interface_sizes(1, 1, word).values())),
        (draw(1, 1, word), *(draw(*x.shape) for x in state)),
    )
    gradient = StepGradient(*(torch.full(x.shape, torch.nan) for x in (vector, *state)))
    launch_backward(
        vector, state, result, gradients, gradient, backward_scratch(memory, 1, layout),
        raw=True, strength_offset=1.0, stop_usage_gradient=False, layout=layout, behind=behind, row=row,
    )  # fmt: skip
    return gradient
