"""The launches of a sequence as a CUDA graph: captured when a call of the same kind comes again, replayed from then on.

A graph reads and writes the same memory at each replay. So an instance has its own copies of all that a call is given,
into which the call's tensors are copied (weights may change between calls), and what a call returns is copied out. Only
the history, by far the largest, is handed out where it is, and the instance is leased until nobody holds the history
any more: autograd lets go of it after the backward, or with the last result of the forward. A call of the same kind in
the meantime takes another instance, or plain launches. `Tensor.record_stream` has no effect on the history: a hook that
copies what is saved on a stream of its own has to hold it until the copy is made.

Plain launches are right at any time, also for the backward of a forward that was replayed. They are taken

- on a stream that is being captured, by the user or a compiler, and on any but the device's default stream, where
  compilers and users prepare captures of their own; so no two streams ever share an instance,
- for a kind of call that was not seen often enough. Its first instance is captured at the 2nd call that finds none
  free, the next at the 4th, 8th, ... from then on: many instances, or short-lived ones, cost more than they gain,
- where PyTorch uses another allocator than its own (`engine.has_pools`),
- where the bound on memory would be exceeded by what is in use. What is not in use is given up, the least recently used
  first,
- after a capture has failed, for calls of that kind: memory may have been short, or another thread may have waited for
  the whole device. It is tried again at the 4th, 8th, 16th, ... call from then on that finds no instance free,
- for sequences of more than `LONGEST` steps, which have tens of thousands of launches.

Environment variables: DNC_TRITON_GRAPHS=0 asks for plain launches, DNC_TRITON_GRAPH_MEMORY is the bound in MiB on each
device, by default a quarter of what the process may take of it. Memory for tensors counts; the graphs' own nodes do
not, nor does a library's workspace for products, which all graphs of a thread share.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import to_dlpack

from dnc_triton import environment
from dnc_triton.kernels.launcher import is_compiling_ahead
from dnc_triton.sequence.engine import Captured, Engine, size_of

SHARE = 0.25  # the bound is this part of the memory that the process may take
SIGNATURES = 1024  # how many kinds of calls are remembered
LONGEST = 4096  # steps
MEBIBYTE = 2**20

logger = logging.getLogger("dnc_triton")
_lock = Lock()  # for all of this module: PyTorch allows one capture at a time, and nothing else here takes long


ENGINES: dict[str, Callable[[torch.device], Engine]] = {"cuda": Engine}


@dataclass(eq=False)
class Signature:
    """All calls that one graph can serve: they differ in numbers alone.

    Attributes:
        numerics: PyTorch's settings for products that were in force.
        size: bytes of an instance, as far as is known.
        misses: calls that found no free instance, since the last capture.
        patience: how many misses lead to a capture.
        used: when it was last asked for, counted in calls.
    """

    numerics: tuple[Any, ...]
    size: int = 0
    misses: int = 0
    patience: int = 2
    used: int = 0


@dataclass(eq=False)
class Instance:
    """Graphs of a forward and, once it was wanted, of its backward, with the memory that they work on.

    Attributes:
        signature: of the calls that it serves.
        given: copies of what a forward is given.
        forward: the graph.
        handed: how many of its results are copied out; the others are the history.
        places: the addresses of the history.
        size: bytes.
        gradients: the copies that its backward reads of the gradients it is given: zeros for one that is None now, None
            for one that was None when the backward was captured.
        filled: which of them may be nonzero.
        backward: the graph.
        made: which results the backward has; the others were not wanted when it was captured.
        lease: the storages under which the history was handed out last.
    """

    signature: Signature
    given: list[Tensor]
    forward: Captured
    handed: int
    places: list[int]
    size: int
    gradients: list[Tensor | None] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)
    backward: Captured | None = None
    made: list[bool] = field(default_factory=list)
    lease: list[StorageWeakRef] = field(default_factory=list)

    @property
    def history(self) -> list[Tensor]:
        """As the forward leaves it."""
        return self.forward.results[self.handed :]

    @property
    def is_free(self) -> bool:
        """Whether the history is not held any more."""
        return all(storage.expired() for storage in self.lease)

    def run_forward(self, given: list[Tensor]) -> list[Tensor]:
        """What a call returns. From here on the instance is leased."""
        _copy(self.given, given)
        self.forward.replay()
        history = [_alias(tensor) for tensor in self.history]
        self.lease = [StorageWeakRef(tensor.untyped_storage()) for tensor in history]
        return [*_clones(self.forward.results[: self.handed]), *history]

    def serves(self, gradients: list[Tensor | None], wanted: list[bool]) -> bool:
        """Whether there is a backward that takes all gradients that are given, and makes all that are wanted."""
        if self.backward is None or not all(map(operator.le, wanted, self.made)):
            return False
        return all(copy is not None for copy, x in zip(self.gradients, gradients, strict=True) if x is not None)

    def run_backward(self, gradients: list[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
        """What a backward returns: the results that are wanted. It may be called any number of times."""
        assert self.backward is not None
        given = [index for index, gradient in enumerate(gradients) if gradient is not None]
        self.filled.update(given)  # before the copy, which may be interrupted
        _copy([self.gradients[index] for index in given], [gradients[index] for index in given])  # type: ignore[misc]
        others = self.filled.difference(given)
        if others:
            torch._foreach_zero_([self.gradients[index] for index in others])  # type: ignore[misc]
        self.filled = set(given)
        self.backward.replay()
        results = iter(self.backward.results)
        given_back = [next(results) if is_made else None for is_made in self.made]
        clones = iter(_clones([x for x, is_wanted in zip(given_back, wanted, strict=True) if is_wanted]))  # type: ignore[misc]
        return [next(clones) if is_wanted else None for is_wanted in wanted]


class GraphCache:
    """The instances on a device, the least recently used first."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.instances: list[Instance] = []
        self.signatures: dict[Hashable, Signature] = {}
        self.replays = 0  # so far
        self._uses = count()
        self._told = False

    def bound(self) -> int:
        """Bytes that all instances may take."""
        asked = os.environ.get(environment.GRAPH_MEMORY)
        if not asked:
            return int(self.engine.memory() * SHARE)
        if not asked.isdecimal():
            raise ValueError(f"{environment.GRAPH_MEMORY}: expected a whole number of MiB, got {asked!r}")
        return int(asked) * MEBIBYTE

    def forward(
        self, key: Hashable, given: list[Tensor], run: Callable[[list[Tensor]], list[Tensor]], handed: int
    ) -> list[Tensor]:
        """See `forward` below."""
        with _lock:
            signature = self._signature(key, given)
            instance = self._take(signature, given, run, handed)
            if instance is not None:
                self.replays += 1
                return instance.run_forward(given)
        results = run(given)
        signature.size = max(signature.size, size_of(given) + size_of(results))
        return results

    def backward(
        self,
        gradients: list[Tensor | None],
        history: list[Tensor],
        run: Callable[..., list[Tensor | None]],
        wanted: list[bool],
    ) -> list[Tensor | None] | None:
        """By a graph, or None if there is none that fits."""
        with _lock:
            # A history that hooks have packed and unpacked, say, is elsewhere: plain launches serve it as well.
            places = _places(history)
            instance = next((x for x in self.instances if x.places == places), None)
            if instance is None or instance.signature.numerics != _numerics():
                return None
            if not instance.serves(gradients, wanted) and not self._capture_backward(instance, run, gradients, wanted):
                return None
            self.replays += 1
            return instance.run_backward(gradients, wanted)

    def _signature(self, key: Hashable, given: list[Tensor]) -> Signature:
        numerics = _numerics()
        key = key, numerics, tuple([(x.shape, x.stride(), x.dtype) for x in given])  # whose hash takes its time
        signature = self.signatures.get(key)
        if signature is None:
            if len(self.signatures) >= SIGNATURES:
                del self.signatures[min(self.signatures, key=lambda key: self.signatures[key].used)]
            signature = self.signatures[key] = Signature(numerics)
        signature.used = next(self._uses)
        return signature

    def _take(
        self, signature: Signature, given: list[Tensor], run: Callable[[list[Tensor]], list[Tensor]], handed: int
    ) -> Instance | None:
        """An instance that is free, captured if it is time for that."""
        for instance in reversed(self.instances):
            if instance.signature is signature and instance.is_free:
                self.instances.remove(instance)
                self.instances.append(instance)
                return instance
        signature.misses += 1
        if signature.misses < signature.patience or not self._make_room(signature.size):
            return None
        try:
            with _ordinary_tensors():
                copies = _clones(given)
                captured = self.engine.capture(partial(run, copies))
        except Exception as error:  # whatever it was, plain launches do without
            self._fail(signature, error, [])
            return None
        places, size = _places(captured.results[handed:]), size_of(copies) + captured.size
        instance = Instance(signature, copies, captured, handed, places, size)
        signature.size = max(signature.size, instance.size)
        signature.misses, signature.patience = 0, 2 * signature.patience
        if not self._make_room(instance.size):
            return None
        self.instances.append(instance)
        return instance

    def _capture_backward(
        self,
        instance: Instance,
        run: Callable[..., list[Tensor | None]],
        gradients: list[Tensor | None],
        wanted: list[bool],
    ) -> bool:
        """Capture a backward for all that is given and wanted; return whether there is one now.

        If there was one, it takes or makes too little. It is given up; the new one also does what the old one did.
        """
        signature = instance.signature
        kept, taken = 0, [gradient is not None for gradient in gradients]
        if instance.backward is not None:
            wanted = list(map(operator.or_, wanted, instance.made))
            taken = [now or before is not None for now, before in zip(taken, instance.gradients, strict=True)]
            kept = instance.backward.size  # the pool keeps it, and how much of it the new one takes is not known
            instance.size -= size_of(instance.gradients) + kept
            instance.backward, instance.gradients, instance.filled = None, [], set()
        handed = instance.forward.results[: instance.handed]

        def call() -> list[Tensor]:
            results = run(copies, instance.given, handed, instance.history, wanted)
            instance.made = [result is not None for result in results]
            return [result for result in results if result is not None]

        try:
            with _ordinary_tensors():
                copies = [
                    torch.zeros_like(result, memory_format=torch.contiguous_format) if is_taken else None
                    for result, is_taken in zip(handed, taken, strict=True)
                ]
                captured = self.engine.capture(call, instance.forward.pool)
        except Exception as error:
            self._fail(signature, error, [instance])
            return False
        captured = captured._replace(size=captured.size + kept)
        instance.gradients, instance.backward = copies, captured
        instance.size += size_of(copies) + captured.size
        signature.size = max(signature.size, instance.size)
        if self._make_room(0):
            return True
        self.forget([instance])
        return False

    def _make_room(self, size: int) -> bool:
        """Give up what is not in use until `size` more bytes are within the bound; False if they cannot be."""
        bound = self.bound()
        in_use = sum(x.size for x in self.instances if not x.is_free)
        if in_use + size > bound:
            if not self._told:
                self._told = True
                logger.warning(
                    "CUDA graphs: %.1f MiB beside %.1f MiB in use would exceed the bound of %.1f MiB (%s); "
                    "calls that find no room are launched step by step",
                    *(x / MEBIBYTE for x in (size, in_use, bound)),
                    environment.GRAPH_MEMORY,
                )
            return False
        while sum(x.size for x in self.instances) + size > bound:
            self.forget([next(x for x in self.instances if x.is_free)])
        return True

    def forget(self, instances: list[Instance]) -> None:
        """Give them up, once what they replay has ended.

        PyTorch may hand their memory back to the device at once, and with expandable segments waits for nothing but the
        stream that it was captured on. Plain launches may still want the history of one that is not free.
        """
        if instances:
            self.engine.wait()
            for instance in instances:
                if not instance.is_free:
                    self.engine.keep_until_launched(instance.history)
            self.instances = [x for x in self.instances if x not in instances]

    def _fail(self, signature: Signature, error: Exception, instances: list[Instance]) -> None:
        """Take note of a failed capture, and give up these instances; a later capture may succeed."""
        signature.misses, signature.patience = 0, 2 * signature.patience
        # As a string: with the error a handler that keeps records would keep all that its frames hold.
        logger.warning(
            "CUDA graphs: a capture failed, it is tried again at call %d of its kind that finds no graph from now on: "
            "%s: %s",
            signature.patience,
            type(error).__name__,
            str(error),
        )
        self.forget(instances)


