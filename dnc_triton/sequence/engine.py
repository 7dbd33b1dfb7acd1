"""What is asked of a CUDA device around graphs: to capture a call, with memory that no other graph depends on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Captured(NamedTuple):
    """A graph.

    Attributes:
        results: what the call returned, written anew by each replay.
        replay: does what the call did.
        size: bytes that results and work space take.
        pool: where they are; another graph of the same instance may share it.
    """

    results: list[Tensor]
    replay: Callable[[], None]
    size: int
    pool: Any


def has_pools() -> bool:
    """Whether PyTorch's allocator has pools, whose memory is given to nothing else while a graph works on it.

    Its own has. `cudaMallocAsync` gives libraries' workspaces to others once PyTorch forgets them, and ends the process
    when results of a graph that was never replayed are freed; one that is plugged in need not know of graphs at all.
    """
    return torch.cuda.get_allocator_backend() == "native"


@cache
def _workspaces(device: torch.device) -> torch.cuda.MemPool:
    """The pool for `_provide_workspace` on a device, which is the current one; it lasts until the process ends."""
    pool = torch.cuda.MemPool()
    _keep_for_good(pool)  # its end would free memory, and take the process with it where CUDA has failed
    return pool


def _has_succeeded(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether the capture has ended as it should, whatever was captured; then the graph's end gives back the pool."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _keep_for_good(value: object) -> None:
    """Keep it alive, even past the end of the interpreter."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


class Engine:
    """What is asked of a CUDA device, in one place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None  # until a capture wants one

    def ready(self) -> bool:
        """Whether the current stream is the default one, and not captured, and a graph's memory is its own."""
        if torch.cuda.is_current_stream_capturing() or not has_pools():
            return False
        return torch.cuda.current_stream(self.device) == torch.cuda.default_stream(self.device)

    def memory(self) -> int:
        """Bytes that this process may take, according to PyTorch's own allocator."""
        total = torch.cuda.get_device_properties(self.device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(self.device))

    def wait(self) -> None:
        """Until all that was replayed has ended. By an event: who has PyTorch forbid waiting means their own code."""
        torch.cuda.default_stream(self.device).record_event().synchronize()

    def keep_until_launched(self, tensors: Sequence[Tensor]) -> None:
        """Have the allocator wait, once nobody holds the tensors any more, for all that was launched by then."""
        for tensor in tensors:
            tensor.record_stream(torch.cuda.default_stream(self.device))

    def capture(self, call: Callable[[], list[Tensor]], pool: Any = None) -> Captured:
        """A call as a graph. The device is the current one."""
        call()  # compiles what is not compiled yet: nothing may be loaded while a graph is captured
        # PyTorch hands out the same 32 streams of each priority in turn. Few others multiply on one of high priority.
        self.stream = self.stream or torch.cuda.Stream(self.device, priority=-1)
        self._provide_workspace(self.stream)
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        begun = False
        try:
            # The outer block puts the stream back should the inner one fail to end. Other threads may do anything but
            # wait for the whole device, which ends the capture, and, with PyTorch 2.11, draw random numbers.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"),
            ):
                begun = True
                before = torch.cuda.memory_reserved()
                results = call()
                size = torch.cuda.memory_reserved() - before
        except BaseException:
            self._end(graph, pool, begun)
            self._release_generator()
            raise
        return Captured(results, graph.replay, max(size, size_of(results)), pool)

    def _provide_workspace(self, stream: torch.cuda.Stream) -> None:
        """Allocate the workspace of cuBLAS and of cuBLASLt, for this thread and stream, in a pool of its own.

        PyTorch allocates it at the first product of a thread and stream, and every graph captured from then on has its
        address. Allocated during a capture, it would lie in that graph's memory, and later graphs would depend on that
        unnoticed: PyTorch forgets all workspaces when its compiler captures graphs, and since 2.12 those of a stream
        when any graph that was captured on it is destroyed. Then the first graph's memory can be in use for something
        else, or freed. With a pool of their own, workspaces are allocated again in that pool, and its memory is never
        given to anything else.

        To allocate such memory, or a graph's, PyTorch 2.11 gives up nothing that it caches, so its cache is emptied
        before, as `torch.cuda.graph` does.

        Source: https://github.com/pytorch/pytorch/issues/193402, https://github.com/pytorch/pytorch/issues/159674.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        pool = torch.cuda.use_mem_pool(_workspaces(self.device), self.device) if has_pools() else nullcontext()
        with torch.cuda.stream(stream), pool:
            ones = torch.ones(16, 16, device=self.device)
            torch.addmm(ones[0], ones, ones @ ones)  # by cuBLAS and by cuBLASLt, which has a workspace of its own

    def _end(self, graph: torch.cuda.CUDAGraph, pool: Any, begun: bool) -> None:
        """Give back the pool, which PyTorch leaves in use if the device refuses a capture; 2.11 asks it for all memory.

        At the graph's own end 2.11 and 2.13 would not give the pool back, and 2.15 would (source:
        https://github.com/pytorch/pytorch/pull/190348). Twice would end the process, so the graph is never to end.
        """
        try:
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
        except RuntimeError:  # PyTorch has done that, or had not begun
            if not begun or _has_succeeded(graph):
                return
        torch._C._cuda_releasePool(self.device.index, pool)
        _keep_for_good(graph)

    def _release_generator(self) -> None:
        """Likewise the device's random generator would wait for the capture's end, and refuse to draw until then.

        The end of any capture will do, so here is one that succeeds. The generator's state could be replaced instead,
        but graphs that were captured before, the user's too, would go on using the old one.
        """
        with suppress(Exception):  # what went wrong first is what is to be reported
            number = torch.zeros(1, device=self.device)
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream, capture_error_mode="thread_local"),
            ):
                number.zero_()  # PyTorch warns of graphs that do nothing


def size_of(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of those that are there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
