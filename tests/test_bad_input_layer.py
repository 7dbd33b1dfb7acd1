"""What the layer refuses, and how: arguments of the constructor and of a call, except the state."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from refusals import BACKENDS, BATCH, INPUTS, STEPS, case, make, refuses
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from dnc_triton import DNC, explain

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
        case("batch_first", 1, TypeError, "bool", "1", id="batch_first is a number"),
        case("stop_usage_gradient", None, TypeError, "bool", "None", id="no stop_usage_gradient"),
        case("strength", "relu", ValueError, "'oneplus', 'softplus'", "'relu'", id="strength"),
        case("strength", None, ValueError, "'oneplus', 'softplus'", "None", id="no strength"),
        case("strength", ["oneplus"], ValueError, "'oneplus', 'softplus'", "['oneplus']", id="strengths"),
        case("backend", "cuda", ValueError, BACKENDS, "'cuda'", id="backend"),
        case("backend", None, ValueError, BACKENDS, "None", id="no backend"),
        case("dtype", torch.int32, TypeError, "floating dtype", "torch.int32", id="dtype integer"),
        case("dtype", torch.complex64, TypeError, "floating dtype", "torch.complex64", id="dtype complex"),
        case("dtype", torch.float8_e5m2, TypeError, "16 bits", "torch.float8_e5m2", id="dtype of 8 bits"),
        case("dtype", torch.bool, TypeError, "floating dtype", "torch.bool", id="dtype bool"),
        case("dtype", "float32", TypeError, "floating dtype", "'float32'", id="dtype is text"),
    ],
)
def test_constructor(argument, value, error, expected, came):
    with refuses(error, argument, expected, came):
        make(**{argument: value})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("name", "value", "error", "expected"),
    [
        ("strength", "relu", ValueError, "'oneplus', 'softplus'"),
        ("stop_usage_gradient", 1, TypeError, "a bool"),
        ("batch_first", 1, TypeError, "a bool"),
        ("memory_size", 0, ValueError, "at least 1"),
        ("memory_size", 8.0, TypeError, "an integer"),
        ("checkpoint", 0, ValueError, "at least 1"),
        ("clip", -1.0, ValueError, "above 0"),
        ("max_activation_gradient", "3", TypeError, "number"),
    ],
)
def test_what_is_set_after_the_constructor_looked_at_it(name, value, error, expected, backend):
    dnc = make(backend=backend)
    setattr(dnc.controller if name == "max_activation_gradient" else dnc, name, value)
    with refuses(error, name, expected, repr(value)):
        dnc(INPUTS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_out_of_range_that_is_set_after_the_constructor(backend):
    dnc = make(num_layers=2, backend=backend)
    dnc.controller.dropout.p = -0.5
    with pytest.raises(ValueError, match="dropout probability"):
        dnc(INPUTS)


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("call", [lambda dnc: dnc(INPUTS), lambda dnc: dnc.step(INPUTS[:, 0])], ids=["call", "step"])
@pytest.mark.parametrize("put", [lambda part: part, nn.Sequential], ids=["alone", "within"])
def test_an_interface_layer_of_another_size(put, call, more):
    """Kernels would read beyond its output, or numbers meant for others."""
    dnc = make()
    size = dnc.interface.out_features
    dnc.interface = put(nn.Linear(6, size + more))
    with refuses(ValueError, "interface", f"shape [4, {size}]", f"[4, {size + more}]"):
        call(dnc)


def test_an_interface_layer_that_returns_no_tensor():
    dnc = make()
    dnc.interface = nn.LSTM(6, dnc.interface.out_features)
    with refuses(TypeError, "interface", "to return a tensor", "tuple"):
        dnc(INPUTS)


@pytest.mark.filterwarnings("ignore:dropout")
@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"dropout": 0.5}], ids=["num_layers", "dropout"])
def test_layers_and_dropout_belong_to_built_in_controllers(changes):
    came = f"{changes.get('num_layers', 1)} and {changes.get('dropout', 0.0)}"
    with refuses(ValueError, "num_layers, dropout", "1 and 0", came):
        make(controller=NoController, **changes)


# --- The call

ROWS = [INPUTS[0], INPUTS[1, :3]]
with warnings.catch_warnings():  # the warning that nested tensors of this layout are a prototype
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor(ROWS)
JAGGED = torch.nested.nested_tensor(ROWS, layout=torch.jagged)


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
        case(INPUTS.to_sparse(), TypeError, "a dense tensor", "torch.sparse_coo", id="sparse"),
        case(NESTED, TypeError, "a dense tensor", "nested", id="nested"),
        case(JAGGED, TypeError, "a dense tensor", "nested", id="jagged"),
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


def test_inputs_of_another_dtype_on_meta():
    """A device that autocast does not know."""
    with refuses(TypeError, "inputs", "torch.float32", "torch.float64"):
        make(device="meta")(INPUTS.double().to("meta"))


def packed(data: torch.Tensor) -> PackedSequence:
    return pack_padded_sequence(data, [7, 7, 2, 1], batch_first=True)


@pytest.mark.parametrize(
    ("inputs", "error", "expected", "came"),
    [
        case(packed(INPUTS[..., :2]), ValueError, "input_size 3", "2]", id="size"),
        case(packed(INPUTS[..., 0]), ValueError, "3 dimensions", "[4, 7]", id="rank"),
        case(packed(INPUTS.double()), TypeError, "torch.float32", "torch.float64", id="dtype"),
        case(packed(INPUTS.long()), TypeError, "torch.float32", "torch.int64", id="integers"),
    ],
)
def test_packed_inputs(inputs, error, expected, came):
    with refuses(error, "inputs", expected, came):
        make()(inputs)


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
        case(np.arange(4)[::-1], TypeError, "integers", "stride", id="backwards"),
        case(torch.ones(4, dtype=torch.int64, device="meta"), ValueError, "values", "meta", id="meta"),
    ],
)
def test_lengths(lengths, error, expected, came):
    with refuses(error, "lengths", expected, came):
        make()(INPUTS, lengths=lengths)


def test_a_list_of_lengths_is_on_no_default_device():
    dnc = make()
    with torch.device("meta"):
        actual = dnc(INPUTS, lengths=[7, 3, 2, 0])
    assert_same_bits(actual, dnc(INPUTS, lengths=[7, 3, 2, 0]))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_lengths_of_the_newer_unsigned_dtypes(dtype):
    """They are integers, so they are served; torch's support for them is thin."""
    dnc = make()
    assert_same_bits(dnc(INPUTS, lengths=torch.ones(4, dtype=dtype)), dnc(INPUTS, lengths=[1] * 4))


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


