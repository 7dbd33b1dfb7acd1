"""Run the PTX that Triton compiles a kernel to, on the CPU: a block of threads at a time, its threads as NumPy arrays.

What Triton's interpreter does not show is here: which products and sums are fused into one rounding, which thread does
what, and where the compiler put barriers and shuffles. While a kernel runs, `Mistake` is raised:

- outside: an access is not inside of a buffer, or not aligned.
- divergent: not all threads reach a barrier at once, or not all of a warp reach what it does together.
- uninitialised: a thread loads bytes of shared memory that nobody wrote, or elements of global memory that still hold
  the poison, 0xFF in every byte, with which buffers begin.
- race: between two barriers of a block, a thread writes what another thread reads or writes. Threads that write the
  value that is there already are let off, and so are threads of one warp that in one instruction write to one place:
  which of them wins is unspecified, but the same each time. Or a thread touches what is being copied to asynchronously,
  before the thread that copies has waited for that.

What it is not: the machine code that ptxas makes of PTX, which may fuse products and sums that are still apart. A
device, whose approximate instructions (ex2, div.full, sqrt.approx) err by an ulp or two; here they are rounded
correctly. A clock. And nothing is known of races between blocks, which run one after the other. An instruction that is
not here raises `Unsupported`: the kernels need few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from arithmetic import DTYPES, Array, check
from memory import POISON, SHARED_BASE, Memory, Mistake, allocate
from ptx import WARP, Instruction, Program, meeting_points, names_of
from registers import Mask, Registers, Runner


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
        self.memory, self.arguments, self.places = allocate(arguments, grain)
        self.shared = Memory("shared", SHARED_BASE, -(-shared // 16) * 16, grain)
        self.thread = np.arange(self.threads)
        self.lane = self.thread % WARP
        self.registers = Registers(program, grid)
        self.epoch = 0
        self.copies: list[list[tuple[Array, Array, Array, Instruction]]] = []
        self.meetings = meeting_points(program)
        with np.errstate(all="ignore"):
            self.code = [self._bind(instruction) for instruction in program.instructions]

    def finish(self) -> None:
        """Write to the buffers what the blocks changed, even where several buffers are the same memory."""
        left = [(buffer.view("u1"), self.memory.bytes[at : at + buffer.nbytes]) for at, buffer in self.places]
        for buffer, result in [(buffer, result) for buffer, result in left if not np.array_equal(buffer, result)]:
            buffer[:] = result

    def block(self, index: Sequence[int]) -> None:
        """Run one block of the grid."""
        for axis, value in zip("xyz", index, strict=False):
            self.registers.special[f"%ctaid.{axis}"][:] = value
        self.shared.written.fill(False)
        self.shared.bytes.fill(POISON)
        self.shared.copying.fill(False)
        self.copies = [[]]
        self.epoch += 1
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        """Threads that part at a jump wait for each other where they meet again."""
        end = len(self.code)
        ended = np.zeros(self.threads, bool)
        parted: list[tuple[Array, int, int]] = [(~ended, 0, end)]  # who goes on, from where, and up to where
        while parted:
            active, at, stop = parted.pop()
            active = active & ~ended
            if not active.any():
                continue
            mask = None if active.all() else active
            while at not in (stop, end):
                jump = self.code[at](mask)
                if jump is None:
                    at += 1
                    continue
                target, taken = jump  # taken: a mask, or None for all that are active
                if taken is not None:
                    meeting = self.meetings[at]
                    parted += [(active, meeting, stop), (active & ~taken, at + 1, meeting), (taken, target, meeting)]
                    break
                at = target
            else:
                ended |= active & (at == end)

    def active(self, mask: Mask) -> Array:
        return self.thread if mask is None else self.thread[mask]

    def _bind(self, i: Instruction) -> Runner:
        """What runs an instruction for the threads of a mask. Returns where to go and who, if it is a jump."""
        name = i.op.split(".")[0]
        if name in ("bra", "ret"):
            return self._jump(i)
        run = getattr(self, f"_{name}", self.registers.bind)(i)
        if not i.predicate:
            return run
        predicate, wanted = self.registers.register(i.predicate.lstrip("!")), not i.predicate.startswith("!")

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
        predicate, wanted = self.registers.register(i.predicate.lstrip("!")), not i.predicate.startswith("!")

        def perhaps(mask: Mask) -> Any:
            taken = predicate == wanted
            if mask is not None:
                taken = taken & mask
            count = taken.sum()
            if count == 0:
                return None
            return target, None if count == (self.threads if mask is None else mask.sum()) else taken

        return perhaps

    def _ld(self, i: Instruction) -> Runner:
        space, *more, kind = i.op.split(".")[1:]
        names = names_of(i.operands[0])
        if space == "param":
            value = self.arguments[self.program.params.index(i.operands[1].strip("[] "))]
            bits = np.array(value % (1 << 64), "u8").view("i8")
            return self.registers.assign(self.registers.target(names[0], kind), lambda: bits.astype(DTYPES[kind]))
        memory, address = self._space(space, i.operands[1], i)
        check(more in ([], [f"v{len(names)}"]), i)
        size, targets = DTYPES[kind].itemsize, [self.registers.target(x, kind) for x in names]

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            values = memory.load(address()[threads], size, len(targets), threads, self.epoch, i).view(DTYPES[kind])
            for n, target in enumerate(targets):
                target[threads] = values[:, n]

        return run

    def _st(self, i: Instruction) -> Runner:
        space, *more, kind = i.op.split(".")[1:]
        names = names_of(i.operands[1])
        memory, address = self._space(space, i.operands[0], i)
        check(more in ([], [f"v{len(names)}"]), i)
        bits = f"b{8 * DTYPES[kind].itemsize}"
        sources = [np.broadcast_to(self.registers.source(x, bits), self.threads) for x in names]

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            memory.store(address()[threads], np.stack([x[threads] for x in sources], 1), threads, self.epoch, i)

        return run

    def _cp(self, i: Instruction) -> Runner:
        """Asynchronous copies to shared memory, in groups: the last one is still open. All threads commit and wait."""
        if i.op == "cp.async.commit_group":
            return lambda mask: check(mask is None, i) or self.copies.append([])
        if i.op == "cp.async.wait_group":
            return lambda mask: check(mask is None, i) or self._end_copies(int(i.operands[0]))
        to, start = self.registers.address(i.operands[0], "u32"), self.registers.address(i.operands[1], "u64")
        size, given = (self.registers.source(x, "u32") for x in i.operands[2:])  # the second is 0 where zeros are meant
        check(i.op in ("cp.async.ca.shared.global", "cp.async.cg.shared.global") and size in (4, 8, 16), i)

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            there = np.broadcast_to(given, self.threads)[threads]
            check(np.isin(there, (0, size)).all(), i)
            there, values = there > 0, np.zeros((len(threads), int(size) // 4), "u4")
            copied = threads[there]
            values[there] = self.memory.load(start()[copied], 4, values.shape[1], copied, self.epoch, i)
            self.shared.begin_copy(to()[threads], int(size), threads, self.epoch, i)
            self.copies[-1].append((to()[threads], values, threads, i))

        return run

    def _end_copies(self, pending: int) -> None:
        """Of all groups but the last ones."""
        while len(self.copies) > pending + 1:
            for copy in self.copies.pop(0):
                self.shared.end_copy(*copy[:3], self.epoch, copy[3])

    def _space(self, space: str, operand: str, i: Instruction) -> tuple[Memory, Callable[[], Array]]:
        check(space in ("shared", "global"), i)
        if space == "shared":
            return self.shared, self.registers.address(operand, "u32")
        return self.memory, self.registers.address(operand, "u64")

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
        target, source = self.registers.target(i.operands[0], kind), self.registers.source(i.operands[1], kind)
        by, limit, member = (self.registers.source(x, "u32") for x in i.operands[2:])
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

    def _redux(self, i: Instruction) -> Runner:
        """The sum of a warp's numbers, for each of its threads."""
        check(i.op == "redux.sync.add.s32", i)
        target, source = (self.registers.target(i.operands[0], "s32"), self.registers.source(i.operands[1], "s32"))
        member = self.registers.source(i.operands[2], "u32")

        def run(mask: Mask) -> None:
            check(np.all(member == 0xFFFFFFFF), i)
            self._whole_warps(mask, i)
            sums = np.broadcast_to(source, self.threads).reshape(-1, WARP).sum(1, dtype="i4")
            np.copyto(target, np.repeat(sums, WARP), where=True if mask is None else mask)

        return run

    def _matrices(self, i: Instruction, place: str) -> Callable[..., Array]:
        """For `ldmatrix` and `stmatrix`: where each thread's two numbers of matrix n are, side by side.

        In a transposed matrix they are one below the other: `half` 0 and 1.
        """
        check(re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", i.op), i)
        address = self.registers.address(place, "u32")

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
        targets = [self.registers.target(x, "b32") for x in names_of(i.operands[0])]
        addresses = self._matrices(i, i.operands[1])

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            values = [self._load_pair(addresses, mask, n, threads, i) for n in range(len(targets))]
            for target, value in zip(targets, values, strict=True):
                target[threads] = value

        return run

    def _load_pair(self, addresses: Callable[..., Array], mask: Mask, n: int, threads: Array, i: Instruction) -> Array:
        """Two numbers of 16 bits, the first in the lower half."""
        if ".trans" not in i.op:
            return self.shared.load(addresses(mask, n), 4, 1, threads, self.epoch, i)[:, 0]
        halves = (addresses(mask, n, half) for half in (0, 1))
        first, second = (self.shared.load(half, 2, 1, threads, self.epoch, i)[:, 0] for half in halves)
        return first.astype("u4") | second.astype("u4") << np.uint32(16)

    def _stmatrix(self, i: Instruction) -> Runner:
        sources = [self.registers.source(x, "b32") for x in names_of(i.operands[1])]
        addresses = self._matrices(i, i.operands[0])

        def run(mask: Mask) -> None:
            threads = self.active(mask)
            for n, source in enumerate(sources):
                value = source[threads][:, None]
                if ".trans" not in i.op:
                    self.shared.store(addresses(mask, n), value, threads, self.epoch, i)
                    continue
                for half, number in enumerate((value & np.uint32(0xFFFF), value >> np.uint32(16))):
                    self.shared.store(addresses(mask, n, half), number.astype("u2"), threads, self.epoch, i)

        return run
