"""Which states the layer refuses, and how: of another configuration, with one bad tensor, of your own controller."""

from __future__ import annotations

import pytest
import torch
from refusals import BATCH, INPUTS, case, make, refuses
from torch import nn

from dnc_triton import DNCState, MemoryState

STATE = make().initial_state(BATCH)


@pytest.mark.parametrize(
    ("changes", "argument", "expected", "came"),
    [
        case({"memory_size": 6}, "state.memory.memory", "[4, 5, 4]", "[4, 6, 4]", id="memory_size"),
        case({"word_size": 3}, "state.memory.memory", "[4, 5, 4]", "[4, 5, 3]", id="word_size"),
        case({"num_reads": 1}, "state.memory.read_weights", "[4, 2, 5]", "[4, 1, 5]", id="num_reads"),
        case({"num_writes": 2}, "state.memory.link", "[4, 1, 5, 5]", "[4, 2, 5, 5]", id="num_writes"),
        case({"hidden_size": 7}, "state.controller", "[4, 6]", "[4, 7]", id="hidden_size"),
        case(
            {"num_layers": 2},
            "state.controller",
            "1 layer(s) of 'lstm'",
            "tuple(tuple([4, 6], [4, 6]), tuple(",
            id="num_layers",
        ),
        case({"controller": "gru"}, "state.controller", "2 tensor(s)", "tuple(tuple([4, 6]))", id="gru"),
        case({"controller": "feedforward"}, "state.controller", "2 tensor(s)", "tuple(tuple())", id="feedforward"),
    ],
)
def test_state_of_another_configuration(changes, argument, expected, came):
    with refuses(ValueError, argument, expected, came):
        make()(INPUTS, make(**changes).initial_state(BATCH))


@pytest.mark.parametrize(
    ("sizes", "error", "argument", "expected", "came"),
    [
        case((-1, 5, 4, 2), ValueError, "batch_size", "at least 0", "-1", id="batch_size"),
        case((4, 0, 4, 2), ValueError, "memory_size", "at least 1", "0", id="memory_size"),
        case((4, 5, 4, 2.0), TypeError, "num_reads", "an integer", "2.0", id="num_reads"),
    ],
)
def test_zeros_of_no_size(sizes, error, argument, expected, came):
    with refuses(error, argument, expected, came):
        MemoryState.zeros(*sizes)


@pytest.mark.parametrize(
    ("size", "error", "expected"),
    [
        (-1, ValueError, "at least 0"),
        (2.0, TypeError, "an integer"),
        ("2", TypeError, "an integer"),
        (True, TypeError, "an integer"),
        (None, TypeError, "an integer"),
    ],
)
def test_an_initial_state_of_no_batch(size, error, expected):
    with refuses(error, "batch_size", expected, repr(size)):
        make().initial_state(size)


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
            "NoneType",
            id="no controller",
        ),
        case(
            STATE._replace(controller=[list(layer) for layer in STATE.controller]),
            ValueError,
            "state.controller",
            "each a tuple",
            "list(list([4, 6], [4, 6]))",
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
        case(lambda x: (x, 4), TypeError, "a nest of tensors", "int in it", id="number"),
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


# --- what a controller of your own returns


class Own(nn.Module):
    """A controller whose initial state and results are what it was told."""

    def __init__(self, hidden_size, begin, returns):
        super().__init__()
        self.hidden_size, self.begin, self.returns = hidden_size, begin, returns

    def initial_state(self, batch_size, *, device, dtype):
        return self.begin(torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype))

    def forward(self, inputs, state):
        return self.returns(inputs.new_zeros(len(inputs), self.hidden_size))


def own(begin, returns):
    return make(controller=lambda inputs, hidden: Own(hidden, begin, returns))


