"""The large buffers of a sequence on a CPU, which are taken again once nothing refers to them; and what lies in one."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from helpers import assert_same_bits
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dnc_triton.sequence import pool
from dnc_triton.sequence.parts import Parts, zeros

BYTES = torch.empty(0, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    monkeypatch.setattr(pool, "_waiting", {})
    monkeypatch.setattr(pool, "SMALLEST", 64)


def waiting() -> list[int]:
    """The bytes of each buffer that waits."""
    return [block.nbytes for block in pool._waiting.values()]


def give_up(*sizes: int) -> None:
    tensors = [pool.empty((size,), BYTES) for size in sizes]
    while tensors:
        tensors.pop(0)


def test_what_is_given_up_is_taken_again():
    like = torch.empty(0, dtype=torch.float64)
    first = pool.empty((4, 8), like)
    view, address = first[1:].view(-1), first.data_ptr()
    del first
    assert waiting() == []  # a view still refers to it
    other = pool.empty((4, 8), like)
    assert other.data_ptr() != address
    del view
    again = pool.empty((64,), like, torch.float32)  # as many bytes
    assert again.data_ptr() == address
    assert (again.dtype, again.shape, again.requires_grad) == (torch.float32, (64,), False)


def test_so_many_bytes_wait_at_most(monkeypatch):
    monkeypatch.setattr(pool, "MOST", 1000)
    give_up(400, 500, 300)
    assert waiting() == [500, 300]  # what waited longest makes room
    give_up(2000)  # too large by itself
    assert waiting() == []
    give_up(600)
    give_up(400, 400)
    assert waiting() == [400, 400]
    give_up(200)
    assert waiting() == [400, 400, 200]


def test_what_was_given_up_last_is_taken_first():
    """A cache may still have it, and what waited longest makes room."""
    first, second = (pool.empty((100,), BYTES) for _ in range(2))
    address = second.data_ptr()
    del first, second
    assert pool.empty((100,), BYTES).data_ptr() == address


def test_what_waits_is_looked_through_however_many_sizes_there_were(monkeypatch):
    """As with lengths that are drawn anew for each batch."""
    monkeypatch.setattr(pool, "MOST", 10_000)
    for size in range(1000, 1500):
        give_up(size)
    assert waiting() == list(range(1494, 1500))
    address = pool.empty((1495,), BYTES).data_ptr()
    assert waiting() == [1494, 1496, 1497, 1498, 1499, 1495]
    assert pool.empty((1495,), BYTES).data_ptr() == address


def test_small_and_fake_tensors_are_torchs_own():
    for like in (torch.empty(0), torch.empty(0, device="meta")):
        for shape in ((3, 5), (4, 4)):
            tensor = pool.empty(shape, like)
            assert (tensor.shape, tensor.device) == (shape, like.device)
            del tensor
    assert waiting() == [64]
    with FakeTensorMode() as mode:
        assert isinstance(pool.empty((64,), torch.empty(0)), FakeTensor)
    assert isinstance(pool.empty((64,), mode.from_tensor(torch.empty(0))), FakeTensor)
    traced = make_fx(lambda like: pool.empty((64,), like))(torch.empty(0))
    assert traced.graph.find_nodes(op="call_function", target=torch.ops.aten.new_empty.default)


def test_threads_and_the_collector_share_it():
    """No buffer is ever in two hands, though some are given up by the collector in the middle of anything."""

    def work(number: int) -> None:
        for _ in range(300):
            mine = pool.empty((100 + number % 2,), BYTES).fill_(number)
            cycle: list[object] = [pool.empty((100,), BYTES)]
            cycle.append(cycle)
            if not bool((mine == number).all()):
                wrong.append(number)

    wrong: list[int] = []
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*threshold)
    assert wrong == []


# --- what lies in one buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parts_lie_at_multiples_of_16_bytes(dtype):
    """Kernels are compiled anew for what does not."""
    shapes = ((3,), (2, 1, 5), (0, 2), (1,), (4, 4))
    parts, like = Parts(dtype, *shapes), torch.empty(0, dtype=dtype)
    buffer = parts.allocate(2, BYTES)
    made = zeros(shapes, like)
    for row in (*map(parts.cut, buffer), made):
        assert [(x.shape, x.dtype) for x in row] == [(shape, dtype) for shape in shapes]
        assert all(x.is_contiguous() and x.storage_offset() * x.itemsize % 16 == 0 for x in row)
    assert not any(x.any() for x in made)
    drawn = [torch.rand(shape).to(dtype) for shape in shapes]
    assert_same_bits(parts.cut(parts.join(drawn)), drawn)
