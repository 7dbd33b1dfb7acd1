"""What PyTorch and users do around the sequence operation: compilers, autocast, hooks, dropout, second derivatives."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from helpers import assert_close, assert_same_bits
from small_layer import make, warm_state
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from dnc_triton import DNC, explain, use_backend
from dnc_triton.sequence import op, pool
from dnc_triton.sequence.product import Product

INPUTS = (3, 5, 3)


def warm(dnc: DNC):
    """A state in which no two slots are used equally."""
    weight = dnc.output.weight
    with torch.no_grad():
        return dnc(torch.randn(INPUTS[0], 6, 3, dtype=weight.dtype))[1]


def run(dnc: DNC, inputs, state, module=None, **options):
    """Outputs, and the gradients of the parameters."""
    dnc.zero_grad()
    outputs, final = (dnc if module is None else module)(inputs, state, **options)
    (outputs.square().sum() + final.memory.link.square().sum() + final.read_words.sum()).backward()
    return outputs.detach(), [parameter.grad.clone() for parameter in dnc.parameters()]


@pytest.mark.parametrize("resets", [False, True])
def test_compiled_it_is_one_node_and_computes_the_same(resets):
    dnc = make(backend="torch_sequence")  # which would refuse what must be called step by step
    state, inputs = warm(dnc), torch.randn(INPUTS, dtype=torch.float64)
    options = {"reset": torch.rand(INPUTS[:2]) < 0.3} if resets else {}
    called: list[Any] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(dnc, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    # Not to the bit: the compiler lays the inputs out as it likes.
    expected = run(dnc, inputs, state, **options)
    assert_close(run(dnc, inputs, state, compiled, **options), expected, rtol=1e-12, atol=1e-14)
    ours = [target for target in called if str(target).startswith("dnc_triton")]
    assert ours == [torch.ops.dnc_triton.sequence.default, torch.ops.dnc_triton.sequence_backward.default]
    assert not {torch.ops.aten.mm.default, torch.ops.aten.bmm.default} & set(called)


@pytest.mark.parametrize("checkpoint", ["auto", None, 2])
def test_compiled_for_any_number_of_steps(checkpoint, monkeypatch):
    """Also beyond what "auto" keeps, and with buffers on both sides of the size from which on they are reused."""
    monkeypatch.setattr(pool, "MOST", 2**14)
    monkeypatch.setattr(pool, "SMALLEST", 2**14)
    dnc = make(backend="torch_sequence", checkpoint=checkpoint)
    state = warm(dnc)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dnc, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for steps in (9, 30, 8, 11, 25):  # none is a size of the network, which it would be taken for
        inputs = torch.randn(3, steps, 3, dtype=torch.float64)
        assert_close(run(dnc, inputs, state, compiled), run(dnc, inputs, state), rtol=1e-12, atol=1e-15)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 4
    assert checkpoint == "auto" or counts[0] == counts[1]


@pytest.mark.parametrize("options", [{}, {"controller": "gru", "num_layers": 2, "clip": 0.3}], ids=["lstm", "gru"])
def test_the_operators_are_what_they_say(options):
    """Schema and fake implementation; and by PyTorch's compiler, with gradients, the same results."""
    # The history is a result too. Its parts begin at multiples of 16 bytes; an even batch leaves no gap between them,
    # whose numbers nobody writes.
    dnc = make(checkpoint=2, **options)
    inputs = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(4, 5) < 0.3
    forward, backward = torch.ops.dnc_triton.sequence.default, torch.ops.dnc_triton.sequence_backward.default
    calls = {}

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[func] = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, args)
            return func(*args, **(kwargs or {}))

    with Record():
        outputs, _ = dnc(inputs, warm_state(dnc), lengths=[5, 2, 0, 4], reset=reset)
        outputs.sum().backward()
    torch.library.opcheck(forward, calls[forward])
    torch.library.opcheck(backward, calls[backward])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "options", [{}, {"controller": "gru", "num_layers": 2, "dropout": 0.5}, {"controller": "feedforward"}], ids=str
)
def test_with_and_without_the_operator(options, mode, monkeypatch):
    """It stands aside where nobody looks. Any one of the results may be all that a loss is made of, or all of them."""
    dnc = make(**options)
    state, inputs = warm(dnc), torch.randn(INPUTS, dtype=torch.float64)

    def results(given):
        torch.manual_seed(1)
        outputs, final = dnc(inputs, given, lengths=[5, 2, 0], reset=torch.rand(INPUTS[:2]) < 0.3)
        flat = tree_leaves((outputs, final))
        if not torch.is_grad_enabled():
            return [x.clone() for x in flat]
        losses = [*(x.square().sum() for x in flat), sum(x.square().sum() for x in flat)]
        wanted = [*dnc.parameters(), *([] if given is None else tree_leaves(given))]
        sent_back = [torch.autograd.grad(x, wanted, retain_graph=True, allow_unused=True) for x in losses if x.grad_fn]
        return [flat, [[torch.zeros(0) if x is None else x for x in gradients] for gradients in sent_back]]

    for given in (None, tree_map(lambda x: x.detach().clone().requires_grad_(), state)):
        with mode():
            actual = results(given)
            with monkeypatch.context() as patch:
                patch.setattr(op, "is_eager", lambda tensors: False)
                assert_same_bits(results(given), actual)


