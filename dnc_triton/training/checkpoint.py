"""Checkpoints of a run: written whole or not at all, and read without executing anything in them."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shlex
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import torch

from dnc_triton.files import is_full, write

FORMAT = 3
# What a checkpoint holds besides its format: name → type.
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


def save(path: Path, content: dict[str, Any]) -> None:
    """Save as by `torch.save`, whole or not at all, in the present format."""
    buffer = io.BytesIO()  # torch.save would report a full disk as an internal error of its writer
    torch.save({"format": FORMAT, **content}, buffer)
    write(path, buffer.getvalue())


def rescue(folder: Path, content: dict[str, Any], error: OSError) -> NoReturn:
    """Save the end of a run, which could not be saved in its own folder, among the system's temporary files.

    Args:
        folder: of the run.
        content: of the checkpoint.
        error: why it could not be saved in the folder.

    Raises:
        OSError: always; its message says where the run is now, or what is lost, and how to go on.
    """
    name = "-".join(re.findall(r"\w+", str(folder.resolve())))[-60:]  # a file name may have at most 255 bytes
    own = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]  # other paths may have the same words
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
        # PyTorch does not check that what it reads is what was written.
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
