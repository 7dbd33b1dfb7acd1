"""What is refused, and how: the exception's type, and a message with the argument, what was expected and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from dnc_reference.interface import interface_sizes
from dnc_triton import DNC, DNCState, Interface, MemoryState, explain, from_deepmind, memory_step, use_backend

SIZES = dict(memory_size=5, word_size=4, num_reads=2, num_writes=1)


def make(**changes) -> DNC:
    return DNC(**{**dict(input_size=3, hidden_size=6, output_size=2, **SIZES), **changes})


def refuses(error: type[Exception], argument: str, expected: str, came: str):
    """Every message reads "argument: expected …, got …"."""
    pattern = rf"(?s)^{re.escape(argument)}: expected .*{re.escape(expected)}.*, got .*{re.escape(came)}"
    return pytest.raises(error, match=pattern)


def case(*values, id: str):
    """One row of a table."""
    return pytest.param(*values, id=id)


# --- The constructor


class NoController(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()


SIZE_NAMES = [
    "input_size",
    "hidden_size",
    "output_size",
    "memory_size",
    "word_size",
    "num_reads",
    "num_writes",
    "num_layers",
]
BACKENDS = "'auto' or one of '"


@pytest.mark.parametrize("name", SIZE_NAMES)
@pytest.mark.parametrize(
    ("size", "error", "expected"),
    [
        case(0, ValueError, "at least 1", id="zero"),
        case(-3, ValueError, "at least 1", id="negative"),
        case(4.0, TypeError, "an integer", id="float"),
        case(True, TypeError, "an integer", id="bool"),
        case("4", TypeError, "an integer", id="text"),
        case(None, TypeError, "an integer", id="None"),
        case(torch.tensor(4), TypeError, "an integer", id="tensor"),
    ],
)
def test_sizes(name, size, error, expected):
    with refuses(error, name, expected, repr(size)):
        make(**{name: size})


@pytest.mark.parametrize(
    ("argument", "value", "error", "expected", "came"),
    [
        case(
            "controller", "transformer", ValueError, "'lstm', 'gru', 'rnn', 'feedforward'", "'transformer'", id="name"
        ),
        case("controller", "LSTM", ValueError, "'lstm', 'gru', 'rnn', 'feedforward'", "'LSTM'", id="case of a name"),
        case("controller", None, TypeError, "a name or a factory", "NoneType", id="no controller"),
        case("controller", 3, TypeError, "a name or a factory", "int", id="controller is a number"),
        case("controller", lambda i, h: None, TypeError, "nn.Module", "NoneType", id="factory makes nothing"),
        case("controller", lambda i, h: torch.tanh, TypeError, "nn.Module", "builtin", id="factory makes a function"),
        case("controller", NoController, TypeError, "initial_state(batch_size", "NoController", id="no initial_state"),
        case("controller", nn.Linear(3, 3), TypeError, "factory", "Linear", id="a module, no factory"),
        case("dropout", 1.0, ValueError, "[0, 1)", "1.0", id="dropout 1"),
        case("dropout", 1.5, ValueError, "[0, 1)", "1.5", id="dropout above 1"),
        case("dropout", -0.1, ValueError, "[0, 1)", "-0.1", id="dropout below 0"),
        case("dropout", float("nan"), ValueError, "[0, 1)", "nan", id="dropout nan"),
        case("dropout", "0.5", TypeError, "number", "'0.5'", id="dropout is text"),
        case("dropout", None, TypeError, "number", "None", id="no dropout"),
        case("clip", 0, ValueError, "above 0", "0", id="clip 0"),
        case("clip", -1.0, ValueError, "above 0", "-1.0", id="clip below 0"),
        case("clip", float("nan"), ValueError, "above 0", "nan", id="clip nan"),
        case("clip", "3", TypeError, "number", "'3'", id="clip is text"),
        case("max_activation_gradient", 0, ValueError, "above 0", "0", id="max_activation_gradient 0"),
        case("max_activation_gradient", True, TypeError, "number", "True", id="max_activation_gradient is a bool"),
        case("strength", "relu", ValueError, "'oneplus', 'softplus'", "'relu'", id="strength"),
        case("strength", None, ValueError, "'oneplus', 'softplus'", "None", id="no strength"),
        case("backend", "cuda", ValueError, BACKENDS, "'cuda'", id="backend"),
        case("backend", None, ValueError, BACKENDS, "None", id="no backend"),
        case("dtype", torch.int32, TypeError, "floating dtype", "torch.int32", id="dtype integer"),
        case("dtype", torch.complex64, TypeError, "floating dtype", "torch.complex64", id="dtype complex"),
        case("dtype", torch.bool, TypeError, "floating dtype", "torch.bool", id="dtype bool"),
        case("dtype", "float32", TypeError, "floating dtype", "'float32'", id="dtype is text"),
    ],
)
def test_constructor(argument, value, error, expected, came):
    with refuses(error, argument, expected, came):
        make(**{argument: value})


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"dropout": 0.5}], ids=["num_layers", "dropout"])
def test_layers_and_dropout_belong_to_built_in_controllers(changes):
    came = f"{changes.get('num_layers', 1)} and {changes.get('dropout', 0.0)}"
    with refuses(ValueError, "num_layers, dropout", "1 and 0", came):
        make(controller=NoController, **changes)


# --- The call

BATCH, STEPS = 4, 7
INPUTS = torch.randn(BATCH, STEPS, 3)


@pytest.mark.parametrize("ask", [lambda dnc, inputs: dnc(inputs), explain], ids=["forward", "explain"])
@pytest.mark.parametrize(
    ("inputs", "error", "expected", "came"),
    [
        case(INPUTS[0], ValueError, "3 dimensions [B, T, input_size]", "[7, 3]", id="rank 2"),
        case(INPUTS[None], ValueError, "3 dimensions [B, T, input_size]", "[1, 4, 7, 3]", id="rank 4"),
        case(INPUTS[..., :2], ValueError, "input_size 3", "[4, 7, 2]", id="size"),
        case(INPUTS.double(), TypeError, "torch.float32", "torch.float64", id="float64"),
        case(INPUTS.half(), TypeError, "torch.float32", "torch.float16", id="float16"),
        case(INPUTS.long(), TypeError, "torch.float32", "torch.int64", id="integers"),
        case(INPUTS.bool(), TypeError, "torch.float32", "torch.bool", id="bool"),
        case(INPUTS + 0j, TypeError, "torch.float32", "torch.complex64", id="complex"),
        case(INPUTS.to("meta"), ValueError, "cpu", "meta", id="device"),
        case(INPUTS.numpy(), TypeError, "a tensor [B, T, input_size] or a PackedSequence", "ndarray", id="array"),
        case(None, TypeError, "a tensor [B, T, input_size] or a PackedSequence", "NoneType", id="None"),
    ],
)
def test_inputs(inputs, error, expected, came, ask):
    with refuses(error, "inputs", expected, came):
        ask(make(), inputs)


def test_inputs_of_a_time_first_layer_are_named_time_first():
    with refuses(ValueError, "inputs", "[T, B, input_size]", "[7, 3]"):
        make(batch_first=False)(INPUTS[0])


@pytest.mark.parametrize(
    "dtype",
    [
        case(torch.int64, id="integers"),
        case(torch.complex64, id="complex"),
        case(torch.float64, id="float64"),
    ],
)
def test_inputs_that_autocast_does_not_cast(dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16), refuses(TypeError, "inputs", "torch.float32", str(dtype)):
        make()(INPUTS.to(dtype))


def packed(data: torch.Tensor) -> PackedSequence:
    return pack_padded_sequence(data, [7, 7, 2, 1], batch_first=True)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "argument", "expected", "came"),
    [
        case(packed(INPUTS[..., :2]), {}, ValueError, "inputs", "input_size 3", "2]", id="size"),
        case(packed(INPUTS[..., 0]), {}, ValueError, "inputs", "3 dimensions", "[4, 7]", id="rank"),
        case(packed(INPUTS.double()), {}, TypeError, "inputs", "torch.float32", "torch.float64", id="dtype"),
        case(packed(INPUTS.long()), {}, TypeError, "inputs", "torch.float32", "torch.int64", id="integers"),
    ],
)
def test_packed_inputs(inputs, options, error, argument, expected, came):
    with refuses(error, argument, expected, came):
        make()(inputs, **options)


def test_packed_inputs_have_their_own_lengths():
    with pytest.raises(ValueError, match=r"^lengths: expected None with a PackedSequence, which has its own lengths$"):
        make()(packed(INPUTS), lengths=[7, 7, 2, 1])


ONE_PER_ROW = "shape [4], one per row of the batch"


@pytest.mark.parametrize(
    ("lengths", "error", "expected", "came"),
    [
        case([7, 8, 1, 1], ValueError, "0…7, the number of steps", "8", id="beyond the steps"),
        case([7, -1, 1, 1], ValueError, "0…7, the number of steps", "-1", id="negative"),
        case([7, 7, 7], ValueError, ONE_PER_ROW, "[3]", id="too few"),
        case([], ValueError, ONE_PER_ROW, "[0]", id="none"),
        case(7, ValueError, ONE_PER_ROW, "[]", id="a number"),
        case(torch.ones(4, 1, dtype=torch.int64), ValueError, ONE_PER_ROW, "[4, 1]", id="rank 2"),
        case(torch.ones(4), TypeError, "integers", "torch.float32", id="floats"),
        case([1.0, 2.0, 3.0, 4.0], TypeError, "integers", "torch.float32", id="list of floats"),
        case(torch.ones(4, dtype=torch.bool), TypeError, "integers", "torch.bool", id="bool"),
        case([True] * 4, TypeError, "integers", "torch.bool", id="list of bools"),
        case(torch.ones(4, dtype=torch.complex64), TypeError, "integers", "torch.complex64", id="complex"),
        case(["7"] * 4, TypeError, "integers", "list", id="list of text"),
        case([None] * 4, TypeError, "integers", "list", id="list of None"),
        case({}, TypeError, "integers", "dict", id="dict"),
        case(torch.ones(4, dtype=torch.int64, device="meta"), ValueError, "values", "meta", id="meta"),
    ],
)
def test_lengths(lengths, error, expected, came):
    with refuses(error, "lengths", expected, came):
        make()(INPUTS, lengths=lengths)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_lengths_of_the_newer_unsigned_dtypes(dtype):
    """They are integers, so they are served; torch's support for them is thin."""
    make()(INPUTS, lengths=torch.ones(4, dtype=dtype))


