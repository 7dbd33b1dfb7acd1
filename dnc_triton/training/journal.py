"""What a run reports on its way: the rows of its metrics for TensorBoard, and a line when something is wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Journal:
    """The rows of the metrics for TensorBoard. What it cannot write is lost without harm: the run's tables have it all.

    Args:
        folder: where they go; None: nowhere, as in all processes but the first.
        step: the step from which the run goes on.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self._harmless():
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):  # otherwise a thread of the writer reports it, at length
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            # What an interrupted run wrote after its last checkpoint will be written again.
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, row: dict[str, float], kind: str) -> None:
        """Add the numbers of a row, at its step, each as "kind/name"."""
        with self._harmless():
            for name, value in row.items():
                if self._writer and name not in ("step", "seconds"):
                    self._writer.add_scalar(f"{kind}/{name}", value, int(row["step"]))

    def flush(self) -> None:
        """Write everything added so far to disk."""
        with self._harmless():
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        """Write everything added so far to disk, and close the writer."""
        with self._harmless():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a name that it cannot encode
            self._writer = None
            say(f"TensorBoard gets no more of this run: {error}")


def say(text: str) -> None:
    """Print a line on stderr, above the progress bar."""
    tqdm.write(f"dnc_triton: {text}", file=sys.stderr)
