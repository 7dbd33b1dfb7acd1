"""Parts of the layer that users change: pruned, replaced, with another dropout or another bound of gradients."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import assert_close, assert_same_bits
from small_layer import make
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from dnc_triton import DNC, MemoryState, explain, use_backend
from dnc_triton.sequence import unroll
from dnc_triton.sequence.op import run_sequence

INPUTS = (3, 5, 3)


def draw(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(INPUTS, dtype=dtype, generator=torch.Generator().manual_seed(1))


def run(dnc: DNC) -> list[Tensor]:
    """The outputs, and the gradient of each parameter."""
    outputs, state = dnc(draw())
    loss = outputs.square().sum() + state.read_words.sum()
    return [outputs.detach(), *torch.autograd.grad(loss, list(dnc.parameters()))]


def assert_as_the_reference(dnc: DNC) -> None:
    actual = run(dnc)
    with use_backend("reference"):
        assert_close(actual, run(dnc), rtol=1e-12, atol=1e-13)


def backend_of(dnc: DNC) -> str:
    (starred,) = (line for line in explain(dnc, draw()).splitlines() if line.startswith("*"))
    return starred.split()[1]


# --- weights that were put at the end of a part


@pytest.mark.parametrize(
    ("controller", "part", "names"),
    [
        ("lstm", "interface", ["weight"]),
        ("lstm", "output", ["weight"]),
        ("lstm", "controller.layers.0", ["weight_hh"]),
        ("lstm", "controller.layers.1", ["weight_ih", "bias_ih", "bias_hh"]),
        ("gru", "controller.layers.0", ["bias_ih"]),
        ("rnn", "controller.layers.1", ["bias_ih", "weight_hh"]),
        ("feedforward", "controller.layers.0", ["weight"]),
    ],
)
def test_weights_are_known_by_name(controller, part, names):
    """Ending a pruning or a parametrization puts the weight behind the others."""
    dnc = make(controller=controller, num_layers=2)
    module = dnc.get_submodule(part)
    before = [name for name, _ in module.named_parameters()]
    for name in names:
        prune.l1_unstructured(module, name, 0.3)
        prune.remove(module, name)
    assert [name for name, _ in module.named_parameters()] != before
    assert backend_of(dnc) == "torch_sequence"
    assert_as_the_reference(dnc)


def test_weights_whose_parametrization_has_ended():
    dnc = make()
    parametrize.register_parametrization(dnc.interface, "weight", nn.Tanh())
    parametrize.remove_parametrizations(dnc.interface, "weight")
    assert_as_the_reference(dnc)


@pytest.mark.parametrize("kept", [1, 3])
def test_a_controller_with_layers_less_or_more(kept):
    """The layer does not know how many they are: the controller is asked for its state, and called step by step."""
    dnc = make(num_layers=2)
    layers = dnc.controller.layers
    dnc.controller.layers = nn.ModuleList([*layers, copy.deepcopy(layers[1])][:kept])
    assert backend_of(dnc) == "reference"
    outputs, state = dnc(draw())
    assert len(state.controller) == kept
    first, state = dnc(draw()[:, :2])
    second, _ = dnc(draw()[:, 2:], state)
    assert_close(torch.cat([first, second], 1), outputs, rtol=1e-12, atol=1e-13)


# --- the controller's dropout and bound


class Wrapped(nn.Module):
    def __init__(self, controller: nn.Module) -> None:
        super().__init__()
        self.wrapped, self.initial_state = controller, controller.initial_state

    def forward(self, *arguments):
        return self.wrapped(*arguments)


@pytest.mark.parametrize("wrap", [Wrapped, partial(torch.compile, backend="eager")], ids=["wrapped", "compiled"])
def test_a_controller_whose_class_makes_no_initial_state(wrap):
    """What is wrapped around it passes on what it is asked."""
    dnc = make()
    expected = run(dnc)
    dnc.controller = wrap(dnc.controller)
    assert backend_of(dnc) == "reference"
    assert_close(run(dnc), expected, rtol=1e-12, atol=1e-13)


def test_dropout_is_what_its_module_does():
    dnc = make(num_layers=2, dropout=0.5).eval()
    still = run(dnc)
    assert_same_bits(run(dnc), still)
    dnc.controller.dropout.train()  # as one does to sample predictions
    torch.manual_seed(2)
    first = run(dnc)
    assert (first[0] != still[0]).any()
    assert (run(dnc)[0] != first[0]).any()
    torch.manual_seed(2)
    assert_same_bits(run(dnc), first)
    dnc.controller.dropout.p = 0.0
    assert dnc.dropout == 0.0
    assert_same_bits(run(dnc), still)
    with pytest.raises(AttributeError, match="dropout"):
        dnc.dropout = 0.5


def test_each_layer_is_given_another_mask(monkeypatch):
    masks = []

    def watched(*arguments):
        masks.extend(arguments[6])
        return run_sequence(*arguments)

    monkeypatch.setattr(unroll, "run_sequence", watched)
    make(num_layers=3, dropout=0.5)(draw())
    assert len(masks) == 2
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize("change", ["another", "hook"])
def test_a_dropout_of_ones_own_is_called(change):
    dnc, calls = make(num_layers=2), []
    if change == "another":
        dnc.controller.dropout = nn.Hardtanh(-0.01, 0.01)
        assert dnc.dropout == 0.0
        assert "dropout=" not in repr(dnc)
    else:
        dnc.controller.dropout.register_forward_hook(lambda *arguments: calls.append(1))
    assert backend_of(dnc) == "reference"
    assert_as_the_reference(dnc)
    assert len(calls) == (0 if change == "another" else 2 * INPUTS[1])


def test_a_dropout_that_overwrites_is_called(monkeypatch):
    """In the operation, it would multiply all of its masks into one."""
    dnc = make(num_layers=3, dropout=0.5)
    assert backend_of(dnc) == "torch_sequence"
    dnc.controller.dropout.inplace = True
    assert backend_of(dnc) == "reference"
    dropout, calls = nn.functional.dropout, []
    monkeypatch.setattr(nn.functional, "dropout", lambda *given: (calls.append(given[3]), dropout(*given))[1])
    dnc(draw())
    assert calls == 2 * INPUTS[1] * [True]


def test_the_bound_of_gradients_can_be_changed():
    dnc = make()
    free = run(dnc)
    dnc.controller.max_activation_gradient = 0.01
    assert dnc.max_activation_gradient == 0.01
    assert any((x != y).any() for x, y in zip(run(dnc), free, strict=True))
    assert_as_the_reference(dnc)


def test_a_controller_of_ones_own_has_neither():
    class Own(nn.Linear):
        def initial_state(self, batch_size, *, device, dtype):
            return ()

        def forward(self, inputs, state):
            return torch.tanh(super().forward(inputs)), ()

    dnc = make(controller=Own)
    assert (dnc.dropout, dnc.max_activation_gradient) == (0.0, None)


# --- an output layer of one's own


def test_an_output_layer_of_ones_own():
    dnc = make()
    plain = dnc.output
    dnc.output = nn.Identity()
    features, state = dnc(draw())
    assert features.shape == (*INPUTS[:2], dnc.feature_size)
    assert dnc(draw()[:, :0])[0].shape == (INPUTS[0], 0, dnc.feature_size)
    dnc.output = nn.Sequential(plain, nn.Tanh())
    assert_close(dnc(draw(), None)[0], torch.tanh(plain(features)), rtol=1e-12, atol=1e-13)
    assert dnc(draw(), state)[1].read_words.dtype == torch.float64
    assert backend_of(dnc) == "reference"


@pytest.mark.parametrize("compute", [prune.identity, nn.utils.spectral_norm], ids=["prune", "spectral_norm"])
def test_an_output_layer_whose_weight_a_hook_makes_is_converted_like_any_other(compute):
    """The weight itself is then no parameter, and stays as it was until the hook runs again."""
    dnc = make(dtype=torch.float32)
    compute(dnc.output, "weight")
    dnc.double()
    outputs, state = dnc(draw())
    assert outputs.dtype == state.read_words.dtype == dnc.initial_state(2).read_words.dtype == torch.float64


def test_an_output_layer_is_looked_at_without_computing_its_weight():
    """Computing it would take a step of its power iteration each time."""
    dnc = make()
    nn.utils.parametrizations.spectral_norm(dnc.output)
    before = {name: value.clone() for name, value in dnc.state_dict().items()}
    dnc.initial_state(2)
    explain(dnc, draw())
    assert_same_bits(dict(dnc.state_dict()), before)


class Quantized(nn.Module):
    """A linear layer with the weight in eight bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", (linear.weight * 100).to(torch.int8))
        self.scale = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))

    def forward(self, features):
        return features @ (self.weight.to(features.dtype).T * self.scale)


