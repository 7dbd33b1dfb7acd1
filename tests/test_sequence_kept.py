"""What the sequence operation keeps for its backward: how little with checkpoints, and nothing without gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same_bits
from sequence_parity import BATCH, FORWARD, draw, make, most_allocated, operation, outcome
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dnc_triton import DNC, dispatch
from dnc_triton.kernels.layout import layouts
from dnc_triton.sequence import pool
from dnc_triton.sequence.history import Checkpoints
from dnc_triton.sequence.loop import Sequence
from dnc_triton.sequence.settings import SequenceSettings

# --- what is kept for the backward


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 4, 7, 9, 14, "auto", None], ids=str)
@pytest.mark.parametrize(
    ("choice", "options"),
    [
        (dict(), {}),
        (dict(controller="gru", num_layers=2, clip=0.3, stop_usage_gradient=True), {}),
        (dict(controller="feedforward"), dict(lengths=[9, 4, 7])),
        (dict(), dict(lengths=[8, 0, 6], reset=torch.eye(9, dtype=torch.bool)[:, [2, 5, 3]])),
    ],
    ids=["lstm", "gru", "lengths", "lengths, reset"],
)
def test_checkpoints_change_no_bit(choice, options, checkpoint, monkeypatch):
    if checkpoint == "auto":
        monkeypatch.setattr(pool, "MOST", 0)  # 9 steps: every third is kept
    dnc, full = make(**choice, checkpoint=checkpoint), make(**choice, checkpoint=None)
    arguments = draw(dnc, steps=9)
    assert_same_bits(outcome(operation, dnc, *arguments, **options), outcome(operation, full, *arguments, **options))


def test_checkpoints_keep_less(monkeypatch):
    """Of T steps every k-th memory and link, as measured; √T of them, by "auto", when all would exceed the pool."""
    sizes, steps = dict(memory_size=16, word_size=8), 25
    state_bytes = BATCH * (16 * 16 + 16 * 8) * 8

    def kept(checkpoint: int | str | None) -> int:
        dnc = make(**sizes, checkpoint=checkpoint)
        return saved_bytes(lambda: dnc(*draw(dnc, steps)))

    full = kept(None)
    assert full == kept(1)
    for every in (2, 5, 24, 25, 100):
        dropped = (steps - 1) - (steps - 1) // every
        assert full - kept(every) >= dropped * state_bytes
    for most, every in ((steps * state_bytes, 1), (steps * state_bytes - 1, 5)):
        monkeypatch.setattr(pool, "MOST", most)
        assert kept("auto") == kept(every)


@pytest.mark.parametrize("backend", ["torch_sequence", "triton_split"])
def test_a_thousand_steps_train_within_8_gb(backend):
    """(B, N, W, R) = (32, 256, 64, 4), H = 256, with what "auto" takes on a CPU: every 32nd step.

    On the meta device nothing is computed, but everything that is kept has its size. What a process grew by is in
    benchmarks/results/lean.json.
    """
    if backend.startswith("triton"):
        pytest.importorskip("triton")
    limit, every, batch = 8e9, 32, 32
    dnc = DNC(64, 256, 64, memory_size=256, word_size=64, num_reads=4, device="meta")
    inputs = torch.empty(1000, batch, 64, device="meta")
    layout = {"layout": layouts(256)[0]} if backend.startswith("triton") else {}
    unroll = dispatch.BACKENDS[backend].unroll

    def kept(checkpoint: int | str | None) -> int:
        state = dnc.initial_state(batch)
        return saved_bytes(lambda: unroll(dnc, inputs, state, checkpoint=checkpoint, **layout))

    # Plain PyTorch keeps every link, the kernels each fourth.
    assert (kept(None) > limit) == (backend == "torch_sequence")
    assert kept("auto") == kept(every)
    # On the way back a whole stretch of memories and links is there, and for each step about as much again as is kept
    # of it without these two: slopes and gradients.
    memory_and_link = 4 * batch * (256 * 64 + 256 * 256)
    assert 2 * kept(every) + (every - 1) * memory_and_link < limit


def saved_bytes(run: Callable[[], Any]) -> int:
    """What autograd holds on to, each storage counted once."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = run()
    del results
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("steps", [1, 3, 4, 9, 12])
@pytest.mark.parametrize(("every", "link_every"), [(1, 1), (2, 1), (3, 1), (9, 1), (1, 4), (2, 4), (9, 4)])
def test_each_buffer_for_memory_and_link_is_used(every: int, link_every: int, steps: int, monkeypatch) -> None:
    """And there is none where the way back recomputes nothing."""
    made: list[Tensor] = []
    monkeypatch.setattr(pool, "empty_like", lambda x: made.append(torch.empty_like(x)) or made[-1])
    layout: Any = SimpleNamespace(link_every=link_every)
    settings = SequenceSettings("lstm", 1, None, None, 1.0, False, torch.float32, every, False, layout)
    first, last = ((torch.empty(2), torch.empty(3)) for _ in range(2))
    memories, links = (torch.empty(n, m) for n, m in zip(Checkpoints.counts(settings, steps), (2, 3), strict=True))
    assert len(memories) == len(links) or every == 1, "what is made again begins with both"
    for forwards in (True, False):
        made.clear()
        states = Checkpoints(settings, first, last, memories, links, steps, forwards=forwards)
        given = [x for step in range(steps + 1) for x in states[step] if x is not None]
        there = [*first, *last, *memories, *links, *made]
        assert {x.data_ptr() for x in given} == {x.data_ptr() for x in there}
        makes_none = every == 1 and not forwards
        assert not (makes_none and made)
        assert len(made) <= 4 or not forwards  # of each two, in turn
        for step in range(1, steps):
            assert (states[step][1] is None) == (makes_none and states.behind(step) > 0)