_graphs: dict[torch.device, GraphCache] = {}
_launching: list[None] = []  # an entry for each block that wants no replays


def forward(
    key: Hashable, given: list[Tensor], run: Callable[[list[Tensor]], list[Tensor]], handed: int
) -> list[Tensor]:
    """run(given), by a graph where that is possible.

    Args:
        key: what `run` depends on besides sizes and numbers of what it is given.
        given: on the current device. `run` does not change it.
        run: launches, and never waits for the device.
        handed: how many of the results are for the caller; the others are the history for `backward`.

    Returns:
        the results, in memory of their own but for the history: that is not to be written to.

    Raises:
        ValueError: an environment variable cannot be understood.
    """
    graphs = _serving(given[0])
    return run(given) if graphs is None else graphs.forward(key, given, run, handed)


def backward(
    gradients: list[Tensor | None],
    history: list[Tensor],
    run: Callable[..., list[Tensor | None]],
    wanted: list[bool],
) -> list[Tensor | None] | None:
    """The backward of a forward that was replayed, by a graph.

    Args:
        gradients: of the results that were handed to the caller; None for zeros.
        history: what the forward returned beyond them.
        run: gradients, what the forward was given, its results for the caller, its history, what is wanted → results.
            It changes none of them, launches, and never waits for the device. What is not wanted it may leave out, as
            None.
        wanted: which of the results.

    Returns:
        the results, in memory of their own, None in the place of one that is not wanted; None if plain launches are to
        be taken.
    """
    graphs = _serving(history[0])
    return None if graphs is None else graphs.backward(gradients, history, run, wanted)


