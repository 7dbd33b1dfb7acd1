"""Random calls of a problem's size, with which candidates are checked and measured; never with the caller's numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import dnc_reference
from dnc_reference import DNCCell, DNCState, Interface, MemoryState
from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.layout import LINK_EVERY
from dnc_triton.problem import Problem

Operation = Callable[..., tuple[Tensor, MemoryState] | tuple[Tensor, DNCState]]
Draw = Callable[[str, tuple[int, ...]], Tensor]  # name, shape → random numbers from 0 to 1, in the problem's dtype

# A check looks at so few steps that what the oracle keeps in float64 fits beside the rest. In 16 bits at a single one:
# what it stores of the usage decides, by its rounding, which slot the next one writes to.
CHECKED_STEPS = LINK_EVERY + 1  # so that two links are kept, and those in between replayed
DRAWS = 3  # of random numbers, until a candidate is right
# A candidate may be off by so many times what the reference is off in the arithmetic of the kernels, and by half of the
# digits of a result's largest number. How precise the kernels are is for the tests to say.
ALLOWED = 2.0
# Any may be off by so many roundings of the largest, of results or of gradients: what should be zero is rounding alone.
NOISE = 4

GRADIENT = "the gradient of "


class WrongResult(Exception):
    """A candidate does not compute what the reference does."""


@dataclass(frozen=True)
class Trial:
    """A call of a candidate on random numbers.

    Attributes:
        call: candidate → its results by name, each with a row for each batch element.
        seen: the results that the loss of a backward sees.
        rows: what the call is given for each batch element, by name.
        parameters: what it is given for all of them; empty for a step.
        needs_gradient: whether there is a backward.
        draw: where the numbers come from.
    """

    call: Callable[[Operation], dict[str, Tensor]]
    seen: tuple[str, ...]
    rows: dict[str, Tensor]
    parameters: dict[str, Tensor]
    needs_gradient: bool
    draw: Draw

    def __call__(self, operation: Operation) -> None:
        """What is measured: a call, and the gradients that a training asks for."""
        found = self.call(operation)
        if self.needs_gradient:
            results = [found[name] for name in self.seen]
            wanted = [*(self.parameters or self.rows).values()]
            torch.autograd.grad(results, wanted, [torch.ones_like(result) for result in results], allow_unused=True)


class Check:
    """Whether candidates compute what the reference does, on the device itself.

    A compiler may be wrong for one GPU alone, and in one version alone. Compared are, for the first and the last
    element of the batch, what is read, the new state, a sequence's outputs, and gradients with respect to all that a
    call is given, and to parameters. No `lengths`, no `reset`, nothing that is replayed.

    Args:
        problem: the call.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.expected = Expected(problem, seed=0)

    def __call__(self, operation: Operation) -> None:
        """Check a candidate: with other numbers once more if it seems wrong, as rounding can change the order of slots.

        Raises:
            WrongResult: it is wrong, every time; the message says in what, by how much, and what is allowed.
            RuntimeError: it seems wrong, and there is no memory for other numbers.
        """
        if (wrong := self.expected.compare(operation)) is None:
            return
        try:
            for seed in range(1, DRAWS):
                if (wrong := Expected(self.problem, seed).compare(operation)) is None:
                    return
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"{wrong}; there is no memory to try other numbers: {error}") from None
        raise WrongResult(wrong)

    def launch(self, operation: Operation) -> None:
        """Launch what a check launches, whatever comes of it: so that it compiles ahead."""
        self.expected.compare(operation)


