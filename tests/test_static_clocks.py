"""The clocks of a program, from made-up listings of machine code, and from a kernel's."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.static.cases import cases
from benchmarks.static.clocks import BARRIER, LATENCY, count, estimate, parse
from benchmarks.static.compiling import compiling_map


def line(at: int, text: str, *, stall: int = 1, sets: int = 7, frees: int = 7, waits: int = 0) -> str:
    """An instruction as the disassembler has it; `waits` has a bit for each scoreboard."""
    control = (stall | 1 << 4 | sets << 5 | frees << 8 | waits << 11) << 41
    return f"        /*{16 * at:04x}*/   {text} ;   /* 0x{at:016x} */\n{'':40}/* 0x{control:016x} */\n"


def clocks(*lines: str, warps: int = 1) -> tuple[int, list[int]]:
    found = count(*parse("".join(lines)), warps=warps)
    return found.once, list(found.loops.values())


END = line(90, "EXIT")


def test_an_instruction_takes_until_the_next_may_be_issued() -> None:
    assert clocks(line(0, "MOV R1, R2", stall=4), line(1, "FADD R1, R1, R2", stall=2), END) == (7, [])
    assert clocks(line(0, "MOV R1, R2", stall=15), END) == (16, [])
    assert clocks(line(0, "MOV R1, R2"), END, warps=8) == (4, []), "two warps share a scheduler"


def test_a_result_is_waited_for_where_that_is_said() -> None:
    load = line(0, "@!P1 LDG.E R4, desc[UR4][R2.64]", sets=3)
    other = line(1, "MOV R7, R8", stall=5)
    assert clocks(load, other, END)[0] == 1 + 5 + 1
    assert clocks(load, other, line(2, "FADD R5, R4, R4", waits=1 << 2), END)[0] == 1 + 5 + 1 + 1, "another's"
    waits = line(2, "FADD R5, R4, R4", waits=1 << 3)
    assert clocks(load, other, waits, END)[0] == 1 + LATENCY["LDG"] + 1 + 1  # after the clock that passes 128 bytes
    for board in range(6):
        some = line(0, "LDG.E R4, desc[UR4][R2.64]", sets=board), line(2, "FADD R5, R4, R4", waits=1 << board)
        assert clocks(*some, END)[0] == 1 + LATENCY["LDG"] + 1 + 1
    assert clocks(load, load, waits, END)[0] == 2 + LATENCY["LDG"] + 1 + 1
    wide = line(0, "LDG.E.128 R4, desc[UR4][R2.64]", sets=3)
    assert clocks(wide, waits, END, warps=4)[0] == 4 * 4 + LATENCY["LDG"] + 1 + 1


@pytest.mark.parametrize(
    ("operation", "passing", "latency"),
    [
        ("LDG.E", 4, 270),
        ("LDG.E.64", 8, 270),
        ("LDG.E.128.CONSTANT", 16, 270),
        ("STG.E", 4, 20),
        ("LDS", 4, 30),
        ("LDS.U.64", 8, 30),
        ("STS.128", 16, 20),
        ("LDSM.16.M88.4", 4, 33),
        ("STSM.16.M88.4", 4, 24),
        ("SHFL.BFLY", 2, 25),
        ("MUFU.EX2", 0, 22),
        ("I2F.U32", 0, 24),
    ],
)
def test_what_memory_takes_of_four_warps(operation: str, passing: int, latency: int) -> None:
    """The way there first, then until the result is there. Two of them share the way."""
    sets, waits = line(0, f"{operation} R4, [R2+0x128]", sets=3), line(1, "FADD R5, R4, R4", waits=1 << 3)
    assert clocks(sets, waits, END, warps=4)[0] == passing + latency + 1 + 1
    assert clocks(sets, sets, waits, END, warps=4)[0] == max(2 * passing, 1) + latency + 1 + 1


def test_a_scoreboard_waits_for_all_that_set_it() -> None:
    load, root = line(0, "LDG.E R4, desc[UR4][R2.64]", sets=3), line(1, "MUFU.RSQ R5, R6", sets=3)
    waits = line(2, "FADD R5, R4, R5", waits=1 << 3)
    assert clocks(load, root, waits, END)[0] == 1 + LATENCY["LDG"] + 1 + 1


def test_operands_are_read_before_they_are_written_over() -> None:
    store = line(0, "STG.E desc[UR4][R2.64], R4", frees=1)
    assert clocks(store, line(1, "MOV R4, R8", waits=1 << 1), END)[0] == 1 + 10 + 1 + 1


def test_barriers_loops_and_branches() -> None:
    assert clocks(line(0, "BAR.SYNC.DEFER_BLOCKING 0x0"), END)[0] == 1 + BARRIER + 1
    assert clocks(line(0, "@!UP0 BAR.SYNC 0x0"), END)[0] == 1 + BARRIER + 1
    loop = [".L_x_0:\n", line(0, "FADD R1, R1, R2", stall=4), line(1, "@P0 BRA `(.L_x_0)", stall=5)]
    assert clocks(*loop, END) == (10, [9])
    outer = [".L_x_7:\n", line(5, "MOV R9, R9"), *loop, line(6, "@!P3 BRA `(.L_x_7)")]
    assert clocks(*outer, END) == (12, [9, 11])
    over = [line(0, "BRA `(.L_x_2)"), line(1, "BAR.SYNC 0x0"), ".L_x_2:\n"]
    assert clocks(*over, END)[0] == 2
    taken_or_not = [line(0, "@P0 BRA `(.L_x_2)"), line(1, "BAR.SYNC 0x0"), ".L_x_2:\n"]
    assert clocks(*taken_or_not, END)[0] == 2 + BARRIER + 1, "what is jumped over counts"
    assert clocks(line(0, "@P0 EXIT"), END)[0] == 2
    # From Blackwell on a predicate that all threads share may stand behind the operation.
    uniform = [".L_x_0:\n", line(0, "FADD R1, R1, R2", stall=4), line(1, "BRA.U !UP0, `(.L_x_0)", stall=5)]
    assert clocks(*uniform, END) == (10, [9])
    perhaps = [line(0, "BRA.U UP0, `(.L_x_2)"), line(1, "BAR.SYNC 0x0"), ".L_x_2:\n"]
    assert clocks(*perhaps, END)[0] == 2 + BARRIER + 1
    assert clocks(".L_x_1:\n", line(0, "BRA `(.L_x_1)")) == (1, []), "what stands behind the end"


def test_a_kernel_is_timed_with_its_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in cases() if case.num_warps == 8 and case.target == "sm_90")
    monkeypatch.setattr("benchmarks.static.clocks.compile_case", lambda case: ({"cubin": b""}, 0))
    monkeypatch.setattr("benchmarks.static.clocks.disassemble", lambda cubin: line(0, "MOV R1, R2") + END)
    assert estimate(case) == (4, {})


@pytest.mark.usefixtures("_compiled_once")
def test_a_longer_sum_takes_longer() -> None:
    few, many = (
        case
        for case in cases()
        if case.phase == "product" and case.direction == "backward" and case.hidden_size in (64, 256)
    )
    fewer, more = compiling_map(estimate, [few, many], jobs=1)
    assert 500 < fewer.once < more.once < 10_000
    assert str(more) == f"{more.once:,} + {next(iter(more.loops.values())):,}"
