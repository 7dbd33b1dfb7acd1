"""The layer on the kernels against the layer on the reference: outputs, states and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, columns_first, random_problem, total
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dnc_triton import DNC, DNCState, use_backend
from dnc_triton.kernels import gradients, lstm, products, step_launch
from dnc_triton.sequence import one_launch

BATCH, STEPS, INPUTS, HIDDEN, OUTPUTS = 2, 3, 3, 6, 2
SIZES = dict(memory_size=5, word_size=4, num_reads=2)
# In float64, and from a state in which no two slots are alike: what differs is in the last digits.
CLOSE = dict(rtol=1e-10, atol=1e-12)
each_backend = pytest.mark.parametrize("backend", ["triton_sequence", "triton_fused", "triton_split"])


def make(device: torch.device, **options: Any) -> DNC:
    torch.manual_seed(0)
    dnc = DNC(INPUTS, HIDDEN, OUTPUTS, **{**SIZES, "dtype": torch.float64, **options})
    with torch.no_grad():  # as torch initialises it the memory hardly matters: the gates all stand near one half
        dnc.interface.weight.mul_(4)
    return dnc.to(device)


def start(dnc: DNC, batch: int = BATCH) -> DNCState:
    """A state some steps in, whose tensors are leaves."""
    _, memory = random_problem(batch, dnc.memory_size, dnc.word_size, dnc.num_reads)
    state = dnc.initial_state(batch)._replace(memory=memory)
    weight = dnc.output.weight
    return state.map(lambda x: x.to(weight.device, weight.dtype).detach().clone().requires_grad_())


def make_inputs(dnc: DNC, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(batch, STEPS, INPUTS, generator=generator, dtype=torch.float64)
    drawn = drawn if dnc.batch_first else drawn.transpose(0, 1)
    return drawn.to(dnc.output.weight.device, dnc.output.weight.dtype).requires_grad_()


def run(dnc: DNC, inputs: Tensor, state: DNCState | None, backend: str, *, module: Any = None, **call: Any) -> Any:
    """Outputs, final state, and the gradients of parameters, inputs and initial state."""
    with use_backend(backend):
        outputs, final = (dnc if module is None else module)(inputs, state, **call)
    # Slots that have not been touched since all were empty differ by a rounding, which decides their order. Outputs,
    # which have no slots, do not depend on it.
    seen = outputs if state is None or "reset" in call else (outputs, final)
    named = {**dict(dnc.named_parameters()), "inputs": inputs}
    named |= {} if state is None else {f"state[{index}]": leaf for index, leaf in enumerate(tree_leaves(state))}
    gradients = torch.autograd.grad(total(seen), list(named.values()), materialize_grads=True)
    return {"seen": seen, **dict(zip(named, gradients, strict=True))}


RESETS = [[False, True, False], [True, False, True]]
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "as_deepmind": ({"clip": 0.1, "strength": "softplus", "stop_usage_gradient": True}, {}),
    "lstm_lengths": ({}, {"lengths": [3, 0]}),
    "lstm_reset": ({"batch_first": False}, {"reset": RESETS}),
    "lstm_all": ({"clip": 0.3, "max_activation_gradient": 0.05}, {"lengths": [3, 2], "reset": RESETS}),
}
OTHER_LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stacked": ({"num_layers": 2, "controller": "gru", "batch_first": False}, {}),
    "stacked_lstm": ({"num_layers": 3, "clip": 0.1, "max_activation_gradient": 0.1}, {"lengths": [3, 2]}),
    "lengths": ({"controller": "feedforward"}, {"lengths": [3, 1]}),
    "reset": ({"controller": "rnn"}, {"reset": RESETS}),
}


@pytest.mark.parametrize(
    ("backend", "layer", "call"),
    [
        pytest.param(backend, *case, id=f"{backend}-{name}")
        for backend in ("triton_sequence", "triton_fused", "triton_split")
        for name, case in (LAYERS if backend == "triton_sequence" else LAYERS | OTHER_LAYERS).items()
    ],
)
def test_the_layer(backend: str, layer: dict[str, Any], call: dict[str, Any], device: torch.device) -> None:
    dnc = make(device, **layer)
    if "reset" in call:
        reset = torch.tensor(call["reset"], device=device)
        call = {**call, "reset": reset if dnc.batch_first else reset.T}
    inputs, state = make_inputs(dnc), start(dnc)
    expected = run(dnc, inputs, state, "reference", **call)
    assert_close(run(dnc, inputs, state, backend, **call), expected, **CLOSE, name="")


@each_backend
def test_from_zeros(backend: str, device: torch.device) -> None:
    dnc = make(device)
    inputs = make_inputs(dnc)
    assert_close(run(dnc, inputs, None, backend), run(dnc, inputs, None, "reference"), **CLOSE, name="")


def test_named_in_the_layer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And T = 0, B = 0: nothing is launched, nothing fails."""
    dnc = make(device, backend="triton_fused")
    inputs = make_inputs(dnc)
    assert_close(dnc(inputs[:1, :1])[0], run_on_reference(dnc, inputs[:1, :1]), **CLOSE)
    for module in (gradients, lstm, one_launch, products, step_launch):
        monkeypatch.setattr(module, "launch_or_compile", None)
    for batch, steps in ((BATCH, 0), (0, STEPS)):
        part = inputs[:batch, :steps]
        assert_close(dnc(part)[0], run_on_reference(dnc, part), **CLOSE)


