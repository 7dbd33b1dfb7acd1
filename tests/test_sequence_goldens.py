"""The sequence as one operation against what DeepMind's own code computed over a sequence; goldens/FORMAT.md."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    GOLDEN_NAMES,
    STATE_KEYS,
    Golden,
    as_leaves,
    load_golden,
)
from test_sequence import each_backend
from torch import Tensor

from dnc_reference import DNCState
from dnc_triton import DNC, from_deepmind

# The memory_rollout files feed activated interfaces, which no interface vector gives to the last digit (read modes that
# a softmax made sum to 1): they are for the step, in reference/test_goldens.
# The operation serves one write head. What has two runs step by step, and its parity stands in reference/test_goldens.
ONE_WRITE_HEAD = [name for name in GOLDEN_NAMES if load_golden(name).meta["config"]["num_writes"] == 1]
CELLS = [name for name in ONE_WRITE_HEAD if name.startswith("dnc_cell_rollout_")]


def test_every_file_is_visited() -> None:
    assert len(CELLS) == 8


def named(prefix: str, values, keys) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in zip(keys, values, strict=True)}


def weighted(golden: Golden, key: str, result: Tensor) -> Tensor:
    """The loss of a file."""
    return (golden.tensor(f"lossw_{key}", result.dtype) * result).sum()


def gradients(loss: Tensor, leaves: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    values = torch.autograd.grad(loss, list(leaves.values()), **options)
    return named("grad_", values, list(leaves))


# --- the whole network ------------------------------------------------------------------------------------------------


def layer(golden: Golden, variables: dict[str, Tensor], **options) -> DNC:
    sizes = {key: size for key, size in golden.meta["config"].items() if key != "batch"}
    return from_deepmind(variables, clip=golden.meta["clip_value"], **sizes, batch_first=False, **options)


def named_state(prefix: str, state: DNCState) -> dict[str, Tensor]:
    ((hidden, cell),) = state.controller
    keys = [*STATE_KEYS, "access_output", "hidden", "cell"]
    return named(prefix, [*state.memory, state.read_words, hidden, cell], keys)


@pytest.mark.parametrize("checkpoint", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CELLS)
@each_backend
def test_cell_rollout(backend: str, name: str, dtype: torch.dtype, checkpoint: int | None) -> None:
    """DeepMind's parameters in the layer: its softplus, its clip, its stopped gradient.

    The gradient goes to DeepMind's variables themselves: the layer's parameters are made from them by a linear map,
    which is asked of `from_deepmind` by giving it numbered variables.
    """
    golden = load_golden(name)
    values = {name: golden.tensor("var." + name.replace("/", ".")) for name in golden.meta["variable_names"]}
    dnc = layer(golden, values, dtype=dtype)
    dnc.backend, dnc.checkpoint = backend, checkpoint
    hidden, cell, words = (golden.tensor(f"init_{key}", dtype) for key in ("hidden", "cell", "access_output"))
    given = DNCState(((hidden, cell),), golden.state("init_", dtype), words)
    inputs, init = as_leaves((golden.tensor("inputs", dtype), given))
    outputs, final = dnc(inputs, init)
    loss = weighted(golden, "out_y", outputs)
    leaves = {"inputs": inputs, **named_state("init_", init)}
    results = {"out_y": outputs, "loss": loss, **named_state("final_", final)}
    results |= gradients(loss, leaves | dict(dnc.named_parameters()), materialize_grads=True)
    by_parameter = [results.pop(f"grad_{parameter}").flatten() for parameter, _ in dnc.named_parameters()]
    results |= by_variable(golden, values, torch.cat(by_parameter))

    states, state = [], init
    with torch.no_grad():
        for step in inputs:
            _, state = dnc.step(step, state)
            states.append(named_state("traj_", state))
    for key in ("traj_access_output", "traj_hidden", "traj_cell", "traj_usage"):
        results[key] = torch.stack([each[key] for each in states])
    golden.check(results, without=("mid_",))


def by_variable(golden: Golden, values: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """The gradient by all parameters of the layer, flat → by DeepMind's variables."""
    sizes = [value.numel() for value in values.values()]
    numbers = torch.arange(1.0, sum(sizes) + 1, dtype=torch.float64).split(sizes)
    numbered = {name: number.view_as(values[name]) for name, number in zip(values, numbers, strict=True)}
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    went = [
        torch.nn.utils.parameters_to_vector(layer(golden, variables, dtype=torch.float64).parameters()).detach()
        for variables in (numbered, zeros)
    ]
    source = (went[0] - went[1]).round().long()  # which number each parameter got; 0 if none
    parts = gradient.new_empty(sum(sizes) + 1).scatter(0, source, gradient)[1:].split(sizes)
    keys = [f"grad_var.{name.replace('/', '.')}" for name in values]
    return {key: part.view_as(value) for key, part, value in zip(keys, parts, values.values(), strict=True)}
