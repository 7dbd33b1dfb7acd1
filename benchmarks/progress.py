"""How far a run is: tqdm's bar, or a line each without it."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A bar over the parts of a run, to be used with `with`."""

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
        """One part is done."""
        if self._bar is not None:
            self._bar.update()
