"""The sequence operation by replayed graphs, with a stand-in for the device: the same bits as without, at any time.

What a CUDA device has to say to this is in tests/gpu, the kernels of a step in tests/kernels/test_kernel_graphs.py.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock, create_autospec
from unittest.mock import call as call_of

import pytest
import torch
import torch.utils.checkpoint
from helpers import assert_same_bits
from stand_in import StandIn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dnc_triton import DNC, DNCState
from dnc_triton.sequence import graphs, op
from dnc_triton.sequence.history import Settings

BATCH, STEPS, INPUTS = 3, 5, 3


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.ENGINES, "cpu", StandIn)
    monkeypatch.setattr(graphs, "_graphs", {})
    monkeypatch.delenv(graphs.GRAPHS_VARIABLE, raising=False)
    monkeypatch.delenv(graphs.MEMORY_VARIABLE, raising=False)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function by plain launches."""

    def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv(graphs.GRAPHS_VARIABLE, "0")
            return function(*arguments, **options)

    return call


def cache(device: str = "cpu") -> graphs.Graphs:
    return graphs._graphs[torch.device(device)]


def engine() -> StandIn:
    return cache().engine  # type: ignore[return-value]


def make(**options: Any) -> DNC:
    torch.manual_seed(0)
    sizes = dict(memory_size=5, word_size=4, num_reads=2)
    return DNC(INPUTS, 6, 2, **{**sizes, "dtype": torch.float64, "backend": "torch_sequence", **options})


def draw(dnc: DNC, seed: int, steps: int = STEPS) -> tuple[Tensor, DNCState]:
    """Inputs and a state; every number another for another seed."""
    torch.manual_seed(seed)
    weight = dnc.output.weight
    state = dnc.initial_state(BATCH).map(lambda x: torch.rand_like(x) / 4)
    inputs = torch.randn(BATCH, steps, INPUTS, dtype=weight.dtype, device=weight.device)
    return inputs if dnc.batch_first else inputs.transpose(0, 1).contiguous(), state


def results(dnc: DNC, inputs: Tensor, state: DNCState | None, **options: Any) -> Any:
    """Outputs, last state, and all gradients."""
    inputs = inputs.detach().requires_grad_()
    state = None if state is None else tree_map(lambda x: x.detach().requires_grad_(), state)
    outputs, last = dnc(inputs, state, **options)
    leaves = [inputs, *dnc.parameters(), *([] if state is None else tree_leaves(state))]
    loss = sum((i + 1) * x.square().sum() for i, x in enumerate(tree_leaves((outputs, last))))
    return outputs.detach(), last.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)


def train(
    dnc: DNC,
    rounds: int,
    options: Callable[[], dict[str, Any]] = dict,
    *,
    steps: int = STEPS,
    context: Callable[[], Any] = nullcontext,
) -> list[Any]:
    """Rounds with other numbers and other weights each."""
    dnc, seen = copy.deepcopy(dnc), []
    for seed in range(rounds):
        inputs, state = draw(dnc, seed, steps)
        with context():
            seen.append(results(dnc, inputs, state, **options()))
        with torch.no_grad():
            for parameter, gradient in zip(dnc.parameters(), seen[-1][2][1:], strict=False):
                parameter.sub_(gradient.sign(), alpha=0.01)
    return tree_map(torch.clone, seen)


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
    """Sizes, masks, and what products are told."""
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


# --- the lease


@pytest.fixture
def leased() -> Iterator[tuple[DNC, Tensor, DNCState]]:
    """A layer that has an instance, with the results of a call that holds it."""
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (instance,) = cache().instances
    assert instance.is_free
    outputs, state = dnc(*draw(dnc, 2))
    assert not instance.is_free
    yield dnc, outputs, state
    del outputs, state
    gc.collect()


def test_a_backward_ends_it(leased: Any) -> None:
    _, outputs, _ = leased
    outputs.sum().backward()
    assert cache().instances[0].is_free


def test_a_backward_that_keeps_the_graph_does_not(leased: Any, without: Any) -> None:
    dnc, outputs, state = leased
    loss, parameters = outputs.square().sum(), list(dnc.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert not cache().instances[0].is_free
    results(dnc, *draw(dnc, 3))  # meanwhile
    again = torch.autograd.grad(loss + state.read_words.sum(), parameters, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, parameters), first)
    assert cache().instances[0].is_free
    outputs, state = without(dnc, *draw(dnc, 2))
    assert_same_bits(torch.autograd.grad(outputs.square().sum(), parameters, retain_graph=True), first)
    assert_same_bits(torch.autograd.grad(outputs.square().sum() + state.read_words.sum(), parameters), again)


