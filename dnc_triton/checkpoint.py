"""Files of a run that are whole or not there, and reading them without executing anything in them."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import pickle
import re
import shlex
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

FORMAT = 3
# What a checkpoint holds besides its format, and of which type.
CONTENTS: dict[str, type] = {
    "settings": dict,
    "step": int,
    "lesson": int,
    "seconds": dict,
    "rows": list,
    "sums": dict,
    "validations": list,
    "best": dict,
    "learners": dict,
}

# Any of these says that a folder is a run's.
OF_A_RUN = ("checkpoint.pt", "best.pt", "failure.pt", "settings.toml")

_HELD: set[int] = set()  # the descriptors of the folders that this process holds


def claim(folder: Path, settings: str, *, new: bool = False) -> bool:
    """Make a folder that of one run, however many ask for it at once: by its settings.toml, which only one can create.

    Args:
        folder: of the run; made if it is not there.
        settings: what settings.toml holds.
        new: whether the folder must not be there already, not even empty.

    Returns:
        whether the folder is the caller's; False: it is another run's, or, if it has to be new, there already.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        if new or any((folder / name).exists() for name in OF_A_RUN):
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
        _remove(path)
        raise
    return True


def give_up(folder: Path) -> None:
    """The inverse of `claim`, for a run that ended before it left anything: another may have the folder."""
    if any((folder / name).exists() for name in OF_A_RUN[:-1]):
        return
    _remove(folder / "settings.toml")
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
            _remove(left)
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


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room, on the disk or within the user's quota."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota's


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
        _remove(temporary)
        raise OSError(error.errno, f"{error.strerror} while writing {len(content)} bytes", str(path)) from error
    except BaseException:
        _remove(temporary)
        raise


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV by `write`: rows with the same keys, which stand in the first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def _remove(path: Path) -> None:
    """Remove a file if that can be done; what went wrong before is what the caller has to hear of."""
    with suppress(OSError):
        path.unlink()


def save(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` by `write`, in the present format."""
    buffer = io.BytesIO()  # torch.save reports a full disk as an internal error of its writer
    torch.save({"format": FORMAT, **content}, buffer)
    write(path, buffer.getvalue())


def rescue(folder: Path, content: dict[str, Any], error: OSError) -> NoReturn:
    """Save the end of a run, which its own folder could not take, among the system's temporary files.

    Args:
        folder: of the run.
        content: of the checkpoint.
        error: why it could not be saved in the folder.

    Raises:
        OSError: always: it says where the run is now, or what is lost, and how to go on.
    """
    name = "-".join(re.findall(r"\w+", str(folder.resolve())))[-60:]  # a file's name has 255 bytes
    own = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]  # others may have the same words
    rescued = Path(tempfile.gettempdir()) / f"{name}-{own}-{content['step']}.pt"
    resume = f"--resume {shlex.quote(str(folder))}"
    try:
        save(rescued, content)
    except OSError as second:
        lost = "All that was trained is lost"
        if (folder / "checkpoint.pt").exists():
            first = "Make room, then" if is_full(error) else "When it can be written to again,"
            lost = f"What was trained since the last checkpoint is lost. {first} {resume} does it again"
        raise OSError(f"{error}; {second}. {lost}") from error
    first = "make room" if is_full(error) else f"see that {folder} can be written to"
    raise OSError(
        f"{error}. The run as it is now, at step {content['step']}, is in {rescued}: {first}, move it to "
        f"{folder}/checkpoint.pt, then {resume}"
    ) from error


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. Nothing in it is executed: it is read with `weights_only`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another version, no checkpoint, or would have to be executed to be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: expected the folder of a run, with a {path.name}, got none")
    content = path.read_bytes()
    try:
        # PyTorch does not look whether what is stored is what was stored.
        if zipfile.is_zipfile(io.BytesIO(content)) and (record := zipfile.ZipFile(io.BytesIO(content)).testzip()):
            raise ValueError(f"{record} in it is damaged; if there is a copy of it, take that, or start anew")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a checkpoint of a run, got a file that cannot be read, or holds more than tensors, "
            "numbers and texts; nothing in it was executed. If it was good once, take a copy of it, or start anew"
        ) from error
    except (
        *(RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError),
        *(zipfile.BadZipFile, NotImplementedError, zlib.error),
    ) as error:
        reason = repr(error) if isinstance(error, KeyError) or not str(error) else error
        raise ValueError(f"{path}: expected a checkpoint of a run, got a file that cannot be read: {reason}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path}: expected a checkpoint of format {FORMAT}, got {found!r}; go on with the version that wrote it"
        )
    for name, kind in CONTENTS.items():
        if not isinstance(checkpoint.get(name), kind):
            found = type(checkpoint[name]).__name__ if name in checkpoint else "nothing"
            raise ValueError(f"{path}: expected {name!r} of type {kind.__name__} in the checkpoint, got {found}")
    return checkpoint
