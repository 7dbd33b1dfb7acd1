"""The sequence as one operation against the oracle, `dnc_reference.unroll`.

Forward and backward through time, with all that the layer can be told; and what is kept for the backward. How it gets
on with the rest of torch stands in test_sequence_features.py, DeepMind's own figures in test_sequence_goldens.py.

A problem starts from a memory in which no two slots are used equally, and the layer is time first, as the oracle is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import as_leaves, assert_close, assert_same_bits, random_like, random_problem
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from dnc_reference import DNCState, MemoryState, addressing, unroll
from dnc_reference.dnc import interface_step
from dnc_triton import DNC, dispatch
from dnc_triton.kernels.layout import layouts
from dnc_triton.sequence import op, pool
from dnc_triton.sequence.loop import Sequence

BACKENDS = ["torch_sequence"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)

CONTROLLERS = ["lstm", "gru", "rnn", "feedforward"]
STEPS, BATCH = 5, 3
SIZES = dict(input_size=3, hidden_size=6, output_size=2, memory_size=5, word_size=4, num_reads=2)
# float64: sums in another order move the last digits only. What is exactly 0 in one may be an ulp of 1 in the other.
FORWARD, GRADIENT = dict(rtol=1e-12, atol=1e-15), dict(rtol=1e-10, atol=1e-12)

Run = Callable[..., tuple[Tensor, DNCState]]


def make(backend: str, **changes: Any) -> DNC:
    torch.manual_seed(0)
    dnc = DNC(**{**SIZES, "dtype": torch.float64, "batch_first": False, "backend": backend, **changes})
    with torch.no_grad():  # as torch initialises it the memory hardly matters: the gates all stand near one half
        dnc.interface.weight.mul_(4)
    return dnc


def draw(dnc: DNC, steps: int = STEPS, batch: int = BATCH, *, seed: int = 1) -> tuple[Tensor, DNCState]:
    """Inputs [T, B, I] and a state to start from. The same numbers, rounded, in every dtype."""
    weight = dnc.output.weight
    _, memory = random_problem(batch, dnc.memory_size, dnc.word_size, dnc.num_reads, dnc.num_writes, seed=seed)
    state = dnc.initial_state(batch)
    controller, words = random_like((state.controller, state.read_words), seed=seed)
    inputs = random_like(torch.empty(steps, batch, dnc.input_size, dtype=torch.float64), seed=seed + 1)
    return tree_map(lambda x: x.to(weight.dtype), (inputs, DNCState(controller, memory, words)))


def total(*nests: Any) -> Tensor:
    """A loss that sees every number, each with a weight of its own."""
    flat = torch.cat([x.flatten().double() for x in tree_leaves(nests)])
    return (flat * (torch.arange(flat.numel(), dtype=flat.dtype) + 1).cos()).sum()


def operation(dnc: DNC, inputs: Tensor, state: DNCState | None, **options: Any) -> tuple[Tensor, DNCState]:
    """The layer, which runs on the backend it was made with."""
    return dnc(inputs, state, **options)


def oracle(
    dnc: DNC, inputs: Tensor, state: DNCState | None, *, lengths: list[int] | None = None, reset: Tensor | None = None
) -> tuple[Tensor, DNCState]:
    """The same parameters, step by step, differentiated by autograd."""
    state = dnc.initial_state(inputs.shape[1]) if state is None else state
    return unroll(dnc, inputs, state, lengths=None if lengths is None else torch.tensor(lengths), reset=reset)


class Outcome(NamedTuple):
    """All that a run computes, forward and backward; gradients by the name of what they are by."""

    outputs: Tensor
    state: DNCState
    gradients: dict[str, Tensor]


def outcome(
    run: Run, dnc: DNC, inputs: Tensor, given: DNCState | None, *, loss: Callable[..., Tensor] = total, **options: Any
) -> Outcome:
    inputs, given = as_leaves(inputs), None if given is None else as_leaves(given)
    outputs, state = run(dnc, inputs, given, **options)
    leaves = {"inputs": inputs, **dict(dnc.named_parameters())}
    if given is not None:
        leaves |= {"state" + keystr(path): leaf for path, leaf in tree_flatten_with_path(given)[0]}
    gradients = torch.autograd.grad(loss(outputs, state), list(leaves.values()), materialize_grads=True)
    return Outcome(outputs.detach(), state.detach(), dict(zip(leaves, gradients, strict=True)))


def assert_equal_outcomes(actual: Outcome, expected: Outcome) -> None:
    assert_close(actual[:2], expected[:2], **FORWARD)
    assert_close(actual.gradients, expected.gradients, **GRADIENT, name="gradient")


def assert_parity(dnc: DNC, inputs: Tensor, given: DNCState | None, **options: Any) -> Outcome:
    """Assert that the operation computes what the oracle does. Returns what that is."""
    expected = outcome(oracle, dnc, inputs, given, **options)
    assert_equal_outcomes(outcome(operation, dnc, inputs, given, **options), expected)
    return expected


# --- float64, all that the constructor chooses


@pytest.mark.parametrize("stop_usage_gradient", [False, True], ids=["full", "stopped"])
@pytest.mark.parametrize("strength", ["oneplus", "softplus"])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("controller", CONTROLLERS)
@each_backend
def test_every_choice(backend, controller, num_layers, clip, strength, stop_usage_gradient):
    choice = dict(controller=controller, num_layers=num_layers, strength=strength)
    dnc = make(backend, **choice, clip=clip, stop_usage_gradient=stop_usage_gradient)
    expected = assert_parity(dnc, *draw(dnc))
    if clip is not None:
        bounded = [expected.outputs, *tree_leaves(expected.state.controller)]
        assert all((x.abs() == clip).any() for x in bounded)  # it acts, and not everywhere
        assert torch.cat([x.flatten().abs() for x in bounded]).lt(clip).any()
    else:  # Every gradient is there: none of the comparisons was of zeros. A clip may stop some.
        unused = {name for name, x in expected.gradients.items() if not x.any()}
        assert unused == ({"state.memory.write_weights"} if stop_usage_gradient else set())


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
@each_backend
def test_bounded_activation_gradient(backend, controller, num_layers, clip):
    options = dict(controller=controller, num_layers=num_layers, clip=clip)
    dnc, free = (make(backend, **options, max_activation_gradient=bound) for bound in (0.05, None))
    bounded = assert_parity(dnc, *draw(dnc), lengths=[5, 2, 4])
    unbounded = outcome(oracle, free, *draw(free), lengths=[5, 2, 4])
    assert_same_bits(bounded[:2], unbounded[:2])
    biases = [name for name in bounded.gradients if name.startswith("controller") and "bias" in name]
    assert all((bounded.gradients[name] - unbounded.gradients[name]).abs().max() > 1e-3 for name in biases)


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
@each_backend
def test_every_size(backend, batch, sizes):
    dnc = make(backend, **sizes)
    assert_parity(dnc, *draw(dnc, batch=batch), lengths=[STEPS - i % 3 for i in range(batch)])


@pytest.mark.parametrize("warm", [True, False], ids=["from a state", "from the initial state"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 50])
@each_backend
def test_every_length(backend, steps, warm):
    """From an all-zero memory the order of slots hangs on the last bit: compared is what has no slots."""
    dnc = make(backend)
    inputs, given = draw(dnc, steps)
    if warm:
        assert_parity(dnc, inputs, given)
    else:
        loss = lambda outputs, state: total(outputs, state.controller, state.read_words)  # noqa: E731
        actual, expected = (outcome(run, dnc, inputs, None, loss=loss) for run in (operation, oracle))
        assert_close((actual.outputs, actual.gradients), (expected.outputs, expected.gradients), **GRADIENT)


@each_backend
@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
@pytest.mark.parametrize(("steps", "batch"), [(3, 0), (0, 2), (0, 0)])
def test_nothing_to_do(backend, controller, steps, batch):
    dnc = make(backend, controller=controller, checkpoint=2)
    inputs, given = draw(dnc, steps, batch)
    options = dict(lengths=[0] * batch, reset=torch.ones(steps, batch, dtype=torch.bool))
    for these in ({}, options):
        actual = assert_parity(dnc, inputs, given, **these)
        assert actual.outputs.shape == (steps, batch, 2)
        assert_same_bits(actual.state, given)


# --- float32

FACTOR = 2  # what is allowed of the error that the oracle itself makes in float32: that is one draw of rounding errors
# What counts as no error, in ulps of the tensor's largest magnitude, of 1 at least for a gradient, which is a sum of
# terms of that size: each step of a sequence rounds once more.
FLOOR_ULPS = 2 * STEPS


@pytest.mark.parametrize("options", [{}, dict(lengths=[5, 2, 4])], ids=["plain", "lengths"])
@pytest.mark.parametrize("controller", CONTROLLERS)
@each_backend
def test_float32(backend, controller, options):
    dnc = make(backend, controller=controller, num_layers=2, dtype=torch.float32)
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


def least_gap(dnc: DNC, inputs: Tensor, given: DNCState) -> float:
    """The smallest difference between two usages of a row that are sorted on the way."""
    gaps = []

    def watched(*arguments: Any, **keywords: Any) -> tuple[Tensor, MemoryState]:
        read_words, memory = interface_step(*arguments, **keywords)
        gaps.append(memory.usage.sort(-1).values.diff().min().item())
        return read_words, memory

    unroll(dnc, inputs, given, interface_step=watched)
    return min(gaps)


# --- what is differentiated, and by what


@pytest.mark.parametrize("used", ["outputs", "last output", "controller", "read_words", *MemoryState._fields])
@each_backend
def test_a_loss_of_one_result(backend, used):
    """Autograd then has nothing to send back for the others."""
    dnc = make(backend, checkpoint=2)

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
@each_backend
def test_a_gradient_by_one_thing(backend, wanted):
    """Everything else is frozen: it neither gets a gradient nor keeps the wanted one from being made."""
    dnc = make(backend).requires_grad_(False)
    inputs, given = draw(dnc)
    leaves = {"inputs": inputs, **dict(dnc.named_parameters())}
    leaves |= {"state" + keystr(path): leaf for path, leaf in tree_flatten_with_path(given)[0]}
    leaf = leaves[wanted].requires_grad_()
    results = dnc(inputs, given)
    assert all(x.requires_grad for x in tree_leaves(results))
    total(results).backward()
    (expected,) = torch.autograd.grad(total(oracle(dnc, inputs, given)), leaf)
    assert_close(leaf.grad, expected, **GRADIENT)
    assert all(x.grad is None for x in leaves.values() if x is not leaf)


@each_backend
def test_nothing_is_differentiated(backend):
    dnc = make(backend).requires_grad_(False)
    assert not any(x.requires_grad for x in tree_leaves(dnc(*draw(dnc))))


@each_backend
def test_strided_inputs_and_nothing_is_written_to(backend):
    dnc = make(backend, checkpoint=2)
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


# --- lengths and reset


def resets(*steps_and_rows: tuple[int, int]) -> Tensor:
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    for step, row in steps_and_rows:
        reset[step, row] = True
    return reset


OPTIONS = {
    "plain": {},
    "lengths": dict(lengths=[3, 0, 5]),
    "no steps": dict(lengths=[0, 0, 0]),
    "full lengths": dict(lengths=[5, 5, 5]),
    "reset first": dict(reset=resets((0, 1))),
    "reset last": dict(reset=resets((4, 0), (4, 2))),
    "reset in the middle": dict(reset=resets((1, 0), (2, 2), (3, 2))),
    "reset all": dict(reset=torch.ones(STEPS, BATCH, dtype=torch.bool)),
    "both": dict(lengths=[3, 4, 2], reset=resets((0, 0), (2, 0), (3, 0), (2, 1), (4, 1), (0, 2), (1, 2))),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_option
@pytest.mark.parametrize(
    "choice",
    [
        dict(),
        dict(checkpoint=2, controller="gru", num_layers=2),
        dict(checkpoint=3, controller="rnn", clip=0.3),
        dict(checkpoint=2, controller="feedforward", clip=0.3, stop_usage_gradient=True),
    ],
    ids=lambda choice: ", ".join(map(str, choice.values())) or "lstm",
)
@each_backend
def test_lengths_and_reset(backend, choice, options):
    """A reset row's memory is all zeros: compared is what does not see the order of its slots."""
    dnc = make(backend, **choice)
    inputs, given = draw(dnc)

    def loss(outputs: Tensor, state: DNCState) -> Tensor:
        return total(outputs, state.controller, state.read_words)

    if "reset" not in options:
        assert_parity(dnc, inputs, given, **options)
        return
    actual, expected = (outcome(run, dnc, inputs, given, loss=loss, **options) for run in (operation, oracle))
    assert_close(actual.outputs, expected.outputs, **FORWARD)
    assert_close(actual.state._replace(memory=()), expected.state._replace(memory=()), **FORWARD)
    assert_close(actual.gradients, expected.gradients, **GRADIENT)


