"""Random layers, called at random, against the oracle: `python -m tests.fuzz_layer --count 10000 --backend auto`.

What the layer can do is tested one by one; here each meets each: the constructor's choices, parts of the user's own,
states, lengths, resets, views with NaN in their gaps, whole sequences and chunks and single steps, what the loss sees
and what gradients are asked for. The oracle knows nothing of batches and sequences: it takes every row by itself, one
step of `DNCCell.forward` after the other, for as many steps as the row has.

All in float64, where another order of sums moves the last digits only. The first call that is off ends the run, with
the command that makes it again. The kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

KERNELS = ("triton_sequence", "triton_fused", "triton_split")
BACKENDS = ("reference", "torch_sequence", "auto", *KERNELS)

if __name__ == "__main__":
    if any(backend in argument for backend in KERNELS for argument in sys.argv[1:]):
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path[:0] = [str(Path(__file__).parent)]

# ruff: noqa: E402
from helpers import assert_close, assert_same_bits, random_like, random_problem
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

from dnc_reference import DNCCell, DNCState
from dnc_triton import DNC

# What a look-up or a norm near 0 makes of an ulp, over up to 13 steps.
FORWARD, GRADIENT = dict(rtol=1e-10, atol=1e-13), dict(rtol=1e-8, atol=1e-11)

# --- what is drawn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A layer and a call of it.

    Attributes:
        seed: of weights and numbers; sizes, choices: what `DNC` takes.
        part: what of the layer is the user's own, or "".
        begins: "None", the state that is not given; "zeros" or "used", a given one.
        lengths, resets: whether there are any, and which.
        way: how the sequence is given, a key of `WAYS`.
        backward: "once", "twice" through one graph, or "none", without gradients.
        sees: what of outputs and state the loss sees.
        by: what gradients are asked for: of inputs, of a state whose slots differ, of all parameters or of some.
    """

    seed: int
    sizes: dict[str, int]
    choices: dict[str, Any]
    part: str
    batch: int
    steps: int
    begins: str
    lengths: list[int] | None
    resets: bool
    way: str
    backward: str
    sees: str
    by: dict[str, bool]

    @property
    def alike(self) -> bool:
        """Whether slots begin alike: rounding decides which is taken first, and nothing can be said of a slot."""
        return self.begins != "used" or self.resets

    @property
    def in_one(self) -> bool:
        """Whether the sequence is one operation in PyTorch, where recomputing steps changes no bit of any sum."""
        plain = self.choices["num_writes"] == 1 and not self.part
        return plain and self.choices["backend"] in ("torch_sequence", "auto")


def draw(seed: int, backend: str) -> Call:
    """A call that this backend serves."""
    pick = random.Random(seed)
    interpreted, alone = backend in KERNELS, backend in ("reference", "auto")
    choices: dict[str, Any] = dict(backend=backend, checkpoint=pick.choice([None, "auto", 1, 2, 3, 7]))
    choices["controller"] = pick.choice(["lstm", "gru", "rnn", "feedforward"])
    choices["num_layers"] = pick.choice([1, 1, 2, 3])
    if backend == "triton_sequence":
        choices.update(controller="lstm", num_layers=1)
    choices["num_writes"] = pick.choice([1, 1, 1, 2, 3]) if alone else 1
    choices["max_activation_gradient"] = pick.choice([None, None, 0.01, 0.3, 10])
    choices["clip"] = pick.choice([None, None, 0.05, 0.5, 20])
    choices["strength"] = pick.choice(["oneplus", "softplus"])
    choices["stop_usage_gradient"] = pick.random() < 0.3
    choices["batch_first"] = pick.random() < 0.5
    parts = ["controller", "hook", "parametrization"] if alone or backend in ("triton_fused", "triton_split") else []
    slots = [1, 2, 3, 5, 8] if interpreted else [1, 2, 3, 5, 8, 12, 16, 20, 33]
    batch, steps = pick.choice([1, 2, 3]), pick.choice([0, 1, 2, 3, 5] if interpreted else [0, 1, 2, 3, 4, 6, 9, 13])
    way = pick.choice([*["whole"] * 4, "chunks", "steps", "packed", "twice"] if steps else ["whole"])
    lengths = [pick.randint(0, steps) for _ in range(batch)] if pick.random() < 0.4 else None
    if way == "packed":
        lengths = [pick.randint(1, steps) for _ in range(batch)]
    if way in ("chunks", "steps"):
        lengths = None
    begins = pick.choice(["None", "zeros", "used", "used"])
    resets = way != "steps" and pick.random() < 0.3
    sizes = dict(
        input_size=pick.randint(1, 5),
        hidden_size=pick.randint(1, 9),
        output_size=pick.randint(1, 4),
        memory_size=pick.choice(slots),
        word_size=pick.randint(1, 8),
        num_reads=pick.randint(1, 4),
    )
    part = pick.choice(parts) if parts and pick.random() < 0.3 else ""
    if part == "controller":
        choices.update(controller=OwnController, num_layers=1, max_activation_gradient=None)
    return Call(
        seed=seed,
        sizes=sizes,
        choices=choices,
        part=part,
        batch=batch,
        steps=steps,
        begins=begins,
        lengths=lengths,
        resets=resets,
        way=way,
        backward=pick.choice(["once", "once", "once", "twice", "none"]),
        sees=pick.choice(["all", "outputs", "state", "one"]),
        by=dict(inputs=pick.random() < 0.7, state=pick.random() < 0.6, all=pick.random() < 0.8),
    )


