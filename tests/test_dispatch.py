"""Which backend serves a call: who may ask for one, what is answered, and that every call goes through the table."""

from __future__ import annotations

import runpy
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_layer import PROBLEM

import dnc_reference
from dnc_triton import DNC, Interface, MemoryState, dispatch, explain, memory_step, use_backend
from dnc_triton.dispatch import BACKENDS, Backend, choose
from dnc_triton.kernels.layout import Layout, layouts, sequence_layouts
from dnc_triton.sequence.settings import SequenceSettings


def make(**changes) -> DNC:
    return DNC(3, 6, 2, memory_size=5, word_size=4, num_reads=2, **changes)


class Spy:
    """A backend that answers as it is told, writes down what it is asked, and computes as the reference does."""

    def __init__(self, supported: bool = True, reason: str = "as you like"):
        self.answer, self.problems, self.calls = (supported, reason), [], []
        self.backend = Backend(supports=self.supports, memory_step=self.memory_step, unroll=self.unroll)

    def supports(self, problem):
        self.problems.append(problem)
        return self.answer

    def memory_step(self, *args, **kwargs):
        self.calls.append(("memory_step", kwargs))
        return dnc_reference.memory_step(*args, **kwargs)

    def unroll(self, *args, checkpoint, **kwargs):
        self.calls.append(("unroll", {**kwargs, "checkpoint": checkpoint}))
        return dnc_reference.unroll(*args, **kwargs)


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch):
    """Whoever runs the tests may have asked for a backend."""
    monkeypatch.delenv("DNC_TRITON_BACKEND", raising=False)


@pytest.fixture
def add_backends(monkeypatch):
    """Put these backends, better ones first, in the place of all but the reference."""

    def add(**spies: Spy) -> None:
        table = {name: spy.backend for name, spy in spies.items()}
        monkeypatch.setattr(dispatch, "BACKENDS", {**table, "reference": BACKENDS["reference"]})

    return add


# --- Who is asked


def test_plain_pytorch_serves_a_cpu():
    for change in ({}, {"needs_gradient": False}, {"needs_gradient": False, "steps": 1}):
        assert choose(replace(PROBLEM, **change)) is BACKENDS["torch_sequence"]
    assert list(BACKENDS)[-1] == "reference"
    for change in ({"controller": "custom"}, {"controller": None}, {"num_writes": 2}, {"dtype": torch.bfloat16}):
        assert choose(replace(PROBLEM, **change)) is BACKENDS["reference"]


def test_precedence(add_backends, monkeypatch):
    """The argument, then use_backend, then the environment, then the first that serves."""
    spies = {name: Spy() for name in ("first", "named", "used", "environment")}
    add_backends(**spies)
    chosen = {name: spy.backend for name, spy in spies.items()}
    assert choose(PROBLEM) is chosen["first"]
    monkeypatch.setenv("DNC_TRITON_BACKEND", "environment")
    assert choose(PROBLEM) is chosen["environment"]
    with use_backend("used"):
        assert choose(PROBLEM) is chosen["used"]
        assert choose(PROBLEM, "named") is chosen["named"]
    assert choose(PROBLEM, "named") is chosen["named"]
    assert choose(PROBLEM) is chosen["environment"]
    monkeypatch.setenv("DNC_TRITON_BACKEND", "auto")
    assert choose(PROBLEM) is chosen["first"]


def test_use_backend_nests_and_restores(add_backends, monkeypatch):
    outer, inner = Spy(), Spy()
    add_backends(first=Spy(), outer=outer, inner=inner)
    monkeypatch.setenv("DNC_TRITON_BACKEND", "reference")

    def fail_inside():
        with use_backend("inner"):
            assert choose(PROBLEM) is inner.backend
            raise KeyError("inside")

    with use_backend("outer"):
        with pytest.raises(KeyError, match="inside"):
            fail_inside()
        assert choose(PROBLEM) is outer.backend
        with use_backend("auto"):  # asks for the best one, whatever the environment says
            assert choose(PROBLEM) is dispatch.BACKENDS["first"]
        assert choose(PROBLEM) is outer.backend
    assert choose(PROBLEM) is BACKENDS["reference"]