@pytest.mark.parametrize("inputs", [None, [[1.0]], pack_padded_sequence(INPUTS, [7] * 4, batch_first=True)], ids=type)
def test_inputs_of_a_single_step_that_are_no_tensor(inputs):
    with refuses(TypeError, "inputs", "a tensor [B, input_size]", type(inputs).__name__):
        make().step(inputs)


def test_inputs_of_a_single_step_of_another_size():
    with refuses(ValueError, "inputs", "[B, input_size] with input_size 3", f"[{BATCH}, 2]"):
        make(batch_first=False).step(INPUTS[:, 0, :2])


def test_inputs_of_a_single_step_of_another_rank():
    with refuses(ValueError, "inputs", "2 dimensions [B, input_size]", f"[{BATCH}, 1, 3]"):
        make().step(INPUTS[:, :1])


def test_nested_inputs_of_a_single_step():
    """They have the right number of dimensions, and their shape may not be asked for."""
    nested = torch.nested.nested_tensor([torch.zeros(3)] * BATCH)
    with refuses(TypeError, "inputs", "a dense tensor", "nested"):
        make().step(nested)


def test_a_trace_that_is_no_bool():
    with refuses(TypeError, "trace", "bool", "'yes'"):
        make()(INPUTS, trace="yes")


def test_what_is_explained_is_a_layer():
    for other in (nn.LSTM(3, 6), None, DNC):
        with refuses(TypeError, "dnc", "a DNC", type(other).__name__):
            explain(other, INPUTS)
    assert explain(torch.compile(make()), INPUTS) == explain(make(), INPUTS)  # it passes on what it is asked
