"""The sequence as one operation against what DeepMind's own code computed over a sequence; goldens/FORMAT.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepmind_layer import as_variables, deepmind_layer, variables
from helpers import (
    GOLDEN_NAMES,
    INTERFACE_KEYS,
    STATE_KEYS,
    Golden,
    as_leaves,
    load_golden,
    named,
    named_state,
)
from torch import Tensor
from torch.utils._pytree import tree_map

from dnc_reference import DNCState, Interface, MemoryState
from dnc_reference.interface import activate_interface, interface_sizes
from dnc_triton.sequence.kept import Kept
from dnc_triton.sequence.torch_memory import TorchMemory

# The operation serves one write head. What has two runs step by step; its parity is in reference/test_goldens.
ONE_WRITE_HEAD = [name for name in GOLDEN_NAMES if load_golden(name).meta["config"]["num_writes"] == 1]
CELLS = [name for name in ONE_WRITE_HEAD if name.startswith("dnc_cell_rollout_")]
ROLLOUTS = [name for name in ONE_WRITE_HEAD if name.startswith("memory_rollout_")]


def test_every_file_is_visited() -> None:
    assert len(CELLS) == 8
    assert len(ROLLOUTS) == 7


def weighted(golden: Golden, key: str, result: Tensor) -> Tensor:
    """The loss of a file."""
    return (golden.tensor(f"lossw_{key}", result.dtype) * result).sum()


def gradients(loss: Tensor, leaves: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    values = torch.autograd.grad(loss, list(leaves.values()), **options)
    return named("grad_", leaves, values)


# --- the whole network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_cell_rollout(name: str, dtype: torch.dtype, checkpoint: int | None) -> None:
    check_cell_rollout("torch_sequence", name, dtype, checkpoint)


def check_cell_rollout(backend: str, name: str, dtype: torch.dtype, checkpoint: int | None) -> None:
    """DeepMind's parameters in the layer: its softplus, its clip, its stopped gradient."""
    golden = load_golden(name)
    dnc = deepmind_layer(golden, variables(golden), batch_first=False, dtype=dtype)
    dnc.backend, dnc.checkpoint = backend, checkpoint
    hidden, cell, words = (golden.tensor(f"init_{key}", dtype) for key in ("hidden", "cell", "access_output"))
    given = DNCState(((hidden, cell),), golden.state("init_", dtype), words)
    inputs, init = as_leaves((golden.tensor("inputs", dtype), given))
    outputs, final = dnc(inputs, init)
    loss = weighted(golden, "out_y", outputs)
    leaves = {"inputs": inputs, **named_state("init_", init)}
    results = {"out_y": outputs, "loss": loss, **named_state("final_", final)}
    results |= gradients(loss, leaves | dict(dnc.named_parameters()), materialize_grads=True)
    by_parameter = [results.pop(f"grad_{parameter}") for parameter, _ in dnc.named_parameters()]
    results |= as_variables(golden, by_parameter)

    states, state = [], init
    with torch.no_grad():
        for step in inputs:
            _, state = dnc.step(step, state)
            states.append(named_state("traj_", state))
    for key in ("traj_access_output", "traj_hidden", "traj_cell", "traj_usage"):
        results[key] = torch.stack([each[key] for each in states])
    golden.check(results, without=("mid_",))


# --- the memory's part by itself --------------------------------------------------------------------------------------

# The files have activated interfaces, the sequence takes raw vectors: each activation is inverted, and each gradient
# brought back to the activated side, in float64. What that costs is measured below: some ulps, where 1e-10 is allowed.
#
# A gate that is exactly 0 or 1 has no inverse; no rollout has one, which is asserted. Read modes have one only up to a
# factor: DeepMind's, rounded to float32, sum to 1 within 4.5e-8, a softmax's to 1. A head's read weights and words are
# proportional to its modes, so they are multiplied by that sum between two steps, and the gradient of the sum is the
# part of the modes' gradient that a softmax passes on to nothing.

INVERSION_ULPS = 4  # of the largest number of a field


def raw_vectors(interface: Interface) -> Tensor:
    """[T, B, S]: what activates to an interface of a file, up to the sums of the read modes."""
    gates = ("erase_vectors", "free_gates", "allocation_gates", "write_gates")
    assert all(((x > 0) & (x < 1)).all() for x in (*(getattr(interface, name) for name in gates), interface.read_modes))
    raw = interface._replace(
        **{name: getattr(interface, name).logit() for name in gates}, read_modes=interface.read_modes.log()
    )
    return torch.cat([getattr(raw, name).flatten(2) for name in interface_sizes(1, 1, 1)], -1)


