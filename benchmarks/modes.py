"""How a network is used: trained, by calls or in one CUDA graph, run over a sequence, or run step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.configurations import Case
from benchmarks.peers import SEED, Network
from dnc_triton.sequence.engine import Engine

TRAINING, CAPTURED = "training", "captured"
MODES = {
    TRAINING: "forward and backward over the sequence, gradients of all parameters",
    CAPTURED: "training, as a CUDA graph of the user's that is replayed: without the time that Python takes",
    "forward": "the sequence without gradients",
    "step": "one time step without gradients, from the state in the middle of a sequence",
}
TRAINS = TRAINING, CAPTURED  # the modes with gradients
STEPS_BEFORE = 5  # of a sequence, before the step that is timed


def modes_on(device: str) -> list[str]:
    """The modes of a kind of device."""
    return [mode for mode in MODES if mode != CAPTURED or device == "cuda"]


def draw_inputs(case: Case, device: torch.device) -> Tensor:
    """Normal random numbers [B, T, I], the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(case.batch, case.steps, case.input_size, generator=generator).to(device)


def inputs_of(mode: str, inputs: Tensor) -> Tensor:
    """The part of a case's inputs that a call in a mode gets."""
    return inputs[:, :1] if mode == "step" else inputs


def train(network: Network, inputs: Tensor) -> Tensor:
    """Run forward and backward: returns the outputs; parameters get the gradients of the outputs' mean square."""
    network.module.zero_grad(set_to_none=True)
    outputs: Tensor = network.run(inputs, None)[0]
    outputs.square().mean().backward()
    return outputs.detach()


_stream = cache(torch.cuda.Stream)  # only one, since libraries keep workspace for each
_engine = cache(Engine)


@contextmanager
def aside() -> Iterator[None]:
    """In the block, work is on another stream, where our layer launches plainly but chooses as on the default one."""
    stream, other = torch.cuda.current_stream(), _stream()
    other.wait_stream(stream)
    try:
        with torch.cuda.stream(other):
            yield
    finally:
        stream.wait_stream(other)


def capture(network: Network, inputs: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """`train` as a CUDA graph. Returns a function that replays it, and the outputs, rewritten as the gradients are.

    A plain launch comes first, as in the graph, to compile what is not compiled yet.
    """
    with aside():
        train(network, inputs)
    captured = _engine(inputs.device).capture(lambda: [train(network, inputs)])
    return captured.replay, captured.results[0]


def call_of(mode: str, network: Network, inputs: Tensor) -> Callable[[], Any]:
    """The call that is timed. The loss of training is the mean square of the outputs."""
    if mode == CAPTURED:
        return capture(network, inputs)[0]

    def forward() -> None:
        with torch.no_grad():
            network.run(inputs, None)

    if mode != "step":
        return forward if mode == "forward" else partial(train, network, inputs)
    with torch.no_grad():
        state = None
        for inputs_of_step in inputs[:, :STEPS_BEFORE].unbind(1):  # called as below, so that nothing else is compiled
            _, state = network.step(inputs_of_step, state)
    first = inputs[:, 0]

    def step() -> None:
        with torch.no_grad():
            network.step(first, state)

    return step
