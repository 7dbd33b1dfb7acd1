"""How the layer gets on with the rest of torch: files and copies, compilers, exports, functional calls, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch._dynamo.utils
from helpers import total
from small_layer import BATCH, CLOSE, EXACT, LENGTHS, RESETS, gradients, make, make_inputs, row, warm_state
from torch import nn
from torch.export import Dim
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_structure, treespec_dumps, treespec_loads
from torch.utils.checkpoint import checkpoint

from dnc_triton import DNC, DNCState, Interface, MemoryState, Trace
from dnc_triton.sequence import pool

# --- Saving and copying


def through_a_file(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda dnc: pickle.loads(pickle.dumps(dnc)),
        lambda dnc: through_a_file(dnc, weights_only=False),
        lambda dnc: _loaded(dnc.state_dict()),
        lambda dnc: _loaded(through_a_file(dnc.state_dict(), weights_only=True)),
    ],
    ids=["deepcopy", "pickle", "torch.save", "state_dict", "state_dict, weights_only"],
)
def test_a_copy_computes_the_same(again):
    dnc, inputs = make(clip=3.0, num_layers=2), make_inputs()
    dnc(inputs)  # used once: nothing that a call leaves behind is in the way
    copied = again(dnc)
    assert_close(copied(inputs), dnc(inputs), **EXACT)
    assert copied.extra_repr() == dnc.extra_repr()
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in dnc.parameters()}


def _loaded(state_dict) -> DNC:
    dnc = make(clip=3.0, num_layers=2)
    nn.init.zeros_(dnc.output.weight)
    dnc.load_state_dict(state_dict, strict=True)
    return dnc


def test_a_state_survives_a_file():
    state = warm_state(make()).detach()
    for again in (pickle.loads(pickle.dumps(state)), through_a_file(state, weights_only=False), copy.deepcopy(state)):
        assert type(again) is DNCState
        assert type(again.memory) is MemoryState
        assert_close(again, state, **EXACT)


def test_a_state_loads_with_weights_only_once_its_types_are_declared_safe():
    state = warm_state(make()).detach()
    with pytest.raises(pickle.UnpicklingError, match="DNCState"):
        through_a_file(state, weights_only=True)
    with torch.serialization.safe_globals([DNCState, MemoryState]):
        again = through_a_file(state, weights_only=True)
    assert type(again) is DNCState
    assert_close(again, state, **EXACT)


# --- The rest of torch


def run_and_gradients(module, dnc, inputs, given, **options):
    outputs, state = module(inputs, given, **options)
    return outputs, state, *gradients(total(outputs, state), inputs, given, dnc)


LENGTHS_AND_RESET = {"lengths": torch.tensor([1, 2]), "reset": torch.tensor([[0, 0], [0, 1]]).bool()}


def check_compiled(backend, options, **changes):
    torch._dynamo.reset()
    dnc, inputs = make(**changes), make_inputs(2, 2).requires_grad_()
    given = warm_state(dnc, 2)
    compiled = torch.compile(dnc, fullgraph=True, backend=backend)
    got, expected = (run_and_gradients(module, dnc, inputs, given, **options) for module in (compiled, dnc))
    assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, LENGTHS_AND_RESET], ids=["plain", "lengths, reset"])
def test_compiles_to_one_graph(options):
    check_compiled("aot_eager", options)


def test_compiled_a_state_wants_no_gradient_where_only_the_output_layer_learns():
    """It may be handed on without `detach`, as from the layer itself."""
    torch._dynamo.reset()
    dnc, inputs = make().requires_grad_(False), make_inputs(2, 2)
    dnc.output.requires_grad_()
    (got, state), (expected, _) = torch.compile(dnc, fullgraph=True, backend="aot_eager")(inputs), dnc(inputs)
    assert not any(tensor.requires_grad for tensor in tree_leaves(state))
    assert_close(gradients(total(got), dnc.output), gradients(total(expected), dnc.output), **CLOSE)


def test_lists_of_lengths_are_compiled_for_once():
    """Not anew for each batch of a training, which is an error from the ninth on."""
    torch._dynamo.reset()
    dnc, inputs = make(), make_inputs()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dnc, fullgraph=True, backend=counter)
    counts = []
    for lengths in ([5, 2, 3, 4], [2, 3, 4, 5], [3, 5, 2, 4], [4, 4, 3, 2]):
        assert_close(compiled(inputs, lengths=lengths), dnc(inputs, lengths=lengths), **CLOSE)
        counts.append(counter.frame_count)
    assert counts[1:] == counts[1:2] * 3  # for the first list, then for any


@pytest.mark.parametrize("number", [np.int64, torch.tensor], ids=["NumPy's", "tensors"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_compiles_for_a_list_of_numbers_that_are_not_pythons(number):
    torch._dynamo.reset()
    dnc, inputs = make(), make_inputs()
    compiled = torch.compile(dnc, fullgraph=True, backend="aot_eager")
    expected = dnc(inputs, lengths=LENGTHS)
    assert_close(compiled(inputs, lengths=[number(x) for x in LENGTHS]), expected, **CLOSE)
    assert_close(compiled(inputs, lengths=np.array(LENGTHS)), expected, **CLOSE)


@pytest.mark.parametrize(
    "changes", [dict(max_activation_gradient=0.01), pytest.param(dict(checkpoint=1), marks=pytest.mark.slow)], ids=str
)
def test_compiles_step_by_step(changes):
    check_compiled("aot_eager", {}, num_writes=2, **changes)


@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("inductor", LENGTHS_AND_RESET)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_that_is_compiled_as_it_goes(compiled):
    torch._dynamo.reset()
    dnc, inputs = make(), make_inputs(2, 2).requires_grad_()
    expected = gradients(total(dnc(inputs)), inputs, dnc)
    loss = total((torch.compile(dnc, backend="aot_eager") if compiled else dnc)(inputs))
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True, fullgraph=True, dynamic=False):
        loss.backward()
    assert_close((inputs.grad, *(parameter.grad for parameter in dnc.parameters())), expected, **CLOSE)


def test_exports():
    dnc, inputs = make().eval(), make_inputs(2, 2)
    given = warm_state(dnc, 2).detach()
    program = torch.export.export(dnc, (inputs, given), LENGTHS_AND_RESET)
    other = {"lengths": torch.tensor([2, 0]), "reset": torch.tensor([[1, 0], [0, 0]]).bool()}
    outputs, state = program.module()(-inputs, given, **other)
    assert type(state) is DNCState
    assert_close((outputs, state), dnc(-inputs, given, **other), **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_one_length(backend, keeps):
    """As TensorBoard takes one for its graph of a model, with gradients, and checks it without."""
    dnc, inputs = make(backend=backend), make_inputs(2, 3)
    with torch.set_grad_enabled(keeps):
        traced = torch.jit.trace(dnc, (inputs,))
        got, expected = traced(-inputs), dnc(-inputs)
    assert_close(got, expected, **CLOSE)
    if keeps:
        assert_close(*(gradients(total(result), dnc) for result in (got, expected)), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"trace": True}], ids=str)
def test_exported_program_survives_a_file(options):
    dnc, inputs = make(), make_inputs(1, 1)
    file = io.BytesIO()
    torch.export.save(torch.export.export(dnc, (inputs,), options), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(inputs, **options), dnc(inputs, **options), **CLOSE)


@pytest.mark.parametrize("kind", [Interface, MemoryState, DNCState, Trace])
def test_what_a_program_takes_and_returns_can_be_saved_with_it(kind):
    structure = tree_structure(kind(*kind._fields))
    assert treespec_loads(treespec_dumps(structure)) == structure


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_keeps_the_bound_of_gradients(strict):
    """Where the layer runs step by step too; without gradients nothing of it is left."""
    dnc, inputs = make(num_writes=2, max_activation_gradient=0.01), make_inputs(2, 2).requires_grad_()
    file = io.BytesIO()
    torch.export.save(torch.export.export(dnc, (inputs,), strict=strict), file)
    file.seek(0)
    got, expected = (total(module(inputs)) for module in (torch.export.load(file).module(), dnc))
    assert_close(gradients(got, inputs), gradients(expected, inputs), **CLOSE)
    with torch.no_grad():
        program = torch.export.export(dnc, (inputs,), strict=strict)
    assert not [node for node in program.graph.nodes if "limit_gradient" in str(node.target)]


def check_exported(dnc, inputs, shapes, others, strict):
    program = torch.export.export(dnc, (inputs,), dynamic_shapes={"inputs": shapes}, strict=strict)
    for batch, steps in others:
        other = make_inputs(batch, steps)
        assert_close(program.module()(other), dnc(other), **CLOSE)


@pytest.mark.parametrize(
    ("strict", "most"),
    [(False, 2**14), (False, 2**28), (True, 2**28), pytest.param(True, 2**14, marks=pytest.mark.slow)],
)
def test_exports_for_any_size(most, strict, monkeypatch):
    """Whatever "auto" would keep at these sizes."""
    monkeypatch.setattr(pool, "MOST", most)
    dnc, batch = make(), {0: Dim("B")}
    check_exported(dnc, make_inputs(3, 5), batch, [(2, 5), (30, 5)], strict)
    check_exported(dnc, make_inputs(3, 50), batch, [(2, 50), (8, 50)], strict)
    check_exported(dnc, make_inputs(3, 5), {**batch, 1: Dim("T", min=3)}, [(2, 3), (8, 50)], strict)
    with torch.no_grad():  # a program that may be trained keeps something between any two steps
        check_exported(dnc, make_inputs(3, 5), {**batch, 1: Dim("T", min=2)}, [(2, 2), (8, 50)], strict)


@pytest.mark.parametrize(("steps", "is_operator"), [(1, False), (2, True)])
def test_a_compiler_looks_into_a_single_step_without_gradients(steps, is_operator):
    """It makes that faster than the operator, and whoever loads such a program need not have this package."""
    dnc, inputs = make(), make_inputs(3, steps)
    with torch.no_grad():
        program = torch.export.export(dnc, (inputs,))
    assert any("dnc_triton" in str(node.target) for node in program.graph.nodes) == is_operator
    assert_close(program.module()(inputs), dnc(inputs), **CLOSE)


def test_exports_what_auto_keeps_of_a_known_size(monkeypatch):
    for most, expected in ((2**14, 8), (2**28, 1)):
        monkeypatch.setattr(pool, "MOST", most)
        program = torch.export.export(make(), (make_inputs(3, 50),))
        (node,) = (node for node in program.graph.nodes if node.target is torch.ops.dnc_triton.sequence.default)
        assert node.args[-4] == expected


def test_the_operator_takes_none_for_no_dropout():
    """AOTInductor hands on an empty list as None, forward and backward."""
    dnc, inputs = make(), make_inputs().requires_grad_()
    module = torch.export.export(dnc, (inputs,)).module()
    (node,) = (node for node in module.graph.nodes if node.target is torch.ops.dnc_triton.sequence.default)
    place = [argument.name for argument in node.target._schema.arguments].index("dropout")
    assert node.args[place] == []
    node.update_arg(place, None)
    module.recompile()
    got, expected = (total(run(inputs)) for run in (module, dnc))
    assert_close(gradients(got, inputs), gradients(expected, inputs), **CLOSE)


@pytest.mark.slow
def test_packages_by_aotinductor(tmp_path):
    dnc, inputs, given = make().eval(), make_inputs(2, 4), warm_state(make(), 2).detach()
    shapes = {"inputs": {1: Dim("T", min=2)}, "state": given.map(lambda x: None)}
    with torch.no_grad():
        program = torch.export.export(dnc, (inputs, given), dynamic_shapes=shapes)
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "dnc.pt2"))
        packaged = torch._inductor.aoti_load_package(file)
        for other in (inputs, make_inputs(2, 20)):
            assert_close(packaged(other, given), dnc(other, given), **CLOSE)


class Step(nn.Module):
    def __init__(self, dnc: DNC) -> None:
        super().__init__()
        self.dnc = dnc

    def forward(self, inputs, state):
        return self.dnc.step(inputs, state)


@pytest.mark.slow
def test_a_step_packages_for_any_batch(tmp_path):
    """Without an operator of ours, so that C++ runs it without Python."""
    dnc = make(backend="reference").eval()
    batch = {0: Dim("B", min=1, max=1024)}
    with torch.no_grad():
        shapes = {"inputs": batch, "state": dnc.initial_state(2).map(lambda x: batch)}
        given = make_inputs(2, 1)[:, 0], dnc.initial_state(2)
        program = torch.export.export(Step(dnc), given, dynamic_shapes=shapes)
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets
        assert not [target for target in targets if target.startswith("dnc_")]
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
        packaged = torch._inductor.aoti_load_package(file)
        for size in (1, 5):
            state = expected_state = dnc.initial_state(size)
            for inputs in make_inputs(4, size):  # contiguous ones: it checks no strides
                outputs, state = packaged(inputs, state)
                expected, expected_state = dnc.step(inputs, expected_state)
                assert_close(outputs, expected, **CLOSE)
            assert type(state) is DNCState


def test_functional_calls():
    dnc, inputs = make(), make_inputs()
    parameters = {name: p.detach() for name, p in dnc.named_parameters()}

    def loss(parameters, inputs):
        return total(torch.func.functional_call(dnc, parameters, (inputs,), {"lengths": LENGTHS}))

    got = torch.func.grad(loss)(parameters, inputs)
    expected = gradients(total(dnc(inputs, lengths=LENGTHS)), dnc)
    assert list(got) == [name for name, _ in dnc.named_parameters()]
    assert_close(list(got.values()), list(expected), **CLOSE)


def test_gradients_of_each_sample():
    dnc, inputs = make(), make_inputs()
    parameters = {name: p.detach() for name, p in dnc.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(dnc, parameters, (sample.unsqueeze(0),))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    for index in range(BATCH):
        alone = gradients(dnc(row(inputs, index))[0].square().sum(), dnc)
        assert_close([x[index] for x in each.values()], list(alone), **CLOSE)


def test_gradients_of_each_padded_sample():
    """Its length has no value that can be looked at."""
    dnc, inputs, lengths = make(), make_inputs(), torch.tensor(LENGTHS)

    def loss(sample, length):
        return dnc(sample.unsqueeze(0), lengths=length.unsqueeze(0))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(inputs, lengths)
    together = inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dnc(together, lengths=lengths)[0].square().sum(), together)
    assert_close(each, expected, **CLOSE)


def test_functional_calls_take_no_checkpoints():
    parameters = {name: p.detach() for name, p in make().named_parameters()}
    inputs = make_inputs()

    def loss(parameters, dnc):
        return torch.func.functional_call(dnc, parameters, (inputs,))[0].square().sum()

    got, expected = (torch.func.grad(loss)(parameters, make(checkpoint=every)) for every in (2, None))
    assert_close(got, expected, **EXACT)


STEPWISE = [dict(num_writes=2), dict(backend="reference")]  # ways to go step by step


class Scaled(nn.Module):
    """A controller with a buffer."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.linear = nn.Linear(input_size, hidden_size)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def initial_state(self, batch_size, *, device, dtype):
        return ()

    def forward(self, inputs, state):
        return torch.tanh(self.scale * self.linear(inputs)), ()


