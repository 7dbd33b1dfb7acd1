"""Weights from the package `dnc` of PyPI: where each goes, what agrees with the package itself, and what is refused."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnc_reference import DNCState, MemoryState, addressing
from dnc_reference.interface import activate_interface
from dnc_triton import DNC, explain, from_pytorch_dnc

B, T, D, H, N, W, R = 3, 7, 4, 6, 9, 5, 2
SIZES = {"memory_size": N, "word_size": W, "num_reads": R}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
# The package's order.
FIELDS = {
    "read_keys_transform": R * W,
    "read_strengths_transform": R,
    "write_key_transform": W,
    "write_strength_transform": 1,
    "erase_vector_transform": W,
    "write_vector_transform": W,
    "free_gates_transform": R,
    "allocation_gate_transform": 1,
    "write_gate_transform": 1,
    "read_modes_transform": 3 * R,
}


def make_weights(kind="lstm", layers=1, *, joined=True, bias=True, prefix="") -> dict[str, torch.Tensor]:
    """Random numbers with the names and shapes of the package's state_dict."""
    weights = {}
    for index in range(layers):
        columns = H if index else D + R * W
        for name, shape in (("weight_ih", (columns,)), ("weight_hh", (H,)), ("bias_ih", ()), ("bias_hh", ())):
            if bias or "weight" in name:
                weights[f"{kind}_layer_0.{name}_l{index}"] = torch.randn(GATES[kind] * H, *shape)
    separate = {f"{name}.{part}": torch.randn(size, *shape)
                for name, size in FIELDS.items() for part, shape in (("weight", (H,)), ("bias", ()))}  # fmt: skip
    if joined:
        separate = {f"interface_weights.{part}": torch.cat([separate[f"{name}.{part}"] for name in FIELDS])
                    for part in ("weight", "bias")}  # fmt: skip
    weights |= {f"rnn_layer_memory_shared.{name}": tensor for name, tensor in separate.items()}
    weights |= {"output.weight": torch.randn(D, H + R * W), "output.bias": torch.randn(D)}
    return {prefix + name: tensor for name, tensor in weights.items()}


def test_the_layer_is_on_the_cpu():
    """Whatever the default device: on "meta" weights would be lost, and biases that are made where there are none."""
    weights = make_weights(bias=False)
    with torch.device("meta"):
        dnc = from_pytorch_dnc(weights, **SIZES)
    assert {x.device.type for x in dnc.state_dict().values()} == {"cpu"}
    assert torch.equal(dnc.output.weight, weights["output.weight"])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", GATES)
def test_the_controller_is_torchs(kind, layers):
    weights = make_weights(kind, layers)
    dnc = from_pytorch_dnc(weights, **SIZES, read_feedback=True)
    theirs = getattr(nn, kind.upper())(D + R * W, H, layers, batch_first=True)
    theirs.load_state_dict({name.removeprefix(f"{kind}_layer_0."): tensor
                            for name, tensor in weights.items() if name.startswith(f"{kind}_layer_0.")})  # fmt: skip
    inputs = torch.randn(B, T, D + R * W)
    state, steps = dnc.controller.initial_state(B), []
    for step in inputs.unbind(1):
        hidden, state = dnc.controller(step, state)
        steps.append(hidden)
    torch.testing.assert_close(torch.stack(steps, 1), theirs(inputs)[0])
    assert (dnc.controller_kind, dnc.num_layers) == (kind, layers)


@pytest.mark.parametrize("joined", [True, False])
def test_each_field_of_the_interface_is_the_packages(joined):
    weights = make_weights(joined=joined)
    dnc = from_pytorch_dnc(weights, **SIZES)
    hidden = torch.randn(B, H)
    if joined:
        vector = F.linear(hidden, weights["rnn_layer_memory_shared.interface_weights.weight"],
                          weights["rnn_layer_memory_shared.interface_weights.bias"])  # fmt: skip
        raw = dict(zip(FIELDS, vector.split(list(FIELDS.values()), -1), strict=True))
    else:
        names = {name: f"rnn_layer_memory_shared.{name}" for name in FIELDS}
        raw = {
            name: F.linear(hidden, weights[f"{full}.weight"], weights[f"{full}.bias"]) for name, full in names.items()
        }
    interface = activate_interface(dnc.interface(hidden), num_reads=R, num_writes=1, word_size=W, strength=dnc.strength)
    expected = {
        "read_keys": raw["read_keys_transform"].tanh().view(B, R, W),
        "read_strengths": F.softplus(raw["read_strengths_transform"]),
        "write_keys": raw["write_key_transform"].tanh().view(B, 1, W),
        "write_strengths": F.softplus(raw["write_strength_transform"]),
        "erase_vectors": raw["erase_vector_transform"].sigmoid().view(B, 1, W),
        "write_vectors": raw["write_vector_transform"].tanh().view(B, 1, W),
        "free_gates": raw["free_gates_transform"].sigmoid(),
        "allocation_gates": raw["allocation_gate_transform"].sigmoid(),
        "write_gates": raw["write_gate_transform"].sigmoid(),
        "read_modes": raw["read_modes_transform"].view(B, R, 3).softmax(-1),
    }
    torch.testing.assert_close(interface._asdict(), expected)


