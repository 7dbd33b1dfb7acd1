"""Tasks to train on: what a sequence is, what counts as right, and a configuration that is known to work."""

from dnc_triton.tasks.base import Batch, Task
from dnc_triton.tasks.copying import CopyTask, DelayedCopyTask

TASKS: dict[str, type[Task]] = {task.name: task for task in (CopyTask, DelayedCopyTask)}

__all__ = ["TASKS", "Batch", "CopyTask", "DelayedCopyTask", "Task"]