RESET = torch.zeros(BATCH, STEPS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("reset", "error", "expected", "came"),
    [
        case(RESET.T, ValueError, "shape [4, 7]", "[7, 4]", id="time first"),
        case(RESET[:, 0], ValueError, "shape [4, 7]", "[4]", id="one per row"),
        case(RESET[..., None], ValueError, "shape [4, 7]", "[4, 7, 1]", id="rank 3"),
        case(RESET[:, :-1], ValueError, "shape [4, 7]", "[4, 6]", id="too few steps"),
        case(RESET.long(), TypeError, "torch.bool", "torch.int64", id="integers"),
        case(RESET.float(), TypeError, "torch.bool", "torch.float32", id="floats"),
        case(RESET.to("meta"), ValueError, "cpu", "meta", id="device"),
        case(RESET.tolist(), TypeError, "a tensor", "list", id="list"),
        case(True, TypeError, "a tensor", "bool", id="a bool"),
    ],
)
def test_reset(reset, error, expected, came):
    with refuses(error, "reset", expected, came):
        make()(INPUTS, reset=reset)


def test_reset_of_a_time_first_layer_is_time_first():
    with refuses(ValueError, "reset", "shape [7, 4]", "[4, 7]"):
        make(batch_first=False)(INPUTS.transpose(0, 1), reset=RESET)


