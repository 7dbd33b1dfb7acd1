"""A step by itself in plain PyTorch, without gradients, against the oracle; and the buffers that such steps share."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers import assert_same_bits
from sequence_parity import CHOICES, NAMES, assert_parity_of_single_steps, draw, make
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from dnc_triton.sequence import step
from dnc_triton.sequence.loop import Sequence


@pytest.fixture(autouse=True)
def _no_buffers_yet():
    step._prepared.cache_clear()


@pytest.mark.parametrize("choice", [*CHOICES, dict(stop_usage_gradient=True)], ids=[*NAMES, "usage"])
def test_parity(choice, monkeypatch):
    monkeypatch.setattr(Sequence, "forward", None)  # it prepares no sequence
    assert_parity_of_single_steps("torch_sequence", **choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_as_in_a_sequence(dtype):
    dnc = make(num_layers=2, dtype=dtype)
    inputs, state = draw(dnc)
    for given in inputs:
        expected = dnc(given.unsqueeze(0), state)  # with gradients
        with torch.no_grad():
            outputs, state = dnc.step(given, state)
        assert_same_bits((outputs, state), tree_map(torch.detach, (expected[0][0], expected[1])))


def test_within_autocast():
    dnc = make(dtype=torch.float32)
    inputs, state = draw(dnc)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, last = dnc(inputs[:1], state)
        with torch.no_grad():
            assert_same_bits(dnc.step(inputs[0], state), tree_map(torch.detach, (outputs[0], last)))


def test_dropout_acts_as_in_a_sequence():
    """In a step without gradients, as one takes to sample predictions."""
    dnc = make(num_layers=2, dropout=0.5)
    inputs, state = draw(dnc, steps=1)
    torch.manual_seed(2)
    expected = dnc(inputs, state)  # with gradients
    torch.manual_seed(2)
    with torch.no_grad():
        assert_same_bits(dnc(inputs, state), tree_map(torch.detach, expected))


def test_an_empty_batch():
    dnc = make()
    inputs, state = draw(dnc, batch=0)
    with torch.no_grad():
        outputs, last = dnc.step(inputs[0], state)
    assert outputs.shape == (0, dnc.output_size)
    assert last.memory.link.shape == (0, 1, 5, 5)


def test_nothing_of_one_step_is_in_the_next_or_in_what_was_returned():
    dnc = make()
    inputs, state = draw(dnc)
    with torch.no_grad():
        first = dnc.step(inputs[0], state)
        copies = tree_map(torch.clone, first)
        nothing = tree_map(lambda x: torch.full_like(x, torch.nan), state)
        assert dnc.step(inputs[1], nothing)[0].isnan().all()
        assert_same_bits(first, copies)
        assert_same_bits(dnc.step(inputs[0], state), copies)
    assert step._prepared.cache_info().hits == 2


def test_threads_have_buffers_of_their_own():
    dnc = make(memory_size=64, word_size=20)
    drawn = [draw(dnc, seed=seed) for seed in range(4)]
    start = Barrier(4)

    def run(given):
        inputs, state = given
        start.wait()
        with torch.no_grad():
            for _ in range(20):
                for x in inputs:
                    _, state = dnc.step(x, state)
        return state

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, drawn))
    start = Barrier(1)
    assert_same_bits(together, [run(given) for given in drawn])


@pytest.mark.parametrize("modes", [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)])
def test_in_whichever_mode_and_on_whichever_default_device_the_first_was(modes):
    dnc = make()
    inputs, state = draw(dnc)
    results = []
    for mode in modes:
        with mode(), torch.device("meta"):
            results.append(dnc.step(inputs[0], state))
    assert results[modes.index(torch.no_grad)][0].is_inference() is False
    assert_same_bits(*(tree_map(torch.clone, result) for result in results))


def test_neither_a_network_nor_a_state_is_held():
    dnc = make()
    inputs, state = draw(dnc)
    with torch.no_grad():
        outputs, last = dnc.step(inputs[0], state)
    given = [inputs, *state.memory, *dnc.parameters(), outputs, *last.memory]
    storages = [StorageWeakRef(x.untyped_storage()) for x in given]
    assert step._prepared.cache_info().currsize == 1
    del dnc, inputs, state, outputs, last, given
    gc.collect()
    assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(memory_size=16, word_size=16, num_reads=4, hidden_size=64),
        dict(memory_size=2, word_size=64, num_reads=4, hidden_size=16),
        dict(memory_size=64, word_size=1, num_reads=16),
        dict(memory_size=4, hidden_size=512, num_layers=3, clip=1.0),
        dict(memory_size=4, hidden_size=512, controller="gru"),
    ],
    ids=str,
)
def test_what_buffers_take_is_known_before_they_are_there(sizes, monkeypatch):
    """To a factor of two: what is above the limit does not wait."""
    dnc = make(**sizes)
    inputs, state = draw(dnc, batch=4)

    def take_a_step():
        with torch.no_grad():
            dnc.step(inputs[0], state)
        return step._prepared.cache_info().currsize

    made = []
    prepare = step._prepare
    monkeypatch.setattr(step, "_prepare", lambda *given: made.append(prepare(*given)) or made[-1])
    assert take_a_step() == 1
    (prepared, _), *_ = made
    parts = [prepared.history, prepared.vectors, vars(prepared.memory)]
    storages = {x.untyped_storage() for x in tree_leaves(parts) if isinstance(x, torch.Tensor)}
    taken = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    for limit, waiting in ((2 * taken, 1), (taken / 2, 0)):
        step._prepared.cache_clear()
        monkeypatch.setattr(step, "LARGEST", limit)
        assert take_a_step() == waiting