@pytest.mark.parametrize("checkpoint", [None, 2])
@each_backend
def test_padding_changes_nothing(backend, checkpoint):
    dnc = make(backend, checkpoint=checkpoint)
    inputs, given = draw(dnc)
    lengths = [3, 0, 5]
    padding = torch.arange(STEPS).unsqueeze(1) >= torch.tensor(lengths)
    reset = resets((1, 0), (3, 2))
    filled = inputs.masked_fill(padding.unsqueeze(-1), torch.nan)
    actual = outcome(operation, dnc, filled, given, lengths=lengths, reset=reset | padding)
    assert_same_bits(actual, outcome(operation, dnc, inputs, given, lengths=lengths, reset=reset))
    assert not actual.gradients["inputs"][padding].any()
    assert not actual.outputs[padding].any()
    assert_same_bits(row(actual.state, 1), row(given, 1))


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
@each_backend
def test_reset_cleans_a_spoilt_state(backend, controller, checkpoint):
    dnc = make(backend, controller=controller, checkpoint=checkpoint)
    inputs, given = draw(dnc)
    given = spoilt(given, 1)
    actual, expected = (outcome(run, dnc, inputs, given, reset=resets((0, 1))) for run in (operation, oracle))
    assert_close(actual.outputs, expected.outputs, **FORWARD)
    assert all(x.isfinite().all() for x in tree_leaves(actual))
    assert not any(row(x, 1).any() for name, x in actual.gradients.items() if name.startswith("state"))
    # A row that was spoilt on the way goes on from the reset as if nothing had been.
    inputs[1, 2] = torch.nan
    outputs, state = dnc(inputs, given, reset=resets((0, 1), (3, 2)))
    assert outputs[1:3, 2].isnan().all()
    assert_close((outputs[3:, 2:], row(state, 2)), dnc(inputs[3:, 2:]), **FORWARD)


