"""A GPU's memory, global or shared; every access is checked: inside of a buffer, of what was written, no race."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from arithmetic import Array, check
from ptx import WARP, Instruction

SHARED_BASE = 0x400  # where shared memory begins, of the 32-bit addresses that reach it
GLOBAL_BASE = 0x7F12_3400_0000
GUARD = 1 << 14  # bytes between two buffers
POISON = 0xFF


class Mistake(AssertionError):
    """What a kernel must not do."""


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


class Memory:
    """Bytes, and for each `grain` of them whether they are there, who wrote and who read them since the last barrier.

    And whether an asynchronous copy to them is under way.

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
        self.copying = np.zeros(grains, bool)

    def load(self, addresses: Array, size: int, count: int, threads: Array, epoch: int, i: Instruction) -> Array:
        offsets = self._offsets(addresses, size * count, i)
        self._note_read(self._grains(offsets, size * count), threads, epoch, i)
        return self._get(offsets, size, count)

    def store(self, addresses: Array, values: Array, threads: Array, epoch: int, i: Instruction) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        offsets = self._offsets(addresses, size * count, i)
        grains = self._grains(offsets, size * count)
        same = self._get(offsets, size, count) == values
        self._note_write(grains, np.repeat(same, grains.shape[1] // count, 1), threads, epoch, i)
        if not self._put(offsets, values) and not self._warps_agree(offsets, values, threads):
            raise Mistake(f"race: {i}: warps write different values to one place at once")
        self.written[grains] = True

    def begin_copy(self, addresses: Array, size: int, threads: Array, epoch: int, i: Instruction) -> None:
        """From here on a copy may be written; at `end_copy` it is."""
        grains = self._grains(self._offsets(addresses, size, i), size)
        self._note_write(grains, np.zeros(grains.shape, bool), threads, epoch, i)
        self.copying[grains] = True

    def end_copy(self, addresses: Array, values: Array, threads: Array, epoch: int, i: Instruction) -> None:
        size = values.dtype.itemsize * values.shape[1]
        self.copying[self._grains(self._offsets(addresses, size, i), size)] = False
        self.store(addresses, values, threads, epoch, i)

    def _offsets(self, addresses: Array, size: int, what: Instruction) -> Array:
        """Offsets of the accesses, all of which must be allowed."""
        offsets = addresses.astype("i8") - self.base
        inside = (offsets >= 0) & (offsets + size <= self.size)
        if inside.all():
            inside = self.there[offsets // self.grain] & self.there[(offsets + size - 1) // self.grain]
        if not inside.all():
            raise Mistake(f"outside: {what}: {(~inside).sum()} threads outside of any {self.name} buffer")
        if (offsets % size).any():
            raise Mistake(f"outside: {what}: not aligned to {size} bytes")
        return offsets

    def _grains(self, offsets: Array, size: int) -> Array:
        """[threads, grains of an access]."""
        return (offsets // self.grain)[:, None] + np.arange(size // self.grain)

    def _get(self, offsets: Array, size: int, count: int) -> Array:
        return self.views[size][(offsets // size)[:, None] + np.arange(count)]

    def _put(self, offsets: Array, values: Array) -> bool:
        """[threads, count]. False if threads that write to the same place do not agree."""
        size = values.dtype.itemsize
        places = (offsets // size)[:, None] + np.arange(values.shape[1])
        self.views[size][places] = values
        return bool((self.views[size][places] == values).all())

    def _note_read(self, grains: Array, threads: Array, epoch: int, i: Instruction) -> None:
        self._note_access(grains, i)
        start = epoch << 10
        me = (start + threads)[:, None]
        if not self.written[grains].all():
            raise Mistake(f"uninitialised: {i}: reads {self.name} memory that nobody wrote")
        writer = self.writer[grains]
        if ((writer >= start) & (writer != me)).any():
            raise Mistake(f"race: {i}: reads {self.name} memory that another thread wrote since the last barrier")
        before = self.reader[grains]
        self.reader[grains] = me
        several = (self.reader[grains] != me) | ((before >= start) & (before != me))
        self.reader[grains[several]] = start + self.SEVERAL

    def _note_write(self, grains: Array, same: Array, threads: Array, epoch: int, i: Instruction) -> None:
        self._note_access(grains, i)
        start = epoch << 10
        me = (start + threads)[:, None]
        for past, did in ((self.writer[grains], "wrote"), (self.reader[grains], "read")):
            if ((past >= start) & (past != me) & ~same).any():
                raise Mistake(f"race: {i}: writes {self.name} memory that another thread {did} since the last barrier")
        self.writer[grains] = me

    def _note_access(self, grains: Array, i: Instruction) -> None:
        if self.copying[grains].any():
            raise Mistake(f"race: {i}: touches {self.name} memory while it is copied to, before the wait for that")

    @staticmethod
    def _warps_agree(offsets: Array, values: Array, threads: Array) -> bool:
        """Whether every warp leaves the same behind, if of its threads the last one wins."""
        left: dict[int, dict[int, list[int]]] = {}
        for offset, value, thread in zip(offsets.tolist(), values.tolist(), threads.tolist(), strict=True):
            left.setdefault(offset, {})[thread // WARP] = value
        return all(value == next(iter(warps.values())) for warps in left.values() for value in warps.values())


def allocate(arguments: Sequence[Any], grain: int) -> tuple[Memory, list[Any], list[tuple[int, Array]]]:
    """Lay the buffers out in one memory, as aligned as they are, with gaps between them.

    Returns the memory, the arguments with addresses for buffers, and the buffers that are written to, each with the
    byte where it begins.
    """
    windows = [Window(x, 0, [(0, x.nbytes)]) if isinstance(x, np.ndarray) else x for x in arguments]
    places, values, end = [], [], GUARD
    for window in windows:
        if not isinstance(window, Window):
            values.append(window)
            continue
        start = -(-end // 256) * 256 + window.buffer.ctypes.data % 256
        places.append((start, window))
        values.append(GLOBAL_BASE + start + window.at)
        end = start + window.buffer.nbytes + GUARD
    memory = Memory("global", GLOBAL_BASE, -(-end // 256) * 256, grain)
    memory.there[:] = False
    for start, (buffer, _, pieces) in places:
        memory.bytes[start : start + buffer.nbytes] = buffer.view("u1")
        check(start % grain == buffer.nbytes % grain == 0, f"a buffer of {buffer.nbytes} bytes accessed by {grain}")
        for first, last in pieces:
            memory.there[(start + first) // grain : (start + last) // grain] = True
        size = max(grain, buffer.itemsize)
        written = (buffer.view("u1").reshape(-1, size) != POISON).any(1)
        memory.written[start // grain : (start + buffer.nbytes) // grain] = np.repeat(written, size // grain)
    return memory, values, [(start, window.buffer) for start, window in places if window.at == 0]