@pytest.mark.parametrize("last", ["outputs", "state"])
def test_forgotten_results_end_it(last: str) -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    outputs, state = dnc(*draw(dnc, 2))
    (instance,) = cache().instances
    held = {"outputs": outputs, "state": state}[last]
    del outputs, state
    assert not instance.is_free
    del held
    assert instance.is_free


def test_used_twice_in_one_graph(without: Any) -> None:
    """And several forwards before their backwards: the second finds no instance at first."""
    dnc = make()

    def run(rounds: int) -> list[Any]:
        seen = []
        for seed in range(rounds):
            inputs, state = draw(dnc, seed)
            outputs, state = dnc(inputs, state)
            more, state = dnc(inputs.flip(1), state)
            seen.append(torch.autograd.grad(outputs.sum() + more.square().sum(), list(dnc.parameters())))
        first, second = (dnc(*draw(dnc, seed))[0].square().sum() for seed in (5, 6))
        return [*seen, *(torch.autograd.grad(loss, list(dnc.parameters())) for loss in (first, second))]

    assert_same_bits(run(8), without(run, 8))
    assert len(cache().instances) == 2
    assert all(instance.is_free and instance.backward is not None for instance in cache().instances)


def test_those_who_hold_many_results_cost_few_captures() -> None:
    dnc = make()
    held = [dnc(*draw(dnc, seed)) for seed in range(40)]
    assert engine().captures == len(cache().instances) == 4  # after 2, 4, 8 and 16 calls
    del held


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool, without: Any) -> None:
    dnc = make()

    def run() -> list[Any]:
        seen = []
        for seed in range(5):
            inputs, state = draw(dnc, seed)
            inputs.requires_grad_()
            outputs, _ = torch.utils.checkpoint.checkpoint(dnc, inputs, state, use_reentrant=use_reentrant)
            seen.append(torch.autograd.grad(outputs.square().sum(), inputs) if not use_reentrant else None)
            if use_reentrant:
                outputs.square().sum().backward()
                seen[-1] = (inputs.grad,)
        return seen

    assert_same_bits(run(), without(run))
    assert engine().replays > 0
    assert all(instance.is_free for instance in cache().instances)


def test_a_history_that_was_moved_goes_by_plain_launches(without: Any) -> None:
    """As when what is saved is sent to another device and back."""
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    replays = engine().replays
    with saved_tensors_hooks(torch.clone, lambda x: x):
        actual = results(dnc, *draw(dnc, 2))
        assert cache().instances[0].is_free
    assert engine().replays == replays + 1
    assert_same_bits(actual, without(results, dnc, *draw(dnc, 2)))


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


# --- plain launches


