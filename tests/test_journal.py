"""What TensorBoard is shown of a run, and that a run is none the worse where it can be shown nothing."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from small_runs import small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dnc_triton.training.journal import Journal
from dnc_triton.training.run import Run


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_tensorboard_cannot_encode_is_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    assert Run(small(steps=2, baseline=False), folder).train()
    assert "TensorBoard gets no more of this run" in capsys.readouterr().err


def test_tensorboard_shows_a_run_that_went_on_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    """Rows up to the checkpoint stay, those after it come again. A row's own step and time are no curves."""
    threads = set(threading.enumerate())
    for step, rows in ((0, {2: 1.0, 3: 2.0}), (2, {3: 4.0})):
        journal = Journal(tmp_path, step)
        for row, loss in rows.items():
            journal.add({"step": row, "seconds": 9.0, "loss": loss}, "training")
        journal.close()
        assert set(threading.enumerate()) <= threads, "what writes has ended"
        if step == 0:  # read first, whatever numbers files have
            (file,) = tmp_path.iterdir()
            file.rename(file.with_name("events.out.tfevents.0"))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["training/loss"]
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(2, 1.0), (3, 4.0)]


@pytest.mark.parametrize("failing", ["add_scalar", "flush"])
def test_that_tensorboard_gets_no_more_is_said_once(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{failing}", full)
    journal = Journal(tmp_path, 0)
    for step in (1, 2):
        journal.add({"step": step, "loss": 1.0}, "training")
        journal.flush()
    journal.close()
    assert capsys.readouterr().err.count("TensorBoard gets no more of this run: [Errno 28] No space left") == 1


def test_a_folder_that_may_not_be_written_to_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is asked about first; root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    journal = Journal(tmp_path, 0)
    journal.add({"step": 1, "loss": 1.0}, "training")
    journal.close()
    assert "TensorBoard gets no more of this run: [Errno 13]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
