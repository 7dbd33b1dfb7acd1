"""The kernels against what DeepMind's own code computed: one step, from the same state, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from deepmind_layer import as_variables, deepmind_layer, variables
from helpers import GOLDEN_NAMES, INTERFACE_KEYS, STATE_KEYS, as_leaves, load_golden, named, named_state
from parity import margins, pick_layout
from torch import Tensor
from torch.utils._pytree import tree_map

from dnc_reference import DNCState, MemoryState
from dnc_reference.addressing import softplus
from dnc_triton import memory_step
from dnc_triton.ops.kernel_step import kernel_memory_step

STEPS = [name for name in GOLDEN_NAMES if name.startswith("memory_step_") and "K1_" in name]
LAYOUTS = ("triton_fused", "triton_split", "spread")
# Each file goes through all three: in float32 through one of them, where it can be, in float64 through the others.
CASES = [
    pytest.param(
        name,
        dtype,
        backend,
        id=f"{name}-{dtype}-{backend}",
        marks=pytest.mark.slow if number == 2 and load_golden(name).meta["config"]["memory_size"] > 16 else (),
    )
    for index, name in enumerate(STEPS)
    for number, dtype in enumerate((torch.float32, torch.float64, torch.float64))
    for dtype in [dtype if load_golden(name).comparable(dtype) else torch.float64]
    for backend in [LAYOUTS[(index + number) % len(LAYOUTS)]]
]


def test_every_variant_is_visited() -> None:
    variants = {name.split("K1_")[1].rsplit("_", 1)[0] for name in STEPS}
    assert variants >= {"generic", "fresh", "zerowarm", "ties", "saturated", "gates01", "bigstrength", "tinyscale"}
    assert variants >= {"usage01", "zerokeys", "keyrows", "writegate0"}
    assert len(STEPS) == 24


@pytest.mark.parametrize(("name", "dtype", "backend"), CASES)
def test_memory_step(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    golden = load_golden(name)
    with margins() as around:
        given = golden.interface("in_", dtype), golden.state("prev_", dtype)
        raw, prev = as_leaves(tree_map(lambda x: around.copy(x.to(device)), given))
        # The files keep strengths as the controller gives them, everything else as the memory takes it.
        interface = raw._replace(
            read_strengths=softplus(raw.read_strengths), write_strengths=softplus(raw.write_strengths)
        )
        if backend == "spread":
            layout = pick_layout("spread", golden.meta["config"]["memory_size"])
            read_words, new = kernel_memory_step(interface, prev, stop_usage_gradient=True, layout=layout)
        else:
            read_words, new = memory_step(interface, prev, stop_usage_gradient=True, backend=backend)
        results = {"out_read_words": read_words, **named("next_", STATE_KEYS, new)}
        loss = weighted(golden, results)
        strengths = {
            "act_read_strengths": interface.read_strengths,
            "act_write_strengths": interface.write_strengths,
        }
        leaves = {**named("in_", INTERFACE_KEYS, raw), **named("prev_", STATE_KEYS, prev), **strengths}
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    results |= {"loss": loss, **strengths, **named("grad_", leaves, gradients)}
    golden.check(tree_map(torch.Tensor.cpu, results), without=("mid_",))


def weighted(golden, results: dict[str, Tensor]) -> Tensor:
    """The loss of a file: its weights times its results."""
    terms = [(golden.tensor(f"lossw_{key}", x.dtype).to(x.device) * x).sum() for key, x in results.items()]
    return torch.stack(terms).sum()


# --- over several steps: what one step hands to the next, forward and backward


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("memory_rollout_B2N1W4R1K1_warm_s208", "triton_fused"),
        ("memory_rollout_B3N16W8R1K1_warm_s201", "triton_split"),
    ],
)
def test_memory_rollout(name: str, backend: str, device: torch.device) -> None:
    golden = load_golden(name)
    given = golden.interface("in_", torch.float64), golden.state("init_", torch.float64)
    raw, init = as_leaves(tree_map(lambda x: x.to(device), given))
    state, words, states = init, [], []
    for step in range(golden.meta["T"]):
        interface = tree_map(lambda x, step=step: x[step], raw)
        interface = interface._replace(
            read_strengths=softplus(interface.read_strengths), write_strengths=softplus(interface.write_strengths)
        )
        read_words, state = memory_step(interface, state, stop_usage_gradient=True, backend=backend)
        words.append(read_words)
        states.append(state)
    results = {"out_read_words": torch.stack(words)}
    loss = weighted(golden, results)
    trajectory = MemoryState(*(torch.stack(field) for field in zip(*states, strict=True)))
    steps = torch.as_tensor(golden.arrays["traj_link_steps"])
    trajectory = trajectory._replace(link=trajectory.link[steps])
    leaves = {**named("in_", INTERFACE_KEYS, raw), **named("init_", STATE_KEYS, init)}
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    results |= {"loss": loss, **named("traj_", STATE_KEYS, trajectory), **named("grad_", leaves, gradients)}
    golden.check(tree_map(torch.Tensor.cpu, results), without=("mid_",))


@pytest.mark.parametrize("backend", ["triton_fused"])
def test_cell_rollout(backend: str, device: torch.device) -> None:
    """DeepMind's parameters in the layer: its softplus, its clip, its stopped gradient, and the raw interface."""
    golden = load_golden("dnc_cell_rollout_B2N1W4R1K1_warm_clipNone_s310")
    dnc = deepmind_layer(golden, variables(golden), batch_first=False, dtype=torch.float64).to(device)
    dnc.backend = backend
    hidden, cell, read_words = (golden.tensor(f"init_{key}") for key in ("hidden", "cell", "access_output"))
    given = golden.tensor("inputs"), DNCState(((hidden, cell),), golden.state("init_", torch.float64), read_words)
    inputs, init = as_leaves(tree_map(lambda x: x.to(device), given))
    outputs, final = dnc(inputs, init)
    results = {"out_y": outputs, **named_state("final_", final)}
    loss = weighted(golden, {"out_y": outputs})
    leaves = {"inputs": inputs, **named_state("init_", init)}
    parameters = list(dnc.parameters())
    gradients = torch.autograd.grad(loss, [*leaves.values(), *parameters], materialize_grads=True)
    results |= {"loss": loss, **named("grad_", leaves, gradients[: len(leaves)])}
    results |= as_variables(golden, [gradient.cpu() for gradient in gradients[len(leaves) :]])
    golden.check(tree_map(torch.Tensor.cpu, results), without=("mid_", "traj_"))
