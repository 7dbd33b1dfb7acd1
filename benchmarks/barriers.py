"""Is there a barrier wherever one thread of a kernel touches what another one wrote?

The interpreter runs a program's operations one after the other and so does not notice a missing `tl.debug_barrier`; a
GPU may, once in a million runs. This reads the compiler's intermediate code (TTGIR: after software pipelining has moved
loads, and with a layout on every tensor, which says what thread holds what element) and walks through it as a program
of the grid would. Integers are computed as they would be there: sizes, program ids and loop bounds are constants, so
the places that each thread reads and writes are known exactly, down to the parts of a buffer and the slots that a mask
lets through. Floating point is not computed, and what is loaded is known only from a buffer whose contents are given:
the walk is then the one for these contents. An address that depends on anything else may be anywhere in its buffer.

A race is a pair of accesses to one place, one of them a store, by different threads, with no barrier between. Barriers
that the compiler puts in for its own shared memory do not count, for they come and go with the layouts. Threads of one
warp count as different threads. Where several threads hold an element, the first of them stores it, but all load it:
the others may find there what the first has stored meanwhile. That does no harm if they would only store it.

Buffers of different arguments are taken not to overlap. What cannot be followed raises `Unchecked`: there is no silent
pass.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

NAME = r"%[\w$.\-]+(?:#\d+)?"
BARRIERS = ("ttg.barrier all", "gpu.barrier")  # what tl.debug_barrier becomes in Triton 3.7 and in 3.6


class Unchecked(Exception):
    """The code does something that this module does not understand."""


def races(
    ttgir: str, grid: tuple[int, ...] = (1,), arguments: Mapping[str, int | Sequence[int]] | None = None
) -> list[str]:
    """What is wrong with a kernel, in words; nothing if all is well.

    Walks through the first program, and along each axis of the grid through the second and the last, then compares the
    places they touch: what one stores no other may touch, for programs run in any order and at the same time.

    Args:
        ttgir: of one kernel, as in `triton.compile(...).asm["ttgir"]`.
        grid: how many programs there are along each axis.
        arguments: what is known, by name: the kernel's integers; of a buffer the integers that it holds, or how many
            numbers lie before the one that the argument points to.

    Raises:
        Unchecked: the code has an operation, a loop bound or an access that cannot be followed.
    """
    kernel = _parse(ttgir)
    origin = (0,) * len(grid)
    programs = {origin: None}  # in order
    for axis, size in enumerate(grid):
        for place in (min(1, size - 1), size - 1):
            programs[(*origin[:axis], place, *origin[axis + 1 :])] = None
    walks = [_Walk(kernel, program, arguments or {}) for program in programs]
    found = [race for walk in walks for race in walk.races]
    found += [clash for one, other in itertools.permutations(walks, 2) for clash in one.clashes(other)]
    return list(dict.fromkeys(found))


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
class _Op:
    """An operation as it is printed: `%result:2 = name text {regions}`."""

    results: list[str]
    name: str
    text: str
    operands: list[str]
    shape: tuple[int, ...]
    layout: str
    site: str = ""
    regions: list[list[_Op]] = field(default_factory=list)
    only_stored: bool = False


@dataclass
class _Kernel:
    pointers: list[str]
    body: list[_Op]


def _parse(ttgir: str) -> _Kernel:
    layouts = dict(re.findall(r"^(#\w+) = (#(?:ttg|ttng|amd\w*)\..*)$", ttgir, re.M))
    places = _places(ttgir)
    lines = ttgir.splitlines()
    starts = [number for number, line in enumerate(lines) if line.lstrip().startswith("tt.func ")]
    if len(starts) != 1:
        raise Unchecked(f"expected one function, got {len(starts)}")
    pointers = re.findall(r"%(\w+): !tt\.ptr<", lines[starts[0]])
    body, _ = _parse_block(iter(lines[starts[0] + 1 :]), layouts, places)
    _find_only_stored(body)
    return _Kernel(pointers, body)


def _parse_block(lines: Iterator[str], layouts: dict[str, str], places: dict[str, str]) -> tuple[list[_Op], str]:
    """The operations up to the brace that closes the block, and the line it stands in."""
    ops: list[_Op] = []
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


def _parse_op(line: str, layouts: dict[str, str], places: dict[str, str]) -> _Op:
    line, _, place = line.partition(" loc(")
    match = re.match(rf'(?:({NAME})(?::(\d+))? = )?"?([\w.]+)"?(.*)', line)
    if not match:
        raise Unchecked(f"cannot read {line!r}")
    result, count, name, text = match.groups()
    results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
    shape, layout = _tensor_type(text)
    while (alias := re.search(r"#\w+\b(?!\.)", layout)) and alias[0] in layouts:
        layout = layout.replace(alias[0], layouts[alias[0]])
    return _Op(results, name, text, re.findall(NAME, text), shape, layout, _site(place, places))


def _find_only_stored(body: list[_Op]) -> None:
    """Mark what is computed, element by element, only to be stored: no other thread will ever see it."""
    ops = list(_nested(body))
    users: dict[str, list[_Op]] = {}
    for op in ops:
        for name in op.operands:
            users.setdefault(name, []).append(op)
    for op in reversed(ops):  # users come after what they use, except for what a loop carries, and that is a yield
        op.only_stored = bool(op.results) and all(
            (user.name == "tt.store" and user.operands[1] == result)
            or (user.name.endswith(".buffer_store") and user.operands[0] == result)
            or (user.name.startswith(("arith.", "math.")) and user.only_stored)
            for result in op.results
            for user in users.get(result, [])
        )


def _nested(ops: list[_Op]) -> Iterator[_Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from _nested(region)


def _tensor_type(text: str) -> tuple[tuple[int, ...], str]:
    """Shape and layout of the last tensor type in the text; of a scalar () and nothing."""
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
def _holders(layout: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last thread that hold each element of a tensor, flat; they differ where several do. None: unknown."""
    if not shape:
        return np.zeros(1, int), np.full(1, np.iinfo(int).max)
    if match := re.match(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$", layout):
        dim = int(match[1])
        return _holders(match[2], (*shape[:dim], 1, *shape[dim:]))
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
            # Where the tensor ends before the threads do, these hold it again.
            distinct = min(count, int(at.max()) + 1)
            first += at % count * stride
            last += (at % count + count - distinct) * stride
            at = at // count
        lane_stride *= lanes[dim]
        warp_stride *= warps[dim]
    return first.ravel(), last.ravel()


def _linear_holders(layout: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    def flat(key: str) -> list[int]:
        """Where each bit of a register, lane or warp number moves to in the flat tensor."""
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


# --- the walk ---------------------------------------------------------------------------------------------------------


@dataclass
class _Pointer:
    """Places in a buffer, counted in elements from its start; None where they depend on data."""

    buffer: str
    offset: np.ndarray | None


@dataclass
class _Access:
    site: str
    buffer: str
    offset: np.ndarray | None
    first: np.ndarray
    last: np.ndarray
    is_store: bool


class _Touched:
    """Where a buffer has been touched since the last barrier, by which threads (first to last), and from where."""

    def __init__(self) -> None:
        self.first = np.zeros(0, int)
        self.last = np.zeros(0, int)
        self.site = np.zeros(0, int)
        self.anywhere: str | None = None

    def add(self, access: _Access, site: int) -> None:
        if access.offset is None:
            self.anywhere = access.site
            return
        if access.offset.size and access.offset.max() >= len(self.first):
            more = max(int(access.offset.max()) + 1 - len(self.first), len(self.first))
            self.first = np.append(self.first, np.full(more, np.iinfo(int).max))
            self.last = np.append(self.last, np.full(more, np.iinfo(int).min))
            self.site = np.append(self.site, np.full(more, -1))
        np.minimum.at(self.first, access.offset, access.first)
        np.maximum.at(self.last, access.offset, access.last)
        self.site[access.offset] = site

    def conflicts(self, access: _Access) -> set[int | str]:
        """Sites of earlier accesses, to the same places, by other threads."""
        sites: set[int | str] = {self.anywhere} if self.anywhere is not None else set()
        if access.offset is None:
            return sites | set(self.site[self.site >= 0].tolist())
        known = access.offset < len(self.first)
        offset, first, last = access.offset[known], access.first[known], access.last[known]
        before = self.site[offset]
        same_thread = (self.first[offset] == first) & (self.last[offset] == last) & (first == last)
        return sites | set(before[(before >= 0) & ~same_thread].tolist())


class _Walk:
    """One program's way through a kernel: its races, and all the places it loads from and stores to."""

    def __init__(self, kernel: _Kernel, program: tuple[int, ...], arguments: Mapping[str, int | Sequence[int]]) -> None:
        self.program = program
        self.races: list[str] = []
        self.touched: dict[tuple[str, bool], _Touched] = {}  # by buffer and whether it is stores
        self.ever: dict[tuple[str, bool], _Touched] = {}
        self.sites: list[str] = []
        self.copies: list[list[_Access]] = [[]]  # asynchronous copies under way, in groups, the last one still open
        self.branches = 0  # how many branches deep it is whose condition depends on data
        self.strangers = -1  # the next number for a thread that is not known
        given = {name: np.array(arguments.get(name, 0)) for name in kernel.pointers}
        self.contents = {name: value for name, value in given.items() if value.ndim}
        self.values: dict[str, Any] = {f"%{name}": np.array(value) for name, value in arguments.items()}
        for name, value in given.items():
            self.values[f"%{name}"] = _Pointer(name, np.zeros((), int) if value.ndim else value)
        self.block(kernel.body)

    def block(self, ops: list[_Op]) -> list[Any]:
        """Walk through a block. Returns what it yields."""
        for op in ops:
            if op.name in ("scf.yield", "tt.return"):
                return [self.values.get(name) for name in op.operands]
            results = self.step(op)
            self.values.update(zip(op.results, results or [None] * len(op.results), strict=True))
        return []

    def step(self, op: _Op) -> list[Any] | None:
        """Walk through an operation. Returns its results, or nothing if they are not known."""
        operands = [self.values.get(name) for name in op.operands]
        if op.name == "scf.for":
            return self.loop(op)
        if op.name == "scf.if":
            return self.branch(op, operands[0])
        if op.name == "tt.get_program_id":
            axis = "xyz".index(op.text.split()[0])
            return [np.array(self.program[axis] if axis < len(self.program) else 0)]
        if op.name + op.text in BARRIERS:
            self.barrier()
        elif op.name == "tt.store":
            self.access(op, operands[0], operands[2] if len(operands) > 2 else None)
        elif op.name == "tt.load":
            self.access(op, operands[0], operands[1] if len(operands) > 1 else None)
            return [self.loaded(*operands)]
        elif op.name == "ttg.async_copy_global_to_local":
            match = re.search(rf" mask ({NAME})", op.text)
            self.copies[-1].append(self.access(op, operands[0], self.values.get(match[1]) if match else None))
        elif op.name == "ttg.async_commit_group":
            self.copies.append([])
        elif op.name == "ttg.async_wait":
            left = re.search(r"num = (\d+)", op.text)
            self.copies = self.copies[-1 - int(left[1]) :] if left else self.copies
        elif op.name in ("amdg.buffer_load", "amdgpu.buffer_load", "amdg.buffer_store", "amdgpu.buffer_store"):
            match = re.search(rf"({NAME})\[({NAME})\](?:, ({NAME}))?", op.text)
            if not match:
                raise Unchecked(f"{op.name} {op.text}")
            base, offset, mask = (self.values.get(name) if name else None for name in match.groups())
            self.access(op, _add_pointer(base, offset), mask)
        elif op.name in _VALUES:
            return [_VALUES[op.name](op, *operands)]
        elif any(isinstance(operand, _Pointer) for operand in operands):
            raise Unchecked(f"{op.name} of a pointer, {op.site}")
        elif op.name.startswith("cf.") or (
            op.regions and op.name not in ("tt.reduce", "tt.scan", "tt.map_elementwise")
        ):
            raise Unchecked(f"{op.name}, {op.site}")
        return None

    def loop(self, op: _Op) -> list[Any]:
        match = re.match(rf" ({NAME}) = ({NAME}) to ({NAME}) step ({NAME})", op.text)
        bounds: list[Any] = [self.values.get(name) for name in match.groups()[1:]] if match else []
        if not match or any(bound is None for bound in bounds):
            raise Unchecked(f"the bounds of the loop at {op.site} are not constant")
        carried = re.search(r"iter_args\((.*?)\) ->", op.text)
        names = re.findall(rf"({NAME}) = ({NAME})", carried[1]) if carried else []
        state = [self.values.get(start) for _, start in names]
        for index in range(*map(int, bounds)):
            self.values[match[1]] = np.array(index)
            self.values.update(zip((name for name, _ in names), state, strict=True))
            state = self.block(op.regions[0])
        return state

    def branch(self, op: _Op, condition: np.ndarray | None) -> list[Any] | None:
        if condition is not None:
            taken = op.regions[:1] if condition else op.regions[1:]
            return self.block(taken[0]) if taken else None
        self.branches += 1  # either may be taken, so both are, and a barrier in one of them is none
        for region in op.regions:
            self.block(region)
        self.branches -= 1
        return None

    def barrier(self) -> None:
        if self.branches:
            return
        self.touched.clear()
        for access in itertools.chain(*self.copies):  # a copy under way may load now or later
            self.add(access)

    def access(self, op: _Op, pointer: Any, mask: np.ndarray | None) -> _Access:
        """Note an access, and what it races with."""
        if not isinstance(pointer, _Pointer):
            raise Unchecked(f"an unknown pointer, {op.site}")
        is_store = "store" in op.name
        if is_store and pointer.buffer in self.contents:
            raise Unchecked(f"{op.site} stores to {pointer.buffer}, whose contents are given")
        holders = _holders(op.layout, op.shape)
        if holders is None or "async" in op.name:  # by strangers: an asynchronous copy keeps no thread's order
            size = int(np.prod(op.shape))
            self.strangers -= size
            first = last = np.arange(size) + self.strangers
        else:
            first, last = holders[0], holders[0] if is_store or op.only_stored else holders[1]
        offset = pointer.offset
        if offset is not None:
            offset = np.broadcast_to(offset, op.shape).ravel()
            if mask is not None:
                through = np.broadcast_to(mask, op.shape).ravel()
                offset, first, last = offset[through], first[through], last[through]
            if offset.size and offset.min() < 0:
                self.races.append(f"{op.site} touches what lies before {pointer.buffer}")
                offset = np.maximum(offset, 0)
        access = _Access(op.site, pointer.buffer, offset, first, last, is_store)
        if is_store and offset is not None and len(set(offset.tolist())) < len(offset):
            alone = _Touched()
            alone.add(access, 0)
            if alone.conflicts(access):
                self.races.append(f"{op.site} stores to one place of {access.buffer} from several threads")
        for earlier_is_store in (True, False):
            earlier = self.touched.get((access.buffer, earlier_is_store))
            if earlier is not None and (is_store or earlier_is_store):
                verbs = ("stores to" if is_store else "loads from", "stored" if earlier_is_store else "loaded")
                for site in earlier.conflicts(access):
                    there = self.sites[site] if isinstance(site, int) else site
                    self.races.append(f"{op.site} {verbs[0]} {access.buffer} what {there} {verbs[1]}, with no barrier")
        self.add(access)
        self.ever.setdefault((access.buffer, is_store), _Touched()).add(access, self.site(access.site))
        return access

    def loaded(self, pointer: _Pointer, mask: Any = True, other: Any = 0) -> np.ndarray | None:
        """What a load finds, if the buffer's contents are known."""
        contents = self.contents.get(pointer.buffer)
        if contents is None or pointer.offset is None or mask is None or other is None:
            return None
        return np.where(mask, contents[np.where(mask, pointer.offset, 0)], other)

    def add(self, access: _Access) -> None:
        touched = self.touched.setdefault((access.buffer, access.is_store), _Touched())
        touched.add(access, self.site(access.site))

    def site(self, name: str) -> int:
        if name not in self.sites:
            self.sites.append(name)
        return self.sites.index(name)

    def clashes(self, other: _Walk) -> Iterator[str]:
        """Places that this program stores to and another one touches. Those that depend on data are left out."""
        for (buffer, is_store), mine in self.ever.items():
            for its_is_store in (True, False) if is_store else ():
                its = other.ever.get((buffer, its_is_store), _Touched())
                size = min(len(mine.site), len(its.site))
                both = (mine.site[:size] >= 0) & (its.site[:size] >= 0)
                for here, there in {*zip(mine.site[:size][both].tolist(), its.site[:size][both].tolist(), strict=True)}:
                    verb = "stores" if its_is_store else "loads"
                    yield (
                        f"{self.sites[here]} stores to {buffer} in program {self.program} "
                        f"what {other.sites[there]} {verb} in program {other.program}"
                    )


# --- integers and pointers --------------------------------------------------------------------------------------------


def _add_pointer(pointer: Any, offset: np.ndarray | None) -> _Pointer | None:
    if not isinstance(pointer, _Pointer):
        return None
    if pointer.offset is None or offset is None:
        return _Pointer(pointer.buffer, None)
    return _Pointer(pointer.buffer, pointer.offset + offset)


def _constant(op: _Op) -> np.ndarray | None:
    match = re.match(r" (?:dense<)?(true|false|-?\d+)>?(?: : (.*))?$", op.text)
    if not match or (match[2] and not re.search(r"\b(?:\d+x)*(?:i\d+|index)\b", match[2])):
        return None
    value = match[1] == "true" if match[1] in ("true", "false") else int(match[1])
    return np.full(op.shape, value)


def _make_range(op: _Op) -> np.ndarray:
    start, end = (int(re.search(rf"{key} = (\d+)", op.text)[1]) for key in ("start", "end"))  # type: ignore[index]
    return np.arange(start, end)


def _moved(move: Callable[[_Op, np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """An operation that leaves values as they are but for where they stand, of integers or of pointers."""

    def value(op: _Op, operand: Any) -> Any:
        if isinstance(operand, _Pointer):
            return _Pointer(operand.buffer, None if operand.offset is None else move(op, operand.offset))
        return None if operand is None else move(op, operand)

    return value


def _of_integers(compute: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose result is known where all its operands are."""

    def value(op: _Op, *operands: Any) -> Any:
        if any(isinstance(operand, _Pointer) for operand in operands):
            raise Unchecked(f"{op.name} of a pointer, {op.site}")
        return None if any(operand is None for operand in operands) else compute(*operands)

    return value


def _compare(op: _Op, left: Any, right: Any) -> Any:
    comparison = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
    predicate = op.text.split(",")[0].strip()
    if left is None or right is None:
        return None
    if predicate.startswith("u") and (np.any(left < 0) or np.any(right < 0)):
        return None
    return getattr(operator, comparison[predicate.lstrip("us")])(left, right)


def _select(op: _Op, condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(yes, _Pointer) or isinstance(no, _Pointer):
        if condition is None or condition.ndim:
            raise Unchecked(f"{op.name} of pointers, {op.site}")
        return yes if condition else no
    return None if condition is None or yes is None or no is None else np.where(condition, yes, no)


def _extend(op: _Op, value: Any) -> Any:
    if value is None or value.dtype != bool:
        return value
    return -value.astype(int) if op.name == "arith.extsi" else value.astype(int)


def _truncate(op: _Op, value: Any) -> Any:
    return (value & 1).astype(bool) if value is not None and re.search(r"\bto (.*x)?i1\b", op.text) else value


def _transposed(op: _Op, value: np.ndarray) -> np.ndarray:
    order = re.search(r"order = array<i32: ([\d, ]+)>", op.text)
    return value.transpose([int(axis) for axis in order[1].split(",")]) if order else value.T


def _divide(left: Any, right: Any) -> Any:
    return np.sign(left) * np.sign(right) * (np.abs(left) // np.abs(right))


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": np.left_shift,
    "shrsi": np.right_shift,
    "divsi": _divide,
    "remsi": lambda left, right: left - right * _divide(left, right),
    "maxsi": np.maximum,
    "minsi": np.minimum,
}
_VALUES: dict[str, Callable[..., Any]] = {
    "arith.constant": _constant,
    "tt.make_range": _make_range,
    "tt.splat": _moved(lambda op, value: np.full(op.shape, value)),
    "tt.broadcast": _moved(lambda op, value: np.broadcast_to(value, op.shape)),
    "tt.expand_dims": _moved(lambda op, value: value.reshape(op.shape)),
    "tt.reshape": _moved(lambda op, value: value.reshape(op.shape)),
    "tt.trans": _moved(_transposed),
    "ttg.convert_layout": _moved(lambda op, value: value),
    "tt.addptr": lambda op, pointer, offset: _add_pointer(pointer, offset),
    "arith.cmpi": _compare,
    "arith.select": _select,
    "arith.extsi": _extend,
    "arith.extui": _extend,
    "arith.trunci": _truncate,
    "arith.index_cast": lambda op, value: value,
    **{f"arith.{name}": _of_integers(compute) for name, compute in _ARITHMETIC.items()},
}
