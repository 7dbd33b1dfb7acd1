"""Blocks: what is drawn and what is right, compared with a simulation that shares no code with the task's.

Boards are lists of columns here, bottom block first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from answering import Answering, random

from dnc_triton.tasks import Batch, BlockPuzzleTask
from dnc_triton.tasks.blocks import LETTERS, MINI_SHRDLU, RELATIONS, _count_boards, make_world
from dnc_triton.training.report import draw
from dnc_triton.training.run import Run
from dnc_triton.training.settings import Settings


def columns_of(task: BlockPuzzleTask, step: torch.Tensor) -> list[list[int]]:
    squares = step[-(task.board_size**2) * task.num_blocks :].reshape(task.board_size, task.board_size, task.num_blocks)
    columns: list[list[int]] = [[] for _ in range(task.board_size)]
    for row in squares.tolist():
        for column, square in enumerate(row):
            if 1 in square:
                columns[column].append(square.index(1) + 1)
    return columns


def holds(columns: list[list[int]], first: int, relation: str, second: int) -> bool:
    where = {block: (x, y) for x, column in enumerate(columns) for y, block in enumerate(column)}
    x, y = (a - b for a, b in zip(where[first], where[second], strict=True))
    return (x, y) == {"above": (0, 1), "below": (0, -1), "left of": (-1, 0), "right of": (1, 0)}[relation]


def moved(columns: list[list[int]], move: str) -> list[list[int]] | None:
    columns = [list(column) for column in columns]
    if move != "pass":
        source, target = (int(name) - 1 for name in move.split(">"))
        if not columns[source] or len(columns[target]) == len(columns):
            return None
        columns[target].append(columns[source].pop())
    return columns


def puzzle_of(task: BlockPuzzleTask, batch: Batch, row: int) -> tuple[list[list[int]], list[tuple], int]:
    """The first board, the constraints asked for, and the step at which the answer begins."""
    first = int(batch.scored[row].nonzero()[0])
    letters, blocks = task.num_letters, task.num_blocks
    said: dict[int, list[tuple]] = {}
    for step in batch.inputs[row, :first]:
        if step[:letters].any():
            parts = step[: letters + 2 * blocks + 4].split([letters, blocks, 4, blocks])
            assert [int(part.sum()) for part in parts] == [1, 1, 1, 1]
            letter, a, relation, b = (int(part.argmax()) for part in parts)
            said.setdefault(letter, []).append((a + 1, RELATIONS[relation], b + 1))
        assert step[letters + 2 * blocks + 4] == 0
    assert batch.inputs[row, first:, letters + 2 * blocks + 4].all()
    return columns_of(task, batch.inputs[row, first]), said[int(batch.inputs[row, first, :letters].argmax())], first


def shortest_plan(task: BlockPuzzleTask, columns: list[list[int]], asked: list[tuple]) -> int:
    """Breadth first, over boards."""
    level, known, count = [columns], {str(columns)}, 0
    while True:
        if any(all(holds(board, *constraint) for constraint in asked) for board in level):
            return count
        following = []
        for board in level:
            for move in task.vocabulary:
                after = moved(board, move)
                if after is not None and str(after) not in known:
                    known.add(str(after))
                    following.append(after)
        assert following
        level, count = following, count + 1


@pytest.mark.parametrize("curriculum", ["1-3/3-4/1-2/1-2", "2/4-5/2-3/2-3", "2/2-3/1/1"])
def test_block_puzzle_targets_do_what_is_asked_in_the_fewest_moves(curriculum: str) -> None:
    task = BlockPuzzleTask(curriculum, num_letters=5)
    batch = task.sample(25, 1, random(0))
    lesson = task.curriculum[0]
    for row in range(25):
        columns, asked, first = puzzle_of(task, batch, row)
        for step in range(first + 1):
            assert columns_of(task, batch.inputs[row, step]) == columns
        assert lesson.blocks[0] <= sum(map(len, columns)) <= lesson.blocks[1]
        assert lesson.constraints[0] <= len(asked) <= lesson.constraints[1]
        assert not any(holds(columns, *constraint) for constraint in asked)
        assert len({frozenset((a, b)) for a, _, b in asked}) == len(asked), "one thing said twice"
        plan = [task.vocabulary[int(move)] for move in batch.targets[row, first:, 0]]
        assert len(plan) == lesson.depth[1]
        fewest = shortest_plan(task, columns, asked)
        assert 1 <= fewest <= lesson.depth[1]
        assert plan[fewest:] == ["pass"] * (len(plan) - fewest)
        for step, move in enumerate(plan):
            after = moved(columns, move)
            assert after is not None
            columns = after
            if first + step + 1 < batch.inputs.shape[1]:
                assert columns_of(task, batch.inputs[row, first + step + 1]) == columns
        assert all(holds(columns, *constraint) for constraint in asked)


def test_each_goal_is_asked_for_as_often_whatever_its_constraints() -> None:
    task = BlockPuzzleTask("2/3/1-2/1", num_letters=2)
    batch = task.sample(3000, 1, random(0))
    answer = int(batch.scored[0].nonzero()[0])
    letters = batch.inputs[:, : answer + 1, :2]
    counts = letters[:, :answer].sum(1)  # how many constraints each goal has
    asked = counts[letters[:, answer].bool()][counts.sum(1) == 3]
    assert asked.mean() == pytest.approx(1.5, abs=0.05)


def test_block_puzzle_answers_are_right_if_what_is_asked_holds_at_the_end() -> None:
    task = BlockPuzzleTask("2/3/1-2/2", num_letters=4)
    batch = task.sample(60, 1, random(1))
    generator = random(2)
    answers = torch.randn(*batch.scored.shape, task.output_size, generator=generator)
    model = Answering(answers)
    outputs = task.run(model, batch)
    right, wrong = task.right(outputs, batch), task.wrong(outputs, batch)
    expected, moves_wrong = [], 0
    for row in range(60):
        columns, asked, first = puzzle_of(task, batch, row)
        for step in range(first, batch.inputs.shape[1]):
            assert columns_of(task, model.shown[row, step]) == columns, "the board shown is the one that it made"
            move = task.vocabulary[int(answers[row, step].argmax())]
            after = moved(columns, move)
            done = all(holds(columns, *constraint) for constraint in asked)
            if after is None:
                good, after = False, columns
            elif done:
                good = all(holds(after, *constraint) for constraint in asked)
            else:
                good = shortest_plan(task, after, asked) == shortest_plan(task, columns, asked) - 1
            assert bool(wrong[row, step, 0]) != good
            moves_wrong += not good
            columns = after
        expected.append(all(holds(columns, *constraint) for constraint in asked))
    assert right.tolist() == expected
    assert 0 < sum(expected) < 60
    assert int(wrong.sum()) == moves_wrong
    assert not wrong[~batch.scored].any()


def test_in_mixed_precision_boards_are_shown_as_the_inputs_are() -> None:
    """PyTorch's LSTM takes no float32 on a CPU under autocast."""
    task = BlockPuzzleTask("2/3/1/2", num_letters=4)
    batch = task.sample(3, 1, random(1))
    batch = batch._replace(inputs=batch.inputs.bfloat16())
    model = Answering(torch.randn(*batch.scored.shape, task.output_size, generator=random(2)).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        task.run(model, batch)
    assert model.shown.dtype == torch.bfloat16


def test_the_world_of_blocks_is_complete() -> None:
    world = make_world(3, (1, 3))
    # n blocks in columns of at most 3: orders times ways to split them up.
    assert [int((world.num_blocks == count).sum()) for count in (1, 2, 3)] == [3, 2 * 6, 6 * 10]
    assert torch.equal(world.after[:, -1], torch.arange(75))
    # Every move can be taken back.
    for move, back in {0: 2, 1: 4, 2: 0, 3: 5, 4: 1, 5: 3}.items():
        made = world.possible[:, move].nonzero().flatten()
        assert torch.equal(world.after[world.after[made, move], back], made)


def test_the_papers_puzzles_can_be_drawn() -> None:
    task = BlockPuzzleTask()
    assert task.num_letters == len(LETTERS) == 26
    assert len(MINI_SHRDLU.split(",")) == 26
    assert task.output_size == 7
    assert task.sample(1, 12, random(0)).scored.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"curriculum": "1/3/1"}, ["curriculum", "'1/3/1'"]),
        ({"curriculum": "1/9/1/1"}, ["curriculum", "/2-8/", "'1/9/1/1'"]),
        ({"board_size": 1}, ["board_size", "at least 2", "got 1"]),
        ({"num_letters": 3}, ["num_letters", "at least 10", "got 3"]),
        ({"num_letters": 27}, ["num_letters", "at most 26", "got 27"]),
    ],
    ids=str,
)
def test_bad_arguments_of_the_block_puzzle(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        BlockPuzzleTask(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_puzzles_that_no_board_has_are_refused() -> None:
    with pytest.raises(ValueError, match="curriculum: expected puzzles of this kind, got none for lesson 1"):
        BlockPuzzleTask("1/2/5/1").sample(1, 1, random(0))


def test_a_lesson_is_described_by_its_ranges() -> None:
    lessons = BlockPuzzleTask("1/3/1/1, 1-2/3/2/1-2").evaluations
    assert list(lessons)[:2] == [
        "lesson 1: 1 goal, 3 blocks, 1 constraint each, 1 move deep",
        "lesson 2: 1 to 2 goals, 3 blocks, 2 constraints each, 1 to 2 moves deep",
    ]


@pytest.mark.parametrize(("size", "blocks", "count"), [(3, (2, 6), None), (3, (8, 8), 120960), (4, (3, 4), None)])
def test_worlds_that_are_made_have_as_many_boards_as_are_allowed_for(
    size: int, blocks: tuple[int, int], count: int | None
) -> None:
    counted = _count_boards(size, *blocks)
    assert counted == (count or len(make_world(size, blocks).boards))


@pytest.mark.parametrize(("curriculum", "size"), [("1/9/1/1", 4), ("1/24/1/1", 5), ("1/3/1/1", 9), ("1/3/1/1", 3000)])
def test_a_world_that_could_not_be_made_is_refused(curriculum: str, size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"board_size, curriculum: expected at most 1000000 boards, .* got {size} col"
    ):
        BlockPuzzleTask(curriculum, board_size=size)


def test_a_trace_is_of_what_the_network_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boards that its own moves led to, in the page, the pictures and the words, as in its evaluation."""
    settings = Settings("block_puzzle", {"curriculum": "1/3/1/3"}, hidden_size=8, memory_size=4, word_size=4)
    run = Run(settings, tmp_path)
    pages: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "dnc_triton.training.report.write_page", lambda trace, path, **lists: pages.append({**lists, "of": trace})
    )
    fed: list[torch.Tensor] = []
    monkeypatch.setattr(
        "dnc_triton.training.report.draw_memory", lambda trace, inputs, targets, path: fed.append(inputs)
    )
    differing = 0
    for index in range(10):
        words = draw(run, tmp_path, index=index)
        page = pages[-1]
        first = page["targets"].index(next(filter(None, page["targets"])))
        boards = [[list(map(int, column)) for column in text.split("! ")[-1].split("|")]
                  for text in page["inputs"][first:]]  # fmt: skip
        for board, move, new in zip(boards, page["outputs"][first:], boards[1:], strict=False):
            assert new == (moved(board, move) or board)
        differing += page["outputs"][first:-1] != page["targets"][first:-1]
        dnc = run.learners["dnc"].model
        with torch.no_grad():
            answers = dnc(fed[-1].unsqueeze(0))[0][0, first:].argmax(-1).tolist()
        assert [run.task.vocabulary[answer] for answer in answers] == page["outputs"][first:]
        assert page["inputs"][-1].split()[-1] in words
    assert differing
