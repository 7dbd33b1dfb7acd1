"""The environment variables that are read, and their values."""

from __future__ import annotations

import os

BACKEND = "DNC_TRITON_BACKEND"  # the backend of calls that name none themselves
MEASURE = "DNC_TRITON_MEASURE"  # 0: no backend is measured
CACHE = "DNC_TRITON_CACHE"  # the directory for measurements
GRAPHS = "DNC_TRITON_GRAPHS"  # 0: nothing is replayed as a CUDA graph
GRAPH_MEMORY = "DNC_TRITON_GRAPH_MEMORY"  # how much CUDA graphs may keep on each device, in MiB


def is_on(variable: str) -> bool:
    """Whether the feature that a variable switches off with 0 is on, as it is without the variable.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    asked = os.environ.get(variable) or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"{variable}: expected 0 or 1, got {asked!r}")
    return asked == "1"
