"""A layer with the parameters of a golden file, and its gradients by the names of DeepMind's variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers import Golden
from torch import Tensor, nn

from dnc_triton import DNC, from_deepmind


def variables(golden: Golden) -> dict[str, Tensor]:
    """Name in DeepMind's graph → value."""
    return {name: golden.tensor("var." + name.replace("/", ".")) for name in golden.meta["variable_names"]}


def deepmind_layer(golden: Golden, values: dict[str, Tensor], **options: Any) -> DNC:
    sizes = {key: size for key, size in golden.meta["config"].items() if key != "batch"}
    return from_deepmind(values, clip=golden.meta["clip_value"], **sizes, **options)


def as_variables(golden: Golden, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradients of the layer's parameters → those of DeepMind's variables.

    The parameters are made from the variables by a linear map. Where each number went is found by giving
    `from_deepmind` numbered variables. What it adds is subtracted.
    """
    originals = variables(golden)
    total = sum(value.numel() for value in originals.values())
    numbers = torch.arange(1.0, total + 1, dtype=torch.float64).split([value.numel() for value in originals.values()])
    numbered = {name: number.view_as(originals[name]) for name, number in zip(originals, numbers, strict=True)}
    zeros = {name: torch.zeros_like(value) for name, value in originals.items()}

    def flat(network: nn.Module) -> Tensor:
        return nn.utils.parameters_to_vector(network.parameters()).detach()

    went = [flat(deepmind_layer(golden, values, dtype=torch.float64)) for values in (numbered, zeros)]
    source = (went[0] - went[1]).round().long()  # 0 where a parameter comes from no variable
    assert torch.equal(source[source > 0].sort().values, torch.arange(1, total + 1)), "a variable got lost or doubled"
    gradient = torch.cat([value.flatten() for value in values])
    moved = gradient.new_empty(total + 1).scatter(0, source, gradient)[1:]
    parts = moved.split([value.numel() for value in originals.values()])
    keys = [f"grad_var.{name.replace('/', '.')}" for name in originals]
    return {key: part.view_as(value) for key, part, value in zip(keys, parts, originals.values(), strict=True)}
