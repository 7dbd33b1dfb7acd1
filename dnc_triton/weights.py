"""The weights of another implementation, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Weights:
    """Arrays that are taken one by one; errors name the array.

    Args:
        argument: the name of the argument that they were passed in.
        arrays: name → a tensor, a NumPy array, or what NumPy makes one of.
        sizes: name → size, from which their shapes follow; shown in errors.

    Attributes:
        unused: names of those that were not taken.
    """

    def __init__(self, argument: str, arrays: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
        self.argument, self.arrays, self.sizes = argument, arrays, sizes
        self.unused = set(arrays)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One of them, in float64 on the CPU, whatever its type. The result may share the memory of a tensor.

        Raises:
            ValueError: there is none of that name, or it has another shape, or no values.
            TypeError: it is no floating array.
        """
        if name not in self.arrays:
            raise ValueError(f"{self.argument}: expected {name!r}, got only {sorted(self.arrays)}")
        self.unused.discard(name)
        array = self._floating(name)
        if shape is not None and array.shape != shape:
            given = ", ".join(f"{size}={value}" for size, value in self.sizes.items())
            raise ValueError(
                f"{self.argument}: expected {name!r} of shape {list(shape)} for {given}, got {list(array.shape)}"
            )
        return array

    def _floating(self, name: str) -> Tensor:
        value = self.arrays[name]
        wanted = f"{self.argument}: expected {name!r} to be a dense floating array"
        if isinstance(value, Tensor):
            if value.is_nested or value.layout != torch.strided:
                raise TypeError(f"{wanted}, got {'a nested one' if value.is_nested else f'layout {value.layout}'}")
            if value.is_meta:
                raise ValueError(f"{wanted} with values, got one on the meta device")
            array = value.detach().cpu()
        else:  # in this machine's byte order, whichever machine wrote it
            try:
                held = np.array(value)
                array = torch.from_numpy(held.astype(held.dtype.newbyteorder("=")))
            except (TypeError, ValueError) as error:
                raise TypeError(f"{wanted}, got {type(value).__name__}") from error
        if not array.is_floating_point():
            raise TypeError(f"{wanted}, got {array.dtype}")
        return array.double()