@pytest.mark.parametrize(
    "options", [{}, dict(lengths=[5, 4, 5], reset=resets((2, 2)))], ids=["plain", "lengths, reset"]
)
@each_backend
def test_rows_are_independent(backend, options):
    """A NaN in one row changes no bit of another: not of its outputs, its state, or the gradients by them."""
    dnc = make(backend, num_layers=2)
    inputs, given = draw(dnc)
    clean = outcome(operation, dnc, inputs, given, **options)
    inputs[1, 0] = torch.nan
    actual = outcome(operation, dnc, inputs, spoilt(given, 1), **options)
    of_rows = {"inputs", *(name for name in clean.gradients if name.startswith("state"))}
    for these in (actual, clean):
        for name in these.gradients.keys() - of_rows:
            del these.gradients[name]
    assert actual.outputs[:4, 1].isnan().all()
    assert_same_bits(third_row(actual), third_row(clean))


def third_row(results: Outcome) -> Any:
    gradients = dict(results.gradients)
    return results.outputs[:, 2], row(results.state, 2), gradients.pop("inputs")[:, 2], row(gradients, 2)


def row(nest: Any, index: int) -> Any:
    """One row of everything, as a batch of one."""
    return tree_map(lambda x: x[index : index + 1], nest)


def spoilt(state: DNCState, index: int) -> DNCState:
    rows = torch.arange(state.read_words.shape[0]) == index
    return state.map(lambda x: x.masked_fill(rows.view(-1, *[1] * (x.dim() - 1)), torch.nan))