@pytest.mark.parametrize(
    ("returns", "expected", "came"),
    [
        case(lambda hidden: hidden, "an output and a state", "Tensor", id="no state"),
        case(lambda hidden: (hidden, hidden, hidden), "an output and a state", "tuple of 3", id="three"),
        case(lambda hidden: None, "an output and a state", "NoneType", id="nothing"),
        case(lambda hidden: ((hidden, hidden), hidden), "a tensor as its output", "tuple", id="a pair for the output"),
    ],
)
def test_a_controller_returns_an_output_and_a_state(returns, expected, came):
    with refuses(TypeError, "controller", expected, came):
        own(lambda hidden: (hidden,), returns)(INPUTS)


def test_a_controller_may_return_a_list_of_both():
    outputs, state = own(lambda hidden: (hidden,), lambda hidden: [hidden, (hidden,)])(INPUTS)
    assert outputs.isfinite().all()
    assert type(state.controller) is tuple


def test_the_state_of_a_controller_keeps_its_structure():
    dnc = own(lambda hidden: (hidden,), lambda hidden: (hidden, [hidden]))
    dnc(INPUTS)
    with refuses(ValueError, "state.controller", "one structure in every step", "list"):
        dnc(INPUTS, lengths=[1] * BATCH)


def test_the_initial_state_of_a_controller_has_the_batch_first():
    dnc = own(lambda hidden: hidden.unsqueeze(0), lambda hidden: (hidden, hidden.unsqueeze(0)))
    with refuses(ValueError, "state.controller", f"batch {BATCH} first", f"[1, {BATCH}, 6]"):
        dnc(INPUTS)


@pytest.mark.parametrize(
    ("rows", "error", "expected", "came"),
    [
        case([True] * BATCH, TypeError, "a tensor", "list", id="list"),
        case(torch.ones(BATCH), TypeError, "torch.bool", "torch.float32", id="no bools"),
        case(torch.ones(BATCH - 1, dtype=torch.bool), ValueError, f"[{BATCH}]", f"[{BATCH - 1}]", id="too few"),
        case(torch.ones(BATCH, 1, dtype=torch.bool), ValueError, f"[{BATCH}]", f"[{BATCH}, 1]", id="a column"),
        case(torch.ones(BATCH, dtype=torch.bool, device="meta"), ValueError, "cpu", "meta", id="device"),
    ],
)
def test_rows_are_picked_by_a_bool_each(rows, error, expected, came):
    _, state = make()(INPUTS)
    with refuses(error, "rows", expected, came):
        state.where(rows, state)


@pytest.mark.parametrize("other", [None, ((), None, None)], ids=["None", "tuple"])
def test_rows_are_picked_from_two_states(other):
    _, state = make()(INPUTS)
    with refuses(TypeError, "other", "a DNCState", type(other).__name__):
        state.where(torch.ones(BATCH, dtype=torch.bool), other)


def test_what_is_not_dense_is_named():
    """Arguments other than the inputs too, and the inputs of a step."""
    dnc = make()
    _, state = dnc(INPUTS)
    sparse = state._replace(read_words=state.read_words.to_sparse())
    reset, lengths = torch.zeros(INPUTS.shape[:2], dtype=torch.bool), torch.ones(BATCH, dtype=torch.long)
    for name, call in (
        ("inputs", lambda: dnc.step(INPUTS[:, 0].to_sparse())),
        ("state.read_words", lambda: dnc(INPUTS, sparse)),
        ("state.controller", lambda: dnc(INPUTS, replaced(state, "controller", torch.Tensor.to_sparse))),
        ("reset", lambda: dnc(INPUTS, reset=reset.to_sparse())),
        ("lengths", lambda: dnc(INPUTS, lengths=lengths.to_sparse())),
    ):
        with refuses(TypeError, name, "a dense tensor", "torch.sparse_coo"):
            call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_state_of_the_controller_is_named():
    nested = torch.nested.nested_tensor([torch.zeros(6)] * BATCH)
    with refuses(TypeError, "state.controller", "a dense tensor", "a nested one"):
        make()(INPUTS, replaced(STATE, "controller", lambda cell: nested))
