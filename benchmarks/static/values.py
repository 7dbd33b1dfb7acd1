"""Integers and pointers as operations of the intermediate code compute them; None if unknown."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.static.ttgir import Op, Unchecked


@dataclass
class Pointer:
    """Places in a buffer, counted in elements from its start; None where they depend on data."""

    buffer: str
    offset: np.ndarray | None


def add_pointer(pointer: Any, offset: np.ndarray | None) -> Pointer | None:
    if not isinstance(pointer, Pointer):
        return None
    if pointer.offset is None or offset is None:
        return Pointer(pointer.buffer, None)
    return Pointer(pointer.buffer, pointer.offset + offset)


def _constant(op: Op) -> np.ndarray | None:
    match = re.match(r" (?:dense<)?(true|false|-?\d+)>?(?: : (.*))?$", op.text)
    if not match or (match[2] and not re.search(r"\b(?:\d+x)*(?:i\d+|index)\b", match[2])):
        return None
    value = match[1] == "true" if match[1] in ("true", "false") else int(match[1])
    return np.full(op.shape, value)


def _make_range(op: Op) -> np.ndarray:
    start, end = (int(re.search(rf"{key} = (\d+)", op.text)[1]) for key in ("start", "end"))  # type: ignore[index]
    return np.arange(start, end)


def _moved(move: Callable[[Op, np.ndarray], np.ndarray]) -> Callable[..., Any]:
    """An operation on integers or pointers that only moves values to other places."""

    def value(op: Op, operand: Any) -> Any:
        if isinstance(operand, Pointer):
            return Pointer(operand.buffer, None if operand.offset is None else move(op, operand.offset))
        return None if operand is None else move(op, operand)

    return value


def _of_integers(compute: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose result is known where all its operands are."""

    def value(op: Op, *operands: Any) -> Any:
        if any(isinstance(operand, Pointer) for operand in operands):
            raise Unchecked(f"{op.name} of a pointer, {op.site}")
        return None if any(operand is None for operand in operands) else compute(*operands)

    return value


def _compare(op: Op, left: Any, right: Any) -> Any:
    predicate = op.text.split(",")[0].strip()
    if left is None or right is None:
        return None
    if predicate.startswith("u") and (np.any(left < 0) or np.any(right < 0)):
        return None
    return getattr(operator, predicate.lstrip("us"))(left, right)


def _select(op: Op, condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(yes, Pointer) or isinstance(no, Pointer):
        if condition is None or condition.ndim:
            raise Unchecked(f"{op.name} of pointers, {op.site}")
        return yes if condition else no
    return None if condition is None or yes is None or no is None else np.where(condition, yes, no)


def _extend(op: Op, value: Any) -> Any:
    if value is None or value.dtype != bool:
        return value
    return -value.astype(int) if op.name == "arith.extsi" else value.astype(int)


def _truncate(op: Op, value: Any) -> Any:
    return (value & 1).astype(bool) if value is not None and re.search(r"\bto (.*x)?i1\b", op.text) else value


def _transposed(op: Op, value: np.ndarray) -> np.ndarray:
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
VALUES: dict[str, Callable[..., Any]] = {
    "arith.constant": _constant,
    "tt.make_range": _make_range,
    "tt.splat": _moved(lambda op, value: np.full(op.shape, value)),
    "tt.broadcast": _moved(lambda op, value: np.broadcast_to(value, op.shape)),
    "tt.expand_dims": _moved(lambda op, value: value.reshape(op.shape)),
    "tt.reshape": _moved(lambda op, value: value.reshape(op.shape)),
    "tt.trans": _moved(_transposed),
    "ttg.convert_layout": _moved(lambda op, value: value),
    "tt.addptr": lambda op, pointer, offset: add_pointer(pointer, offset),
    "arith.cmpi": _compare,
    "arith.select": _select,
    "arith.extsi": _extend,
    "arith.extui": _extend,
    "arith.trunci": _truncate,
    "arith.index_cast": lambda op, value: value,
    **{f"arith.{name}": _of_integers(compute) for name, compute in _ARITHMETIC.items()},
}