# --- from call to call


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("chunks", [[2, 3], [1] * STEPS, [0, 5, 0]], ids=str)
@pytest.mark.parametrize("options", ["plain", "both"])
@each_backend
def test_whole_equals_chunks(backend, chunks, checkpoint, options):
    dnc = make(backend, checkpoint=checkpoint, num_layers=2)

    def in_chunks(
        dnc: DNC, inputs: Tensor, state: DNCState, *, lengths: list[int] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, DNCState]:
        pieces, start = [], 0
        for piece in inputs.split(chunks):
            end = start + len(piece)
            here: dict[str, Any] = {}
            if lengths is not None and reset is not None:
                here = dict(lengths=[min(max(x - start, 0), end - start) for x in lengths], reset=reset[start:end])
            outputs, state = dnc(piece, state, **here)
            pieces.append(outputs)
            start = end
        return torch.cat(pieces), state

    arguments, keywords = (dnc, *draw(dnc)), OPTIONS[options]
    assert_equal_outcomes(outcome(in_chunks, *arguments, **keywords), outcome(operation, *arguments, **keywords))


@pytest.mark.parametrize("batch_first", [True, False])
@each_backend
def test_step_by_step(backend, batch_first):
    dnc = make(backend, batch_first=batch_first)

    def streamed(dnc: DNC, inputs: Tensor, state: DNCState | None) -> tuple[Tensor, DNCState]:
        outputs = []
        for step in inputs:
            output, state = dnc.step(step, state)
            outputs.append(output)
        return torch.stack(outputs), state

    inputs, given = draw(dnc)
    assert_equal_outcomes(outcome(streamed, dnc, inputs, given), outcome(oracle, dnc, inputs, given))
    assert_close(streamed(dnc, inputs, None)[0], oracle(dnc, inputs, None)[0], **FORWARD)


