"""Training from the command line: it learns, it can be interrupted, and it leaves behind what it says it does."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from small_runs import SMALL, assert_same_run, small, start

from dnc_triton.cli import main
from dnc_triton.tasks import TASKS, Batch, CopyTask, DelayedCopyTask
from dnc_triton.tasks.data import TrainingBatches, generator
from dnc_triton.training import checkpoint, learner, report
from dnc_triton.training.baseline import LSTMBaseline
from dnc_triton.training.run import LOG_EVERY, Run
from dnc_triton.training.settings import Settings


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_learning_rate_rises_to_its_highest_and_falls_to_nothing(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps, rates = learner._schedule(optimizer, small(steps=10, warmup=4, schedule=schedule)), []
    for _ in range(11):  # the last of which is not taken any more
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    falling = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *(falling if schedule == "cosine" else [1.0] * 7)], abs=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_an_optimizer_has_the_rate_and_the_decay_that_are_asked_for(optimizer: str, tmp_path: Path) -> None:
    run = Run(small(optimizer=optimizer, learning_rate=0.5, weight_decay=0.25, baseline=False), tmp_path)
    (group,) = run.learners["dnc"].optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.25)
    assert group.get("momentum") == (0.9 if optimizer == "rmsprop" else None), "the paper's"


def test_copy_sequences_are_what_the_task_says() -> None:
    task = CopyTask(min_length=2, max_length=5, num_bits=3)
    batch = task.sample(7, 4, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (7, 9, 4)
    assert batch.targets.shape == (7, 9, 3)
    assert batch.scored.tolist() == [[False] * 5 + [True] * 4] * 7
    torch.testing.assert_close(batch.inputs[:, :4, :3], batch.targets[:, 5:])
    assert batch.inputs[:, 4].tolist() == [[0, 0, 0, 1]] * 7
    assert not batch.inputs[:, 5:].any()
    assert 0.2 < batch.targets[:, 5:].mean() < 0.8
    lengths = {
        (task.sample_training(1, 0, torch.Generator().manual_seed(seed)).inputs.shape[1] - 1) // 2 for seed in range(50)
    }
    assert lengths == {2, 3, 4, 5}


def test_delayed_copy_gives_the_symbol_back_at_the_end() -> None:
    task = DelayedCopyTask(delay=4)
    batch = task.sample(100, 4, torch.Generator().manual_seed(0))
    inputs, targets = batch.inputs.argmax(-1), batch.targets.squeeze(-1)
    blank = 10
    assert (inputs[:, 1:] == blank).all()
    assert (targets[:, :-1] == blank).all()
    assert (inputs[:, 0] == targets[:, -1]).all()
    assert set(inputs[:, 0].tolist()) == set(range(10))
    right = torch.nn.functional.one_hot(targets, 11).float()
    lines = task.show(right, batch).splitlines()
    symbol = str(int(inputs[0, 0]))
    assert lines[0].split() == ["input", symbol, "_", "_", "_", "_"]
    assert lines[2].split() == ["output", "_", "_", "_", "_", symbol]


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_what_its_number_says(name: str) -> None:
    """The same from any worker, in any order; another number, seed or split gives another."""
    task = Settings.read(name).make_task()
    batches = TrainingBatches(task, 4, 7, 0)
    first = batches[3]
    batches[5]
    again = TrainingBatches(Settings.read(name).make_task(), 4, 7, 0)[3]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    drawn = {
        tuple(torch.randint(2**31, (4,), generator=generator(seed, split, number)).tolist())
        for seed in (7, 8, 7 + 2**32)
        for split in ("train", "validation", "test")
        for number in (3, 4)
    }
    assert len(drawn) == 18


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_what_it_needs_to_be_trained(name: str) -> None:
    settings = Settings.read(name)
    task = settings.make_task()
    generated = generator(1, "train", 0)
    for lesson in range(len(task.lessons)):
        batch = task.sample_training(3, lesson, generated)
        assert batch.inputs.shape == (*batch.scored.shape, task.input_size)
        assert batch.targets.shape[:2] == batch.scored.shape
        assert batch.scored.any(1).all()
    for parameter in inspect.signature(type(task)).parameters:
        assert type(task).arguments[parameter]
    assert set(task.symbols(task.run(settings.make_dnc(task), batch), batch)) == {"input", "target", "output"}


def test_networks_are_as_the_settings_say() -> None:
    """A bound of 0 is none."""
    sizes = {"hidden_size": 7, "memory_size": 5, "word_size": 3, "num_reads": 2, "num_layers": 2}
    numbers = {"dropout": 0.5, "clip": 4.0, "max_activation_gradient": 3.0}
    settings = Settings("copy", controller="gru", **sizes, **numbers)
    dnc = settings.make_dnc(settings.make_task())
    assert {name: getattr(dnc, name) for name in sizes} == sizes
    found = (dnc.controller_kind, dnc.controller.dropout.p, dnc.clip, dnc.max_activation_gradient)
    assert found == ("gru", *numbers.values())
    lstm = settings.make_lstm(settings.make_task()).lstm
    assert (lstm.hidden_size, lstm.num_layers, lstm.dropout) == (7, 2, 0.5)
    settings = Settings("copy", clip=0.0, max_activation_gradient=0.0)
    dnc = settings.make_dnc(settings.make_task())
    assert (dnc.clip, dnc.max_activation_gradient) == (None, None)


@pytest.mark.parametrize("network", ["make_dnc", "make_lstm"])
def test_an_input_gain_multiplies_the_first_weights_on_the_input_alone(network: str) -> None:
    plain, more = (Settings.read("copy", input_gain=gain, controller="lstm", num_layers=2) for gain in (1.0, 4.0))
    task = plain.make_task()
    made = []
    for settings in (plain, more):
        torch.manual_seed(0)
        made.append(getattr(settings, network)(task).state_dict())
    first = {"make_dnc": "controller.layers.0.weight_ih", "make_lstm": "lstm.weight_ih_l0"}[network]
    made[0][first][:, : task.input_size] *= 4
    assert_same_bits(made[1], made[0])


def test_a_baseline_is_called_as_a_dnc_is() -> None:
    """Each row goes on from its state to its length, whatever the others' lengths are and however many steps follow."""
    lstm = LSTMBaseline(3, 5, 2, num_layers=2)
    inputs, lengths = torch.randn(3, 6, 3), torch.tensor([2, 5, 4])
    _, state = lstm(inputs)
    outputs, last = lstm(inputs, state, lengths=lengths)
    assert outputs.shape == (3, 6, 2)
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        alone, last_alone = lstm(inputs[here, :length], tuple(x[:, here].contiguous() for x in state))
        torch.testing.assert_close(outputs[here, :length], alone)
        torch.testing.assert_close(tuple(x[:, here] for x in last), last_alone)


