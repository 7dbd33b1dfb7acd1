"""When the sequence operation goes by plain launches and not by a graph; with a stand-in for the device."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from replays import BATCH, INPUTS, STEPS, _empty, _without, cache, draw, engine, make, results  # noqa: F401
from stand_in import StandIn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnc_triton import environment
from dnc_triton.sequence import graphs, op
from dnc_triton.sequence.settings import SequenceSettings
from dnc_triton.sequence.unroll import parameters_of


@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn", "feedforward"])
@pytest.mark.parametrize("keep", [True, False])
def test_nothing_waits_for_the_device(controller: str, keep: bool) -> None:
    """From tensors that hold no numbers none can be read, and nothing comes from a CPU."""

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
    settings = SequenceSettings(controller, 2, 0.3, 1.0, 1.0, False, torch.float64, 2, False, None)
    with torch.no_grad(), Watch():
        given = op.Given(inputs, tensors, parameters_of(dnc), *masks, dropout)
        outputs, *others = op._forward(settings, given, keep)
        if keep:
            last, history = others[: len(tensors)], others[len(tensors) :]
            wanted = [True] * (1 + len(tensors) + len(given.parameters))
            op._backward_through_time(settings, [outputs, *last], given, (last[0], last[2]), history, wanted)


def test_an_allocator_is_not_asked_what_the_process_may_take_where_there_are_no_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One other than PyTorch's own does not tell; an empty bound is no bound."""
    monkeypatch.setenv(environment.GRAPH_MEMORY, "")
    monkeypatch.setattr(StandIn, "memory", None)
    monkeypatch.setattr(StandIn, "ready", lambda self: False)
    dnc = make()
    results(dnc, *draw(dnc, 0))
    assert not cache().signatures


def test_not_ready(without: Any) -> None:
    """While a stream is captured, say: neither forward nor backward goes by a graph."""
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


def test_where_launches_are_asked_for() -> None:
    dnc, device = make(), torch.device("cpu")
    assert graphs.replays(device) == 0
    expected, *_ = [results(dnc, *draw(dnc, 0)) for _ in range(3)]
    replays = graphs.replays(device)
    assert replays == engine().replays == 4  # forward and backward of the second and the third
    with graphs.launching():
        with graphs.launching():
            pass
        assert_same_bits(results(dnc, *draw(dnc, 0)), expected)
    assert graphs.replays(device) == engine().replays == replays
    results(dnc, *draw(dnc, 0))
    assert graphs.replays(device) == replays + 2


@pytest.mark.parametrize("name", ["deterministic", "bf16", "fp16"])
def test_other_numerics_in_the_backward(name: str) -> None:
    """For products whose sums are reduced in half precision, also whether they may be split."""
    products, option = torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction"

    def change(to: Any) -> None:
        if name == "deterministic":
            torch.use_deterministic_algorithms(to)
        else:
            setattr(products, option, to)

    dnc = make()
    try:
        change(False)
        for seed in range(2):
            results(dnc, *draw(dnc, seed))
        outputs, _ = dnc(*draw(dnc, 2))
        replays = engine().replays
        change(True if name == "deterministic" else (False, False))
        outputs.sum().backward()
    finally:
        change(name != "deterministic")
    assert engine().replays == replays


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
        assert not cache().instances  # at once, its forward too
    assert_same_bits([results(dnc, *draw(dnc, seed)) for seed in range(6)], expected)
    assert not cache().instances
    assert engine().captures == (when == "backward")
    assert len(caplog.records) == {"forward": 2, "backward": 1}[when]  # tried again, at the next but three
    for record in caplog.records:
        assert record.name == "dnc_triton"
        assert record.levelno == logging.WARNING
        assert "a capture failed" in record.getMessage()
        assert "RuntimeError: operation not permitted when stream is capturing" in record.getMessage()
    engine().failure = None
    for seed in range(3):  # other calls go on
        results(dnc, *draw(dnc, seed, steps=2))
    assert engine().replays > 0


def test_what_is_logged_of_a_failure_holds_no_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler may keep records, as that of these tests does, and with an error it keeps all that the frames hold."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    dnc = make()
    results(dnc, *draw(dnc, 0))
    outputs, _ = dnc(*draw(dnc, 1))
    (instance,) = cache().instances
    monkeypatch.setattr(StandIn, "capture", fail)
    outputs.sum().backward()
    assert len(caplog.records) == 1
    assert instance.is_free


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    ],
    ids=["memory", "another thread"],
)
def test_a_capture_that_fails_is_tried_again(
    failure: Exception, when: str, without: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With more patience; and what works meanwhile goes on."""
    dnc = make()
    expected = [without(results, dnc, *draw(dnc, seed)) for seed in range(8)]
    for seed in range(2):
        results(dnc, *draw(dnc, seed))
    (working,) = cache().instances
    held = [dnc(*draw(dnc, seed)) for seed in range(4)]  # the first has that instance, the others find none
    if when == "forward":
        engine().failure = failure
        held.append(dnc(*draw(dnc, 4)))
    else:
        outputs, _ = dnc(*draw(dnc, 4))
        assert len(cache().instances) == 2
        engine().failure = failure
        outputs.sum().backward()
    assert cache().instances == [working]
    engine().failure = None
    captures, (signature,) = engine().captures, cache().signatures.values()
    patience = {"forward": 8, "backward": 16}[when]
    assert (signature.misses, signature.patience) == (0, patience)
    held += [dnc(*draw(dnc, 5)) for _ in range(patience - 1)]
    assert engine().captures == captures
    held.append(dnc(*draw(dnc, 6)))
    assert engine().captures == captures + 1
    held.clear()
    assert working.is_free
    replays = engine().replays
    assert_same_bits([results(dnc, *draw(dnc, seed)) for seed in range(8)], expected)
    assert engine().replays == replays + 16
    (record,) = caplog.records
    assert f"tried again at call {patience} of its kind" in record.getMessage()
    assert f"{type(failure).__name__}: {failure}" in record.getMessage()