def test_use_backend_with_a_wrong_name_changes_nothing(add_backends):
    outer = Spy()
    add_backends(outer=outer)
    with use_backend("outer"):
        with pytest.raises(ValueError, match=r"^name: expected"), use_backend("nobody"):
            pass
        assert choose(PROBLEM) is outer.backend


def test_use_backend_is_seen_by_other_threads(add_backends):
    """Autograd runs on threads of its own: a setting that only one thread sees would not reach a recomputed step."""
    spy, seen = Spy(), []
    add_backends(first=Spy(), used=spy)
    with use_backend("used"):
        thread = threading.Thread(target=lambda: seen.append(choose(PROBLEM)))
        thread.start()
        thread.join()
    assert seen == [spy.backend]


def test_use_backend_in_many_threads_at_once_leaves_nothing():
    def enter_and_leave():
        for _ in range(500):
            with use_backend("reference"):
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=enter_and_leave) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert choose(PROBLEM) is BACKENDS["torch_sequence"]


# --- What is answered


def test_auto_passes_over_what_declines(add_backends):
    declining, serving = Spy(False, "needs a GPU"), Spy()
    add_backends(declining=declining, serving=serving)
    assert choose(PROBLEM) is serving.backend
    assert declining.problems == serving.problems == [PROBLEM]
    add_backends(declining=declining)
    assert choose(PROBLEM) is BACKENDS["reference"]


@pytest.mark.parametrize(
    ("asked_by", "layer_backend", "used", "environment"),
    [
        ("the argument backend", "declining", None, None),
        ("use_backend", "auto", "declining", None),
        ("the environment variable DNC_TRITON_BACKEND", "auto", None, "declining"),
    ],
    ids=["argument", "use_backend", "environment"],
)
def test_a_named_backend_that_declines_raises_its_reason(
    add_backends, monkeypatch, asked_by, layer_backend, used, environment
):
    spy = Spy(False, "needs a GPU")
    add_backends(declining=spy, serving=Spy())
    if environment:
        monkeypatch.setenv("DNC_TRITON_BACKEND", environment)
    message = rf"^backend 'declining', asked for by {asked_by}, does not serve this call: needs a GPU$"
    dnc, inputs = make(backend=layer_backend), torch.randn(2, 3, 3)
    interface, state = step_arguments()
    with use_backend(used) if used else nullcontext():
        with pytest.raises(RuntimeError, match=message):
            dnc(inputs)
        with pytest.raises(RuntimeError, match=message):
            memory_step(interface, state, backend=layer_backend)
        assert "  declining       declines: needs a GPU" in explain(dnc, inputs)
    assert spy.calls == []


def test_explain(add_backends):
    add_backends(fused=Spy(False, "needs a GPU"), stepwise=Spy(True, "one launch per step"))
    lines = explain(make(), torch.randn(2, 3, 3)).splitlines()
    assert lines == [
        "sequence, lstm controller, 1×6, cpu, float32, B=2, T=3, N=5, W=4, R=2, K=1, with gradients",
        "asked for: 'auto', by default",
        "  fused           declines: needs a GPU",
        "* stepwise        serves: one launch per step",
        "  reference       serves: plain PyTorch: every device, floating dtype, size and controller",
    ]


def test_explain_stars_the_one_asked_for(add_backends, monkeypatch):
    add_backends(first=Spy(), second=Spy())
    inputs = torch.randn(2, 3, 3)

    def asked_and_starred(dnc):
        _, asked, *backends = explain(dnc, inputs).splitlines()
        return asked, [line.split()[1] for line in backends if line.startswith("*")]

    assert asked_and_starred(make()) == ("asked for: 'auto', by default", ["first"])
    monkeypatch.setenv("DNC_TRITON_BACKEND", "second")
    by_environment = "asked for: 'second', by the environment variable DNC_TRITON_BACKEND"
    assert asked_and_starred(make()) == (by_environment, ["second"])
    with use_backend("reference"):
        assert asked_and_starred(make()) == ("asked for: 'reference', by use_backend", ["reference"])
        by_argument = ("asked for: 'first', by the argument backend", ["first"])
        assert asked_and_starred(make(backend="first")) == by_argument
        with use_backend("auto"):
            assert asked_and_starred(make()) == ("asked for: 'auto', by use_backend", ["first"])