class OwnController(nn.Module):
    """An LSTM whose first state is learned, and a dictionary."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(input_size, hidden_size)
        self.first = nn.Parameter(torch.randn(hidden_size))

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
        hidden = self.first.to(device=device, dtype=dtype).expand(batch_size, -1)
        return {"hidden": hidden, "cell": torch.zeros_like(hidden)}

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, cell = self.cell(inputs, (state["hidden"], state["cell"]))
        return hidden, {"hidden": hidden, "cell": cell}


class Doubled(nn.Module):
    """A parametrization: the weight is twice the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def make(call: Call) -> DNC:
    """The layer; some of its parameters want no gradient."""
    pick = random.Random(call.seed)
    dnc = DNC(**call.sizes, **call.choices, dtype=torch.float64)
    with torch.no_grad():  # as torch initialises it the memory hardly matters: the gates all stand near one half
        dnc.interface.weight.mul_(pick.choice([1, 4]))
        dnc.interface.bias.mul_(pick.choice([1, 3]))
    if call.part == "hook":
        pick.choice([dnc.controller, dnc.interface, dnc.output]).register_forward_hook(lambda *_: None)
    if call.part == "parametrization":
        nn.utils.parametrize.register_parametrization(dnc.interface, "weight", Doubled())
    for parameter in dnc.parameters():
        parameter.requires_grad_(pick.random() < 0.85)
    return dnc


def first_state(call: Call, dnc: DNC) -> DNCState | None:
    """The state that is given. In a used one no two slots are used equally."""
    if call.begins == "None":
        return None
    state = dnc.initial_state(call.batch).map(lambda x: x.detach().clone())
    if call.begins == "zeros":
        return state
    sizes = (dnc.memory_size, dnc.word_size, dnc.num_reads, dnc.num_writes)
    controller, words = random_like((state.controller, state.read_words), seed=call.seed)
    return DNCState(controller, random_problem(call.batch, *sizes, seed=call.seed)[1], words)


def without_slots(state: DNCState) -> DNCState:
    """A state that is the same whichever slot is which: of what is by slot the sum over the slots."""
    memory = state.memory
    sums = {name: x.sum((-2, -1)) if name == "link" else x.sum(-1) for name, x in memory._asdict().items()}
    return state._replace(memory=memory._replace(**{**sums, "memory": memory.memory.sum(1)}))


def as_a_view(x: Tensor, pick: random.Random) -> Tensor:
    """The same numbers, laid out in another way, with NaN between them."""
    kind = pick.choice(["as it is", "turned", "gaps", "offset"])
    if kind == "turned" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "gaps":
        wide = torch.cat([x.new_full(x.shape, torch.nan).unsqueeze(-1), x.unsqueeze(-1)], -1)
        return wide[..., 1]
    if kind == "offset":
        return torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape)
    return x


# --- the oracle, and the ways to call the layer: inputs [B, T, ·], resets [B, T] --------------------------------------


