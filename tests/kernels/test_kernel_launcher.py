"""While kernels compile ahead, none of this thread's launches run, other threads' do, and nothing is left behind.

That what compiles is what will be launched is in tests/test_compiling_ahead.py, where nothing is interpreted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

import pytest
import torch
from replays import _empty, draw, make, results  # noqa: F401

from dnc_triton.kernels import launcher
from dnc_triton.kernels.layout import Layout
from dnc_triton.sequence import graphs

CPU = torch.device("cpu")


def add(out: torch.Tensor) -> torch.Tensor:
    """One kernel, which adds 1 · 2."""
    from dnc_triton.kernels.products import PRODUCT, pack, product

    product(torch.ones(1, 1), pack(torch.full((1, 1), 2.0), most=PRODUCT.block), out, add=True)
    return out


def test_this_threads_launches_alone_run_nothing() -> None:
    """Those of a thread that it starts do run, though without Python's global lock that inherits its context."""
    elsewhere = []
    with launcher.compiling_ahead(CPU):
        assert launcher.is_compiling_ahead()
        assert add(torch.ones(1, 1)) == 1

        def launch() -> None:
            elsewhere.append(float(add(torch.ones(1, 1))))

        for target in (launch, partial(copy_context().run, launch)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert elsewhere == [3.0, 3.0]
    assert not launcher.is_compiling_ahead()
    assert add(torch.ones(1, 1)) == 3


def test_kernels_are_launched_one_at_a_time() -> None:
    """A second thread must not find one that is only half loaded. Each is launched with fused products and sums."""
    inside, seen, given = [], [], []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self.launch

        def launch(self, **options: bool) -> None:
            inside.append(self)
            given.append(options)
            time.sleep(0.01)
            seen.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=launcher.launch_or_compile, args=(Kernel(), (1,))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 4
    assert given == [{"enable_fp_fusion": True}] * 4


@pytest.mark.parametrize(
    ("overlaps", "device", "capability", "hip", "expected"),
    [
        (True, "cuda", (9, 0), None, True),
        (True, "cuda", (12, 0), None, True),
        (True, "cuda", (8, 9), None, False),  # would not compile: its assembler knows no such instruction
        (True, "cuda", (9, 4), "6.4", False),  # gfx942, whose compiler knows no such option
        (True, "cpu", (9, 0), None, False),
        (False, "cuda", (9, 0), None, False),
        (None, "cuda", (9, 0), None, False),
    ],
)
def test_launches_overlap_in_a_block_where_the_layout_says_so_and_the_device_can(
    overlaps: bool | None, device: str, capability: tuple[int, int], hip: str | None, expected: bool, monkeypatch
) -> None:
    """The kernel is told, as otherwise it would not wait. After the block, however it ends, none overlaps."""
    monkeypatch.setattr(launcher, "can_overlap", launcher.can_overlap.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    layout = None if overlaps is None else Layout(False, 16, 16, 1, overlaps=overlaps)
    told: list[dict[str, bool]] = []

    def launch(**options: bool) -> None:
        told.append(options)
        if len(told) == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), launcher.overlapping(layout, torch.device(device)):
        launcher.launch_or_compile({(1,): launch}, (1,))
    launcher.launch_or_compile({(1,): launch}, (1,))
    assert told == [launcher.FMA | ({"OVERLAPS": True, "launch_pdl": True} if expected else {}), launcher.FMA]


def test_an_error_in_the_block_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), launcher.compiling_ahead(CPU):
        raise ZeroDivisionError
    assert add(torch.ones(1, 1)) == 3


def test_what_compiles_alike_is_begun_once() -> None:
    """Dtypes, options, and whether there is a tensor at all, tell launches apart; numbers and sizes do not."""
    begun: list[tuple[Any, ...]] = []

    class Kernel:
        def warmup(self, *given: Any, grid: tuple[int, ...], **options: int) -> None:
            begun.append((*given, *options.values()))

    kernel, x = Kernel(), torch.ones(2)
    with ThreadPoolExecutor(1) as pool:
        compiling = launcher.Compiling(pool)
        for arguments, option in (((x, 1), 4), ((x[:1], 2), 4), ((x.double(), 1), 4), ((None, 1), 4), ((x, 3), 8)):
            compiling.add(kernel, (len(begun),), arguments, dict(num_warps=option))
    assert begun == [(torch.float32, 1, 4), (torch.float64, 1, 4), (None, 1, 4), (torch.float32, 3, 8)]


@pytest.mark.parametrize(("device", "number"), [("cuda:0", 0), ("cuda:1", 1), ("cuda", 3)])
def test_threads_compile_for_a_device_with_a_number(device: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sets no device without one; where that raised, nothing was compiled, and nobody was told."""
    prepared: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", prepared.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with launcher.compiling_ahead(torch.device(device)):
        assert add(torch.ones(1, 1)) == 1
    assert prepared
    assert set(prepared) == {number}


@pytest.mark.parametrize(
    ("allowed", "there", "expected"),
    [({5}, 64, 1), (set(range(64)), 64, 8), (None, 3, 3), (None, 64, 8), (None, None, 1)],
)
def test_as_many_threads_as_there_are_processors_for_them_and_no_more_than_pay(
    allowed: set[int] | None, there: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the process may use, where the system tells, which Windows does not."""
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    if allowed is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)
    assert launcher.threads() == expected


@pytest.mark.parametrize("backend", ["triton_sequence", "triton_fused", "triton_split"])
def test_no_graph_is_made_of_what_does_not_run(backend: str) -> None:
    """Were it captured, it would be replayed for calls of the same kind later on."""
    dnc = make(backend=backend)
    with launcher.compiling_ahead(CPU):
        for seed in range(3):  # with a graph from the second one on
            results(dnc, *draw(dnc, seed))
    assert not graphs._graphs
    results(dnc, *draw(dnc, 0, 1))
    assert graphs._graphs