@pytest.mark.parametrize("stepwise", [*STEPWISE, dict(controller=Scaled)], ids=str)
def test_checkpoints_have_the_weights_of_a_functional_call(stepwise):
    """They are gone when the backward computes steps again. Tied or not, of a class of their own; buffers too."""

    class Tagged(nn.Parameter):
        pass

    def run(checkpoint, kind=nn.Parameter, **options):
        dnc = make(checkpoint=checkpoint, **stepwise)
        dnc.twice = dnc.interface.weight  # under another name
        weights = {name: kind(1.5 * p.detach()) for name, p in dnc.named_parameters()}
        tensors = weights | {name: 3 * buffer for name, buffer in dnc.named_buffers()}
        outputs, state = torch.func.functional_call(dnc, tensors, (make_inputs(),), **options)
        return gradients(total(outputs, state), weights)

    assert_close(run(2), run(None), **CLOSE)
    assert_close(run(2, tie_weights=False), run(None, tie_weights=False), **CLOSE)
    assert_close(run(2, Tagged), run(None, Tagged), **CLOSE)


@pytest.mark.parametrize("stepwise", STEPWISE, ids=str)
@pytest.mark.parametrize("changed", ["weight", "inputs", "state", "reset"])
def test_checkpoints_do_not_compute_again_from_what_has_changed(changed, stepwise):
    dnc, inputs, reset = make(checkpoint=2, **stepwise), make_inputs(), RESETS.clone()
    state = warm_state(dnc)
    outputs, _ = dnc(inputs, state, reset=reset)
    given = dict(weight=dnc.interface.weight, inputs=inputs, state=state.memory.link, reset=reset)[changed]
    with torch.no_grad():
        given.zero_()
    words = "modified by an inplace operation" if changed == "inputs" else "must stay as they are until the backward"
    with pytest.raises(RuntimeError, match=words):
        outputs.sum().backward()


