"""What the sequences of the kernels allocate: nothing in a step. Nothing is launched: numbers do not matter here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sequence_parity import draw, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnc_triton.kernels import launcher
from dnc_triton.kernels.layout import default_layout, layouts
from dnc_triton.kernels.step_launch import backward_scratch, forward_scratch
from dnc_triton.sequence import op, small_product

CHOICES = {
    "lstm": {},
    "checkpoint": dict(checkpoint=2),
    "layers, clip": dict(num_layers=2, clip=0.1, max_activation_gradient=0.5),
    "dropout": dict(num_layers=2, dropout=0.5),
    "gru": dict(controller="gru", clip=0.1),
    "rnn": dict(controller="rnn"),
    "feedforward": dict(controller="feedforward"),
}


class Allocations(TorchDispatchMode):
    """Counts, by operator, the calls that return a tensor with a storage that they were not given."""

    def __init__(self, made: Counter[str]) -> None:
        super().__init__()
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given, returned = (
            {tensor.untyped_storage()._cdata for tensor in tree_leaves(nest) if isinstance(tensor, Tensor)}
            for nest in ((args, kwargs), results)
        )
        self.made[str(func)] += len(returned - given)
        return results


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What a sequence has allocated, forward and backward. Launches run nothing."""
    made: Counter[str] = Counter()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with Allocations(made):
                return function(*arguments)

        return run

    for name in ("_forward", "_backward_through_time"):
        monkeypatch.setattr(op, name, counting(getattr(op, name)))

    class Nothing:
        def add(self, *launch: Any) -> None:
            made["launches"] += 1

    monkeypatch.setattr(launcher._launches, "compiling", Nothing())
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("small", [False, True])  # products by a library, or by kernels of our own
@pytest.mark.parametrize(
    ("backend", "name"),
    [("triton_sequence", name) for name in ("lstm", "checkpoint")]
    + [(backend, name) for backend in ("triton_fused", "triton_split") for name in CHOICES],
)
def test_no_step_allocates(backend, name, small, masked, allocated, monkeypatch):
    """Except for what autocast rounds."""
    monkeypatch.setattr(small_product, "MOST_WORK", {"cpu": 2**20 * small})
    choice, batch = CHOICES[name], 2

    def count(steps: int) -> Counter[str]:
        dnc = make(backend, dtype=torch.float32, **choice)
        inputs, state = draw(dnc, steps, batch)
        masks = {}
        if masked:
            masks = dict(lengths=[1, steps], reset=torch.ones(steps, batch, dtype=torch.bool))
        allocated.clear()
        outputs, last = dnc(inputs.requires_grad_(), state, **masks)
        sum(x.sum() for x in tree_leaves((outputs, last))).backward()
        return allocated.copy()

    short, long = count(5), count(9)  # of three launches four steps more are one link more
    launches = short.pop("launches"), long.pop("launches")
    assert short == long
    assert short.total() > 10
    assert (launches[1] > launches[0]) == (backend != "triton_sequence" or "checkpoint" in choice)


@pytest.mark.parametrize(
    ("slots", "word", "reads", "by_default", "at_most"),
    [
        (256, 64, 4, (0.28, 0.67), (0.53, 1.04)),
        (512, 64, 8, (0.31, 0.60), (0.56, 0.92)),
        (256, 64, 16, (1.12, 2.07), (2.12, 3.20)),
    ],
)
def test_what_the_phases_of_a_step_hand_on(slots, word, reads, by_default, at_most):
    """In links, for a batch element, forward and backward: docs/kernels.md has these figures; no floor has them."""
    memory = torch.empty(3, slots, word, device="meta")
    links, scratch = memory.shape[0] * slots**2, (forward_scratch, backward_scratch)
    handed_on = {
        layout: [make_scratch(memory, reads, layout).numel() / links for make_scratch in scratch]
        for layout in layouts(slots)
    }
    assert handed_on[default_layout(slots)] == pytest.approx(by_default, abs=0.005)
    assert [max(of_all) for of_all in zip(*handed_on.values(), strict=True)] == pytest.approx(at_most, abs=0.005)
