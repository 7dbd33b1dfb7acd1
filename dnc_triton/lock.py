"""A lock that a forked process finds free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ForkSafeLock:
    """A thread can take it again while it holds it: `with lock.held(): ...`.

    A forked process gets a new lock: another thread that held the old one does not exist there to release it.
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Held by this thread alone while the block runs."""
        with self._lock:  # released even if `_lock` is another one by then
            yield
