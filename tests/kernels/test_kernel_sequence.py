"""A whole sequence in one launch each way, against the oracle. The layer on it: test_kernel_layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import test_sequence_goldens
import torch
from helpers import assert_close, assert_same_bits, total
from parity import pick_layout
from test_kernel_layer import CLOSE, INPUTS, OUTPUTS, each_backend, start
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dnc_triton import DNC, DNCState, MemoryState, dispatch, explain, use_backend
from dnc_triton.kernels.layout import Layout, kept_shapes
from dnc_triton.kernels.step_launch import launch_backward, launch_forward
from dnc_triton.sequence import one_launch, op, small_product, triton_memory
from dnc_triton.sequence.product import Product
from dnc_triton.sequence.small_product import SmallProduct
from dnc_triton.sequence.triton_memory import TritonMemory

BACKEND = "triton_sequence"


def make(device: torch.device, *, hidden: int = 5, sizes: tuple[int, int, int] = (5, 4, 2), **options: Any) -> DNC:
    torch.manual_seed(0)
    slots, word, reads = sizes
    options = {"dtype": torch.float64, **options}
    dnc = DNC(INPUTS, hidden, OUTPUTS, memory_size=slots, word_size=word, num_reads=reads, **options)
    with torch.no_grad():
        dnc.interface.weight.mul_(4)
    return dnc.to(device)


def draw(dnc: DNC, steps: int, batch: int = 2) -> tuple[Tensor, DNCState]:
    drawn = torch.randn(batch, steps, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = dnc.output.weight
    return drawn.to(weight.device, weight.dtype).requires_grad_(), start(dnc, batch)


def run(dnc: DNC, inputs: Tensor, state: DNCState, backend: str, **call: Any) -> dict[str, Any]:
    """Outputs, final state, and the gradients of parameters, inputs and initial state."""
    with use_backend(backend):
        outputs, final = dnc(inputs, state, **call)
    named = dict(dnc.named_parameters()) | {f"state[{i}]": leaf for i, leaf in enumerate(tree_leaves(state))}
    named["inputs"] = inputs
    gradients = torch.autograd.grad(total(outputs, final), list(named.values()), materialize_grads=True)
    return {"outputs": outputs, "final": final, **dict(zip(named, gradients, strict=True))}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that was not written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("sizes", "hidden", "steps"),
    [
        ((1, 1, 1), 1, 3),
        ((5, 6, 3), 20, 3),
        ((16, 16, 4), 64, 2),
        ((48, 12, 1), 32, 2),
        ((64, 32, 4), 33, 2),
        ((100, 20, 3), 9, 2),
        ((128, 64, 8), 128, 1),
    ],
    ids=str,
)
def test_sizes(sizes: tuple[int, int, int], hidden: int, steps: int, device: torch.device) -> None:
    dnc = make(device, hidden=hidden, sizes=sizes)
    inputs, state = draw(dnc, steps)
    with poisoned():
        actual = run(dnc, inputs, state, BACKEND)
    assert_close(actual, run(dnc, inputs, state, "reference"), **CLOSE, name="")


@pytest.mark.parametrize(
    ("backend", "checkpoint", "spread"),
    [(BACKEND, None, False), ("triton_fused", 2, False), ("triton_split", None, False), ("triton_split", 2, True)],
)
def test_lengths_and_resets_leave_nothing_unwritten(
    backend: str, checkpoint: int | None, spread: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end early, or never run, and rows that begin anew, one of them with a spoilt state; NaN for padding.

    And, in the steps' own kernels, NaN around the zeros that stand for the state of rows that begin anew: no earlier
    step lies before these zeros.
    """
    layouts: list[Layout] = []

    def surrounded(launch: Any) -> Any:
        def call(*arguments: Any, zeros: Tensor, **options: Any) -> None:
            buffer = torch.full_like(zeros, torch.nan).repeat(1 + 2 * 128)
            middle = buffer[128 * zeros.numel() :][: zeros.numel()].zero_()
            layouts.append(options["layout"])
            launch(*arguments, zeros=middle, **options)

        return call

    monkeypatch.setattr(triton_memory, "launch_forward", surrounded(launch_forward))
    monkeypatch.setattr(triton_memory, "launch_backward", surrounded(launch_backward))
    if spread:
        monkeypatch.setattr(dispatch, "layouts", lambda slots: [pick_layout("spread", slots)])
    dnc = make(device, clip=0.4, checkpoint=checkpoint)
    inputs, state = draw(dnc, 4, batch=4)
    reset = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool, device=device)
    call = {"lengths": [4, 0, 2, 3], "reset": reset}
    with torch.no_grad():
        for leaf in tree_leaves(state):
            leaf[3] = torch.nan
    expected = run(dnc, inputs, state, "reference", **call)
    with torch.no_grad():
        inputs[1], inputs[2, 2:], inputs[3, 3:] = torch.nan, torch.nan, torch.nan
    with poisoned():
        assert_close(run(dnc, inputs, state, backend, **call), expected, **CLOSE, name="")
    assert {layout.spread for layout in layouts} == (set() if backend == BACKEND else {spread})


