"""Sequences by replayed CUDA graphs beside plain launches, to the last bit; and what is done around them.

What does not need a device: tests/test_sequence_graphs.py; above all who holds an instance and when it is given up:
tests/test_sequence_graphs_instances.py.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted", allow_module_level=True)

import replays as on_cpu
from helpers import assert_same_bits
from random_programs import Program
from replays import BATCH, STEPS, _without, check_two_threads, draw, results, train  # noqa: F401
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.modes import aside
from dnc_triton import DNC, environment, trial
from dnc_triton.sequence import engine as engines
from dnc_triton.sequence import graphs

pytestmark = pytest.mark.gpu
BACKENDS = ["triton_fused", "triton_split", "torch_sequence"]  # of any controller


class Counting(engines.Engine):
    """An engine that counts."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.captures = self.replays = 0

    def capture(self, call: Callable[[], list[Tensor]], pool: Any = None) -> engines.Captured:
        captured = super().capture(call, pool)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            captured.replay()

        return captured._replace(replay=replay)


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.ENGINES, "cuda", Counting)
    monkeypatch.delenv(environment.GRAPHS, raising=False)
    monkeypatch.delenv(environment.GRAPH_MEMORY, raising=False)


def cache() -> graphs.GraphCache:
    (found,) = graphs._graphs.values()
    return found


def engine() -> Counting:
    return cache().engine  # type: ignore[return-value]


def make(device: torch.device, backend: str = "triton_split", **options: Any) -> DNC:
    return on_cpu.make(backend=backend, **options).to(device)


