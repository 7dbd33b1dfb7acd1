"""Is a network right? Its outputs and the gradients of its parameters beside those of the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.configurations import Case
from benchmarks.modes import CAPTURED, TRAINING, TRAINS, capture, train
from benchmarks.peers import EAGER, Network, make_layer, reference_cell
from dnc_reference import unroll
from dnc_reference.interface import interface_sizes

# What rounding to float32 leaves anywhere, on top of twice what the eager reference in float32 is off by.
ALLOWED_ERROR = 1e-5
# What the eager reference may itself be off by; beyond that nothing can be said of the others.
REFERENCE_LIMIT = 1e-4
# Of a longer sequence the beginning: sooner or later two slots are used so equally that float32 takes them in another
# order than float64, after which no bound on rounding holds. `test_a_hundred_steps_in_float32` gives both its order.
VERIFIED_STEPS = 50
SINGLE_STEPS = 10  # taken one by one
# How much an error counts that is measured by the largest number of one field of the interface alone. Of a network that
# has learned nothing the gradients by free gates and write strengths are up to a hundred million times smaller than
# those by write vectors, and outputs hardly tell whether such a field is used at all; but in float32 each field's
# gradient is right to 2e-3 of itself. So a tenth of itself is beyond `ALLOWED_ERROR`.
FIELD_WEIGHT = 1e-4


@dataclass(frozen=True)
class Truth:
    """What the oracle computes.

    Attributes:
        inputs: [B, T, I] in float32, T at most `VERIFIED_STEPS`.
        outputs: [B, T, O] in float64.
        gradients: by parameter, of the mean square of the outputs.
        fields: how many rows each field of the interface has in its parameters.
        allowed: mode → the largest allowed `error`.
    """

    inputs: Tensor
    outputs: Tensor
    gradients: dict[str, Tensor]
    fields: list[int]
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
    fields = list(interface_sizes(case.num_reads, 1, case.word_size).values())
    truth = Truth(inputs, outputs.detach().transpose(0, 1), dict(zip(names, gradients, strict=True)), fields, {})
    for mode in modes:
        eager = make_layer(case, inputs.device, backend=EAGER)
        rounding = error(eager, TRAINING if mode in TRAINS else mode, truth)
        truth.allowed[mode] = ALLOWED_ERROR + 2 * min(rounding, REFERENCE_LIMIT)
    return truth


def error(network: Network, mode: str, truth: Truth) -> float:
    """How far a network is off when it runs as in a mode.

    Returns:
        the largest, over the outputs and, where it trains, every gradient, of max |error| / max |truth|, and of
        `FIELD_WEIGHT` times the same for each field of the interface; NaN if any is.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    fields: list[tuple[Tensor, Tensor]] = []
    if mode in TRAINS:
        if mode == CAPTURED:
            replay, outputs = capture(network, truth.inputs)
            replay()
        else:
            outputs = train(network, truth.inputs)
        for name, parameter in network.module.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pairs.append((gradient, truth.gradients[name]))
            if name.startswith("interface."):
                fields += zip(gradient.split(truth.fields), truth.gradients[name].split(truth.fields), strict=True)
    else:
        with torch.no_grad():
            outputs = network.run(truth.inputs, None)[0] if mode == "forward" else _one_by_one(network, truth.inputs)
    expected = truth.outputs[:, :SINGLE_STEPS] if mode == "step" else truth.outputs
    if outputs.shape != expected.shape:
        raise ValueError(f"outputs: expected {list(expected.shape)}, got {list(outputs.shape)}")
    pairs.append((outputs, expected))
    errors = [_off(actual, expected) for actual, expected in pairs]
    errors += [FIELD_WEIGHT * _off(actual, expected) for actual, expected in fields if expected.any()]
    return float(torch.stack(errors).max())


def _off(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual.double() - expected).abs().max() / expected.abs().max()


def _one_by_one(network: Network, inputs: Tensor) -> Tensor:
    outputs, state = [], None
    for inputs_of_step in inputs[:, :SINGLE_STEPS].unbind(1):
        outputs_of_step, state = network.step(inputs_of_step, state)
        outputs.append(outputs_of_step)
    return torch.stack(outputs, dim=1)