def test_explain_takes_what_forward_takes():
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 3), [3, 1], batch_first=True)
    assert explain(make(), packed).startswith("sequence, lstm controller, 1×6, cpu, float32, B=2, T=3,")


def test_an_operator_is_given_every_layout_whole():
    for layout in [*layouts(16), *layouts(64), *layouts(256), *sequence_layouts(16, 8)]:
        assert Layout.from_operand(layout.as_operand()) == layout


def test_an_operator_is_given_settings_in_their_order():
    schema = torch.ops.dnc_triton.sequence_backward.default._schema
    names = tuple(argument.name for argument in schema.arguments)
    assert names[-len(SequenceSettings._fields) :] == SequenceSettings._fields


@pytest.mark.parametrize("hip", [False, True])
@pytest.mark.parametrize("memory_size", [1, 16, 17, 64, 65, 128, 129, 1024, 1025, 2048])
def test_layouts_are_few_and_told_apart(memory_size, hip):
    found = layouts(memory_size, hip=hip)
    assert 2 <= len(found) <= 5
    assert all(layout.spread for layout in found) == (hip and memory_size > 1024)
    for fused in (True, False):
        described = [layout.describe() for layout in found if layout.fused == fused]
        assert len(set(described)) == len(described)


def test_a_layout_is_described_by_its_tiles_its_warps_and_what_is_special():
    split = Layout(False, 32, 128, 1)
    assert split.describe() == "32×128, 1 warp"
    assert split._replace(spread=True, ranks=True).describe() == "32×128, 1 warp, spread, ranks"
    assert Layout(True, 16, 16, 4, backward_rows=32).describe() == "16×16 and 32×16, 4 warps"


# --- Every call goes through the table


