"""How the arguments of a sequence by kernels may lie in memory, and that nothing beside them is touched."""

from __future__ import annotations

import copy
import math
from itertools import cycle
from typing import Any

import pytest
import torch
from helpers import as_leaves, assert_close, assert_same_bits, negated_when_read, replace_parameters, total
from parity import Margins, beside_16_bytes, launches_in_margins, launches_of_aligned
from test_kernel_layer import CLOSE, INPUTS, OUTPUTS, each_backend
from test_kernel_sequence import BACKEND, draw, make, poisoned, run
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dnc_reference import MemoryState
from dnc_triton import dispatch, layer, use_backend
from dnc_triton.kernels.layout import Layout, default_layout, is_shared, kept_shapes
from dnc_triton.kernels.step_launch import count_zeros, launch_backward, launch_forward
from dnc_triton.sequence import one_launch, small_product, triton_memory
from dnc_triton.sequence.triton_memory import TritonMemory


@pytest.mark.parametrize(
    ("backend", "options", "call"),
    [
        ("triton_split", {}, {}),
        ("triton_split", dict(checkpoint=2), dict(lengths=[3, 0, 2])),
        pytest.param("triton_fused", dict(checkpoint=2), {}, marks=pytest.mark.slow),
        (BACKEND, {}, {}),
        ("torch_sequence", {}, {}),
    ],
)
def test_zeros_of_one_element_for_all(
    backend: str, options: dict[str, Any], call: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bits as zeros for every element. The kernels of a step read them as they are; others get copies."""
    dnc = make(device, **options)
    inputs, _ = draw(dnc, 3, batch=3)
    forwards: list[tuple[bool, bool]] = []  # of each step, whether memory and link before it are shared
    backwards: list[tuple[bool, bool, bool]] = []  # and whether the gradient after it is

    def alone(tensor: Tensor) -> Tensor:
        """NaN where elements would stand if it were not shared."""
        if not is_shared(tensor):
            return tensor
        buffer = torch.full_like(tensor, torch.nan, memory_format=torch.contiguous_format)
        buffer[0] = tensor[0]
        return buffer[:1].expand_as(tensor)

    def forward(interface: Tensor, state: tuple[Tensor, ...], *others: Any, **options: Any) -> None:
        memory, _, link, *_ = state
        forwards.append((is_shared(memory), is_shared(link)))
        launch_forward(interface, tuple(map(alone, state)), *others, **options)

    def backward(
        interface: Tensor,
        state: tuple[Tensor, ...],
        result: tuple[Tensor, ...],
        given: tuple[Tensor, ...],
        *others: Any,
        **options: Any,
    ) -> None:
        (memory, _, link, *_), (_, d_memory, *_) = state, given
        backwards.append((is_shared(memory), is_shared(link), is_shared(d_memory)))
        launch_backward(interface, tuple(map(alone, state)), result, tuple(map(alone, given)), *others, **options)

    monkeypatch.setattr(triton_memory, "launch_forward", forward)
    monkeypatch.setattr(triton_memory, "launch_backward", backward)

    def gradients(*, shared: bool) -> Any:
        forwards.clear()
        backwards.clear()
        monkeypatch.setattr(layer, "SHARED", {device.type: [5] if shared else []})
        with use_backend(backend):
            outputs, last = dnc(inputs, **call)
        loss = outputs.square().sum()
        if not shared:  # a gradient of the last state that is zeros, but exists
            loss = loss + sum((0 * x).sum() for x in tree_leaves(last))
        return outputs, torch.autograd.grad(loss, [inputs, *dnc.parameters()])

    with poisoned():
        actual = gradients(shared=True)
    if backend in ("triton_split", "triton_fused"):
        assert forwards[0] == (True, True)
        assert not any(map(any, forwards[1:3]))
        assert backwards[-1] == (True, True, False)
        # Rows that have ended keep the gradient of their last state, so it must exist in full.
        assert [d_shared for *_, d_shared in backwards] == ["lengths" not in call, False, False]
    assert_same_bits(actual, gradients(shared=False))
    assert not any(map(any, forwards + backwards))


def test_a_state_of_one_element_for_all(device: torch.device) -> None:
    """As an initial state that is learned may be."""
    dnc = make(device)
    inputs, state = draw(dnc, 3, batch=3)
    memory, link = (x[:1].detach().requires_grad_() for x in (state.memory.memory, state.memory.link))

    def gradients(backend: str) -> Any:
        fields = state.memory._replace(memory=memory.expand(3, -1, -1), link=link.expand(3, -1, -1, -1))
        with use_backend(backend):
            outputs, final = dnc(inputs, state._replace(memory=fields))
        return outputs, torch.autograd.grad(total(outputs, final), [memory, link, inputs, *dnc.parameters()])

    with poisoned():
        actual = gradients("triton_split")
    assert_close(actual, gradients("reference"), **CLOSE, name="")


@pytest.mark.parametrize("batch", [1, 3, 16, 17])
def test_marks_are_aligned_at_each_step(batch: int) -> None:
    """Otherwise the kernels would be compiled twice."""
    vectors, memory = torch.zeros(3, batch, 30), torch.zeros(batch, 5, 4)
    kept = [vectors.new_empty(3, *shape) for shape in kept_shapes(batch, 5, 2)]
    options: dict[str, Any] = dict(reads=2, strength_offset=1.0, stop_usage_gradient=False)
    running = torch.arange(3).unsqueeze(1) < torch.arange(batch) % 4
    reset = (torch.arange(batch * 3) % 5 == 0).view(batch, 3).T & running
    memory_part = TritonMemory(vectors, kept, memory, running, reset, **options, layout=default_layout(5))
    marks = memory_part.marks
    assert marks is not None
    assert all(step.is_contiguous() and step.data_ptr() % 16 == 0 for step in marks)
    lost = torch.cat([reset[1:], reset.new_zeros(1, batch)])
    assert marks[:, :batch].tolist() == (reset * 1 + ~running * 2 + lost * 4).tolist()


@pytest.mark.parametrize("sizes", [(5, 3, 2), (3, 7, 2), (2, 3, 4)], ids=["slots", "words", "heads"])
def test_there_are_zeros_for_the_largest_field_of_a_state(sizes: tuple[int, int, int]) -> None:
    """The memory, the link or the read weights, whichever of the sizes is the largest."""
    assert count_zeros(*sizes) == max(map(math.prod, MemoryState.shapes(1, *sizes).values()))


STRIDES = ["transposed", "gaps", "expanded"]


@each_backend
@pytest.mark.parametrize("turn", range(3))
def test_strided_inputs_and_nothing_is_written_to(turn: int, backend: str, device: torch.device) -> None:
    """Inputs and each part of the state lie in one way or another, among NaN; in three turns, in every way."""
    dnc = make(device)
    around, strides = Margins(), cycle(STRIDES[turn:] + STRIDES[:turn])
    with torch.no_grad():
        drawn = draw(dnc, 2 if STRIDES[turn] == "gaps" else 1)
        inputs, state = tree_map(lambda x: around.copy(x, next(strides)), drawn)
    inputs, state = tree_map(torch.Tensor.requires_grad_, (inputs, state))
    contiguous, before = as_leaves((inputs, state)), copy.deepcopy(dnc.state_dict())
    actual = run(dnc, inputs, state, backend)
    assert_close(actual, run(dnc, *contiguous, "reference"), **CLOSE, name="")
    around.check()
    assert_same_bits((inputs, state, dnc.state_dict()), (*contiguous, before))
    given = {x.untyped_storage().data_ptr() for x in (inputs, *tree_leaves(state), *dnc.parameters())}
    assert not given & {x.untyped_storage().data_ptr() for x in tree_leaves((actual["outputs"], actual["final"]))}


@each_backend
def test_what_is_negated_when_it_is_read(backend: str, device: torch.device) -> None:
    """Like the imaginary part of a conjugate, which has the other sign in memory."""
    dnc = make(device)
    inputs, state = draw(dnc, 2)
    expected = run(dnc, inputs, state, "reference")
    replace_parameters(dnc, negated_when_read)
    inputs, state = tree_map(lambda x: negated_when_read(x).requires_grad_(), (inputs, state))
    assert all(x.is_neg() for x in (inputs, *tree_leaves(state), *dnc.parameters()))
    assert_close(run(dnc, inputs, state, backend), expected, **CLOSE, name="")


@each_backend
def test_what_does_not_begin_at_16_bytes(backend: str, device: torch.device) -> None:
    """Parts of one buffer, for example: kernels are compiled for aligned ones, so these are copied. Weights too.

    Unaligned ones would be added up in another order by the backward of one launch, and a graph has copies elsewhere.
    """
    dnc = make(device)
    inputs, state = draw(dnc, 2)
    expected = run(dnc, inputs, state, "reference")
    replace_parameters(dnc, beside_16_bytes)
    with launches_of_aligned():
        actual = run(dnc, *tree_map(beside_16_bytes, (inputs, state)), backend)
    assert_close(actual, expected, **CLOSE, name="")


def test_a_gradient_that_does_not_begin_at_16_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor inputs, which the kernel for the weights' gradients reads where they lie."""
    monkeypatch.setattr(one_launch, "MOST_ROWS", {device.type: 2**10})
    dnc = make(device, dtype=torch.float32, batch_first=False)
    inputs = torch.randn(2, 3, INPUTS, device=device)
    sent_back = torch.randn(2, 3, OUTPUTS, device=device)

    def gradients(inputs: Tensor, sent_back: Tensor, backend: str) -> Any:
        with use_backend(backend):
            return torch.autograd.grad(dnc(inputs)[0], list(dnc.parameters()), sent_back)

    expected = gradients(inputs, sent_back, "reference")
    with launches_of_aligned():
        actual = gradients(beside_16_bytes(inputs), beside_16_bytes(sent_back), BACKEND)
    assert_close(actual, expected, rtol=1e-5, atol=1e-6, name="")


@pytest.mark.parametrize(("backend", "small"), [(BACKEND, False), ("triton_fused", True), ("triton_split", False)])
def test_strided_parameters(backend: str, small: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the kernels take the addresses alone."""
    monkeypatch.setattr(small_product, "MOST_WORK", {device.type: 2**20 * small})
    dnc = make(device)
    inputs, state = draw(dnc, 2)
    expected = run(dnc, inputs, state, "reference")
    replace_parameters(dnc, lambda x: torch.stack([torch.full_like(x, torch.nan), x], -1)[..., 1])
    assert not any(parameter.is_contiguous() for parameter in dnc.parameters())
    assert_close(run(dnc, inputs, state, backend), expected, **CLOSE, name="")


SEQUENCE = {"sequence_forward_kernel", "sequence_backward_kernel"}
STEP = {"step_forward_kernel", "step_backward_kernel", "lstm_backward_kernel"}
PRODUCTS = {"product_kernel", "lstm_product_forward_kernel", "lstm_product_backward_kernel"}


@pytest.mark.parametrize(
    ("backend", "small", "kernels", "dtype"),
    [
        pytest.param(*case, dtype, id=f"{name}-{dtype}", marks=pytest.mark.slow if slow else ())
        for dtype in (torch.float32, torch.float64)
        for name, case in {
            "one launch": (BACKEND, False, SEQUENCE),
            "one launch, weights": (BACKEND, True, SEQUENCE | {"weight_gradients_kernel"}),
            "LSTM": ("triton_fused", False, STEP | {"lstm_forward_kernel"}),
            "products": ("triton_fused", True, STEP | PRODUCTS),
        }.items()
        for slow in [dtype == torch.float64 and name != "one launch, weights"]
    ],
)
def test_nothing_beside_a_buffer_is_touched(
    backend: str, small: bool, kernels: set[str], dtype: torch.dtype, device: torch.device
) -> None:
    """In float32 with a row that ends, and rows that begin anew. Of two layers only the highest has the interface.

    The kernel for the weights' gradients sums in float32, and leaves other dtypes to the library.
    """
    dnc = make(device, dtype=dtype, clip=0.4, num_layers=1 if backend == BACKEND else 2)
    inputs, state = draw(dnc, 2)
    call: dict[str, Any] = {}
    if dtype == torch.float32:
        call = {"lengths": [2, 1], "reset": torch.tensor([[False, True], [True, False]], device=device)}
    with poisoned(), launches_in_margins() as around, pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_product, "MOST_WORK", {device.type: 2**20 * small})
        patch.setattr(one_launch, "MOST_ROWS", {device.type: 2**10 * small})
        actual = run(dnc, inputs, state, backend, **call)
    assert around.seen == (kernels if dtype == torch.float32 else kernels - {"weight_gradients_kernel"})
    close = CLOSE if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    assert_close(actual, run(dnc, inputs, state, "reference", **call), **close, name="")


def test_one_launch_with_other_tiles_backward(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work space is made for these; no layout of one launch has them yet."""
    layout = Layout(True, 2, 16, 1, whole_sequence=True, backward_rows=16)
    monkeypatch.setattr(dispatch, "sequence_layouts", lambda slots, word: [layout])
    dnc = make(device, sizes=(16, 1, 2))
    inputs, state = draw(dnc, 1)
    with launches_in_margins():
        actual = run(dnc, inputs, state, BACKEND)
    assert_close(actual, run(dnc, inputs, state, "reference"), **CLOSE, name="")
