"""The sequence as one operation against the oracle, `dnc_reference.unroll`.

Forward and backward through time: all that the constructor chooses, every size, and what is differentiated. Rows that
end or begin on the way are in test_sequence_lengths.py, what is kept for the backward in test_sequence_kept.py. The
rest of torch is in test_sequence_features.py, DeepMind's own figures are in test_sequence_goldens.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_same_bits
from sequence_parity import (
    BATCH,
    CONTROLLERS,
    FORWARD,
    GRADIENT,
    STEPS,
    Outcome,
    assert_parity,
    draw,
    least_gap,
    make,
    operation,
    oracle,
    outcome,
    total,
)
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from dnc_reference import DNCState, MemoryState, addressing
from dnc_triton import DNC
from dnc_triton.sequence import op

# --- float64, all that the constructor chooses


@pytest.mark.parametrize("stop_usage_gradient", [False, True], ids=["full", "stopped"])
@pytest.mark.parametrize("strength", ["oneplus", "softplus"])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_choice(controller, num_layers, clip, strength, stop_usage_gradient):
    choice = dict(controller=controller, num_layers=num_layers, strength=strength)
    dnc = make(**choice, clip=clip, stop_usage_gradient=stop_usage_gradient)
    expected = assert_parity(dnc, *draw(dnc))
    if clip is not None:
        bounded = [expected.outputs, *tree_leaves(expected.state.controller)]
        assert all((x.abs() == clip).any() for x in bounded)  # it acts, and not everywhere
        assert torch.cat([x.flatten().abs() for x in bounded]).lt(clip).any()
    else:  # Every gradient is there: none of the comparisons was of zeros. A clip may stop some.
        unused = {name for name, x in expected.gradients.items() if not x.any()}
        assert unused == ({"state.memory.write_weights"} if stop_usage_gradient else set())


@pytest.mark.parametrize("strength", ["oneplus", "softplus"])
def test_large_strengths_are_not_cut_short(strength):
    """As they are by PyTorch's own softplus, which above 20 is x itself: off by 2e-9."""
    dnc = make(strength=strength)
    with torch.no_grad():
        strengths = slice(16, 19)  # after the keys and the write vector
        dnc.interface.weight[strengths].zero_()
        dnc.interface.bias[strengths].fill_(21)
    assert_parity(dnc, *draw(dnc))


def test_a_clip_lets_the_gradient_of_what_stands_at_its_bound_through():
    dnc = make(controller="feedforward")
    (layer,) = dnc.controller.layers
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(0.5)
    inputs, state = draw(dnc)
    dnc.clip = dnc.control(inputs[0], state)[0].max().item()
    assert assert_parity(dnc, inputs, state).gradients["controller.layers.0.bias"].all()


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_clip_stops_infinite_gradients(controller):
    dnc = make(controller=controller, num_layers=2, clip=1e-9)

    def loss(outputs: Tensor, state: DNCState) -> Tensor:
        return torch.inf * total(outputs, state.controller)

    outcomes = [outcome(run, dnc, *draw(dnc), loss=loss) for run in (operation, oracle)]
    gradients = [{k: g for k, g in x.gradients.items() if k != "output.bias"} for x in outcomes]
    assert not any(g.any() for g in gradients[1].values())  # a NaN is not zero
    assert_close(*gradients, name="gradient")


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_bounded_activation_gradient(controller, num_layers, clip):
    options = dict(controller=controller, num_layers=num_layers, clip=clip)
    dnc, free = (make(**options, max_activation_gradient=bound) for bound in (0.05, None))
    bounded = assert_parity(dnc, *draw(dnc), lengths=[5, 2, 4])
    unbounded = outcome(oracle, free, *draw(free), lengths=[5, 2, 4])
    assert_same_bits(bounded[:2], unbounded[:2])
    biases = [name for name in bounded.gradients if name.startswith("controller") and "bias" in name]
    assert all((bounded.gradients[name] - unbounded.gradients[name]).abs().max() > 1e-3 for name in biases)


@pytest.mark.parametrize("run", [operation, oracle])
def test_a_bound_that_is_scaled_as_the_loss_is(run):
    """As docs/own_data.md has it for float16. By a power of two, so that every sum rounds as before."""
    scale = 2.0**16

    def found(by: float) -> Outcome:
        dnc = make(num_layers=2, max_activation_gradient=0.05)
        dnc.controller.max_activation_gradient *= by
        return outcome(run, dnc, *draw(dnc), loss=lambda *results: by * total(*results))

    plain, scaled = found(1.0), found(scale)
    assert_same_bits({name: gradient / scale for name, gradient in scaled.gradients.items()}, plain.gradients)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (2, dict(memory_size=1)),
        (2, dict(word_size=1)),
        (2, dict(num_reads=1)),
        (1, dict(memory_size=1, word_size=1, num_reads=1, hidden_size=1, input_size=1, output_size=1)),
        (1, dict(memory_size=7, word_size=3, num_reads=5)),
        (9, dict(memory_size=17, word_size=5, num_reads=3)),
        (2, dict(memory_size=33, word_size=9, num_reads=4, hidden_size=13)),
    ],
    ids=["N=1", "W=1", "R=1", "all 1", "odd", "larger batch", "larger"],
)
def test_every_size(batch, sizes):
    dnc = make(**sizes)
    assert_parity(dnc, *draw(dnc, batch=batch), lengths=[STEPS - i % 3 for i in range(batch)])


