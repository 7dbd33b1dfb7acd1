"""Random calls of the layer: some of them here, more with `python -m tests.fuzz_layer`; and that a mistake is seen."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import fuzz_layer
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dnc_triton import DNC

# Calls whose loss sees all, forward and back: one of a state that is compared by slot, one by sums over slots.
BY_SLOT, BY_SUMS = (
    next(
        call
        for call in (fuzz_layer.draw(seed, "torch_sequence") for seed in range(10**4))
        if call.sees == "all" and call.backward == "once" and call.steps > 2 and call.alike == alike and call.by["all"]
    )
    for alike in (False, True)
)


@pytest.mark.parametrize("backend", ["reference", "torch_sequence", "auto"])
def test_random_calls(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_layer.run(40, backend, seed=1)
    assert f"40 calls, {backend}, seed 1: all right, in " in capsys.readouterr().out


@pytest.mark.parametrize("backend", fuzz_layer.BACKENDS)
def test_what_is_drawn(backend: str) -> None:
    calls = [fuzz_layer.draw(seed, backend) for seed in range(600)]
    assert fuzz_layer.draw(7, backend) == calls[7]
    for name, count in [("way", 5), ("begins", 3), ("backward", 3), ("sees", 4), ("batch", 3)]:
        seen = Counter(getattr(call, name) for call in calls)
        assert len(seen) == count
        assert min(seen.values()) > 20, name
    parts = {"", "controller", "hook", "parametrization"}
    assert {call.part for call in calls} == (parts if backend not in ("torch_sequence", "triton_sequence") else {""})
    assert {call.choices["controller"] for call in calls} >= {"lstm"}
    if backend != "triton_sequence":
        built_in = {call.choices["controller"] for call in calls if call.part != "controller"}
        assert built_in == {"lstm", "gru", "rnn", "feedforward"}
        assert {call.choices["num_layers"] for call in calls} == {1, 2, 3}
    for name in ("clip", "max_activation_gradient", "checkpoint", "strength", "stop_usage_gradient", "batch_first"):
        assert len({call.choices[name] for call in calls}) > 1, name
    for of_call in (lambda x: x.lengths is not None, lambda x: x.resets, lambda x: x.by["inputs"], lambda x: x.alike):
        assert 60 < sum(map(of_call, calls)) < 540
    assert any(call.lengths and 0 in call.lengths for call in calls)
    assert any(call.steps == 0 for call in calls)


def test_some_parameters_want_no_gradient_and_views_have_gaps() -> None:
    wants = [p.requires_grad for seed in range(20) for p in fuzz_layer.make(fuzz_layer.draw(seed, "auto")).parameters()]
    assert 0.05 < wants.count(False) / len(wants) < 0.3
    x, seen = torch.randn(3, 4, 2), Counter[Any]()
    for seed in range(40):
        view = fuzz_layer.as_a_view(x, fuzz_layer.random.Random(seed))
        assert torch.equal(view, x)
        seen[view.stride(), view.storage_offset()] += 1
    assert len(seen) == 4


@pytest.mark.parametrize("call", [BY_SLOT, BY_SUMS], ids=["by slot", "by sums"])
def test_every_result_is_compared(call: fuzz_layer.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(call.seed)
    dnc = fuzz_layer.make(call)
    of_oracle = fuzz_layer.outcome(call, dnc, oracle=True)
    tensors = tree_leaves(of_oracle)
    assert len(tensors) > 15
    outcome = fuzz_layer.outcome
    for index, tensor in enumerate(tensors):
        if tensor is None or tensor.numel() == 0:
            continue

        def mistaken(*args: Any, oracle: bool, index: int = index) -> Any:
            tensors, structure = tree_flatten(outcome(*args, oracle=oracle))
            if not oracle:
                last = torch.zeros_like(tensors[index]).flatten()
                last[-1] = 1e-3
                tensors[index] = tensors[index] + last.view_as(tensors[index])
            return tree_unflatten(tensors, structure)

        monkeypatch.setattr(fuzz_layer, "outcome", mistaken)
        with pytest.raises(AssertionError, match="off by"):
            fuzz_layer.check(call)
        monkeypatch.undo()
    fuzz_layer.check(call)


def test_a_gradient_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = fuzz_layer.outcome

    def lost(*args: Any, oracle: bool) -> Any:
        forward, gradients = outcome(*args, oracle=oracle)
        return forward, gradients if oracle else dict.fromkeys(gradients)

    monkeypatch.setattr(fuzz_layer, "outcome", lost)
    with pytest.raises(AssertionError, match=r"^d_[a-z.0-9_]+: None, not tensor"):
        fuzz_layer.check(BY_SLOT)


def test_a_mistake_ends_it_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = DNC.step
    monkeypatch.setattr(DNC, "step", lambda self, inputs, state: step(self, inputs.flip(0), state))
    assert fuzz_layer.main(["--backend", "auto", "--count", "100"]) == 1
    told = capsys.readouterr().out
    assert re.match(r"after \d+ calls that are right:\nAssertionError: .*off by", told), told
    command = re.search(r"^again: python -m tests.fuzz_layer (.*)$", told, re.MULTILINE)
    assert command, told
    assert fuzz_layer.main(command[1].split()) == 1
    assert capsys.readouterr().out.splitlines()[1:-1] == told.splitlines()[1:-1]
    monkeypatch.undo()
    assert fuzz_layer.main(command[1].split()) == 0


def test_no_calls_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz_layer.main(["--count", "0"])
    assert "--count: expected at least 1, got 0" in capsys.readouterr().err


def test_an_error_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(DNC, "forward", fails)
    with pytest.raises(AssertionError, match=r"after \d calls that are right:\nRuntimeError: no such thing"):
        fuzz_layer.run(20, "reference")
