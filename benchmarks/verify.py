"""Is a network right? Outputs, memory and gradients of parameters compared with those of the float64 oracle."""

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

# Rounding to float32 may always cause this much, on top of twice the error of the eager reference in float32.
ALLOWED_ERROR = 1e-5
# The most that the eager reference itself may be off; beyond it nothing can be said about the others.
REFERENCE_LIMIT = 1e-4
# Only the beginning of a longer sequence: sooner or later two slots are used so equally that float32 orders them unlike
# float64, after which no bound on rounding holds. `test_a_hundred_steps_in_float32` gives both the same order.
VERIFIED_STEPS = 50
SINGLE_STEPS = 10  # taken one by one
# Weight of the error in one interface field's gradient, relative to that gradient's largest number. In an untrained
# network the gradients with respect to free gates and write strengths are up to a hundred million times smaller than
# those with respect to write vectors, and outputs hardly show whether such a field is used at all; but in float32 each
# field's gradient is right to 2e-3 of itself. With this weight a tenth of itself is beyond `ALLOWED_ERROR`.
FIELD_WEIGHT = 1e-4
# Weight of the error of the memory's final state. Gates that never free a slot change the usage by 2e-4 of itself and
# more, while outputs change by 1e-10; in float32 all of it is right to 2e-5 after `VERIFIED_STEPS`.
MEMORY_WEIGHT = 0.1


@dataclass(frozen=True)
class Truth:
    """What the oracle computes.

    Attributes:
        inputs: [B, T, I] in float32, T at most `VERIFIED_STEPS`.
        outputs: [B, T, O] in float64.
        memories: mode without gradients → `of_any_order` of the memory's state at the end, in float64.
        gradients: parameter → gradient of the mean square of the outputs.
        fields: how many rows of the interface's parameters each of its fields takes.
        allowed: mode → the largest allowed `error`.
    """

    inputs: Tensor
    outputs: Tensor
    memories: dict[str, list[Tensor]]
    gradients: dict[str, Tensor]
    fields: list[int]
    allowed: dict[str, float]


def find_truth(case: Case, inputs: Tensor, modes: list[str]) -> Truth:
    """Run the oracle, with the parameters that every checked network of this case has.

    Args:
        case: the sizes.
        inputs: [B, T, I] in float32.
        modes: those for which to determine the eager reference's error in float32.
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
    """Each field in float64, sorted over the slots, as identical slots may be filled in another order.

    For the link [B, K, N, N], the sums over the slots written before.
    """
    fields = {name: field.detach().double() for name, field in memory._asdict().items()}
    fields["link"] = fields["link"].sum(-1)
    return [field.sort(1 if name == "memory" else -1).values for name, field in fields.items()]


def error(network: Network, mode: str, truth: Truth) -> float:
    """How far a network is off when it runs in a mode.

    Returns:
        the largest of max |error| / max |truth|, over the outputs and, if it trains, every gradient; of `FIELD_WEIGHT`
        times the same for the gradient with respect to each field of the interface; and, if it does not train, of
        `MEMORY_WEIGHT` times the same for the memory's final state. NaN if any is.
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
    # After one step the link is zero, and so may be the gradient with respect to a field.
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
