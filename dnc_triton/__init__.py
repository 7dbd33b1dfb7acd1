"""Differentiable Neural Computers that are fast and right, used like `nn.LSTM`."""

from dnc_reference import DNCState, Interface, MemoryState
from dnc_triton.deepmind import from_deepmind
from dnc_triton.dispatch import use_backend
from dnc_triton.layer import DNC, explain
from dnc_triton.ops.memory_step import memory_step
from dnc_triton.pytorch_dnc import from_pytorch_dnc

__version__ = "0.1.0"
__all__ = [
    "DNC",
    "DNCState",
    "Interface",
    "MemoryState",
    "explain",
    "from_deepmind",
    "from_pytorch_dnc",
    "memory_step",
    "use_backend",
]
