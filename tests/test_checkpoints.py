"""Checkpoints that are not what they should be: hostile, damaged, of another run. Nothing is executed from one."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small

from dnc_triton.cli import main
from dnc_triton.training import checkpoint
from dnc_triton.training.run import Run


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("command", [["train", "copy", "--resume"], ["evaluate"], ["trace"]], ids=" ".join)
@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(
    command: list[str], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = {"format": checkpoint.FORMAT, "settings": Hostile(tmp_path / "executed")}
    path = tmp_path / "checkpoint.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    assert main([*command, str(tmp_path)]) == 2
    assert "nothing in it was executed" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "cannot be read: EOFError()"),
        (b"no checkpoint at all", "cannot be read"),
        (b"hello", "cannot be read: KeyError(101)"),
        ({"format": 99}, "expected a checkpoint of format 3, got 99"),
        ({"format": 2}, "expected a checkpoint of format 3, got 2"),
        ({}, "expected a checkpoint of format 3, got None"),
        ([1, 2], "got 'list'"),
        ({"format": checkpoint.FORMAT}, "expected 'settings' of type dict in the checkpoint, got nothing"),
        ({"format": checkpoint.FORMAT, "settings": []}, "'settings' of type dict in the checkpoint, got list"),
    ],
    ids=[
        "empty",
        "garbage",
        "text",
        "another version",
        "an earlier version",
        "no version",
        "a list",
        "without contents",
        "other contents",
    ],
)
def test_a_damaged_checkpoint_is_refused(
    content: Any, word: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert main(["train", "copy", "--resume", str(tmp_path)]) == 2
    assert word in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    whole = Run(small(baseline=False), tmp_path).state_dict()
    for name in whole:
        checkpoint.save(tmp_path / "checkpoint.pt", {key: part for key, part in whole.items() if key != name})
        with pytest.raises(ValueError, match=rf"expected '{name}' of type \w+ in the checkpoint, got nothing$"):
            checkpoint.load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_folder_without_a_checkpoint_is_told_as_one(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(tmp_path), "--checkpoint", name]) == 2
    file = "checkpoint.pt" if name == "last" else "best.pt"
    assert f"{tmp_path}: expected the folder of a run, with a {file}, got none" in capsys.readouterr().err


def test_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    Run(small(), tmp_path).save()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        Run.resume(tmp_path)


def test_a_checkpoint_with_other_numbers_than_were_stored_is_refused(tmp_path: Path) -> None:
    """PyTorch loads it without a word."""
    Run(small(), tmp_path).save()
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        tensors = [record for record in archive.infolist() if "/data/" in record.filename]
        largest = max(tensors, key=lambda record: record.file_size)
        stored = archive.read(largest)
    content = path.read_bytes()
    assert content.count(stored) == 1
    path.write_bytes(content.replace(stored, bytes(len(stored))))
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=f"cannot be read: {largest.filename} in it is damaged"):
        Run.resume(tmp_path)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Run(small(), tmp_path).save()
    content = checkpoint.load(tmp_path / "checkpoint.pt")
    other = Run(small(memory_size=5, num_reads=2), tmp_path / "other")
    with pytest.raises(ValueError, match=r"memory_size is 5 here and 4 there, num_reads is 2 here and 1 there"):
        other.load(content)

    # An earlier version's.
    earlier = {name: value for name, value in content["settings"].items() if name != "clip"}
    with pytest.raises(
        ValueError, match=r"expected the settings task, .*, clip, .* these are on one side alone: clip$"
    ):
        other.load({**content, "settings": earlier})

    # Settings that do not fit the weights beside them.
    content["settings"]["hidden_size"] = 9
    with pytest.raises(ValueError, match=r"expected controller\.\S+ of shape \[9, \d+\].*got \[8, \d+\]"):
        Run(small(hidden_size=9), tmp_path / "other").load(content)

    assert main(["train", "copy", "--resume", str(tmp_path), "--memory-size", "4", "--steps", "5"]) == 2
    assert "--steps 1000, got 5" in capsys.readouterr().err
    assert main(["train", "delayed_copy", "--resume", str(tmp_path)]) == 2
    assert "expected a run of 'delayed_copy', got one of 'copy'" in capsys.readouterr().err

    content["settings"]["no_such_setting"] = 1
    checkpoint.save(tmp_path / "checkpoint.pt", content)
    assert main(["train", "copy", "--resume", str(tmp_path)]) == 2
    assert "no_such_setting" in capsys.readouterr().err


def test_a_checkpoint_with_a_weight_that_there_is_none_of_is_refused(tmp_path: Path) -> None:
    run = Run(small(baseline=False), tmp_path)
    content = run.state_dict()
    content["learners"]["dnc"]["model"]["extra"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^checkpoint: expected extra of shape None.*, got \[2\]"):
        run.load(content)