@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "feedforward"])
@pytest.mark.parametrize("keep", [True, False])
def test_nothing_waits_for_the_device(controller: str, keep: bool) -> None:
    """On tensors that hold no numbers none can be read, and nothing comes from a CPU."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            outputs = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, outputs)) if isinstance(x, Tensor)]
            assert {x.device.type for x in tensors} <= {"meta"}, func
            return outputs

    dnc = make(controller=controller, num_layers=2, clip=0.3, max_activation_gradient=1.0).to("meta")
    inputs = torch.empty(STEPS, BATCH, INPUTS, dtype=torch.float64, device="meta")
    state = dnc.initial_state(BATCH)
    tensors = [*state.memory, state.read_words, *tree_leaves(state.controller)]
    masks = [torch.empty(STEPS, BATCH, dtype=torch.bool, device="meta") for _ in range(2)]
    dropout = [torch.empty(STEPS, BATCH, 6, dtype=torch.float64, device="meta")]
    settings = Settings(controller, 2, 0.3, 1.0, 1.0, False, torch.float64, 2, False, None)
    with torch.no_grad(), Watch():
        given = op.Given(inputs, tensors, op._parameters(dnc), dropout, *masks)
        outputs, *others = op._forward(settings, given, keep)
        if keep:
            last, history = others[: len(tensors)], others[len(tensors) :]
            op._backward_through_time(settings, [outputs, *last], given, (last[0], last[2]), history)


def test_not_ready(without: Any) -> None:
    """While a stream is captured, say: neither forward nor backward is by a graph."""
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    replays = engine().replays
    engine().is_ready = False
    assert_same_bits(results(dnc, *draw(dnc, 2)), without(results, dnc, *draw(dnc, 2)))
    assert engine().replays == replays
    engine().is_ready = True
    outputs, _ = dnc(*draw(dnc, 3))
    engine().is_ready = False
    actual = torch.autograd.grad(outputs.sum(), list(dnc.parameters()))
    assert engine().replays == replays + 1
    assert_same_bits(actual, without(lambda: torch.autograd.grad(dnc(*draw(dnc, 3))[0].sum(), list(dnc.parameters()))))


def test_other_numerics_in_the_backward() -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    outputs, _ = dnc(*draw(dnc, 2))
    replays = engine().replays
    torch.use_deterministic_algorithms(True)
    try:
        outputs.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert engine().replays == replays


def test_an_empty_batch() -> None:
    dnc = make()
    for _ in range(3):
        outputs, _ = dnc(torch.zeros(0, STEPS, INPUTS, dtype=torch.float64))
        outputs.sum().backward()
    assert not graphs._graphs


def test_a_long_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LONGEST", 3)
    dnc = make()
    for steps in (3, 4):
        for seed in range(3):
            results(dnc, *draw(dnc, seed, steps))
    assert len(cache().signatures) == 1


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_capture_that_fails(when: str, without: Any, caplog: pytest.LogCaptureFixture) -> None:
    dnc = make()
    results(dnc, *draw(dnc, 0))
    failure = RuntimeError("operation not permitted when stream is capturing")
    expected = [without(results, dnc, *draw(dnc, seed)) for seed in range(6)]
    if when == "forward":
        engine().failure = failure
    else:
        outputs, _ = dnc(*draw(dnc, 1))
        engine().failure = failure
        outputs.sum().backward()
    assert_same_bits([results(dnc, *draw(dnc, seed)) for seed in range(6)], expected)
    assert not cache().instances
    engine().failure = None
    assert_same_bits([results(dnc, *draw(dnc, seed)) for seed in range(6)], expected)  # it is not tried again
    (record,) = caplog.records
    assert record.name == "dnc_triton"
    assert record.levelno == logging.WARNING
    assert "a capture failed" in record.getMessage()
    assert "RuntimeError: operation not permitted when stream is capturing" in record.getMessage()
    assert engine().captures == (when == "backward")
    for seed in range(3):  # other calls go on
        results(dnc, *draw(dnc, seed, steps=2))
    assert engine().replays > 0


# --- the device


def test_an_engine_asks_torch_as_it_wants_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """That much can be said without a device: the calls are right, and in order."""
    cuda = {name: create_autospec(getattr(torch.cuda, name)) for name in CALLED}
    for name, mock in cuda.items():
        monkeypatch.setattr(torch.cuda, name, mock)
    cuda["memory_reserved"].side_effect = [100, 150]
    result, begun = torch.zeros(3), []

    def call() -> list[Tensor]:
        begun.append(cuda["graph"].return_value.__enter__.called)
        return [result]

    engine = graphs.Engine(torch.device("cuda", 1))
    captured = engine.capture(call, pool=(0, 7))
    assert begun == [False, True]
    stream, graph = cuda["Stream"].return_value, cuda["CUDAGraph"].return_value
    cuda["graph"].assert_called_once_with(graph, (0, 7), stream, capture_error_mode="thread_local")
    assert captured.results == [result]
    assert captured.size == 50
    captured.replay()
    graph.replay.assert_called_once_with()

    # Whether PyTorch has ended its part of a capture that failed, or not.
    number = Mock()
    monkeypatch.setattr(torch, "zeros", lambda *size, device: number)
    ended, released = Mock(), Mock()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", released)
    cuda["graph"].return_value.__exit__.side_effect = RuntimeError("capture invalidated")
    for ends in (RuntimeError("not recording"), None):
        cuda["memory_reserved"].side_effect, ended.side_effect = [100, 150], ends
        with pytest.raises(RuntimeError, match="invalidated"):
            engine.capture(call, pool=(0, 7))
        ended.assert_called_with(1, (0, 7))
        assert len(engine.broken) == released.call_count == (ends is None)
        # Then one that succeeds, for the random generator's sake; if it does, the first error is the one that is told.
        assert cuda["graph"].call_args == call_of(graph, stream=stream, capture_error_mode="thread_local")
        number.zero_.assert_called_with()
    assert cuda["stream"].return_value.__exit__.call_count == 1 + 2 * 2


CALLED = ["Stream", "CUDAGraph", "graph", "graph_pool_handle", "stream", "current_stream", "memory_reserved"]


@pytest.mark.parametrize(("capturing", "side_stream"), [(False, False), (True, False), (False, True)])
def test_an_engine_is_ready_on_the_default_stream(
    capturing: bool, side_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: int(side_stream))
    assert graphs.Engine(torch.device("cuda", 1)).ready() is not (capturing or side_stream)


# --- the bound


def test_the_least_recently_used_is_given_up(monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    dnc = make()
    for steps in (2, 3):
        for seed in range(2):
            results(dnc, *draw(dnc, seed, steps))
    short, long = cache().instances
    results(dnc, *draw(dnc, 2, 2))
    assert cache().instances == [long, short]
    monkeypatch.setattr(StandIn, "memory", lambda self: graphs.SHARE * (short.size + 2 * long.size))
    for seed in range(2):
        assert_same_bits(results(dnc, *draw(dnc, seed, 4)), without(results, dnc, *draw(dnc, seed, 4)))
    assert cache().instances[0] is short
    assert len(cache().instances) == 2
    assert sum(instance.size for instance in cache().instances) <= cache().bound()
    captures = engine().captures
    for seed in range(3):  # what was given up waits for more calls than before
        results(dnc, *draw(dnc, seed, 3))
    assert engine().captures == captures


def test_bytes_are_those_of_the_tensors() -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (instance,) = cache().instances
    tensors = [*instance.given, *instance.forward.results, *instance.gradients, *instance.backward.results]
    assert instance.size == sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("bound", ["0", "1"])
def test_more_than_the_bound(
    bound: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without: Any
) -> None:
    """Known before a capture, or only after it: one line, and the rest runs."""
    monkeypatch.setenv(graphs.MEMORY_VARIABLE, bound)
    dnc = make()
    results(dnc, *draw(dnc, 0))
    engine().extra = 2**21
    for seed in range(1, 12):
        assert_same_bits(results(dnc, *draw(dnc, seed)), without(results, dnc, *draw(dnc, seed)))
    assert not cache().instances
    assert engine().captures == int(bound)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    size = "2.0" if bound == "1" else "0.0"
    assert f"{size} MiB beside 0.0 MiB in use would exceed the bound of {bound}.0 MiB" in record.getMessage()
    assert graphs.MEMORY_VARIABLE in record.getMessage()


def test_a_backward_beyond_the_bound(monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    dnc = make()
    monkeypatch.setenv(graphs.MEMORY_VARIABLE, "1")
    results(dnc, *draw(dnc, 0))
    outputs, _ = dnc(*draw(dnc, 1))
    (instance,) = cache().instances
    engine().extra = 2**20
    actual = torch.autograd.grad(outputs.sum(), list(dnc.parameters()))
    assert not cache().instances
    assert instance.size > cache().bound()
    assert_same_bits(actual, without(lambda: torch.autograd.grad(dnc(*draw(dnc, 1))[0].sum(), list(dnc.parameters()))))


def test_what_is_leased_is_not_given_up(leased: Any, monkeypatch: pytest.MonkeyPatch, without: Any) -> None:
    dnc, outputs, _ = leased
    (instance,) = cache().instances
    monkeypatch.setattr(StandIn, "memory", lambda self: graphs.SHARE * instance.size)
    for seed in range(4):
        results(dnc, *draw(dnc, seed, 2))
    assert cache().instances == [instance]
    monkeypatch.setattr(StandIn, "memory", lambda self: graphs.SHARE * 2 * instance.size)
    for steps in (2, 3):  # one comes, and goes for the other; both are younger
        for seed in range(7):
            results(dnc, *draw(dnc, seed, steps))
    assert cache().instances[0] is instance
    assert len(cache().instances) == 2
    actual = torch.autograd.grad(outputs.square().sum(), list(dnc.parameters()))
    again = without(lambda: torch.autograd.grad(dnc(*draw(dnc, 2))[0].square().sum(), list(dnc.parameters())))
    assert_same_bits(actual, again)
    results(dnc, *draw(dnc, 4, 2))
    assert cache().instances != [instance]


@pytest.mark.parametrize("value", ["much", "-1", "1.5"])
def test_a_bound_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(graphs.MEMORY_VARIABLE, value)
    dnc = make()
    with pytest.raises(ValueError, match=f"^DNC_TRITON_GRAPH_MEMORY: expected a whole number of MiB, got '{value}'"):
        dnc(*draw(dnc, 0))


def test_few_signatures_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SIGNATURES", 2)
    dnc = make()
    for steps in (1, 2, 3, 4):
        results(dnc, *draw(dnc, 0, steps))
    assert len(cache().signatures) == 2


def test_forgetting() -> None:
    dnc = make()
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (known,) = cache().instances
    with graphs.forgetting():
        for seed in range(2):
            results(dnc, *draw(dnc, seed, 2))
        assert len(cache().instances) == 2
    assert cache().instances == [known]


def test_two_threads(without: Any) -> None:
    dnc = make()
    drawn = [draw(dnc, seed) for seed in range(30)]
    expected = [without(results, dnc, *given) for given in drawn]
    actual: list[Any] = [None, None]

    def run(index: int) -> None:
        actual[index] = [results(dnc, *given) for given in drawn]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(actual, [expected, expected])
    assert engine().replays > 0
