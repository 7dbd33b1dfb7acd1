"""While kernels compile ahead nothing runs, of this thread's launches alone, and nothing of it is left behind.

That what compiles is what will be launched is in tests/test_compiling_ahead.py, where nothing is interpreted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from replays import _empty, draw, make, results  # noqa: F401

from dnc_triton.kernels import launcher
from dnc_triton.sequence import graphs

CPU = torch.device("cpu")


def add(out: torch.Tensor) -> torch.Tensor:
    """One kernel, which adds 1 · 2."""
    from dnc_triton.kernels.products import PRODUCT, pack, product

    product(torch.ones(1, 1), pack(torch.full((1, 1), 2.0), most=PRODUCT.block), out, add=True)
    return out


def test_this_threads_launches_alone_run_nothing() -> None:
    elsewhere = []
    with launcher.compiling_ahead(CPU):
        assert launcher.is_compiling_ahead()
        assert add(torch.ones(1, 1)) == 1
        thread = threading.Thread(target=lambda: elsewhere.append(float(add(torch.ones(1, 1)))))
        thread.start()
        thread.join()
    assert elsewhere == [3.0]
    assert not launcher.is_compiling_ahead()
    assert add(torch.ones(1, 1)) == 3


def test_kernels_are_launched_one_at_a_time() -> None:
    """A second thread must not find one that is only half loaded. Each is asked for with fused products and sums."""
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


def test_an_error_in_the_block_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), launcher.compiling_ahead(CPU):
        raise ZeroDivisionError
    assert add(torch.ones(1, 1)) == 3


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda", 3)])
def test_threads_compile_for_a_device_with_a_number(device: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sets no other one; where that raised nothing was compiled, and nobody was told."""
    prepared: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", prepared.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with launcher.compiling_ahead(torch.device(device)):
        assert add(torch.ones(1, 1)) == 1
    assert prepared
    assert set(prepared) == {number}


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
