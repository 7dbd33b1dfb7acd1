"""Tasks to train on: what a sequence is and what counts as right.

`configurations/NAME.toml` holds the training settings that are known to work for a task.
"""

from dnc_triton.tasks.base import Batch, BitTask, SymbolTask, Task
from dnc_triton.tasks.blocks import BlockPuzzleTask
from dnc_triton.tasks.copying import CopyTask, DelayedCopyTask
from dnc_triton.tasks.graphs import GraphTraversalTask, ShortestPathTask

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (CopyTask, DelayedCopyTask, GraphTraversalTask, ShortestPathTask, BlockPuzzleTask)
}

__all__ = [
    "TASKS",
    "Batch",
    "BitTask",
    "BlockPuzzleTask",
    "CopyTask",
    "DelayedCopyTask",
    "GraphTraversalTask",
    "ShortestPathTask",
    "SymbolTask",
    "Task",
]
