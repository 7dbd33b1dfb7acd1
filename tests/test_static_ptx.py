"""The checks of PTX, for sums that differ between threads and for early accesses, on kernels made for them."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.language.extra.cuda import gdc_wait  # noqa: E402

from benchmarks.static.cases import TARGETS, sequence, step  # noqa: E402
from benchmarks.static.compiling import compile_case, compiling_map  # noqa: E402
from benchmarks.static.ptx import early_accesses, uneven_sums  # noqa: E402
from dnc_triton.kernels.launcher import FMA  # noqa: E402
from dnc_triton.kernels.layout import sequence_layouts  # noqa: E402

pytestmark = pytest.mark.usefixtures("_compiled_once")


@triton.jit
def adding_up(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, HOW: tl.constexpr):
    """In one warp, so that 32 numbers are one for each thread."""
    here = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + here), tl.load(y_ptr + here)
    if HOW == "product":
        z = x * y
    elif HOW == "rounded":
        z = tl.fma(x, y, 0.0)
    else:
        z = x + y
    tl.store(out_ptr + here, tl.sum(z) * x)


@triton.jit
def running_up(x_ptr, y_ptr, out_ptr):
    """Of rounded products: each thread adds its own to what comes from the one before."""
    here = tl.arange(0, 32)
    tl.store(out_ptr + here, tl.cumsum(tl.fma(tl.load(x_ptr + here), tl.load(y_ptr + here), 0.0), 0))


@triton.jit
def waiting(x_ptr, y_ptr, out_ptr, HOW: tl.constexpr):
    """Waits for the launch before it, in time or not."""
    here = tl.arange(0, 32)
    if HOW == "first":
        gdc_wait()
    x = tl.load(x_ptr + here)
    if HOW == "between":
        gdc_wait()
    y = tl.load(y_ptr + here)
    if HOW == "before the store":
        gdc_wait()
    tl.store(out_ptr + here, x + y)


CASES = {  # kernel, constants, dtype; whether it is found
    "product": ("adding_up", dict(SIZE=32, HOW="product"), "fp32", True),
    "product, float64": ("adding_up", dict(SIZE=32, HOW="product"), "fp64", True),
    "fewer than threads": ("adding_up", dict(SIZE=8, HOW="product"), "fp32", True),
    "rounded": ("adding_up", dict(SIZE=32, HOW="rounded"), "fp32", False),
    "rounded, float64": ("adding_up", dict(SIZE=32, HOW="rounded"), "fp64", False),
    "no product": ("adding_up", dict(SIZE=32, HOW="sum"), "fp32", False),
    "several in a thread": ("adding_up", dict(SIZE=128, HOW="product"), "fp32", False),
    "running, rounded": ("running_up", {}, "fp32", False),
    "waits first": ("waiting", dict(HOW="first"), "fp32", False),
    "waits between loads": ("waiting", dict(HOW="between"), "fp32", True),
    "waits before it stores": ("waiting", dict(HOW="before the store"), "fp32", True),
    "never waits": ("waiting", dict(HOW="never"), "fp32", True),
}


def find(name):
    """Compile a kernel and check it, in another process."""
    kernel, constants, dtype, _ = CASES[name]
    function = globals()[kernel]
    arguments = {argument: "constexpr" if argument in constants else f"*{dtype}" for argument in function.arg_names}
    source = ASTSource(function, arguments, constants)
    check = early_accesses if kernel == "waiting" else uneven_sums
    return check(triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 1, **FMA}).asm["ptx"])


@pytest.fixture(scope="module")
def found():
    return dict(zip(CASES, compiling_map(find, CASES, jobs=1), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found_and_nothing_else(found, name):
    places = found[name]
    assert bool(places) == CASES[name][3]
    assert all(place.startswith("test_static_ptx.py:") for place in places)


def find_in_a_step(case):
    return uneven_sums(compile_case(case)[0]["ptx"])


@pytest.mark.slow  # compiles some of the longest kernels
def test_the_same_sum_in_every_thread_where_no_shape_on_record_is():
    """Of words of odd length a thread has a single number; with sixteen heads, those of a single slot."""
    cases = [case for case in step((65, 17, 1), "sm_90") if case.phase != "last"]
    cases += sequence((128, 64, 16), 16, "sm_90", layout=sequence_layouts(128, 64)[0])[:1]
    assert dict(zip(cases, compiling_map(find_in_a_step, cases), strict=True)) == {case: [] for case in cases}
