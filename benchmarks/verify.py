"""Is a network right? Outputs, memory and gradients of parameters beside those of the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.configurations import Case
from benchmarks.modes import CAPTURED, TRAINING, TRAINS, capture, train
from benchmarks.peers import EAGER, Network, make_layer, reference_cell
from dnc_reference import MemoryState, unroll
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
# How much an error counts of what is in the memory at the end. Gates that never free a slot change the usage by 2e-4 of
# itself and more, where outputs change by 1e-10; in float32 all of it is right to 2e-5 after `VERIFIED_STEPS`.
MEMORY_WEIGHT = 0.1


@dataclass(frozen=True)
class Truth:
    """What the oracle computes.

    Attributes:
        inputs: [B, T, I] in float32, T at most `VERIFIED_STEPS`.
        outputs: [B, T, O] in float64.
        memories: mode without gradients → `of_any_order` of the memory's state at the end, in float64.
        gradients: by parameter, of the mean square of the outputs.
        fields: how many rows each field of the interface has in its parameters.
        allowed: mode → the largest allowed `error`.
    """

    inputs: Tensor
    outputs: Tensor
    memories: dict[str, list[Tensor]]
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
    first, rest = inputs.double().transpose(0, 1).tensor_split([SINGLE_STEPS])
    outputs, middle = unroll(oracle, first, oracle.initial_state(len(inputs)))
    others, end = unroll(oracle, rest, middle)
    outputs = torch.cat([outputs, others])
    memories = {mode: of_any_order(state.memory) for mode, state in (("step", middle), ("forward", end))}
    names = [name for name, _ in oracle.named_parameters()]
    gradients = torch.autograd.grad(outputs.square().mean(), list(oracle.parameters()))
    fields = list(interface_sizes(case.num_reads, 1, case.word_size).values())
    by_name = dict(zip(names, gradients, strict=True))
    truth = Truth(inputs, outputs.detach().transpose(0, 1), memories, by_name, fields, {})
    for mode in modes:
        eager = make_layer(case, inputs.device, backend=EAGER)
        rounding = error(eager, TRAINING if mode in TRAINS else mode, truth)
        truth.allowed[mode] = ALLOWED_ERROR + 2 * min(rounding, REFERENCE_LIMIT)
    return truth


def of_any_order(memory: MemoryState) -> list[Tensor]:
    """Each field in float64, sorted over the slots, for slots that hold the same may be filled in another order.

    Of the link [B, K, N, N] the sums over what was written before.
    """
    fields = {name: field.detach().double() for name, field in memory._asdict().items()}
    fields["link"] = fields["link"].sum(-1)
    return [field.sort(1 if name == "memory" else -1).values for name, field in fields.items()]


def error(network: Network, mode: str, truth: Truth) -> float:
    """How far a network is off when it runs as in a mode.

    Returns:
        the largest of max |error| / max |truth|, over the outputs and, where it trains, every gradient; of
        `FIELD_WEIGHT` times the same for the gradient by each field of the interface; and, where it does not train, of
        `MEMORY_WEIGHT` times the same for what is in the memory at the end. NaN if any is.
    """
    weighed: list[tuple[float, Tensor, Tensor]] = []
    if mode in TRAINS:
        if mode == CAPTURED:
            replay, outputs = capture(network, truth.inputs)
            replay()
        else:
            outputs = train(network, truth.inputs)
        parameters = dict(network.module.named_parameters())
        if parameters.keys() != truth.gradients.keys():
            raise ValueError(f"parameters: expected {', '.join(truth.gradients)}, got {', '.join(parameters)}")
        for name, parameter in parameters.items():
            gradient, expected = parameter.grad, truth.gradients[name]
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            weighed.append((1, gradient, expected))
            if name.startswith("interface."):
                fields = zip(gradient.split(truth.fields), expected.split(truth.fields), strict=True)
                weighed += [(FIELD_WEIGHT, *pair) for pair in fields]
    else:
        with torch.no_grad():
            outputs, state = (network.run if mode == "forward" else partial(_one_by_one, network))(truth.inputs, None)
        memories = zip(of_any_order(state.memory), truth.memories[mode], strict=True)
        weighed += [(MEMORY_WEIGHT, *pair) for pair in memories]
    expected = truth.outputs[:, :SINGLE_STEPS] if mode == "step" else truth.outputs
    if outputs.shape != expected.shape:
        raise ValueError(f"outputs: expected {list(expected.shape)}, got {list(outputs.shape)}")
    # Of one step the link is zero, and so may be the gradient by a field.
    weighed = [(1, outputs, expected), *((w, a, e) for w, a, e in weighed if w == 1 or e.any())]
    return float(torch.stack([weight * _off(actual, expected) for weight, actual, expected in weighed]).max())


def _off(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual.double() - expected).abs().max() / expected.abs().max()


def _one_by_one(network: Network, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs = []
    for inputs_of_step in inputs[:, :SINGLE_STEPS].unbind(1):
        outputs_of_step, state = network.step(inputs_of_step, state)
        outputs.append(outputs_of_step)
    return torch.stack(outputs, dim=1), state
