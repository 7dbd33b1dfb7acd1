"""The step made by PyTorch's compiler, in the sequence operation, against the oracle. Few sizes: each compiles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_sequence_goldens
import torch
from helpers import assert_same_bits, negated_when_read, replace_parameters, total
from sequence_parity import (
    BATCH,
    CHOICES,
    NAMES,
    assert_equal_outcomes,
    assert_parity,
    assert_parity_of_single_steps,
    draw,
    make,
    operation,
    oracle,
    outcome,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from dnc_triton import dispatch, explain
from dnc_triton.dispatch import BACKENDS
from dnc_triton.sequence import compiled, compiler
from dnc_triton.sequence.compiled import CompiledSequence
from dnc_triton.sequence.compiler import like_of, machine_code

BACKEND = "torch_compiled"
COMPILED = dict(clip=0.1, stop_usage_gradient=True)  # what the tests share that are not slow
CELLS = test_sequence_goldens.CELLS

pytestmark = pytest.mark.skipif(not dispatch.HAS_COMPILER, reason="no C++ compiler")


def masks(inputs):
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    reset[2, 1] = reset[0, 0] = True
    return dict(lengths=[5, 2, 4], reset=reset)


def test_parity():  # the first of them compiles
    dnc = make(BACKEND, **COMPILED)
    assert_parity(dnc, *draw(dnc))


@pytest.mark.parametrize("steps", [0, 1, 50])
def test_every_length(steps):
    dnc = make(BACKEND, **COMPILED)
    assert_parity(dnc, *draw(dnc, steps))


def test_from_the_initial_state():
    dnc = make(BACKEND, **COMPILED)
    inputs, _ = draw(dnc, steps=2)  # more steps, and rounding orders the slots that are still empty
    assert_parity(dnc, inputs, None)


def test_chunks_are_the_whole():
    def in_chunks(dnc, inputs, state):
        pieces = []
        for chunk in inputs.split([2, 0, 3]):
            outputs, state = dnc(chunk, state)
            pieces.append(outputs)
        return torch.cat(pieces), state

    dnc = make(BACKEND, **COMPILED)
    given = draw(dnc)
    assert_equal_outcomes(outcome(in_chunks, dnc, *given), outcome(operation, dnc, *given))


def test_twice_in_one_graph():
    """Forwards, and then both backwards."""

    def twice(run):
        def call(dnc, inputs, state):
            outputs, between = run(dnc, inputs, state)
            again, last = run(dnc, inputs.flip(0), between)
            return outputs + again, last

        return call

    dnc = make(BACKEND, **COMPILED)
    given = draw(dnc)
    assert_equal_outcomes(outcome(twice(operation), dnc, *given), outcome(twice(oracle), dnc, *given))


def test_within_an_activation_checkpoint():
    def within(dnc, inputs, state):
        return checkpoint(dnc, inputs, state, use_reentrant=False)

    dnc = make(BACKEND, **COMPILED)
    given = draw(dnc)
    assert_same_bits(outcome(within, dnc, *given), outcome(operation, dnc, *given))


def test_views():
    """With NaN in their gaps, where rows do not follow one another."""
    dnc = make(BACKEND, **COMPILED)
    inputs, state = draw(dnc)

    def wide(x):
        gaps = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        gaps[..., 1::2] = x
        return gaps[..., 1::2]

    views = tree_map(lambda x: wide(x).requires_grad_(), (inputs, state))
    assert not any(x.is_contiguous() for x in tree_leaves(views))
    expected = outcome(operation, dnc, inputs, state)
    outputs, last = dnc(*views)
    gradients = torch.autograd.grad(total(outputs, last), [views[0], *dnc.parameters(), *tree_leaves(views[1])])
    assert_same_bits((outputs, last, gradients), (*expected[:2], tuple(expected.gradients.values())))


@pytest.mark.slow  # each compiles four to eight steps
@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_parity_of_all_that_the_layer_can_be_told(choice):
    dnc = make(BACKEND, **choice)
    inputs, state = draw(dnc)
    assert_parity(dnc, inputs, state)
    assert_parity(dnc, inputs, state, **masks(inputs))


@pytest.mark.slow  # compiles
def test_dropout():
    """With the same masks as the step that is not compiled draws from the same seed."""
    outcomes = []
    for backend in (BACKEND, "torch_sequence"):
        dnc = make(backend, num_layers=2, dropout=0.5)
        inputs, state = draw(dnc)
        torch.manual_seed(2)
        outcomes.append(outcome(operation, dnc, inputs, state))
    assert_equal_outcomes(*outcomes)


@pytest.mark.slow
def test_threads_that_compile_at_once():
    dnc = make(BACKEND)
    drawn = [draw(dnc, batch=batch) for batch in (1, 2)]

    def run(given):
        with torch.no_grad():
            return dnc(*given)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, drawn))
    assert_same_bits(together, [run(given) for given in drawn])


@pytest.mark.slow
def test_parity_of_a_larger_memory():
    """For more than one thread. No resets: with many empty slots an ulp apart, no order is right."""
    dnc = make(BACKEND, memory_size=64, word_size=20, num_reads=3)
    inputs, state = draw(dnc)
    assert_parity(dnc, inputs, state)
    assert_parity(dnc, inputs, state, lengths=[5, 2, 4])


def count_allocations(size, call, *arguments):
    """How often a call asks for so many bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call(*arguments)
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() == size for event in events)


