"""Run the PTX that Triton compiles a kernel to, on the CPU: a block of threads at a time, its threads as NumPy arrays.

What Triton's interpreter does not show is here: which products and sums are fused into one rounding, which thread does
what, and where the compiler put barriers and shuffles. While a kernel runs, `Mistake` is raised:

- outside: an access is not inside of a buffer, or not aligned.
- divergent: a barrier is not reached by all threads at once, or what a warp does together not by all of it.
- uninitialised: a thread loads bytes of shared memory that nobody wrote, or elements of global memory that still hold
  the poison, 0xFF in every byte, with which buffers begin.
- race: between two barriers of a block, a thread writes what another thread reads or writes. Threads that write the
  value that is there already are let off, and so are threads of one warp that in one instruction write to one place:
  which of them wins is not said, but the same each time.

What it is not: the machine code that ptxas makes of PTX, which may fuse products and sums that are still apart. A
device, whose approximate instructions (ex2, div.full, sqrt.approx) err by an ulp or two; here they are rounded
correctly. A clock. And nothing is known of races between blocks, which run one after the other. An instruction that is
not here raises `Unsupported`: the kernels need few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from arithmetic import (
    COMPARISONS,
    DTYPES,
    FLOATS,
    SAME_TYPE,
    Array,
    Unsupported,
    check,
    flush,
    from_bf16,
    shift,
    to_bf16,
    unchanged,
)

Mask = Array | None  # of active threads; None: all of them
Runner = Callable[[Mask], Any]  # an instruction, for the threads of a mask

WARP = 32
SHARED_BASE = 0x400  # where shared memory begins, of the 32-bit addresses that reach it
GLOBAL_BASE = 0x7F12_3400_0000
GUARD = 1 << 14  # bytes between two buffers
POISON = 0xFF


class Mistake(AssertionError):
    """What a kernel must not do."""


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


# --- reading it -------------------------------------------------------------------------------------------------------


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
        elif instruction := re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.]*)\s*(.*)", statement, re.DOTALL):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", instruction[3])
            operands = [x.strip() for x in operands if x.strip()]
            program.instructions.append(Instruction(instruction[2], operands, instruction[1] or "", place))
        else:
            check(not statement or statement.startswith(".pragma"), statement)


def _names(operand: str) -> list[str]:
    """Of "{%r1, %r2}" or "%r1"."""
    return [x.strip() for x in operand.strip("{} ").split(",")]


# --- memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """Bytes, and for each `grain` of them whether they are there, who wrote and who read them since the last barrier.

    A writer or reader is `epoch * 1024 + thread`; the epoch goes up at each barrier. 1023 stands for several readers.
    """

    SEVERAL = 1023

    def __init__(self, name: str, base: int, size: int, grain: int) -> None:
        self.name, self.base, self.size, self.grain = name, base, size, grain
        self.bytes = np.full(size, POISON, "u1")
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        grains = size // grain
        self.there = np.ones(grains, bool)
        self.written = np.zeros(grains, bool)
        self.writer, self.reader = np.full(grains, -1), np.full(grains, -1)

    def offsets(self, addresses: Array, size: int, what: Instruction) -> Array:
        """Of accesses that are all right."""
        offsets = addresses.astype("i8") - self.base
        inside = (offsets >= 0) & (offsets + size <= self.size)
        if inside.all():
            inside = self.there[offsets // self.grain] & self.there[(offsets + size - 1) // self.grain]
        if not inside.all():
            raise Mistake(f"outside: {what}: {(~inside).sum()} threads outside of any {self.name} buffer")
        if (offsets % size).any():
            raise Mistake(f"outside: {what}: not aligned to {size} bytes")
        return offsets

    def grains(self, offsets: Array, size: int) -> Array:
        """[threads, grains of an access]."""
        return (offsets // self.grain)[:, None] + np.arange(size // self.grain)

    def get(self, offsets: Array, size: int, count: int) -> Array:
        return self.views[size][(offsets // size)[:, None] + np.arange(count)]

    def put(self, offsets: Array, values: Array) -> bool:
        """[threads, count]. False if threads that write to the same place do not agree."""
        size = values.dtype.itemsize
        places = (offsets // size)[:, None] + np.arange(values.shape[1])
        self.views[size][places] = values
        return bool((self.views[size][places] == values).all())


# --- running it -------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A buffer to the middle of which an argument points, and of which some pieces are the kernel's.

    Attributes:
        buffer: of unsigned integers.
        at: bytes from its beginning to where the argument points.
        pieces: from and to which byte.
    """

    buffer: Array
    at: int
    pieces: list[tuple[int, int]]


