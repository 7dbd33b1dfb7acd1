"""The sequence operation by replayed graphs, with a stand-in for the device: the same bits as without, at any time.

Who holds an instance and when it is given up is in test_sequence_graphs_instances.py, what goes by plain launches in
test_sequence_graphs_plain.py. What a CUDA device has to say to this is in tests/gpu, the kernels of a step in
tests/kernels/test_kernel_graphs.py.
"""

from __future__ import annotations

import copy
import sys
from functools import cache as cached
from types import SimpleNamespace
from typing import Any
from unittest.mock import DEFAULT, MagicMock, Mock, create_autospec
from unittest.mock import call as call_of

import pytest
import torch
from helpers import assert_same_bits
from replays import BATCH, INPUTS, STEPS, _empty, _without, cache, check_two_threads, draw, engine, make, results, train  # noqa: F401
from torch import Tensor
from torch.utils._pytree import tree_map

from dnc_triton.sequence import engine as engines
from dnc_triton.sequence import graphs

# --- the same bits

CHOICES: list[dict[str, Any]] = [
    {},
    dict(dtype=torch.float32),
    dict(controller="gru", num_layers=2, clip=0.3, checkpoint=2),
    dict(controller="feedforward", num_layers=2, dropout=0.5, stop_usage_gradient=True),
    dict(num_layers=3, dropout=0.5, batch_first=False, max_activation_gradient=0.05),
    dict(checkpoint=3, strength="softplus"),
]


@pytest.mark.parametrize(
    ("choice", "masks"),
    [({}, "lengths"), ({}, "reset"), *((choice, masks) for choice in CHOICES for masks in ("", "lengths and reset"))],
    ids=str,
)
def test_trainings_are_the_same(choice: dict[str, Any], masks: str, without: Any) -> None:
    def options() -> dict[str, Any]:
        shape = (BATCH, STEPS) if choice.get("batch_first", True) else (STEPS, BATCH)
        drawn = {"lengths": torch.randint(0, STEPS + 1, (BATCH,)), "reset": torch.rand(shape) < 0.3}
        return {name: drawn[name] for name in drawn if name in masks}

    dnc = make(**choice)
    expected = without(train, dnc, 5, options)
    assert not graphs._graphs
    assert_same_bits(train(dnc, 5, options), expected)
    assert (engine().captures, engine().replays) == (2, 2 * 4)  # forward and backward, from the second call on


def test_autocast(without: Any) -> None:
    dnc, context = make(dtype=torch.float32), lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    assert_same_bits(train(dnc, 4, context=context), without(train, dnc, 4, context=context))
    assert engine().replays == 2 * 3
    assert_same_bits(train(dnc, 2), without(train, dnc, 2))  # another kind of call


@pytest.mark.parametrize("steps", [1, STEPS, 130])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(steps: int, mode: Any, without: Any) -> None:
    dnc = make()

    def run() -> list[Any]:
        seen = []
        for seed in range(4):
            inputs, state = draw(dnc, seed, steps)
            with mode():
                for _ in range(2):
                    outputs, state = dnc(inputs, state)
                    seen.append((outputs.clone(), state))
        return seen

    assert_same_bits(run(), without(run))
    assert (engine().captures, engine().replays) == (1, 7)
    assert all(instance.is_free for instance in cache().instances)
    with torch.no_grad():  # what inference mode has captured can be written to outside of it
        dnc(*draw(dnc, 0, steps))
    assert engine().replays == 8


