"""Both packages against what DeepMind's own code computed: tests/goldens, forward and gradients, float64 and float32.

`Golden.check` asserts that every result in a file was compared, and says which tolerance it is held to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from deepmind_layer import as_variables, deepmind_layer, variables
from helpers import GOLDEN_NAMES, INTERFACE_KEYS, STATE_KEYS, Golden, as_leaves, load_golden, named, named_state
from torch import Tensor

import dnc_reference
import dnc_triton
from dnc_reference import DNCCell, DNCState, Interface, MemoryState, memory_step_with_addressing, unroll
from dnc_reference.addressing import softplus
from dnc_reference.backward import memory_step_backward, softplus_backward
from dnc_reference.interface import activate_interface

Case = tuple[str, torch.dtype]


def cases(kind: str) -> list[Case]:
    """(file, dtype) for each file of a kind and each precision in which there is something to compare."""
    names = [name for name in GOLDEN_NAMES if name.startswith(f"{kind}_B")]
    dtypes = (torch.float64, torch.float32)
    return [(name, dtype) for name in names for dtype in dtypes if load_golden(name).comparable(dtype)]


STEPS, ROLLOUTS, CELLS = cases("memory_step"), cases("memory_rollout"), cases("dnc_cell_rollout")


def for_each(chosen: Iterable[Case]) -> pytest.MarkDecorator:
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in chosen]
    return pytest.mark.parametrize(("name", "dtype"), chosen, ids=ids)


def test_every_file_is_visited() -> None:
    assert len(GOLDEN_NAMES) == 51
    kinds = Counter(load_golden(name).meta["kind"] for name in GOLDEN_NAMES)
    assert kinds == {"memory_step": 32, "memory_rollout": 9, "dnc_cell_rollout": 10}
    visited = STEPS + ROLLOUTS + CELLS
    assert sorted(name for name, dtype in visited if dtype == torch.float64) == GOLDEN_NAMES
    # The loss weights of these tell slots apart whose usage float32 does not.
    assert set(GOLDEN_NAMES) - {name for name, dtype in visited if dtype == torch.float32} == {
        "memory_step_B2N16W8R2K1_tinyscale_s117",
        "memory_step_B2N24W6R2K2_fresh_s102",
        "memory_step_B2N24W6R2K2_ties_s107",
        "memory_step_B2N24W6R2K2_tinyscale_s118",
    }


# --- the memory -------------------------------------------------------------------------------------------------------

each_step = pytest.mark.parametrize(
    ("step", "hidden"),
    [
        pytest.param(dnc_reference.memory_step, ("mid_",), id="reference"),
        pytest.param(memory_step_with_addressing, (), id="reference_with_addressing"),
        pytest.param(dnc_triton.memory_step, ("mid_",), id="triton"),
    ],
)


def activate(raw: Interface) -> Interface:
    return raw._replace(
        read_strengths=softplus(raw.read_strengths),
        write_strengths=softplus(raw.write_strengths),
    )


def activate_backward(d_interface: Interface, raw: Interface) -> Interface:
    return d_interface._replace(
        read_strengths=softplus_backward(d_interface.read_strengths, raw.read_strengths),
        write_strengths=softplus_backward(d_interface.write_strengths, raw.write_strengths),
    )


def at(step: int, interface: Interface) -> Interface:
    return Interface(*(field[step] for field in interface))


def strengths(prefix: str, interface: Interface) -> dict[str, Tensor]:
    return {
        f"{prefix}read_strengths": interface.read_strengths,
        f"{prefix}write_strengths": interface.write_strengths,
    }


def weighted_sum(golden: Golden, results: dict[str, Tensor]) -> Tensor:
    """The loss of a file: its weights times its results."""
    terms = [(golden.tensor(f"lossw_{key}", result.dtype) * result).sum() for key, result in results.items()]
    return torch.stack(terms).sum()


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """`grad_` and the key of each leaf → the gradient."""
    values = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return named("grad_", leaves, values)


@each_step
@for_each(STEPS)
def test_memory_step(step: Callable[..., Any], hidden: tuple[str, ...], name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    raw, prev = as_leaves((golden.interface("in_", dtype), golden.state("prev_", dtype)))
    interface = activate(raw)
    read_words, new, *addressing = step(interface, prev, stop_usage_gradient=True)

    results = {"out_read_words": read_words, **named("next_", STATE_KEYS, new)}
    loss = weighted_sum(golden, results)
    leaves = {
        **named("in_", INTERFACE_KEYS, raw),
        **named("prev_", STATE_KEYS, prev),
        **strengths("act_", interface),
    }
    results |= {"loss": loss, **strengths("act_", interface), **gradients(loss, leaves)}
    for way in addressing:
        results |= {f"mid_{field}": value for field, value in way._asdict().items() if field != "retention"}
    golden.check(results, without=hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({name for name, _ in STEPS}))
def test_gradients_are_finite_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Even where DeepMind's are not, in float64; and of small words, whose squares vanish in float16."""
    golden = load_golden(name)
    raw, prev = as_leaves((golden.interface("in_", dtype), golden.state("prev_", dtype)))
    read_words, new = dnc_reference.memory_step(activate(raw), prev, stop_usage_gradient=True)
    loss = weighted_sum(golden, {"out_read_words": read_words, **named("next_", STATE_KEYS, new)})
    leaves = {**named("in_", INTERFACE_KEYS, raw), **named("prev_", STATE_KEYS, prev)}
    for key, gradient in gradients(loss, leaves).items():
        assert gradient.dtype == dtype
        assert gradient.isfinite().all(), key


