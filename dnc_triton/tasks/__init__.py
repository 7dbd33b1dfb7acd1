"""Tasks to train on: what a sequence is and what counts as right.

`configurations/NAME.toml` holds the training settings of a task; docs/tasks.md has the results.
"""

from dnc_triton.tasks.babi import BabiTask
from dnc_triton.tasks.base import Batch, BitTask, SymbolTask, Task
from dnc_triton.tasks.blocks import BlockPuzzleTask
from dnc_triton.tasks.copying import CopyTask, DelayedCopyTask, RepeatCopyTask
from dnc_triton.tasks.graphs import GraphTraversalTask, ShortestPathTask
from dnc_triton.tasks.recall import AssociativeRecallTask, KeyValueTask, PrioritySortTask
from dnc_triton.tasks.translation import DatesTask

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        CopyTask,
        DelayedCopyTask,
        RepeatCopyTask,
        AssociativeRecallTask,
        KeyValueTask,
        PrioritySortTask,
        BabiTask,
        DatesTask,
        GraphTraversalTask,
        ShortestPathTask,
        BlockPuzzleTask,
    )
}

__all__ = [
    "TASKS",
    "AssociativeRecallTask",
    "BabiTask",
    "Batch",
    "BitTask",
    "BlockPuzzleTask",
    "CopyTask",
    "DatesTask",
    "DelayedCopyTask",
    "GraphTraversalTask",
    "KeyValueTask",
    "PrioritySortTask",
    "RepeatCopyTask",
    "ShortestPathTask",
    "SymbolTask",
    "Task",
]
