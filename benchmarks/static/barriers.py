"""Is there a barrier wherever one thread of a kernel accesses what another one wrote?

The interpreter runs a program's operations one after the other and so does not notice a missing `tl.debug_barrier`; a
GPU may, once in a million runs. This reads the compiler's intermediate code (TTGIR: after software pipelining has moved
loads, and with a layout on every tensor, which says which thread holds which element) and walks through it as a program
of the grid would. Integers are computed as they would be there: sizes, program ids and loop bounds are constants, so
the places that each thread reads and writes are known exactly, down to the parts of a buffer and the slots that a mask
lets through. Floating point is not computed, and loaded values are known only from buffers whose contents are given:
the walk is then that for these contents. An address that depends on anything else may be anywhere in its buffer.

A race is a pair of accesses to one place, one of them a store, by different threads, with no barrier between. Barriers
that the compiler inserts for its own shared memory do not count, as they come and go with the layouts. Threads of one
warp count as different threads. Where several threads hold an element, the first of them stores it, but all load it:
the others may load what the first has stored meanwhile. That does no harm if they would only store it.

Buffers of different arguments are assumed not to overlap. What cannot be followed raises `Unchecked`: nothing passes
silently.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.static.ttgir import BARRIERS, NAME, Kernel, Op, Unchecked, holders, parse
from benchmarks.static.values import VALUES, Pointer, add_pointer


def races(
    ttgir: str, grid: tuple[int, ...] = (1,), arguments: Mapping[str, int | Sequence[int]] | None = None
) -> list[str]:
    """What is wrong with a kernel, in words; nothing if all is well.

    Walks through the first program, and along each axis of the grid through the second and the last, then compares the
    places they access: what one stores no other may access, as programs run in any order and at the same time.

    Args:
        ttgir: of one kernel, as in `triton.compile(...).asm["ttgir"]`.
        grid: how many programs there are along each axis.
        arguments: what is known, by name: the kernel's integers; for a buffer the integers that it holds, or how many
            numbers precede the one that the argument points to.

    Raises:
        Unchecked: the code has an operation, a loop bound or an access that cannot be followed.
    """
    kernel = parse(ttgir)
    origin = (0,) * len(grid)
    programs = {origin: None}  # in order
    for axis, size in enumerate(grid):
        for place in (min(1, size - 1), size - 1):
            programs[(*origin[:axis], place, *origin[axis + 1 :])] = None
    walks = [_Walk(kernel, program, arguments or {}) for program in programs]
    found = [race for walk in walks for race in walk.races]
    found += [clash for one, other in itertools.permutations(walks, 2) for clash in one.clashes(other)]
    return list(dict.fromkeys(found))


@dataclass
class _Access:
    site: str
    buffer: str
    offset: np.ndarray | None
    first: np.ndarray
    last: np.ndarray
    is_store: bool


class _Touched:
    """The places of a buffer accessed since the last barrier, by which threads (first to last), and from which site."""

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
        """Sites of earlier accesses to the same places by other threads."""
        sites: set[int | str] = {self.anywhere} if self.anywhere is not None else set()
        if access.offset is None:
            return sites | set(self.site[self.site >= 0].tolist())
        known = access.offset < len(self.first)
        offset, first, last = access.offset[known], access.first[known], access.last[known]
        before = self.site[offset]
        same_thread = (self.first[offset] == first) & (self.last[offset] == last) & (first == last)
        return sites | set(before[(before >= 0) & ~same_thread].tolist())


class _Walk:
    """One program's way through a kernel: its races, and all places that it loads from and stores to."""

    def __init__(self, kernel: Kernel, program: tuple[int, ...], arguments: Mapping[str, int | Sequence[int]]) -> None:
        self.program = program
        self.races: list[str] = []
        self.touched: dict[tuple[str, bool], _Touched] = {}  # by buffer and whether by stores
        self.ever: dict[tuple[str, bool], _Touched] = {}
        self.sites: list[str] = []
        self.copies: list[list[_Access]] = [[]]  # asynchronous copies in flight, in groups; the last is open
        self.branches = 0  # how many enclosing branches have a condition that depends on data
        self.strangers = -1  # the next number for an unknown thread
        given = {name: np.array(arguments.get(name, 0)) for name in kernel.pointers}
        self.contents = {name: value for name, value in given.items() if value.ndim}
        self.values: dict[str, Any] = {f"%{name}": np.array(value) for name, value in arguments.items()}
        for name, value in given.items():
            self.values[f"%{name}"] = Pointer(name, np.zeros((), int) if value.ndim else value)
        self.block(kernel.body)

    def block(self, ops: list[Op]) -> list[Any]:
        """Walk through a block. Returns what it yields."""
        for op in ops:
            if op.name in ("scf.yield", "tt.return"):
                return [self.values.get(name) for name in op.operands]
            results = self.step(op)
            self.values.update(zip(op.results, results or [None] * len(op.results), strict=True))
        return []

    def step(self, op: Op) -> list[Any] | None:
        """Walk through an operation. Returns its results, or None if they are not known."""
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
        elif op.name in ("amdg.buffer_load", "amdg.buffer_store"):
            match = re.search(rf"({NAME})\[({NAME})\](?:, ({NAME}))?", op.text)
            if not match:
                raise Unchecked(f"{op.name} {op.text}")
            base, offset, mask = (self.values.get(name) if name else None for name in match.groups())
            self.access(op, add_pointer(base, offset), mask)
        elif op.name in VALUES:
            return [VALUES[op.name](op, *operands)]
        elif any(isinstance(operand, Pointer) for operand in operands):
            raise Unchecked(f"{op.name} of a pointer, {op.site}")
        elif op.name.startswith("cf.") or (
            op.regions and op.name not in ("tt.reduce", "tt.scan", "tt.map_elementwise")
        ):
            raise Unchecked(f"{op.name}, {op.site}")
        return None

    def loop(self, op: Op) -> list[Any]:
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

    def branch(self, op: Op, condition: np.ndarray | None) -> list[Any] | None:
        if condition is not None:
            taken = op.regions[:1] if condition else op.regions[1:]
            return self.block(taken[0]) if taken else None
        self.branches += 1  # either may be taken, so both are; a barrier in them does not count
        for region in op.regions:
            self.block(region)
        self.branches -= 1
        return None

    def barrier(self) -> None:
        if self.branches:
            return
        self.touched.clear()
        for access in itertools.chain(*self.copies):  # a copy in flight may load now or later
            self.add(access)

    def access(self, op: Op, pointer: Any, mask: np.ndarray | None) -> _Access:
        """Record an access, and the races it is part of."""
        if not isinstance(pointer, Pointer):
            raise Unchecked(f"an unknown pointer, {op.site}")
        is_store = "store" in op.name
        if is_store and pointer.buffer in self.contents:
            raise Unchecked(f"{op.site} stores to {pointer.buffer}, whose contents are given")
        held = holders(op.layout, op.shape)
        if held is None or "async" in op.name:  # unknown threads: an asynchronous copy keeps no thread's order
            size = int(np.prod(op.shape))
            self.strangers -= size
            first = last = np.arange(size) + self.strangers
        else:
            first, last = held[0], held[0] if is_store or op.only_stored else held[1]
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

    def loaded(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> np.ndarray | None:
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
        """Places that this program stores to and another one accesses. Those that depend on data are left out."""
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
