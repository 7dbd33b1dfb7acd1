"""Files of a run that are whole or not there, and reading them without executing anything in them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

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


def write(path: Path, content: bytes) -> None:
    """Write a file that takes the place of the old one when all of it is on the disk: nobody ever sees half a file.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror} while writing {len(content)} bytes", str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` by `write`, in the present format."""
    buffer = io.BytesIO()  # torch.save reports a full disk as an internal error of its writer
    torch.save({"format": FORMAT, **content}, buffer)
    write(path, buffer.getvalue())


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
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected a checkpoint of a run, got a file that cannot be read, or holds more than tensors, "
            "numbers and texts; nothing in it was executed. If it was good once, take a copy of it, or start anew"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: expected a checkpoint of a run, got a file that cannot be read: {error}") from error
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
