"""The kernels, forward and each gradient, against the float64 oracle, with NaN in and around every buffer."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
import torch
from helpers import assert_close, assert_same_bits, gradient_floor, random_problem
from parity import (
    Case,
    Outcome,
    Problem,
    activated,
    assert_parity,
    draw,
    margins,
    outcome,
    pairwise,
    pick_layout,
    rounded_to,
    run_kernels,
    run_reference,
    slot_order_is_safe,
)
from torch.utils._pytree import tree_map

from dnc_reference import Interface, MemoryState, addressing
from dnc_triton.kernels.layout import Layout, layouts

# Every two values of two of these meet in some case.
CASES = [
    Case(batch=1 + index % 3 if row["slots"] < 48 else 1 + (row["strides"] == "expanded"), **row)
    for index, row in enumerate(
        pairwise(
            dict(
                slots=(1, 5, 16, 48, 64, 100, 128),
                word=(1, 6, 12, 20, 32, 64),
                reads=(1, 3, 4, 8),
                dtype=("float32", "bfloat16", "float64", "float16"),
                layout=("fused", "split", "spread"),
                interface=("oneplus", "activated", "softplus"),
                strides=("contiguous", "gaps", "transposed", "expanded"),
                stop_usage_gradient=(False, True),
            )
        )
    )
]


def run(case: Case, problem: Problem, device: torch.device, layout: Layout | None = None) -> Outcome:
    """What the kernels make of a problem."""
    layout = layout or pick_layout(case.layout, case.slots)
    with margins() as around:
        given = tree_map(lambda x: around.copy(x.to(device), case.strides), problem)
        inputs = len(around.buffers)
        result = outcome(run_kernels, given, layout=layout, **case.options)
        assert len(around.buffers) >= inputs + 2 * (1 + len(problem.state)), "outputs without margins"
    assert_same_bits(tree_map(torch.Tensor.cpu, given), problem, name="what was given")
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, device: torch.device) -> None:
    problem = draw(case)
    result = run(case, problem, device)
    assert_parity(result, problem, **case.options)
    dtype = problem.state.memory.dtype
    if dtype.itemsize == 2:
        # The reference's error may be larger than a gradient is. The kernels store in 16 bits what they sum up in 32.
        exact = outcome(run_reference, rounded_to(problem, torch.float64), **case.options)
        floor = gradient_floor(*rounded_to(activated(problem, case.options["strength"]), torch.float32))
        assert_close(result.backward, exact.backward, rtol=8 * torch.finfo(dtype).eps, atol=floor)


def test_pairwise() -> None:
    """The table above has every pair: of a value of N and one of W, say."""
    factors = ("slots", "word", "reads", "dtype", "layout", "interface", "strides", "stop_usage_gradient")
    for first, second in combinations(factors, 2):
        values = {name: {getattr(case, name) for case in CASES} for name in (first, second)}
        pairs = {(getattr(case, first), getattr(case, second)) for case in CASES}
        assert len(pairs) == len(values[first]) * len(values[second])


# --- sizes at the limits, and every layout that may be chosen


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (Case(1, 3, 256, 16, "float32", interface="oneplus"), None),
        (Case(1, 3, 256, 16, "float64", "split"), None),
        (Case(1, 130, 3, 2, "float32", "split"), None),
        (Case(1, 130, 3, 2, "float32", "spread"), None),
        (Case(1, 300, 2, 1, "float64", "spread"), Layout(False, 256, 256, 4, ranks=True)),
        # All of the 10 bits that the sort has for the slot.
        (Case(1, 1024, 1, 1, "float64", "split"), Layout(False, 256, 256, 4)),
        pytest.param(
            Case(1, 1000, 2, 1, "float32", "split", "oneplus"), Layout(False, 256, 256, 4), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_limits(case: Case, layout: Layout | None, device: torch.device) -> None:
    problem = draw(case)
    if device.type == "cuda":  # large tiles save the interpreter time; a device has no room for them
        layout = None
    assert_parity(run(case, problem, device, layout), problem, **case.options)


@pytest.mark.slow  # in the interpreter
def test_two_thousand_slots(device: torch.device) -> None:
    """So many random usages are too close to each other for float32; here they are spread evenly, and stay so."""
    case = Case(1, 2048, 1, 1, "float32", "split")
    (interface, state, gradients) = draw(case._replace(dtype="float64"))
    usage = torch.linspace(0.05, 0.95, 2048)[torch.randperm(2048, generator=torch.Generator().manual_seed(0))]
    interface = interface._replace(free_gates=torch.zeros_like(interface.free_gates))
    state = state._replace(usage=usage.unsqueeze(0), write_weights=torch.zeros_like(state.write_weights))
    problem = tree_map(lambda x: x.float(), Problem(interface, state, gradients))
    assert slot_order_is_safe(problem, torch.float32).all()
    layout = Layout(False, 512, 512, 4) if device.type == "cpu" else None  # which saves the interpreter time
    assert_parity(run(case, problem, device, layout), problem, **case.options)


def as_run(layout: Layout) -> Layout:
    """On a CPU nothing depends on the number of warps."""
    return layout if torch.cuda.is_available() else layout._replace(num_warps=0)


@pytest.mark.parametrize(
    ("slots", "word", "layout"),
    [
        pytest.param(
            slots,
            word,
            layout,
            id=f"N{slots}W{word}-{'fused' if layout.fused else 'split'}{layout[1:]}",
            marks=pytest.mark.slow if slots > 128 else (),
        )
        for slots, word in [(7, 3), (40, 2), (80, 2), (40, 129), (130, 2), (300, 2)]
        for layout in {as_run(layout): layout for layout in reversed(layouts(slots))}.values()
    ],
)
def test_every_layout(slots: int, word: int, layout: Layout, device: torch.device) -> None:
    case = Case(1, slots, word, 2, interface="oneplus")
    problem = draw(case)
    assert_parity(run(case, problem, device, layout), problem, **case.options)


# --- one output, one gradient at a time


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("output", ["read_words", *MemoryState._fields])
def test_gradients_of_each_output(output: str, layout: str, device: torch.device) -> None:
    """Each sent back by itself, so that no other hides what is missing."""
    case = Case(1, 18, 3, 2, "float64", layout, "activated" if layout == "fused" else "oneplus")
    problem = draw(case)
    read_words, state = problem.gradients
    alone = {name: tensor if name == output else torch.zeros_like(tensor) for name, tensor in state._asdict().items()}
    read_words = read_words if output == "read_words" else torch.zeros_like(read_words)
    problem = problem._replace(gradients=(read_words, MemoryState(**alone)))
    assert_parity(run(case, problem, device), problem, **case.options)


@cache
def all_gradients(layout: str, interface: str, device: torch.device) -> tuple[Outcome, Problem, Case]:
    case = Case(2, 20, 5, 3, "float32", layout, interface)
    problem = draw(case)
    return run(case, problem, device), problem, case


@pytest.mark.parametrize("interface", ["activated", "oneplus"])
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("field", [*Interface._fields, *MemoryState._fields])
def test_each_gradient(field: str, layout: str, interface: str, device: torch.device) -> None:
    """By name, so that a failure says which one it is; and none is missing or zero."""
    result, problem, case = all_gradients(layout, interface, device)
    assert result.backward[f"d_{field}"].abs().max() > 1e-3
    assert_parity(result, problem, only=f"d_{field}", **case.options)


def test_stopped_usage_gradient(device: torch.device) -> None:
    """The previous write weights matter to usage alone."""
    case = Case(1, 5, 3, 2, stop_usage_gradient=True)
    result = run(case, draw(case), device)
    assert not result.backward["d_write_weights"].any()


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_products_are_not_rounded(layout: str, device: torch.device) -> None:
    """Where a single slot is read, what is read is what it holds: no tensor core cuts it to ten bits."""
    slots, word = 33, 5
    problem = draw(Case(1, slots, word, 2, "float32", layout))
    one_by_one = torch.roll(torch.eye(slots), 1, 0)  # slot i was written after slot i − 1
    modes = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    inputs = problem.inputs._replace(read_modes=modes, write_gates=torch.zeros(1, 1))
    read_weights = torch.eye(slots)[[7, 32]].unsqueeze(0)
    state = problem.state._replace(link=one_by_one.expand(1, 1, -1, -1), read_weights=read_weights)
    read_words, new = run_kernels(*tree_map(lambda x: x.to(device), (inputs, state)), layout=pick_layout(layout, slots))
    # The first head goes back from slot 7, the second on from the last one.
    assert_same_bits(new.read_weights.cpu(), torch.eye(slots)[[6, 0]].unsqueeze(0))
    assert_same_bits(read_words.cpu(), state.memory[:, [6, 0]])


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_for_storage(dtype: str, layout: str, device: torch.device) -> None:
    """Each result is what follows from the stored ones before it, rounded once: the next step sees no other numbers.

    So it is with usages that 16 bits do not tell apart: the lower slot is the first to be allocated.
    """
    interface, state = random_problem(4, 40, 6, 3, dtype=getattr(torch, dtype))
    given = interface, state._replace(usage=torch.full_like(state.usage, 0.1))  # which reads and writes hardly change
    results = run_kernels(*tree_map(lambda x: x.to(device), given), layout=pick_layout(layout, 40))
    (asked, prev), (read_words, new) = rounded_to(given, torch.float64), rounded_to(results, torch.float64)
    write_content = addressing.content_weights(prev.memory, asked.write_keys, asked.write_strengths)
    gates = asked.allocation_gates, asked.write_gates
    allocation = addressing.write_allocation_weights(new.usage, *gates)
    read_content = addressing.content_weights(new.memory, asked.read_keys, asked.read_strengths)
    ways = [way(new.link, prev.read_weights) for way in (addressing.forward_weights, addressing.backward_weights)]
    retention = addressing.retention(asked.free_gates, prev.read_weights)
    expected = dict(
        usage=addressing.update_usage(prev.usage, prev.write_weights, retention),
        write_weights=addressing.write_weights(write_content, allocation, *gates),
        memory=addressing.update_memory(prev.memory, new.write_weights, asked.erase_vectors, asked.write_vectors),
        link=addressing.update_link(prev.link, prev.precedence, new.write_weights),
        precedence=addressing.update_precedence(prev.precedence, new.write_weights),
        read_weights=addressing.read_weights(read_content, *ways, asked.read_modes),
        read_words=addressing.read_words(new.memory, new.read_weights),
    )
    assert (new.usage.sort(-1).values.diff() == 0).any()
    # Half of the last bit. Triton's interpreter cuts bfloat16 off where a GPU rounds it: there a whole one.
    ulps = 1.0 if dtype == "bfloat16" and device.type == "cpu" else 0.5
    for name, want in expected.items():
        error = ({**new._asdict(), "read_words": read_words}[name] - want).abs()
        allowed = ulps * torch.finfo(getattr(torch, dtype)).eps * want.abs() + 1e-6
        assert (error <= allowed).all(), f"{name}: {(error / allowed).max():.3g} times what is allowed"
