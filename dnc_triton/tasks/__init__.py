"""Tasks to train on: what a sequence is and what counts as right.

`configurations/NAME.toml` holds the training settings that are known to work for a task.
"""

from dnc_triton.tasks.base import Batch, BitTask, SymbolTask, Task
from dnc_triton.tasks.copying import CopyTask, DelayedCopyTask, RepeatCopyTask
from dnc_triton.tasks.recall import AssociativeRecallTask, KeyValueTask, PrioritySortTask

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (CopyTask, DelayedCopyTask, RepeatCopyTask, AssociativeRecallTask, KeyValueTask, PrioritySortTask)
}

__all__ = [
    "TASKS",
    "AssociativeRecallTask",
    "Batch",
    "BitTask",
    "CopyTask",
    "DelayedCopyTask",
    "KeyValueTask",
    "PrioritySortTask",
    "RepeatCopyTask",
    "SymbolTask",
    "Task",
]