@pytest.mark.parametrize(("num_layers", "dropout"), [(1, 0.0), (2, 0.5)])
def test_a_baseline_has_the_layers_that_are_asked_for(num_layers: int, dropout: float) -> None:
    """And the dropout between them; PyTorch's LSTM warns where there is nothing between."""
    lstm = LSTMBaseline(3, 5, 2, num_layers, dropout=0.5).lstm
    assert (lstm.num_layers, lstm.dropout) == (num_layers, dropout)


def test_delayed_copy_is_learned_and_everything_is_left_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    assert main(["train", "delayed_copy", "--run", str(folder), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "sequences right" in printed
    assert "DNC" in printed
    assert "LSTM" in printed

    result = json.loads((folder / "result.json").read_text())
    assert result["sequences_right"]["delay 4, as trained"]["dnc"] >= 0.99
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(LOG_EVERY, 501, LOG_EVERY))
    assert float(rows[-1]["dnc_loss"]) < float(rows[0]["dnc_loss"]) / 10
    for picture in ("learning_curve.png", "memory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    # The weights are those that were evaluated, and reading them executes nothing.
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    settings = Settings(**content["settings"])
    dnc = settings.make_dnc(settings.make_task())
    dnc.load_state_dict(content["learners"]["dnc"]["model"])
    run = Run.resume(folder)
    assert_same_bits(dict(run.learners["dnc"].model.state_dict()), dict(dnc.state_dict()))
    for name, scores in report.evaluate(run, report.EVALUATION_SEQUENCES).items():
        assert result["sequences_right"][name] == {model: score["right"] for model, score in scores.items()}
    assert not list(folder.glob("*.part"))


@pytest.mark.usefixtures("_undrawn")
def test_interrupted_and_resumed_ends_with_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = 3 * LOG_EVERY + 7
    arguments = ["copy", *SMALL, "--steps", str(steps), "--controller", "lstm"]
    assert main(["train", *arguments, "--run", str(whole)]) == 0

    process = start("train", *arguments, "--run", str(broken))
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert f"--resume {broken}" in printed
    stopped_at = checkpoint.load(broken / "checkpoint.pt")["step"]
    assert 0 < stopped_at < steps

    assert main(["train", "copy", "--resume", str(broken)]) == 0
    assert_same_run(whole, broken)


def test_a_stop_between_two_rows_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM at an exact step: what was summed up for the next row of the metrics is resumed as well."""
    monkeypatch.setattr("dnc_triton.training.run.LOG_EVERY", 5)
    settings = small(steps=9)
    whole = Run(settings, tmp_path / "whole")
    assert whole.train()

    broken = Run(settings, tmp_path / "broken")
    sample = broken.task.sample_training

    def sample_then_stop(*arguments: Any) -> Batch:
        if broken.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments)

    broken.task.sample_training = sample_then_stop  # type: ignore[method-assign]
    assert not broken.train()
    assert broken.step == 7
    resumed = Run.resume(tmp_path / "broken")
    assert resumed.train()
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_step_trains_with_a_gradient_that_is_not_too_long(tmp_path: Path) -> None:
    """Even where the network has just been looked at, without dropout; the norm that is told is the one before."""
    run = Run(small(max_gradient_norm=0.01, baseline=False), tmp_path)
    trained, batch = run.learners["dnc"], run.task.sample(4, 3, torch.Generator().manual_seed(0))
    trained.outputs(batch)
    metrics = trained.backward(batch, run.task.units(batch), 4)
    assert trained.model.training
    gradients = [parameter.grad.norm() for parameter in trained.model.parameters()]
    assert torch.stack(gradients).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert metrics["gradient_norm"] > 0.02


def test_a_row_is_the_mean_over_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is the last one, which has fewer."""
    monkeypatch.setattr("dnc_triton.training.run.LOG_EVERY", 5)
    run = Run(small(steps=7, baseline=False), tmp_path)
    names = ("loss", "bit_error", "right", "gradient_norm")
    monkeypatch.setattr(run.learners["dnc"], "backward", lambda *arguments: dict.fromkeys(names, torch.ones(())))
    monkeypatch.setattr(run.learners["dnc"], "update", lambda: None)
    assert run.train()
    assert [(row["step"], *(row[f"dnc_{name}"] for name in names)) for row in run.rows] == [
        (5, *[1.0] * 4),
        (7, *[1.0] * 4),
    ]


def test_the_time_of_a_run_is_that_of_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what follows the last step, and of what came before an interruption."""
    run = Run(small(steps=2, baseline=False), tmp_path)
    run.seconds["all"] = 1000.0
    monkeypatch.setattr(run, "_validate", lambda: time.sleep(0.2) or {"step": 2, "dnc_right": 0.0, "dnc_loss": 1.0})
    assert run.train()
    assert 0.2 <= run.seconds["validation"] <= run.seconds["all"] - 1000 < 500


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (1e9, 5)])
def test_checkpoints_take_no_more_than_their_share_of_the_time(
    share: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long one takes is known once there is one. Here one is due at every step but the last."""
    monkeypatch.setattr("dnc_triton.training.run.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("dnc_triton.training.run.CHECKPOINT_SHARE", share)
    run = Run(small(steps=6, baseline=False), tmp_path)
    saved: list[str] = []
    monkeypatch.setattr(run, "_try_to_save", lambda name: saved.append(name) or True)
    assert run.train()
    assert saved.count("checkpoint.pt") == count


def test_what_could_not_be_saved_is_tried_again_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the next step, though it takes no time to fail."""
    monkeypatch.setattr("dnc_triton.training.run.LOG_EVERY", 1)
    monkeypatch.setattr("dnc_triton.training.run.CHECKPOINT_SHARE", 1e9)
    run = Run(small(steps=6, baseline=False), tmp_path)
    tried: list[str] = []
    monkeypatch.setattr(run, "_try_to_save", lambda name: tried.append(name) or name != "checkpoint.pt")
    assert run.train()
    assert tried.count("checkpoint.pt") == 1


def test_the_last_step_is_validated(tmp_path: Path) -> None:
    """Whether or not its turn has come: it may be the best."""
    run = Run(small(steps=3, validate_every=2, baseline=False), tmp_path)
    assert run.train()
    assert [row["step"] for row in run.validations] == [2, 3]


def test_tensorboard_has_what_a_checkpoint_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run that is killed after it would lack rows there for good."""
    monkeypatch.setattr("dnc_triton.training.run.LOG_EVERY", 1)
    monkeypatch.setattr("dnc_triton.training.run.CHECKPOINT_SHARE", 1e9)
    run = Run(small(steps=3, validate_every=9, baseline=False), tmp_path)
    happened: list[str] = []
    monkeypatch.setattr("dnc_triton.training.journal.Journal.flush", lambda self: happened.append("flush"))
    monkeypatch.setattr(run, "_try_to_save", lambda name: happened.append(name) or True)
    assert run.train()
    assert happened == ["flush", "checkpoint.pt"] * 2 + ["best.pt"]


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.1), (False, 10)])
def test_a_bar_goes_on_where_the_run_does(
    terminal: bool, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves in a terminal; in a file it would be a line each time."""
    run = Run(small(steps=6, baseline=False), tmp_path)
    run.step = 2
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with run._progress() as bar:
        assert (bar.n, bar.total, bar.mininterval) == (2, 6, seconds)


def test_a_bar_shows_how_many_steps_are_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(Settings.read("copy", hidden_size=8, memory_size=4, baseline=False, steps=3), tmp_path)
    assert run.train()
    assert "| 3/3 [" in capsys.readouterr().err


def test_a_lesson_ends_at_the_share_that_is_asked_for_and_the_last_one_never_does(tmp_path: Path) -> None:
    run = Run(Settings.read("copy", hidden_size=8, memory_size=4, baseline=False, advance_at=1.0), tmp_path)
    run.task.lessons = [[1], [2]]
    lessons = []
    for right in (0.99, 1.0, 1.0):
        run._advance({"dnc_right": right})
        lessons.append(run.lesson)
    assert lessons == [0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["copy", "--steps", "0"], ["steps", "at least 1", "got 0"]),
        (["copy", "--batch-size", "0"], ["batch_size", "at least 1", "got 0"]),
        (["copy", "--validate-every", "0"], ["validate_every", "at least 1", "got 0"]),
        (["copy", "--learning-rate", "0"], ["learning_rate", "above 0", "got 0"]),
        (["copy", "--weight-decay", "-1"], ["weight_decay: expected a finite number, at least 0, got -1"]),
        (["copy", "--max-gradient-norm", "inf"], ["max_gradient_norm: expected a finite number above 0, got inf"]),
        (["copy", "--clip", "inf"], ["clip: expected a finite number, at least 0, got inf"]),
        (["copy", "--controller", "transformer"], ["controller", "lstm, gru, rnn, feedforward, got 'transformer'"]),
        (["copy", "--memory-size", "0"], ["memory_size", "at least 1", "got 0"]),
        (["copy", "--max-length", "0"], ["max_length: expected an integer, at least 1, got 0"]),
        (["copy", "--warmup", "1000"], ["warmup", "less than the 1000 steps", "got 1000"]),
        (["copy", "--optimizer", "sgd"], ["optimizer", "adam, rmsprop", "got 'sgd'"]),
        (["copy", "--schedule", "linear"], ["schedule", "cosine, constant", "got 'linear'"]),
        (["copy", "--precision", "8"], ["precision", "bf16-mixed", "got '8'"]),
        (["copy", "--dropout", "1.5"], ["dropout", "1.5"]),
        (["copy", "--workers", "-1"], ["--workers", "at least 0", "got -1"]),
        (["copy", "--device", "abacus"], ["--device", "'abacus'"]),
        (["copy", "--device", "cuda:99"], ["--device", "'cuda:99'"]),
        (["copy", "--resume", "nowhere"], ["nowhere", "checkpoint.pt"]),
        (["copy", "--resume"], ["--resume", "runs/copy-*", "none"]),
        (["delayed_copy", "--delay", "0"], ["delay", "at least 1", "got 0"]),
        (["delayed_copy", "--num-symbols", "1"], ["num_symbols", "at least 2", "got 1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_get_a_clear_word(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_training_without_its_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['tqdm'] = None; from dnc_triton.cli import main; sys.exit(main(['train', 'copy']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tqdm not installed" in done.stderr
    assert "pip install '.[train]'" in done.stderr  # on PyPI there is no such package
