"""The check for barriers, on kernels with a race planted, which compile in another process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.static import barriers  # noqa: E402
from benchmarks.static.cases import TARGETS  # noqa: E402
from benchmarks.static.compiling import compiling_map  # noqa: E402
from benchmarks.static.ttgir import Unchecked  # noqa: E402

pytestmark = pytest.mark.usefixtures("_compiled_once")

# --- planted races ----------------------------------------------------------------------------------------------------


@triton.jit
def reversing(data_ptr, out_ptr, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    here = tl.arange(0, SIZE)
    tl.store(data_ptr + here, tl.load(out_ptr + here) + 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + SIZE - 1 - here))


@triton.jit
def reversing_again_and_again(data_ptr, out_ptr, BARRIER_BEFORE: tl.constexpr, BARRIER_AFTER: tl.constexpr):
    here = tl.arange(0, 256)
    for _ in range(5):
        value = tl.load(data_ptr + 255 - here)
        if BARRIER_BEFORE:
            tl.debug_barrier()
        tl.store(data_ptr + here, value)
        if BARRIER_AFTER:
            tl.debug_barrier()


@triton.jit
def reversing_in_a_branch(data_ptr, out_ptr, index_ptr, COUNT: tl.constexpr, BARRIER: tl.constexpr):
    """COUNT 0: the barrier is in a branch that data decide on."""
    here = tl.arange(0, 256)
    tl.store(data_ptr + here, tl.load(out_ptr + here) + 1.0)
    if COUNT == 0:
        if tl.load(index_ptr) > 0:
            tl.debug_barrier()
    else:
        for i in range(COUNT):
            if i == BARRIER:
                tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + 255 - here))


@triton.jit
def in_place(data_ptr, out_ptr, SIZE: tl.constexpr, SUM: tl.constexpr):
    """A thread loads what it stored itself, unless there are more threads than elements and all load."""
    here = tl.arange(0, SIZE)
    tl.store(data_ptr + here, tl.load(out_ptr + here) + 1.0)
    value = tl.load(data_ptr + here) * 2.0
    if SUM:
        value += tl.sum(value)
    tl.store(out_ptr + here, value)


@triton.jit
def other_layout(data_ptr, out_ptr):
    """A thread stores two numbers in a row, and loads four."""
    rows, columns = tl.arange(0, 512), tl.arange(0, 2)
    tl.store(data_ptr + rows[:, None] * 2 + columns[None, :], tl.zeros([512, 2], tl.float32))
    here = tl.arange(0, 1024)
    tl.store(out_ptr + here, tl.load(data_ptr + here))


@triton.jit
def parts(data_ptr, out_ptr, N: tl.constexpr, MASKED: tl.constexpr):
    """The buffer's first N numbers are stored, the next N loaded; without the mask they overlap."""
    here = tl.arange(0, 256)
    mask = here < (N if MASKED else 256)
    tl.store(data_ptr + here, tl.load(out_ptr + here, mask=mask, other=0.0) + 1.0, mask=mask)
    tl.store(out_ptr + here, tl.load(data_ptr + N + here, mask=mask, other=0.0), mask=mask)


@triton.jit
def scattering(data_ptr, out_ptr, index_ptr, BARRIER: tl.constexpr):
    here = tl.arange(0, 256)
    tl.store(data_ptr + tl.load(index_ptr + here), tl.load(out_ptr + here))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + here))


