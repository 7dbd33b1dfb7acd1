"""Differentiable Neural Computers for PyTorch, used like `nn.LSTM`.

`DNC` is the layer: ``outputs, state = dnc(inputs)``. `DNCState` is what it carries from call to call, including the
`MemoryState` of its memory, and `Trace` records what its steps did. `memory_step` is one step of that memory by itself,
from an `Interface`. `explain` says which backend runs a layer and why; `use_backend` chooses one. `from_deepmind` and
`from_pytorch_dnc` build a layer from the weights of other implementations.
"""

from dnc_reference import DNCState, Interface, MemoryState
from dnc_triton.deepmind import from_deepmind
from dnc_triton.dispatch import use_backend
from dnc_triton.layer import DNC, explain
from dnc_triton.memory import memory_step
from dnc_triton.pytorch_dnc import from_pytorch_dnc
from dnc_triton.trace import Trace
from dnc_triton.version import __version__ as __version__

__all__ = [
    "DNC",
    "DNCState",
    "Interface",
    "MemoryState",
    "Trace",
    "explain",
    "from_deepmind",
    "from_pytorch_dnc",
    "memory_step",
    "use_backend",
]