# --- without gradients


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float64, 5), (torch.float64, 64), (torch.float64, 65), (torch.float64, 130), (torch.float32, 64)],
)
@pytest.mark.parametrize("options", [{}, dict(lengths=True)], ids=["plain", "lengths, reset"])
def test_the_same_bits_without_gradients(dtype, options, steps):
    dnc = make(num_layers=2, dtype=dtype, checkpoint=3)
    inputs, given = draw(dnc, steps)
    if options:
        options = dict(lengths=[steps - 1, steps // 2, steps], reset=torch.rand(steps, BATCH) < 0.05)
    expected = dnc(inputs, given, **options)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            results = tree_map(torch.clone, dnc(inputs, given, **options))
        assert not any(x.requires_grad for x in tree_leaves(results))
        if steps <= Sequence.chunk:
            assert_same_bits(results, expected)
        else:  # products over other numbers of steps, whose last bits a library may sum otherwise
            assert_close(results, tree_map(torch.detach, expected), **FORWARD)


class Watch(TorchDispatchMode):
    """How many numbers the operations of this library have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.returned = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        if func.namespace == "dnc_triton":
            self.returned += sum(x.numel() for x in tree_leaves(results))
        return results


def test_nothing_is_kept_without_gradients():
    check_nothing_is_kept("torch_sequence")


def check_nothing_is_kept(backend):
    dnc = make(backend)
    inputs, given = draw(dnc, steps=100)
    with torch.no_grad(), Watch() as watch:
        results = dnc(inputs, given)
    assert watch.returned == sum(x.numel() for x in tree_leaves(results))
    with Watch() as watch:
        dnc(inputs, given)
    assert watch.returned > 10 * sum(x.numel() for x in tree_leaves(results))


def test_memory_without_gradients_does_not_grow_with_the_sequence():
    dnc = make(memory_size=32)

    def most(steps: int) -> int:
        inputs, given = draw(dnc, steps)
        with torch.no_grad():
            return most_allocated(lambda: dnc(inputs, given)) - 2 * steps * BATCH * dnc.output_size * 8  # pieces, whole

    short, long = most(192), most(512)
    assert short > 64 * BATCH * 32 * 8  # it did count
    assert long < 1.1 * short
