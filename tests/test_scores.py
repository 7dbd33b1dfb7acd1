"""What a run has come to: how many are right, in tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from small_runs import small

from dnc_triton.tasks import TASKS, Batch, Task
from dnc_triton.tasks.data import generator
from dnc_triton.training.report import draw, evaluate, report, table
from dnc_triton.training.run import VALIDATION_SIZES, Run
from dnc_triton.training.settings import Settings


@pytest.mark.parametrize("task", ["graph_traversal", "block_puzzle", "copy", "shortest_path"])
def test_no_sequence_is_validated_twice(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lesson that names a size more often than others would have the same sequences again."""
    run = Run(Settings.read(task, hidden_size=8, baseline=False), tmp_path)
    asked = []
    monkeypatch.setattr(run, "score", lambda sizes, *arguments: asked.append(sizes) or {"dnc": {"loss": 1.0}})
    run._validate()
    (sizes,) = asked
    assert sorted(set(sizes)) == sorted(sizes)
    assert max(sizes) == max(run.task.lessons[-1])
    assert len(sizes) <= VALIDATION_SIZES


def test_a_score_is_per_unit_and_per_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all sizes, each as often as the others."""
    run = Run(small(), tmp_path)
    monkeypatch.setattr(run.task, "right", lambda *_: torch.tensor([True, False]))
    sums = torch.zeros(3)
    for size in (1, 3):
        batch = run.task.sample(2, size, generator(run.settings.seed, "test", size), split="test")
        outputs, _ = run.learners["dnc"].model(batch.inputs)
        loss, wrong = run.task.loss(outputs, batch), run.task.wrong(outputs, batch).sum()
        sums += torch.stack([loss, wrong, run.task.units(batch)]).detach()
    loss, wrong, units = sums.tolist()
    assert units == 2 * (1 + 3) * 8
    expected = {"loss": loss / units, "bit_error": wrong / units, "right": 0.5}
    assert run.score([1, 3], 3, "test")["dnc"] == pytest.approx(expected)


def test_a_score_is_the_same_each_time(tmp_path: Path) -> None:
    """Dropout is off in it."""
    run = Run(small(controller="lstm", num_layers=2, dropout=0.5), tmp_path)
    assert run.score([3], 20, "validation") == run.score([3], 20, "validation")


def right_logits(task: Task, batch: Batch) -> torch.Tensor:
    """Outputs that are sure of every target."""
    targets = batch.targets
    if not targets.is_floating_point():
        targets = torch.nn.functional.one_hot(targets, task.output_size // targets.shape[-1]).flatten(2)
    return 20 * (2 * targets.float() - 1)


@pytest.mark.parametrize("name", TASKS)
def test_right_outputs_are_right_and_each_flip_is_counted(name: str) -> None:
    task = Settings.read(name).make_task()
    batch = task.sample(5, task.lessons[-1][-1], generator(0, "train", 0))
    logits = right_logits(task, batch)
    assert not task.wrong(logits, batch).any()
    assert task.right(logits, batch).all()
    assert task.loss(logits, batch) / task.units(batch) < 1e-6
    last = batch.scored[2].nonzero()[-1]
    logits[2, last] = -logits[2, last]
    wrong = task.wrong(logits, batch)
    assert wrong.flatten(1).any(1).tolist() == [False, False, True, False, False]
    assert task.right(logits, batch).tolist() == [True, True, False, True, True]
    assert task.loss(logits, batch) > 1
    # What is not scored changes nothing.
    logits[~batch.scored] = torch.randn_like(logits[~batch.scored])
    assert torch.equal(task.wrong(logits, batch), wrong)


@pytest.mark.parametrize("name", TASKS)
def test_a_size_that_there_is_none_of_is_refused(name: str) -> None:
    """Neither wrapped around to another lesson nor left to an error of PyTorch's."""
    task = Settings.read(name).make_task()
    largest = {"translation": 4, "babi": 3, "graph_traversal": 2, "shortest_path": 3, "block_puzzle": 3}
    least = {"associative_recall": 2, "repeat_copy": 1001}.get(name, 1)
    task.sample(1, least, generator(0, "test", 0))
    sizes = [-1, 0, least - 1] + ([largest[name] + 1] if name in largest else [])
    for size in sizes + ([3000] if name == "repeat_copy" else []):
        with pytest.raises(ValueError, match=f"^size: expected .*, got {size}$"):
            task.sample(1, size, generator(0, "test", 0))


