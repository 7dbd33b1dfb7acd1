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
    """Write a file that takes the place of the old one when all of it is on the disk: half a file is never seen.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    # A name of this call's own, for where others are not kept out. (Others could not read tempfile's files.)
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
    """CSV by `write`: rows with the same keys, which stand in the first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room, on the disk or within the user's quota."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota's


def remove(path: Path) -> None:
    """Remove a file if that can be done; what went wrong before is what the caller has to hear of."""
    with suppress(OSError):
        path.unlink()
