"""What is wrong in a kernel's PTX: sums that differ between threads, and memory that is accessed too early.

To sum across a warp, a thread adds another thread's value to its own. If these are products, the compiler fuses the
thread's own product with the addition and does not round it, while the other thread's was rounded: so the threads'
sums differ in the last bit. Where several threads hold the same element, which sum is stored depends on which of them
writes last, and the same call might give other bits. `dnc_triton.kernels.common.term` is not fused.

A launch that overlaps the one before it waits for that one's end before it accesses memory. A compiler may move what
the source says first behind something else, as Triton 3.7.1 does with loads in a loop that waits.
"""

from __future__ import annotations

import re

_LINE = re.compile(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);")
_SITE = re.compile(r"\s*\.loc\s+(\d+ \d+ \d+)(?:.*inlined_at (\d+ \d+ \d+))?.*//\s*(.*)")
_FILE = re.compile(r'\.file\s+(\d+) ".*?(\w+\.py)"')
_REGISTER = re.compile(r"%\w+")
_ACCESS = re.compile(r"\b((?:ld|st|atom|red)\.(?:[a-z]+\.)*?global|cp\.async|cp\.reduce)\b")
_WAIT = re.compile(r"griddepcontrol\.wait\s*;")  # Triton 3.9 has a space there
_MOVES = ("mov.b", "cvt.u", "shl.b64", "or.b64")


def uneven_sums(ptx: str) -> list[str]:
    """Where a kernel adds another thread's value to a product of its own, each place once."""
    made: dict[str, tuple[str, list[str]]] = {}  # register → operation, and the registers it read
    additions: list[tuple[str, str]] = []
    site, callers, files = "an unknown place", dict[str, str](), dict(_FILE.findall(ptx))
    for line in ptx.splitlines():
        if located := _SITE.match(line):
            site = _ours(located, callers, files)
        elif statement := _LINE.match(line):
            operation, operands = statement.groups()
            results, given = _divide(operands)
            if not operation.startswith(("st.", "bar", "bra")):
                made.update((result, (operation, given)) for result in results)
            if operation.startswith("fma.rn.f") and len(given) == 3:
                additions.append((given[2], site))
    return sorted({site for addend, site in additions if _comes_from_another_thread(addend, made)})


def early_accesses(ptx: str) -> list[str]:
    """Where a kernel accesses memory before it waits for the previous launch, each place once."""
    found, site, callers, files = set(), "an unknown place", dict[str, str](), dict(_FILE.findall(ptx))
    for line in _WAIT.split(ptx, maxsplit=1)[0].splitlines():
        if located := _SITE.match(line):
            site = _ours(located, callers, files)
        elif not line.lstrip().startswith("//") and _ACCESS.search(line):
            found.add(site)
    return sorted(found)


def _divide(operands: str) -> tuple[list[str], list[str]]:
    """The registers that a statement writes, and those that it reads."""
    if operands.startswith("{"):
        written, _, read = operands.partition("}")
    else:
        written, _, read = operands.partition(",")
        written = written.partition("|")[0]  # of a shuffle's two results, the number
    return _REGISTER.findall(written), _REGISTER.findall(read)


def _comes_from_another_thread(register: str, made: dict[str, tuple[str, list[str]]]) -> bool:
    """Looks through moves, and through what puts the halves of a float64 together."""
    seen = set()
    while register in made and register not in seen:
        seen.add(register)
        operation, given = made[register]
        if operation.startswith("shfl."):
            return True
        if not operation.startswith(_MOVES) or not given:
            return False
        register = given[0]
    return False


def _ours(located: re.Match[str], callers: dict[str, str], files: dict[str, str]) -> str:
    """Of a place and the places where it was inlined, the innermost that is ours.

    Up to Triton 3.7 all of them are given with the place; from 3.8 on only the next one, which must be followed.

    Args:
        located: a match of `_SITE`.
        callers: place → where it was last inlined, for those met so far; this one is added.
        files: number → name.
    """
    place, caller, beside = located.groups()
    places = re.findall(r"(\w+\.py:\d+):\d+", beside)
    if caller:
        callers[place] = caller
        seen: set[str] = set()
        while caller and caller not in seen:
            seen.add(caller)
            file, line, _ = caller.split()
            places.append(f"{files.get(file)}:{line}")
            caller = callers.get(caller)
    return next((place for place in places if not place.startswith("standard.py")), beside)
