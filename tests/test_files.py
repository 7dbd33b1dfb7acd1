"""Files are written whole or not at all, and what went wrong is told as what it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from dnc_triton import files


def test_two_who_write_a_file_at_once_write_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, path = os.fsync, tmp_path / "checkpoint.pt"
    written = []

    def write_meanwhile(descriptor: int) -> None:
        written.append(os.fstat(descriptor).st_size)  # by then none of it waits in a buffer of Python's
        monkeypatch.setattr(os, "fsync", fsync)
        files.write(path, b"another")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_meanwhile)
    files.write(path, b"this")
    assert path.read_bytes() == b"this"
    assert list(tmp_path.iterdir()) == [path]
    assert written == [4]


def test_a_write_that_cannot_begin_is_told_as_what_it_is(tmp_path: Path) -> None:
    """Not as a missing file to remove, nor by a name that nobody has heard of."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "checkpoint.pt"
    with pytest.raises(OSError, match=rf"while writing 4 bytes: '{re.escape(str(path))}'$"):
        files.write(path, b"this")


@pytest.mark.parametrize(
    ("rows", "content"),
    [([{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}], b"step,loss\n1,0.5\n2,\n"), ([], b"\n")],
)
def test_a_table_has_lines_as_a_shell_knows_them(rows: list[dict[str, Any]], content: bytes, tmp_path: Path) -> None:
    files.write_table(tmp_path / "metrics.csv", rows)
    assert (tmp_path / "metrics.csv").read_bytes() == content


def test_a_file_is_written_to_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "dnc_triton" / "times.json"
    files.write(path, b"this")
    assert path.read_bytes() == b"this"


def test_a_write_that_is_interrupted_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
