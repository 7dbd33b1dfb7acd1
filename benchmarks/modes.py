"""How a network is used: trained, by calls or all in one CUDA graph, run over a sequence, or run step by step."""

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
TRAINS = TRAINING, CAPTURED  # of them with gradients
STEPS_BEFORE = 5  # of a sequence, before the step that is timed


def modes_on(device: str) -> list[str]:
    """Those that a kind of device has."""
    return [mode for mode in MODES if mode != CAPTURED or device == "cuda"]


def draw_inputs(case: Case, device: torch.device) -> Tensor:
    """Normal random numbers [B, T, I], the same on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(case.batch, case.steps, case.input_size, generator=generator).to(device)


def inputs_of(mode: str, inputs: Tensor) -> Tensor:
    """What a call in a mode gets of the inputs of a case."""
    return inputs[:, :1] if mode == "step" else inputs


def train(network: Network, inputs: Tensor) -> Tensor:
    """Outputs; the gradients of the mean of their squares are those of the parameters from then on."""
    network.module.zero_grad(set_to_none=True)
    outputs: Tensor = network.run(inputs, None)[0]
    outputs.square().mean().backward()
    return outputs.detach()


_stream = cache(torch.cuda.Stream)  # one, for libraries keep work space for each
_engine = cache(Engine)


@contextmanager
def aside() -> Iterator[None]:
    """On a stream of its own, where our layer launches plainly; what it chooses is as on the default one."""
    stream, other = torch.cuda.current_stream(), _stream()
    other.wait_stream(stream)
    try:
        with torch.cuda.stream(other):
            yield
    finally:
        stream.wait_stream(other)


def capture(network: Network, inputs: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """`train` as a CUDA graph. Returns what replays it, and the outputs, which like the gradients it writes anew.

    Before that it launches plainly, as in the graph: what is not compiled yet is compiled then.
    """
    with aside():
        train(network, inputs)
    captured = _engine(inputs.device).capture(lambda: [train(network, inputs)])
    return captured.replay, captured.results[0]


def call_of(mode: str, network: Network, inputs: Tensor) -> Callable[[], Any]:
    """What is timed. The loss of training is the mean square of the outputs."""
    if mode == CAPTURED:
        return capture(network, inputs)[0]

    def forward() -> None:
        with torch.no_grad():
            network.run(inputs, None)

    if mode != "step":
        return forward if mode == "forward" else partial(train, network, inputs)
    with torch.no_grad():
        state = None
        for inputs_of_step in inputs[:, :STEPS_BEFORE].unbind(1):  # as below, so that nothing else is compiled
            _, state = network.step(inputs_of_step, state)
    first = inputs[:, 0]

    def step() -> None:
        with torch.no_grad():
            network.step(first, state)

    return step
