"""The registers of a block's threads, and the instructions that go from registers to registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from arithmetic import (
    COMPARISONS,
    DTYPES,
    FLOATS,
    SAME_TYPE,
    Array,
    check,
    flush,
    from_bf16,
    shift,
    to_bf16,
    unchanged,
)
from memory import SHARED_BASE
from ptx import Instruction, Program, names_of

Mask = Array | None  # of active threads; None: all of them
Runner = Callable[[Mask], Any]  # an instruction, for the threads of a mask


class Registers:
    """Of every register an array, with one value per thread.

    Args:
        program: whose registers they are.
        grid: how many blocks there are, by axis.
    """

    def __init__(self, program: Program, grid: Sequence[int]) -> None:
        self.program, self.threads = program, program.threads
        self.arrays: dict[str, Array] = {}
        self.special = {f"%{name}.{axis}": np.zeros(self.threads, "u4") for name in ("tid", "ctaid") for axis in "xyz"}
        self.special["%tid.x"][:] = np.arange(self.threads)
        self.special |= {f"%nctaid.{axis}": np.array(count, "u4") for axis, count in zip("xyz", grid, strict=False)}

    def register(self, name: str) -> Array:
        if name not in self.arrays:
            kind = self.program.registers[name.rstrip("0123456789")]
            self.arrays[name] = np.zeros(self.threads, DTYPES[kind])
        return self.arrays[name]

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

    def bind(self, i: Instruction) -> Runner:
        """What runs an instruction that goes from registers to registers, for the threads of a mask."""
        return getattr(self, f"_{i.op.split('.')[0]}", self._same_type)(i)

    @staticmethod
    def assign(target: Array, function: Callable[..., Array], *sources: Array) -> Runner:
        return lambda mask: np.copyto(target, function(*sources), where=True if mask is None else mask)

    def _computed(self, i: Instruction, function: Callable[..., Array], to: str, *of: str) -> Runner:
        """A function of all operands but the first, into that; `of`: their types, the last one that of all the rest."""
        operands = zip_longest(i.operands[1:], of[: len(i.operands) - 1], fillvalue=of[-1])
        return self.assign(self.target(i.operands[0], to), function, *(self.source(x, kind) for x, kind in operands))

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
        """Also `neg`: of numbers of 16 bits, one or two together, only signs change."""
        operation, _, kind = i.op.rpartition(".")
        signs = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}.get(kind)
        if signs is None:
            return self._same_type(i)
        bits = "b32" if kind.endswith("x2") else "b16"
        sign = DTYPES[bits].type(signs)
        return self._computed(i, lambda x: x ^ sign if operation == "neg" else x & ~sign, bits, bits)

    _neg = _abs

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
            return self.assign(self.target(target, kind), unchanged, self.source(source, kind))
        whole, names = (source, names_of(target)) if "{" in target else (target, names_of(source))
        part = f"b{int(kind[1:]) // len(names)}"
        parts = self.register(whole).view(DTYPES[part]).reshape(self.threads, len(names)).T
        if "{" in source:
            moves = [(place, self.source(x, part)) for place, x in zip(parts, names, strict=True)]
        else:
            moves = [(self.target(x, part), value) for value, x in zip(parts, names, strict=True) if x != "_"]
        runs = [self.assign(place, unchanged, value) for place, value in moves]
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
