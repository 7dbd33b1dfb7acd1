"""Whatever is wrong with a compiled kernel becomes a problem of its case. Nothing compiles here."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.errors import TritonError

from benchmarks.static import measuring
from benchmarks.static.cases import TARGETS, cases
from benchmarks.static.measuring import ARGUMENTS, BEHIND, SHARED_LIMITS, measure
from benchmarks.static.ptx import early_accesses
from benchmarks.static.ttgir import Unchecked

CASES = {str(case): case for case in cases()}
STEP = next(case for case in CASES.values() if (case.phase, case.target, case.dtype) == ("first", "sm_90", "float32"))
LSTM = next(case for case in CASES.values() if case.phase == "lstm")
AMD = next(case for case in CASES.values() if case.target == "gfx942")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the checks find, to be set, and what the check for races is asked."""
    found = SimpleNamespace(races=[], needed=(), uneven=[], early=[], asked=[], error=None)

    def compile_case(case: Any) -> Any:
        if isinstance(found.error, TritonError):
            raise found.error
        return dict.fromkeys(("ttgir", "ptx", "cubin", "amdgcn"), "code"), 1024

    def races(code: str, grid: Any = (1,), arguments: Any = None) -> list[str]:
        if isinstance(found.error, Unchecked) and code == "code":
            raise found.error
        found.asked.append((code, grid, arguments))
        return found.races if code == "code" else ["a race"] if code in found.needed else []

    counts = dict(registers=64, spilled=0, instructions=500)
    monkeypatch.setattr(measuring, "compile_case", compile_case)
    monkeypatch.setattr(measuring, "races", races)
    monkeypatch.setattr(measuring, "_count_nvidia", lambda cubin: counts)
    monkeypatch.setattr(measuring, "_count_amd", lambda listing: counts)
    monkeypatch.setattr(measuring, "uneven_sums", lambda ptx: found.uneven)
    monkeypatch.setattr(measuring, "early_accesses", lambda ptx: found.early)
    monkeypatch.setattr(measuring, "without_barriers", lambda ttgir: [("a.py:1", "without 1"), ("a.py:2", "without 2")])
    monkeypatch.setattr(measuring, "_needed", set())
    return found


@pytest.mark.parametrize("case", [STEP, LSTM, AMD], ids=str)
def test_what_is_right_is_no_problem(case: Any, found: SimpleNamespace) -> None:
    measured = measure(case)
    assert measured.problems() == []
    assert measured.numbers == measuring.Numbers(registers=64, spilled=0, shared=1024, instructions=500)


def test_everything_that_is_found_is_a_problem(found: SimpleNamespace) -> None:
    found.races, found.uneven, found.early = ["a race"], ["a.py:3"], ["a.py:4"]
    assert LSTM.overlaps
    assert measure(LSTM).problems() == [
        f"{LSTM}: a.py:3 adds another thread's value to an unrounded product of its own",
        f"{LSTM}: a.py:4 accesses memory that the launch before it may still write to",
        f"{LSTM}: a race",
    ]
    assert measure(AMD).problems() == [f"{AMD}: a race"]
    found.error = Unchecked("why")
    assert measure(AMD).problems() == [f"{AMD}: barriers cannot be checked: why"]
    found.error = TritonError("why")
    assert measure(AMD).problems() == [f"{AMD}: does not compile: why"]
    found.error = TritonError("in a call")
    found.error.__cause__ = TritonError("why")
    assert measure(AMD).problems() == [f"{AMD}: does not compile: why"]


def test_races_are_looked_for_in_every_launch_as_it_is(found: SimpleNamespace) -> None:
    """With its grid; where links are recomputed, with the steps before."""
    for case in CASES.values():
        measure(case)
        code, grid, arguments = found.asked[-1]
        assert (code, grid) == ("code", case.grid)
        again = case.direction == "backward" and case.phase == "middle"
        assert arguments == (ARGUMENTS | BEHIND if again else ARGUMENTS)
    assert max(case.grid for case in CASES.values()) > (2, 2)


def test_a_barrier_is_needed_where_there_is_a_race_without_it(found: SimpleNamespace) -> None:
    found.needed = ("without 2",)
    assert measure(STEP).barriers == {"a.py:1": False, "a.py:2": True}
    found.needed = ("without 1",)
    assert measure(STEP).barriers == {"a.py:1": True, "a.py:2": True}, "one kernel is enough"
    assert measure(AMD).barriers == {}


def test_what_a_kernel_takes_is_read_from_what_tools_say(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = "Function k:\n REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:400\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=usage))
    monkeypatch.setattr(measuring, "_count_instructions", lambda cubin: 7)
    assert measuring._count_nvidia(b"") == dict(registers=40, spilled=24, instructions=7)
    listing = "\ts_load_b32 s0\nlabel:\n\tv_add_f32 v0\n  .vgpr_count: 30\n  .private_segment_fixed_size: 12\n"
    assert measuring._count_amd(listing) == dict(registers=30, spilled=12, instructions=2)
    with pytest.raises(ValueError, match="nothing matches"):
        measuring._count_amd("")


def test_instructions_are_those_that_do_something_where_code_stands() -> None:
    """Here in an ELF file with two sections of the same content, one of which is executable."""
    content = b"".join(struct.pack("<QQ", operation, 0) for operation in (0x7624, 0x7918, 0x1986, 0x7918, 0x794D))
    sections = [bytes(64), *(struct.pack("<QQQQQ24x", 1, flags, 0, 64, len(content)) for flags in (2 | 4, 2))]
    header = struct.pack("<40xQ10xHHH", 64 + len(content), 64, len(sections), 0)
    assert measuring._count_instructions(header + content + b"".join(sections)) == 3


def test_launches_overlap_on_the_targets_that_can() -> None:
    """From Hopper on, where the layout says so."""
    for name, target in TARGETS.items():
        case = replace(LSTM, target=name)
        assert case.overlaps == (target.backend == "cuda" and target.arch >= 90)
        assert not replace(case, layout=case.layout._replace(overlaps=False)).overlaps


def test_every_target_has_a_limit() -> None:
    """The most that a block may have: 163, 227 and 99 KB on NVIDIA's; 64 on AMD's."""
    kilobytes = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_89": 99, "sm_120": 99, "gfx942": 64, "gfx1100": 64}
    assert {target: limit / 1024 for target, limit in SHARED_LIMITS.items()} == kilobytes
    assert SHARED_LIMITS.keys() == TARGETS.keys()


@pytest.mark.parametrize(
    "access",
    [
        "ld.global.b32 { %r1 }, [ %rd1 + 0 ];",
        "@%p1 st.global.v4.b32 [ %rd1 + 0 ], { %r1 };",
        "ld.relaxed.gpu.global.b32 %r1, [ %rd1 ];",
        "atom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 ], %r2;",
        "red.global.add.f32 [ %rd1 ], %r2;",
        "cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 0x10;",
    ],
)
def test_every_access_before_the_wait_is_early(access: str) -> None:
    place, wait = "\t.loc\t1 7 0 // kernel.py:7:12", "\tgriddepcontrol.wait;"
    assert early_accesses(f"{place}\n\t{access}\n{wait}\n") == ["kernel.py:7"]
    assert early_accesses(f"{place}\n{wait}\n\t{access}\n") == []
    assert early_accesses(f"{place}\n\t{access}\n") == ["kernel.py:7"]
    assert early_accesses(f"{place}\n\tld.param.b64 %rd1, [p];\n\tld.shared.b32 %r1, [%r2];\n{wait}\n") == []