@each_backend
def test_a_detached_state_cuts_the_gradient(backend):
    dnc = make(backend)
    inputs, given = as_leaves(draw(dnc))
    _, between = dnc(inputs[:2], given)
    outputs, _ = dnc(inputs[2:], between.detach())
    assert not torch.autograd.grad(total(outputs), inputs)[0][:2].any()


# --- what is kept for the backward


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 4, 7, 9, 14, "auto", None], ids=str)
@pytest.mark.parametrize(
    ("choice", "options"),
    [
        (dict(), {}),
        (dict(controller="gru", num_layers=2, clip=0.3, stop_usage_gradient=True), {}),
        (dict(controller="feedforward"), dict(lengths=[9, 4, 7])),
        (dict(), dict(lengths=[8, 0, 6], reset=torch.eye(9, dtype=torch.bool)[:, [2, 5, 3]])),
    ],
    ids=["lstm", "gru", "lengths", "lengths, reset"],
)
@each_backend
def test_checkpoints_change_no_bit(backend, choice, options, checkpoint, monkeypatch):
    if checkpoint == "auto":
        monkeypatch.setattr(pool, "MOST", 0)  # 9 steps: every third is kept
    dnc, full = make(backend, **choice, checkpoint=checkpoint), make(backend, **choice, checkpoint=None)
    arguments = draw(dnc, steps=9)
    assert_same_bits(outcome(operation, dnc, *arguments, **options), outcome(operation, full, *arguments, **options))


@each_backend
def test_checkpoints_keep_less(backend, monkeypatch):
    """Of T steps every k-th memory and link, as measured; √T when they would take more than waits for the next."""
    sizes, steps = dict(memory_size=16, word_size=8), 25
    state_bytes = BATCH * (16 * 16 + 16 * 8) * 8

    def kept(checkpoint: int | str | None) -> int:
        dnc = make(backend, **sizes, checkpoint=checkpoint)
        return saved_bytes(lambda: dnc(*draw(dnc, steps)))

    full = kept(None)
    assert full == kept(1)
    for every in (2, 5, 24, 25, 100):
        dropped = (steps - 1) - (steps - 1) // every
        assert full - kept(every) >= dropped * state_bytes
    for most, every in ((steps * state_bytes, 1), (steps * state_bytes - 1, 5)):
        monkeypatch.setattr(pool, "MOST", most)
        assert kept("auto") == kept(every)


