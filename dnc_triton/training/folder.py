"""Whose the folder of a run is: one run's, and while that is trained one process's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dnc_triton.files import remove

SAVED = ("checkpoint.pt", "best.pt", "failure.pt")
# What a run writes: a folder that has any of it is a run's, or somebody's who wants to keep it.
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
    """The first of what a run writes that is in a folder, or ""."""
    return next((name for name in WRITTEN if (folder / name).exists()), "")


def claim(folder: Path, settings: str, *, new: bool = False) -> bool:
    """Make a folder that of one run, however many ask for it at once: by its settings.toml, which only one can create.

    Args:
        folder: of the run; made if it is not there.
        settings: what settings.toml holds.
        new: whether the folder must not be there already, not even empty.

    Returns:
        whether the folder is the caller's; False: it has what a run writes, or, if it has to be new, is there already.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        if new or written(folder):
            return False
        folder.mkdir(exist_ok=True)  # raises where it is a file
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
    """The inverse of `claim`, for a run that ended before it left anything: another may have the folder."""
    if any((folder / name).exists() for name in SAVED):
        return
    remove(folder / "settings.toml")
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with suppress(OSError):  # unless there is something else in it
        folder.rmdir()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """In the block no other process may hold a folder. Where the system has no such locks, others are not kept out.

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
        for left in folder.glob("*.pt.*.part"):  # by a process that was killed
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
    """In a process that was forked: leave the folders to the one that holds them, or they are held until both end."""
    while _HELD:
        os.close(_HELD.pop())
