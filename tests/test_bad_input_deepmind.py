"""What `from_deepmind` refuses, and how: variables that are missing or misshapen, arguments that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import SIZES, case, refuses

from dnc_reference.interface import interface_sizes
from dnc_triton import from_deepmind

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


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8"])
def test_variables_in_either_order_of_bytes(dtype):
    variables = {name: np.full(array.shape, 0.5, dtype) for name, array in deepmind_variables().items()}
    dnc = from_deepmind(variables, **SIZES)
    assert torch.equal(dnc.output.weight, torch.full_like(dnc.output.weight, 0.5))


def test_the_layer_is_on_the_cpu():
    """Whatever the default device; on "meta" weights would be lost."""
    with torch.device("meta"):
        dnc = from_deepmind(deepmind_variables(), **SIZES)
    assert {x.device.type for x in dnc.parameters()} == {"cpu"}
    assert not dnc.output.weight.any()


def test_variables_stay_as_they_are():
    """Even float64 tensors, whose memory is not copied on the way."""
    variables = {name: torch.from_numpy(array) for name, array in deepmind_variables().items()}
    dnc = from_deepmind(variables, **SIZES)
    assert dnc.controller.layers[0].bias_ih.any()  # Sonnet's 1 of the forget gate
    assert not any(x.any() for x in variables.values())


def test_what_is_added_to_a_narrow_variable_is_not_rounded():
    variables = deepmind_variables()
    variables["dnc/lstm/b_gates"] = np.full(24, 2.0**-13, np.float16)  # which 1 in float16 would swallow
    dnc = from_deepmind(variables, **SIZES)
    assert dnc.controller.layers[0].bias_ih.max().item() == 1 + 2.0**-13


def test_an_lstm_whose_name_ends_alike_is_another():
    variables = deepmind_variables() | {"dnc/other_lstm/w_gates": np.ones((1, 4))}
    assert from_deepmind(variables, **SIZES).input_size == 3


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
        case(deepmind_variables(inputs=0), ValueError, "[input + 2·4 + hidden, 4·hidden]", "[14, 24]", id="no input"),
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
            {**deepmind_variables(), "dnc/output_linear/b": [[0.0], [0.0, 0.0]]},
            TypeError,
            "'dnc/output_linear/b'",
            "list",
            id="ragged",
        ),
        case(
            {**deepmind_variables(), "dnc/output_linear/b:0": np.ones(2)},
            ValueError,
            "'dnc/output_linear/b'",
            "'dnc/output_linear/b:0'",
            id="with and without :0",
        ),
        case(
            {**deepmind_variables(), "dnc/output_linear/b": torch.zeros(2, device="meta")},
            ValueError,
            "'dnc/output_linear/b' to be a dense floating array with values",
            "on the meta device",
            id="meta",
        ),
        case(
            {**deepmind_variables(), "dnc/output_linear/b": torch.zeros(2).to_sparse()},
            TypeError,
            "'dnc/output_linear/b' to be a dense floating array",
            "torch.sparse_coo",
            id="sparse",
        ),
        case(None, TypeError, "a mapping", "NoneType", id="no mapping"),
        case(list(deepmind_variables().items()), TypeError, "a mapping", "list", id="pairs"),
        case({1: deepmind_variables()}, TypeError, "names as keys", "1", id="a number as a name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_deepmind_variables(variables, error, expected, came):
    with refuses(error, "variables", expected, came):
        from_deepmind(variables, **SIZES)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_variable():
    nested = torch.nested.nested_tensor([torch.zeros(1)] * 2)
    with refuses(TypeError, "variables", "'dnc/output_linear/b' to be a dense floating array", "a nested one"):
        from_deepmind(deepmind_variables() | {"dnc/output_linear/b": nested}, **SIZES)


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