def test_an_output_layer_with_a_weight_of_integers():
    dnc = make()
    dnc.output = Quantized(dnc.output)
    assert dnc(draw())[0].dtype == torch.float64


def test_a_state_is_of_the_dtype_of_the_first_floating_parameter():
    """Whatever integers a quantized layer has."""
    dnc = make(controller=lambda inputs, hidden: Still(hidden))
    for part in ("interface", "output"):
        quantized = Quantized(dnc.get_submodule(part))
        weight, scale = nn.Parameter(quantized.weight, requires_grad=False), quantized.scale
        del quantized.weight, quantized.scale
        quantized.weight, quantized.scale = weight, scale
        setattr(dnc, part, quantized)
    assert next(dnc.parameters()).dtype == torch.int8
    assert dnc.initial_state(2).read_words.dtype == torch.float64


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"trace": True}, {"lengths": [2, 5, 0]}], ids=str)
def test_every_part_is_given_the_batch_first(options, batch_first):
    """By it hooks tell samples apart: Opacus for their gradients, captum for its attributions."""
    dnc, seen = make(batch_first=batch_first), []
    parts = [dnc.controller, *dnc.controller.layers, dnc.interface, dnc.output]
    for part in parts:
        part.register_forward_hook(lambda module, given, returned: seen.append((module, given[0].shape[0])))
    inputs = draw() if batch_first else draw().transpose(0, 1)
    dnc(inputs, **options)
    dnc(inputs[:, :0] if batch_first else inputs[:0])
    assert {module for module, _ in seen} == set(parts)
    assert {batch for _, batch in seen} == {INPUTS[0]}


