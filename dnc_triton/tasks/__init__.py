"""Tasks to train on: what a sequence is and what counts as right.

`configurations/NAME.toml` holds the training settings that are known to work for a task.
"""

from dnc_triton.tasks.babi import BabiTask
from dnc_triton.tasks.base import Batch, BitTask, SymbolTask, Task
from dnc_triton.tasks.copying import CopyTask, DelayedCopyTask
from dnc_triton.tasks.translation import DatesTask

TASKS: dict[str, type[Task]] = {task.name: task for task in (CopyTask, DelayedCopyTask, DatesTask, BabiTask)}

__all__ = ["TASKS", "BabiTask", "Batch", "BitTask", "CopyTask", "DatesTask", "DelayedCopyTask", "SymbolTask", "Task"]