def test_forward_mode_through_a_bound_of_gradients():
    """It bounds what goes back, and nothing that goes forward."""
    inputs = make_inputs()

    def forward(dnc):
        return torch.func.jvp(lambda x: dnc(x)[0], (inputs,), (inputs.flip(1),))

    assert_close(forward(make(max_activation_gradient=0.1)), forward(make()), **EXACT)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearized_layer():
    """PyTorch's `linearize` takes what is done in place as already done."""
    dnc, inputs = make().requires_grad_(False), make_inputs(2, 2)
    _, linear = torch.func.linearize(lambda x: dnc(x)[0], inputs)
    _, expected = torch.func.jvp(lambda x: dnc(x)[0], (inputs,), (inputs.flip(1),))
    assert_close(linear(inputs.flip(1)), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["jvp", "grad", "vmap of grad"])
def test_transforms_compile(what):
    dnc, inputs = make(), make_inputs(2, 2)

    def loss(x):
        return dnc(x)[0].square().sum()

    transforms = {
        "jvp": lambda x: torch.func.jvp(lambda x: dnc(x)[0], (x,), (x.flip(1),))[1],
        "grad": torch.func.grad(loss),
        "vmap of grad": torch.func.vmap(torch.func.grad(lambda x: loss(x.unsqueeze(0)))),
    }
    torch._dynamo.reset()
    expected = transforms[what](inputs)
    assert expected.abs().max() > 0
    assert_close(torch.compile(transforms[what], fullgraph=True, backend="aot_eager")(inputs), expected, **CLOSE)


def test_activation_checkpointing():
    dnc, inputs, given = make(num_layers=2, dropout=0.5), make_inputs().requires_grad_(), warm_state(make(num_layers=2))

    def run(call):
        torch.manual_seed(4)  # dropout draws the same numbers again when the segment is recomputed
        outputs, state = call(inputs[:, :3], given)
        more, state = call(inputs[:, 3:], state)
        return gradients(total(outputs, more, state), inputs, given, dnc)

    assert_close(run(lambda *args: checkpoint(dnc, *args, use_reentrant=False)), run(dnc), **CLOSE)