# --- The state

STATE = make().initial_state(BATCH)


@pytest.mark.parametrize(
    ("changes", "argument", "expected", "came"),
    [
        case({"memory_size": 6}, "state.memory.memory", "[4, 5, 4]", "[4, 6, 4]", id="memory_size"),
        case({"word_size": 3}, "state.memory.memory", "[4, 5, 4]", "[4, 5, 3]", id="word_size"),
        case({"num_reads": 1}, "state.memory.read_weights", "[4, 2, 5]", "[4, 1, 5]", id="num_reads"),
        case({"num_writes": 2}, "state.memory.link", "[4, 1, 5, 5]", "[4, 2, 5, 5]", id="num_writes"),
        case({"hidden_size": 7}, "state.controller", "[4, 6]", "[4, 7]", id="hidden_size"),
        case({"num_layers": 2}, "state.controller", "1 layer(s) of 'lstm'", "TreeSpec", id="num_layers"),
        case({"controller": "gru"}, "state.controller", "1 layer(s) of 'lstm'", "TreeSpec", id="gru"),
        case({"controller": "feedforward"}, "state.controller", "1 layer(s) of 'lstm'", "TreeSpec", id="feedforward"),
    ],
)
def test_state_of_another_configuration(changes, argument, expected, came):
    with refuses(ValueError, argument, expected, came):
        make()(INPUTS, make(**changes).initial_state(BATCH))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_state_of_another_batch(rows):
    with refuses(ValueError, "state.memory.memory", "[4, 5, 4]", f"[{rows}, 5, 4]"):
        make()(INPUTS, make().initial_state(rows))