@for_each(STEPS)
def test_memory_step_backward(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    raw, prev = golden.interface("in_", dtype), golden.state("prev_", dtype)
    d_interface, d_prev = memory_step_backward(
        activate(raw),
        prev,
        golden.tensor("lossw_out_read_words", dtype),
        golden.state("lossw_next_", dtype),
        stop_usage_gradient=True,
    )
    results = {
        **strengths("grad_act_", d_interface),
        **named("grad_in_", INTERFACE_KEYS, activate_backward(d_interface, raw)),
        **named("grad_prev_", STATE_KEYS, d_prev),
    }
    golden.check(results, without=("act_", "out_", "next_", "mid_", "loss"))


@each_step
@for_each(ROLLOUTS)
def test_memory_rollout(step: Callable[..., Any], hidden: tuple[str, ...], name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    raw, init = as_leaves((golden.interface("in_", dtype), golden.state("init_", dtype)))
    interface, state = activate(raw), init
    words, states, allocations = [], [], []
    for index in range(golden.meta["T"]):
        read_words, state, *addressing = step(at(index, interface), state, stop_usage_gradient=True)
        words.append(read_words)
        states.append(state)
        allocations += [way.allocation_weights for way in addressing]

    results = {"out_read_words": torch.stack(words)}
    loss = weighted_sum(golden, results)
    leaves = {**named("in_", INTERFACE_KEYS, raw), **named("init_", STATE_KEYS, init)}
    trajectory = MemoryState(*(torch.stack(field) for field in zip(*states, strict=True)))
    trajectory = trajectory._replace(link=trajectory.link[golden.tensor("traj_link_steps", torch.long)])
    results |= {"loss": loss, **named("traj_", STATE_KEYS, trajectory), **gradients(loss, leaves)}
    if allocations:
        results["mid_allocation_weights"] = torch.stack(allocations)
    golden.check(results, without=hidden)


@for_each(ROLLOUTS)
def test_memory_rollout_backward(name: str, dtype: torch.dtype) -> None:
    """The adjoint of a step carries the gradient through time."""
    golden = load_golden(name)
    raw, state = golden.interface("in_", dtype), golden.state("init_", dtype)
    interface, d_read_words = activate(raw), golden.tensor("lossw_out_read_words", dtype)
    states = []
    for index in range(golden.meta["T"]):
        states.append(state)
        _, state = dnc_reference.memory_step(at(index, interface), state)

    d_state = MemoryState(*map(torch.zeros_like, state))
    d_interfaces = []
    for index in reversed(range(golden.meta["T"])):
        d_step, d_state = memory_step_backward(
            at(index, interface), states[index], d_read_words[index], d_state, stop_usage_gradient=True
        )
        d_interfaces.insert(0, d_step)
    d_interface = Interface(*(torch.stack(field) for field in zip(*d_interfaces, strict=True)))
    results = {
        **named("grad_in_", INTERFACE_KEYS, activate_backward(d_interface, raw)),
        **named("grad_init_", STATE_KEYS, d_state),
    }
    golden.check(results, without=("out_", "traj_", "mid_", "loss"))


# --- the whole network ------------------------------------------------------------------------------------------------

# (network, inputs [T, B, I], state) → outputs [T, B, O], state
Run = Callable[[DNCCell, Tensor, DNCState], tuple[Tensor, DNCState]]


def run_batch_first(network: DNCCell, inputs: Tensor, state: DNCState) -> tuple[Tensor, DNCState]:
    outputs, state = network(inputs.transpose(0, 1), state)
    return outputs.transpose(0, 1), state


def reference_cell(golden: Golden, dtype: torch.dtype) -> DNCCell:
    """The cell of `dnc_reference` itself, with the same parameters."""
    layer = deepmind_layer(golden, variables(golden), dtype=dtype)
    shared = ("memory_size", "word_size", "num_reads", "num_writes", "clip", "strength", "stop_usage_gradient")
    options = {option: getattr(layer, option) for option in shared}
    cell = DNCCell(layer.input_size, layer.hidden_size, layer.output_size, dtype=dtype, **options)
    cell.load_state_dict(layer.state_dict())
    return cell


NETWORKS: dict[str, tuple[Callable[[Golden, torch.dtype], DNCCell], Run]] = {
    "reference": (reference_cell, unroll),
    "triton_batch_first": (
        lambda golden, dtype: deepmind_layer(golden, variables(golden), batch_first=True, dtype=dtype),
        run_batch_first,
    ),
    "triton_time_first": (
        lambda golden, dtype: deepmind_layer(golden, variables(golden), batch_first=False, dtype=dtype),
        lambda network, inputs, state: network(inputs, state),
    ),
}


def initial_state(golden: Golden, dtype: torch.dtype) -> DNCState:
    hidden, cell, read_words = (golden.tensor(f"init_{key}", dtype) for key in ("hidden", "cell", "access_output"))
    return DNCState(((hidden, cell),), golden.state("init_", dtype), read_words)


@pytest.mark.parametrize("kind", NETWORKS)
@for_each(CELLS)
def test_cell(kind: str, name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    make, run = NETWORKS[kind]
    network = make(golden, dtype)
    inputs, init = as_leaves((golden.tensor("inputs", dtype), initial_state(golden, dtype)))
    outputs, final = run(network, inputs, init)

    results = {"out_y": outputs}
    loss = weighted_sum(golden, results)
    results |= {"loss": loss, **named_state("final_", final)}
    leaves = {"inputs": inputs, **named_state("init_", init)}
    results |= gradients(loss, leaves | dict(network.named_parameters()))

    # The states on the way, by running one step at a time.
    states, state = [], init
    with torch.no_grad():
        for step_inputs in inputs.split(1):
            _, state = run(network, step_inputs, state)
            states.append(named_state("traj_", state))
    for key in ("traj_access_output", "traj_hidden", "traj_cell", "traj_usage"):
        results[key] = torch.stack([state[key] for state in states])

    by_parameter = [results.pop(f"grad_{parameter}") for parameter, _ in network.named_parameters()]
    golden.check(results | as_variables(golden, by_parameter), without=("mid_",))


@for_each(CELLS)
def test_cell_addressing(name: str, dtype: torch.dtype) -> None:
    golden = load_golden(name)
    seen = []

    def watched_step(
        vector: Tensor, state: MemoryState, *, stop_usage_gradient: bool, **layout: Any
    ) -> tuple[Tensor, MemoryState]:
        interface = activate_interface(vector, word_size=state.memory.shape[-1], **layout)
        read_words, new, addressing = memory_step_with_addressing(
            interface, state, stop_usage_gradient=stop_usage_gradient
        )
        seen.append((addressing.allocation_weights, interface.allocation_gates, interface.write_gates))
        return read_words, new

    inputs, init = golden.tensor("inputs", dtype), initial_state(golden, dtype)
    unroll(reference_cell(golden, dtype), inputs, init, interface_step=watched_step)
    keys = ("mid_allocation_weights", "mid_allocation_gate", "mid_write_gate")
    results = named("", keys, [torch.stack(field) for field in zip(*seen, strict=True)])
    golden.check(results, without=("out_", "loss", "final_", "traj_", "grad_"))
