"""What several test files share sees a mistake: sequence_parity.py, stand_in.py, replays.py, refusals.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import replays
import sequence_parity
import torch
from helpers import assert_same_bits
from refusals import refuses
from replays import check_two_threads
from sequence_parity import Outcome, assert_equal_outcomes, assert_parity_of_single_steps, draw, make, outcome
from stand_in import StandIn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dnc_triton import DNC

# --- sequence_parity.py


def test_each_output_state_and_gradient_is_compared() -> None:
    dnc = make("reference", num_layers=2)
    inputs, state = draw(dnc)
    right = outcome(sequence_parity.oracle, dnc, inputs, state)
    assert_equal_outcomes(tree_map(torch.clone, right), right)
    assert right.gradients.keys() >= {"inputs", "state.memory.link", *dict(dnc.named_parameters())}
    leaves, structure = tree_flatten(right)
    assert len(leaves) == 1 + 11 + 1 + len(list(dnc.parameters())) + 11
    for index, leaf in enumerate(leaves):
        is_gradient = index >= 12
        for error in (1e-9 if is_gradient else 1e-11, torch.nan):
            changed = leaf + error * max(leaf.abs().max().item(), 0.01)
            wrong: Outcome = tree_unflatten([*leaves[:index], changed, *leaves[index + 1 :]], structure)
            with pytest.raises(AssertionError, match="elements off"):
                assert_equal_outcomes(wrong, right)


def test_the_operation_is_held_against_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not against itself, and with the same rows that end or begin anew."""
    dnc = make()
    inputs, state = draw(dnc)
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool).index_fill(0, torch.tensor(2), True)
    plain = sequence_parity.assert_parity(dnc, inputs, state)
    for options in ({"lengths": [5, 2, 0]}, {"reset": reset}):
        other = sequence_parity.assert_parity(dnc, inputs, state, **options)
        assert not torch.equal(other.outputs, plain.outputs)
        assert not torch.equal(other.gradients["inputs"], plain.gradients["inputs"])
    for name in ("operation", "oracle"):
        exact = getattr(sequence_parity, name)
        monkeypatch.setattr(sequence_parity, name, lambda *x, run=exact: (1.0000001 * run(*x)[0], run(*x)[1]))
        with pytest.raises(AssertionError, match="elements off"):
            sequence_parity.assert_parity(dnc, inputs, state)
        monkeypatch.setattr(sequence_parity, name, exact)


@pytest.mark.parametrize("mistake", ["outputs", "state", "given"])
def test_single_steps_are_held_against_the_oracle(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DNC.step

    def wrong(self: DNC, inputs: torch.Tensor, state: Any) -> Any:
        outputs, new = step(self, inputs, state)
        if self.backend == "reference" or outputs.isnan().any():
            return outputs, new
        if mistake == "given":
            state.memory.usage.mul_(0.5)
        usage = new.memory.usage * (1 + 1e-9 * (mistake == "state"))
        return outputs * (1 + 1e-9 * (mistake == "outputs")), new._replace(memory=new.memory._replace(usage=usage))

    assert_parity_of_single_steps("torch_sequence")
    monkeypatch.setattr(DNC, "step", wrong)
    with pytest.raises(AssertionError):
        assert_parity_of_single_steps("torch_sequence")


def test_the_least_gap_is_between_usages_on_the_way() -> None:
    dnc = make("reference")
    inputs, state = draw(dnc)
    with torch.no_grad():
        apart = sequence_parity.least_gap(dnc, inputs, state)
        assert 0 < apart < 0.1
        still = {name: torch.zeros_like(getattr(state.memory, name)) for name in ("read_weights", "write_weights")}
        usage = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.3 + 1e-7], dtype=torch.float64).expand(3, 5)
        memory = state.memory._replace(usage=usage, **still)
        assert sequence_parity.least_gap(dnc, inputs, state._replace(memory=memory)) == pytest.approx(1e-7)


def test_the_most_that_is_allocated_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(100_000, dtype=torch.float64)
        second = first + 1
        del first
        return second.sum() + torch.ones(50_000, dtype=torch.float64).sum()

    assert 1_600_000 <= sequence_parity.most_allocated(run) < 1_610_000


# --- stand_in.py, replays.py


def test_a_capture_computes_nothing_until_it_is_replayed() -> None:
    engine, given = StandIn(torch.device("cpu")), torch.ones(2)
    captured = engine.capture(lambda: [given * 3, torch.arange(2)])
    numbers, integers = captured.results
    assert numbers.isnan().all()
    assert not integers.any()
    given.fill_(2)
    captured.replay()
    assert (numbers.tolist(), integers.tolist()) == ([6, 6], [0, 1])
    assert (engine.captures, engine.replays, captured.size) == (1, 1, 8 + 16)


def test_trainings_to_compare_have_numbers_and_weights_of_their_own_each_round() -> None:
    dnc = replays.make(backend="reference")
    before = [x.detach().clone() for x in dnc.parameters()]
    rounds = replays.train(dnc, 3)
    for one, other in pairwise(rounds):
        leaves = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
        assert len(leaves) == 1 + 9 + 1 + len(before) + 9  # a gradient of the state as well
        assert not any(torch.equal(x, y) for x, y in leaves)
    assert all(torch.equal(x, y) for x, y in zip(dnc.parameters(), before, strict=True))
    assert_same_bits(replays.results(dnc, *replays.draw(dnc, 0)), rounds[0])
    with torch.no_grad():
        for parameter, gradient in zip(dnc.parameters(), rounds[0][2][1:], strict=False):
            parameter.sub_(gradient.sign(), alpha=0.01)
    assert_same_bits(replays.results(dnc, *replays.draw(dnc, 1)), rounds[1])
    assert not torch.equal(replays.draw(dnc, 0)[0], replays.draw(dnc, 1)[0])


@pytest.mark.parametrize("wrong", [0, 1])
def test_both_of_two_threads_are_compared(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    main = replays.threading.current_thread()

    def results(dnc: DNC, inputs: torch.Tensor, state: Any) -> torch.Tensor:
        thread = replays.threading.current_thread()
        if thread is not main and thread.name not in threads:
            threads.append(thread.name)
        return torch.tensor(float(thread is not main and threads.index(thread.name) == wrong))

    monkeypatch.setattr(replays, "results", results)
    with pytest.raises(AssertionError):
        check_two_threads(replays.make(), lambda function, *given: function(*given))


# --- refusals.py


@pytest.mark.parametrize(
    "message",
    [
        "sizes: expected 3, got 4",
        "size expected 3, got 4",
        "the size: expected 3, got 4",
        "size: expected 2, got 4",
        "size: expected 3, got 5",
        "size: expected 3",
    ],
)
def test_a_refusal_names_the_argument_what_was_expected_and_what_came(message: str) -> None:
    with refuses(ValueError, "size", "3", "4"):
        raise ValueError("size: expected 3 or less, got 4")
    with pytest.raises(AssertionError, match="did not match"), refuses(ValueError, "size", "3", "4"):
        raise ValueError(message)
    with pytest.raises(TypeError), refuses(ValueError, "size", "3", "4"):
        raise TypeError("size: expected 3, got 4")
