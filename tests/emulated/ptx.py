"""The text of PTX, taken apart: a kernel's instructions, labels, registers and parameters."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from arithmetic import Unsupported, check

WARP = 32


class Instruction(NamedTuple):
    op: str
    operands: list[str]
    predicate: str  # "", "%p1" or "!%p1"
    place: str  # file:line

    def __str__(self) -> str:
        return f"{self.place}: {self.op} {', '.join(self.operands)}"


class Program(NamedTuple):
    """A kernel's PTX, taken apart."""

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, str]  # prefix → type
    params: list[str]
    threads: int


def parse(ptx: str) -> Program:
    """Take the one kernel of a module apart."""
    files = {number: path.rsplit("/", 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    entry = re.search(r"\.entry (.*?)\n\{\n(.*?)\n\}", ptx, re.DOTALL)
    threads = entry and re.search(r"\.reqntid (\d+)", entry[1])
    if not entry or not threads:
        raise Unsupported("no kernel, or one for any number of threads")
    program = Program([], {}, {}, re.findall(r"\w+_param_\d+", entry[1]), int(threads[1]))
    place, pending = "?", ""
    for line in entry[2].splitlines():
        line = re.sub(r"//.*", "", line).strip()
        if loc := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            place = f"{files[loc[1]]}:{loc[2]}"
        elif label := re.fullmatch(r"([\w$]+):", line):
            program.labels[label[1]] = len(program.instructions)
        else:
            pending += " " + line
            if line.endswith((";", "; }")):
                _add_statements(program, pending.removesuffix("}"), place)
                pending = ""
    return program


def _add_statements(program: Program, text: str, place: str) -> None:
    for statement in text.split(";"):
        statement = statement.strip().removeprefix("{ ")  # what is declared in a scope has one type everywhere
        if register := re.match(r"\.reg\s+\.(\w+)\s+(%?\w+)(<\d+>)?$", statement):
            check(program.registers.setdefault(register[2], register[1]) == register[1], statement)
        elif instruction := re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", instruction[3])
            operands = [x.strip() for x in operands if x.strip()]
            op = instruction[2].replace(".shared::cta", ".shared")  # the same, and how Triton 3.9 spells it
            program.instructions.append(Instruction(op, operands, instruction[1] or "", place))
        else:
            check(not statement or statement.startswith(".pragma"), statement)


def names_of(operand: str) -> list[str]:
    """Of "{%r1, %r2}" or "%r1"."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


def meeting_points(program: Program) -> dict[int, int]:
    """Where threads that part at a jump meet again: the first instruction that every way from there leads to.

    By the jump's own place; the end of the kernel stands behind its last instruction.
    """
    end = len(program.instructions)
    jumps = {at: i for at, i in enumerate(program.instructions) if i.op.split(".")[0] in ("bra", "ret")}
    starts = sorted({0, end, *program.labels.values(), *(at + 1 for at in jumps)})
    ways: dict[int, list[int]] = {}
    last: dict[int, int] = {}
    for start, following in pairwise(starts):
        jump = jumps.get(following - 1)
        to = [] if jump is None else [end if jump.op == "ret" else program.labels[jump.operands[0]]]
        ways[start] = to if jump is not None and not jump.predicate else [*to, following]
        last[start] = following - 1
    # What stands on every way from a block to the end, the block itself included.
    inevitable = {start: {end} if start == end else set(starts) for start in starts}
    changed = True
    while changed:
        changed = False
        for start in reversed(starts[:-1]):
            found = {start} | set.intersection(*(inevitable[to] for to in ways[start]))
            changed |= found != inevitable[start]
            inevitable[start] = found
    # Of two that are, the nearer one has the other on its way.
    return {
        last[start]: max(inevitable[start] - {start}, key=lambda block: len(inevitable[block]))
        for start in starts[:-1]
        if last[start] in jumps
    }