@triton.jit
def squeezing(data_ptr, out_ptr):
    here = tl.arange(0, 256)
    tl.store(data_ptr + here // 2, tl.load(out_ptr + here))


@triton.jit
def as_told(data_ptr, out_ptr, index_ptr, LAST: tl.constexpr):
    """As often as the index's first number says, stores entry i; loads it where the next ones say so, until LAST."""
    here = tl.arange(0, 256)
    for i in range(tl.load(index_ptr)):
        told = tl.load(index_ptr + 1 + i, mask=i <= LAST, other=0) != 0
        tl.store(data_ptr + i * 256 + here, tl.load(out_ptr + here))
        entry = tl.where(told, i, 9)
        tl.store(out_ptr + here, tl.load(data_ptr + entry * 256 + 255 - here))


@triton.jit
def changing_what_is_known(index_ptr):
    tl.store(index_ptr, tl.load(index_ptr) + 1)


@triton.jit
def prefetching(data_ptr, out_ptr, NEXT: tl.constexpr):
    """The loads of this loop are moved to earlier iterations, before the stores."""
    here = tl.arange(0, 32)
    tile = here[:, None] * 32 + here[None, :]
    weights = tl.load(out_ptr + tile)
    total = tl.zeros([32, 32], tl.float32)
    for i in range(6):
        total = tl.dot(tl.load(data_ptr + i * 1024 + tile), weights, total, input_precision="ieee")
        tl.store(data_ptr + (i + NEXT) * 1024 + tile, total)


@triton.jit
def beyond_its_own(data_ptr, out_ptr, SIZE: tl.constexpr):
    """Each program has 256 numbers, and stores SIZE."""
    here = tl.program_id(0) * 256 + tl.arange(0, SIZE)
    tl.store(data_ptr + here, tl.load(out_ptr + here))


@triton.jit
def looking_ahead(data_ptr, out_ptr, BY: tl.constexpr):
    """Each program stores 256 numbers, and loads those that lie so many further on."""
    here = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(data_ptr + here, tl.load(data_ptr + here + BY))


@triton.jit
def looking_back(data_ptr, out_ptr):
    here = tl.arange(0, 256)
    tl.store(out_ptr + here, tl.load(data_ptr + here - 64))


@triton.jit
def counting(data_ptr, out_ptr):
    tl.atomic_add(data_ptr + tl.arange(0, 256), 1.0)


class Planted(NamedTuple):
    kernel: str
    constants: dict[str, int]
    finds: str | None  # part of what is to be found; None if the kernel is right
    target: str = "sm_90"
    index: list[int] | None = None  # what is in index_ptr, if that is known
    before: int = 0  # how many numbers lie before the one that data_ptr points to


PLANTED = {
    "no barrier": Planted("reversing", dict(SIZE=256, BARRIER=0), "loads from data_ptr"),
    "no barrier, gfx942": Planted("reversing", dict(SIZE=512, BARRIER=0), "loads from data_ptr", "gfx942"),
    "barrier": Planted("reversing", dict(SIZE=256, BARRIER=1), None),
    "barrier, gfx942": Planted("reversing", dict(SIZE=512, BARRIER=1), None, "gfx942"),
    "loop, no barrier between load and store": Planted(
        "reversing_again_and_again", dict(BARRIER_BEFORE=0, BARRIER_AFTER=1), "stores to data_ptr"
    ),
    "loop, no barrier before the next iteration": Planted(
        "reversing_again_and_again", dict(BARRIER_BEFORE=1, BARRIER_AFTER=0), "loads from data_ptr"
    ),
    "loop, both barriers": Planted("reversing_again_and_again", dict(BARRIER_BEFORE=1, BARRIER_AFTER=1), None),
    "barrier perhaps": Planted("reversing_in_a_branch", dict(COUNT=0, BARRIER=0), "loads from data_ptr"),
    "barrier in the last iteration": Planted("reversing_in_a_branch", dict(COUNT=3, BARRIER=2), None),
    "barrier in no iteration": Planted("reversing_in_a_branch", dict(COUNT=3, BARRIER=3), "loads from data_ptr"),
    "same thread": Planted("in_place", dict(SIZE=128, SUM=1), None),
    "other threads too": Planted("in_place", dict(SIZE=64, SUM=1), "loads from data_ptr"),
    "other threads too, which store nothing": Planted("in_place", dict(SIZE=64, SUM=0), None),
    "other layout": Planted("other_layout", {}, "loads from data_ptr"),
    "other part": Planted("parts", dict(N=100, MASKED=1), None),
    "other part without mask": Planted("parts", dict(N=100, MASKED=0), "loads from data_ptr"),
    "place from data": Planted("scattering", dict(BARRIER=0), "loads from data_ptr"),
    "place from data, barrier": Planted("scattering", dict(BARRIER=1), None),
    "two threads, one place": Planted("squeezing", {}, "from several threads"),
    "told once too often": Planted("as_told", dict(LAST=9), "loads from data_ptr", index=[3, 0, 0, 1]),
    "told in time": Planted("as_told", dict(LAST=9), None, index=[2, 0, 0, 1]),
    "told beyond the mask": Planted("as_told", dict(LAST=1), None, index=[3, 0, 0, 1]),
    "told who knows what": Planted("as_told", dict(LAST=9), "cannot be checked: the bounds of the loop"),
    "told otherwise meanwhile": Planted(
        "changing_what_is_known", {}, "stores to index_ptr, whose contents are given", index=[1]
    ),
    "loaded too early": Planted("prefetching", dict(NEXT=1), "data_ptr"),
    "loaded early": Planted("prefetching", dict(NEXT=6), None),
    "programs apart": Planted("beyond_its_own", dict(SIZE=256), None),
    "programs that overlap": Planted("beyond_its_own", dict(SIZE=512), "in program (1,)"),
    "programs that load what another stores": Planted("looking_ahead", dict(BY=256), "loads in program (0,)"),
    "programs that load their own": Planted("looking_ahead", dict(BY=0), None),
    "back too far": Planted("looking_back", {}, "touches what lies before data_ptr", before=63),
    "back": Planted("looking_back", {}, None, before=64),
    "atomic": Planted("counting", {}, "cannot be checked: tt.atomic_rmw"),
}


def find_races(name):
    """Compile a planted kernel and check it, in another process."""
    planted = PLANTED[name]
    kernel = globals()[planted.kernel]
    arguments = {
        argument: "constexpr" if argument in planted.constants else "*i32" if argument == "index_ptr" else "*fp32"
        for argument in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind != "constexpr"}
    source = ASTSource(kernel, arguments, planted.constants, aligned)
    compiled = triton.compile(source, target=TARGETS[planted.target], options={"num_warps": 4})
    grid = (2,) if planted.kernel in ("beyond_its_own", "looking_ahead") else (1,)
    known = {"data_ptr": planted.before} | ({} if planted.index is None else {"index_ptr": planted.index})
    try:
        return barriers.races(compiled.asm["ttgir"], grid, known)
    except Unchecked as reason:
        return [f"cannot be checked: {reason}"]


@pytest.fixture(scope="module")
def races():
    """Kernels compile in the other process even if they are interpreted in this one, and this one stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        found = dict(zip(PLANTED, compiling_map(find_races, PLANTED, jobs=1), strict=True))
        assert os.environ["TRITON_INTERPRET"] == "1"
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_planted_races_are_found_and_nothing_else(races, name):
    expected = PLANTED[name].finds
    if expected is None:
        assert races[name] == []
    else:
        assert races[name], "nothing found"
        assert all(expected in race for race in races[name]), races[name]


def test_a_race_is_told_by_its_lines(races):
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (race,) = races["no barrier"]
    loading, storing = (lines[int(number) - 1] for number in re.findall(r"test_static_barriers\.py:(\d+)", race))
    assert "tl.load(data_ptr" in loading
    assert "tl.store(data_ptr" in storing