@pytest.mark.parametrize("prefix", ["model.", "models[0]."])
def test_prefix_memory_of_its_own_and_other_names(prefix):
    plain = make_weights()
    others = {prefix + name.replace("shared", "0"): tensor for name, tensor in plain.items()}
    others |= {"head.weight": None, "other_lstm_layer_0.weight_ih_l0": None}
    expected, got = (from_pytorch_dnc(weights, **SIZES) for weights in (plain, others))
    torch.testing.assert_close(got.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_more_than_ten_layers():
    weights = make_weights(layers=11)
    dnc = from_pytorch_dnc(weights, **SIZES)
    assert torch.equal(dnc.controller.layers[10].weight_ih, weights["lstm_layer_0.weight_ih_l10"])


def test_weights_stay_as_they_are():
    """Even those of float64, whose memory is not copied on the way."""
    weights = {name: tensor.double() for name, tensor in make_weights().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    assert not from_pytorch_dnc(weights, **SIZES).controller.layers[0].weight_ih[:, D:].any()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_without_biases_they_are_zero():
    dnc = from_pytorch_dnc(make_weights("gru", 2, bias=False), **SIZES)
    for layer in dnc.controller.layers:
        assert not layer.bias_ih.any()
        assert not layer.bias_hh.any()


@pytest.mark.parametrize("read_feedback", [False, True])
def test_weights_by_the_read_words(read_feedback):
    weights = make_weights()
    dnc = from_pytorch_dnc(weights, **SIZES, read_feedback=read_feedback)
    got, given = dnc.controller.layers[0].weight_ih, weights["lstm_layer_0.weight_ih_l0"]
    assert torch.equal(got[:, :D], given[:, :D])
    assert torch.equal(got[:, D:], given[:, D:] if read_feedback else torch.zeros(4 * H, R * W))
    dnc(torch.randn(B, T, D))[0].sum().backward()
    assert dnc.controller.layers[0].weight_ih.grad[:, D:].any()  # training may find a use for them


def test_it_is_a_layer_like_any_other():
    dnc = from_pytorch_dnc(make_weights("gru", 2), **SIZES, dropout=0.25, batch_first=False, dtype=torch.float64)
    assert (dnc.dropout, dnc.batch_first, dnc.output.weight.dtype) == (0.25, False, torch.float64)
    dnc.eval()
    inputs = torch.randn(T, B, D, dtype=torch.float64)
    outputs, state = dnc(inputs, lengths=[T, 2, 0])
    again, _ = pickle.loads(pickle.dumps(dnc))(inputs, lengths=[T, 2, 0])
    assert torch.equal(outputs, again)
    assert isinstance(state, DNCState)
    assert "* reference" in explain(dnc, inputs)
    with pytest.raises(RuntimeError, match=r"interface\.0\.weight"):  # a plain layer would leave the tanh out
        DNC(D, H, D, **SIZES, controller="gru", num_layers=2).load_state_dict(dnc.state_dict())


# --- what is refused


def without(name: str) -> dict[str, torch.Tensor]:
    weights = make_weights()
    del weights[name]
    return weights


@pytest.mark.parametrize("name", make_weights())
def test_weight_missing_or_of_the_wrong_shape(name):
    with pytest.raises(ValueError, match="model: expected"):
        from_pytorch_dnc(without(name), **SIZES)
    weights = make_weights()
    weights[name] = F.pad(weights[name], (0, 1))
    with pytest.raises(ValueError, match="model: expected"):
        from_pytorch_dnc(weights, **SIZES)


SPARSE = {f"rnn_layer_memory_shared.{name}.weight": torch.zeros(1) for name in ("read_query_transform",)}


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        (make_weights() | {"lstm_layer_1.weight_ih_l0": torch.zeros(1)}, {}, ValueError, "model: .*num_layers=1"),
        (make_weights(joined=False) | SPARSE, {}, ValueError, "model: .*dense.*read_query_transform"),
        (make_weights() | {"lstm_layer_0.weight_hr_l0": torch.zeros(1)}, {}, ValueError, "model: .*weight_hr_l0"),
        (make_weights() | make_weights(prefix="two."), {}, ValueError, "model: expected one .* got 2"),
        ({}, {}, ValueError, "model: expected one .* got 0"),
        (make_weights() | {"output.bias": torch.zeros(D).int()}, {}, TypeError, "model: .*output.bias.*int32"),
        (make_weights(), {"num_reads": 3}, ValueError, "num_reads=3"),
        (make_weights(), {"num_reads": 30}, ValueError, "model: .*weight_ih_l0.*num_reads=30"),
        (make_weights(), {"memory_size": None}, TypeError, "memory_size: expected an integer.*None"),
        (make_weights(), {"memory_size": 0}, ValueError, "memory_size: expected at least 1"),
        (make_weights(), {"word_size": 2.5}, TypeError, "word_size: expected an integer"),
        (make_weights(), {"read_feedback": 1}, TypeError, "read_feedback: expected a bool"),
        (nn.LSTM(3, 4), {}, TypeError, "model: expected a dnc.DNC of release 2.0.0b1.*LSTM"),
        (list(make_weights()), {}, TypeError, "model: .*list"),
    ],
)  # fmt: skip
def test_what_is_no_weights_of_a_dnc(model, changes, error, message):
    with pytest.raises(error, match=message):
        from_pytorch_dnc(model, **SIZES | changes)