def test_what_the_backward_needs_may_not_change():
    """What it does not need of the state may."""
    dnc = make()
    inputs = torch.randn(INPUTS, dtype=torch.float64)
    expected = torch.autograd.grad(dnc(inputs)[0].sum(), list(dnc.parameters()))
    outputs, final = dnc(inputs)
    final.memory.usage.mul_(2)
    assert_same_bits(torch.autograd.grad(outputs.sum(), list(dnc.parameters())), expected)
    for change in (lambda state: state.memory.memory.detach(), lambda state: inputs, lambda state: dnc.output.weight):
        outputs, final = dnc(inputs)
        with torch.no_grad():
            change(final).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs.sum().backward()


@pytest.mark.parametrize("batch_first", [True, False])
def test_outputs_may_be_overwritten(batch_first):
    def run(backend):
        dnc = make(backend=backend, batch_first=batch_first)
        outputs, _ = dnc(torch.linspace(-1, 1, math.prod(INPUTS), dtype=torch.float64).view(INPUTS))
        outputs.mul_(2)[:, 0] = 0
        outputs.square().sum().backward()
        return outputs.detach(), [parameter.grad for parameter in dnc.parameters()]

    assert_close(run("torch_sequence"), run("reference"), rtol=1e-10, atol=1e-12)