@pytest.mark.parametrize("warm", [True, False], ids=["from a state", "from the initial state"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 50])
def test_every_length(steps, warm):
    """From an all-zero memory the order of slots hinges on the last bit: only what has no slot axis is compared."""
    dnc = make()
    inputs, given = draw(dnc, steps)
    if warm:
        assert_parity(dnc, inputs, given)
    else:
        loss = lambda outputs, state: total(outputs, state.controller, state.read_words)  # noqa: E731
        actual, expected = (outcome(run, dnc, inputs, None, loss=loss) for run in (operation, oracle))
        assert_close((actual.outputs, actual.gradients), (expected.outputs, expected.gradients), **GRADIENT)


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize(("steps", "batch"), [(3, 0), (0, 2), (0, 0)])
def test_nothing_to_do(controller, steps, batch):
    dnc = make(controller=controller, checkpoint=2)
    inputs, given = draw(dnc, steps, batch)
    options = dict(lengths=[0] * batch, reset=torch.ones(steps, batch, dtype=torch.bool))
    for these in ({}, options):
        actual = assert_parity(dnc, inputs, given, **these)
        assert actual.outputs.shape == (steps, batch, 2)
        assert_same_bits(actual.state, given)


# --- float32

FACTOR = 2  # times the error that the oracle itself makes in float32, which is one draw of rounding errors
# What counts as no error, in ulps of the tensor's largest magnitude, of 1 at least for a gradient, which is a sum of
# terms of that size: each step of a sequence rounds once more.
FLOOR_ULPS = 2 * STEPS