def test_what_is_copied_to_a_buffer_is_written_there_at_once():
    """Though it is written by way of one view, and read by way of another."""

    def traced(numbers, memory, link, words, new_link):
        own = torch.empty_like(link)
        own.squeeze(1).copy_(link.squeeze(1) + numbers)
        words.copy_(torch.bmm(own.squeeze(1), memory))
        new_link.copy_(own)
        return ()

    memory, link = torch.randn(3, 96, 24), torch.randn(3, 1, 96, 96)
    tensors = memory, link, torch.empty_like(memory), torch.empty_like(link)
    compiled = machine_code(traced, tuple(map(like_of, tensors)), like_of(memory))
    assert count_allocations(link.nbytes, torch.empty_like, link) == 1
    assert count_allocations(link.nbytes, compiled, *tensors) == 0
    expected = link + torch.arange(96.0)
    torch.testing.assert_close(tensors[3], expected)
    torch.testing.assert_close(tensors[2], expected.squeeze(1) @ memory)


def read_before(x, buffer):
    made, old = x + 1, 2 * buffer
    buffer.copy_(made)
    return made, old


def read_by_others(x, buffer):
    made = (x + 1).unsqueeze(0)
    early, rows = 2 * made, made.squeeze(0)
    buffer.copy_(rows)
    return early, 3 * rows, buffer + 1


def of_views(x, buffer):
    made = x.view(12).view(4, 3)
    buffer.copy_(made)
    return 2 * x, 3 * made


def narrower(x, buffer):
    made = x.float() / 3
    buffer.copy_(made)
    return 2 * made


def broadcast(x, buffer):
    made = x[:1] + 1
    buffer.copy_(made)
    return 2 * made


def copied_narrower(x, buffer):
    made = torch.ops.aten.copy.default(x, x.float() / 3)
    buffer.copy_(made)
    return 2 * made


def copied_alike(x, buffer):
    made = x + 1
    copied = torch.ops.aten.copy.default(x, made)
    buffer.copy_(copied)
    return 2 * made, 3 * copied


def of_an_operator(x, buffer):
    made, _ = torch.cat([x, x]).split(4)
    buffer.copy_(made)
    return 2 * made


def to_two(x, buffer, other):
    made = x + 1
    buffer.copy_(made)
    other.copy_(made)
    return 2 * made


LEFT = (read_before, narrower, broadcast, of_an_operator)


