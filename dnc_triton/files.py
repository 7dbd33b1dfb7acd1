"""Files that are whole or not there."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> None:
    """Write a file that replaces the old one once all of it is on the disk: half a file is never seen.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    # A name of this call's own, in case others write here too. (Other users could not read tempfile's files.)
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        remove(temporary)
        raise OSError(error.errno, f"{error.strerror} while writing {len(content)} bytes", str(path)) from error
    except BaseException:
        remove(temporary)
        raise


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV by `write`; the first line holds the keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def is_full(error: OSError) -> bool:
    """Whether a write failed because the disk, or the user's quota, is full."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no EDQUOT


def remove(path: Path) -> None:
    """Remove a file if possible. An error here is dropped: the caller has to hear of the one before it."""
    with suppress(OSError):
        path.unlink()