def test_autocast_rounds_products_and_not_the_memory():
    dnc = make(dtype=torch.float32)
    state, inputs = warm(dnc), torch.randn(INPUTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, final = dnc(inputs, state)
        with use_backend("reference"):
            expected, expected_final = dnc(inputs, state)
    assert outputs.dtype == expected.dtype == torch.bfloat16
    for x, want in zip(tree_leaves(final), tree_leaves(expected_final), strict=True):
        assert x.dtype == want.dtype == torch.float32
        assert (x != x.bfloat16()).any()
        assert_close(x, want, rtol=2e-2, atol=2e-2)


def test_both_factors_of_a_narrow_product_are_rounded():
    x, weight, d_product = torch.randn(3, 5), torch.randn(4, 5), torch.randn(3, 4)
    narrow_x, narrow_weight, narrow_d = x.bfloat16(), weight.bfloat16(), d_product.bfloat16()
    product = Product(weight, torch.bfloat16)
    assert_same_bits(product(x), (narrow_x @ narrow_weight.T).float())
    assert_same_bits(product.add_to(d_product, x, torch.empty(3, 4)), d_product + narrow_x @ narrow_weight.T)
    d_x = torch.empty(3, 5)
    product.backward(d_product, d_x)
    assert_same_bits(d_x, (narrow_d @ narrow_weight).float())
    assert_same_bits(product.all_backward(d_product), d_x)
    product.add_backward(d_product, d_x)
    assert_same_bits(d_x, 2 * (narrow_d @ narrow_weight).float())
    assert_same_bits(product.weight_gradient(d_product, x), (narrow_d.T @ narrow_x).float())


def test_a_nan_stays_in_its_row_of_a_narrow_product():
    """Also where rows are no whole tiles, and PyTorch on a CPU with AMX reads into the next one."""
    x, weight, d_product = torch.randn(64, 33), torch.randn(65, 33), torch.randn(64, 65)
    product = Product(weight, torch.bfloat16)

    def products():
        d_x = [torch.zeros(64, 33) for _ in range(2)]
        product.backward(d_product, d_x[0])
        product.add_backward(d_product, d_x[1])
        return [product(x), product.add_to(d_product, x, torch.empty(64, 65)), *d_x, product.all_backward(d_product)]

    clean = products()
    x[1] = d_product[1] = torch.nan
    others = torch.arange(64) != 1
    for spoilt, was in zip(products(), clean, strict=True):
        assert spoilt[1].isnan().all()
        assert_same_bits(spoilt[others], was[others])


def test_a_nan_stays_in_its_row_and_among_the_steps_after_it_under_autocast():
    torch.manual_seed(0)
    dnc, inputs = DNC(5, 33, 3, memory_size=8, word_size=16, num_reads=3), torch.randn(3, 6, 5)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return dnc(inputs)

    outputs, state = run()
    inputs[1, 4:] = torch.nan
    spoilt, of_spoilt = run()
    assert spoilt[1, 4:].isnan().all()
    assert_same_bits(spoilt[1, :4], outputs[1, :4])
    assert_same_bits(spoilt[::2], outputs[::2])
    assert_same_bits(of_spoilt.map(lambda x: x[::2]), state.map(lambda x: x[::2]))


@pytest.mark.parametrize("rounds", [False, True])
def test_a_backward_within_autocast_rounds_what_its_forward_did_and_no_more(rounds, monkeypatch):
    dnc = make(dtype=torch.float32)
    state, inputs = warm(dnc), torch.randn(INPUTS)

    def gradients(within):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
            outputs, _ = dnc(inputs, state)
        loss = outputs.float().square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            return torch.autograd.grad(loss, list(dnc.parameters()))

    assert_same_bits(gradients(True), gradients(False))
    monkeypatch.setattr(op, "is_eager", lambda tensors: False)
    assert_same_bits(gradients(True), gradients(False))


def test_the_gradient_of_dropout():
    """Along one direction of the parameters, with the same masks."""
    dnc = make(num_layers=2, dropout=0.5)
    state, inputs = warm(dnc), torch.randn(INPUTS, dtype=torch.float64)
    direction = [torch.randn_like(parameter) for parameter in dnc.parameters()]

    def loss(distance: float) -> float:
        moved = copy.deepcopy(dnc)
        with torch.no_grad():
            for parameter, step in zip(moved.parameters(), direction, strict=True):
                parameter.add_(step, alpha=distance)
            torch.manual_seed(1)
            return moved(inputs, state)[0].square().sum().item()

    torch.manual_seed(1)
    gradients = torch.autograd.grad(dnc(inputs, state)[0].square().sum(), list(dnc.parameters()))
    slope = sum((gradient * step).sum().item() for gradient, step in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-5)


def test_forward_mode_is_served_by_the_reference():
    dnc = make().requires_grad_(False)
    inputs, direction = torch.randn(2, *INPUTS, dtype=torch.float64)

    def slope() -> torch.Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(dnc(forward_ad.make_dual(inputs, direction))[0]).tangent

    step = 1e-6
    expected = (dnc(inputs + step * direction)[0] - dnc(inputs - step * direction)[0]) / (2 * step)
    torch.testing.assert_close(slope(), expected, rtol=1e-6, atol=1e-9)
    dnc.backend = "torch_sequence"
    with pytest.raises(RuntimeError, match="a transform"):
        slope()


def test_second_derivatives_are_refused_with_the_remedy():
    dnc = make()
    inputs = torch.randn(INPUTS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dnc(inputs)[0].square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        gradient.square().sum().backward()
    # Also where what is sent back does not depend on anything.
    (gradient,) = torch.autograd.grad(dnc(inputs)[0].sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend='reference'"):
        gradient.square().sum().backward()
    dnc.backend = "reference"
    (gradient,) = torch.autograd.grad(dnc(inputs)[0].square().sum(), inputs, create_graph=True)
    gradient.square().sum().backward()
    assert inputs.grad.any()


def test_gradients_in_batches_are_refused_with_the_remedy():
    dnc = make()
    outputs, _ = dnc(torch.randn(INPUTS, dtype=torch.float64))
    many, weight = torch.randn(3, *outputs.shape, dtype=torch.float64), dnc.output.weight
    with pytest.raises(RuntimeError, match=r"is_grads_batched.*backend='reference'"):
        torch.autograd.grad(outputs, weight, many, is_grads_batched=True)


def test_only_the_output_layer_learns():
    """Then nothing goes back through the state, which may be carried on without `detach`."""
    dnc = make().requires_grad_(False)
    dnc.output.requires_grad_()
    state = None
    for _ in range(3):
        outputs, state = dnc(torch.randn(INPUTS, dtype=torch.float64), state)
        assert not any(x.requires_grad for x in tree_leaves(state))
        outputs.sum().backward()
    assert dnc.output.weight.grad.any()


class Loud(nn.Linear):
    """A part of the user's own."""


def hooked(dnc: DNC) -> DNC:
    dnc.interface.register_forward_hook(lambda *_: dnc.heard.append(1))
    dnc.heard = []
    return dnc


def replaced(dnc: DNC) -> DNC:
    dnc.output = Loud(dnc.output.in_features, dnc.output.out_features, dtype=torch.float64)
    return dnc


def parametrized(dnc: DNC) -> DNC:
    nn.utils.parametrizations.weight_norm(dnc.interface)
    return dnc


def rewritten(dnc: DNC) -> DNC:
    linear = dnc.output.forward
    dnc.output.forward = lambda features: 2 * linear(features)
    return dnc


def advised(dnc: DNC) -> DNC:
    control = dnc.control
    dnc.control = lambda *arguments: control(*arguments)
    return dnc


def without_bias(dnc: DNC) -> DNC:
    dnc.interface.register_parameter("bias", None)
    return dnc


@pytest.mark.parametrize("change", [hooked, replaced, parametrized, rewritten, advised, without_bias])
def test_parts_of_the_users_own_are_called(change):
    dnc = make()
    inputs = torch.randn(INPUTS, dtype=torch.float64)
    assert "* torch_sequence" in explain(dnc, inputs)
    dnc = change(dnc)
    assert "* reference" in explain(dnc, inputs)
    actual = dnc(inputs)
    assert len(getattr(dnc, "heard", INPUTS[1] * [1])) == INPUTS[1]
    dnc.backend = "reference"
    assert_same_bits(actual, dnc(inputs))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_kind_are_called(kind):
    dnc, inputs = make(), torch.randn(INPUTS, dtype=torch.float64, requires_grad=True)
    for register in (
        getattr(dnc.output, f"register_{kind}_hook"),
        getattr(nn.modules.module, f"register_module_{kind}_hook"),
    ):
        heard: list[nn.Module] = []
        with register(lambda module, *_, heard=heard: heard.append(module)):
            assert "* reference" in explain(dnc, inputs)
            dnc(inputs)[0].sum().backward()
        assert dnc.output in heard
    assert "* torch_sequence" in explain(dnc, inputs)


def test_hooks_on_all_modules_are_called():
    dnc, heard = make(), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module)):
        dnc(torch.randn(INPUTS, dtype=torch.float64))
    assert heard.count(dnc.interface) == INPUTS[1]
    assert "* torch_sequence" in explain(dnc, torch.randn(INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("name", ["advance", "control", "project", "_clip"])
def test_an_overridden_method_is_called(name):
    """Whoever overrides a part of the step wants it called."""
    method, calls = getattr(DNC, name), []

    def overridden(self: DNC, *arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return method(self, *arguments, **options)

    dnc = type("Overriding", (DNC,), {name: overridden})(3, 6, 2, memory_size=5, word_size=4)
    assert "* reference" in explain(dnc, torch.randn(INPUTS))
    dnc(torch.randn(INPUTS))
    assert len(calls) >= (1 if name == "project" else INPUTS[1])  # the output layer takes all steps at once


@pytest.mark.parametrize(
    ("changes", "options"),
    [({}, {}), ({"num_writes": 2}, {}), ({"num_writes": 2, "checkpoint": 2}, {}), ({}, {"trace": True})],
    ids=["", "stepwise", "checkpoints step by step", "trace"],
)
@pytest.mark.parametrize("masks", [(), ("reset",), ("lengths", "reset")], ids=str)
def test_what_inference_mode_made_can_be_trained_on(changes, options, masks):
    """Such as the features of a network that is not trained, and the state after a stream that was only watched."""
    dnc = make(**changes)
    ordinary = torch.randn(INPUTS, dtype=torch.float64), warm(dnc)
    with torch.inference_mode():
        inputs, state = tree_map(torch.clone, ordinary)
        made = {"lengths": torch.tensor([5, 2, 4]), "reset": torch.eye(*INPUTS[:2], dtype=torch.bool)}
    assert inputs.is_inference()
    options = options | {name: made[name] for name in masks}
    outcomes = []
    for given in ((inputs, state), ordinary):
        outputs, *_ = dnc(*given, **options)
        outcomes.append((outputs, torch.autograd.grad(outputs.square().sum(), list(dnc.parameters()))))
    assert_same_bits(*outcomes)


@pytest.mark.parametrize(
    "options", [{"num_writes": 2}, {"controller": lambda i, h: make().controller.__class__("rnn", i, h)}]
)
def test_checkpoints_step_by_step(options):
    """Where autograd records each step, its own checkpoints serve."""
    dnc = make(**options)
    state, inputs = warm(dnc), torch.randn(INPUTS, dtype=torch.float64)
    arguments = dict(lengths=[5, 3, 0], reset=torch.rand(INPUTS[:2]) < 0.3)
    expected = run(dnc, inputs, state, **arguments)
    dnc.checkpoint = 2
    assert_close(run(dnc, inputs, state, **arguments), expected, rtol=1e-12, atol=1e-14)
    outputs, same = dnc(inputs[:, :0], state)
    assert outputs.shape == (INPUTS[0], 0, dnc.output_size)
    assert_same_bits(same, state)


def test_checkpoints_step_by_step_of_parameters_of_inference_mode():
    """They have no version that tells whether they have changed."""
    ordinary, inputs = make(num_writes=2, checkpoint=2).requires_grad_(False), torch.randn(INPUTS, dtype=torch.float64)
    with torch.inference_mode():
        dnc = copy.deepcopy(ordinary)
    assert dnc.output.weight.is_inference()
    assert_same_bits(dnc(inputs), ordinary(inputs))


@pytest.mark.parametrize(
    ("checkpoint", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (2.5, TypeError),
        (True, TypeError),
        ("all", TypeError),
        (torch.ones(2), TypeError),
    ],
    ids=str,
)
def test_bad_checkpoints(checkpoint, error):
    with pytest.raises(error, match=r"^checkpoint: expected .*got"):
        make(checkpoint=checkpoint)
    dnc = make()
    dnc.checkpoint = checkpoint
    with pytest.raises(error, match=r"^checkpoint: expected .*got"):
        dnc(torch.randn(INPUTS, dtype=torch.float64))


def test_it_is_kept_by_copies():
    dnc = make(checkpoint=7)
    for again in (copy.deepcopy(dnc), pickle.loads(pickle.dumps(dnc))):
        assert again.checkpoint == 7
        assert "checkpoint=7" in repr(again)


def test_twice_in_one_graph_and_twice_backwards():
    dnc = make()
    inputs = torch.randn(INPUTS, dtype=torch.float64)

    def gradients(**options):
        outputs, state = dnc(inputs)
        loss = outputs.sum() + dnc(inputs.flip(1), state)[0].square().sum()
        first = torch.autograd.grad(loss, list(dnc.parameters()), retain_graph=True)
        assert_same_bits(torch.autograd.grad(loss, list(dnc.parameters())), first)
        return first

    actual = gradients()
    with use_backend("reference"):
        assert_close(actual, gradients(), rtol=1e-12, atol=1e-14)