class Expected:
    """What the reference makes of random numbers.

    Args:
        problem: the call.
        seed: another one gives other numbers.

    Attributes:
        exact: what the first and the last row of results and gradients should be, by name; in float64.
        allowed: by how much each may be off.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        arithmetic = torch.promote_types(problem.dtype, torch.float32)
        steps = min(power_of_two(problem.steps), CHECKED_STEPS if arithmetic == problem.dtype else 1)
        self.ends = slice(None, None, max(1, power_of_two(problem.batch) - 1))
        self.problem, self.draw = problem, partial(random_call, problem, steps, seed=seed)
        self.exact, rounded = (
            _results(self.draw(rows=self.ends, dtype=dtype), _reference(problem), slice(None))
            for dtype in (torch.float64, arithmetic)
        )
        half = math.sqrt(torch.finfo(problem.dtype).eps)
        self.allowed: dict[str, Tensor] = {}
        for kind in (False, True):  # results, gradients
            exact = {name: result for name, result in self.exact.items() if name.startswith(GRADIENT) == kind}
            if not exact:
                continue
            # In 16 bits a sequence rounds its interface, too, to which gradients of some fields owe all their digits.
            rounds = problem.dtype if kind and measures_sequence(problem) else arithmetic
            share = max(NOISE * torch.finfo(arithmetic).eps, torch.finfo(rounds).eps)
            noise = share * torch.stack([_largest(result) for result in exact.values()]).max()
            self.allowed |= {
                name: ALLOWED * _largest(rounded[name] - result) + half * _largest(result) + noise
                for name, result in exact.items()
            }

    def compare(self, operation: Operation) -> str | None:
        """What is wrong with a candidate, if anything is."""
        found = _results(self.draw(), operation, self.ends)
        off = torch.stack([_largest(found[name] - result) for name, result in self.exact.items()])
        compared = torch.stack([off, torch.stack([*map(self.allowed.__getitem__, self.exact)])])
        compared = compared.to("cpu", non_blocking=True)
        wait_for(self.problem.device)
        for name, (by, allowed) in zip(self.exact, compared.T.tolist(), strict=True):
            if not by <= allowed:  # NaN is wrong, too
                return f"wrong results: {name} off by {by:.2g}, where {allowed:.2g} is allowed"
        return None


def wait_for(device: torch.device) -> None:
    """Wait for what a device was told. Waiting for the whole device would end another thread's capture, and waiting for
    a stream may be forbidden (`torch.cuda.set_sync_debug_mode`); waiting for an event is not."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).record_event().synchronize()


def tried_as(problem: Problem) -> str:
    """The operation as which a problem is tried, by its name in `dnc_reference`: "unroll"; "memory_step"; or
    "interface_step", of which a sequence with a controller of the user's own has many."""
    return {None: "memory_step", "custom": "interface_step"}.get(problem.controller, "unroll")


def measures_sequence(problem: Problem) -> bool:
    """Whether a problem is tried as a sequence; else as a step."""
    return tried_as(problem) == "unroll"