@pytest.mark.parametrize("put_back", ["lengths", "reset"])
def test_small_products_where_rows_are_put_back(
    put_back: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those rows keep the output layer's gradient of the words, which a product may otherwise add ahead."""
    monkeypatch.setattr(small_product, "MOST_WORK", {device.type: 2**20})
    dnc = make(device)
    inputs, state = draw(dnc, 3)
    reset = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.bool, device=device)
    call = {"lengths": [3, 2]} if put_back == "lengths" else {"reset": reset}
    packings = []
    monkeypatch.setattr(SmallProduct, "__init__", lambda *given: (packings.append(given), Product.__init__(*given))[1])
    actual, expected = (run(dnc, inputs, state, name, **call) for name in ("triton_split", "reference"))
    assert_close(actual, expected, **CLOSE, name="")
    assert packings


@pytest.mark.parametrize("backend", ["torch_sequence", "triton_fused", BACKEND])
def test_a_clip_lets_through_what_is_at_its_bound(backend: str, device: torch.device) -> None:
    dnc = make(device, clip=0.5)
    with torch.no_grad():
        dnc.output.weight.zero_()
        dnc.output.bias.copy_(torch.tensor([-0.5, 0.5]))
    inputs, state = draw(dnc, 2)
    actual, expected = (run(dnc, inputs, state, name) for name in (backend, "reference"))
    assert_close(actual, expected, **CLOSE, name="")
    assert (actual["outputs"].abs() == 0.5).all()


@pytest.mark.parametrize("backend", ["triton_fused", "triton_split"])
def test_a_row_that_has_ended_does_not_grow(backend: str, device: torch.device) -> None:
    """Whatever its link is: the weights' gradients are those of the steps that run, and nothing else."""
    dnc = make(device)
    inputs, state = draw(dnc, 12)
    with torch.no_grad():
        state.memory.link[0] = 1e30
    actual, expected = (run(dnc, inputs, state, name, lengths=[0, 12]) for name in (backend, "reference"))
    assert_close(actual, expected, **CLOSE, name="")


@pytest.mark.parametrize("backend", [BACKEND, "triton_fused"])
def test_a_clip_stops_infinite_gradients(backend: str, device: torch.device) -> None:
    dnc = make(device, clip=1e-9)
    inputs, _ = draw(dnc, 2)
    with use_backend(backend):
        outputs, _ = dnc(inputs)
    parameters = [x for name, x in dnc.named_parameters() if name != "output.bias"]
    for gradient in torch.autograd.grad(torch.inf * outputs.sum(), [inputs, *parameters]):
        assert not gradient.any()  # a NaN is not zero


@pytest.mark.parametrize(
    ("sizes", "hidden", "steps"),
    [
        ((16, 8, 2), 16, 5),
        ((5, 6, 3), 16, 3),
        pytest.param((48, 20, 8), 16, 2, marks=pytest.mark.slow),  # in the interpreter
        pytest.param((100, 32, 4), 16, 2, marks=pytest.mark.slow),
    ],
)
def test_float32(sizes: tuple[int, int, int], hidden: int, steps: int, device: torch.device) -> None:
    """At most twice as far from the oracle in float64 as the oracle in float32 is."""
    exact, dnc = make(device, sizes=sizes, hidden=hidden), make(device, sizes=sizes, hidden=hidden).float()
    (inputs, state), (inputs32, state32) = draw(exact, steps), draw(dnc, steps)
    expected = run(exact, inputs, state, "reference")
    by_oracle, actual = (run(dnc, inputs32, state32, backend) for backend in ("reference", BACKEND))
    for name, values in expected.items():
        for want, theirs, ours in zip(*map(tree_leaves, (values, by_oracle[name], actual[name])), strict=True):
            allowed = 2 * (theirs - want).abs().max() + 1e-6 * want.abs().max() + 1e-7
            assert (ours - want).abs().max() <= allowed, name


@each_backend
@pytest.mark.parametrize("steps", [0, 1, 2, 7, pytest.param(50, marks=pytest.mark.slow)])
def test_every_length(steps: int, backend: str, device: torch.device) -> None:
    dnc = make(device)
    inputs, state = draw(dnc, steps, batch=2 if steps < 7 else 1)  # in the interpreter
    with poisoned():
        actual = run(dnc, inputs, state, backend)
    assert_close(actual, run(dnc, inputs, state, "reference"), **CLOSE, name="")


@each_backend
def test_a_reset_to_an_initial_state_of_ones_own(backend: str, device: torch.device) -> None:
    """The kernels know only zeros: with those of a step the layer runs step by step; one launch declines."""
    dnc = make(device)
    inputs, state = draw(dnc, 2)
    begin = dnc.initial_state
    dnc.initial_state = lambda batch: begin(batch).map(torch.ones_like)  # type: ignore[method-assign]
    call = {"reset": torch.tensor([[False, True], [True, False]], device=device)}
    if backend == BACKEND:
        with pytest.raises(RuntimeError, match="user's own"):
            run(dnc, inputs, state, backend, **call)
    else:
        assert_close(run(dnc, inputs, state, backend, **call), run(dnc, inputs, state, "reference", **call), **CLOSE)


