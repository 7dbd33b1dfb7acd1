"""The batches of a training run, by their number."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from dnc_triton.tasks.base import Batch, Task

SPLITS = ("train", "validation", "test")


def generator(seed: int, split: str, number: int) -> torch.Generator:
    """A generator for one batch: the same numbers in every process and in every order."""
    return torch.Generator().manual_seed(mixed(seed, SPLITS.index(split), number))


def mixed(*numbers: int) -> int:
    """One seed made of several numbers.

    PyTorch's CPU generator uses 32 bits of its seed; NumPy's seed sequence mixes all the numbers into these.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingBatches(Dataset[Batch]):
    """The batches of one lesson of a task: batch i is the same in every process and every order.

    Args:
        task: draws the batches.
        batch_size: sequences in a batch.
        seed: of the run.
        lesson: of the task's curriculum.
    """

    def __init__(self, task: Task, batch_size: int, seed: int, lesson: int) -> None:
        self.task, self.batch_size, self.seed, self.lesson = task, batch_size, seed, lesson

    def __getitem__(self, number: int) -> Batch:
        return self.task.sample_training(self.batch_size, self.lesson, generator(self.seed, "train", number))