FIELDS = [("memory." + name) for name in MemoryState._fields] + ["read_words"]


def replaced(state: DNCState, field: str, change) -> DNCState:
    """The state with one tensor changed."""
    if field == "read_words":
        return state._replace(read_words=change(state.read_words))
    if field == "controller":
        ((hidden, cell),) = state.controller
        return state._replace(controller=((hidden, change(cell)),))
    name = field.removeprefix("memory.")
    return state._replace(memory=state.memory._replace(**{name: change(getattr(state.memory, name))}))


@pytest.mark.parametrize("field", [*FIELDS, "controller"])
@pytest.mark.parametrize(
    ("change", "error", "expected", "came"),
    [
        case(lambda x: x[:-1], ValueError, "shape [4,", "[3,", id="batch"),
        case(lambda x: x[..., :-1], ValueError, "shape [4,", "[4,", id="size"),
        case(lambda x: x[0], ValueError, "shape [4,", "[", id="rank"),
        case(torch.Tensor.double, TypeError, "torch.float32", "torch.float64", id="float64"),
        case(torch.Tensor.long, TypeError, "torch.float32", "torch.int64", id="integers"),
        case(lambda x: x.to("meta"), ValueError, "cpu", "meta", id="device"),
        case(lambda x: None, TypeError, "a tensor", "NoneType", id="None"),
        case(torch.Tensor.numpy, TypeError, "a tensor", "ndarray", id="array"),
    ],
)
def test_state_with_one_bad_tensor(field, change, error, expected, came):
    with refuses(error, f"state.{field}", expected, came):
        make()(INPUTS, replaced(STATE, field, change))


@pytest.mark.parametrize(
    ("state", "error", "argument", "expected", "came"),
    [
        case(tuple(STATE), TypeError, "state", "a DNCState or None", "tuple", id="tuple"),
        case(STATE.memory, TypeError, "state", "a DNCState or None", "MemoryState", id="MemoryState"),
        case(STATE.controller[0], TypeError, "state", "a DNCState or None", "tuple", id="as of nn.LSTM"),
        case(
            STATE._replace(memory=tuple(STATE.memory)),
            TypeError,
            "state.memory",
            "a MemoryState",
            "tuple",
            id="memory is a tuple",
        ),
        case(
            STATE._replace(controller=None),
            ValueError,
            "state.controller",
            "1 layer(s) of 'lstm'",
            "*",
            id="no controller",
        ),
        case(
            STATE._replace(controller=[list(layer) for layer in STATE.controller]),
            ValueError,
            "state.controller",
            "TreeSpec(tuple",
            "TreeSpec(list",
            id="controller is a list",
        ),
    ],
)
def test_state_that_is_none(state, error, argument, expected, came):
    with refuses(error, argument, expected, came):
        make()(INPUTS, state)