# Few: each new size or setting is compiled, which takes longer than all that it computes.
@pytest.mark.parametrize(
    ("choice", "masks"),
    [
        ({}, False),
        ({}, True),
        (dict(controller="gru", num_layers=2, clip=0.3, checkpoint=2), True),
        (dict(num_layers=3, dropout=0.5, batch_first=False, max_activation_gradient=0.05), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_trainings_are_the_same(
    backend: str,
    choice: dict[str, Any],
    masks: bool,
    device: torch.device,
    without: Any,
) -> None:
    dnc = make(device, backend, **choice)
    shape = (BATCH, STEPS) if dnc.batch_first else (STEPS, BATCH)
    options = lambda: dict(lengths=[STEPS, 0, 2], reset=torch.rand(shape, device=device) < 0.3) if masks else {}  # noqa: E731
    expected = without(train, dnc, 4, options)
    assert not graphs._graphs
    assert_same_bits(train(dnc, 4, options), expected)
    assert (engine().captures, engine().replays) == (2, 2 * 3)


@pytest.mark.parametrize(("choice", "masks"), [({}, False), (dict(clip=0.3), True)], ids=str)
def test_one_launch_and_what_is_around_it(
    choice: dict[str, Any],
    masks: bool,
    device: torch.device,
    without: Any,
) -> None:
    dnc = make(device, "triton_sequence", **choice)
    options = lambda: (  # noqa: E731
        dict(lengths=[STEPS, 0, 2], reset=torch.rand(BATCH, STEPS, device=device) < 0.3) if masks else {}
    )
    expected = without(train, dnc, 4, options)
    assert_same_bits(train(dnc, 4, options), expected)
    assert (engine().captures, engine().replays) == (2, 2 * 3)


def test_a_larger_one(device: torch.device, without: Any) -> None:
    dnc = make(device, memory_size=128, word_size=32, num_reads=4, dtype=torch.float32)
    assert_same_bits(train(dnc, 4, steps=50), without(train, dnc, 4, steps=50))
    assert engine().replays == 2 * 3


def test_autocast(device: torch.device, without: Any) -> None:
    dnc, context = make(device, dtype=torch.float32), lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    assert_same_bits(train(dnc, 4, context=context), without(train, dnc, 4, context=context))
    assert engine().replays == 2 * 3


@pytest.mark.parametrize("steps", [1, STEPS, 130])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton_sequence"])
def test_without_gradients(backend: str, mode: Any, steps: int, device: torch.device, without: Any) -> None:
    dnc = make(device, backend)
    for seed in range(4):
        with mode():
            given = draw(dnc, seed, steps)
            assert_same_bits(dnc(*given), without(dnc, *given))
    assert (engine().captures, engine().replays) == (1, 3)


def test_what_is_returned_stays(device: torch.device) -> None:
    dnc = make(device)
    drawn = [draw(dnc, seed) for seed in range(6)]
    seen = [results(dnc, *given) for given in drawn]
    kept = tree_map(torch.clone, seen)
    for given in drawn:
        results(dnc, *given)
    assert_same_bits(seen, kept)
    assert engine().replays > 0


def test_used_twice_in_one_graph_and_twice_backwards(device: torch.device, without: Any) -> None:
    dnc = make(device)
    parameters = list(dnc.parameters())

    def run() -> list[Any]:
        seen = []
        for seed in range(8):
            inputs, state = draw(dnc, seed)
            outputs, state = dnc(inputs, state)
            loss = outputs.sum() + dnc(inputs.flip(1), state)[0].square().sum()
            seen += [torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(loss, parameters)]
        return seen

    assert_same_bits(run(), without(run))
    assert len(cache().instances) == 2
    assert all(instance.is_free for instance in cache().instances)


@pytest.mark.parametrize("seed", range(4))
def test_random_programs(seed: int, device: torch.device, without: Any) -> None:
    choices = [dict(), dict(controller="gru", num_layers=2, clip=0.3, checkpoint=2)]
    layers = lambda: [make(device, "torch_sequence", **choice) for choice in choices]  # noqa: E731
    expected, actual = (Program(seed, layers(), lambda number: None) for _ in range(2))
    without(expected.run, 200)
    actual.run(200)
    assert_same_bits(actual.record, expected.record)
    assert actual.errors == expected.errors
    assert engine().replays > 10


def test_a_capture_of_the_users(device: torch.device, without: Any) -> None:
    """Neither their rehearsal on another stream nor their capture affects our graph, which exists already."""
    dnc = make(device)
    train(dnc, 3)
    replays = engine().replays
    inputs, state = draw(dnc, 0)

    def step() -> Any:
        outputs, last = dnc(inputs, state)
        return outputs.detach(), last.detach(), torch.autograd.grad(outputs.square().sum(), list(dnc.parameters()))

    with aside():
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert engine().replays == replays
    for seed in (1, 2, 3):
        for place, numbers in zip(tree_leaves((inputs, state)), tree_leaves(draw(dnc, seed)), strict=True):
            place.copy_(numbers)
        graph.replay()
        replayed = tree_map(torch.clone, captured)
        assert_same_bits(replayed, without(step))
        assert_same_bits(step(), replayed)  # ours, in between
    assert engine().replays == replays + 2 * 3


def test_a_capture_of_a_whole_training_step(device: torch.device, without: Any) -> None:
    """As docs/own_data.md has it: loss and optimizer too. To the bit, the weights are those of a loop."""

    def trained(captured: bool) -> list[Tensor]:
        dnc = make(device, dtype=torch.float32)
        optimizer = torch.optim.Adam(dnc.parameters(), lr=1e-2, capturable=True)
        inputs, _ = draw(dnc, 0)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = dnc(inputs)[0].square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        with aside():
            for _ in range(2):
                step()
        call = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()

            def call() -> Tensor:
                graph.replay()
                return loss

        losses = []
        for seed in range(4):
            inputs.copy_(draw(dnc, seed)[0])
            losses.append(call().clone())
        return [*losses, *(parameter.detach() for parameter in dnc.parameters())]

    replayed, expected = trained(captured=True), without(trained, captured=False)
    assert_same_bits(replayed, expected)
    assert len(set(map(float, replayed[:4]))) == 4


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str, device: torch.device, without: Any) -> None:
    dnc = make(device, dtype=torch.float32)
    parameters = list(dnc.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(dnc, mode=mode)

    def run() -> list[Any]:
        seen = []
        for seed in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            outputs, state = compiled(*draw(dnc, seed))
            gradients = torch.autograd.grad(outputs.square().sum(), parameters)
            seen.append(tree_map(torch.clone, (outputs.detach(), state.detach(), gradients)))
        return seen

    expected = without(run)
    assert_same_bits(run(), expected)
    assert_same_bits(train(dnc, 4), without(train, dnc, 4))  # beside it, not compiled
    assert mode != "default" or engine().replays > 0


def test_another_stream_gets_plain_launches(device: torch.device, without: Any) -> None:
    dnc = make(device)
    expected = without(train, dnc, 4)
    with aside():
        actual = train(dnc, 4)
    assert_same_bits(actual, expected)
    assert engine().captures == 0


def test_another_allocator_gets_plain_launches() -> None:
    """In a process of its own, since PyTorch settles on one when it begins."""
    program = """if True:
        import torch
        from dnc_triton import DNC
        from dnc_triton.sequence import graphs

        dnc = DNC(3, 6, 2, memory_size=5, word_size=4, num_reads=2, device="cuda", backend="torch_sequence")
        for _ in range(4):
            dnc(torch.ones(3, 5, 3, device="cuda"))[0].sum().backward()
        assert torch.cuda.get_allocator_backend() == "cudaMallocAsync"
        assert not any(cache.signatures for cache in graphs._graphs.values())
    """
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=os.environ | variables, check=True)


def test_within_a_pool_of_the_users(device: torch.device, without: Any) -> None:
    """What a graph works on is its own all the same, and given to nothing else."""
    dnc, pool = make(device, "torch_sequence", dtype=torch.float32), torch.cuda.MemPool()
    expected = without(train, dnc, 6)
    with torch.cuda.use_mem_pool(pool):
        train(dnc, 3)
        others = [torch.full((2**size,), torch.nan, device=device) for size in (8, 12, 16, 20)]
        assert_same_bits(train(dnc, 6), expected)
        assert all(other.isnan().all() for other in others)
    assert engine().replays > 0
    graphs._graphs.clear()  # their copies of what they are given are in that pool


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_layer_on_a_device_that_is_not_the_current_one(without: Any) -> None:
    dnc = make(torch.device("cuda", 1))
    with torch.cuda.device(0):
        expected = without(train, dnc, 4)
        assert_same_bits(train(dnc, 4), expected)
        assert (engine().captures, engine().replays) == (2, 2 * 3)
        cache().forget(cache().instances)
        assert torch.cuda.current_device() == 0


def test_two_threads(device: torch.device, without: Any) -> None:
    check_two_threads(make(device), without)
    assert engine().replays > 0


def test_a_thread_that_measures_ends_no_capture_of_another(
    device: torch.device, caplog: pytest.LogCaptureFixture, without: Any
) -> None:
    dnc, ended = make(device, "torch_sequence"), threading.Event()

    def measure() -> None:
        while not ended.is_set():
            torch.ones(1000, device=device).sum()
            trial.wait_for(device)  # nothing more: after measuring, what others captured meanwhile would be given up

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        for steps in range(1, 11):
            assert_same_bits(train(dnc, 3, steps=steps), without(train, dnc, 3, steps=steps))
    finally:
        ended.set()
        thread.join()
    assert not [record for record in caplog.records if "a capture failed" in record.getMessage()]
    assert engine().captures >= 2 * 10


def test_who_forbids_to_wait_for_the_device_is_not_refused(device: torch.device, without: Any) -> None:
    """A capture waits, and so does giving a graph up: once, and not in a training's own steps."""
    dnc = make(device, "torch_sequence")
    expected = without(train, dnc, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with graphs.forgetting():
            actual = train(dnc, 3)
        trial.wait_for(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(actual, expected)
    assert engine().captures == 2
    assert not cache().instances


def test_more_than_the_bound(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    without: Any,
) -> None:
    monkeypatch.setenv(environment.GRAPH_MEMORY, "1")
    dnc = make(device)
    assert_same_bits(train(dnc, 6), without(train, dnc, 6))
    assert not cache().instances
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "would exceed the bound of 1.0 MiB" in record.getMessage()


def test_memory_stays_within_the_bound(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does what the allocator holds, which has released what was given up."""
    monkeypatch.setenv(environment.GRAPH_MEMORY, "160")  # of some 250 that all would take
    dnc = make(device, memory_size=128, word_size=32, num_reads=4, dtype=torch.float32)
    for seed in range(2):
        results(dnc, *draw(dnc, seed, 1))  # libraries set themselves up
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for steps in range(100, 240, 20):
        for seed in range(3):
            results(dnc, *draw(dnc, seed, steps))
    assert engine().captures > 2 * 2
    assert 1 < len(cache().instances) < 8
    assert sum(instance.size for instance in cache().instances) <= 160 * graphs.MEBIBYTE
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < (160 + 64) * graphs.MEBIBYTE


def test_what_a_library_keeps_for_its_products_may_be_forgotten(device: torch.device, without: Any) -> None:
    """As PyTorch's compiler does, and since 2.12 a graph's end: graphs that are there go on, even without the first."""
    first, second = make(device, dtype=torch.float32), make(device, "torch_sequence", dtype=torch.float32)
    expected = without(train, second, 6, steps=100)
    train(first, 3)
    assert_same_bits(train(second, 3, steps=100), expected[:3])
    (pool,) = map(engines._workspaces, graphs._graphs)
    assert sum(segment["allocated_size"] for segment in pool.snapshot()) > 0
    captures = engine().captures
    del cache().instances[0]
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((size * graphs.MEBIBYTE // 4,), torch.nan, device=device) for size in (1, 2, 8, 32, 64)]
    assert_same_bits(train(second, 6, steps=100), expected)
    assert engine().captures == captures
    assert all(other.isnan().all() for other in others)


def test_expandable_segments() -> None:
    """What is given up there PyTorch may hand back to the device at once."""
    chosen = "test_what_is_returned_stays or test_used_twice or test_what_a_library_keeps or test_more_than_the_bound"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, env=os.environ | variables, check=True)


def test_a_capture_that_the_device_refuses(
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
    without: Any,
) -> None:
    """Its call asks for a number that is not there yet. It leaves no trace, not even in a graph of the user's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = torch.rand(4, device=device)
    given = [torch.ones(1000, device=device)]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0] * tensors[0].sum().item()]

    for _ in range(4):
        (result,) = graphs.forward("a kind", given, run, 1)
        assert (result == 1000).all()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "a capture failed" in record.getMessage()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    seen = []
    for _ in range(2):
        graph.replay()
        seen += [drawn.tolist(), torch.rand(4, device=device).tolist()]
    assert len(set(map(tuple, seen))) == 4
    dnc = make(device)
    assert_same_bits(train(dnc, 4), without(train, dnc, 4))
    assert engine().replays == 2 * 3