def by_rows(
    dnc: DNC, inputs: Tensor, state: DNCState, lengths: list[int] | None, reset: Tensor | None
) -> tuple[Tensor, DNCState]:
    """Outputs and state, row by row and step by step."""
    outputs, states = [], []
    for row in range(inputs.shape[0]):
        carried = state.map(lambda x, row=row: x[row : row + 1])
        rows = [inputs.new_zeros(inputs.shape[1], dnc.output_size)]
        for step in range(inputs.shape[1] if lengths is None else lengths[row]):
            if reset is not None and reset[row, step]:
                carried = dnc.initial_state(1)
            output, carried = DNCCell.forward(dnc, inputs[row : row + 1, step], carried)
            rows.insert(-1, output)
        outputs.append(torch.cat(rows)[: inputs.shape[1]])
        states.append(carried)
    return torch.stack(outputs), tree_map(lambda *x: torch.cat(x), *states)


def by_rows_twice(dnc: DNC, inputs: Tensor, state: DNCState, *rest: Any) -> tuple[Tensor, DNCState]:
    """What `_twice` is compared with."""
    first, _ = by_rows(dnc, inputs, state, *rest)
    second, state = by_rows(dnc, inputs / 2, state, *rest)
    return torch.cat([first, second], 1), state


def _whole(
    dnc: DNC,
    inputs: Tensor,
    state: DNCState | None,
    lengths: list[int] | None,
    reset: Tensor | None,
    pick: random.Random,
) -> tuple[Tensor, DNCState]:
    turned = partial(_turned, dnc)
    given = torch.tensor(lengths) if lengths is not None and pick.random() < 0.5 else lengths
    outputs, state = dnc(turned(inputs), state, lengths=given, reset=None if reset is None else turned(reset))
    return turned(outputs), state


def _chunks(
    dnc: DNC, inputs: Tensor, state: DNCState | None, lengths: None, reset: Tensor | None, pick: random.Random
) -> tuple[Tensor, DNCState]:
    parts, sizes = [], []
    while sum(sizes) < inputs.shape[1]:
        sizes.append(pick.randint(1, inputs.shape[1] - sum(sizes)))
    resets = [None] * len(sizes) if reset is None else reset.split(sizes, 1)
    for part, part_reset in zip(inputs.split(sizes, 1), resets, strict=True):
        outputs, state = _whole(dnc, part, state, lengths, part_reset, pick)
        parts.append(outputs)
    assert state is not None
    return torch.cat(parts, 1), state


def _steps(dnc: DNC, inputs: Tensor, state: DNCState | None, *_: Any) -> tuple[Tensor, DNCState]:
    outputs = []
    for step in inputs.unbind(1):
        output, state = dnc.step(step, state)
        outputs.append(output)
    assert state is not None
    return torch.stack(outputs, 1), state


def _packed(
    dnc: DNC, inputs: Tensor, state: DNCState | None, lengths: list[int], reset: Tensor | None, pick: random.Random
) -> tuple[Tensor, DNCState]:
    turned, order = partial(_turned, dnc), dict(batch_first=dnc.batch_first)
    packed = pack_padded_sequence(turned(inputs), torch.tensor(lengths), enforce_sorted=False, **order)
    reset = None if reset is None else turned(reset[:, : max(lengths)])
    outputs, state = dnc(packed, state, reset=reset)
    return turned(pad_packed_sequence(outputs, total_length=inputs.shape[1], **order)[0]), state


def _twice(dnc: DNC, inputs: Tensor, *rest: Any) -> tuple[Tensor, DNCState]:
    """The layer at two places of one graph."""
    first, _ = _whole(dnc, inputs, *rest)
    second, state = _whole(dnc, inputs / 2, *rest)
    return torch.cat([first, second], 1), state


WAYS: dict[str, Callable[..., tuple[Tensor, DNCState]]] = {
    "whole": _whole,
    "chunks": _chunks,
    "steps": _steps,
    "packed": _packed,
    "twice": _twice,
}


def _turned(dnc: DNC, x: Tensor) -> Tensor:
    """[B, T, ·] as the layer has it, and back."""
    return x if dnc.batch_first else x.transpose(0, 1)


# --- the comparison ---------------------------------------------------------------------------------------------------


