"""Who owns a run's folder: one run, and while that is trained, one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dnc_triton.files import remove

SAVED = ("checkpoint.pt", "best.pt", "failure.pt")
# What a run writes: a folder with any of these belongs to a run, or to somebody who wants to keep it.
WRITTEN = (
    *SAVED,
    "settings.toml",
    "metrics.csv",
    "validation.csv",
    "tensorboard",
    "result.json",
    "learning_curve.png",
    "memory.png",
    "memory.html",
)

_HELD: set[int] = set()  # the descriptors of the folders that this process holds


def written(folder: Path) -> str:
    """The first of the files in `WRITTEN` that is in a folder, or ""."""
    return next((name for name in WRITTEN if (folder / name).exists()), "")


def claim(folder: Path, settings: str, *, new: bool = False) -> bool:
    """Claim a folder for one run, however many ask for it at once: only one can create its settings.toml.

    Args:
        folder: of the run; made if it is not there.
        settings: what settings.toml holds.
        new: whether the folder must not exist yet, not even empty.

    Returns:
        whether the folder is the caller's now; False if it holds files that a run writes, or must be new but exists.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        if new or written(folder):
            return False
        folder.mkdir(exist_ok=True)  # raises if it is a file
    path = folder / "settings.toml"
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(settings.encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        remove(path)
        raise
    return True


def give_up(folder: Path) -> None:
    """The inverse of `claim`, for a run that ended before it saved anything: another may have the folder."""
    if any((folder / name).exists() for name in SAVED):
        return
    remove(folder / "settings.toml")
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with suppress(OSError):  # it stays if there is something else in it
        folder.rmdir()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """In the block no other process can hold the folder. On systems without such locks, others are not kept out.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.glob("*.pt.*.part"):  # left by a process that was killed
            remove(left)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"{folder}: another process trains this run; wait for its end, or name another") from error
    except OSError:  # a file system without locks
        pass
    _HELD.add(descriptor)
    try:
        yield
    finally:
        _HELD.remove(descriptor)
        os.close(descriptor)


def let_go() -> None:
    """In a forked process: leave the folders to the parent, or they would be held until both processes end."""
    while _HELD:
        os.close(_HELD.pop())