def step_arguments(dtype=torch.float32, *, num_writes=1):
    shapes = Interface.shapes(2, 4, 3, num_writes)
    return (
        Interface(**{name: torch.rand(shape, dtype=dtype) for name, shape in shapes.items()}),
        MemoryState.zeros(2, 5, 4, 3, num_writes, dtype=dtype),
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_layer_asks_and_is_served(add_backends, batch_first):
    spy = Spy()
    add_backends(spy=spy)
    dnc, reference = make(batch_first=batch_first), make(batch_first=batch_first, backend="reference")
    reference.load_state_dict(dnc.state_dict())
    inputs = torch.randn(*((2, 7) if batch_first else (7, 2)), 3)
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(
        dnc(inputs, lengths=[3, 7], reset=reset), reference(inputs, lengths=[3, 7], reset=reset), rtol=0, atol=0
    )
    assert spy.problems == [replace(PROBLEM, batch=2, steps=7)]
    # A backend has the signature of `dnc_reference.unroll`, which is time first.
    ((name, options),) = spy.calls
    assert name == "unroll"
    assert options.keys() == {"lengths", "reset", "checkpoint"}
    assert options["lengths"].tolist() == [3, 7]
    assert options["reset"].shape == (7, 2)


@pytest.mark.parametrize("controller", ["gru", "rnn", "feedforward"])
def test_the_layer_tells_its_controller(add_backends, controller):
    spy = Spy()
    add_backends(spy=spy)
    make(controller=controller)(torch.randn(1, 1, 3))
    assert spy.problems[0].controller == controller


def test_a_controller_of_your_own_is_custom(add_backends):
    spy = Spy()
    add_backends(spy=spy)
    make(controller=lambda i, h: make(controller="rnn").controller)(torch.randn(1, 1, 3))
    assert spy.problems[0].controller == "custom"


def test_the_layer_tells_dtype_and_gradient(add_backends):
    spy = Spy()
    add_backends(spy=spy)
    dnc = make(dtype=torch.float64)
    with torch.no_grad():
        dnc(torch.randn(1, 1, 3, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make()(torch.randn(1, 1, 3).bfloat16())
    told = [(problem.dtype, problem.needs_gradient) for problem in spy.problems]
    assert told == [(torch.float64, False), (torch.float32, True)]  # the state's dtype, not the inputs'


@pytest.mark.parametrize("stop_usage_gradient", [True, False])
def test_memory_step_asks_and_is_served(add_backends, stop_usage_gradient):
    spy = Spy()
    add_backends(spy=spy)
    interface, state = step_arguments(torch.float64, num_writes=2)
    got = memory_step(interface, state, stop_usage_gradient=stop_usage_gradient)
    torch.testing.assert_close(got, dnc_reference.memory_step(interface, state), rtol=0, atol=0)
    assert spy.calls == [("memory_step", {"stop_usage_gradient": stop_usage_gradient})]
    call = dict(dtype=torch.float64, batch=2, steps=1, num_reads=3, num_writes=2, needs_gradient=False)
    assert spy.problems == [replace(PROBLEM, **call, controller=None, hidden_size=0, num_layers=0)]
    assert str(spy.problems[0]) == "memory step, cpu, float64, B=2, T=1, N=5, W=4, R=3, K=2, without gradients"


@pytest.mark.parametrize("part", [0, 1], ids=["interface", "state"])
def test_memory_step_tells_whether_a_gradient_may_be_asked_for(add_backends, part):
    spy = Spy()
    add_backends(spy=spy)
    for index in range(len(step_arguments()[part])):
        arguments = step_arguments()
        arguments[part][index].requires_grad_()
        memory_step(*arguments)
        with torch.no_grad():
            memory_step(*arguments)
    told = [problem.needs_gradient for problem in spy.problems]
    assert told == [True, False] * len(step_arguments()[part])


def test_a_named_backend_serves_memory_step(add_backends):
    first, named = Spy(), Spy()
    add_backends(first=first, named=named)
    memory_step(*step_arguments(), backend="named")
    assert (len(first.calls), len(named.calls)) == (0, 1)


def test_the_compiled_layer_follows_use_backend(add_backends):
    """A backend is chosen anew where the setting has changed since the layer was compiled."""
    spy = Spy()
    add_backends(first=Spy(), spy=spy)
    torch._dynamo.reset()
    dnc, inputs = make(), torch.randn(1, 1, 3)
    # "eager" traces as every backend of torch.compile does, and is the quickest.
    compiled = torch.compile(dnc, backend="eager")
    compiled(inputs)
    assert not spy.calls
    with use_backend("spy"):
        compiled(inputs)
    assert spy.problems


@pytest.mark.skipif(sys.platform != "linux", reason="where PyTorch's compiler asks for g++")
@pytest.mark.parametrize("named", [True, False])
def test_a_compiler_that_pytorch_does_not_ask_for_is_none(named, tmp_path, monkeypatch):
    """One that CXX names but that is not there, or one other than g++ that CXX does not name."""
    (tmp_path / "clang++").write_text("#!/bin/sh")
    (tmp_path / "clang++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", "/nowhere/clang++")
    looked_up = runpy.run_path(dispatch.__file__)
    assert looked_up["COMPILER"] == ("/nowhere/clang++" if named else "g++")
    assert not looked_up["HAS_COMPILER"]


def test_explain_says_where_nothing_runs():
    dnc, inputs = DNC(3, 6, 2, memory_size=5, word_size=4, num_writes=2, backend="torch_sequence"), torch.randn(1, 2, 3)
    assert explain(dnc, inputs).endswith("the backend asked for by name does not serve this call, which would raise")
    with pytest.raises(RuntimeError, match="num_writes"):
        dnc(inputs)
    dnc.backend = "auto"
    assert "* reference" in explain(dnc, inputs)
    assert "nothing runs" not in explain(dnc, inputs)