class OwnController(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.cell = nn.RNNCell(input_size, hidden_size)

    def initial_state(self, batch_size, *, device=None, dtype=None):
        return torch.zeros(batch_size, self.cell.hidden_size, device=device, dtype=dtype)

    def forward(self, inputs, state):
        hidden = self.cell(inputs, state)
        return hidden, hidden


class NarrowController(OwnController):
    def forward(self, inputs, state):
        hidden = self.cell(inputs, state)
        return hidden[:, :-1], hidden


@pytest.mark.parametrize(
    ("change", "error", "expected", "came"),
    [
        case(lambda x: x[:-1], ValueError, "batch 4 first", "[3, 6]", id="batch"),
        case(lambda x: x.sum(), ValueError, "batch 4 first", "[]", id="rank 0"),
        case(torch.Tensor.double, TypeError, "torch.float32", "torch.float64", id="float64"),
        case(lambda x: x.to("meta"), ValueError, "cpu", "meta", id="device"),
    ],
)
def test_state_of_a_controller_of_your_own(change, error, expected, came):
    dnc = make(controller=OwnController)
    state = dnc.initial_state(BATCH)
    with refuses(error, "state.controller", expected, came):
        dnc(INPUTS, state._replace(controller=change(state.controller)))


def test_output_of_a_controller_of_your_own():
    with refuses(ValueError, "controller", "[4, 6]", "[4, 5]"):
        make(controller=NarrowController)(INPUTS)


# --- memory_step

STEP = {
    "interface": Interface(**{name: torch.rand(shape) for name, shape in Interface.shapes(4, 3, 2, 1).items()}),
    "state": MemoryState.zeros(4, 5, 3, 2, 1),
}
STEP_FIELDS = [("interface", name) for name in Interface._fields] + [("state", name) for name in MemoryState._fields]
# The sizes and the dtype are read off these: in another size they blame a field that does not go with it.
MEASURES = {("state", "memory"), ("interface", "read_keys"), ("interface", "write_keys")}


def step_with(part: str, name: str, change):
    whole = STEP[part]
    return memory_step(**{**STEP, part: whole._replace(**{name: change(getattr(whole, name))})})


@pytest.mark.parametrize(("part", "name"), STEP_FIELDS, ids=".".join)
@pytest.mark.parametrize(
    ("change", "error", "expected", "came"),
    [
        case(lambda x: x[..., None], ValueError, "[", ", 1]", id="rank"),
        case(lambda x: None, TypeError, "a tensor", "NoneType", id="None"),
        case(torch.Tensor.numpy, TypeError, "a tensor", "ndarray", id="array"),
    ],
)
def test_memory_step_with_one_field_that_cannot_be(part, name, change, error, expected, came):
    with refuses(error, f"{part}.{name}", expected, came):
        step_with(part, name, change)


@pytest.mark.parametrize(("part", "name"), [field for field in STEP_FIELDS if field not in MEASURES], ids=".".join)
@pytest.mark.parametrize(
    ("change", "error", "expected", "came"),
    [
        case(lambda x: x[:-1], ValueError, "shape [4,", "[3,", id="batch"),
        case(lambda x: torch.cat([x, x], dim=-1), ValueError, "shape [4,", "[4,", id="size"),
        case(torch.Tensor.double, TypeError, "torch.float32", "torch.float64", id="float64"),
        case(torch.Tensor.long, TypeError, "torch.float32", "torch.int64", id="integers"),
        case(lambda x: x + 0j, TypeError, "torch.float32", "torch.complex64", id="complex"),
        case(lambda x: x.to("meta"), ValueError, "cpu", "meta", id="device"),
    ],
)
def test_memory_step_with_one_field_that_does_not_go_with_the_rest(part, name, change, error, expected, came):
    with refuses(error, f"{part}.{name}", expected, came):
        step_with(part, name, change)


@pytest.mark.parametrize(
    ("part", "name", "change", "error", "argument", "expected", "came"),
    [
        case("state", "memory", lambda x: x[:, :0], ValueError, "state.memory", "at least 1", "[4, 0, 3]", id="N = 0"),
        case(
            "interface",
            "read_keys",
            lambda x: x[:, :0],
            ValueError,
            "interface.read_keys",
            "1",
            "[4, 0, 3]",
            id="R = 0",
        ),
        case(
            "interface",
            "write_keys",
            lambda x: x[:, :0],
            ValueError,
            "interface.write_keys",
            "1",
            "[4, 0, 3]",
            id="K = 0",
        ),
        case("state", "memory", torch.Tensor.long, TypeError, "state.memory", "floating dtype", "int64", id="integers"),
        case(
            "state", "memory", lambda x: x + 0j, TypeError, "state.memory", "floating dtype", "complex64", id="complex"
        ),
        case("state", "memory", lambda x: x[:, :4], ValueError, "state.usage", "[4, 4]", "[4, 5]", id="N"),
        case(
            "state", "memory", lambda x: x[..., :2], ValueError, "interface.read_keys", "[4, 2, 2]", "[4, 2, 3]", id="W"
        ),
        case("state", "memory", lambda x: x[:3], ValueError, "interface.read_keys", "[3, 2, 3]", "[4, 2, 3]", id="B"),
        case(
            "interface",
            "read_keys",
            lambda x: x[:, :1],
            ValueError,
            "interface.read_strengths",
            "[4, 1]",
            "[4, 2]",
            id="R",
        ),
        case(
            "state",
            "memory",
            torch.Tensor.double,
            TypeError,
            "interface.read_keys",
            "torch.float64",
            "torch.float32",
            id="float64",
        ),
    ],
)
def test_memory_step_with_other_sizes(part, name, change, error, argument, expected, came):
    with refuses(error, argument, expected, came):
        step_with(part, name, change)


@pytest.mark.parametrize(
    ("changes", "argument", "expected", "came"),
    [
        case({"interface": None}, "interface", "an Interface", "NoneType", id="no interface"),
        case({"interface": tuple(STEP["interface"])}, "interface", "an Interface", "tuple", id="tuple"),
        case({"state": None}, "state", "a MemoryState", "NoneType", id="no state"),
        case({"state": tuple(STEP["state"])}, "state", "a MemoryState", "tuple", id="state is a tuple"),
        case({"state": STEP["interface"]}, "state", "a MemoryState", "Interface", id="swapped"),
        case({"state": make().initial_state(4)}, "state", "a MemoryState", "DNCState", id="DNCState"),
    ],
)
def test_memory_step_of_what_it_does_not_know(changes, argument, expected, came):
    with refuses(TypeError, argument, expected, came):
        memory_step(**{**STEP, **changes})


# --- Backends


@pytest.mark.parametrize("name", ["cuda", "Reference", "", None], ids=repr)
def test_backends_that_do_not_exist(name):
    with refuses(ValueError, "backend", BACKENDS, repr(name)):
        memory_step(**STEP, backend=name)
    with refuses(ValueError, "name", BACKENDS, repr(name)), use_backend(name):
        pass
    dnc = make()
    dnc.backend = name  # set after the constructor looked at it
    with refuses(ValueError, "backend", BACKENDS, repr(name)):
        dnc(INPUTS)


@pytest.mark.parametrize("name", ["cuda", "Reference", " reference"], ids=repr)
@pytest.mark.parametrize(
    "ask",
    [lambda: make()(INPUTS), lambda: memory_step(**STEP), lambda: explain(make(), INPUTS)],
    ids=["layer", "memory_step", "explain"],
)
def test_environment_that_names_no_backend(monkeypatch, name, ask):
    monkeypatch.setenv("DNC_TRITON_BACKEND", name)
    with refuses(ValueError, "DNC_TRITON_BACKEND", BACKENDS, repr(name)):
        ask()


# --- from_deepmind

READ_SIZE = 2 * 4  # of `deepmind_variables`: R·W
DEEPMIND_LAYERS = {
    "free_gates": "free_gate",
    "allocation_gates": "allocation_gate",
    "write_gates": "write_gate",
    "read_modes": "read_mode",
}


def deepmind_variables(inputs=3, hidden=6, outputs=2) -> dict[str, np.ndarray]:
    """A checkpoint of a network with the sizes of `SIZES`."""
    shapes = {"lstm/w_gates": (inputs + READ_SIZE + hidden, 4 * hidden), "lstm/b_gates": (4 * hidden,)}
    for field, size in interface_sizes(num_reads=2, num_writes=1, word_size=4).items():
        layer = f"memory_access/{DEEPMIND_LAYERS.get(field, field)}"
        shapes |= {f"{layer}/w": (hidden, size), f"{layer}/b": (size,)}
    shapes |= {"output_linear/w": (hidden + READ_SIZE, outputs), "output_linear/b": (outputs,)}
    return {f"dnc/{name}": np.zeros(shape) for name, shape in shapes.items()}


def test_the_variables_below_would_do():
    dnc = from_deepmind(deepmind_variables(), **SIZES)
    assert (dnc.input_size, dnc.hidden_size, dnc.output_size) == (3, 6, 2)


@pytest.mark.parametrize("name", deepmind_variables())
def test_deepmind_variable_of_the_wrong_shape(name):
    variables = deepmind_variables()
    variables[name] = variables[name][..., None]
    matrices = name in ("dnc/lstm/w_gates", "dnc/output_linear/w")
    expected = "lstm/w_gates and output_linear/w to be matrices" if matrices else f"{name!r} of shape"
    with refuses(ValueError, "variables", expected, ", 1]"):
        from_deepmind(variables, **SIZES)


@pytest.mark.parametrize("name", deepmind_variables())
def test_deepmind_variable_missing(name):
    variables = deepmind_variables()
    del variables[name]
    scopeless = "lstm/w_gates" if name == "dnc/lstm/w_gates" else name
    with refuses(ValueError, "variables", f"{scopeless}'", "'dnc/memory_access/"):
        from_deepmind(variables, **SIZES)


@pytest.mark.parametrize(
    ("variables", "error", "expected", "came"),
    [
        case({}, ValueError, "one name that ends in 'lstm/w_gates'", "0 in []", id="nothing"),
        case(
            {**deepmind_variables(), "other/lstm/w_gates": np.zeros(1)},
            ValueError,
            "one name that ends in 'lstm/w_gates'",
            "2 in ['dnc/",
            id="two networks",
        ),
        case(
            {**deepmind_variables(), "dnc/lstm/w_gates": np.zeros((17, 23))},
            ValueError,
            "[input + 2·4 + hidden, 4·hidden]",
            "[17, 23]",
            id="gates do not divide by 4",
        ),
        case(
            {**deepmind_variables(), "dnc/lstm/w_gates": np.zeros((24, 17))},
            ValueError,
            "[input + 2·4 + hidden, 4·hidden]",
            "[24, 17]",
            id="gates transposed",
        ),
        case(
            {**deepmind_variables(), "dnc/output_linear/b": np.zeros(2) + 1j},
            TypeError,
            "'dnc/output_linear/b'",
            "complex128",
            id="complex",
        ),
        case(
            {**deepmind_variables(), "dnc/output_linear/b": None},
            TypeError,
            "'dnc/output_linear/b'",
            "NoneType",
            id="None",
        ),
        case(
            {**deepmind_variables(), "dnc/output_linear/b:0": np.ones(2)},
            ValueError,
            "'dnc/output_linear/b'",
            "'dnc/output_linear/b:0'",
            id="with and without :0",
        ),
        case(None, TypeError, "a mapping", "NoneType", id="no mapping"),
        case(list(deepmind_variables().items()), TypeError, "a mapping", "list", id="pairs"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_deepmind_variables(variables, error, expected, came):
    with refuses(error, "variables", expected, came):
        from_deepmind(variables, **SIZES)


@pytest.mark.parametrize(
    ("changes", "error", "argument", "expected", "came"),
    [
        case(
            {"num_reads": 1},
            ValueError,
            "variables",
            "'dnc/memory_access/read_keys/w' of shape [6, 4]",
            "[6, 8]",
            id="R",
        ),
        case({"num_reads": 9}, ValueError, "variables", "num_reads=9", "[17, 24]", id="R beyond the weights"),
        case(
            {"word_size": 3},
            ValueError,
            "variables",
            "'dnc/memory_access/read_keys/w' of shape [6, 6]",
            "[6, 8]",
            id="W",
        ),
        case({"num_writes": 2}, ValueError, "variables", "'dnc/memory_access/write_keys/w' of shape", "[6, 4]", id="K"),
        case({"memory_size": 0}, ValueError, "memory_size", "at least 1", "0", id="N = 0"),
        case({"word_size": 0}, ValueError, "word_size", "at least 1", "0", id="W = 0"),
        case({"num_reads": 0}, ValueError, "num_reads", "at least 1", "0", id="R = 0"),
        case({"num_writes": 0}, ValueError, "num_writes", "at least 1", "0", id="K = 0"),
        case({"memory_size": 5.0}, TypeError, "memory_size", "an integer", "5.0", id="N is a float"),
        case({"num_writes": True}, TypeError, "num_writes", "an integer", "True", id="K is a bool"),
        case({"word_size": 4.0}, TypeError, "word_size", "an integer", "4.0", id="W is a float"),
        case({"num_reads": "2"}, TypeError, "num_reads", "an integer", "'2'", id="R is text"),
        case({"clip": -1.0}, ValueError, "clip", "above 0", "-1.0", id="clip"),
        case({"dtype": torch.int32}, TypeError, "dtype", "floating dtype", "torch.int32", id="dtype"),
    ],
)
def test_deepmind_arguments(changes, error, argument, expected, came):
    with refuses(error, argument, expected, came):
        from_deepmind(deepmind_variables(), **{**SIZES, **changes})
