"""What the check for barriers knows of a kernel: integers, pointers, and which threads hold an element. No compiler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.static.ttgir import Unchecked, _parse_op, holders, parse, without_barriers
from benchmarks.static.values import VALUES, Pointer

# --- integers ---------------------------------------------------------------------------------------------------------


def value_of(line: str, *operands: Any) -> Any:
    """What an operation, given as it is printed, makes of operands."""
    op = _parse_op(line, {}, {})
    given = [np.array(operand) if isinstance(operand, (int, list)) else operand for operand in operands]
    return VALUES[op.name](op, *given)


@pytest.mark.parametrize(
    ("line", "operands", "expected"),
    [
        ("%0 = arith.constant -3 : i32", [], -3),
        ("%0 = arith.constant true", [], True),
        ("%0 = arith.constant dense<false> : tensor<2xi1, #blocked>", [], [False, False]),
        ("%0 = arith.constant dense<7> : tensor<1x2xi32, #blocked>", [], [[7, 7]]),
        ("%0 = tt.make_range {end = 6 : i32, start = 3 : i32} : tensor<3xi32, #blocked>", [], [3, 4, 5]),
        ("%0 = arith.addi %a, %b : i32", [7, -2], 5),
        ("%0 = arith.subi %a, %b : i32", [7, -2], 9),
        ("%0 = arith.muli %a, %b : i32", [7, -2], -14),
        ("%0 = arith.divsi %a, %b : i32", [-7, 2], -3),
        ("%0 = arith.remsi %a, %b : i32", [-7, 2], -1),
        ("%0 = arith.shli %a, %b : i32", [-3, 2], -12),
        ("%0 = arith.shrsi %a, %b : i32", [-7, 1], -4),
        ("%0 = arith.maxsi %a, %b : i32", [3, -4], 3),
        ("%0 = arith.minsi %a, %b : i32", [3, -4], -4),
        ("%0 = arith.andi %a, %b : i32", [6, 3], 2),
        ("%0 = arith.ori %a, %b : i32", [6, 3], 7),
        ("%0 = arith.xori %a, %b : i32", [6, 3], 5),
        ("%0 = arith.cmpi slt, %a, %b : i32", [-1, 2], True),
        ("%0 = arith.cmpi sge, %a, %b : i32", [-1, 2], False),
        ("%0 = arith.cmpi ult, %a, %b : i32", [1, 2], True),
        ("%0 = arith.cmpi ne, %a, %b : i32", [1, 2], True),
        ("%0 = arith.select %a, %b, %c : i1, i32", [True, 1, 2], 1),
        ("%0 = arith.select %a, %b, %c : tensor<2xi1>, tensor<2xi32>", [[True, False], [1, 2], [3, 4]], [1, 4]),
        ("%0 = arith.extsi %a : i1 to i32", [True], -1),
        ("%0 = arith.extui %a : i1 to i32", [True], 1),
        ("%0 = arith.extsi %a : i32 to i64", [-5], -5),
        ("%0 = arith.trunci %a : i32 to i1", [2], False),
        ("%0 = arith.trunci %a : tensor<2xi8> to tensor<2xi1>", [[4, 5]], [False, True]),
        ("%0 = arith.trunci %a : i64 to i32", [2], 2),
        ("%0 = tt.splat %a : i32 -> tensor<2xi32, #blocked>", [5], [5, 5]),
        ("%0 = tt.broadcast %a : tensor<2x1xi32> -> tensor<2x2xi32>", [[[1], [2]]], [[1, 1], [2, 2]]),
        ("%0 = tt.expand_dims %a {axis = 0 : i32} : tensor<2xi32> -> tensor<1x2xi32>", [[1, 2]], [[1, 2]]),
        ("%0 = tt.trans %a {order = array<i32: 1, 0>} : tensor<1x2xi32> -> tensor<2x1xi32>", [[[1, 2]]], [[1], [2]]),
    ],
)
def test_an_operation_on_integers(line, operands, expected):
    value = value_of(line, *operands)
    assert (value.tolist(), value.dtype == bool) == (expected, np.array(expected).dtype == bool)


@pytest.mark.parametrize(
    ("line", "operands"),
    [
        ("%0 = arith.constant 1.000000e+00 : f32", []),
        ("%0 = arith.constant dense<0.000000e+00> : tensor<4xf32, #blocked>", []),
        ("%0 = arith.addi %a, %b : i32", [1, None]),
        ("%0 = arith.cmpi slt, %a, %b : i32", [None, 1]),
        ("%0 = arith.cmpi ult, %a, %b : i32", [-1, 1]),  # which is a large number without its sign
        ("%0 = arith.select %a, %b, %c : i1, i32", [None, 1, 1]),
        ("%0 = arith.trunci %a : i32 to i1", [None]),
        ("%0 = tt.splat %a : i32 -> tensor<2xi32>", [None]),
        ("%0 = tt.addptr %a, %b : !tt.ptr<f32>, i32", [None, 1]),
    ],
)
def test_what_depends_on_something_unknown_is_unknown(line, operands):
    assert value_of(line, *operands) is None


def test_pointers_move_and_are_lost_with_what_is_added():
    here = Pointer("x_ptr", np.array(3))
    add, select = "%0 = tt.addptr %a, %b : !tt.ptr<f32>, i32", "%0 = arith.select %a, %b, %c : i1, !tt.ptr<f32>"
    moved = value_of(add, here, 4)
    assert (moved.buffer, moved.offset) == ("x_ptr", 7)
    for lost in (value_of(add, here, None), value_of(add, Pointer("x_ptr", None), 4)):
        assert (lost.buffer, lost.offset) == ("x_ptr", None)
    assert value_of("%0 = tt.splat %a : !tt.ptr<f32> -> tensor<2x!tt.ptr<f32>>", moved).offset.tolist() == [7, 7]
    assert [value_of(select, yes, here, moved) for yes in (True, False)] == [here, moved]
    for condition in (None, [True, False]):
        with pytest.raises(Unchecked, match=r"arith\.select of pointers"):
            value_of(select, condition, here, moved)
    with pytest.raises(Unchecked, match=r"arith\.addi of a pointer"):
        value_of("%0 = arith.addi %a, %b : i64", here, 1)


# --- who holds what ---------------------------------------------------------------------------------------------------

BLOCKED = "#ttg.blocked<{sizePerThread = [1, 2], threadsPerWarp = [4, 8], warpsPerCTA = [2, 1], order = [1, 0]}>"
LINEAR = "#ttg.linear<{{register = {}, lane = {}, warp = {}, block = []}}>"
COLUMNS_FIRST = BLOCKED.replace("[1, 0]}", "[0, 1]}")


@pytest.mark.parametrize(
    "layout",
    [BLOCKED, LINEAR.format([[0, 1], [0, 16]], [[0, 2], [0, 4], [0, 8], [1, 0], [2, 0]], [[4, 0]])],
    ids=["blocked", "linear"],
)
def test_every_element_has_its_thread(layout):
    """Two in a row, then the next lane; after eight lanes the next row, after four rows the other warp."""
    row, column = np.divmod(np.arange(8 * 32), 32)
    first, last = holders(layout, (8, 32))
    assert first.tolist() == last.tolist() == (column // 2 % 8 + row % 4 * 8 + row // 4 * 32).tolist()


@pytest.mark.parametrize(
    "layout",
    [BLOCKED, LINEAR.format([[0, 1]], [[0, 2], [0, 4], [0, 0], [1, 0], [2, 0]], [[0, 0]])],
    ids=["blocked", "linear"],
)
def test_where_there_are_more_threads_several_hold_an_element(layout):
    """Here every fourth lane, and both warps."""
    row, column = np.divmod(np.arange(4 * 8), 8)
    first, last = holders(layout, (4, 8))
    assert first.tolist() == (column // 2 + row * 8).tolist()
    assert last.tolist() == (first + 4 + 32).tolist()


def test_what_is_left_of_a_layout_without_an_axis():
    first, last = holders(f"#ttg.slice<{{dim = 1, parent = {BLOCKED}}}>", (8,))
    assert first.tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert last.tolist() == [at + 7 for at in first]
    first, last = holders(f"#ttg.slice<{{dim = 0, parent = {BLOCKED}}}>", (16,))
    assert first.tolist() == [column // 2 for column in range(16)]
    assert last.tolist() == [at + 24 + 32 for at in first]


def test_lanes_go_along_the_first_axis_of_the_order():
    first, _ = holders(COLUMNS_FIRST, (8, 16))
    row, column = np.divmod(np.arange(8 * 16), 16)
    assert first.tolist() == (row % 4 + column // 2 * 4 + row // 4 * 32).tolist()


def test_all_threads_hold_a_number_and_who_holds_other_layouts_is_not_known():
    first, last = holders("", ())
    assert first < last
    assert holders("#ttg.nvidia_mma<{versionMajor = 2}>", (16, 16)) is None


# --- the text ---------------------------------------------------------------------------------------------------------

KERNEL = """#loc = loc("kernel.py":1:0)
#loc1 = loc("kernel.py":7:4)
#loc2 = loc("other.py":9:4)
#loc3 = loc(callsite(#loc1 at #loc2))
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> loc("kernel.py":1:0), %size: i32) {
    BARRIER loc(#loc3)
    tt.return loc(#loc)
  } loc(#loc)
}
"""


@pytest.mark.parametrize("barrier", ["ttg.barrier all", "gpu.barrier"])
def test_a_barrier_is_taken_out_by_its_place(barrier):
    code = KERNEL.replace("BARRIER", barrier)
    ((place, without),) = without_barriers(code)
    assert place == "kernel.py:7"
    assert barrier in code
    assert without.splitlines() == [line for line in code.splitlines() if barrier not in line]
    assert (parse(without).pointers, [op.name for op in parse(without).body]) == (["x_ptr"], ["tt.return"])


@pytest.mark.parametrize("code", ["", KERNEL + KERNEL], ids=["none", "two"])
def test_a_kernel_is_one_function(code):
    with pytest.raises(Unchecked, match="expected one function"):
        parse(code)


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        (["tt.store %p, %v"], True),
        (["%w = arith.addf %v, %x", "%y = math.exp %w", "tt.store %p, %y"], True),
        (["amdg.buffer_store %v, %p[%o]"], True),
        (["tt.store %p, %x, %v"], False),  # whether
        (["%q = tt.addptr %p, %v", "tt.store %q, %x"], False),  # where
        (["amdg.buffer_store %x, %p[%v]"], False),
        (["%w = tt.gather %v", "tt.store %p, %w"], False),
        (["tt.store %p, %v", "%w = arith.addf %v, %x", "%y = tt.gather %w"], False),
    ],
    ids=str,
)
def test_what_is_loaded_only_to_be_stored(users, expected):
    """Element by element: then no other thread will see what this one has loaded."""
    lines = ["tt.func public @kernel(%p: !tt.ptr<f32>) {", "%v = tt.load %p", *users, "tt.return", "}"]
    assert parse("\n".join(lines)).body[0].only_stored == expected
