"""What a compiled kernel uses, and whether it has all its barriers."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import triton
from triton.errors import TritonError

from benchmarks.static.barriers import races
from benchmarks.static.cases import Case
from benchmarks.static.compiling import compile_case
from benchmarks.static.ptx import early_accesses, uneven_sums
from benchmarks.static.ttgir import Unchecked, without_barriers
from dnc_triton.kernels.buffers import ENDED, FRESH, LOST

# Bytes of shared memory that a block may have. A kernel that needs more compiles, but fails when it is launched.
SHARED_LIMITS = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx1100": 65_536,
}
# For kernels that take them: each step meets the one before and the one after, and of two blocks one is full, one is
# not. The row that runs to the end is reset before its first and its last step, the other one at both of its steps.
# Where a step has marks, one row is reset at it and at the next, the other has ended.
ARGUMENTS = {
    "batch": 2,
    "steps": 3,
    "size": 300,
    "rows": 40,
    "inputs_by_step": 16,
    "inputs_by_row": 8,
    "lengths_ptr": [3, 2],
    "reset_ptr": [1, 1, 0, 1, 1, 0],
    "marks_ptr": [FRESH.value | LOST.value, ENDED.value],
    "shared": 0,
}
# For the kernel that computes links again: from two steps back.
BEHIND = {"behind": 2, "row": 12, "precedence_ptr": 192, "write_weights_ptr": 96}
# Places of barriers without which a kernel was found to be wrong in this process; one such kernel is enough.
_needed: set[str] = set()


@dataclass(frozen=True)
class Numbers:
    """What a kernel uses."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    instructions: int


@dataclass(frozen=True)
class Measurement:
    """The result of a case."""

    case: Case
    numbers: Numbers | None  # None if it does not compile
    errors: list[str]  # errors in compiling it, and races
    barriers: dict[str, bool]  # place in the source → whether this kernel or an earlier one would be wrong without it

    def problems(self) -> list[str]:
        """What is wrong, in words."""
        return [f"{self.case}: {problem}" for problem in self.errors + self._excesses()]

    def _excesses(self) -> list[str]:
        found: list[str] = []
        if self.numbers is None:
            return found
        if self.numbers.spilled > self.case.accepted_spill(triton.__version__) and not self.case.may_spill:
            found.append(f"spills {self.numbers.spilled} bytes")
        if self.numbers.shared > (limit := SHARED_LIMITS[self.case.target]):
            found.append(f"wants {self.numbers.shared:,} bytes of shared memory, there are {limit:,}")
        return found


def measure(case: Case) -> Measurement:
    """Compile a case, count what it uses and look for races."""
    try:
        asm, shared = compile_case(case)
    except (TritonError, RuntimeError) as error:
        while isinstance(error.__cause__, TritonError):  # from the call to the cause in the called function
            error = error.__cause__
        return Measurement(case, None, [f"does not compile: {error}"], {})
    counts = _count_amd(asm["amdgcn"]) if case.target.startswith("gfx") else _count_nvidia(asm["cubin"])
    numbers, ttgir = Numbers(shared=shared, **counts), asm["ttgir"]
    uneven = [] if case.target.startswith("gfx") else uneven_sums(asm["ptx"])
    errors = [f"{site} adds another thread's value to an unrounded product of its own" for site in uneven]
    if case.overlaps:
        early = early_accesses(asm["ptx"])
        errors += [f"{site} accesses memory that the launch before it may still write to" for site in early]
    try:
        # Which barriers are needed does not depend on the target; finding out takes a walk for each of them.
        without = list(without_barriers(ttgir)) if case.target == "sm_90" else []
        behind = (case.direction, case.phase) == ("backward", "middle")
        arguments = ARGUMENTS | BEHIND if behind else ARGUMENTS
        _needed.update(place for place, code in without if place not in _needed and races(code, arguments=arguments))
        needed = {place: place in _needed for place, _ in without}
        return Measurement(case, numbers, errors + races(ttgir, case.grid, arguments), needed)
    except Unchecked as error:
        return Measurement(case, numbers, [*errors, f"barriers cannot be checked: {error}"], {})


def _count_nvidia(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(cuobjdump), "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spilled": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "instructions": _count_instructions(cubin),
    }


def _count_instructions(cubin: bytes) -> int:
    """Instructions in the executable sections of an ELF file, without the no-operations that pad them.

    An instruction has 16 bytes, with its operation in the low 12 bits. nvdisasm counts the same in half a second.
    """
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    total = 0
    for header in range(headers, headers + count * size, size):
        flags, _, start, length = struct.unpack_from("<QQQQ", cubin, header + 8)
        if flags & 4:  # executable
            operations = np.frombuffer(cubin, "<u2", length // 2, start)[::8] & 0xFFF
            total += int((operations != 0x918).sum())
    return total


def _count_amd(listing: str) -> dict[str, int]:
    return {
        "registers": _number(r"^\s+\.vgpr_count:\s+(\d+)", listing),
        "spilled": _number(r"^\s+\.private_segment_fixed_size:\s+(\d+)", listing),
        "instructions": len(re.findall(r"^\t[a-z]\w+(?!\w*:)", listing, re.M)),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text, re.M)
    if not match:
        raise ValueError(f"nothing matches {pattern!r} in {text[:500]!r}")
    return int(match[1])


def idle_barriers(measurements: Iterable[Measurement]) -> list[str]:
    """Barriers that no kernel would be wrong without."""
    needed: dict[str, bool] = {}
    for measurement in measurements:
        for place, is_needed in measurement.barriers.items():
            needed[place] = needed.get(place, False) or is_needed
    return sorted(place for place, is_needed in needed.items() if not is_needed)