@pytest.mark.parametrize("options", [{}, dict(lengths=[5, 2, 4])], ids=["plain", "lengths"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_float32(controller, options):
    dnc = make(controller=controller, num_layers=2, dtype=torch.float32)
    inputs, given = draw(dnc)
    exact = tree_map(torch.Tensor.double, (inputs, given))
    assert least_gap(copy.deepcopy(dnc).double(), *exact) > 1e-4, "float32 may sort these slots otherwise"
    ours, theirs = (outcome(run, dnc, inputs, given, **options) for run in (operation, oracle))
    expected = outcome(oracle, copy.deepcopy(dnc).double(), *exact, **options)
    ulp = torch.finfo(torch.float32).eps
    for (path, want), actual, same_dtype in zip(
        tree_flatten_with_path(expected)[0], tree_leaves(ours), tree_leaves(theirs), strict=True
    ):
        allowed = FACTOR * (same_dtype.double() - want).abs().max().item()
        least = 1.0 if "gradients" in keystr(path) else 0.0
        floor = FLOOR_ULPS * ulp * max(want.abs().max().item(), least)
        assert actual.dtype == torch.float32
        assert_close(actual, want, atol=allowed + floor, name=keystr(path))


def test_a_hundred_steps_in_float32(monkeypatch):
    """Against the float64 oracle, told to take the slots in the order in which float32 took them.

    In its own order the gradients are 4.5e-4 apart: it takes two slots the other way round whose usages differ only by
    a rounding.
    """
    torch.manual_seed(1)
    sizes = dict(memory_size=64, word_size=16, num_reads=2)
    dnc = DNC(16, 32, 16, **sizes, batch_first=False, backend="torch_sequence")
    inputs = torch.randn(100, 4, 16)
    kept, forward = [], op._forward
    monkeypatch.setattr(op, "_forward", lambda *arguments: kept.append(forward(*arguments)) or kept[-1])
    outputs, _ = dnc(inputs)
    outputs.square().mean().backward()
    (free_lists,) = [tensor for tensor in kept[0] if tensor.dtype == torch.int64]  # [T, B·N]

    orders = iter(free_lists.unflatten(-1, (4, 64)))

    def sort_usage(usage: Tensor) -> tuple[Tensor, Tensor]:
        usage, order = addressing.USAGE_EPSILON + (1 - addressing.USAGE_EPSILON) * usage, next(orders)
        taken = usage.gather(-1, order)
        assert (taken - usage.sort(-1).values).abs().max() < 1e-6  # almost equal where the order differs
        return taken, order

    monkeypatch.setattr(addressing, "sort_usage", sort_usage)
    exact = copy.deepcopy(dnc).double()
    exact.zero_grad()
    expected, _ = oracle(exact, inputs.double(), None)
    expected.square().mean().backward()
    for name, parameter in [("outputs", None), *exact.named_parameters()]:
        actual, truth = (outputs, expected) if parameter is None else (dnc.get_parameter(name).grad, parameter.grad)
        error = (actual.double() - truth).abs().max() / truth.abs().max()
        assert error < 2e-6, name


# --- what is differentiated, and by what


@pytest.mark.parametrize("used", ["outputs", "last output", "controller", "read_words", *MemoryState._fields])
def test_a_loss_of_one_result(used):
    """Autograd then has nothing to send back for the others."""
    dnc = make(checkpoint=2)

    def loss(outputs: Tensor, state: DNCState) -> Tensor:
        results = {"outputs": outputs, "last output": outputs[-1], **state._asdict(), **state.memory._asdict()}
        return total(results[used])

    inputs, given = draw(dnc)
    actual, expected = (outcome(run, dnc, inputs, given, loss=loss) for run in (operation, oracle))
    assert_close(actual.gradients, expected.gradients, **GRADIENT)


@pytest.mark.parametrize(
    "wanted",
    [
        *("inputs", "state.memory.link", "state.memory.usage", "state.controller[0][1]", "state.read_words"),
        *("output.bias", "interface.weight", "controller.layers.0.weight_hh", "controller.layers.0.bias_ih"),
    ],
)
def test_a_gradient_by_one_thing(wanted):
    """Everything else is frozen: it neither gets a gradient nor keeps the wanted one from being made."""
    dnc = make().requires_grad_(False)
    inputs, given = draw(dnc)
    leaves = {"inputs": inputs, **dict(dnc.named_parameters())}
    leaves |= {"state" + keystr(path): leaf for path, leaf in tree_flatten_with_path(given)[0]}
    leaf = leaves[wanted].requires_grad_()
    outputs, last = dnc(inputs, given)
    assert outputs.requires_grad
    assert all(x.requires_grad == (wanted != "output.bias") for x in tree_leaves(last))
    total(outputs, last).backward()
    (expected,) = torch.autograd.grad(total(oracle(dnc, inputs, given)), leaf)
    assert_close(leaf.grad, expected, **GRADIENT)
    assert all(x.grad is None for x in leaves.values() if x is not leaf)


def test_nothing_is_differentiated():
    dnc = make().requires_grad_(False)
    assert not any(x.requires_grad for x in tree_leaves(dnc(*draw(dnc))))


def test_one_product_each_over_all_steps():
    """Of inputs, outputs, and for each weight's gradient; hidden vector and words, in one weight, are one each."""
    dnc = make()
    inputs, state = draw(dnc, steps=7)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        dnc(inputs.requires_grad_(), state)[0].sum().backward()
    products = []
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm"):
            *_, left, right = [shape for shape in event.input_shapes if len(shape) == 2]  # before them the bias, maybe
            products.append((*left, right[1]))
    rows, gates, words = 7 * BATCH, 4 * dnc.hidden_size, dnc.num_reads * dnc.word_size
    given, hidden, outputs = dnc.input_size, dnc.hidden_size, dnc.output_size
    expected = [(rows, given, gates), (rows, gates, given), (dnc.interface_size, rows, hidden)]
    expected += [(gates, rows, part) for part in (given, hidden, words)]
    for part in (hidden, words):
        expected += [(rows, part, outputs), (rows, outputs, part), (outputs, rows, part)]
    assert sorted(product for product in products if rows in product) == sorted(expected)


def test_strided_inputs_and_nothing_is_written_to():
    dnc = make(checkpoint=2)
    inputs, given = draw(dnc)
    wide = torch.full((2 * STEPS, BATCH, 2 * dnc.input_size), torch.nan, dtype=torch.float64)
    wide[::2, :, 1::2] = inputs
    strided = given.map(lambda x: x.mT.contiguous().mT)
    before = copy.deepcopy((wide, strided, dnc.state_dict()))
    options = dict(lengths=[5, 2, 4], reset=torch.rand(STEPS, BATCH) < 0.3)
    expected = outcome(operation, dnc, inputs, given, **options)
    outputs, state = dnc(wide[::2, :, 1::2].requires_grad_(), strided, **options)
    assert_close((outputs, state), expected[:2], **FORWARD)
    total(outputs, state).backward()
    by_parameters = {name: x.grad for name, x in dnc.named_parameters()}
    assert_close(by_parameters, {name: expected.gradients[name] for name in by_parameters}, **GRADIENT)
    assert_same_bits((wide.detach(), strided, dnc.state_dict()), before)
    storages = {x.untyped_storage().data_ptr() for x in (wide, *tree_leaves(given), *dnc.parameters())}
    assert not storages & {x.untyped_storage().data_ptr() for x in tree_leaves((outputs, state))}
