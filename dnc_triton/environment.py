"""What environment variables say."""

from __future__ import annotations

import os


def is_on(variable: str) -> bool:
    """Whether what a variable switches off with 0 is on, as it is without the variable.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    asked = os.environ.get(variable) or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"{variable}: expected 0 or 1, got {asked!r}")
    return asked == "1"