def run_on_reference(dnc: DNC, inputs: Tensor) -> Tensor:
    asked, dnc.backend = dnc.backend, "reference"
    outputs, _ = dnc(inputs)
    dnc.backend = asked
    return outputs


each_compiler = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@each_compiler
@each_backend
def test_compile(backend: str, compiler: str, device: torch.device) -> None:
    torch._dynamo.reset()
    dnc = make(device)
    inputs, state = make_inputs(dnc), start(dnc)
    compiled = torch.compile(dnc, fullgraph=True, backend=compiler)
    actual = run(dnc, inputs, state, backend, module=compiled)
    assert_close(actual, run(dnc, inputs, state, backend), **CLOSE, name="")


@each_backend
def test_autocast(backend: str, device: torch.device) -> None:
    """The controller's products are rounded, the memory is not: the same on either backend."""
    dnc = make(device, dtype=torch.float32)
    inputs, state = make_inputs(dnc), start(dnc)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual, expected = (run(dnc, inputs, state, name) for name in (backend, "reference"))
    outputs, final = actual["seen"]
    assert outputs.dtype == torch.bfloat16
    assert {x.dtype for x in tree_leaves(final.memory)} == {torch.float32}
    assert all((x != x.bfloat16()).any() for x in tree_leaves(final.memory))
    # What differs by a rounding of float32 may become one of bfloat16 on its way through the controller.
    assert_close(actual, expected, rtol=2e-2, atol=1e-3, name="")
    if backend == "triton_sequence":  # which has no steps to go by
        return
    # Not so after a single step, if the layer runs step by step and so rounds the same products: as one operation it
    # adds their parts in float32.
    dnc.interface.register_forward_hook(lambda *_: None)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        steps = [run_one_step(dnc, inputs, state, name) for name in (backend, "reference")]
    assert_close(*steps, rtol=1e-5, atol=1e-6)


def run_one_step(dnc: DNC, inputs: Tensor, state: DNCState, backend: str) -> DNCState:
    with use_backend(backend):
        return dnc(inputs[:, :1], state)[1]


@each_backend
def test_checkpoint(backend: str, device: torch.device) -> None:
    """The backward recomputes steps, on the backend that is in use then; here it is the same."""
    dnc = make(device)
    inputs, state = make_inputs(dnc), start(dnc)

    def checkpointed(inputs: Tensor, state: DNCState) -> Any:
        pieces = []
        for piece in inputs.split(1, dim=1):
            output, state = checkpoint(dnc, piece, state, use_reentrant=False)
            pieces.append(output)
        return torch.cat(pieces, dim=1), state

    expected = run(dnc, inputs, state, backend)
    with use_backend(backend):
        assert_close(run(dnc, inputs, state, backend, module=checkpointed), expected, **CLOSE, name="")


@pytest.mark.parametrize("backend", ["triton_fused", "triton_split"])
def test_dropout(backend: str, device: torch.device) -> None:
    """With the masks that plain PyTorch draws from the same seed."""
    dnc = make(device, num_layers=2, dropout=0.5)
    inputs, state = make_inputs(dnc), start(dnc)
    outcomes = []
    for name in (backend, "torch_sequence"):
        torch.manual_seed(2)
        outcomes.append(run(dnc, inputs, state, name))
    assert_close(*outcomes, **CLOSE, name="")


@each_backend
def test_twice_in_one_graph(backend: str, device: torch.device) -> None:
    dnc = make(device)
    inputs, state = make_inputs(dnc), start(dnc)

    def twice(inputs: Tensor, state: DNCState) -> Any:
        first, state = dnc(inputs, state)
        second, state = dnc(inputs.flip(1) * first.mean(), state)
        return torch.cat([first, second], dim=1), state

    actual, expected = (run(dnc, inputs, state, name, module=twice) for name in (backend, "reference"))
    assert_close(actual, expected, **CLOSE, name="")


@each_backend
def test_what_hooks_hand_back_may_have_other_strides(backend: str, device: torch.device) -> None:
    dnc = make(device)
    inputs, state = make_inputs(dnc), start(dnc)

    def hooked(*arguments: Any) -> Any:
        with saved_tensors_hooks(lambda x: x, columns_first):
            return dnc(*arguments)

    actual = run(dnc, inputs, state, backend, module=hooked)
    assert_close(actual, run(dnc, inputs, state, backend), **CLOSE, name="")


@each_backend
def test_in_pieces(backend: str, device: torch.device) -> None:
    dnc = make(device)
    inputs, state = make_inputs(dnc), start(dnc)

    def in_pieces(inputs: Tensor, state: DNCState) -> Any:
        first, state = dnc(inputs[:, :2], state)
        second, state = dnc(inputs[:, 2:], state)
        return torch.cat([first, second], dim=1), state

    actual = run(dnc, inputs, state, backend, module=in_pieces)
    assert_close(actual, run(dnc, inputs, state, backend), **CLOSE, name="")