def test_a_row_does_not_depend_on_the_others_and_twice_is_the_same(device: torch.device) -> None:
    dnc = make(device, backend=BACKEND)
    inputs, state = draw(dnc, 3, batch=3)
    outputs, final = dnc(inputs, state)
    assert_same_bits(dnc(inputs, state), (outputs, final))
    alone, final_alone = dnc(inputs[1:2], state.map(lambda x: x[1:2]))
    # The products over all steps may sum in another order for another number of rows.
    assert_close(alone, outputs[1:2], rtol=1e-13, atol=1e-15)
    assert_close(final_alone, final.map(lambda x: x[1:2]), rtol=1e-12, atol=1e-15)
    twice = [run(dnc, inputs, state, BACKEND) for _ in range(2)]
    assert_same_bits(*twice)


def test_an_empty_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched."""
    monkeypatch.setattr(one_launch, "launch_or_compile", None)
    dnc = make(device, backend=BACKEND)
    outputs, _ = dnc(torch.empty(0, 3, INPUTS, dtype=torch.float64, device=device))
    assert outputs.shape == (0, 3, OUTPUTS)


@pytest.mark.parametrize("backend", [BACKEND, "triton_split", pytest.param("triton_fused", marks=pytest.mark.slow)])
def test_opcheck(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is registered as torch wants it: schema, fake, autograd, all through `torch.compile`."""
    calls: list[tuple[Any, ...]] = []
    sequence = op._sequence
    monkeypatch.setattr(op, "_sequence", lambda *arguments: calls.append(arguments) or sequence(*arguments))
    monkeypatch.setattr(op, "is_eager", lambda tensors: False)
    # What is never written would not compare in two runs: the history past lengths, what fills buffers to 16 bytes.
    dnc = make(device, hidden=4, sizes=(8, 4, 2), backend=backend)
    inputs, state = draw(dnc, 2)
    dnc(inputs, state, reset=torch.eye(2, dtype=torch.bool, device=device))
    torch.library.opcheck(sequence, calls[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"controller": "gru"}, "the controller is 'gru', the kernel has an LSTM in it"),
        ({"num_layers": 2}, "num_layers is 2, one launch for a sequence goes up to 1"),
        ({"hidden": 129}, "hidden_size is 129, one launch for a sequence goes up to 128"),
        ({"sizes": (129, 4, 1)}, "memory_size is 129, one launch for a sequence goes up to 128"),
        ({"sizes": (4, 65, 1)}, "word_size is 65, one launch for a sequence goes up to 64"),
        ({"sizes": (4, 1, 17)}, "num_reads is 17, the kernels go up to 16"),
        ({"num_writes": 2}, "num_writes is 2, its backward is written for 1"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16, it takes float32 and float64"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(",")[0],
)
def test_declines(options: dict[str, Any], reason: str, device: torch.device) -> None:
    dnc = make(device, **options)
    inputs = torch.zeros(1, 2, INPUTS, dtype=dnc.output.weight.dtype, device=device)
    assert f"triton_sequence declines: {reason}" in explain(dnc, inputs)
    dnc.backend = BACKEND
    with pytest.raises(RuntimeError, match=f"does not serve this call: {reason}"):
        dnc(inputs)


# In `make test` one whose clip acts, and one with a single slot.
QUICK = ("B2N16W8R2", "B2N1W4R1")
# Of those of the memory alone the one from an empty memory, and one with a single slot.
QUICK_ROLLOUTS = ("B3N16W8R1K1_fresh", "B2N1W4R1")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if any(size in name for size in QUICK) else pytest.mark.slow)
        for name in test_sequence_goldens.CELLS
    ],
)
def test_deepminds_rollouts(name: str) -> None:
    test_sequence_goldens.check_cell_rollout(BACKEND, name, torch.float64, None)


@pytest.mark.parametrize("layout", [pytest.param("fused", marks=pytest.mark.slow), "split"])  # in the interpreter
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if any(size in name for size in QUICK_ROLLOUTS) else pytest.mark.slow)
        for name in test_sequence_goldens.ROLLOUTS
    ],
)
def test_deepminds_memory_rollouts(name: str, layout: str) -> None:
    """The kernels of a step, one after another as in a sequence, without the controller.

    Of the empty memory's rollout only what has no slots is compared, also if each step began from the file's state: its
    usages come as close as 2e-15, and in float64 the kernels tell them apart down to 6e-14 (`sort_key`).
    """

    def triton_memory(vectors: Tensor, state: MemoryState) -> TritonMemory:
        batch, slots, _ = state.memory.shape
        reads = state.read_weights.shape[1]
        shapes = zip(kept_shapes(batch, slots, reads), (torch.float64, torch.int32), strict=True)
        kept = [vectors.new_empty((len(vectors), *shape), dtype=dtype) for shape, dtype in shapes]
        options = dict(reads=reads, strength_offset=0.0, stop_usage_gradient=True)
        return TritonMemory(vectors, kept, state.memory, **options, layout=pick_layout(layout, slots))

    test_sequence_goldens.check_memory_rollout(triton_memory, name, forced=False)