@pytest.mark.parametrize("run", [read_by_others, of_views, copied_narrower, copied_alike, to_two, *LEFT])
def test_what_is_written_once_is_what_was_written(run):
    """And is read from there alone; but not where the buffer is read too, or takes something in another form."""
    from dnc_triton.sequence.write_once import WriteOnce

    tensors = [torch.rand(4, 3, dtype=torch.float64) for _ in range(run.__code__.co_argcount)]
    graph = make_fx(run, tracing_mode="fake")(*tensors)
    code = graph.code
    WriteOnce()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert (graph.code == code) == (run in LEFT)
    copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert all(list(copy.args[1].users) == [copy] for copy in copies if run not in (*LEFT, copied_narrower))
    expected, actual = ([x.clone() for x in tensors] for _ in range(2))
    assert_same_bits((graph(*actual), actual), (run(*expected), expected))


def test_what_another_pass_has_made_is_not_taken_from_the_compilers_cache(tmp_path, monkeypatch):
    """Such as the pass of an earlier version, or a later one."""
    from dnc_triton.sequence import write_once

    uuid = write_once.WriteOnce().uuid()
    assert write_once.WriteOnce().uuid() == uuid
    other = tmp_path / "write_once.py"
    other.write_bytes(Path(write_once.__file__).read_bytes() + b"#")
    monkeypatch.setattr(write_once, "__file__", str(other))
    assert write_once.WriteOnce().uuid() != uuid


@pytest.mark.slow  # compiles
def test_links_are_written_once():
    """A step asks for no room for a second one, by itself or in a sequence."""
    dnc = make(BACKEND, memory_size=96, checkpoint=2)
    inputs, state = draw(dnc, steps=8)
    link = state.memory.link.nbytes
    with torch.no_grad():
        dnc.step(inputs[0], state)
        assert count_allocations(link, dnc.step, inputs[0], state) == 1
    dnc(inputs, state)[0].sum().backward()
    assert count_allocations(link, dnc, inputs[:6], state) == count_allocations(link, dnc, inputs, state)
    outputs = dnc(inputs, state)[0].sum()
    whole = count_allocations(link, outputs.backward)
    short = dnc(inputs[:6], state)[0].sum()
    assert whole - count_allocations(link, short.backward) == 2  # one for each adjoint


def test_without_gradients():
    dnc = make(BACKEND, **COMPILED)
    inputs, state = draw(dnc, steps=70)  # more than go at once
    expected, last = make("reference", **COMPILED)(inputs, state)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            outputs, new_state = dnc(inputs, state)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(tuple(new_state.memory), tuple(last.memory), rtol=1e-11, atol=1e-14)


def test_a_step_by_itself(monkeypatch):
    """It prepares no sequence."""
    monkeypatch.setattr(CompiledSequence, "forward", None)
    assert_parity_of_single_steps(BACKEND, **COMPILED)


def test_strides_that_nobody_takes_compile_nothing_anew():
    """The steps of a single stream are cut from sequences of any length."""
    cut, whole = torch.empty(1, 7, 3)[:, 2], torch.empty(1, 3)
    assert cut.stride() != whole.stride()
    assert like_of(cut) == like_of(whole)
    assert like_of(torch.empty(2, 7, 3)[:, 2]) != like_of(torch.empty(2, 3))


def test_an_empty_batch_compiles_nothing(monkeypatch):
    monkeypatch.setattr(compiled, "machine_code", None)
    dnc = make(BACKEND, memory_size=7)
    inputs, state = draw(dnc, batch=0)
    assert_parity(dnc, inputs, state)
    with torch.no_grad():
        outputs, last = dnc.step(inputs[0], state)
    assert outputs.shape == (0, dnc.output_size)
    assert last.memory.link.shape == (0, 1, 7, 7)