# --- against the package itself


def make_theirs(dtype=torch.float64, **changes):
    dnc = pytest.importorskip("dnc")
    arguments = dict(num_hidden_layers=1, nr_cells=N, cell_size=W, read_heads=R) | changes
    return dnc.DNC(D, H, **arguments).to(dtype)


def initial(theirs, *, warm=False, empty=False, dtype=torch.float64):
    """Their state and ours, the same: zeros, or, if `warm`, random but for words read and, if `empty`, the memory."""
    shape = (B, theirs.output_size)
    layers = theirs.num_hidden_layers
    hidden = [torch.rand(2, *shape, dtype=dtype) - 0.5 if warm else torch.zeros(2, *shape, dtype=dtype)
              for _ in range(layers)]  # fmt: skip
    memory = MemoryState.zeros(B, N, W, R, dtype=dtype)
    if warm:
        link = torch.rand(B, 1, N, N, dtype=dtype) / N * (1 - torch.eye(N, dtype=dtype))
        memory = MemoryState(
            torch.zeros(B, N, W, dtype=dtype) if empty else torch.randn(B, N, W, dtype=dtype),
            torch.rand(B, N, dtype=dtype),
            link,
            *(torch.rand(B, heads, N, dtype=dtype).softmax(-1) for heads in (1, R, 1)),
        )
    names = ("memory", "usage_vector", "link_matrix", "precedence", "read_weights", "write_weights")
    h = torch.stack([state[0] for state in hidden])
    c = torch.stack([state[1] for state in hidden])
    lstm = theirs.rnn_type == "lstm"
    read_words = torch.zeros(B, R, W, dtype=dtype)
    theirs_state = ([(h, c) if lstm else h], [dict(zip(names, memory, strict=True))], read_words.flatten(1))
    controller = tuple((state[0], state[1]) if lstm else (state[0],) for state in hidden)
    return theirs_state, DNCState(controller, memory, read_words), names


