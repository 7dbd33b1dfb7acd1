"""Which run a folder belongs to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_runs import SHORT, SMALL, start

from dnc_triton.cli import main
from dnc_triton.training import checkpoint
from dnc_triton.training.folder import WRITTEN, claim, give_up, written
from dnc_triton.training.run import Run
from dnc_triton.training.settings import Settings


def test_runs_that_start_in_one_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    monkeypatch.setattr("dnc_triton.training.report.report", lambda run: "")
    for seed in range(3):
        assert main([*SHORT, "--no-baseline", "--seed", str(seed)]) == 0
    names = ["copy-20260101-000000", "copy-20260101-000000-2", "copy-20260101-000000-3"]
    printed = capsys.readouterr().out
    for seed, name in enumerate(names):
        assert f"Training copy in runs/{name}/" in printed
        assert checkpoint.load(tmp_path / "runs" / name / "checkpoint.pt")["settings"]["seed"] == seed
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == names
    assert main(["train", "copy", "--resume"]) == 0
    assert f"Going on with copy in runs/{names[-1]}/" in capsys.readouterr().out


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    """Of two processes that ask for it at once one gets it; the other is told, and changes nothing."""
    processes = [start(*SHORT, "--run", str(tmp_path), "--seed", str(seed)) for seed in range(2)]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in processes]
    assert sorted(status for _, status in ended) == [0, 2]
    for errors, status in ended:
        assert status == 0 or errors.splitlines()[-1].startswith("dnc_triton: --run: ")
        assert status == 0 or str(tmp_path) in errors.splitlines()[-1]
    (seed,) = (seed for seed, (_, status) in enumerate(ended) if status == 0)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["settings"]["seed"] == seed
    assert Settings.read("copy", tmp_path / "settings.toml").seed == seed


def test_a_folder_that_a_run_has_claimed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One that has saved nothing so far, too."""
    assert claim(tmp_path / "run", "seed = 1")
    assert not claim(tmp_path / "run", "seed = 2")
    assert main([*SHORT, "--run", str(tmp_path / "run")]) == 2
    assert f"got {tmp_path / 'run'}, which has settings.toml; name another folder" in capsys.readouterr().err
    assert (tmp_path / "run" / "settings.toml").read_text() == "seed = 1"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.toml"]


def test_of_two_who_find_a_folder_free_at_once_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnc_triton.training.folder.written", lambda folder: "")
    assert [claim(tmp_path, f"seed = {seed}") for seed in (1, 2)] == [True, False]
    assert (tmp_path / "settings.toml").read_text() == "seed = 1"


def test_a_folder_that_has_to_be_new_is_not_even_an_empty_one(tmp_path: Path) -> None:
    assert not claim(tmp_path, "seed = 1", new=True)
    assert not list(tmp_path.iterdir())
    assert claim(tmp_path, "seed = 1")


def test_a_claim_that_does_not_reach_the_disk_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one may have the folder."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        claim(tmp_path, "seed = 1")
    assert not written(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", "failure.pt"])
def test_a_run_that_left_something_keeps_its_folder(name: str, tmp_path: Path) -> None:
    claim(tmp_path, "seed = 1")
    (tmp_path / name).touch()
    give_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "settings.toml"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_with_what_a_run_would_write_over_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It may be somebody's own."""
    (tmp_path / name).write_text("precious")
    (tmp_path / "notes").write_text("not in the way")
    assert main([*SHORT, "--run", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dnc_triton: --run: {tmp_path} holds a run" if name == "checkpoint.pt" else (
        f"dnc_triton: --run: expected a folder with nothing in it that a run writes, got {tmp_path}, which has {name};"
    ))  # fmt: skip
    assert (tmp_path / name).read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "notes"])


@pytest.mark.parametrize("arguments", [[*SHORT, "--run", ""], ["trace", "run", "--output", ""], ["evaluate", ""]])
def test_an_empty_path_is_not_this_folder(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    """As an unset variable of a shell gives."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected a path, got ''" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/proc/no_such", "file", "file/sub", "file/sub/sub"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if folder.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    monkeypatch.setattr(Run, "train", lambda run: pytest.fail("it trained"))
    assert main([*SHORT, "--run", folder]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--run: expected a folder that can be made and written to, got {folder}" in line
    assert Path("file").read_text() == "precious"


@pytest.mark.usefixtures("_undrawn")
def test_a_run_that_cannot_begin_keeps_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Once the mistake is put right, it is there for the next one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    small = ["train", "shortest_path", *SMALL[:-2], "--steps", "2"]  # without the option that only copying has
    for folder in (["--run", "run"], ["--run", "mine"], [], ["--workers", "1"]):
        assert main([*small, *folder, "--curriculum", "3/1/5"]) == 2
        error = capsys.readouterr().err
        assert error.endswith(
            "dnc_triton: curriculum: expected graphs in which there are such paths, got none for lesson 1\n"
        )
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "runs").iterdir())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    assert main([*small, "--run", "run", "--curriculum", "3-4/1-2/1-2"]) == 0
