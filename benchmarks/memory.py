"""The memory that a call takes at its peak, beyond what was held before it.

On a GPU PyTorch counts the tensors. On a CPU it does not: a call runs in a process of its own, and the growth of that
process's peak memory counts. That includes what PyTorch's libraries set up for themselves and what the allocator
rounds up, a few MB, so it says little about small networks. On a CPU peers that compile are not
measured: the compiler's own memory would count.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.configurations import Case
from benchmarks.modes import aside, call_of, draw_inputs
from benchmarks.peers import PEERS


def gpu_peak(call: Callable[[], Any], module: torch.nn.Module) -> int:
    """Bytes of tensors that a call allocates at its peak, the gradients of the parameters included.

    Our layer launches step by step here: what it keeps for its graphs was there before the call. A first call allocates
    what libraries keep for the stream.
    """
    with aside():
        call()
        module.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(case: Case, peer: str, mode: str, threads: int) -> int | None:
    """Bytes by which a process grows in a call; None on systems that do not tell (Windows).

    The processes are forked from one that has loaded PyTorch and done nothing yet.
    """
    if sys.platform == "win32":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, case, peer, mode, threads).result()


def _growth(case: Case, peer: str, mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    inputs = draw_inputs(case, torch.device("cpu"))
    network = PEERS[peer].make(case, inputs.device)
    call_of(mode, network, inputs[:1, :1])()  # loads libraries, starts threads
    network.module.zero_grad(set_to_none=True)
    call = call_of(mode, network, inputs)
    before = most_held()
    call()
    return most_held() - before


def most_held() -> int:
    """The most bytes that this process has held so far. Not on Windows."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
