"""What the tests of the layer share: a small one, what it is given, what it asks of the dispatcher, and gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dnc_triton import DNC, DNCState
from dnc_triton.problem import Problem

BATCH, STEPS, INPUTS, HIDDEN, OUTPUTS = 4, 5, 3, 6, 2
SIZES = dict(memory_size=5, word_size=4, num_reads=2)
# float64: summing in another order then moves the last digits only, so that one bound serves every comparison of two
# ways to the same value. "Bit for bit" is `EXACT`.
CLOSE = dict(rtol=1e-10, atol=1e-12)
EXACT = dict(rtol=0.0, atol=0.0)
LENGTHS = [3, 0, 5, 1]
# A call of the layer in float32, as the dispatcher sees it.
PROBLEM = Problem(
    device=torch.device("cpu"),
    dtype=torch.float32,
    batch=BATCH,
    steps=STEPS,
    **SIZES,
    num_writes=1,
    controller="lstm",
    needs_gradient=True,
    hidden_size=HIDDEN,
    num_layers=1,
)
RESETS = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def make(**changes) -> DNC:
    torch.manual_seed(0)
    dnc = DNC(INPUTS, HIDDEN, OUTPUTS, **{**SIZES, "dtype": torch.float64, **changes})
    if changes.get("device") != "meta":
        with torch.no_grad():  # as torch initialises it, the memory hardly matters: all gates are near one half
            dnc.interface.weight.mul_(4)
    return dnc


def make_inputs(batch=BATCH, steps=STEPS, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, steps, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def warm_state(dnc: DNC, batch=BATCH) -> DNCState:
    """A state some steps in, whose tensors are leaves that want a gradient."""
    inputs = torch.randn(batch, 6, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = inputs.to(dnc.output.weight.dtype)
    _, state = dnc(inputs if dnc.batch_first else inputs.transpose(0, 1))
    return state.map(lambda x: x.detach().clone().requires_grad_())


def row(tree, index: int):
    """One row of a batch, as a batch of one."""
    return tree.map(lambda x: x[index : index + 1]) if isinstance(tree, DNCState) else tree[index : index + 1]


def gradients(loss: torch.Tensor, *trees) -> tuple[torch.Tensor, ...]:
    leaves = [x for tree in trees for x in (tree.parameters() if isinstance(tree, nn.Module) else tree_leaves(tree))]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
