"""Training by several processes: they learn what one learns from the whole batch, and stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from small_runs import SMALL, small, start

from dnc_triton.cli import main
from dnc_triton.training import checkpoint
from dnc_triton.training.report import report
from dnc_triton.training.run import Run

# One step of a Learner in each of two processes: the gradient is that of one process with the whole batch. Rows of
# different lengths make that wrong if each process divides by its own units.
GRADIENTS = """
import os
import sys
import torch
import torch.distributed as dist
from lightning_fabric import Fabric

from dnc_triton.training.baseline import LSTMBaseline
from dnc_triton.training.learner import Learner, make_fabric
from dnc_triton.training.settings import Settings

settings = Settings("copy", {"max_length": 3}, hidden_size=6, memory_size=4, word_size=4, batch_size=5, clip=20.0,
                    controller=sys.argv[1], num_layers=2, max_gradient_norm=0.01, precision=sys.argv[2])
task = settings.make_task()
batch = task.sample(5, 3, torch.Generator().manual_seed(0))
batch = batch._replace(lengths=torch.tensor([7, 5, 7, 6, 7]))
batch = batch._replace(scored=batch.scored & (torch.arange(7) < batch.lengths[:, None]))
units = task.units(batch)

def learner(fabric, kind):
    torch.manual_seed(0)
    model = settings.make_dnc(task) if kind == "dnc" else LSTMBaseline(task.input_size, 6, task.output_size, 2)
    return Learner(task, model, settings, fabric)

if sys.argv[2] == "64-true":
    torch.set_default_dtype(torch.float64)  # of what Fabric gives back
fabric = make_fabric("cpu", settings.precision)
assert fabric.world_size == 2
part = batch.rows(slice(fabric.global_rank, None, 2))
assert task.units(part) * 2 != units
alone = Fabric(accelerator="cpu", devices=1, precision=settings.precision, plugins=[])
for kind in ("dnc", "lstm"):
    whole, shared = learner(alone, kind), learner(fabric, kind)
    for _ in range(2):
        expected, metrics = whole.backward(batch, units, 5), shared.backward(part, units, 5)
        tolerance = dict(rtol=1e-10, atol=1e-14) if sys.argv[2] == "64-true" else dict(rtol=1e-4, atol=1e-7)
        for key, value in metrics.items():
            total = fabric.all_reduce(value.clone(), reduce_op="sum")
            torch.testing.assert_close(total, expected[key], **tolerance)
        for (name, a), b in zip(whole.model.named_parameters(), shared.model.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, **tolerance, msg=lambda text: f"{kind} {name}: {text}")
        whole.update(), shared.update()
dist.destroy_process_group()
# Without the interpreter's own end: in it, a thread of gloo aborts the process now and then.
os._exit(0)
"""


# In each of two processes.
BEST = """
import os
import sys
from pathlib import Path
from test_training_distributed import train_with_its_best_amid_a_row

train_with_its_best_amid_a_row(Path(sys.argv[1]))
os._exit(0)
"""


def train_with_its_best_amid_a_row(folder: Path) -> None:
    """A row of the metrics sums up several steps; the best is not its last."""
    run = Run(small(steps=3, validate_every=2), folder)
    run._is_best = lambda row: row["step"] == 2  # type: ignore[method-assign]
    run.train()


def run_script(text: str, folder: Path, *arguments: str) -> None:
    """Run it by torchrun, with the modules of this folder, to its good end."""
    script = folder / "script.py"
    script.write_text(text)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("controller", "precision"),
    [("lstm", "64-true"), pytest.param("feedforward", "32-true", marks=pytest.mark.slow)],
)
def test_two_processes_have_the_gradients_of_one(controller: str, precision: str, tmp_path: Path) -> None:
    run_script(GRADIENTS, tmp_path, controller, precision)


def test_the_best_of_two_processes_has_the_sums_of_both(tmp_path: Path) -> None:
    train_with_its_best_amid_a_row(tmp_path / "1")
    run_script(BEST, tmp_path, str(tmp_path / "2"))
    one, two = (checkpoint.load(tmp_path / folder / "best.pt") for folder in ("1", "2"))
    assert one["step"] == two["step"] == 2
    torch.testing.assert_close(two["sums"], one["sums"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_and_resumed(tmp_path: Path) -> None:
    """torchrun's SIGTERM, then one process goes on where two stopped; the numbers are those of one from the start."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    arguments = ["train", "copy", *SMALL, "--steps", "150", "--validate-every", "50"]
    assert main([*arguments, "--run", str(whole)]) == 0

    process = start(*arguments, "--folder", str(shared), processes=2)
    deadline = time.monotonic() + 120
    while not (shared / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert "on cpu, 2 processes" in printed, errors
    assert printed.count("Stopped at step") == 1
    stopped = checkpoint.load(shared / "checkpoint.pt")["step"]
    assert 50 <= stopped < 150

    assert main(["train", "copy", "--resume", str(shared)]) == 0
    contents = [checkpoint.load(folder / "checkpoint.pt") for folder in (whole, shared)]
    for rows in ("rows", "validations"):
        for a, b in zip(contents[0][rows], contents[1][rows], strict=True):
            assert {**b, "seconds": 0} == pytest.approx({**a, "seconds": 0}, rel=1e-3, abs=1e-4)
    for name, learner in contents[0]["learners"].items():
        torch.testing.assert_close(contents[1]["learners"][name]["model"], learner["model"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_stop_together_where_one_has_a_bad_number(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("train", "copy", *SMALL, "--learning-rate", "1e30", "--folder", str(folder), processes=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "step 2: dnc: outputs is not finite" in errors
    kept = torch.load(folder / "failure.pt", weights_only=True)
    assert kept["step"] == 1
    assert len(kept["batch"]["inputs"]) == 4


def test_the_first_process_alone_writes_what_a_run_has_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnc_triton.training.report.EVALUATION_SEQUENCES", 10)
    monkeypatch.setattr(Fabric, "is_global_zero", False)
    assert report(Run(small(baseline=False), tmp_path)) == ""
    assert not list(tmp_path.iterdir())


def test_the_first_process_alone_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Run, "train", lambda run: False)
    monkeypatch.setattr(Fabric, "is_global_zero", False)
    assert main(["train", "copy", *SMALL, "--folder", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().out == ""


def test_each_process_drops_numbers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for rank in (0, 1):
        run = Run(small(steps=1, baseline=False), tmp_path)
        monkeypatch.setattr(Fabric, "global_rank", rank)
        monkeypatch.setattr(
            run.learners["dnc"], "backward", lambda *_: seeds.append(torch.initial_seed()) or {"_loss": torch.ones(())}
        )
        run._learn(run.task.sample(4, 3, torch.Generator()), False, False)
    assert len(set(seeds)) == 2


def test_more_processes_than_sequences_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Fabric, "world_size", 2)
    assert main(["train", "copy", "--batch-size", "1", "--folder", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert "batch_size: expected at least one sequence for each of 2 processes, got 1" in errors
