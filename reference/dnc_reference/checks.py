"""Checks of arguments, whose errors name the argument."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_size(name: str, value: Any) -> None:
    """Raise TypeError or ValueError, naming it, unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_open_size(name: str, value: Any, least: int = 0) -> None:
    """Raise TypeError or ValueError, naming it, unless it is an integer of at least `least`, or a traced one."""
    if isinstance(value, torch.SymInt) or torch.jit.is_tracing():  # of a program for any size; a tensor in a trace
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError, naming it, unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError, naming it, unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_bound(name: str, value: Any) -> None:
    """Raise TypeError or ValueError, naming it, unless it is None or a number above 0."""
    if value is None:
        return
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected None or a number above 0, got {value!r}")


def check_floating(name: str, dtype: Any) -> None:
    """Raise TypeError, naming it, unless it is a dtype that PyTorch computes in; to 8-bit ones it only rounds."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"{name}: expected a floating dtype of 16 bits or more, got {dtype!r}")


def check_dense(name: str, tensor: Any, expected: str = "a tensor") -> None:
    """Raise TypeError, naming it and what was expected, unless it is a tensor that is neither sparse nor nested."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:  # asking such a tensor for its shape may fail
        came = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {came}")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise an error that names the tensor unless it has this shape, dtype and device."""
    check_dense(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