@pytest.mark.parametrize("backend", ["torch_sequence", "triton_split"])
def test_a_thousand_steps_train_within_8_gb(backend):
    """(B, N, W, R) = (32, 256, 64, 4), H = 256, with what "auto" takes on a CPU: every 32nd step.

    On the meta device nothing is computed, but everything that is kept has its size. In benchmarks/results/lean.json
    stands what a process grew by.
    """
    if backend.startswith("triton"):
        pytest.importorskip("triton")
    limit, every, batch = 8e9, 32, 32
    dnc = DNC(64, 256, 64, memory_size=256, word_size=64, num_reads=4, device="meta")
    inputs = torch.empty(1000, batch, 64, device="meta")
    layout = {"layout": layouts(256, 64)[0]} if backend.startswith("triton") else {}
    unroll = dispatch.BACKENDS[backend].unroll

    def kept(checkpoint: int | str | None) -> int:
        state = dnc.initial_state(batch)
        return saved_bytes(lambda: unroll(dnc, inputs, state, checkpoint=checkpoint, **layout))

    # Plain PyTorch keeps every link, the kernels each fourth.
    assert (kept(None) > limit) == (backend == "torch_sequence")
    assert kept("auto") == kept(every)
    # On the way back a whole stretch of memories and links is there, and for each step about as much again as is kept
    # of it without these two: slopes and gradients.
    memory_and_link = 4 * batch * (256 * 64 + 256 * 256)
    assert 2 * kept(every) + (every - 1) * memory_and_link < limit


def saved_bytes(run: Callable[[], Any]) -> int:
    """What autograd holds on to, each storage counted once."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that none comes again in its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = run()
    del results
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("steps", [5, 64, 65, 130])
@pytest.mark.parametrize("options", [{}, dict(lengths=True)], ids=["plain", "lengths, reset"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_backend
def test_the_same_bits_without_gradients(backend, dtype, options, steps):
    dnc = make(backend, num_layers=2, dtype=dtype, checkpoint=3)
    inputs, given = draw(dnc, steps)
    if options:
        options = dict(lengths=[steps - 1, steps // 2, steps], reset=torch.rand(steps, BATCH) < 0.05)
    expected = dnc(inputs, given, **options)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            results = tree_map(torch.clone, dnc(inputs, given, **options))
        assert not any(x.requires_grad for x in tree_leaves(results))
        if steps <= Sequence.chunk:
            assert_same_bits(results, expected)
        elif (
            dtype == torch.float64
        ):  # products over other numbers of steps, whose last bits a library may sum otherwise
            assert_close(results, tree_map(torch.detach, expected), **FORWARD)


class Watch(TorchDispatchMode):
    """How many numbers the operations of this library have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.returned = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        if func.namespace == "dnc_triton":
            self.returned += sum(x.numel() for x in tree_leaves(results))
        return results


@each_backend
def test_nothing_is_kept_without_gradients(backend):
    dnc = make(backend)
    inputs, given = draw(dnc, steps=100)
    with torch.no_grad(), Watch() as watch:
        results = dnc(inputs, given)
    assert watch.returned == sum(x.numel() for x in tree_leaves(results))
    with Watch() as watch:
        dnc(inputs, given)
    assert watch.returned > 10 * sum(x.numel() for x in tree_leaves(results))


def test_memory_without_gradients_does_not_grow_with_the_sequence():
    """On the CPU, whose profiler counts what is allocated and freed."""
    dnc = make("torch_sequence", memory_size=32)

    def most(steps: int) -> int:
        inputs, given = draw(dnc, steps)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            outputs, _ = dnc(inputs, given)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held, peak = 0, 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak - 2 * outputs.nbytes  # the pieces, and the whole

    short, long = most(192), most(512)
    assert short > 64 * BATCH * 32 * 8  # it did count
    assert long < 1.1 * short


# --- long sequences ---------------------------------------------------------------------------------------------------


def test_a_hundred_steps_in_float32(monkeypatch):
    """Against the float64 oracle, told to take the slots in the order in which float32 took them.

    In its own order the gradients are 4.5e-4 apart: it takes two slots the other way round whose usages are equal but
    for a rounding.
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
        assert (taken - usage.sort(-1).values).abs().max() < 1e-6  # all but equal, where it is another order
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