@contextmanager
def forgetting() -> Iterator[None]:
    """Instances for calls that are first met in the block are given up after it."""
    with _lock:
        known = {signature for graphs in _graphs.values() for signature in graphs.signatures.values()}
    try:
        yield
    finally:
        with _lock:
            for graphs in _graphs.values():
                graphs.forget([x for x in graphs.instances if x.signature not in known])
                graphs.signatures = {key: x for key, x in graphs.signatures.items() if x in known}


@contextmanager
def launching() -> Iterator[None]:
    """Nothing is replayed in the block, not by other threads either: plain launches are right at any time."""
    _launching.append(None)
    try:
        yield
    finally:
        _launching.pop()


def replays(device: torch.device) -> int:
    """How many replays there were on a device."""
    return _graphs[device].replays if device in _graphs else 0


def _serving(tensor: Tensor) -> GraphCache | None:
    """The graphs of a tensor's device, if they may be used now."""
    device = tensor.device
    if _launching:
        return None
    if device.type not in ENGINES or tensor.numel() == 0 or not environment.is_on(environment.GRAPHS):
        return None
    if is_compiling_ahead():  # there are no launches to capture
        return None
    with _lock:
        if device not in _graphs:
            _graphs[device] = GraphCache(ENGINES[device.type](device))
    graphs = _graphs[device]
    if os.environ.get(environment.GRAPH_MEMORY):
        graphs.bound()  # raises at the first call, not when it comes to a capture
    return graphs if graphs.engine.ready() else None


def _numerics() -> tuple[Any, ...]:
    """What a product depends on besides its factors."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        # These are what the public names read, and also tell whether sums may be split, which not every version names.
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_fp16_accumulation(),
        torch.backends.cuda.preferred_blas_library(),
    )


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Without inference mode: what is made in it could not be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _places(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    clones = [torch.empty_like(tensor) for tensor in tensors]
    _copy(clones, tensors)
    return clones


def _copy(into: list[Tensor], tensors: list[Tensor]) -> None:
    """One launch for each dtype."""
    dtypes = {tensor.dtype for tensor in into}
    if len(dtypes) == 1:
        torch._foreach_copy_(into, tensors)
        return
    for dtype in dtypes:
        pairs = [(x, y) for x, y in zip(into, tensors, strict=True) if x.dtype == dtype]
        torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])


def _alias(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own, which ends with its last holder."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    alias = torch.from_dlpack(to_dlpack(tensor))
    # DLPack may change the strides of axes of length 1.
    return alias if alias.stride() == tensor.stride() else alias.as_strided(tensor.shape, tensor.stride())