def outcome(call: Call, dnc: DNC, *, oracle: bool) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """Outputs and state, and the gradients that are asked for."""
    torch.manual_seed(call.seed)
    pick = random.Random(call.seed)
    inputs = torch.randn(call.batch, call.steps, dnc.input_size, dtype=torch.float64)
    reset = torch.rand(call.batch, call.steps) < 0.25 if call.resets else None
    if call.lengths is not None and not oracle:
        for row, length in enumerate(call.lengths):
            inputs[row, length:] = torch.nan
    inputs.requires_grad_(call.by["inputs"])
    state = first_state(call, dnc)
    state = None if state is None else state.map(lambda x: x.requires_grad_(call.by["state"] and not call.alike))
    with torch.set_grad_enabled(call.backward != "none"):
        if oracle:
            start = dnc.initial_state(call.batch) if state is None else state
            run = by_rows_twice if call.way == "twice" else by_rows
            outputs, last = run(dnc, inputs, start, call.lengths, reset)
        else:
            views = None if state is None else state.map(lambda x: as_a_view(x, pick))
            outputs, last = WAYS[call.way](dnc, as_a_view(inputs, pick), views, call.lengths, reset, pick)
    last = without_slots(last) if call.alike else last
    forward = {"outputs": outputs, "state": last}

    if call.backward == "none":
        assert not outputs.requires_grad
        return forward, {}

    wanted = {name: x for name, x in dnc.named_parameters() if x.requires_grad}
    wanted |= {"inputs": inputs} if call.by["inputs"] else {}
    wanted |= {f"state {i}": x for i, x in enumerate(tree_leaves(state)) if x is not None and x.requires_grad}
    choice = random.Random(call.seed)
    wanted = {name: x for name, x in wanted.items() if call.by["all"] or choice.random() < 0.6}
    results = [outputs, *tree_leaves(last)]
    seen = {"all": results, "outputs": results[:1], "state": results[1:], "one": [choice.choice(results)]}[call.sees]
    # A number that depends on nothing, as all of a call without a step, has no gradient.
    seen = [(x, weight) for x, weight in zip(seen, random_like(seen, seed=call.seed), strict=True) if x.requires_grad]
    if not wanted or not seen:
        return forward, dict.fromkeys(wanted)
    tensors, weights = zip(*seen, strict=True)
    by_graph = partial(torch.autograd.grad, tensors, list(wanted.values()), weights, allow_unused=True)
    if call.backward == "twice":
        again = by_graph(retain_graph=True)
    gradients = by_graph()
    if call.backward == "twice":
        assert_same_bits([x for x in again if x is not None], [x for x in gradients if x is not None], name="again")
    return forward, dict(zip(wanted, gradients, strict=True))


def check(call: Call) -> None:
    """Compare one call with the oracle.

    Raises:
        AssertionError: it is off.
    """
    torch.manual_seed(call.seed)
    dnc = make(call)
    expected, expected_gradients = outcome(call, dnc, oracle=True)
    actual, gradients = outcome(call, dnc, oracle=False)
    assert_close(actual, expected, **FORWARD, name="")
    for name, gradient in gradients.items():
        want = expected_gradients[name]
        if want is None or gradient is None:  # where one has no graph the other may have one that gives zeros
            assert not any(x is not None and x.any() for x in (want, gradient)), f"d_{name}: {gradient}, not {want}"
        else:
            assert_close(gradient, want, **GRADIENT, name=f"d_{name}")
    if dnc.checkpoint is not None and call.in_one:
        dnc.checkpoint = None
        assert_same_bits((actual, gradients), outcome(call, dnc, oracle=False), name="with another checkpoint, ")


# --- the run ----------------------------------------------------------------------------------------------------------


def run(count: int, backend: str, *, seed: int = 0, report: Callable[[str], None] = print) -> None:
    """Check that many calls of a backend.

    Raises:
        AssertionError: one is off.
    """
    started = told = time.monotonic()
    for index in range(count):
        call = draw(seed + index, backend)
        try:
            check(call)
        except Exception as error:  # whatever it is, the reader will want to reproduce it
            again = f"python -m tests.fuzz_layer --backend {backend} --count 1 --seed {seed + index}"
            raise AssertionError(
                f"after {index:,} calls that are right:\n{type(error).__name__}: {error}\n{call}\nagain: {again}"
            ) from error
        if time.monotonic() - told > 5:
            told = time.monotonic()
            report(f"{index + 1:,} of {count:,} calls, {(index + 1) / (told - started):,.0f} a second")
    report(f"{count:,} calls, {backend}, seed {seed}: all right, in {time.monotonic() - started:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz_layer", description="Random layers, called at random.")
    parser.add_argument("--count", type=int, default=1000, help="calls of each backend")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next one has the next")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["reference", "torch_sequence", "auto"])
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count: expected at least 1, got {options.count}")
    torch.set_num_threads(1)
    try:
        for backend in options.backend:
            run(options.count, backend, seed=options.seed, report=partial(print, flush=True))
    except AssertionError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
