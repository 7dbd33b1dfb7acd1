"""A lock that a forked process finds free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ForkSafeLock:
    """Can be taken twice by a thread: `with lock.held(): ...`.

    In a forked process a thread that held it does not go on, and would never give it back; so it is a new one there.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # as not on Windows
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs, by this thread alone."""
        with self._lock:  # given back even where it is another one by then
            yield
