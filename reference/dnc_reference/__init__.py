"""The Differentiable Neural Computer in plain PyTorch, to be read, and the oracle that `dnc_triton` answers to."""

from dnc_reference.dnc import DNCCell, interface_step, unroll
from dnc_reference.memory import Addressing, memory_step, memory_step_with_addressing
from dnc_reference.types import DNCState, Interface, MemoryState

__all__ = [
    "Addressing",
    "DNCCell",
    "DNCState",
    "Interface",
    "MemoryState",
    "interface_step",
    "memory_step",
    "memory_step_with_addressing",
    "unroll",
]
