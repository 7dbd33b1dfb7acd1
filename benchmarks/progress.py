"""The progress of a run: tqdm's bar or, without tqdm, a line for each thing done."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A bar over the parts of a run, used as a context manager."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            print("No progress bar: tqdm is not installed; install it with: pip install tqdm", file=sys.stderr)
        else:
            self._bar = tqdm(total=total, unit="part")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def describe(self, text: str) -> None:
        """Say what is being done."""
        if self._bar is not None:
            self._bar.set_description(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self) -> None:
        """Count one part as done."""
        if self._bar is not None:
            self._bar.update()
