"""What may happen to a run, and what is left of it: kills, full disks, numbers that are not finite."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, assert_same_run, small, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from dnc_triton import files
from dnc_triton.cli import main
from dnc_triton.tasks import Batch, CopyTask
from dnc_triton.training import checkpoint
from dnc_triton.training import run as run_module
from dnc_triton.training.folder import held
from dnc_triton.training.report import report
from dnc_triton.training.run import LOG_EVERY, Run


def before_step(run: Run, step: int, act: Callable[[], object]) -> None:
    """Let something happen while the batch of a step is drawn."""
    sample = run.task.sample_training

    def sample_training(*arguments: Any) -> Batch:
        if run.step == step - 1:
            act()
        return sample(*arguments)

    run.task.sample_training = sample_training  # type: ignore[method-assign]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_with_the_same_bits(number: signal.Signals, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["train", "copy", *SMALL, "--steps", str(3 * LOG_EVERY + 7), "--no-baseline"]
    assert main([*arguments, "--run", str(whole)]) == 0

    process = start(*arguments, "--run", str(killed), "--workers", "1")
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    step = checkpoint.load(killed / "checkpoint.pt")["step"]
    assert 0 < step < 3 * LOG_EVERY + 7
    if number == signal.SIGKILL:
        assert step % LOG_EVERY == 0
    else:
        assert process.returncode == 130
        assert f"--resume {killed}" in printed
        assert "Traceback" not in errors

    assert main(["train", "copy", "--resume", str(killed)]) == 0
    assert_same_run(whole, killed)
    for table in ("metrics.csv", "validation.csv"):
        lines = [(folder / table).read_text().splitlines() for folder in (whole, killed)]
        assert len(lines[0]) == len(lines[1])
    events = EventAccumulator(str(killed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("training/dnc_loss")] == [50, 100, 150, 157]


def test_what_a_step_draws_does_not_depend_on_where_the_run_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, a lesson that begins meanwhile, batches drawn ahead by workers: the same bits."""
    settings = small(
        steps=LOG_EVERY + 20, controller="lstm", num_layers=2, dropout=0.5, warmup=10, optimizer="rmsprop", clip=5.0
    )

    def with_lessons(run: Run) -> Run:
        run.task.lessons = [[1], [2, 3]]
        return run

    monkeypatch.setattr(CopyTask, "right", lambda self, outputs, batch: torch.ones(4, dtype=torch.bool))

    whole = with_lessons(Run(settings, tmp_path / "whole"))
    assert whole.train()
    assert whole.lesson == 1
    broken = with_lessons(Run(settings, tmp_path / "broken"))
    for step, workers in ((7, 0), (LOG_EVERY, 1)):
        before_step(broken, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert not broken.train()
        assert broken.step == step
        broken = with_lessons(Run.resume(tmp_path / "broken", workers=workers))
    assert broken.train()
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_those_who_draw_batches_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """Also where a server forks them, as on Linux from Python 3.14 on; the server ends after them."""
    script = "import multiprocessing, dnc_triton.cli, sys; multiprocessing.set_start_method('forkserver')"
    command = [sys.executable, "-c", f"{script}; dnc_triton.cli.main(sys.argv[1:])"]
    arguments = ["train", "copy", *SMALL, "--no-baseline", "--run", str(tmp_path / "run"), "--workers", "1"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # until nobody is left who might write
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_an_interrupt_while_those_who_draw_batches_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal's goes to them too. If they are not forked they import for seconds, and do not know of signals yet."""

    class Interrupted(DataLoader):
        def __iter__(self) -> Any:
            batches = super().__iter__()
            for worker in batches._workers:
                os.kill(worker.pid, signal.SIGINT)
            return batches

    monkeypatch.setattr(run_module, "DataLoader", Interrupted)
    not_forked = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", not_forked)
    run = Run(small(steps=2, baseline=False), tmp_path, workers=1)
    assert len(list(run._batches())) == 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "this process gets them"


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "advice"), [("0", "or a --clip\n"), ("20", "or a lower --clip\n")])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_word(
    clip: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A bound of 0 is no bound: there is no lower one."""
    arguments = ["train", "copy", *SMALL, "--steps", "100", "--no-baseline", "--run", str(tmp_path / "run")]
    assert main([*arguments, "--learning-rate", "1e30", "--clip", clip]) == 2
    error = capsys.readouterr().err
    assert "step 2: dnc: outputs is not finite" in error
    assert "failure.pt" in error
    assert "--learning-rate" in error
    assert error.endswith(advice)


@pytest.mark.parametrize("tensor", ["inputs", "parameter output.bias", "loss", "gradient of output.weight"])
def test_what_is_not_finite_is_named_and_kept(tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(small(steps=100), tmp_path, device="cpu")
    learner, task = run.learners["dnc"], run.task
    loss, sample = task.loss, task.sample_training

    def spoil_parameter() -> None:
        with torch.no_grad():
            dict(learner.model.named_parameters())["output.bias"][0] = torch.inf

    def spoiled_loss(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        if run.step == 6 and learner.model.training and tensor == "loss":
            return loss(outputs, batch) + torch.nan
        if run.step == 6 and tensor.startswith("gradient"):  # the value is finite, its derivative is not
            return loss(outputs, batch) + (0 * outputs).sqrt().sum()
        return loss(outputs, batch)

    def spoiled_sample(*arguments: Any) -> Batch:
        batch = sample(*arguments)
        if run.step == 6 and tensor == "inputs":
            batch.inputs[1, 0, 0] = torch.nan
        return batch

    monkeypatch.setattr(task, "loss", spoiled_loss)
    monkeypatch.setattr(task, "sample_training", spoiled_sample)
    if tensor.startswith("parameter"):
        before_step(run, 7, spoil_parameter)
    found = "gradient of output.bias" if tensor.startswith("gradient") else tensor
    with pytest.raises(FloatingPointError, match=f"step 7: dnc: {found} is not finite.*failure.pt"):
        run.train()

    kept = torch.load(tmp_path / "failure.pt", weights_only=True)
    assert kept["failed_step"] == 7
    assert kept["step"] == 6
    expected = spoiled_sample(4, 0, torch.Generator())  # of the right shapes; the values follow
    assert kept["batch"].keys() == {"inputs", "targets", "scored"}
    assert kept["batch"]["inputs"].shape[0] == expected.inputs.shape[0]
    assert kept["batch"]["inputs"].isfinite().all() == (tensor != "inputs")
    # The run before that step, and the step again.
    again = Run(small(steps=100), tmp_path / "again")
    again.load(kept)
    monkeypatch.setattr(again.task, "loss", spoiled_loss)
    tensors = again.learners["dnc"].examine(Batch(**kept["batch"]), again.task.units(Batch(**kept["batch"])))
    assert next(name for name, value in tensors.items() if not value.isfinite().all()) == found


def test_what_is_looked_into_is_the_step_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers dropped."""
    run = Run(small(controller="lstm", num_layers=2, dropout=0.5, baseline=False), tmp_path)
    spoilt: list[torch.Tensor] = []

    def loss(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        spoilt.append(outputs.detach())
        return outputs.sum() * torch.nan

    monkeypatch.setattr(run.task, "loss", loss)
    with pytest.raises(FloatingPointError, match="step 1: dnc: loss is not finite"):
        run.train()
    failed, again = spoilt
    assert torch.equal(failed, again)


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> int:
    """The steps of a row of the metrics, a tenth of what they are otherwise; a checkpoint is due after each step."""
    for name, value in (("LOG_EVERY", 5), ("CHECKPOINT_SECONDS", 0.0), ("CHECKPOINT_SHARE", 1e9)):
        monkeypatch.setattr(f"dnc_triton.training.run.{name}", value)
    return 5


def test_a_full_disk_loses_nothing(
    row: int, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rescue, folder = tmp_path / "rescue", small_disk / "run"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    monkeypatch.setattr(Run, "_is_best", lambda run, validation: validation["step"] == row)
    settings = small(steps=2 * row + 7, validate_every=row)
    assert Run(settings, tmp_path / "whole").train()

    run = Run(settings, folder)
    before_step(run, row + 3, lambda: fill(small_disk))
    with pytest.raises(OSError, match=r"No space left on device while writing.*make room, move it to") as error:
        run.train()
    assert "The old file is whole, training goes on" in capsys.readouterr().err
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == row + 2
    assert checkpoint.load(folder / "best.pt")["step"] == row
    assert not list(folder.glob("*.part"))

    (rescued,) = rescue.glob("*.pt")
    assert str(rescued) in str(error.value)
    (small_disk / "filler").unlink()
    (folder / "checkpoint.pt").write_bytes(rescued.read_bytes())
    resumed = Run.resume(folder)
    assert resumed.step == settings.steps
    assert resumed.train()
    assert_same_run(tmp_path / "whole", folder)


def test_a_full_disk_with_nowhere_else_to_write(
    row: int, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is what it was, and the run goes on from there to the same end."""
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    settings = small(steps=row + 7)
    assert Run(settings, tmp_path / "whole").train()
    folder = small_disk / "run"
    run = Run(settings, folder)
    before_step(run, row + 3, lambda: fill(small_disk))
    with pytest.raises(OSError, match=f"Make room, then --resume {folder}"):
        run.train()
    (small_disk / "filler").unlink()
    resumed = Run.resume(folder)
    assert resumed.step == row + 2
    assert resumed.train()
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EDQUOT, marks=pytest.mark.slow), errno.EIO])
def test_a_failed_write_is_told_as_what_it_is(
    number: int, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Room is asked for where there is none, and an old file is called whole where there is one."""
    folder, rescue, full = tmp_path / "run", tmp_path / "rescue", number != errno.EIO
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    replace, broken = os.replace, [folder, rescue]

    def fail(source: Path, target: Path) -> None:
        if target.parent in broken:
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    settings = small(steps=row + 7, validate_every=row, baseline=False)
    with pytest.raises(OSError, match=f"{os.strerror(number)} while writing.*All that was trained is lost") as error:
        Run(settings, folder).train()
    assert "Make room" not in str(error.value)
    said = capsys.readouterr().err
    assert "Training goes on and tries again in a while" in said
    assert "old file" not in said
    assert ("make room" in said) == full

    broken.clear()
    run = Run(settings, folder)
    run.save()
    broken += [folder, rescue]
    with pytest.raises(OSError, match=f"since the last checkpoint is lost.*--resume {folder} does it again") as error:
        run.train()
    assert ("Make room" in str(error.value)) == full
    assert "The old file is whole, training goes on" in capsys.readouterr().err

    broken.remove(rescue)
    with pytest.raises(OSError, match=r"The run as it is now.*move it to") as error:
        Run.resume(folder).train()
    assert ("make room" in str(error.value)) == full
    (rescued,) = rescue.glob("*.pt")
    assert checkpoint.load(rescued)["step"] == settings.steps


def test_a_run_whose_folder_cannot_be_made_does_not_train(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Run(small(), tmp_path / "file" / "run")
    before_step(run, 1, lambda: pytest.fail("it trained"))
    with pytest.raises(OSError, match="file"):
        run.train()


def test_the_best_is_what_best_pt_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full at the best validation."""
    save = checkpoint.save

    def full(path: Path, content: dict[str, Any]) -> None:
        if path.name == "best.pt" and content["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", full)
    run = Run(small(steps=6, validate_every=2, baseline=False), tmp_path)
    monkeypatch.setattr(run, "_is_best", lambda row: True)
    held = []
    before_step(run, 5, lambda: held.append((run.best["step"], checkpoint.load(tmp_path / "best.pt")["step"])))
    assert run.train()
    assert held == [(2, 2)]
    assert run.best["step"] == checkpoint.load(tmp_path / "best.pt")["step"] == 6


@pytest.mark.parametrize(("failing", "kept"), [("best.pt", False), ("metrics.csv", True)])
def test_a_checkpoint_is_kept_if_it_was_written_whatever_became_of_the_tables(
    failing: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    run = Run(small(baseline=False), tmp_path)
    run.rows = [{"step": 1}]
    assert run._try_to_save("best.pt") == kept == (tmp_path / "best.pt").exists()


def test_rescued_runs_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a/runs/copy", "a/runs/babi", "b/runs/copy", "a/runs-copy")  # the last has the words of the first
    folders = [tmp_path / f"{name}-20260101-000000" for name in names]
    (tmp_path / "rescue").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "rescue"))
    for folder in folders:
        run = Run(small(steps=1, baseline=False), folder)
        monkeypatch.setattr(run, "save", lambda *name: files.write(Path("/dev/null/nowhere"), b""))
        with pytest.raises(OSError, match=rf"{folder.name}-[0-9a-f]{{8}}-1\.pt"):
            run.train()
    assert len(list((tmp_path / "rescue").glob("*.pt"))) == 4


def test_a_rescued_run_does_not_take_the_place_of_one_of_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named alike from where each was started, and their names end alike."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(OSError, match="The run as it is now"):
            checkpoint.rescue(Path(f"{'long-' * 12}run"), {"step": 7}, OSError(errno.ENOSPC, "No space left"))
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_a_rescued_run_has_a_name_that_files_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command to go on with can be given to a shell."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"my {'long ' * 49}run"
    with pytest.raises(OSError, match=rf"-long-run-[0-9a-f]{{8}}-7\.pt: .*, then --resume '{folder}'$"):
        checkpoint.rescue(folder, {"step": 7}, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_a_result_is_written_before_pictures_that_take_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds no room leaves the page that was there."""
    run = Run(small(steps=2, baseline=False), tmp_path)
    monkeypatch.setattr("dnc_triton.training.report.EVALUATION_SEQUENCES", 10)
    assert run.train()
    (tmp_path / "memory.html").write_text("as it was")
    write = files.write

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".html":
            raise OSError(errno.ENOSPC, "No space left", str(path))
        write(path, content)

    monkeypatch.setattr("dnc_triton.viewer.write", full)
    with pytest.raises(OSError, match=r"No space left: .*memory\.html"):
        report(run)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["steps"] == 2
    assert (tmp_path / "memory.html").read_text() == "as it was"
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_undrawn")
def test_a_run_without_a_best_has_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full at the only validation."""
    run = Run(small(steps=2, baseline=False), tmp_path)
    monkeypatch.setattr(run, "_try_to_save", lambda name: False)
    monkeypatch.setattr("dnc_triton.training.report.EVALUATION_SEQUENCES", 10)
    assert run.train()
    assert "sequences right" in report(run)
    assert json.loads((tmp_path / "result.json").read_text())["best_step"] is None


@pytest.mark.usefixtures("_undrawn")
def test_a_run_that_is_being_trained_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(small(steps=3, baseline=False), tmp_path / "run")
    run.save()
    before_step(run, 2, lambda: statuses.append(main(["train", "copy", "--resume", str(run.folder)])))
    statuses: list[int] = []
    assert run.train()
    assert statuses == [2]
    assert f"{run.folder}: another process trains this run" in capsys.readouterr().err
    assert main(["train", "copy", "--resume", str(run.folder)]) == 0, "now it is free"


@pytest.mark.parametrize(
    "fails",
    ["training.learner.Learner.update", pytest.param("tasks.data.TrainingBatches.__getitem__", marks=pytest.mark.slow)],
)
def test_an_error_ends_those_who_draw_batches(tmp_path: Path, fails: str) -> None:
    """Theirs or another one. They ignore the signals that would; an error that is handled keeps alive what it holds."""
    script = """
import multiprocessing
import dnc_triton.training.learner, dnc_triton.tasks.data
from dnc_triton.cli import main
multiprocessing.set_start_method("fork")  # what is changed here is so there
def fail(*arguments, **options):
    raise RuntimeError("of the run time")
dnc_triton.FAILS = fail
main(["train", "copy", "--workers", "1", "--run", "RUN"])
""".replace("FAILS", fails).replace("RUN", str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "RuntimeError: of the run time"


def test_a_file_system_without_locks_keeps_nobody_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    run = Run(small(steps=1, baseline=False), tmp_path)
    assert run.train()


def test_only_the_process_that_trains_holds_its_run(tmp_path: Path) -> None:
    """Those that draw its batches may outlive it: a killed run is free at once, and rid of what it had half written."""
    left = tmp_path / "checkpoint.pt.01234567.part"
    left.write_bytes(b"half")
    run = Run(small(steps=1, baseline=False), tmp_path, workers=1)
    with held(tmp_path):
        batches = run._batches()
        next(batches)
    assert not left.exists()
    with held(tmp_path):
        del batches