def power_of_two(size: int) -> int:
    """The next one from a size on, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def random_call(
    problem: Problem, steps: int = 1, *, rows: slice = slice(None), dtype: torch.dtype | None = None, seed: int = 0
) -> Trial:
    """A call of a problem's size, and of as many batch elements as the next power of two.

    Args:
        problem: the call.
        steps: of the sequence, if it `measures_sequence`.
        rows: only these of the batch elements, with the same numbers.
        dtype: of the arithmetic; the numbers are those of the problem's dtype.
        seed: another one gives other numbers.
    """
    make = _random_sequence if measures_sequence(problem) else _random_step
    return make(problem, steps, rows, dtype or problem.dtype, partial(_draw, problem, seed))


def _random_step(problem: Problem, steps: int, rows: slice, dtype: torch.dtype, draw: Draw) -> Trial:
    """A `memory_step`, or an `interface_step`."""
    batch, heads = power_of_two(problem.batch), dict(num_reads=problem.num_reads, num_writes=problem.num_writes)
    interface: Any
    if tried_as(problem) == "memory_step":
        shapes = Interface.shapes(batch, problem.word_size, **heads)
        interface = Interface(**{name: draw(name, shape)[rows].to(dtype) for name, shape in shapes.items()})
        given, options = interface._asdict(), {}
    else:
        size = sum(interface_sizes(**heads, word_size=problem.word_size).values())
        interface = (4 * draw("interface", (batch, size)) - 2)[rows].to(dtype)
        given, options = {"interface": interface}, {**heads, "strength": "oneplus"}
    state = _random_state(problem, rows, dtype, draw)
    given |= state._asdict()
    for tensor in given.values():
        tensor.requires_grad_(problem.needs_gradient)

    def call(step: Any) -> dict[str, Tensor]:
        read_words, new_state = step(interface, state, **options, stop_usage_gradient=False)
        return {"read_words": read_words, **new_state._asdict()}

    return Trial(call, ("read_words", *state._fields), given, {}, problem.needs_gradient, draw)


def _random_sequence(problem: Problem, steps: int, rows: slice, dtype: torch.dtype, draw: Draw) -> Trial:
    """An `unroll`.

    Inputs and outputs have the controller's size: any backend multiplies them in one product, so that decides nothing.
    """
    size, batch = problem.hidden_size, power_of_two(problem.batch)
    assert problem.controller is not None
    cell = DNCCell(
        size,
        size,
        size,
        memory_size=problem.memory_size,
        word_size=problem.word_size,
        num_reads=problem.num_reads,
        num_writes=problem.num_writes,
        controller=problem.controller,
        num_layers=problem.num_layers,
        device="meta",
        dtype=dtype,
    ).to_empty(device=problem.device)
    with torch.no_grad():  # a parameter's own initialisation would use generators that other threads use
        for name, parameter in cell.named_parameters():
            parameter.copy_((2 * draw(name, parameter.shape) - 1) / math.sqrt(size))
    zeros = cell.initial_state(batch)
    tensors, structure = tree_flatten(zeros.controller)
    tensors = [draw(f"controller {index}", x.shape)[rows].to(dtype) for index, x in enumerate(tensors)]
    read_words = draw("read_words", zeros.read_words.shape)[rows].to(dtype)
    begin = DNCState(tree_unflatten(tensors, structure), _random_state(problem, rows, dtype, draw), read_words)
    inputs = draw("inputs", (steps, batch, size)).transpose(0, 1)[rows].to(dtype)

    def call(unroll: Any) -> dict[str, Tensor]:
        outputs, end = unroll(cell, inputs.transpose(0, 1), begin, checkpoint="auto")
        return {"outputs": outputs.transpose(0, 1), **_by_name(end)}

    given = {"inputs": inputs, **_by_name(begin)}
    return Trial(call, ("outputs",), given, dict(cell.named_parameters()), problem.needs_gradient, draw)


def _by_name(state: DNCState) -> dict[str, Tensor]:
    controller = {f"controller {index}": x for index, x in enumerate(tree_leaves(state.controller))}
    return {"read_words": state.read_words, **state.memory._asdict(), **controller}


def _random_state(problem: Problem, rows: slice, dtype: torch.dtype, draw: Draw) -> MemoryState:
    """Weights and links are divided by N, so that weights sum to less than 1 and all stays in range.

    Slots are used so differently, and were written to so little, that rounding does not change their order.
    """
    sizes = (problem.memory_size, problem.word_size, problem.num_reads, problem.num_writes)
    shapes = MemoryState.shapes(power_of_two(problem.batch), *sizes)
    drawn = MemoryState(**{name: draw(name, shape)[rows] for name, shape in shapes.items()})
    drawn = drawn._replace(usage=drawn.usage.argsort(-1) + 0.5, write_weights=drawn.write_weights / 4)
    divided = {name: x if name == "memory" else x / problem.memory_size for name, x in drawn._asdict().items()}
    return MemoryState(**{name: x.to(problem.dtype).to(dtype) for name, x in divided.items()})


def _draw(problem: Problem, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator(problem.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    drawn = torch.rand(shape, generator=generator, device=problem.device, dtype=torch.float32)
    return drawn.to(problem.dtype)


def _reference(problem: Problem) -> Operation:
    def unroll(*given: Any, checkpoint: str) -> tuple[Tensor, DNCState]:
        return dnc_reference.unroll(*given)  # keeps every step

    return unroll if measures_sequence(problem) else getattr(dnc_reference, tried_as(problem))


def _results(trial: Trial, operation: Operation, rows: slice) -> dict[str, Tensor]:
    """Some rows of what a call returns, and gradients of a loss that sees only these; in float64."""
    for tensor in trial.rows.values():
        tensor.requires_grad_(trial.needs_gradient)
    found = trial.call(operation)
    results = {name: result.detach()[rows].double() for name, result in found.items()}
    if not trial.needs_gradient:
        return results
    weights = []  # of the loss
    for name in trial.seen:
        weights.append(torch.zeros_like(found[name]))
        weights[-1][rows] = (trial.draw(f"loss {name}", weights[-1][rows].shape) - 0.5).to(weights[-1].dtype)
    given, seen = trial.rows | trial.parameters, [found[name] for name in trial.seen]
    gradients = torch.autograd.grad(seen, list(given.values()), weights, allow_unused=True, materialize_grads=True)
    for name, gradient in zip(given, gradients, strict=True):
        results[GRADIENT + name] = (gradient[rows] if name in trial.rows else gradient).double()
    return results


def _largest(result: Tensor) -> Tensor:
    return result.abs().max()
