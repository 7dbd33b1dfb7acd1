"""What `memory_step` refuses, and how; and names of backends that do not exist, whoever gives them."""

from __future__ import annotations

import pytest
import torch
from refusals import BACKENDS, INPUTS, case, make, refuses

from dnc_reference import interface_step, memory_step_with_addressing
from dnc_reference.interface import activate_interface
from dnc_triton import Interface, MemoryState, explain, memory_step, use_backend

# --- memory_step

STEP = {
    "interface": Interface(**{name: torch.rand(shape) for name, shape in Interface.shapes(4, 3, 2, 1).items()}),
    "state": MemoryState.zeros(4, 5, 3, 2, 1),
}
STEP_FIELDS = [("interface", name) for name in Interface._fields] + [("state", name) for name in MemoryState._fields]
# The sizes and the dtype are read off these: when one of these is wrong, a field that does not match it is blamed.
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
        case(
            "state",
            "memory",
            lambda x: x.to(torch.float8_e5m2),
            TypeError,
            "state.memory",
            "16 bits",
            "float8_e5m2",
            id="8 bits",
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
    ("vector", "strength", "error", "argument", "expected", "came"),
    [
        case(torch.zeros(4, 27), "oneplus", ValueError, "vector", "[B, 28]", "[4, 27]", id="size"),
        case(torch.zeros(28), "oneplus", ValueError, "vector", "[B, 28]", "[28]", id="rank"),
        case(None, "oneplus", TypeError, "vector", "a tensor [B, S]", "NoneType", id="None"),
        case(torch.zeros(4, 28), "twoplus", ValueError, "strength", "'oneplus'", "'twoplus'", id="strength"),
    ],
)
def test_an_interface_vector_that_cannot_be(vector, strength, error, argument, expected, came):
    options = dict(num_reads=2, num_writes=1, strength=strength)
    with refuses(error, argument, expected, came):
        activate_interface(vector, word_size=3, **options)
    with refuses(error, argument, expected, came):
        interface_step(vector, STEP["state"], **options, stop_usage_gradient=False)


@pytest.mark.parametrize(
    ("changes", "argument", "expected", "came"),
    [
        case({"interface": None}, "interface", "an Interface", "NoneType", id="no interface"),
        case({"interface": tuple(STEP["interface"])}, "interface", "an Interface", "tuple", id="tuple"),
        case({"state": None}, "state", "a MemoryState", "NoneType", id="no state"),
        case({"state": tuple(STEP["state"])}, "state", "a MemoryState", "tuple", id="state is a tuple"),
        case({"state": STEP["interface"]}, "state", "a MemoryState", "Interface", id="swapped"),
        case({"state": make().initial_state(4)}, "state", "a MemoryState", "DNCState", id="DNCState"),
        case({"stop_usage_gradient": "no"}, "stop_usage_gradient", "a bool", "'no'", id="text"),
    ],
)
def test_memory_step_of_what_it_does_not_know(changes, argument, expected, came):
    with refuses(TypeError, argument, expected, came):
        memory_step(**{**STEP, **changes})


@pytest.mark.parametrize("backend", ["reference", "triton_fused"])
def test_a_flag_is_looked_at_before_the_backend(backend):
    """One that is no bool would be a number to a kernel."""
    with refuses(TypeError, "stop_usage_gradient", "a bool", "1"):
        memory_step(**STEP, stop_usage_gradient=1, backend=backend)
    with refuses(TypeError, "stop_usage_gradient", "a bool", "1"):
        memory_step_with_addressing(**STEP, stop_usage_gradient=1)


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