def test_another_number_of_steps_compiles_nothing_anew(monkeypatch):
    """Whatever a reset's strides are: with the batch first they differ for each T."""
    asked = set()
    monkeypatch.setattr(compiled, "_compile", lambda *key: asked.add(key) or (lambda *tensors: None))
    dnc = make(BACKEND)
    for steps in (4, 7):
        inputs, state = draw(dnc, steps)
        reset = torch.zeros(BATCH, steps, dtype=torch.bool)
        reset[1, 2] = True
        for cleared in (reset.T, reset.T.contiguous(), reset[1].unsqueeze(1).expand(steps, BATCH)):
            dnc(inputs, state, reset=cleared)
            dnc(inputs, state, reset=cleared, lengths=[4, 4, 3])
    asked_of = sorted((part, stops, resets) for part, *_, (_, stops, resets, *_), _, _ in asked)
    assert asked_of == [("forward", 0, 0), ("forward", 0, 1), ("forward", 1, 0)]


def test_other_strides_of_a_step_compile_nothing_anew(monkeypatch):
    asked = []

    def ask(*key):
        asked.append(key)
        raise NotImplementedError

    monkeypatch.setattr(compiled, "_compile_alone", ask)
    dnc = make(BACKEND)
    inputs, state = draw(dnc)
    for given in (inputs[0], inputs.permute(1, 2, 0).contiguous()[..., 0]):
        with torch.no_grad(), pytest.raises(NotImplementedError):
            dnc.step(given, state)
    assert asked[0] == asked[1]


def test_what_is_small_is_computed_as_by_a_call():
    """Equal numbers keep their order, NaN comes first; along any axis; what is not served is left to a call."""
    x = torch.tensor([[0.5, 0.25, 0.5, torch.nan, 0.25, torch.nan, 1, 0], [0.0] * 8], dtype=torch.float64)
    options = dict(stable=True, descending=True)
    assert_same_bits(compiler._sort(x, **options), tuple(torch.sort(x, **options)))
    for given in ((x, dict(stable=True)), (x, dict(options, dim=0)), (torch.rand(2, 65), options)):
        assert compiler._sort(given[0], **given[1]) is NotImplemented
    drawn = torch.rand(2, 5, 64, dtype=torch.float64)
    for dim in (1, -1):
        torch.testing.assert_close(compiler._cumprod(drawn, dim), drawn.cumprod(dim), rtol=1e-14, atol=0)
    assert compiler._cumprod(torch.rand(2, 65), 1) is NotImplemented


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "turned"),
    [(3, 9, 1, False), (8, 20, 4, True), (1, 48, 4, False), (1, 50, 4, False), (9, 16, 4, False), (9, 17, 4, True)],
)
def test_a_product_that_is_no_call_is_the_product(rows, depth, columns, turned):
    a, base = (torch.randn(2, rows, size, dtype=torch.float64) for size in (depth, columns))
    b = torch.randn(2, depth, columns, dtype=torch.float64)
    b = b.mT.contiguous().mT if turned else b
    factors = dict(beta=0.5, alpha=2.0)
    if rows == 9 and turned:
        assert compiler._bmm(a, b) is compiler._baddbmm_(base, a, b) is NotImplemented
        return
    close = dict(rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(compiler._bmm(a, b), a @ b, **close)
    torch.testing.assert_close(compiler._bmm_out(a, b, out=torch.empty_like(base)), a @ b, **close)
    torch.testing.assert_close(
        compiler._baddbmm_(base.clone(), a, b, **factors), base.baddbmm(a, b, **factors), **close
    )


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES, ids=NAMES)
def test_a_step_by_itself_of_all_that_the_layer_can_be_told(choice):
    assert_parity_of_single_steps(BACKEND, **choice)


@pytest.mark.slow  # compiles
def test_the_first_call_without_gradients_whatever_the_default_device():
    with torch.inference_mode():
        dnc = make(BACKEND, word_size=3)
        inputs, state = draw(dnc, steps=2)
        with torch.device("meta"):
            outputs, _ = dnc(inputs, state)
        torch.testing.assert_close(outputs, make("reference", word_size=3)(inputs, state)[0], rtol=1e-12, atol=1e-14)