class Rounded(Tensor):
    """A weight made of two tensors, which knows the linear layer and nothing else, as torchao makes them."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(**tensors)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if function is nn.functional.linear:
            inputs, weight, bias = arguments
            return nn.functional.linear(inputs, weight.numbers * weight.scale, bias)
        return super().__torch_function__(function, types, arguments, keywords)

    @classmethod
    def __torch_dispatch__(cls, called, types, arguments=(), keywords=None):
        assert called is torch.ops.aten.detach.default
        return cls(arguments[0].numbers, arguments[0].scale)


@pytest.mark.parametrize("part", ["interface", "output"])
def test_a_weight_that_is_made_of_others_is_given_to_its_layer(part):
    """Compiled too. The weight would refuse an operator of ours."""
    dnc = make()
    layer = dnc.get_submodule(part)
    numbers, scale = (100 * layer.weight.detach()).round(), torch.tensor(0.01, dtype=torch.float64)
    layer.weight = nn.Parameter(numbers * scale, requires_grad=False)
    inputs = draw()[:, :2]
    expected = dnc(inputs)
    layer.weight = nn.Parameter(Rounded(numbers, scale), requires_grad=False)
    assert backend_of(dnc) == "reference"
    torch._dynamo.reset()
    for call in (dnc, torch.compile(dnc, fullgraph=True, backend="eager")):
        assert_close(call(inputs), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch_sequence", "reference"])
def test_an_output_layer_that_has_no_part_in_the_loss_gets_no_gradient(backend):
    """Not one of zeros, with which its weights would decay."""
    dnc = make(backend=backend)
    dnc(draw())[1].read_words.sum().backward()
    assert [name for name, x in dnc.named_parameters() if x.grad is None] == ["output.weight", "output.bias"]


@pytest.mark.parametrize("backend", ["torch_sequence", "reference"])
@pytest.mark.parametrize("steps", [1, 2])
def test_an_interface_that_has_no_part_in_the_loss_gets_no_gradient(steps, backend):
    """In a single step of which only the controller's state is wanted, by a head of one's own, say."""
    dnc = make(backend=backend)
    dnc(draw()[:, :steps])[1].controller[0][0].sum().backward()
    without = [name for name, x in dnc.named_parameters() if x.grad is None]
    interface = ["interface.weight", "interface.bias"] if steps == 1 else []
    assert without == [*interface, "output.weight", "output.bias"]


class Watched(TorchDispatchMode):
    """Under this mode the operator is what is called."""

    def __torch_dispatch__(self, called, types, arguments=(), keywords=None):
        return called(*arguments, **(keywords or {}))


HOOKS = dict(
    register_hook=lambda gradient: gradient.clamp(-1, 1),
    register_post_accumulate_grad_hook=lambda parameter: nn.utils.clip_grad_value_(parameter, 1),
)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("mode", [nullcontext, Watched])
def test_a_hook_of_a_parameter_that_has_no_part_in_the_loss_is_given_zeros(mode, hook):
    """Autograd calls it all the same, with None where there is no gradient."""
    dnc = make()
    for parameter in dnc.parameters():
        getattr(parameter, hook)(HOOKS[hook])
    with mode():
        dnc(draw()[:, :1])[1].controller[0][0].sum().backward()
    for part in (dnc.interface, dnc.output):
        assert not any(x.grad.any() for x in part.parameters())


SEEN = [*MemoryState._fields, "read_words"]


def without_gradient(dnc, call, seen):
    """The parameters without a gradient, where the loss sees one part of the memory after a single step."""
    _, state = call(draw()[:, :1])
    dnc.zero_grad()
    (state.read_words if seen == "read_words" else getattr(state.memory, seen)).square().sum().backward()
    return {name for name, x in dnc.named_parameters() if x.grad is None}


@pytest.mark.parametrize("seen", SEEN)
def test_in_a_single_step_too_an_interface_that_the_loss_sees_learns(seen):
    layers = [make(backend=backend) for backend in ("torch_sequence", "reference")]
    ours, reference = (without_gradient(dnc, dnc, seen) for dnc in layers)
    assert ours == reference
    assert not ours & {"interface.weight", "interface.bias"}


def test_in_a_single_step_too_an_interface_that_the_loss_sees_learns_compiled():
    dnc = make(backend="torch_sequence")
    torch._dynamo.reset()
    compiled = torch.compile(dnc, backend="aot_eager")
    for seen in SEEN:
        assert not without_gradient(dnc, compiled, seen) & {"interface.weight", "interface.bias"}, seen


@pytest.mark.parametrize("shape", [(1,), (1, -1)], ids=["one number", "a row"])
@pytest.mark.parametrize(
    ("controller", "part", "name"),
    [
        ("lstm", "interface", "bias"),
        ("lstm", "output", "bias"),
        ("lstm", "controller.layers.0", "bias_ih"),
        ("lstm", "controller.layers.1", "bias_hh"),
        ("gru", "controller.layers.0", "bias_hh"),
        ("rnn", "controller.layers.1", "bias_ih"),
        ("feedforward", "controller.layers.1", "bias"),
    ],
)
def test_a_bias_of_another_shape_is_added_by_its_layer(controller, part, name, shape):
    """The layer broadcasts it; kernels that read it as they find it would read beyond its end."""
    dnc = make(controller=controller, num_layers=2)
    layer = dnc.get_submodule(part)
    assert backend_of(dnc) == "torch_sequence"
    bias = getattr(layer, name).detach()
    setattr(layer, name, nn.Parameter(bias[: None if -1 in shape else 1].reshape(shape)))
    assert backend_of(dnc) == "reference"
    assert_as_the_reference(dnc)
    with use_backend("torch_sequence"), pytest.raises(RuntimeError, match="torch_sequence"):
        dnc(draw())


@pytest.mark.parametrize("controller", ["lstm", "gru", "rnn"])
def test_weights_of_another_size_are_refused_by_their_layer(controller):
    dnc = make(controller=controller)
    cell = dnc.controller.layers[0]
    cell.weight_hh = nn.Parameter(torch.cat([cell.weight_hh.detach()] * 2, 1))
    assert backend_of(dnc) == "reference"
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|hidden"):
        dnc(draw())


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"device": "meta"}], ids=str)
@pytest.mark.parametrize("part", ["controller", "interface"])
def test_a_part_of_another_dtype_or_device_is_called(part, options):
    """It says itself what it cannot take; kernels would read what is not there."""
    dnc = make()
    dnc.get_submodule(part).to(**options)
    assert backend_of(dnc) == "reference"
    with pytest.raises(RuntimeError, match="dtype" if "dtype" in options else "meta"):
        dnc(draw())


@pytest.mark.parametrize("part", ["controller.layers.0", "interface", "output"])
def test_a_part_that_takes_more_numbers_is_called(part):
    dnc = make()
    name = "weight_ih" if part == "controller.layers.0" else "weight"
    layer = dnc.get_submodule(part)
    setattr(layer, name, nn.Parameter(nn.functional.pad(getattr(layer, name).detach(), (0, 1))))
    assert backend_of(dnc) == "reference"
    with pytest.raises(RuntimeError, match="shape"):
        dnc(draw())


def test_a_layer_without_parameters_is_told_apart():
    dnc = make(controller=lambda inputs, hidden: Still(hidden))
    dnc.interface, dnc.output = nn.Identity(), nn.Identity()
    with pytest.raises(TypeError, match="parameters: expected at least one of a floating dtype"):
        dnc(draw())


class Still(nn.Module):
    """A controller that has learned nothing, and never will."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def initial_state(self, batch_size, *, device, dtype):
        return ()

    def forward(self, inputs, state):
        return inputs.new_zeros(len(inputs), self.hidden_size), state


# --- precision


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("keeps", [True, False])
def test_autocast_leaves_float64_alone(steps, keeps):
    dnc, inputs = make(), draw()[:, :steps]
    with torch.set_grad_enabled(keeps):
        expected = dnc(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = dnc(inputs)
    assert actual[0].dtype == torch.float64
    assert_same_bits(actual, expected)
