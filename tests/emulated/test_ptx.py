"""The emulator itself, on kernels whose results, or mistakes, are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from arithmetic import Unsupported
from helpers import assert_close, assert_same_bits
from launching import Emulated, poison
from machine import Launch
from memory import Mistake
from ptx import meeting_points, parse
from torch import Tensor

from dnc_triton.kernels.launcher import FMA

pytestmark = pytest.mark.slow

N = 256


def run(kernel: Any, *args: Any, grid: tuple[int, ...] = (1,), warps: int = 4, **constants: Any) -> None:
    Emulated(kernel)[grid](*args, **constants, num_warps=warps, **FMA)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return poison(torch.zeros(*shape, dtype=dtype))


@triton.jit(do_not_specialize=["n"])
def elementwise_kernel(x_ptr, y_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, tl.exp(x) / (1 + y * y) - tl.sqrt(tl.abs(y)), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elementwise(dtype: torch.dtype) -> None:
    x, y, out = torch.randn(400).to(dtype), torch.randn(400).to(dtype), unwritten(512)
    run(elementwise_kernel, x, y, out, 400, grid=(2,), N=N)
    expected = x.double().exp() / (1 + y.double() ** 2) - y.double().abs().sqrt()
    assert_close(out[:400].double(), expected, rtol=1e-6, atol=1e-6, name="out")
    assert out[400:].isnan().all()


@triton.jit
def extremes_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, y))
    tl.store(out_ptr + N + i, tl.minimum(x, y))
    tl.store(out_ptr + 2 * N, tl.max(x, 0))
    tl.store(out_ptr + 2 * N + 1, tl.sum(x, 0))


def test_a_nan_is_lost_in_a_maximum_and_not_in_a_sum() -> None:
    x, y, out = torch.randn(N), torch.randn(N), unwritten(2 * N + 2)
    x[3], y[5], x[7], y[7] = torch.nan, torch.nan, torch.nan, torch.nan
    x[9], y[9], x[10], y[10] = 0.0, -0.0, -0.0, 0.0
    run(extremes_kernel, x, y, out, N=N)
    for got, expected in ((out[:N], torch.fmax(x, y)), (out[N : 2 * N], torch.fmin(x, y))):
        assert torch.equal(got.nan_to_num(77), expected.nan_to_num(77))
    assert [str(v) for v in out[[9, 10, N + 9, N + 10]].tolist()] == ["0.0", "0.0", "-0.0", "-0.0"]
    assert out[2 * N] == x.nan_to_num(-99).max()
    assert out[2 * N + 1].isnan()


@triton.jit
def scans_kernel(x_ptr, keys_ptr, out_ptr, sorted_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.cumprod(tl.load(x_ptr + i), 0))
    tl.store(sorted_ptr + i, tl.sort(tl.load(keys_ptr + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cumprod_and_sort(dtype: torch.dtype) -> None:
    x, keys = 1 + 0.05 * torch.randn(64, dtype=dtype), torch.randint(-(2**40), 2**40, (64,))
    out, in_order = unwritten(64, dtype=dtype), unwritten(64, dtype=torch.int64)
    run(scans_kernel, x, keys, out, in_order, N=64)
    assert_close(out, x.double().cumprod(0).to(dtype), rtol=64 * torch.finfo(dtype).eps, atol=0, name="cumprod")
    assert_same_bits(in_order, keys.sort().values)


@triton.jit
def reversing_kernel(data_ptr, out_ptr, N: tl.constexpr, BARRIER: tl.constexpr, BY: tl.constexpr):
    here = tl.arange(0, N)
    tl.store(data_ptr + here, tl.load(out_ptr + here + BY) + 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + N - 1 - here))


def test_a_race() -> None:
    numbers = torch.randn(N)
    with pytest.raises(
        AssertionError, match=r"reversing_kernel: race: test_ptx.py:\d+: ld.global.*another thread wrote"
    ):
        run(reversing_kernel, unwritten(N), numbers.clone(), N=N, BARRIER=False, BY=0)
    out = numbers.clone()
    run(reversing_kernel, unwritten(N), out, N=N, BARRIER=True, BY=0)
    assert_same_bits(out, (numbers + 1).flip(0))


@triton.jit
def writing_kernel(data_ptr, out_ptr, N: tl.constexpr, FIRST: tl.constexpr, BARRIER: tl.constexpr, TO: tl.constexpr):
    here = tl.arange(0, N)
    numbers = tl.load(out_ptr + here)
    if FIRST == "read":
        tl.store(out_ptr + here, tl.load(data_ptr + N - 1 - here))
    if FIRST == "wrote":
        tl.store(data_ptr + N - 1 - here, numbers + 1.0)
    if BARRIER:
        tl.debug_barrier()
    if TO == "one":
        tl.store(data_ptr + here * 0, numbers)
    elif TO == "askew":
        tl.store((data_ptr.to(tl.pointer_type(tl.int8)) + 2 + 4 * here).to(tl.pointer_type(tl.float32)), numbers)
    else:
        tl.store(data_ptr + here, numbers)


@pytest.mark.parametrize("first", ["read", "wrote"])
def test_a_race_of_what_is_written(first: str) -> None:
    data, numbers = torch.randn(N), torch.randn(N)
    with pytest.raises(AssertionError, match=rf"race: test_ptx.py:\d+: st.global.*that another thread {first}"):
        run(writing_kernel, data.clone(), numbers.clone(), N=N, FIRST=first, BARRIER=False, TO="each")
    written = data.clone()
    run(writing_kernel, written, numbers.clone(), N=N, FIRST=first, BARRIER=True, TO="each")
    assert_same_bits(written, numbers)


def test_warps_that_disagree() -> None:
    data = torch.randn(N)
    with pytest.raises(AssertionError, match=r"race: test_ptx.py:\d+: st.global.*different values to one place"):
        run(writing_kernel, data, torch.randn(N), N=N, FIRST="", BARRIER=False, TO="one")
    run(writing_kernel, data, torch.full((N,), 3.0), N=N, FIRST="", BARRIER=False, TO="one")
    assert data[0] == 3


def test_misaligned() -> None:
    with pytest.raises(AssertionError, match=r"outside: test_ptx.py:\d+: st.global.*not aligned to 4 bytes"):
        run(writing_kernel, torch.randn(N + 1), torch.randn(N), N=N, FIRST="", BARRIER=False, TO="askew")


@pytest.mark.parametrize("by", [-4, 4])
def test_out_of_bounds(by: int) -> None:
    with pytest.raises(AssertionError, match=r"outside: test_ptx.py:\d+: ld.global.*outside of any global buffer"):
        run(reversing_kernel, unwritten(N), torch.randn(N), N=N, BARRIER=True, BY=by)


def test_uninitialised() -> None:
    numbers = torch.randn(N)
    poison(numbers[17:18])
    with pytest.raises(AssertionError, match=r"uninitialised: test_ptx.py:\d+: ld.global"):
        run(reversing_kernel, unwritten(N), numbers, N=N, BARRIER=True, BY=0)


def test_an_instruction_that_is_not_emulated() -> None:
    with pytest.raises(Unsupported, match=r"test_ptx.py:\d+: cvt.rzi.s32.f32"):
        run(elementwise_kernel, torch.randn(N), torch.randn(N), unwritten(N, dtype=torch.int32), N, N=N)


# A kernel whose blocks do not stand in the order in which they are run: threads from 32 on come to 1 by way of 2.
PARTING = """
.visible .entry parting(
	.param .u64 parting_param_0
)
.reqntid 64
{
	.reg .pred %p<2>;
	.reg .b32 %r<3>;
	.reg .b64 %rd<4>;
	ld.param.b64 %rd1, [parting_param_0];
	mov.u32 %r1, %tid.x;
	setp.lt.u32 %p1, %r1, 32;
	mov.b32 %r2, 7;
	@%p1 bra $L_1;
	bra.uni $L_2;
$L_1:
	bar.sync 0;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [ %rd3 + 0 ], { %r2 };
	ret;
$L_2:
	mov.b32 %r2, 8;
	bra.uni $L_1;
}
"""


def test_threads_that_part_meet_before_a_barrier_wherever_it_stands() -> None:
    out = np.zeros(64, np.uint32)
    launch = Launch(parse(PARTING), [out], 0)
    launch.block((0,))
    launch.finish()
    assert out.tolist() == [7] * 32 + [8] * 32
    program = parse(PARTING)
    assert meeting_points(program)[4] == program.labels["$L_1"]


def test_a_barrier_that_a_part_of_the_threads_reaches() -> None:
    wrong = PARTING.replace("mov.b32 %r2, 8;", "bar.sync 0;")
    with pytest.raises(Mistake, match=r"divergent: .*bar.sync 0: by 32 of 64 threads"):
        Launch(parse(wrong), [np.zeros(64, np.uint32)], 0).block((0,))
