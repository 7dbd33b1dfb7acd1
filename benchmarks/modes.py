"""How a network is used: trained, run over a sequence, or run step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.configurations import Case
from benchmarks.peers import SEED, Network

MODES = {
    "training": "forward and backward over the sequence, gradients of all parameters",
    "forward": "the sequence without gradients",
    "step": "one time step without gradients, from the state in the middle of a sequence",
}
STEPS_BEFORE = 5  # of a sequence, before the step that is timed


def draw_inputs(case: Case, device: torch.device) -> Tensor:
    """Normal random numbers [B, T, I], the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(case.batch, case.steps, case.input_size, generator=generator).to(device)


def inputs_of(mode: str, inputs: Tensor) -> Tensor:
    """What a call in a mode gets of the inputs of a case."""
    return inputs[:, :1] if mode == "step" else inputs


def call_of(mode: str, network: Network, inputs: Tensor) -> Callable[[], None]:
    """What is timed. The loss of training is the mean square of the outputs."""

    def training() -> None:
        network.module.zero_grad(set_to_none=True)
        network.run(inputs, None)[0].square().mean().backward()

    def forward() -> None:
        with torch.no_grad():
            network.run(inputs, None)

    if mode != "step":
        return {"training": training, "forward": forward}[mode]
    with torch.no_grad():
        _, state = network.run(inputs[:, :STEPS_BEFORE], None)
    first = inputs[:, 0]

    def step() -> None:
        with torch.no_grad():
            network.step(first, state)

    return step
