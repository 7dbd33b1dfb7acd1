"""Random calls with which candidates are measured and checked: what runs, and what is found wrong. Here on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import small_layer
import torch
from torch import Tensor

import dnc_reference
from dnc_reference import DNCCell, DNCState, Interface, MemoryState
from dnc_triton import trial
from dnc_triton.dispatch import BACKENDS
from dnc_triton.problem import Problem
from dnc_triton.trial import Check, Expected, WrongResult

PROBLEM = replace(small_layer.PROBLEM, batch=3, steps=5)  # run as a batch of the power of two above it, 4
STEP = replace(PROBLEM, controller=None)
OWN = replace(PROBLEM, controller="custom")
REFERENCE = BACKENDS["reference"]
GIVEN = (*Interface._fields, *MemoryState._fields)


# --- what runs


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("controller", ["lstm", "gru", "custom", None], ids=str)
def test_what_runs_is_the_problem(
    controller: str | None, needs_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On random data of the size, with a backward where one is needed."""
    problem = replace(PROBLEM, controller=controller, needs_gradient=needs_gradient)
    drawn: list[Tensor] = []

    def make(function: Callable, *arguments: Any, **keywords: Any) -> Any:
        """While another thread draws from the generator that all share: its numbers must not come again."""
        drawn.append(torch.rand(1))
        return function(*arguments, **keywords)

    for name in ("DNCCell", "_draw"):
        monkeypatch.setattr(trial, name, partial(make, getattr(trial, name)))
    expected = torch.Generator().set_state(torch.get_rng_state())
    run = trial.random_call(problem, 8)
    assert torch.cat(drawn).equal(torch.cat([torch.rand(1, generator=expected) for _ in drawn]))
    assert torch.equal(torch.get_rng_state(), expected.get_state())
    is_sequence, seen = controller in ("lstm", "gru"), []

    def spy(*arguments: object, **keywords: object) -> object:
        result = getattr(REFERENCE, trial.tried_as(problem))(*arguments, **keywords)
        seen.append((arguments, keywords, result))
        return result

    with torch.set_grad_enabled(needs_gradient):
        run(spy)
    (((first, *rest), keywords, result),) = seen
    state = rest[1].memory if is_sequence else rest[0]
    assert state.memory.shape == (4, problem.memory_size, problem.word_size)
    assert result[0].requires_grad == needs_gradient
    assert all(tensor.min() >= 0 and tensor.max() <= 1 for tensor in state)
    assert all((weights.sum(-1) <= 1).all() for weights in (state.read_weights, state.write_weights))
    if is_sequence:
        assert rest[0].shape == (8, 4, problem.hidden_size)
        assert (first.controller_kind, first.hidden_size, first.num_layers) == (controller, problem.hidden_size, 1)
    heads = dict(num_reads=problem.num_reads, num_writes=1, strength="oneplus") if controller == "custom" else {}
    assert keywords == (dict(checkpoint="auto") if is_sequence else {**heads, "stop_usage_gradient": False})


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("problem", [PROBLEM, STEP, OWN], ids=["sequence", "step", "own"])
def test_a_backward_runs_where_gradients_are_needed(
    problem: Problem, needs_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sequence with respect to the parameters, of a step with respect to all that it is given."""
    asked: list[tuple[Tensor | None, ...]] = []
    exact = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **options: asked.append(exact(*given, **options)))
    run = trial.random_call(replace(problem, needs_gradient=needs_gradient), 8)
    run(getattr(REFERENCE, trial.tried_as(problem)))
    assert len(asked) == needs_gradient
    given = {"unroll": len(run.parameters), "memory_step": len(GIVEN), "interface_step": 1 + len(MemoryState._fields)}
    for gradients in asked:
        assert len(gradients) == given[trial.tried_as(problem)]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("problem", [PROBLEM, STEP, OWN], ids=["sequence", "step", "own"])
def test_fewer_rows_have_the_same_numbers(problem: Problem) -> None:
    """In another dtype too: what is compared must be computed from the same."""
    problem = replace(problem, dtype=torch.bfloat16)
    whole = trial.random_call(problem, 3)
    part = trial.random_call(problem, 3, rows=slice(None, None, 3), dtype=torch.float64)
    for name, tensor in whole.rows.items():
        assert part.rows[name].dtype == torch.float64
        assert part.rows[name].equal(tensor[::3].double()), name
    for name, tensor in whole.parameters.items():
        assert part.parameters[name].equal(tensor.double()), name


# --- what is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "change", [{}, dict(needs_gradient=False), dict(batch=1, steps=1), dict(batch=0, steps=0)], ids=str
)
@pytest.mark.parametrize("controller", ["lstm", "feedforward", "custom", None], ids=str)
def test_plain_pytorch_is_right(controller: str | None, change: dict, dtype: torch.dtype) -> None:
    problem = replace(PROBLEM, controller=controller, dtype=dtype, **change)
    check = Check(problem)
    for name in ("reference", "torch_sequence"):
        if BACKENDS[name].supports(problem)[0]:
            check(getattr(BACKENDS[name], trial.tried_as(problem)))
    exact, given = check.expected.exact, check.expected.draw()
    gradients = {name for name in exact if name.startswith("the gradient of ")}
    names = {f"the gradient of {name}" for name in given.rows | given.parameters}
    assert gradients == (names if problem.needs_gradient else set())
    assert {"read_words", *MemoryState._fields} <= set(exact)
    assert all(result.isfinite().all() for result in exact.values())


@pytest.mark.parametrize("size", [(1, 1, 1), (300, 5, 3), (64, 130, 16)], ids=str)
def test_rounding_is_far_from_what_is_wrong(size: tuple[int, int, int]) -> None:
    """In float32 by a factor of ten, at least: another compiler, or another GPU, rounds otherwise. Kernels in
    test_kernel_check.py."""
    sizes = dict(zip(("memory_size", "word_size", "num_reads"), size, strict=True))
    expected = Expected(replace(PROBLEM, **sizes), seed=0)
    expected.allowed = {name: allowed / 10 for name, allowed in expected.allowed.items()}
    assert expected.compare(BACKENDS["torch_sequence"].unroll) is None


def multiply_in_tf32(library: torch.library.Library) -> None:
    """Let matrix products round their factors as GPUs do where TF32 is allowed: to 11 bits."""

    def rounded(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(rounded(a), rounded(b), out=a.new_empty(a.shape[0], b.shape[1]))

    def addmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return beta * added + alpha * mm(a, b)

    for function in (mm, addmm):
        library.impl(function.__name__, function, "CPU")


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("change", [{}, dict(batch=1, steps=1), dict(controller="gru", num_layers=2)], ids=str)
def test_with_tf32_what_is_right_is_right(change: dict) -> None:
    """Training scripts often allow it. The reference is then off as well."""
    check = Check(replace(PROBLEM, **change))
    check(BACKENDS["torch_sequence"].unroll)
    exact = {name: float(allowed) for name, allowed in check.expected.allowed.items()}
    with torch.library._scoped_library("aten", "IMPL") as library:
        multiply_in_tf32(library)
        check = Check(replace(PROBLEM, **change))
        check(BACKENDS["torch_sequence"].unroll)
    allowed = {name: float(allowed) for name, allowed in check.expected.allowed.items()}
    assert all(allowed[name] > 1.2 * exact[name] for name in ("outputs", "the gradient of interface.weight"))


# --- what is wrong


def _skew(gradient: Tensor) -> Tensor:
    """Off by a hundredth of its largest number, in the last row alone."""
    wrong = gradient.clone()
    wrong[-1].view(-1)[0] += 0.01 * gradient.abs().max()
    return wrong


class _Skewed(torch.autograd.Function):
    """The same, with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _skew(gradient)


@pytest.fixture(scope="module")
def step_check() -> Check:
    return Check(STEP)


@pytest.mark.parametrize("name", GIVEN)
def test_a_wrong_gradient_is_found(name: str, step_check: Check) -> None:
    def step(interface: Interface, state: MemoryState, **keywords: Any) -> tuple[Tensor, MemoryState]:
        if name in interface._fields:
            interface = interface._replace(**{name: _Skewed.apply(getattr(interface, name))})
        else:
            state = state._replace(**{name: _Skewed.apply(getattr(state, name))})
        return dnc_reference.memory_step(interface, state, **keywords)

    with pytest.raises(WrongResult, match=rf"^wrong results: the gradient of {name} off by .*, where .* is allowed$"):
        step_check(step)


def test_what_is_wrong_with_a_controller_of_ones_own_is_found() -> None:
    """It is tried from the raw interface vector, which the kernels activate."""

    def wrong_gradient(vector: Tensor, *given: Any, **keywords: Any) -> tuple[Tensor, MemoryState]:
        return dnc_reference.interface_step(_Skewed.apply(vector), *given, **keywords)

    def wrong_activation(*given: Any, **keywords: Any) -> tuple[Tensor, MemoryState]:
        return dnc_reference.interface_step(*given, **{**keywords, "strength": "softplus"})

    check = Check(OWN)
    with pytest.raises(WrongResult, match="gradient of interface off by"):
        check(wrong_gradient)
    with pytest.raises(WrongResult, match="off by"):
        check(wrong_activation)


@pytest.mark.parametrize("wrong", [0.01, float("nan")], ids=str)
@pytest.mark.parametrize("name", ["read_words", *MemoryState._fields])
def test_a_wrong_result_is_found(name: str, wrong: float, step_check: Check) -> None:
    """In one number of one row."""

    def step(*given: Any, **keywords: Any) -> tuple[Tensor, MemoryState]:
        read_words, state = dnc_reference.memory_step(*given, **keywords)
        results = {"read_words": read_words, **state._asdict()}
        offset = torch.zeros_like(results[name])
        offset[-1].view(-1)[-1] = wrong * results[name].detach().abs().max()
        results[name] = results[name] + offset
        return results.pop("read_words"), MemoryState(**results)

    with pytest.raises(WrongResult, match=f"wrong results: {name} off by "):
        step_check(step)


def test_a_usage_gradient_that_stops_is_found(step_check: Check) -> None:
    with pytest.raises(WrongResult, match=r"gradient of .* off by"):
        step_check(lambda *given, **keywords: dnc_reference.memory_step(*given, stop_usage_gradient=True))


@pytest.fixture(scope="module")
def sequence_check() -> Check:
    return Check(PROBLEM)


CARRIED = ("read_words", *MemoryState._fields, "controller 0", "controller 1")


def change(state: DNCState, name: str, function: Callable[[Tensor], Tensor]) -> DNCState:
    """A state with one of its tensors changed."""
    if name in MemoryState._fields:
        return state._replace(memory=state.memory._replace(**{name: function(getattr(state.memory, name))}))
    if name == "read_words":
        return state._replace(read_words=function(state.read_words))
    ((hidden, cell),) = state.controller
    return state._replace(controller=((function(hidden), cell) if name.endswith("0") else (hidden, function(cell)),))


@pytest.mark.parametrize(
    ("dtype", "steps", "checked"),
    [(torch.float32, 9, 5), (torch.float64, 2, 2), (torch.float32, 0, 1), (torch.bfloat16, 5, 1)],
    ids=str,
)
def test_so_many_steps_are_checked(dtype: torch.dtype, steps: int, checked: int) -> None:
    seen = []

    def unroll(cell: DNCCell, inputs: Tensor, begin: DNCState, **keywords: Any) -> tuple[Tensor, DNCState]:
        seen.append(len(inputs))
        return REFERENCE.unroll(cell, inputs, begin, **keywords)

    Check(replace(PROBLEM, dtype=dtype, steps=steps)).launch(unroll)
    assert seen == [checked]


@pytest.mark.parametrize("name", ["outputs", *CARRIED])
def test_a_wrong_result_of_a_sequence_is_found(name: str, sequence_check: Check) -> None:
    def unroll(*given: Any, **keywords: Any) -> tuple[Tensor, DNCState]:
        outputs, end = REFERENCE.unroll(*given, **keywords)
        if name == "outputs":
            return outputs * 1.01, end
        return outputs, change(end, name, lambda x: x * 1.01)

    with pytest.raises(WrongResult, match=f"wrong results: {name} off by"):
        sequence_check(unroll)


@pytest.mark.parametrize("name", ["inputs", *CARRIED, *dict(trial.random_call(PROBLEM).parameters)])
def test_a_wrong_gradient_of_a_sequence_is_found(name: str, sequence_check: Check) -> None:
    def unroll(cell: DNCCell, inputs: Tensor, begin: DNCState, **keywords: Any) -> tuple[Tensor, DNCState]:
        if name in CARRIED:
            begin = change(begin, name, _Skewed.apply)
        elif name == "inputs":
            inputs = _Skewed.apply(inputs)
        else:
            cell.get_parameter(name).register_hook(_skew)
        return REFERENCE.unroll(cell, inputs, begin, **keywords)

    with pytest.raises(WrongResult, match=f"wrong results: the gradient of {name} off by"):
        sequence_check(unroll)


def test_what_is_right_with_other_numbers_is_right() -> None:
    """Two slots may be used so equally that rounding decides which is written to; not every time."""
    wrong, seen = 1, []

    def step(interface: Interface, state: MemoryState, **keywords: Any) -> tuple[Tensor, MemoryState]:
        seen.append(state.usage)
        read_words, new_state = dnc_reference.memory_step(interface, state, **keywords)
        return read_words + (len(seen) <= wrong), new_state

    check = Check(STEP)
    check(step)
    assert len(seen) == 2
    assert not seen[0].equal(seen[1])
    wrong = 100
    with pytest.raises(WrongResult, match="read_words"):
        check(step)


def test_what_seems_wrong_is_not_right_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For other numbers: it is not known to be wrong either, so that it may be checked another time."""

    def expected(problem: Problem, seed: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(*given: Any, **keywords: Any) -> tuple[Tensor, MemoryState]:
        read_words, state = dnc_reference.memory_step(*given, **keywords)
        return read_words + 1, state

    check = Check(STEP)
    monkeypatch.setattr(trial, "Expected", expected)
    check(REFERENCE.memory_step)
    with pytest.raises(RuntimeError, match=r"read_words off by .* there is no memory .*: CUDA out of memory") as raised:
        check(wrong)
    assert not isinstance(raised.value, torch.OutOfMemoryError)


WIDE = dict(memory_size=200, word_size=16, num_reads=4, hidden_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", [replace(PROBLEM, **WIDE), replace(STEP, **WIDE)], ids=["sequence", "step"])
def test_nothing_may_be_off_by_as_much_as_there_is(problem: Problem, dtype: torch.dtype) -> None:
    """Weights are a thousandth of what is read, gradients of links less than that of others: each is seen by itself."""
    expected = trial.Expected(replace(problem, dtype=dtype), seed=0)
    # Gradients of a sequence in 16 bits are told from rounding only where they are not much smaller than others.
    rough = problem.controller is not None and dtype.itemsize == 2
    share = {
        name: float(expected.allowed[name] / result.abs().max())
        for name, result in expected.exact.items()
        if not (rough and name.startswith("the gradient"))
    }
    assert len(share) >= 8
    assert max(share.values()) < 0.1, max(share, key=share.__getitem__)


def test_no_two_that_are_given_are_alike() -> None:
    """Nor zero: what is mixed up, or left out, would not show."""
    for problem in (replace(PROBLEM, num_layers=2), replace(STEP, num_reads=1, word_size=5)):
        given = trial.random_call(problem, 3)
        flat = [tensor.detach().flatten()[:5] for tensor in (given.rows | given.parameters).values()]
        assert all(x.any() for x in flat)
        assert not any(x.equal(y) for i, x in enumerate(flat) for y in flat[:i] if x.shape == y.shape)


@pytest.mark.parametrize(
    "pair",
    [
        ("erase_vectors", "write_vectors"),
        ("write_keys", "write_vectors"),
        ("precedence", "write_weights"),
        ("allocation_gates", "write_gates"),
    ],
    ids=str,
)
def test_what_is_mixed_up_is_found(pair: tuple[str, str], step_check: Check) -> None:
    def step(interface: Interface, state: MemoryState, **keywords: Any) -> tuple[Tensor, MemoryState]:
        given, (to, of) = interface._asdict() | state._asdict(), pair
        given[to] = given[of]
        mixed = [Interface(*map(given.get, Interface._fields)), MemoryState(*map(given.get, MemoryState._fields))]
        return dnc_reference.memory_step(*mixed, **keywords)

    with pytest.raises(WrongResult):
        step_check(step)
