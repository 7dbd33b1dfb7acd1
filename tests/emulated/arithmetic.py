"""What the instructions of PTX compute, on NumPy arrays of the instruction's type; bfloat16 as its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INTEGERS = {f"{kind}{bits}": f"{'i' if kind == 's' else 'u'}{bits // 8}" for kind in "bus" for bits in (8, 16, 32, 64)}
FLOATS = {"f16": "f2", "bf16": "u2", "f32": "f4", "f64": "f8"}
DTYPES = {name: np.dtype(code) for name, code in (INTEGERS | FLOATS | {"pred": "?"}).items()}


class Unsupported(Exception):
    """An instruction that is not emulated."""


def check(supported: object, what: object) -> None:
    """Raise if that is not emulated."""
    if not supported:
        raise Unsupported(str(what))


def from_bf16(x: Array) -> Array:
    return (np.asarray(x).astype("u4") << np.uint32(16)).view("f4")


def to_bf16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, "f4").view("u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype("u2")


def flush(x: Array) -> Array:
    """Subnormal float32 to zero of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x) if x.dtype == "f4" else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c, rounded once; in float32 twice where the sum is halfway."""
    if a.dtype == "f4":
        return (a.astype("f8") * b.astype("f8") + c.astype("f8")).astype("f4")
    # The product as the sum of two numbers (Dekker), that plus c likewise (Knuth).
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    rest = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2
    total = product + c
    other = total - product
    rest = rest + ((product - (total - other)) + (c - other))
    return np.where(np.isfinite(rest), total + rest, product + c)


def _halves(x: Array) -> tuple[Array, Array]:
    scaled = x * 134217729.0
    high = scaled - (scaled - x)
    return high, x - high


def maximum(a: Array, b: Array) -> Array:
    """Of a number and a NaN the number, and −0 is less than +0."""
    if a.dtype.kind != "f":
        return np.maximum(a, b)
    bits = f"u{a.dtype.itemsize}"
    return np.where((a == 0) & (b == 0), (a.view(bits) & b.view(bits)).view(a.dtype), np.fmax(a, b))


def minimum(a: Array, b: Array) -> Array:
    return -maximum(-a, -b) if a.dtype.kind == "f" else np.minimum(a, b)


def shift(x: Array, count: Array, left: bool) -> Array:
    bits = 8 * x.dtype.itemsize
    count = np.asarray(count, "i8")
    by = np.minimum(count, bits - 1).astype(x.dtype)
    if left:
        return np.where(count >= bits, x.dtype.type(0), x << by)
    return np.where((count >= bits) & (x.dtype.kind == "u"), x.dtype.type(0), x >> by)


def bit_field(x: Array, start: Array, length: Array) -> Array:
    """`bfe`: a field of bits, its sign extended if x is signed."""
    start, length = np.asarray(start, "i8") & 255, np.asarray(length, "i8") & 255
    wide = x.astype("i8" if x.dtype.kind == "i" else "u8")
    field = np.where(length < 64, (np.uint64(1) << np.minimum(length, 63).astype("u8")) - np.uint64(1), ~np.uint64(0))
    value = wide >> np.minimum(start, 63).astype(wide.dtype) & field.astype(wide.dtype)
    if x.dtype.kind == "u":
        return np.where(start < 64, value, 0).astype(x.dtype)
    last = np.minimum(start + length - 1, 8 * x.dtype.itemsize - 1)
    sign = np.where(length > 0, wide >> np.maximum(last, 0) & 1, 0)
    return np.where(sign > 0, value | ~field.astype("i8"), value).astype(x.dtype)


def quotient(a: Array, b: Array) -> Array:
    """Of integers, towards zero. By zero it is whatever a device makes of that."""
    return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)


def high_half(a: Array, b: Array) -> Array:
    """Of the product of two unsigned integers of 64 bits."""
    check(a.dtype == "u8", "mul.hi of other types")
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    (a1, a0), (b1, b0) = (a >> half, a & low), (b >> half, b & low)
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((middle & low) + a0 * b1 >> half)


def permute(a: Array, b: Array, select: Array) -> Array:
    """`prmt`: four bytes of eight, or of each its sign."""
    pool, result = a.astype("u8") | b.astype("u8") << np.uint64(32), np.uint64(0)
    for n in range(4):
        nibble = select.astype("u8") >> np.uint64(4 * n) & np.uint64(15)
        byte = pool >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
        byte = np.where(nibble > 7, (byte >> np.uint64(7)) * np.uint64(255), byte)
        result = result | byte << np.uint64(8 * n)
    return result.astype("u4")


def reciprocal(x: Array) -> Array:
    """`rcp.approx.ftz.f64`: of the upper 32 bits, to the upper 32 bits."""
    check(x.dtype == "f8", "rcp.approx of other types")
    high = np.uint64(0xFFFFFFFF00000000)
    x = (np.ascontiguousarray(x).view("u8") & high).view("f8")
    x = np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), x)
    return ((1.0 / x).view("u8") & high).view("f8")


def in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Of float32, rounded to it once."""
    return lambda x: function(x.astype("f8")).astype("f4")


def unchanged(x: Array) -> Array:
    return x


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "geu": lambda a, b: ~(a < b),  # true of a NaN, too
    "num": lambda a, b: (a == a) & (b == b),
}
# Operation → function, of operands all of the instruction's type.
SAME_TYPE: dict[str, Callable[..., Array]] = {
    **dict.fromkeys(["add", "add.rn"], np.add),
    **dict.fromkeys(["sub", "sub.rn"], np.subtract),
    **dict.fromkeys(["mul", "mul.lo", "mul.rn"], np.multiply),
    **dict.fromkeys(["div.rn", "div.full"], np.divide),
    **dict.fromkeys(["sqrt.rn", "sqrt.approx"], np.sqrt),
    "div": quotient,
    "mul.hi": high_half,
    "mad.lo": lambda a, b, c: a * b + c,
    "fma.rn": fma,
    "rcp.approx": reciprocal,
    "ex2.approx": in_double(np.exp2),
    "lg2.approx": in_double(np.log2),
    "bfe": bit_field,
    "prmt": permute,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "max": maximum,
    "min": minimum,
}
