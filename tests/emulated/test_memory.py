"""The emulator's checks themselves, one access at a time: what they let off is as little as machine.py says."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from arithmetic import fma
from launching import Emulated, as_integers, reach
from machine import Launch
from memory import POISON, SHARED_BASE, Memory, Mistake, Window, allocate
from parity import Margins
from ptx import Instruction, parse
from test_ptx import N, reversing_kernel, run

pytestmark = pytest.mark.slow

HERE = Instruction("ld.shared.b32", [], "", "kernel.py:1")


class Words(Memory):
    """Sixteen words of 32 bits, of which all but the last were written before the first barrier."""

    def __init__(self) -> None:
        super().__init__("shared", SHARED_BASE, 64, 4)
        self.written[:15] = True
        self.epoch = 1

    def read(self, *words: int, threads: Any, count: int = 1) -> list[Any]:
        found = self.load(self.at(words), 4, count, np.array(threads), self.epoch, HERE)
        return found.ravel().tolist()

    def write(self, *words: int, threads: Any, values: Any) -> None:
        numbers = np.array(values, "u4").reshape(len(words), -1)
        self.store(self.at(words), numbers, np.array(threads), self.epoch, HERE)

    @staticmethod
    def at(words: tuple[int, ...]) -> Any:
        return SHARED_BASE + 4 * np.array(words, "i8")


@pytest.mark.parametrize(
    ("readers", "writer", "wrong"),
    [([5], 5, False), ([5], 6, True), ([5, 6], 5, True), ([5, 6], 6, True), ([5, 6], 7, True), ([6, 5], 5, True)],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_who_may_write_what_was_read(readers: list[int], writer: int, wrong: bool, at_once: bool) -> None:
    """Only a thread that alone has read it, until there is a barrier."""
    for barrier in (False, True):
        words = Words()
        for threads in [readers] if at_once else [[reader] for reader in readers]:
            words.read(*[3] * len(threads), threads=threads)
        words.epoch += barrier
        if wrong and not barrier:
            with pytest.raises(Mistake, match=r"race: kernel.py:1: .*that another thread read"):
                words.write(3, threads=[writer], values=[1])
        else:
            words.write(3, threads=[writer], values=[1])


def test_who_may_read_or_write_what_was_written() -> None:
    """Itself only; another one may write what is there already, even then."""
    words = Words()
    words.write(3, threads=[5], values=[1])
    assert words.read(3, threads=[5]) == [1]
    words.write(3, threads=[5], values=[2])
    words.write(3, threads=[6], values=[2])
    words = Words()
    words.write(3, threads=[5], values=[1])
    with pytest.raises(Mistake, match="that another thread wrote"):
        words.write(3, threads=[6], values=[2])
    with pytest.raises(Mistake, match="that another thread wrote"):
        words.read(2, threads=[6], count=2)  # of two words the second
    words.epoch += 1
    assert words.read(2, threads=[6], count=2)[1] == 1


def test_threads_that_write_to_one_place_at_once_are_let_off_in_one_warp_or_with_one_value() -> None:
    words = Words()
    words.write(3, 3, threads=[5, 6], values=[1, 2])
    words.write(4, 4, threads=[5, 37], values=[7, 7])
    with pytest.raises(Mistake, match="warps write different values"):
        words.write(6, 6, threads=[5, 37], values=[1, 2])
    with pytest.raises(Mistake, match="warps write different values"):
        words.write(7, 7, 7, threads=[5, 6, 37], values=[2, 1, 2])


def test_every_byte_of_an_access_is_looked_at() -> None:
    with pytest.raises(Mistake, match="uninitialised"):
        Words().read(14, threads=[0], count=2)
    for word, count in ((16, 1), (-1, 1), (-2, 2), (14, 4)):
        with pytest.raises(Mistake, match="outside of any shared buffer"):
            Words().read(word, threads=[0], count=count)
    words = Words()
    words.there[15] = False
    with pytest.raises(Mistake, match="outside of any shared buffer"):
        words.read(14, threads=[0], count=2)
    with pytest.raises(Mistake, match="not aligned to 8 bytes"):
        Words().read(1, threads=[0], count=2)
    words = Words()
    words.write(14, threads=[0], values=[[1, 2]])
    assert words.read(14, threads=[0], count=2) == [1, 2]


def test_buffers_lie_apart_and_hold_what_was_written() -> None:
    first, second = np.arange(3, dtype="u4"), np.full(5, 0xFFFFFFFF, "u4")
    second[1] = 0xFFFFFF00
    memory, (start, number, other), places = allocate([first, 7, Window(second, 8, [(4, 12)])], 4)
    assert number == 7
    assert [begin for begin, _ in places] == [start - memory.base]  # a window is not written to
    assert other - 4 - (start + 12) > 4096  # bytes
    there = np.flatnonzero(memory.there) * 4 + memory.base
    assert there.tolist() == [start, start + 4, start + 8, other - 4, other]
    assert memory.written[(there - memory.base) // 4].tolist() == [True] * 3 + [True, False]


# --- a whole block

FORGETTING = """
.visible .entry forgetting(
	.param .u64 forgetting_param_0
)
.reqntid 32
{
	.reg .pred %p<2>;
	.reg .b32 %r<6>;
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	shl.b32 %r3, %r1, 2;
	mov.b32 %r4, global_smem;
	add.s32 %r3, %r3, %r4;
	setp.ne.s32 %p1, %r2, 0;
	@%p1 bra $L_1;
	st.shared.b32 [ %r3 + 0 ], { %r1 };
$L_1:
	bar.sync 0;
	ld.shared.b32 { %r5 }, [ %r3 + 0 ];
	ret;
}
"""


def test_a_block_knows_nothing_of_the_shared_memory_of_the_one_before() -> None:
    launch = Launch(parse(FORGETTING), [np.zeros(1, "u4")], 128, (2,))
    launch.block((0,))
    with pytest.raises(Mistake, match=r"uninitialised: .*reads shared memory that nobody wrote"):
        launch.block((1,))


def test_a_block_and_the_next_do_not_race() -> None:
    launch = Launch(parse(FORGETTING.replace("@%p1 bra $L_1;", "")), [np.zeros(1, "u4")], 128, (2,))
    launch.block((0,))
    launch.block((1,))
    launch.finish()
    assert launch.places[0][1].tolist() == [0]


@pytest.mark.parametrize("operation", ["shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1", "redux.sync.add.s32 %r2, %r1, -1"])
@pytest.mark.parametrize("threads", [16, 32])
def test_what_a_warp_does_together_is_done_by_all_of_it(operation: str, threads: int) -> None:
    text = FORGETTING.replace("setp.ne.s32 %p1, %r2, 0;", f"setp.lt.u32 %p1, %r1, {threads};\n\t@%p1 {operation};")
    launch = Launch(parse(text.replace("@%p1 bra $L_1;", "")), [np.zeros(1, "u4")], 128)
    if threads == 32:
        launch.block((0,))
    else:
        with pytest.raises(Mistake, match=r"divergent: .*by a part of a warp"):
            launch.block((0,))


def test_a_shuffle_is_no_barrier() -> None:
    text = FORGETTING.replace("bar.sync 0;", "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;")
    text = text.replace("{ %r5 }, [ %r3 + 0 ]", "{ %r5 }, [ %r4 + 0 ]")
    with pytest.raises(Mistake, match=r"race: .*reads shared memory that another thread wrote"):
        Launch(parse(text), [np.zeros(1, "u4")], 128).block((0,))
    Launch(parse(text.replace("shfl", "bar.sync 0;\n\tshfl")), [np.zeros(1, "u4")], 128).block((0,))


# --- asynchronous copies

COPYING = """
.visible .entry copying(
	.param .u64 copying_param_0,
	.param .u64 copying_param_1
)
.reqntid 32
{
	.reg .b32 %r<8>;
	.reg .b64 %rd<6>;
	ld.param.b64 %rd1, [copying_param_0];
	ld.param.b64 %rd2, [copying_param_1];
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 2;
	mov.b32 %r3, global_smem;
	add.s32 %r4, %r3, %r2;
	xor.b32 %r5, %r2, 4;
	add.s32 %r5, %r5, %r3;
	mad.wide.u32 %rd3, %r1, 4, %rd1;
	mad.wide.u32 %rd4, %r1, 4, %rd2;
	mov.b32 %r6, 4;
	cp.async.ca.shared.global [ %r4 + 0 ], [ %rd3 + 0 ], 0x4, %r6;
	cp.async.commit_group;
	cp.async.wait_group 0;
	bar.sync 0;
	ld.shared.b32 { %r7 }, [ %r5 + 0 ];
	st.global.b32 [ %rd4 + 0 ], { %r7 };
	ret;
}
"""
COPY, COMMIT, WAIT, BARRIER = (f"\t{line}\n" for line in COPYING.splitlines()[20:24] for line in [line.strip()])


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        (COPY, COPY, None),
        (WAIT, "", "while it is copied to"),
        (WAIT, WAIT.replace("0", "1"), "while it is copied to"),  # for all but the last group
        (COMMIT, "", "while it is copied to"),  # a group that is still open
        (COMMIT, COMMIT + COPY.replace("%r4", "%r3") + COMMIT, "while it is copied to"),
        (COMMIT, COMMIT + COMMIT, None),
        (BARRIER, "", "that another thread wrote"),
        (WAIT + BARRIER, BARRIER + WAIT, "that another thread wrote"),
        (COPY, "\tld.shared.b32 { %r7 }, [ %r5 + 0 ];\n" + COPY, "that nobody wrote"),
        (COPY, "\tst.shared.b32 [ %r4 + 0 ], { %r1 };\n" + COPY, None),
        (COPY, "\tst.shared.b32 [ %r5 + 0 ], { %r1 };\n" + COPY, "that another thread wrote"),
        (COPY, COPY.replace("%rd3 + 0", "%rd3 + 256"), "outside of any global buffer"),
    ],
)
def test_what_is_copied_is_there_once_it_was_waited_for(old: str, new: str, mistake: str | None) -> None:
    assert COPYING.count(old) == 1
    source, out = np.arange(32, dtype="u4"), np.full(32, 0xFFFFFFFF, "u4")
    launch = Launch(parse(COPYING.replace(old, new)), [source, out], 128)
    if mistake:
        with pytest.raises(Mistake, match=mistake):
            launch.block((0,))
        return
    launch.block((0,))
    launch.finish()
    assert out.tolist() == (source ^ 1).tolist()


def test_what_a_mask_keeps_out_of_a_copy_is_zero() -> None:
    """And is not looked at."""
    text = COPYING.replace("mov.b32 %r6, 4", "mov.b32 %r6, 0").replace("%rd3 + 0", "%rd3 + 256")
    out = np.full(32, 0xFFFFFFFF, "u4")
    launch = Launch(parse(text), [np.arange(32, dtype="u4"), out], 128)
    launch.block((0,))
    launch.finish()
    assert not out.any()


@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_written_to_memory_that_two_arguments_are_is_there(swapped: bool) -> None:
    """Whichever of them comes last; else nobody would notice."""
    text = COPYING
    if swapped:
        text = text.replace("%rd1, [copying_param_0]", "%rd1, [copying_param_1]")
        text = text.replace("%rd2, [copying_param_1]", "%rd2, [copying_param_0]")
    both = np.arange(32, dtype="u4")
    launch = Launch(parse(text), [both, both], 128)
    launch.block((0,))
    launch.finish()
    assert both.tolist() == (np.arange(32) ^ 1).tolist()


# --- what surrounds a launch


def test_arguments_are_without_gaps_and_apart() -> None:
    x = torch.zeros(2 * N)
    for given, message in (((x[::2], x[:N]), "has gaps"), ((x, x[N:]), "overlap"), ((x, x), "overlap")):
        with pytest.raises(AssertionError, match=message):
            run(reversing_kernel, *given, N=N, BARRIER=True, BY=0)


def test_what_is_not_written_is_poison() -> None:
    x = torch.zeros(3, 2)
    around = Margins()
    places = [around.place((2, 3), dtype, x.device) for dtype in (torch.float32, torch.bfloat16, torch.int64)]
    for tensor in (torch.empty(5), torch.empty_like(x), x.new_empty(4), *places, *sum(around.buffers, ())):
        assert (as_integers(tensor).view("u1") == POISON).all()


def test_every_kernel_is_emulated() -> None:
    """Where it is launched from."""
    found = {
        (name, isinstance(kernel, Emulated))
        for module, contents in ((name, vars(module)) for name, module in sys.modules.items() if module is not None)
        if module.startswith("dnc_triton.") and module != "dnc_triton.kernels.step"
        for name, kernel in contents.items()
        if name.endswith("_kernel") and hasattr(kernel, "__getitem__")
    }
    assert [name for name, emulated in sorted(found) if not emulated] == []
    assert len(found) == 10


def test_how_far_back_a_kernel_may_read() -> None:
    """Where links are made again, from the entries of the steps before; elsewhere not at all."""
    given = {"behind": 2, "row": 12, "marks_ptr": torch.zeros(6), "precedence_ptr": torch.zeros(8, dtype=torch.float64)}
    given |= {"write_weights_ptr": torch.zeros(8), "memory_ptr": torch.zeros(8)}
    expected = {"marks_ptr": (2, 6), "precedence_ptr": (2, 24), "write_weights_ptr": (1, 48), "memory_ptr": (0, 48)}
    assert {name: reach(name, given) for name in expected} == expected
    assert reach("precedence_ptr", {"precedence_ptr": torch.zeros(8)}) == (0, 0)
    whole = torch.arange(40, dtype=torch.float32)
    window = as_integers(whole[24:28], (2, 10))
    assert isinstance(window, Window)
    assert (window.at, window.pieces) == (80, [(0, 16), (40, 56), (80, 96)])


def test_a_product_and_a_sum_are_rounded_once() -> None:
    for dtype, small in (("f4", 2.0**-12), ("f8", 2.0**-27)):
        x = np.array([1 + small, 3.0], dtype)
        exact = np.array([small**2, 2.0], dtype)
        assert (fma(x, x, np.array([-1 - 2 * small, -7.0], dtype)) == exact).all()
        assert (x * x - np.array([1 + 2 * small, 7.0], dtype) != exact)[0]
