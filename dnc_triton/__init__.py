"""Differentiable Neural Computers that are fast and right, used like `nn.LSTM`."""

from dnc_reference import DNCState, Interface, MemoryState
from dnc_triton.deepmind import from_deepmind
from dnc_triton.dispatch import use_backend
from dnc_triton.layer import DNC, explain
from dnc_triton.ops.memory_step import memory_step
from dnc_triton.pytorch_dnc import from_pytorch_dnc
from dnc_triton.version import __version__ as __version__

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
