"""How many clocks a lone program takes, from its machine code: to rank designs without a GPU.

In NVIDIA's machine code, from Volta on, every instruction says how long the next one has to wait, which of six
scoreboards it waits for itself, and which one signals that its result is ready. So a program that mostly waits for its
own results, as those of a step with few slots do, can be timed by going through it in order. All of its warps are
assumed to do the same side by side.

Not modelled: caches (each load from global memory takes as long as one from the L2 cache), other programs, fetching
instructions. Nor are branches that depend on numbers: only those back to the start of a loop are known. A loop is gone
through once, and what each further pass would take is given beside the sum.

For an H200's kernels (Triton 3.6.0) that took 4.9 to 12.5 µs a step at N = 16, without their launch, the estimate is
0.9 to 1.5 times the measured clocks: more with several warps and many loads, less with one warp.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import triton

from benchmarks.static.cases import Case
from benchmarks.static.compiling import compile_case

# Clocks until a result is ready, by operation; `OTHER` for all others that set a scoreboard.
LATENCY = {"LDG": 270, "LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 22, "STS": 20, "STG": 20}
OTHER, BARRIER, OPERANDS = 24, 30, 10  # and until all threads have passed a barrier; until operands have been read
# Operations that share the path to memory: one instruction of one warp after another, a clock for each 128 bytes.
MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL")
SCHEDULERS = 4  # per multiprocessor; each issues one instruction of one of its warps per clock
NONE = 7  # no scoreboard


class Instruction(NamedTuple):
    """An instruction of the machine code.

    Attributes:
        text: as the disassembler prints it, with its predicate.
        stall: clocks until the next instruction.
        sets, frees: the scoreboards that signal its result, and that its operands have been read; or `NONE`.
        waits: the scoreboards that it waits for.
    """

    text: str
    stall: int
    sets: int
    frees: int
    waits: list[int]

    @property
    def operation(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]


class Clocks(NamedTuple):
    """How long a program takes.

    Attributes:
        once: clocks if every loop is gone through once.
        loops: where in the code a loop ends → clocks of each further pass; the longest comes last, which in a sequence
            is the loop over its steps.
    """

    once: int
    loops: dict[int, int]

    def __str__(self) -> str:
        return " + ".join(f"{clocks:,}" for clocks in (self.once, *self.loops.values()))


def estimate(case: Case) -> Clocks:
    """The clocks of a kernel for an NVIDIA GPU."""
    code, _ = compile_case(case)
    return count(*parse(disassemble(code["cubin"])), warps=case.num_warps)


def disassemble(cubin: bytes) -> str:
    """The machine code as text, each instruction followed by its bits."""
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "-c", "-hex", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and for each label the instruction that it precedes."""
    instructions: list[Instruction] = []
    labels = {}
    text, low = "", 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif first := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/", line):
            text, low = first[1], int(first[2], 16)
        elif text and (second := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            control = (int(second[1], 16) << 64 | low) >> 105
            waits = [board for board in range(6) if control >> 11 + board & 1]
            instructions.append(Instruction(text, control & 15, control >> 5 & 7, control >> 8 & 7, waits))
            text = ""
    return instructions, labels


def count(instructions: list[Instruction], labels: dict[str, int], *, warps: int) -> Clocks:
    """Go through a program and count its clocks."""
    backwards = {}
    for at, instruction in enumerate(instructions):
        label = re.search(r"\.L_x_\d+", instruction.text)
        if instruction.operation.split(".")[0] == "BRA" and label and labels[label[0]] < at:
            backwards[at] = labels[label[0]]
    once = _run(instructions, labels, backwards, {}, warps)
    loops = {at: round(_run(instructions, labels, backwards, {at: 1}, warps) - once) for at in backwards}
    return Clocks(round(once), dict(sorted(loops.items(), key=lambda loop: loop[1])))


def _run(
    instructions: list[Instruction],
    labels: dict[str, int],
    backwards: Mapping[int, int],
    again: Mapping[int, int],
    warps: int,
) -> float:
    """Clocks until the program ends; `again`: where a loop ends → how many further passes it takes."""
    now, memory, at = 0.0, 0.0, 0
    ready, left = [0.0] * 6, dict(again)
    while at < len(instructions):
        instruction = instructions[at]
        operation, *kinds = instruction.operation.split(".")
        now = max([now, *(ready[board] for board in instruction.waits)])
        start = now
        if operation in MEMORY:
            wide = 4 if "128" in kinds else 2 if "64" in kinds else 1
            start = memory = max(memory, now) + warps * wide * (0.5 if operation == "SHFL" else 1)
        if instruction.sets != NONE:
            ready[instruction.sets] = max(ready[instruction.sets], start + LATENCY.get(operation, OTHER))
        if instruction.frees != NONE:
            ready[instruction.frees] = max(ready[instruction.frees], start + OPERANDS)
        now += max(instruction.stall, warps / SCHEDULERS, 1) + (BARRIER if operation == "BAR" else 0)
        predicated = instruction.text.startswith("@")
        if operation == "EXIT" and not predicated:
            break
        if at in backwards and left.get(at, 0):
            left[at] -= 1
            at = backwards[at]
        elif instruction.operation == "BRA" and at not in backwards and not predicated:  # others have conditions
            target = labels[re.findall(r"\.L_x_\d+", instruction.text)[0]]
            if target == at:  # what follows the end of the program
                break
            at = target
        else:
            at += 1
    return now
