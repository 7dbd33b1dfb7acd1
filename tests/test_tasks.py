"""What every task promises a training: batches that depend only on what is asked for, in the shapes it was told."""

from __future__ import annotations

import random

import pytest
import torch

from dnc_triton.tasks import TASKS, Batch, Task

BATCH = 3


def sizes_of(task: Task) -> list[int]:
    """The smallest and the largest that it trains on or reports."""
    sizes = [size for lesson in [*task.lessons[:3], *task.evaluations.values()] for size in lesson]
    return sorted({min(sizes), max(sizes)}) if len(sizes) > 1 else sizes


def draw(task: Task, size: int, global_seed: int) -> Batch:
    """Whatever state the global generators are in, and without a change of them."""
    random.seed(global_seed)
    torch.manual_seed(global_seed)
    before = random.getstate(), torch.get_rng_state().tolist()
    batch = task.sample(BATCH, size, torch.Generator().manual_seed(7), split="train")
    assert (random.getstate(), torch.get_rng_state().tolist()) == before
    return batch


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_depends_on_its_generator_alone(name):
    task = TASKS[name]()
    for size in sizes_of(task):
        batch, again = draw(task, size, 1), draw(task, size, 2)
        for part, same in zip(batch, again, strict=True):
            assert (part is None and same is None) or torch.equal(part, same)
        generator = torch.Generator().manual_seed(7)
        drawn = [task.sample(BATCH, size, generator).inputs for _ in range(2)]
        assert drawn[0].shape != drawn[1].shape or not drawn[0].equal(drawn[1])


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_as_wide_and_as_long_as_it_says(name):
    task = TASKS[name]()
    for size in sizes_of(task):
        batch = task.sample(BATCH, size, torch.Generator().manual_seed(3))
        steps = batch.inputs.shape[1]
        assert batch.inputs.shape == (BATCH, steps, task.input_size)
        assert batch.targets.shape[:2] == batch.scored.shape == (BATCH, steps)
        assert batch.scored.dtype == torch.bool
        assert batch.scored.any(1).all()
        if batch.lengths is not None:
            assert batch.lengths.min() >= 1
            assert batch.lengths.max() == steps
            padding = torch.arange(steps) >= batch.lengths.unsqueeze(1)
            assert not batch.scored[padding].any()

        outputs = torch.randn(BATCH, steps, task.output_size, generator=torch.Generator().manual_seed(4))
        wrong = task.wrong(outputs, batch)
        assert wrong.shape[:2] == batch.scored.shape
        assert not wrong[~batch.scored].any()
        assert wrong.any()
        assert task.units(batch) == batch.scored.unsqueeze(-1).expand(wrong.shape).sum()
        one = batch.rows(slice(1, 2))
        assert [len(part) for part in one if part is not None] == [1] * (4 - (batch.lengths is None))
        assert one.inputs.equal(batch.inputs[1:2])