def activated_gradients(d_vectors: Tensor, interface: Interface, d_sums: Tensor) -> Interface:
    """From the gradient of the raw vectors to that of an interface as it stands in a file, with raw strengths."""
    sizes = interface_sizes(interface.read_keys.shape[2], 1, interface.read_keys.shape[3])
    fields = dict(zip(sizes, d_vectors.split(list(sizes.values()), -1), strict=True))
    d = Interface(**{name: x.view_as(getattr(interface, name)) for name, x in fields.items()})

    def through_sigmoid(name: str) -> Tensor:
        gate = getattr(interface, name)
        return getattr(d, name) / (gate * (1 - gate))

    gates = ("erase_vectors", "free_gates", "allocation_gates", "write_gates")
    d_modes = d.read_modes / interface.read_modes + d_sums.unsqueeze(-1)
    return d._replace(**{name: through_sigmoid(name) for name in gates}, read_modes=d_modes)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_what_inverting_the_activations_costs(name: str) -> None:
    interface = load_golden(name).interface("in_", torch.float64)
    steps, _, reads, word = interface.read_keys.shape
    vectors = raw_vectors(interface)
    again = activate_interface(vectors.flatten(0, 1), num_reads=reads, num_writes=1, word_size=word)
    for field in ("erase_vectors", "free_gates", "allocation_gates", "write_gates", "read_modes"):
        want = getattr(interface, field)
        if field == "read_modes":
            want = want / want.sum(-1, keepdim=True)
        off = (getattr(again, field).unflatten(0, (steps, -1)) - want).abs().max()
        assert off <= INVERSION_ULPS * torch.finfo(torch.float64).eps * want.max(), field


def torch_memory(vectors: Tensor, state: MemoryState) -> TorchMemory:
    """The memory's part as the sequence makes it, for DeepMind's code: softplus, and a stopped gradient."""
    batch, slots, word = state.memory.shape
    reads = state.read_weights.shape[1]
    *shapes, free_list = (vectors.shape[:1] + shape for shape in Kept.shapes(batch, slots, word, reads))
    kept = Kept(*map(vectors.new_empty, shapes), vectors.new_empty(free_list, dtype=torch.int64))
    sizes = dict(slots=slots, word=word, reads=reads)
    return TorchMemory(vectors, kept, **sizes, strength_offset=0.0, stop_usage_gradient=True)


def check_memory_rollout(make: Callable[[Tensor, MemoryState], Any], name: str, forced: bool) -> None:
    """Drive the memory's part through a file, forward and backward.

    Args:
        make: raw vectors and the initial state → `TorchMemory`, or what has its methods.
        name: of the file.
        forced: begin every step from the file's state.
    """
    golden = load_golden(name)
    interface = golden.interface("in_", torch.float64)
    init, trajectory = golden.state("init_", torch.float64), golden.state("traj_", torch.float64)
    if forced:
        assert len(trajectory.link) == golden.meta["T"], "a step without a link to begin from"
    sums = interface.read_modes.sum(-1, keepdim=True)  # [T, B, R, 1]
    vectors = raw_vectors(interface)
    memory = make(vectors, init)

    before, after, words, states = [init], [], [], []
    memory.begin_forward()
    for step, total in enumerate(sums):
        new = tree_map(torch.empty_like, init)
        words.append(torch.empty_like(interface.read_keys[step]))
        memory.forward(step, before[step], new, words[step], fresh=forced)
        after.append(new)
        states.append(new._replace(read_weights=new.read_weights * total))
        before.append(tree_map(lambda x, step=step: x[step], trajectory) if forced else states[step])

    loss_weights = golden.tensor("lossw_out_read_words")
    results = {"out_read_words": torch.stack(words) * sums}
    results["loss"] = (loss_weights * results["out_read_words"]).sum()
    moved = MemoryState(*(torch.stack(field) for field in zip(*states, strict=True)))
    moved = moved._replace(link=moved.link[golden.tensor("traj_link_steps", torch.long)])

    given = MemoryState(*(torch.stack(field) for field in zip(*before[:-1], strict=True)))
    d_vectors, d_sums = torch.empty_like(vectors), torch.empty_like(sums.squeeze(-1))
    memory.begin_backward(given.usage, given.read_weights, given.write_weights, d_vectors)
    d = tree_map(torch.zeros_like, init)
    for step in reversed(range(golden.meta["T"])):
        d_sums[step] = (loss_weights[step] * words[step]).sum(-1) + (d.read_weights * after[step].read_weights).sum(-1)
        d = d._replace(read_weights=d.read_weights * sums[step])
        d = memory.backward(step, before[step], after[step], loss_weights[step] * sums[step], d)
    results |= named("traj_", STATE_KEYS, moved) | named("grad_init_", STATE_KEYS, d)
    results |= named("grad_in_", INTERFACE_KEYS, activated_gradients(d_vectors, interface, d_sums))
    golden.check(results, without=("mid_",), forced=forced)


# Where rounding decides the order of slots, a second time from the file's own states: then it is the file's order.
ROLLOUT_CASES = [pytest.param(name, False, id=name) for name in ROLLOUTS] + [
    pytest.param(name, True, id=f"{name}-forced")
    for name in ROLLOUTS
    if not load_golden(name).slot_order_is_safe(torch.float64)
]


def test_the_empty_memory_is_forced() -> None:
    assert [case.values[0] for case in ROLLOUT_CASES if case.values[1]] == ["memory_rollout_B3N16W8R1K1_fresh_s202"]


@pytest.mark.parametrize(("name", "forced"), ROLLOUT_CASES)
def test_memory_rollout(name: str, forced: bool) -> None:
    check_memory_rollout(torch_memory, name, forced)
