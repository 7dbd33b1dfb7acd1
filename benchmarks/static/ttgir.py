"""The compiler's intermediate code (TTGIR) as printed: its operations, and which thread holds which element."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

NAME = r"%[\w$.\-]+(?:#\d+)?"
BARRIERS = ("ttg.barrier all", "gpu.barrier")  # what tl.debug_barrier becomes in Triton 3.7 and in 3.6


class Unchecked(Exception):
    """The code does something that the check for barriers does not understand."""


def without_barriers(ttgir: str) -> Iterator[tuple[str, str]]:
    """For each barrier of a kernel, its place in the source and the kernel without it."""
    places = _places(ttgir)
    lines = ttgir.splitlines()
    for number, line in enumerate(lines):
        text, _, place = line.strip().partition(" loc(")
        if text in BARRIERS:
            yield _site(place, places), "\n".join(lines[:number] + lines[number + 1 :])


# --- the text ---------------------------------------------------------------------------------------------------------


@dataclass
class Op:
    """An operation as it is printed: `%result:2 = name text {regions}`."""

    results: list[str]
    name: str
    text: str
    operands: list[str]
    shape: tuple[int, ...]
    layout: str
    site: str = ""
    regions: list[list[Op]] = field(default_factory=list)
    only_stored: bool = False


@dataclass
class Kernel:
    pointers: list[str]
    body: list[Op]


def parse(ttgir: str) -> Kernel:
    layouts = dict(re.findall(r"^(#\w+) = (#(?:ttg|ttng|amd\w*)\..*)$", ttgir, re.M))
    places = _places(ttgir)
    lines = ttgir.splitlines()
    starts = [number for number, line in enumerate(lines) if line.lstrip().startswith("tt.func ")]
    if len(starts) != 1:
        raise Unchecked(f"expected one function, got {len(starts)}")
    pointers = re.findall(r"%(\w+): !tt\.ptr<", lines[starts[0]])
    body, _ = _parse_block(iter(lines[starts[0] + 1 :]), layouts, places)
    _find_only_stored(body)
    return Kernel(pointers, body)


def _parse_block(lines: Iterator[str], layouts: dict[str, str], places: dict[str, str]) -> tuple[list[Op], str]:
    """The operations up to the brace that closes the block, and the line of that brace."""
    ops: list[Op] = []
    for line in lines:
        line = line.strip()
        if line.startswith("}"):
            return ops, line
        if not line or line.startswith("^"):
            continue
        op = _parse_op(line, layouts, places)
        end = line
        while end.endswith("{"):
            region, end = _parse_block(lines, layouts, places)
            op.regions.append(region)
            op.site = _site(end.partition(" loc(")[2], places)
        ops.append(op)
    return ops, ""


def _parse_op(line: str, layouts: dict[str, str], places: dict[str, str]) -> Op:
    line, _, place = line.partition(" loc(")
    match = re.match(rf'(?:({NAME}(?:, {NAME})*)(?::(\d+))? = )?"?([\w.]+)"?(.*)', line)
    if not match:
        raise Unchecked(f"cannot read {line!r}")
    result, count, name, text = match.groups()
    results = [f"{result}#{i}" for i in range(int(count))] if count else result.split(", ") if result else []
    shape, layout = _tensor_type(text)
    while (alias := re.search(r"#\w+\b(?!\.)", layout)) and alias[0] in layouts:
        layout = layout.replace(alias[0], layouts[alias[0]])
    return Op(results, name, text, re.findall(NAME, text), shape, layout, _site(place, places))


def _find_only_stored(body: list[Op]) -> None:
    """Mark values that are computed, element by element, only to be stored: no other thread ever sees them."""
    ops = list(_nested(body))
    users: dict[str, list[Op]] = {}
    for op in ops:
        for name in op.operands:
            users.setdefault(name, []).append(op)
    for op in reversed(ops):  # users come after what they use, except for what a loop carries, which a yield uses
        op.only_stored = bool(op.results) and all(
            (user.name == "tt.store" and user.operands[1] == result)
            or (user.name.endswith(".buffer_store") and user.operands[0] == result)
            or (user.name.startswith(("arith.", "math.")) and user.only_stored)
            for result in op.results
            for user in users.get(result, [])
        )


def _nested(ops: list[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from _nested(region)


def _tensor_type(text: str) -> tuple[tuple[int, ...], str]:
    """Shape and layout of the last tensor type in the text; () and "" for a scalar."""
    start = text.rfind("tensor<")
    if start < 0:
        return (), ""
    depth, comma, end = 0, None, start
    for end in range(start, len(text)):
        depth += (text[end] == "<") - (text[end] == ">" and text[end - 1] != "-")
        if depth == 1 and text[end] == "," and comma is None:
            comma = end
        if depth == 0 and text[end] == ">":
            break
    dims = re.match(r"tensor<((?:\d+x)*)", text[start:])
    shape = tuple(map(int, dims[1].split("x")[:-1])) if dims else ()
    return shape, text[comma + 1 : end].strip() if comma else ""


def _places(ttgir: str) -> dict[str, str]:
    return dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))


def _site(place: str, places: dict[str, str]) -> str:
    """File and line of a location, the innermost of inlined calls."""
    while "#loc" in place:
        inner = re.search(r"#loc\d*", place)
        if not inner or inner[0] not in places:
            break
        place = places[inner[0]]
    match = re.search(r'"([^"]*)":(\d+)', place)
    return f"{match[1].rpartition('/')[2]}:{match[2]}" if match else "an unknown place"


# --- who holds what ---------------------------------------------------------------------------------------------------


@cache
def holders(layout: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last thread that hold each element of a flattened tensor, different if several do; None if unknown."""
    if not shape:
        return np.zeros(1, int), np.full(1, np.iinfo(int).max)
    if match := re.match(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$", layout):
        dim = int(match[1])
        return holders(match[2], (*shape[:dim], 1, *shape[dim:]))
    if layout.startswith("#ttg.blocked<"):
        return _blocked_holders(layout, shape)
    if layout.startswith("#ttg.linear<"):
        return _linear_holders(layout, shape)
    return None


def _blocked_holders(layout: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    registers, lanes, warps, order = (
        [int(number) for number in re.search(rf"{key} = \[([\d, ]*)\]", layout)[1].split(",")]  # type: ignore[index]
        for key in ("sizePerThread", "threadsPerWarp", "warpsPerCTA", "order")
    )
    first, last = np.zeros(shape, int), np.zeros(shape, int)
    lane_stride, warp_stride = 1, int(np.prod(lanes))
    for dim in order:
        at = np.arange(shape[dim]).reshape([-1 if axis == dim else 1 for axis in range(len(shape))]) // registers[dim]
        for count, stride in ((lanes[dim], lane_stride), (warps[dim], warp_stride)):
            # With more threads than elements, further threads hold the elements again.
            distinct = min(count, int(at.max()) + 1)
            first += at % count * stride
            last += (at % count + count - distinct) * stride
            at = at // count
        lane_stride *= lanes[dim]
        warp_stride *= warps[dim]
    return first.ravel(), last.ravel()


def _linear_holders(layout: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    def flat(key: str) -> list[int]:
        """The place in the flat tensor to which each bit of a register, lane or warp number leads."""
        bases = re.search(rf"{key} = \[((?:\[[\d, ]*\](?:, )?)*)\]", layout)
        places = re.findall(r"\[([\d, ]+)\]", bases[1]) if bases else []
        return [int(np.ravel_multi_index([int(i) for i in place.split(",")], shape)) for place in places]

    def spread(bits: list[int]) -> np.ndarray:
        places = np.zeros(1, int)
        for bit in bits:
            places = np.concatenate([places, places ^ bit])
        return places

    # Sizes are powers of two: bits of the flat index are bits of the indices along the axes.
    thread_places = spread(flat("lane") + flat("warp"))
    size = int(np.prod(shape))
    first, last = np.full(size, np.iinfo(int).max), np.full(size, -1)
    for register_place in spread(flat("register")):
        np.minimum.at(first, thread_places ^ register_place, np.arange(len(thread_places)))
        np.maximum.at(last, thread_places ^ register_place, np.arange(len(thread_places)))
    return first, last
