"""The tasks for the memory: what a plain reader of the inputs answers is what they ask for.

Each solver reads the numbers step by step as the docstring of its task says, in plain Python, and never sees targets.
It gives the answer as step → bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dnc_triton.tasks import (
    AssociativeRecallTask,
    Batch,
    KeyValueTask,
    PrioritySortTask,
    RepeatCopyTask,
    Task,
)
from dnc_triton.training.settings import Settings

Steps = list[list[float]]


def solve_repeat_copy(steps: Steps) -> dict[int, list[float]]:
    pattern: Steps = []
    repeats = end = 0
    for time, (*bits, start, count) in enumerate(steps):
        if start:
            assert time == 0
            assert not any(bits)
            assert not count
        elif count:
            assert not any(bits)
            repeats, end = round(count * 10), time
            break
        else:
            pattern.append(bits)
    assert not any(value for step in steps[end + 1 :] for value in step)
    answer: Steps = []
    for _ in range(repeats):
        answer += [[*bits, 0] for bits in pattern]
    answer.append([0] * len(pattern[0]) + [1])
    return {end + 1 + index: bits for index, bits in enumerate(answer)}


def solve_associative_recall(steps: Steps) -> dict[int, list[float]]:
    items: list[Steps] = []
    query: Steps | None = None
    end = 0
    for time, (*bits, delimiter, ask) in enumerate(steps):
        if ask:
            assert not any(bits)
            assert not delimiter
            if query is not None:
                end = time
                break
            query = []
        elif delimiter:
            assert not any(bits)
            assert query is None
            items.append([])
        else:
            (items[-1] if query is None else query).append(bits)
    assert not any(value for step in steps[end + 1 :] for value in step)
    assert items.count(query or []) == 1
    answer = items[items.index(query or []) + 1]
    return {end + 1 + index: bits for index, bits in enumerate(answer)}


def solve_key_value(steps: Steps) -> dict[int, list[float]]:
    width = len(steps[0]) // 2
    values: dict[tuple[float, ...], list[float]] = {}
    answers: dict[int, list[float]] = {}
    asked = False
    for time, (*bits, ask) in enumerate(steps):
        key, value = tuple(bits[:width]), bits[width:]
        if ask:
            assert not any(bits)
            asked = True
        elif asked:
            assert not any(value)
            answers[time] = values.pop(key)  # asked for once
        else:
            assert key not in values
            values[key] = value
    assert not values
    return answers


def solve_priority_sort(steps: Steps) -> dict[int, list[float]]:
    vectors = []
    for time, (*bits, priority, ask) in enumerate(steps):
        if ask:
            assert not any(bits)
            assert not priority
            break
        assert -1 <= priority <= 1
        vectors.append((-priority, time, bits))
    rest = steps[time + 1 :]
    assert not any(value for step in rest for value in step)
    return {time + 1 + rank: bits for rank, (_, _, bits) in enumerate(sorted(vectors)[: len(rest)])}


SOLVERS: dict[str, Callable[[Steps], dict[int, list[float]]]] = {
    "repeat_copy": solve_repeat_copy,
    "associative_recall": solve_associative_recall,
    "key_value": solve_key_value,
    "priority_sort": solve_priority_sort,
}


def assert_solved(name: str, batch: Batch) -> None:
    for inputs, targets, scored in zip(batch.inputs, batch.targets, batch.scored, strict=True):
        answer = SOLVERS[name]([[round(value, 5) for value in step] for step in inputs.tolist()])
        assert scored.nonzero().flatten().tolist() == sorted(answer)
        assert {step: targets[step].tolist() for step in answer} == answer


@pytest.mark.parametrize("name", SOLVERS)
def test_a_plain_reader_of_the_inputs_finds_the_targets(name: str) -> None:
    task = Settings.read(name).make_task()
    sizes = {size for group in (*task.lessons, *task.evaluations.values()) for size in group}
    for size in sizes:
        assert_solved(name, task.sample(3, size, torch.Generator().manual_seed(size)))


SMALLEST: list[tuple[Task, int, int]] = [
    (RepeatCopyTask(1, 1, 1, 1, num_bits=1), 1001, 5),
    (AssociativeRecallTask(2, 2, item_length=1, num_bits=1), 2, 8),
    (KeyValueTask(1, 1, num_bits=1), 1, 3),
    (KeyValueTask(1, 2, num_bits=1), 2, 5),  # every key there is
    (PrioritySortTask(1, 1, num_bits=1), 1, 3),
    (PrioritySortTask(5, 1, num_bits=2), 5, 7),
    (PrioritySortTask(5, 3, num_bits=2), 2, 5),  # fewer shown than are asked for
]


@pytest.mark.parametrize(("task", "size", "steps"), SMALLEST, ids=lambda value: getattr(value, "name", str(value)))
def test_the_smallest_sequences(task: Task, size: int, steps: int) -> None:
    batch = task.sample(20, size, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (20, steps, task.input_size)
    assert_solved(task.name, batch)
    assert task.sample(0, size, torch.Generator()).inputs.shape == (0, steps, task.input_size)
    assert task.sample(1, size, torch.Generator()).inputs.shape == (1, steps, task.input_size)


def test_every_item_but_the_last_is_asked_for_and_every_order_of_items_comes() -> None:
    task = AssociativeRecallTask(3, 3, item_length=1, num_bits=2)
    batch = task.sample(2000, 3, torch.Generator().manual_seed(0))
    items = batch.inputs[:, [1, 3, 5], :2] @ torch.tensor([2.0, 1.0])
    asked = batch.inputs[:, 7, :2] @ torch.tensor([2.0, 1.0])
    place = (items == asked.unsqueeze(1)).int().argmax(1)
    assert place.bincount(minlength=3).tolist()[2] == 0
    assert 900 < (place == 0).sum() < 1100
    _, counts = items.unique(dim=0, return_counts=True)
    assert len(counts) == 24  # 4 · 3 · 2 lists of different items
    assert counts.min() > 45
    assert counts.max() < 125


def test_words_of_more_bits_than_an_integer_has() -> None:
    batch = KeyValueTask(2, 3, num_bits=100).sample(50, 3, torch.Generator().manual_seed(0))
    assert_solved("key_value", batch)
    assert 0.3 < batch.inputs[:, :3, 62:100].mean() < 0.7


def test_of_equal_priorities_the_first_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    batch = PrioritySortTask(6, 4).sample(3, 6, torch.Generator().manual_seed(0))
    assert torch.equal(batch.targets[:, 7:], batch.inputs[:, :4, :8])


def test_lessons_grow_to_what_is_reported_as_trained() -> None:
    for name in SOLVERS:
        task = Settings.read(name).make_task()
        trained = next(sizes for label, sizes in task.evaluations.items() if "as trained" in label)
        assert list(task.lessons[-1]) == list(trained)
        hardest = [max(lesson) for lesson in task.lessons]
        assert hardest == sorted(hardest)


def test_beyond_the_different_words_there_is_nothing_to_report() -> None:
    assert len(KeyValueTask(1, 4, num_bits=2).evaluations) == 1
    assert len(KeyValueTask(1, 2, num_bits=2).evaluations) == 2
    assert len(AssociativeRecallTask(2, 4, item_length=1, num_bits=2).evaluations) == 1
    with pytest.raises(ValueError, match=r"size: expected at most 4, .* got 5"):
        KeyValueTask(1, 4, num_bits=2).sample(1, 5, torch.Generator())


def test_what_is_shown_of_a_sequence() -> None:
    task = RepeatCopyTask(2, 2, 2, 2, num_bits=2)
    batch = task.sample(1, 2002, torch.Generator().manual_seed(0))
    lines = task.show(20 * batch.targets - 10, batch).splitlines()
    width = batch.inputs.shape[1]
    assert [line[:8].strip() for line in lines] == ["input", "", "", "", "target", "", "", "output", "", ""]
    assert lines[2][8:] == "█" + "·" * (width - 1)
    assert lines[3][8:] == "···░" + "·" * (width - 4)  # 2 of 10
    assert [line[8:] for line in lines[4:7]] == [line[8:] for line in lines[7:]]

    sort = PrioritySortTask(3, 2, num_bits=2)
    batch = sort.sample(1, 3, torch.Generator().manual_seed(0))
    words = sort.symbols(20 * batch.targets - 10, batch)
    priorities = [float(text.split()[1]) for text in words["input"][:3]]
    assert priorities == pytest.approx(batch.inputs[0, :3, 2].tolist(), abs=0.005)
    best = words["input"][priorities.index(max(priorities))].split()[0]
    assert words["target"] == words["output"]
    assert words["target"][:5] == ["", "", "", "", best]
    assert sort.show(20 * batch.targets - 10, batch).startswith("input   ")


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (RepeatCopyTask, {"min_length": 0}, "min_length: expected an integer, at least 1, got 0"),
        (RepeatCopyTask, {"min_length": 3, "max_length": 2}, "min_length, max_length: .* got 3, 2"),
        (RepeatCopyTask, {"min_repeats": 3, "max_repeats": 2}, "min_repeats, max_repeats: .* got 3, 2"),
        (RepeatCopyTask, {"max_repeats": 500}, "max_repeats: expected at most 499, got 500"),
        (RepeatCopyTask, {"num_bits": 0}, "num_bits: .* at least 1, got 0"),
        (RepeatCopyTask, {"num_bits": 2.5}, r"num_bits: expected an integer.* got 2\.5"),
        (RepeatCopyTask, {"norm_max": 0}, "norm_max: .* at least 1, got 0"),
        (AssociativeRecallTask, {"min_items": 1}, "min_items: .* at least 2, got 1"),
        (AssociativeRecallTask, {"min_items": 4, "max_items": 3}, "min_items, max_items: .* got 4, 3"),
        (AssociativeRecallTask, {"item_length": 0}, "item_length: .* at least 1, got 0"),
        (AssociativeRecallTask, {"num_bits": True}, "num_bits: .* got True"),
        (AssociativeRecallTask, {"item_length": 1, "num_bits": 2}, "max_items: expected at most 4, .* got 6"),
        (KeyValueTask, {"min_pairs": 0}, "min_pairs: .* at least 1, got 0"),
        (KeyValueTask, {"max_pairs": 17, "num_bits": 4}, "max_pairs: expected at most 16, .* got 17"),
        (KeyValueTask, {"num_bits": 0}, "num_bits: .* at least 1, got 0"),
        (PrioritySortTask, {"num_highest": 21}, "num_highest, num_vectors: .* got 21, 20"),
        (PrioritySortTask, {"num_highest": 0}, "num_highest: .* at least 1, got 0"),
        (PrioritySortTask, {"num_bits": 0}, "num_bits: .* at least 1, got 0"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_bad_arguments_of_memory_tasks(task: type[Task], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**arguments)