class Launch:
    """A launch of a program: `Launch(...)` with everything in place, then `block` for each of the grid, then `finish`.

    Args:
        program: what to run.
        arguments: per parameter an integer, or a buffer as an array of unsigned integers, which is written to, or a
            window on one, which is not.
        shared: bytes of shared memory.
        grid: how many blocks there are, by axis.
    """

    def __init__(
        self, program: Program, arguments: Sequence[Any], shared: int, grid: Sequence[int] = (1, 1, 1)
    ) -> None:
        self.program, self.threads = program, program.threads
        widths = [re.fullmatch(r"(?:ld|st)\.(?:global|shared).*?\.[bsuf](\d+)", i.op) for i in program.instructions]
        grain = min([4, *(int(width[1]) // 8 for width in widths if width)])
        self._allocate(arguments, grain)
        self.shared = Memory("shared", SHARED_BASE, -(-shared // 16) * 16, grain)
        self.thread = np.arange(self.threads)
        self.lane = self.thread % WARP
        self.registers: dict[str, Array] = {}
        self.special = {f"%{name}.{axis}": np.zeros(self.threads, "u4") for name in ("tid", "ctaid") for axis in "xyz"}
        self.special["%tid.x"][:] = self.thread
        self.special |= {f"%nctaid.{axis}": np.array(count, "u4") for axis, count in zip("xyz", grid, strict=False)}
        self.epoch = 0
        with np.errstate(all="ignore"):
            self.code = [self._bind(instruction) for instruction in program.instructions]

    def _allocate(self, arguments: Sequence[Any], grain: int) -> None:
        """Lay the buffers out in one memory, as aligned as they are, with gaps between them."""
        windows = [Window(x, 0, [(0, x.nbytes)]) if isinstance(x, np.ndarray) else x for x in arguments]
        places, self.arguments, end = [], [], GUARD
        for window in windows:
            if not isinstance(window, Window):
                self.arguments.append(window)
                continue
            start = -(-end // 256) * 256 + window.buffer.ctypes.data % 256
            places.append((start, window))
            self.arguments.append(GLOBAL_BASE + start + window.at)
            end = start + window.buffer.nbytes + GUARD
        self.places = [(start, window.buffer) for start, window in places if window.at == 0]
        self.memory = memory = Memory("global", GLOBAL_BASE, -(-end // 256) * 256, grain)
        memory.there[:] = False
        for start, (buffer, _, pieces) in places:
            memory.bytes[start : start + buffer.nbytes] = buffer.view("u1")
            check(start % grain == buffer.nbytes % grain == 0, f"a buffer of {buffer.nbytes} bytes accessed by {grain}")
            for first, last in pieces:
                memory.there[(start + first) // grain : (start + last) // grain] = True
            size = max(grain, buffer.itemsize)
            written = (buffer.view("u1").reshape(-1, size) != POISON).any(1)
            memory.written[start // grain : (start + buffer.nbytes) // grain] = np.repeat(written, size // grain)

    def finish(self) -> None:
        """Write what the blocks left in memory to the buffers."""
        for start, buffer in self.places:
            buffer.view("u1")[:] = self.memory.bytes[start : start + buffer.nbytes]

    def block(self, index: Sequence[int]) -> None:
        """Run one block of the grid."""
        for axis, value in zip("xyz", index, strict=False):
            self.special[f"%ctaid.{axis}"][:] = value
        self.shared.written.fill(False)
        self.shared.bytes.fill(POISON)
        self.epoch += 1
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        """Threads that part are run from the lowest instruction up, and so meet again where they can."""
        waiting: dict[int, Array] = {0: np.ones(self.threads, bool)}
        while waiting:
            at = min(waiting)
            active = waiting.pop(at)
            mask = None if active.all() else active
            stop = min(waiting, default=len(self.code))
            while at < stop:
                jump = self.code[at](mask)
                at += 1
                if jump is None:
                    continue
                target, taken = jump  # taken: a mask, or None for all that are active
                if taken is None:
                    at = target
                    if at < stop and mask is None:
                        continue
                else:
                    waiting[target] = waiting.get(target, False) | taken
                    active = active & ~taken
                break
            if at < len(self.code):
                waiting[at] = waiting.get(at, False) | active

    # --- operands

    def register(self, name: str) -> Array:
        if name not in self.registers:
            kind = self.program.registers[name.rstrip("0123456789")]
            self.registers[name] = np.zeros(self.threads, DTYPES[kind])
        return self.registers[name]

    def source(self, text: str, kind: str) -> Array:
        """An operand's value: a view of a register, or a number."""
        check(kind in DTYPES, f"{text} as {kind}")
        dtype = DTYPES[kind]
        if text in self.special:
            return self.special[text]
        if text.startswith("%") or text in self.program.registers:
            register = self.register(text)
            parts = register.dtype.itemsize // dtype.itemsize
            check(parts > 0, f"{text} as {kind}")
            return register.view(dtype)[::parts] if register.dtype != bool else register
        if match := re.fullmatch(r"0[fFdD]([0-9A-F]{8}|[0-9A-F]{16})", text):
            return np.array(int(match[1], 16), f"u{len(match[1]) // 2}").view(dtype)
        if text == "global_smem":
            return np.array(SHARED_BASE, dtype)
        value = int(text.removesuffix("U"), 0)
        if kind == "pred":
            return np.array(value != 0)
        return np.array(value % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)

    def target(self, text: str, kind: str) -> Array:
        """The register that a value of this type goes to, widened as its sign asks if the register is wider."""
        register, dtype = self.register(text), DTYPES[kind]
        if register.dtype.itemsize == dtype.itemsize:
            return register.view(dtype)
        check(dtype.kind != "f" and register.dtype.itemsize > dtype.itemsize, f"{kind} to {text}")
        return register.view(f"{dtype.kind}{register.dtype.itemsize}")

    def address(self, text: str, kind: str) -> Callable[[], Array]:
        match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        check(match is not None, text)
        base = self.source(match[1], kind)
        offset = np.array(int(match[2] or 0) % (1 << 8 * base.dtype.itemsize), base.dtype)
        base = np.broadcast_to(base, self.threads)
        return lambda: base + offset

    def active(self, mask: Mask) -> Array:
        return self.thread if mask is None else self.thread[mask]

    # --- instructions

    def _bind(self, i: Instruction) -> Runner:
        """What runs an instruction for the threads of a mask. Returns where to go and who, if it is a jump."""
        name = i.op.split(".")[0]
        if name in ("bra", "ret"):
            return self._jump(i)
        run = getattr(self, f"_{name}", self._same_type)(i)
        if not i.predicate:
            return run
        predicate, wanted = self.register(i.predicate.lstrip("!")), not i.predicate.startswith("!")

        def predicated(mask: Mask) -> None:
            chosen = predicate == wanted
            chosen = chosen if mask is None else chosen & mask
            if chosen.any():
                run(None if chosen.all() else chosen)

        return predicated

    def _jump(self, i: Instruction) -> Runner:
        target = len(self.program.instructions) if i.op == "ret" else self.program.labels[i.operands[0]]
        if not i.predicate:
            return lambda mask: (target, None)
        predicate, wanted = self.register(i.predicate.lstrip("!")), not i.predicate.startswith("!")

        def perhaps(mask: Mask) -> Any:
            taken = predicate == wanted
            if mask is not None:
                taken = taken & mask
            count = taken.sum()
            if count == 0:
                return None
            return target, None if count == (self.threads if mask is None else mask.sum()) else taken

        return perhaps

    @staticmethod
    def _assign(target: Array, function: Callable[..., Array], *sources: Array) -> Runner:
        return lambda mask: np.copyto(target, function(*sources), where=True if mask is None else mask)

    def _computed(self, i: Instruction, function: Callable[..., Array], to: str, *of: str) -> Runner:
        """A function of all operands but the first, into that; their types, the last of them that of all others."""
        operands = zip_longest(i.operands[1:], of[: len(i.operands) - 1], fillvalue=of[-1])
        return self._assign(self.target(i.operands[0], to), function, *(self.source(x, kind) for x, kind in operands))

    def _same_type(self, i: Instruction) -> Runner:
        operation, _, kind = i.op.rpartition(".")
        function = SAME_TYPE.get(operation.removesuffix(".ftz"))
        check(function is not None and kind not in ("bf16", "f16"), i)
        if operation.endswith(".ftz") and kind == "f32":
            return self._computed(i, lambda *x: flush(function(*map(flush, x))), kind, kind)
        return self._computed(i, function, kind, kind)

    def _mul(self, i: Instruction) -> Runner:
        """Also `mad`: only of the wide ones the types differ."""
        if ".wide" not in i.op:
            return self._same_type(i)
        kind = i.op.split(".")[-1]
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        dtype = DTYPES[wide]
        return self._computed(i, lambda a, b, *c: sum(c, a.astype(dtype) * b.astype(dtype)), wide, kind, kind, wide)

    _mad = _mul

    def _abs(self, i: Instruction) -> Runner:
        if i.op in ("abs.f16", "abs.bf16"):
            return self._computed(i, lambda x: x & np.uint16(0x7FFF), "b16", "b16")
        if i.op in ("abs.f16x2", "abs.bf16x2"):
            return self._computed(i, lambda x: x & np.uint32(0x7FFF7FFF), "b32", "b32")
        return self._same_type(i)

    def _shl(self, i: Instruction) -> Runner:
        """Also `shr`."""
        operation, kind = i.op.split(".")
        return self._computed(i, lambda x, count: shift(x, count, operation == "shl"), kind, kind, "u32")

    _shr = _shl

    def _selp(self, i: Instruction) -> Runner:
        kind = i.op.split(".")[-1]
        return self._computed(i, lambda yes, no, which: np.where(which, yes, no), kind, kind, kind, "pred")

    def _setp(self, i: Instruction) -> Runner:
        _, comparison, *rest = i.op.split(".")
        check(len(rest) == 1 and comparison in COMPARISONS, i)
        compare, decode = COMPARISONS[comparison], from_bf16 if rest[0] == "bf16" else unchanged
        return self._computed(i, lambda a, b: compare(decode(a), decode(b)), "pred", rest[0])

    def _mov(self, i: Instruction) -> Runner:
        kind = i.op.split(".")[-1]
        target, source = i.operands
        if "{" not in target + source:
            return self._assign(self.target(target, kind), unchanged, self.source(source, kind))
        whole, names = (source, _names(target)) if "{" in target else (target, _names(source))
        part = f"b{int(kind[1:]) // len(names)}"
        parts = self.register(whole).view(DTYPES[part]).reshape(self.threads, len(names)).T
        if "{" in source:
            moves = [(place, self.source(x, part)) for place, x in zip(parts, names, strict=True)]
        else:
            moves = [(self.target(x, part), value) for value, x in zip(parts, names, strict=True) if x != "_"]
        runs = [self._assign(place, unchanged, value) for place, value in moves]
        return lambda mask: [run(mask) for run in runs] and None

    def _cvt(self, i: Instruction) -> Runner:
        *how, to, of = i.op.split(".")[1:]
        if i.op in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
            narrow = to_bf16 if to == "bf16x2" else (lambda x: x.astype("f2").view("u2"))
            return self._computed(i, lambda a, b: narrow(a).astype("u4") << np.uint32(16) | narrow(b), "b32", of)
        if i.op in ("cvt.rmi.f32.f32", "cvt.rmi.ftz.f32.f32"):
            return self._computed(i, lambda x: np.floor(flush(x) if "ftz" in how else x), to, of)
        narrows = to in FLOATS and (of not in FLOATS or DTYPES[to].itemsize < DTYPES[of].itemsize)
        through_f32 = "bf16" not in (to, of) or "f32" in (to, of)
        # Not from a float to an integer, and no other ways of rounding.
        check((to in FLOATS or of not in FLOATS) and how == (["rn"] if narrows else []) and through_f32, i)
        decode = from_bf16 if of == "bf16" else unchanged
        encode = to_bf16 if to == "bf16" else (lambda x: x.astype(DTYPES[to]))
        return self._computed(i, lambda x: encode(decode(x)), to, of)

    # --- memory

    def _ld(self, i: Instruction) -> Runner:
        space, *more, kind = i.op.split(".")[1:]
        names = _names(i.operands[0])
        if space == "param":
            value = self.arguments[self.program.params.index(i.operands[1].strip("[] "))]
            bits = np.array(value % (1 << 64), "u8").view("i8")
            return self._assign(self.target(names[0], kind), lambda: bits.astype(DTYPES[kind]))
        memory, address = self._space(space, i.operands[1], i)
        check(more in ([], [f"v{len(names)}"]), i)
        size, targets = DTYPES[kind].itemsize, [self.target(x, kind) for x in names]

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            values = self._load(memory, address()[threads], size, len(targets), threads, i).view(DTYPES[kind])
            for n, target in enumerate(targets):
                target[threads] = values[:, n]

        return run

    def _st(self, i: Instruction) -> Runner:
        space, *more, kind = i.op.split(".")[1:]
        names = _names(i.operands[1])
        memory, address = self._space(space, i.operands[0], i)
        check(more in ([], [f"v{len(names)}"]), i)
        bits = f"b{8 * DTYPES[kind].itemsize}"
        sources = [np.broadcast_to(self.source(x, bits), self.threads) for x in names]

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            self._store(memory, address()[threads], np.stack([x[threads] for x in sources], 1), threads, i)

        return run

    def _space(self, space: str, operand: str, i: Instruction) -> tuple[Memory, Callable[[], Array]]:
        check(space in ("shared", "global"), i)
        if space == "shared":
            return self.shared, self.address(operand, "u32")
        return self.memory, self.address(operand, "u64")

    def _load(self, memory: Memory, addresses: Array, size: int, count: int, threads: Array, i: Instruction) -> Array:
        offsets = memory.offsets(addresses, size * count, i)
        self._note_read(memory, memory.grains(offsets, size * count), threads, i)
        return memory.get(offsets, size, count)

    def _store(self, memory: Memory, addresses: Array, values: Array, threads: Array, i: Instruction) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        offsets = memory.offsets(addresses, size * count, i)
        grains = memory.grains(offsets, size * count)
        same = memory.get(offsets, size, count) == values
        self._note_write(memory, grains, np.repeat(same, grains.shape[1] // count, 1), threads, i)
        if not memory.put(offsets, values) and not self._warps_agree(offsets, values, threads):
            raise Mistake(f"race: {i}: warps write different values to one place at once")
        memory.written[grains] = True

    def _note_read(self, memory: Memory, grains: Array, threads: Array, i: Instruction) -> None:
        start = self.epoch << 10
        me = (start + threads)[:, None]
        if not memory.written[grains].all():
            raise Mistake(f"uninitialised: {i}: reads {memory.name} memory that nobody wrote")
        writer = memory.writer[grains]
        if ((writer >= start) & (writer != me)).any():
            raise Mistake(f"race: {i}: reads {memory.name} memory that another thread wrote since the last barrier")
        before = memory.reader[grains]
        memory.reader[grains] = me
        several = (memory.reader[grains] != me) | ((before >= start) & (before != me))
        memory.reader[grains[several]] = start + memory.SEVERAL

    def _note_write(self, memory: Memory, grains: Array, same: Array, threads: Array, i: Instruction) -> None:
        start = self.epoch << 10
        me = (start + threads)[:, None]
        for past, did in ((memory.writer[grains], "wrote"), (memory.reader[grains], "read")):
            if ((past >= start) & (past != me) & ~same).any():
                raise Mistake(
                    f"race: {i}: writes {memory.name} memory that another thread {did} since the last barrier"
                )
        memory.writer[grains] = me

    @staticmethod
    def _warps_agree(offsets: Array, values: Array, threads: Array) -> bool:
        """Whether every warp leaves the same behind, if of its threads the last one wins."""
        left: dict[int, dict[int, list[int]]] = {}
        for offset, value, thread in zip(offsets.tolist(), values.tolist(), threads.tolist(), strict=True):
            left.setdefault(offset, {})[thread // WARP] = value
        return all(value == next(iter(warps.values())) for warps in left.values() for value in warps.values())

    # --- between threads

    def _bar(self, i: Instruction) -> Runner:
        check((i.op, i.operands) == ("bar.sync", ["0"]) or (i.op, self.threads) == ("bar.warp.sync", WARP), i)

        def run(mask: Mask) -> None:
            if mask is not None:
                raise Mistake(f"divergent: {i}: by {int(mask.sum())} of {self.threads} threads")
            self.epoch += 1

        return run

    def _whole_warps(self, mask: Mask, i: Instruction) -> None:
        if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
            raise Mistake(f"divergent: {i}: by a part of a warp")

    def _shfl(self, i: Instruction) -> Runner:
        _, _, how, kind = i.op.split(".")
        target, source = self.target(i.operands[0], kind), self.source(i.operands[1], kind)
        by, limit, member = (self.source(x, "u32") for x in i.operands[2:])
        check(not limit.shape and member == 0xFFFFFFFF and how in ("bfly", "idx", "up"), i)
        segment, clamp = int(limit) >> 8 & 31, int(limit) & 31
        first, last = self.lane & segment, self.lane & segment | clamp & ~segment

        def run(mask: Mask) -> None:
            self._whole_warps(mask, i)
            count = by.astype("i8") & 31
            lane = {"bfly": self.lane ^ count, "idx": first | (count & ~segment), "up": self.lane - count}[how]
            inside = lane >= last if how == "up" else lane <= last
            values = np.broadcast_to(source, self.threads)[self.thread - self.lane + np.where(inside, lane, self.lane)]
            np.copyto(target, values, where=True if mask is None else mask)

        return run

    def _matrices(self, i: Instruction, place: str) -> Callable[..., Array]:
        """Of `ldmatrix` and `stmatrix`: where the two numbers of matrix n are that are each thread's, side by side.

        Of a matrix that is turned over they are below each other: `half` 0 and 1.
        """
        check(re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", i.op), i)
        address = self.address(place, "u32")

        def addresses(mask: Mask, n: int, half: int = 0) -> Array:
            self._whole_warps(mask, i)
            row, column = self.lane // 4, 2 * (self.lane % 4)
            if ".trans" in i.op:
                row, column = column + half, row
            rows = address()[self.thread - self.lane + 8 * n + row]  # a row is where one thread says
            if (rows % np.uint32(16)).any():
                raise Mistake(f"outside: {i}: not aligned to 16 bytes")
            return (rows + (2 * column).astype("u4"))[self.active(mask)]

        return addresses

    def _ldmatrix(self, i: Instruction) -> Runner:
        targets, addresses = [self.target(x, "b32") for x in _names(i.operands[0])], self._matrices(i, i.operands[1])

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            values = [self._load_pair(addresses, mask, n, threads, i) for n in range(len(targets))]
            for target, value in zip(targets, values, strict=True):
                target[threads] = value

        return run

    def _load_pair(self, addresses: Callable[..., Array], mask: Mask, n: int, threads: Array, i: Instruction) -> Array:
        """Two numbers of 16 bits, the first in the lower half."""
        if ".trans" not in i.op:
            return self._load(self.shared, addresses(mask, n), 4, 1, threads, i)[:, 0]
        first, second = (self._load(self.shared, addresses(mask, n, half), 2, 1, threads, i)[:, 0] for half in (0, 1))
        return first.astype("u4") | second.astype("u4") << np.uint32(16)

    def _stmatrix(self, i: Instruction) -> Runner:
        sources, addresses = [self.source(x, "b32") for x in _names(i.operands[1])], self._matrices(i, i.operands[0])

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            for n, source in enumerate(sources):
                value = source[threads][:, None]
                if ".trans" not in i.op:
                    self._store(self.shared, addresses(mask, n), value, threads, i)
                    continue
                for half, number in enumerate((value & np.uint32(0xFFFF), value >> np.uint32(16))):
                    self._store(self.shared, addresses(mask, n, half), number.astype("u2"), threads, i)

        return run