@pytest.mark.parametrize("name", TASKS)
def test_a_picture_shows_targets_on_the_channels_of_the_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symbols one-hot, nothing where nothing is asked for: such outputs would be right."""
    run = Run(Settings.read(name, hidden_size=8, memory_size=4, baseline=False), tmp_path)
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr("dnc_triton.training.report.write_page", lambda *arguments, **named: None)
    monkeypatch.setattr(
        "dnc_triton.training.report.draw_memory", lambda trace, inputs, targets, path: drawn.append(targets)
    )
    draw(run, tmp_path)
    batch = run.task.sample(1, run.task.lessons[-1][-1], generator(0, "validation", 0), split="validation")
    assert drawn[0].shape == (batch.inputs.shape[1], run.task.output_size)
    assert not drawn[0][~batch.scored[0]].any()
    assert run.task.right(20 * (2 * drawn[0].float() - 1).unsqueeze(0), batch).all()


def test_another_way_that_is_right_is_not_marked_as_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is one of several shortest paths."""
    run = Run(Settings.read("shortest_path", hidden_size=8, memory_size=4, baseline=False), tmp_path)
    judged = torch.tensor([[[False, False], [True, False]]])
    pages: list[dict[str, Any]] = []
    monkeypatch.setattr("dnc_triton.training.report.draw_memory", lambda *arguments: None)
    monkeypatch.setattr("dnc_triton.training.report.write_page", lambda *arguments, **named: pages.append(named))
    monkeypatch.setattr(run.task, "wrong", lambda outputs, batch: judged)
    draw(run, tmp_path)
    assert pages[0]["wrong"] == [False, True]


def test_a_picture_shows_how_the_network_answers_the_sequence_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout, and by a backend that keeps a trace, whatever the environment asks for."""
    pages: list[tuple[Any, str]] = []
    monkeypatch.setattr("dnc_triton.training.report.draw_memory", lambda *arguments: None)
    monkeypatch.setattr(
        "dnc_triton.training.report.write_page", lambda trace, path, **named: pages.append((trace, named["title"]))
    )
    monkeypatch.setenv("DNC_TRITON_BACKEND", "torch_sequence")
    run = Run(small(steps=9, controller="lstm", num_layers=2, dropout=0.5, baseline=False), tmp_path)
    run.step = 4
    for index in (0, 0, 1):
        draw(run, tmp_path, index=index)
    traces, titles = zip(*pages, strict=True)
    assert titles == tuple(f"copy, size 3, sequence {index}, step 4" for index in (0, 0, 1))
    assert_same_bits(traces[0], traces[1])
    assert not torch.equal(traces[0].usage, traces[2].usage)


def test_what_is_evaluated_was_neither_trained_on_nor_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small(baseline=False), tmp_path)
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(run, "score", lambda sizes, *arguments: asked.append(arguments))
    assert evaluate(run, 7).keys() == run.task.evaluations.keys()
    assert asked == [(7, "test")] * len(run.task.evaluations)


def test_a_table_has_the_sequences_right_and_then_what_the_task_says_of_the_wrong_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small(baseline=False), tmp_path)
    monkeypatch.setattr(run.task, "table", lambda errors: f"wrong {errors}")
    lines = table(run, {"short": {"dnc": {"loss": 9.0, "bit_error": 0.25, "right": 0.75}}}).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["sequences", "right", "DNC"],
        ["short", "75.0%"],
        [],
    ]
    assert lines[3:] == ["wrong {'short': {'dnc': 0.25}}"]


@pytest.mark.usefixtures("_undrawn")
def test_the_time_and_its_parts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnc_triton.training.report.EVALUATION_SEQUENCES", 10)
    run = Run(small(baseline=False), tmp_path)
    run.seconds = {"all": 10.0, "data": 1.0, "logging": 0.0, "validation": 2.0, "checkpoints": 0.5}
    parts = "data 10.0%, logging 0.0%, validation 20.0%, checkpoints 5.0%"
    assert f"10 s of training, of which {parts}; see {tmp_path}/" in report(run)
    assert json.loads((tmp_path / "result.json").read_text())["seconds"] == 10.0