def test_step_by_step(without: Any) -> None:
    dnc = make()

    @torch.no_grad()
    def run() -> list[Tensor]:
        seen, state = [], None
        for inputs in torch.randn(6, BATCH, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
            outputs, state = dnc.step(inputs, state)
            seen.append(outputs)
        return seen

    assert_same_bits(run(), without(run))
    assert engine().replays == 5


def test_what_is_returned_stays() -> None:
    """And what is given is not written to."""
    dnc = make()
    drawn = [draw(dnc, seed) for seed in range(4)]
    before = copy.deepcopy(drawn)
    seen = [results(dnc, *given) for given in drawn]
    kept = tree_map(torch.clone, seen)
    for given in drawn:
        results(dnc, *given)
    assert_same_bits(seen, kept)
    assert_same_bits(drawn, before)


def test_each_kind_of_call_has_its_own(without: Any) -> None:
    """Sizes, masks, and settings of the products."""
    dnc, calls = make(), []
    for steps in (2, 3):
        inputs, state = draw(dnc, steps, steps)
        calls += [dict(inputs=inputs, state=state), dict(inputs=inputs, state=state, lengths=[2, 0, 1])]
    calls += [dict(inputs=inputs[:2], state=None), dict(inputs=inputs[:, ::2], state=None)]
    for _ in range(3):
        for call in calls:
            assert_same_bits(results(dnc, **call), without(results, dnc, **call))
    assert engine().captures == 2 * len(calls)
    torch.use_deterministic_algorithms(True)
    try:
        results(dnc, **calls[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(cache().signatures) == len(calls) + 1


def test_lengths_and_resets_are_not_taken_for_each_other(without: Any) -> None:
    """As masks of a layer that is time first they have the same shape and strides."""
    dnc = make(batch_first=False)
    inputs, state = draw(dnc, 0)
    reset = torch.rand(STEPS, BATCH) < 0.3
    for _ in range(3):
        for options in ({"lengths": [2, 0, 1]}, {"reset": reset}):
            actual = results(dnc, inputs, state, **options)
            assert_same_bits(actual, without(results, dnc, inputs, state, **options))


def test_compiled(without: Any) -> None:
    dnc = make()
    torch._dynamo.reset()
    compiled = torch.compile(dnc, fullgraph=True, backend="aot_eager")
    parameters = list(dnc.parameters())

    def run() -> list[Any]:
        seen = []
        for seed in range(4):
            outputs, state = compiled(*draw(dnc, seed))
            seen.append((outputs.detach(), state.detach(), torch.autograd.grad(outputs.sum(), parameters)))
        return seen

    expected = without(run)
    assert_same_bits(run(), expected)
    assert engine().replays == 2 * 3
    assert all(instance.is_free for instance in cache().instances)


def test_two_threads(without: Any) -> None:
    check_two_threads(make(), without)
    assert engine().replays > 0


# --- the device


def test_an_engine_asks_torch_as_it_wants_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That much can be said without a device: the calls are right, and in order."""
    cuda = {name: create_autospec(getattr(torch.cuda, name)) for name in CALLED}
    for name, mock in cuda.items():
        monkeypatch.setattr(torch.cuda, name, mock)
    cuda["get_allocator_backend"].return_value = "native"
    cuda["memory_reserved"].side_effect = [100, 150]
    result, begun = torch.zeros(3), []
    asked: list[str] = []
    for name in ("synchronize", "empty_cache", "use_mem_pool"):
        cuda[name].side_effect = lambda *_, name=name: asked.append(name) or DEFAULT
    ones = MagicMock()
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones)
    monkeypatch.setattr(torch, "addmm", products := Mock())
    monkeypatch.setattr(engines, "_workspaces", cached(engines._workspaces.__wrapped__))

    def call() -> list[Tensor]:
        begun.append((cuda["graph"].return_value.__enter__.called, products.call_count))
        return [result]

    kept: list[object] = []
    monkeypatch.setattr(engines, "_keep_for_good", kept.append)
    engine = engines.Engine(torch.device("cuda", 1))
    captured = engine.capture(call, pool=(0, 7))
    assert kept == [cuda["MemPool"].return_value]
    kept.clear()
    assert begun == [(False, 0), (True, 1)]
    stream, graph = cuda["Stream"].return_value, cuda["CUDAGraph"].return_value
    cuda["use_mem_pool"].assert_called_once_with(cuda["MemPool"].return_value, torch.device("cuda", 1))
    assert asked == ["synchronize", "empty_cache", "use_mem_pool"], "from a pool nothing that is cached is given up"
    assert call_of(stream) in cuda["stream"].mock_calls
    stream.wait_stream.assert_called_once_with(cuda["current_stream"].return_value)
    cuda["graph"].assert_called_once_with(graph, (0, 7), stream, capture_error_mode="thread_local")
    assert captured.results == [result]
    assert captured.size == 50
    captured.replay()
    graph.replay.assert_called_once_with()
    engine.wait()
    cuda["default_stream"].assert_called_with(torch.device("cuda", 1))
    cuda["default_stream"].return_value.record_event.return_value.synchronize.assert_called_once_with()
    cuda["default_stream"].return_value.synchronize.assert_not_called()  # which PyTorch may have been told to refuse
    engine.keep_until_launched([read := Mock()])
    read.record_stream.assert_called_once_with(cuda["default_stream"].return_value)

    # Whether PyTorch has ended its part of a capture that failed, or not.
    number = Mock()
    monkeypatch.setattr(torch, "zeros", lambda *size, device: number)
    ended, released = Mock(), Mock()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", released)
    cuda["graph"].return_value.__exit__.side_effect = RuntimeError("capture invalidated")
    not_well, ends_itself = RuntimeError("without a preceding successful capture"), RuntimeError("not recording")
    for ends, ends_well, times in ((ends_itself, None, 0), (None, not_well, 1), (ends_itself, not_well, 2)):
        cuda["memory_reserved"].side_effect, ended.side_effect = [100, 150], ends
        graph.pool.side_effect = ends_well
        with pytest.raises(RuntimeError, match="invalidated"):
            engine.capture(call, pool=(0, 7))
        ended.assert_called_with(1, (0, 7))
        assert kept == times * [graph], "whose own end might give back the pool once more"
        assert released.mock_calls == times * [call_of(1, (0, 7))]
        # Then a capture that is to succeed, for the random generator's sake; the error that is raised is the first one.
        assert cuda["graph"].call_args == call_of(graph, stream=stream, capture_error_mode="thread_local")
        number.zero_.assert_called_with()
    assert cuda["stream"].return_value.__exit__.call_count == 2 + 3 * (1 + 2)
    cuda["MemPool"].assert_called_once_with()
    cuda["Stream"].assert_called_once_with(torch.device("cuda", 1), priority=-1)
    cuda["memory_reserved"].side_effect, cuda["graph"].return_value.__exit__.side_effect = [100, 150], KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        engine.capture(call, pool=(0, 7))
    assert released.call_count == 3, "whatever it is that ends a capture"
    refused = RuntimeError("no stream"), RuntimeError("nor for the generator")
    cuda["graph"].return_value.__enter__.side_effect = refused  # before it has begun
    with pytest.raises(RuntimeError, match="no stream"):
        engine.capture(call, pool=(0, 7))
    assert released.call_count == 3
    cuda["graph"].return_value.__enter__.side_effect = None

    cuda["graph"].return_value.__exit__.side_effect = None
    cuda["get_allocator_backend"].return_value, cuda["use_mem_pool"].side_effect = "cudaMallocAsync", RuntimeError
    cuda["memory_reserved"].side_effect, before = [100, 100], products.call_count
    assert engine.capture(call).size == 12, "the results', where the device had room for them already"
    assert products.call_count == before + 1


CALLED = ["Stream", "CUDAGraph", "graph", "graph_pool_handle", "stream", "current_stream", "memory_reserved"]
CALLED += ["default_stream", "MemPool", "use_mem_pool", "get_allocator_backend", "synchronize", "empty_cache"]


def test_what_is_kept_for_good_has_a_reference_that_nobody_gives_back() -> None:
    value = object()
    before = sys.getrefcount(value)
    engines._keep_for_good(value)
    assert sys.getrefcount(value) == before + 1


def test_the_memory_that_a_process_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", {torch.device("cuda", 1): 0.25}.get)
    assert engines.Engine(torch.device("cuda", 1)).memory() == 250


@pytest.mark.parametrize("allocator", ["native", "cudaMallocAsync", "pluggable"])
@pytest.mark.parametrize(("capturing", "side_stream"), [(False, False), (True, False), (False, True)])
def test_an_engine_is_ready_on_the_default_stream(
    capturing: bool, side_stream: bool, allocator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with PyTorch's own allocator: others would give the memory of a graph to something else, or free it."""
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: int(side_stream))
    ready = allocator == "native" and not (capturing or side_stream)
    assert engines.Engine(torch.device("cuda", 1)).ready() is ready
