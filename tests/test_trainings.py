"""What the configurations that come with the tasks promise: trainings from start to end, which take hours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dnc_triton.cli import main

pytestmark = pytest.mark.slow

# Task, seeds, and the share of test sequences that is right at least, in the evaluations that are named.
PROMISES = [
    ("copy", range(5), {"1 to 10 vectors, as trained": 0.99}),
    ("delayed_copy", range(3), {"delay 4, as trained": 0.99}),
    ("repeat_copy", range(3), {"1 to 4 vectors, 1 to 4 times, as trained": 0.99}),
    ("associative_recall", range(3), {"2 to 6 items, as trained": 0.99}),
    ("key_value", range(3), {"2 to 8 pairs, as trained": 0.99, "9 to 16 pairs": 0.99}),
    ("priority_sort", range(2), {"6 highest of 8, as trained": 0.9}),
    ("translation", range(3), {"all styles": 0.95}),
    (
        "graph_traversal",
        range(1),
        {
            "lesson 1: 3 to 10 nodes, 2 to 4 edges out of each, 1 step": 0.99,
            "lesson 2: 3 to 10 nodes, 2 to 4 edges out of each, 1 to 2 steps": 0.99,
        },
    ),
    (
        "shortest_path",
        range(3),
        {
            "lesson 2: 5 to 10 nodes, 1 to 2 edges out of each, 2 steps": 0.9,
            "lesson 3: 5 to 20 nodes, 1 to 2 edges out of each, 2 steps": 0.9,
        },
    ),
    (
        "block_puzzle",
        range(2),
        {
            "lesson 2: 2 goals, 3 blocks, 1 constraint each, 1 move deep": 0.95,
            "lesson 3: 2 goals, 3 blocks, 1 to 2 constraints each, 1 to 2 moves deep": 0.9,
        },
    ),
]


def train(task: str, seed: int, folder: Path) -> dict:
    workers = 1 if task == "block_puzzle" else 0  # whose puzzles take up to a fifth of the time to draw
    arguments = ["--seed", str(seed), "--workers", str(workers), "--no-baseline"]
    assert main(["train", task, "--run", str(folder), *arguments]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("task", "seed", "promised"),
    [pytest.param(task, seed, shares, id=f"{task}-{seed}") for task, seeds, shares in PROMISES for seed in seeds],
)
def test_a_task_is_learned(task: str, seed: int, promised: dict[str, float], tmp_path: Path) -> None:
    result = train(task, seed, tmp_path)
    reached = {name: result["sequences_right"][name]["dnc"] for name in promised}
    assert all(reached[name] >= promised[name] for name in promised), reached
    assert result["seconds"] <= 30 * 60
    assert sum(result["seconds_in"][part] for part in ("data", "logging")) < 0.1 * result["seconds"]


@pytest.mark.parametrize("seed", range(3))
def test_questions_about_stories_are_answered(seed: int, tmp_path: Path) -> None:
    result = train("babi", seed, tmp_path)
    errors = [by_model["dnc"] for by_model in result["words_wrong"].values()]
    assert len(errors) == 3
    assert sum(errors) / len(errors) <= 0.05, errors
    assert result["seconds"] <= 30 * 60
