"""The kernels as an operator of PyTorch: how it is registered, differentiated, transformed, and what it declines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import as_leaves, assert_close, assert_same_bits, columns_first, random_interface, random_problem, total
from parity import Case, beside_16_bytes, draw, launches_of_aligned, pick_layout, run_kernels
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import dnc_reference
from dnc_reference import Interface, MemoryState
from dnc_triton import memory_step
from dnc_triton.dispatch import BACKENDS
from dnc_triton.ops.kernel_step import _step, _step_backward
from dnc_triton.problem import Problem

CLOSE = dict(rtol=1e-12, atol=1e-14)
each_backend = pytest.mark.parametrize("backend", ["triton_fused", "triton_split"])


def leaves(device: torch.device, batch: int = 2, **changes: Any) -> tuple[Interface, MemoryState]:
    """In float64, with leaves that want a gradient."""
    sizes = dict(slots=5, word=3, reads=2) | changes
    return as_leaves(tree_map(lambda x: x.to(device), random_problem(batch, **sizes)))


def gradients(outputs: Any, inputs: Any, **options: Any) -> list[Tensor]:
    """With respect to all inputs, of a sum in which every number has a weight of its own."""
    return list(torch.autograd.grad(total(outputs), tree_leaves(inputs), materialize_grads=True, **options))


# --- registration


@pytest.mark.parametrize(("layout", "interface"), [("fused", "oneplus"), ("split", "activated")])
def test_opcheck(layout: str, interface: str, device: torch.device) -> None:
    case = Case(2, 5, 3, 2, "float64", layout, interface)
    given = tree_map(lambda x: x.to(device), draw(case))
    vector, state = given[0], given.state
    if isinstance(vector, Interface):
        vector = torch.cat([x.flatten(1) for x in vector], dim=1)  # in any order: nothing is compared here
    arguments = (interface != "activated", 1.0, False, [int(x) for x in pick_layout(layout, 5)])
    torch.library.opcheck(_step, (vector.requires_grad_(), *as_leaves(state), *arguments))
    torch.library.opcheck(_step, (vector.detach(), *state, *arguments))
    words, memory, usage, link, precedence, read_weights, write_weights, kept, free_list = _step(
        vector.detach(), *state, *arguments
    )
    results = [memory, usage, read_weights, write_weights, kept, free_list]
    sent_back = [words, memory, usage, link, precedence, read_weights, write_weights]
    torch.library.opcheck(_step_backward, (vector.detach(), list(state), results, sent_back, *arguments))


# --- derivatives


@pytest.mark.parametrize(
    ("case", "fast"),
    [
        pytest.param(Case(1, 3, 1, 1, "float64", "fused", "oneplus"), False, marks=pytest.mark.slow),
        (Case(1, 4, 3, 2, "float64", "split", "activated"), True),
        (Case(1, 18, 2, 2, "float64", "fused", "softplus"), True),
    ],
    ids=str,
)
def test_gradcheck(case: Case, fast: bool, device: torch.device) -> None:
    inputs = tree_map(lambda x: x.to(device).requires_grad_(), draw(case, tie=False)[:2])
    flat, layout = tree_leaves(inputs), pick_layout(case.layout, case.slots)

    def step(*tensors: Tensor) -> list[Tensor]:
        fields, state = tensors[:-6], MemoryState(*tensors[-6:])
        interface = Interface(*fields) if case.interface == "activated" else fields[0]
        return tree_leaves(run_kernels(interface, state, layout=layout, **case.options))

    assert torch.autograd.gradcheck(step, flat, fast_mode=fast)


@each_backend
def test_second_derivatives_raise(backend: str, device: torch.device) -> None:
    interface, state = leaves(device)
    first = gradients(memory_step(interface, state, backend=backend), (interface, state), create_graph=True)
    with pytest.raises(RuntimeError, match=r"^second derivatives: expected backend='reference'"):
        gradients(first, (interface, state))


@each_backend
@pytest.mark.parametrize("used", ["read_words", *MemoryState._fields])
def test_a_loss_of_one_output(used: str, backend: str, device: torch.device) -> None:
    """Autograd then has nothing to send back for the others."""
    interface, state = leaves(device)

    def one(results: tuple[Tensor, MemoryState]) -> Tensor:
        return results[0] if used == "read_words" else getattr(results[1], used)

    # Without `materialize_grads`, a missing gradient is None.
    actual = gradients(one(memory_step(interface, state, backend=backend)), (interface, state))
    expected = gradients(one(dnc_reference.memory_step(interface, state)), (interface, state))
    assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("wanted", ["read_modes", "write_keys", "memory", "write_weights"])
def test_a_gradient_of_one_input(wanted: str, device: torch.device) -> None:
    interface, state = tree_map(torch.Tensor.detach, leaves(device))
    leaf = getattr(interface if hasattr(interface, wanted) else state, wanted).requires_grad_()
    read_words, new = memory_step(interface, state, backend="triton_fused")
    assert all(x.requires_grad for x in (read_words, *new))
    expected = dnc_reference.memory_step(interface, state)
    assert_close(gradients((read_words, new), leaf), gradients(expected, leaf), **CLOSE)


def test_no_gradient_wanted(device: torch.device) -> None:
    interface, state = leaves(device)
    with torch.no_grad():
        results = memory_step(interface, state, backend="triton_fused")
    assert not any(x.requires_grad for x in tree_leaves(results))
    with torch.inference_mode():
        inferred = memory_step(interface, state, backend="triton_fused")
    assert_same_bits(tree_map(torch.clone, inferred), results)


@each_backend
def test_used_twice(backend: str, device: torch.device) -> None:
    """One state goes into two steps, one result into two losses, and backward runs twice."""
    interface, state = leaves(device)
    other = tree_map(lambda x: x.to(device), random_interface(2, 3, 2, seed=9))

    def two_steps(step: Callable[..., Any]) -> tuple[Any, ...]:
        first = step(interface, state)
        return first, step(interface, first[1]), step(other, state), first[0].square()

    results = two_steps(lambda *arguments: memory_step(*arguments, backend=backend))
    actual = gradients(results, (interface, state), retain_graph=True)
    assert_close(actual, gradients(two_steps(dnc_reference.memory_step), (interface, state)), **CLOSE)
    assert_same_bits(gradients(results, (interface, state)), actual)


@each_backend
@pytest.mark.parametrize("changed", ["input", "result"])
def test_what_the_backward_needs_may_not_change(changed: str, backend: str, device: torch.device) -> None:
    interface, state = leaves(device)
    before = tree_map(torch.clone, state)
    read_words, new = memory_step(interface, before, backend=backend)
    (before if changed == "input" else new).memory.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(read_words, (interface, state))


@each_backend
def test_what_hooks_hand_back_may_have_other_strides(backend: str, device: torch.device) -> None:
    given = leaves(device)
    expected = gradients(memory_step(*given, backend=backend), given)
    with saved_tensors_hooks(lambda x: x, columns_first):
        results = memory_step(*given, backend=backend)
    assert_close(gradients(results, given), expected, **CLOSE)


# --- transformations


@each_backend
def test_checkpoint(backend: str, device: torch.device) -> None:
    interface, state = leaves(device)
    plain = memory_step(interface, state, backend=backend)
    again = checkpoint(memory_step, interface, state, backend=backend, use_reentrant=False)
    assert_same_bits(again, plain)
    assert_same_bits(gradients(again, (interface, state)), gradients(plain, (interface, state)))


SLOW = [("triton_fused", "aot_eager"), ("triton_fused", "inductor"), ("triton_split", "inductor")]


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [("triton_split", "aot_eager"), *(pytest.param(*which, marks=pytest.mark.slow) for which in SLOW)],
)
def test_compile(backend: str, compiler: str, device: torch.device) -> None:
    torch._dynamo.reset()

    def two_steps(interface: Interface, state: MemoryState) -> Any:
        read_words, state = memory_step(interface, state, backend=backend)
        return read_words.tanh(), memory_step(interface, state, stop_usage_gradient=True, backend=backend)

    compiled = torch.compile(two_steps, fullgraph=True, backend=compiler)
    for batch in (2, 3):  # the second time with a batch size that is not a constant
        given = leaves(device, batch)
        actual, expected = compiled(*given), two_steps(*given)
        assert_close(actual, expected, **CLOSE)
        assert_close(gradients(actual, given), gradients(expected, given), **CLOSE)


@each_backend
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    interface, state = tree_map(lambda x: x.detach().float().requires_grad_(), leaves(device))
    expected = memory_step(interface, state, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = memory_step(interface, state, backend=backend)
    assert_same_bits(actual, expected)
    assert_same_bits(gradients(actual, (interface, state)), gradients(expected, (interface, state)))


def test_nothing_is_aliased(device: torch.device) -> None:
    """Not even where nothing changes: with no write and no reading, memory, usage and precedence stay as they are."""
    interface, state = tree_map(torch.Tensor.detach, leaves(device))
    interface = interface._replace(write_gates=torch.zeros_like(interface.write_gates))
    _, new = memory_step(interface, state, backend="triton_fused")
    assert_same_bits(new.memory, state.memory)
    storages = {x.untyped_storage().data_ptr() for x in tree_leaves((interface, state))}
    assert not storages & {x.untyped_storage().data_ptr() for x in new}


@each_backend
def test_what_does_not_begin_at_16_bytes(backend: str, device: torch.device) -> None:
    """Parts of one buffer, for example: kernels are compiled for aligned ones, so these are copied. Gradients too."""
    given = leaves(device)
    read_words, new = memory_step(*given, backend="reference")
    expected = gradients((read_words, new), given)
    given = tree_map(beside_16_bytes, given)
    with launches_of_aligned():
        results = memory_step(*given, backend=backend)
        assert_close(gradients(results, given, retain_graph=True), expected, **CLOSE, name="")
        sent_back = [beside_16_bytes(torch.ones_like(x)) for x in results[1]]
        torch.autograd.grad(list(results[1]), tree_leaves(given), sent_back)


# --- what is declined


def asked_for(slots: int, word: int, reads: int, writes: int, dtype: torch.dtype = torch.float32) -> Any:
    shapes = Interface.shapes(1, word, reads, writes)
    interface = Interface(**{name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
    return interface, MemoryState.zeros(1, slots, word, reads, writes, dtype=dtype)


@pytest.mark.parametrize(
    ("backend", "sizes", "reason"),
    [
        ("triton_fused", (5, 3, 1, 2), "num_writes is 2, the kernels go up to 1"),
        ("triton_split", (5, 3, 1, 2), "num_writes is 2, the kernels go up to 1"),
        ("triton_fused", (129, 3, 1, 1), "memory_size is 129, one program per batch element goes up to 128"),
        ("triton_split", (2049, 3, 1, 1), "memory_size is 2049, the kernels go up to 2048"),
        ("triton_fused", (5, 257, 1, 1), "word_size is 257, the kernels go up to 256"),
        ("triton_split", (5, 257, 1, 1), "word_size is 257, the kernels go up to 256"),
        ("triton_fused", (5, 3, 17, 1), "num_reads is 17, the kernels go up to 16"),
        ("triton_split", (5, 3, 17, 1), "num_reads is 17, the kernels go up to 16"),
    ],
)
def test_declines(backend: str, sizes: tuple[int, int, int, int], reason: str) -> None:
    with pytest.raises(RuntimeError, match=f"^backend '{backend}', .*: {reason}$"):
        memory_step(*asked_for(*sizes), backend=backend)
    assert_same_bits(memory_step(*asked_for(*sizes)), dnc_reference.memory_step(*asked_for(*sizes)))


def test_declines_what_is_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    for backend in ("triton_fused", "triton_split"):
        with pytest.raises(RuntimeError, match="device is the CPU, and TRITON_INTERPRET=1 is not set"):
            memory_step(*asked_for(5, 3, 1, 1), backend=backend)


@pytest.mark.parametrize(("backend", "slots"), [("triton_fused", 128), ("triton_split", 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_serves_up_to_the_limits(backend: str, slots: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64:  # whose sort has 10 bits for the slot
        slots = min(slots, 1024)
    sizes = dict(memory_size=slots, word_size=256, num_reads=16, num_writes=1)
    call = dict(device=torch.device("cpu"), dtype=dtype, batch=1, steps=1, controller=None, needs_gradient=True)
    asked = Problem(**sizes, **call)
    assert BACKENDS[backend].supports(asked) == (True, "interpreted, which is slow: for tests")
    reason = f"memory_size is {slots + 1}, "
    assert reason in BACKENDS[backend].supports(replace(asked, memory_size=slots + 1))[1]
    declined = replace(asked, dtype=torch.float8_e5m2)
    assert BACKENDS[backend].supports(declined) == (
        False,
        f"dtype is {declined.dtype}, the kernels take float32, bfloat16, float16 and float64",
    )
