"""Random programs around layers whose sequences may be replayed: what they hold, change and drop in between.

A program is drawn from its seed alone, and computes the same by replays and by plain launches, to the last bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import assert_same_bits
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dnc_triton import DNC, DNCState

# What PyTorch says of a graph that is gone, of weights that have changed since.
ERRORS = ("a second time", "modified by an inplace operation")


class Held(NamedTuple):
    """A call whose results the program holds; which layer's, and the leaves that it was given."""

    layer: DNC
    outputs: Tensor
    state: DNCState
    leaves: list[Tensor]


class Program:
    """Calls, their backwards in any order, once or more often, and what else a training does.

    Args:
        seed: what happens, and with what numbers.
        layers: which are changed.
        disturb: called with a number now and then, to do something that must make no difference.

    Attributes:
        held: what it may still differentiate, or go on from.
        returned: what it has computed, in order, with an empty tensor for a gradient that is None; record: copies made
            when it was returned.
        errors: those of `ERRORS` that were raised, each with what raised it.
    """

    RARE = ("choose", "freeze", "settle")
    ACTIONS = (*["call"] * 40, *["backward"] * 35, *["drop"] * 30, *["update"] * 4, *["disturb"] * 6, *RARE)

    def __init__(self, seed: int, layers: list[DNC], disturb: Callable[[int], Any]) -> None:
        self.pick, self.layers, self.tell = random.Random(seed), layers, disturb
        self.device = layers[0].output.weight.device
        self.generator = torch.Generator().manual_seed(seed)
        self.held: list[Held] = []
        self.returned: list[list[Tensor]] = []
        self.record: list[list[Tensor]] = []
        self.errors: list[str] = []

    def run(self, length: int) -> None:
        """Do that many things.

        Raises:
            AssertionError: what was returned earlier is not what it was.
            RuntimeError: another error than those of `ERRORS`.
        """
        for index in range(length):
            action = self.pick.choice(self.ACTIONS)
            try:
                result = getattr(self, action)()
            except RuntimeError as error:
                known = next((known for known in ERRORS if known in str(error)), "")
                if not known:
                    raise
                self.errors.append(f"{index}, {action}: {known}")
                continue
            if result:
                self.returned.append([torch.empty(0) if x is None else x.detach() for x in result])
                self.record.append([x.clone() for x in self.returned[-1]])
        torch.use_deterministic_algorithms(False)
        assert_same_bits(self.returned, self.record, name="returned earlier")

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.layers[0].output.weight.dtype).to(self.device)

    # --- what may happen

    def call(self) -> list[Tensor]:
        pick, dnc = self.pick, self.pick.choice(self.layers)
        batch, steps = pick.choice([2] * 15 + [3]), pick.choice([3] * 15 + [1, 5])
        inputs = self.normal(batch, steps, dnc.input_size).requires_grad_(pick.random() < 0.5)
        state, leaves = None, [inputs]
        earlier = [held.state for held in self.held if held.layer is dnc and len(held.outputs) == batch]
        begin = pick.choice(["nothing", "nothing", "given", "given", "earlier", "detached"])
        if begin == "given":
            state = dnc.initial_state(batch).map(lambda x: (self.normal(*x.shape) / 4).abs().requires_grad_())
            leaves += tree_leaves(state)
        elif begin != "nothing" and earlier:
            state = pick.choice(earlier)
            state = state if begin == "earlier" else state.detach()
        lengths = [pick.randint(0, steps) for _ in range(batch)] if pick.random() < 0.15 else None
        reset = (self.normal(batch, steps) > 0.5) if pick.random() < 0.15 else None
        with pick.choice([torch.enable_grad] * 6 + [torch.no_grad, torch.inference_mode])():
            outputs, state = dnc(inputs, state, lengths=lengths, reset=reset)
        self.held.append(Held(dnc, outputs, state, leaves))
        return [outputs, *tree_leaves(state)]

    def backward(self) -> tuple[Tensor | None, ...] | None:
        pick = self.pick
        held = pick.choice(self.held) if self.held else None
        if held is None or not held.outputs.requires_grad:
            return None
        results = [x for x in (held.outputs, *tree_leaves(held.state)) if x.requires_grad and pick.random() < 0.5]
        seen = [(x, self.normal(*x.shape)) for x in results or [held.outputs]]
        groups = [group for group in (list(held.layer.parameters()), held.leaves) if pick.random() < 0.7]
        wanted = [x for group in groups for x in group if x.requires_grad and pick.random() < 0.9]
        again = pick.random() < 0.5
        if not again and pick.random() < 0.8:  # else PyTorch complains the next time that it is gone
            self.held = [other for other in self.held if other is not held]
        tensors, weights = zip(*seen, strict=True)
        return torch.autograd.grad(tensors, wanted, weights, retain_graph=again, allow_unused=True) if wanted else None

    def drop(self) -> None:
        if self.held:
            del self.held[self.pick.randrange(len(self.held))]

    @torch.no_grad()
    def update(self) -> None:
        for parameter in self.pick.choice(self.layers).parameters():
            parameter.add_(self.normal(*parameter.shape), alpha=0.05)

    def choose(self) -> None:
        pick, dnc = self.pick, self.pick.choice(self.layers)
        dnc.clip = pick.choice([None, 0.2, 1.0])
        dnc.checkpoint = pick.choice([None, "auto", 1, 2])
        dnc.strength = pick.choice(["oneplus", "softplus"])
        dnc.stop_usage_gradient = pick.random() < 0.3

    def freeze(self) -> None:
        for parameter in self.pick.choice(self.layers).parameters():
            parameter.requires_grad_(self.pick.random() < 0.8)

    def settle(self) -> None:
        if self.device.type == "cpu":  # cuBLAS wants a variable of its own for that
            torch.use_deterministic_algorithms(self.pick.random() < 0.3)

    def disturb(self) -> None:
        self.tell(self.pick.randrange(2**30))