KINDS = [
    {},
    {"rnn_type": "gru", "independent_linears": True},
    {"rnn_type": "rnn", "share_memory_between_layers": False},
    {"num_hidden_layers": 2, "bias": False, "clip": 0},
]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_but_for_one_epsilon_a_sequence_gives_their_outputs(changes, monkeypatch):
    """Everything but the ε in the norms agrees to rounding; that their outputs are time first is part of it."""
    theirs = make_theirs(**changes)
    ours = from_pytorch_dnc(theirs, dtype=torch.float64)
    inputs = torch.randn(B, T, D, dtype=torch.float64)
    expected, _ = theirs(inputs, initial(theirs)[0])
    assert expected.shape == (T, B, D)
    with_epsilon, _ = ours(inputs)
    monkeypatch.setattr(addressing, "NORM_EPSILON", 0.0)
    outputs, _ = ours(inputs)
    torch.testing.assert_close(outputs, expected.transpose(0, 1), rtol=0, atol=1e-12)
    assert (with_epsilon - outputs).abs().max() > 1e-12  # ε is seen


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_but_for_one_epsilon_single_steps_give_their_states_and_gradients(changes, monkeypatch):
    """Called with one step at a time, their controller sees what was read, and slot by slot all is the same."""
    monkeypatch.setattr(addressing, "NORM_EPSILON", 0.0)
    theirs = make_theirs(**changes)
    ours = from_pytorch_dnc(theirs, dtype=torch.float64, read_feedback=True)
    inputs = torch.randn(B, T, D, dtype=torch.float64)
    their_state, state, names = initial(theirs, warm=True)
    steps = []
    for step in inputs.split(1, dim=1):
        outputs, their_state = theirs(step, their_state)
        steps.append(outputs[0])
    expected = torch.stack(steps, 1)
    outputs, state = ours(inputs, state)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    for field, name in zip(state.memory, names, strict=True):
        torch.testing.assert_close(field, their_state[1][0][name], rtol=0, atol=1e-12)

    weight = torch.randn_like(outputs)
    (outputs * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # Each gradient goes the way of its weight.
    expected_gradients = from_pytorch_dnc(gradients, **SIZES, dtype=torch.float64, read_feedback=True).state_dict()
    for name, parameter in ours.named_parameters():
        if "bias_" in name and not theirs.bias:
            continue
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_up_to_the_first_lookup_of_a_word_all_agrees_as_it_is(dtype, tolerance):
    """From an empty memory, with usage and links at work: controller, interface, allocation, write and linkage."""
    theirs = make_theirs(dtype)
    ours = from_pytorch_dnc(theirs, dtype=dtype)
    their_state, state, names = initial(theirs, warm=True, empty=True, dtype=dtype)
    inputs = torch.randn(B, 1, D, dtype=dtype)
    _, (their_controller, (their_memory,), _) = theirs(inputs, their_state)
    _, state = ours(inputs, state)
    torch.testing.assert_close(state.controller[0], (their_controller[0][0][0], their_controller[0][1][0]),
                               rtol=0, atol=tolerance)  # fmt: skip
    for field, name in zip(MemoryState._fields, names, strict=True):
        if field != "read_weights":
            torch.testing.assert_close(getattr(state.memory, field), their_memory[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_sequence_differs_by(seed):
    """The ε in the norms as it is: docs/migrating.md names the smallest and the largest of these five."""
    torch.manual_seed(seed)
    dnc = pytest.importorskip("dnc")
    theirs = dnc.DNC(8, 64, num_hidden_layers=1, nr_cells=64, cell_size=16, read_heads=4).double()
    inputs = torch.randn(3, 100, 8, dtype=torch.float64)
    hidden = torch.zeros(1, 3, 64, dtype=torch.float64)
    memory = {name: field.double() for name, field in theirs.memories[0].new(3).items()}
    with torch.no_grad():
        expected, _ = theirs(inputs, ([(hidden, hidden)], [memory], None))
        outputs, _ = from_pytorch_dnc(theirs, dtype=torch.float64)(inputs)
    assert 1e-6 < (outputs - expected.transpose(0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "num_layers=1.* got num_layers=2"),
        ({"rnn_type": "rnn", "nonlinearity": "relu"}, "nonlinearity='tanh'.*'relu'"),
        ({"clip": 0.5}, "clip=0 .*clip=0.5"),
        ({"clip": -1}, "clip=0 .*clip=-1"),
    ],
)
def test_a_module_that_has_no_counterpart(changes, message):
    with pytest.raises(ValueError, match=message):
        from_pytorch_dnc(make_theirs(**changes))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_modules(training):
    theirs = make_theirs(num_hidden_layers=2, dropout=0.5).train(training)
    ours = from_pytorch_dnc(theirs)
    assert {module.training for module in ours.modules()} == {training}
    assert ours.dropout == 0.5


def test_a_dropout_that_is_asked_for_is_not_the_modules():
    theirs = make_theirs(num_hidden_layers=2, dropout=0.5)
    assert from_pytorch_dnc(theirs, dropout=0.25).dropout == 0.25


def test_a_clip_of_one_does_nothing():
    theirs = make_theirs(clip=1)
    ours = from_pytorch_dnc(theirs)
    assert ours.clip is None


def test_sparse_memories_have_no_counterpart():
    dnc = pytest.importorskip("dnc")
    for kind in (dnc.SAM, dnc.SDNC):
        theirs = kind(D, H, num_hidden_layers=1, nr_cells=N, cell_size=W, read_heads=R)
        with pytest.raises(ValueError, match=f"model: expected a dense memory.*{kind.__name__}"):
            from_pytorch_dnc(theirs)
        with pytest.raises(ValueError, match="model: expected"):
            from_pytorch_dnc(theirs.state_dict(), **SIZES)


def test_sizes_that_are_not_the_modules():
    with pytest.raises(ValueError, match=re.escape(f"memory_size: expected None or the module's own {N}, got 3")):
        from_pytorch_dnc(make_theirs(), memory_size=3)
    with pytest.raises(TypeError, match=re.escape(f"num_reads: expected an integer, got {float(R)}")):
        from_pytorch_dnc(make_theirs(), num_reads=float(R))
