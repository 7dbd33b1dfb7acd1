"""Is a network right? Its outputs and the gradients of its parameters beside those of the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.configurations import Case
from benchmarks.modes import CAPTURED, TRAINING, TRAINS, capture, train
from benchmarks.peers import EAGER, Network, make_layer, reference_cell
from dnc_reference import unroll

# What rounding to float32 leaves anywhere, on top of twice what the eager reference in float32 is off by.
ALLOWED_ERROR = 1e-5
# What the eager reference may itself be off by; beyond that nothing can be said of the others.
REFERENCE_LIMIT = 1e-4
# Of a longer sequence the beginning: sooner or later two slots are used so equally that float32 takes them in another
# order than float64, after which no bound on rounding holds. `test_a_hundred_steps_in_float32` gives both its order.
VERIFIED_STEPS = 50
SINGLE_STEPS = 10  # taken one by one


@dataclass(frozen=True)
class Truth:
    """What the oracle computes.

    Attributes:
        inputs: [B, T, I] in float32, T at most `VERIFIED_STEPS`.
        outputs: [B, T, O] in float64.
        gradients: by parameter, of the mean square of the outputs.
        allowed: mode → the largest allowed `error`.
    """

    inputs: Tensor
    outputs: Tensor
    gradients: dict[str, Tensor]
    allowed: dict[str, float]


def find_truth(case: Case, inputs: Tensor, modes: list[str]) -> Truth:
    """Ask the oracle, with the parameters that every checked network of this case has.

    Args:
        case: the sizes.
        inputs: [B, T, I] in float32.
        modes: for which to find out how far the eager reference is off in float32.
    """
    inputs = inputs[:, :VERIFIED_STEPS]
    oracle = reference_cell(case, inputs.device, torch.float64)
    outputs, _ = unroll(oracle, inputs.double().transpose(0, 1), oracle.initial_state(len(inputs)))
    names = [name for name, _ in oracle.named_parameters()]
    gradients = torch.autograd.grad(outputs.square().mean(), list(oracle.parameters()))
    truth = Truth(inputs, outputs.detach().transpose(0, 1), dict(zip(names, gradients, strict=True)), {})
    for mode in modes:
        eager = make_layer(case, inputs.device, backend=EAGER)
        rounding = error(eager, TRAINING if mode in TRAINS else mode, truth)
        truth.allowed[mode] = ALLOWED_ERROR + 2 * min(rounding, REFERENCE_LIMIT)
    return truth


def error(network: Network, mode: str, truth: Truth) -> float:
    """How far a network is off when it runs as in a mode.

    Returns:
        the largest, over the outputs and, where it trains, every gradient, of max |error| / max |truth|; NaN if any is.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    if mode in TRAINS:
        if mode == CAPTURED:
            replay, outputs = capture(network, truth.inputs)
            replay()
        else:
            outputs = train(network, truth.inputs)
        for name, parameter in network.module.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pairs.append((gradient, truth.gradients[name]))
    else:
        with torch.no_grad():
            outputs = network.run(truth.inputs, None)[0] if mode == "forward" else _one_by_one(network, truth.inputs)
    expected = truth.outputs[:, :SINGLE_STEPS] if mode == "step" else truth.outputs
    if outputs.shape != expected.shape:
        raise ValueError(f"outputs: expected {list(expected.shape)}, got {list(outputs.shape)}")
    pairs.append((outputs, expected))
    errors = [(actual.double() - expected).abs().max() / expected.abs().max() for actual, expected in pairs]
    return float(torch.stack(errors).max())


def _one_by_one(network: Network, inputs: Tensor) -> Tensor:
    outputs, state = [], None
    for inputs_of_step in inputs[:, :SINGLE_STEPS].unbind(1):
        outputs_of_step, state = network.step(inputs_of_step, state)
        outputs.append(outputs_of_step)
    return torch.stack(outputs, dim=1)