def test_what_is_negated_when_it_is_read():
    """Like the imaginary part of a conjugate, which has the other sign in memory."""
    dnc, lazy = (make(BACKEND, **COMPILED) for _ in range(2))
    replace_parameters(lazy, negated_when_read)
    inputs, state = draw(dnc)
    expected = dnc(inputs, state), dnc.step(inputs[0], state)
    negated = tree_map(negated_when_read, (inputs, state))
    assert all(x.is_neg() for x in (*tree_leaves(negated), *lazy.parameters()))
    assert_same_bits((lazy(*negated), lazy.step(negated[0][0], negated[1])), expected)
    with torch.no_grad():
        assert_same_bits((lazy(*negated), lazy.step(negated[0][0], negated[1])), expected)


def test_the_same_bits_again():
    dnc = make(BACKEND, **COMPILED)
    first, second = (outcome(operation, dnc, *draw(dnc)) for _ in range(2))
    assert_same_bits(first, second)


def test_a_nan_stays_in_its_row_and_is_not_lost():
    dnc = make(BACKEND, **COMPILED)
    inputs, state = draw(dnc)
    outputs, last = dnc(inputs, state)
    state.memory.usage[1, 2] = inputs[1, 0] = torch.nan
    spoilt, of_spoilt = dnc(inputs, state)
    for row in (0, 1):
        assert spoilt[1:, row].isnan().all()
        assert of_spoilt.memory.memory[row].isnan().all()
    assert_same_bits(spoilt[:, 2], outputs[:, 2])
    assert_same_bits(of_spoilt.memory.link[2], last.memory.link[2])


def check_lean(choice, *, masked):
    """What is recomputed of memory and link is what they were, to the last bit."""
    full, *lean = (make(BACKEND, checkpoint=every, **choice) for every in (None, 2, 3))
    inputs, state = draw(full)
    given = masks(inputs) if masked else {}
    expected = outcome(operation, full, inputs, state, **given)
    for dnc in lean:
        assert_same_bits(outcome(operation, dnc, inputs, state, **given), expected)


def test_lean_and_full(monkeypatch):
    made_again = []
    run = CompiledSequence._run

    def record(sequence, part, step, *gradients):
        made_again.extend([step] if part == "replay" else [])
        run(sequence, part, step, *gradients)

    monkeypatch.setattr(CompiledSequence, "_run", record)
    check_lean(COMPILED, masked=False)
    assert made_again == [2, 0, 3, 0, 1]  # of five steps: every second kept, every third


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("choice", [*CHOICES, dict(memory_size=64, word_size=20, num_reads=3)], ids=[*NAMES, "larger"])
def test_lean_and_full_of_all_that_the_layer_can_be_told(choice, masked):
    check_lean(choice, masked=masked)


def test_who_is_served(monkeypatch):
    dnc = make("auto")
    inputs, _ = draw(dnc)
    assert "* torch_sequence" in explain(dnc, inputs)  # nobody waits for a compiler without having asked
    problem = dnc.problem(inputs)
    supports = BACKENDS[BACKEND].supports
    assert supports(problem)[0]
    for changes, reason in (
        (dict(num_writes=2), "num_writes is 2"),
        (dict(device=torch.device("cuda")), "device is cuda"),
    ):
        served, why = supports(type(problem)(**{**vars(problem), **changes}))
        assert not served
        assert reason in why
    monkeypatch.setattr(dispatch, "HAS_COMPILER", False)
    with pytest.raises(RuntimeError, match=r"torch_compiled.*needs a C\+\+ compiler"):
        make(BACKEND)(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CELLS if "B1N128" in name or "clip0p5" in name])
def test_deepminds_rollouts(name):
    test_sequence_goldens.check_cell_rollout(BACKEND, name, torch.float64, None)
