"""What several test files share: how tensors are compared, how problems are drawn, how the golden files are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from dnc_reference import DNCState, Interface, MemoryState, memory_step
from dnc_reference.addressing import norm
from dnc_reference.interface import activate_interface, interface_sizes

# --- comparison -------------------------------------------------------------------------------------------------------


def assert_close(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, name: str = "tensor") -> None:
    """Assert that a tensor, or every tensor of a nest, is within `rtol` of the expected magnitude, plus `atol`.

    Two things are held against that limit: the worst element against the largest magnitude expected, and the RMS of
    the difference against the RMS expected. The first alone would let a tensor that is large in one place be wrong in
    all others; the second alone would let one element in many be wrong altogether.
    """
    complaints = [_complaint(*pair, rtol, atol) for pair in _pairs(name, actual, expected)]
    assert not any(complaints), "\n".join(filter(None, complaints))


def assert_same_bits(actual: Any, expected: Any, *, name: str = "tensor") -> None:
    """Assert that a tensor, or every tensor of a nest, has the same dtype and values; a NaN equals a NaN."""
    for path, tensor, want in _pairs(name, actual, expected):
        torch.testing.assert_close(
            tensor, want, rtol=0, atol=0, equal_nan=True, msg=lambda message, path=path: f"{path}: {message}"
        )


def _pairs(name: str, actual: Any, expected: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, tensor, tensor) for each place in two nests, which must be of the same kind."""
    found, structure = tree_flatten_with_path(actual)
    wanted, wanted_structure = tree_flatten_with_path(expected)
    assert structure == wanted_structure, f"{name}: expected {wanted_structure}, got {structure}"
    for (path, tensor), (_, want) in zip(found, wanted, strict=True):
        yield name + keystr(path), tensor, want


def _complaint(name: str, actual: Tensor, expected: Tensor, rtol: float, atol: float) -> str:
    """What is wrong with a tensor, or nothing."""
    if actual.shape != expected.shape:
        return f"{name}: expected shape {list(expected.shape)}, got {list(actual.shape)}"
    if actual.numel() == 0:
        return ""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert expected.isfinite().all(), f"{name}: nothing can be compared with a value that is not finite"
    error = (actual - expected).abs().nan_to_num(nan=torch.inf)
    worst, largest = error.max().item(), expected.abs().max().item()
    rms, expected_rms = error.square().mean().sqrt().item(), expected.square().mean().sqrt().item()
    limit = atol + rtol * largest
    assert math.isfinite(limit), f"{name}: nothing can be compared within a limit that is not finite"
    if worst <= limit and rms <= atol + rtol * expected_rms:
        return ""
    index = [int(i) for i in np.unravel_index(int(error.argmax()), error.shape)]
    return (
        f"{name}{index}: got {actual[tuple(index)].item():.17g}, expected {expected[tuple(index)].item():.17g}, "
        f"off by {worst:.3g} of at most {limit:.3g}; largest expected {largest:.3g}, "
        f"relative RMS {rms / expected_rms if expected_rms else torch.inf:.3g}, "
        f"{int((error > limit).sum())} of {error.numel()} elements off"
    )


# --- random problems --------------------------------------------------------------------------------------------------


def random_interface(
    batch: int,
    word: int,
    reads: int,
    writes: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int | torch.Generator = 0,
) -> Interface:
    """What a controller with standard normal output would ask. The same numbers, rounded, in every dtype."""
    size = sum(interface_sizes(reads, writes, word).values())
    vector = torch.randn(batch, size, generator=_generator(seed), dtype=torch.float64)
    interface = activate_interface(vector, num_reads=reads, num_writes=writes, word_size=word)
    return tree_map(lambda x: x.to(dtype), interface)


def random_problem(
    batch: int,
    slots: int,
    word: int,
    reads: int,
    writes: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    steps: int = 4,
) -> tuple[Interface, MemoryState]:
    """A memory that has seen some steps, and what is asked of it next. The same numbers, rounded, in every dtype."""
    generator = _generator(seed)
    state = MemoryState.zeros(batch, slots, word, reads, writes, dtype=torch.float64)._replace(
        memory=torch.randn(batch, slots, word, generator=generator, dtype=torch.float64),
        usage=torch.empty(batch, slots, dtype=torch.float64).uniform_(0.02, 0.98, generator=generator),
    )
    for _ in range(steps):
        _, state = memory_step(random_interface(batch, word, reads, writes, seed=generator), state)
    interface = random_interface(batch, word, reads, writes, dtype=dtype, seed=generator)
    return interface, tree_map(lambda x: x.to(dtype), state)


def random_like(nest: Any, *, seed: int = 0) -> Any:
    """Standard normal tensors in the shapes and dtypes of a nest: gradients to send back."""
    generator = _generator(seed)
    return tree_map(
        lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype=x.dtype, device=x.device),
        nest,
    )


def has_no_gaps(tensor: Tensor) -> bool:
    """Whether its numbers lie one after the other, in whatever order."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or last == tensor.numel() - 1


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def as_leaves(nest: Any) -> Any:
    """The same values, cut off from any graph, with gradients asked for."""
    return tree_map(lambda x: x.detach().clone().requires_grad_(), nest)


def columns_first(tensor: Tensor) -> Tensor:
    """The same values in another order in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def total(*nests: Any) -> Tensor:
    """A loss that sees every number, each with a weight of its own."""
    flat = torch.cat([x.flatten().double() for x in tree_leaves(nests)])
    return flat @ (torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device) + 1).cos()


def negated_when_read(tensor: Tensor) -> Tensor:
    """The same values, with the other sign in memory."""
    return torch._neg_view(-tensor.detach())


def replace_parameters(module: torch.nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter with one of what `function` makes of its values."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(function(parameter.detach())))


def step_gradients(
    step: Callable[..., tuple[Tensor, MemoryState]],
    interface: Interface,
    state: MemoryState,
    d_read_words: Tensor,
    d_state: MemoryState,
    **options: Any,
) -> tuple[Interface, MemoryState]:
    """What `dnc_reference.backward.memory_step_backward` returns, by autograd through `step`."""
    interface, state = as_leaves((interface, state))
    read_words, new = step(interface, state, **options)
    gradients = torch.autograd.grad(
        (read_words, *new), (*interface, *state), (d_read_words, *d_state), materialize_grads=True
    )
    return Interface(*gradients[: len(interface)]), MemoryState(*gradients[len(interface) :])


def gradient_floor(interface: Interface, state: MemoryState) -> float:
    """Some ulps of the largest term that a gradient of a step sums up: it is known no better where the terms cancel.

    What is sent back has magnitude 1, as from `random_like`. A lookup multiplies it by the strength and divides it by a
    norm, which makes it up to a million times larger.
    """
    strengths = torch.cat([interface.read_strengths, interface.write_strengths], 1)
    norms = norm(torch.cat([interface.read_keys, interface.write_keys, state.memory], 1))
    return 4 * torch.finfo(norms.dtype).eps * max(1.0, (strengths.max() / norms.min()).item())


# --- goldens: what DeepMind's own code computed; goldens/FORMAT.md says how -------------------------------------------

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN_NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))

# Field → its name in the files.
INTERFACE_KEYS = Interface(
    read_keys="read_content_keys",
    read_strengths="read_content_strengths",
    write_keys="write_content_keys",
    write_strengths="write_content_strengths",
    erase_vectors="erase_vectors",
    write_vectors="write_vectors",
    free_gates="free_gate",
    allocation_gates="allocation_gate",
    write_gates="write_gate",
    read_modes="read_mode",
)
STATE_KEYS = MemoryState(
    memory="memory",
    usage="usage",
    link="link",
    precedence="precedence_weights",
    read_weights="read_weights",
    write_weights="write_weights",
)

# From an all-zero start slots are interchangeable, and rounding decides which is written: these depend on which.
_HAS_SLOT_AXIS = re.compile(r"_(memory|usage|link|\w*weights)$")

FORWARD_RTOL, GRADIENT_RTOL = 1e-10, 1e-9
# The files' own float32 run is one draw of rounding errors; another order of summation makes another, hence the factor.
F32_FACTOR = 4
# Below this no error counts, in ulps of the dtype. For a forward value these are at the tensor's largest magnitude; for
# a gradient at 1 at least, since it sums terms of the magnitude of the loss weights, 1, and is known to an ulp of
# these however far they cancel (bigstrength: to 1e-15). Without it a lucky yardstick would fail a good result: for a
# tensor with one element, as many biases are, a second draw is more than 4 times the first in one case of six.
F64_FLOOR_ULPS, F32_FLOOR_ULPS = 1, 4
# Central differences are good to about 1e-8; a wrong gradient is off by far more than this.
DIFFERENCES_ATOL = 1e-6


class Golden(NamedTuple):
    """One file: inputs, results, and what is known about them."""

    name: str
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def tensor(self, key: str, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(self.arrays[key]).to(dtype)

    def interface(self, prefix: str, dtype: torch.dtype) -> Interface:
        """The fields as they stand in the file: strengths still raw."""
        return Interface(*(self.tensor(prefix + key, dtype) for key in INTERFACE_KEYS))

    def state(self, prefix: str, dtype: torch.dtype) -> MemoryState:
        return MemoryState(*(self.tensor(prefix + key, dtype) for key in STATE_KEYS))

    def comparable(self, dtype: torch.dtype) -> bool:
        """Whether anything can be compared in this dtype. One step's loss weights see the order of slots throughout."""
        return self.slot_order_is_safe(dtype) or self.meta["kind"] != "memory_step"

    def slot_order_is_safe(self, dtype: torch.dtype) -> bool:
        return self.meta["slot_order_safe_f64" if dtype == torch.float64 else "slot_order_safe_f32"]

    def results(self, dtype: torch.dtype) -> set[str]:
        """The keys of everything computed that can be compared in this dtype."""
        # The yardstick has an entry for each thing computed and for nothing else.
        keys = self.meta["f32_self_diff"]
        return {key for key in keys if self.slot_order_is_safe(dtype) or not _HAS_SLOT_AXIS.search(key)}

    def check(self, actual: dict[str, Tensor], *, without: tuple[str, ...] = (), forced: bool = False) -> None:
        """Assert that all results are there, but those whose keys begin with one of `without`, and within tolerance.

        Args:
            actual: key in the file → what was computed, all in one dtype, which decides the tolerance. Tensors with
                a slot axis are passed over where the order of slots is not decided.
            without: what the tested code does not show.
            forced: every step began from the file's own state, so the order of slots is the file's: nothing is passed
                over.
        """
        (dtype,) = {tensor.dtype for tensor in actual.values()}
        unknown = actual.keys() - self.meta["f32_self_diff"].keys()
        assert not unknown, f"{self.name}: has no {unknown}"
        comparable = set(self.meta["f32_self_diff"]) if forced else self.results(dtype)
        wanted = {key for key in comparable if not key.startswith(without)}
        assert wanted, f"{self.name}: nothing to compare in {dtype}"
        assert wanted <= actual.keys(), f"{self.name}: not computed: {wanted - actual.keys()}"
        complaints = []
        for key in sorted(wanted):
            try:
                self._check_one(key, actual[key])
            except AssertionError as complaint:
                complaints.append(str(complaint))
        assert not complaints, f"{self.name}, {len(complaints)} of {len(wanted)} tensors:\n" + "\n".join(complaints)

    def _check_one(self, key: str, actual: Tensor) -> None:
        if key.removeprefix("grad_") in self.meta["grad_identically_zero_because_stopped"]:
            assert not actual.any(), f"{key}: expected exact zeros, got up to {actual.abs().max().item():.3g}"
            return
        differences = key in self.meta["nonfinite_grad_keys"]
        expected = self._differences(key) if differences else self.tensor(key)
        gradient = key.startswith("grad_")
        largest = expected.abs().max().item()
        ulp = torch.finfo(actual.dtype).eps * (max(largest, 1.0) if gradient else largest)
        assert actual.dtype in (torch.float64, torch.float32), f"{key}: no tolerance is known for {actual.dtype}"
        if actual.dtype == torch.float64:
            rtol, atol = GRADIENT_RTOL if gradient else FORWARD_RTOL, F64_FLOOR_ULPS * ulp
        else:
            rtol, atol = 0.0, F32_FACTOR * self.meta["f32_self_diff"][key][0] + F32_FLOOR_ULPS * ulp
        assert_close(actual, expected, rtol=rtol, atol=atol + DIFFERENCES_ATOL * differences, name=key)

    def _differences(self, key: str) -> Tensor:
        """The true gradient where DeepMind's own is NaN: 0·∞ at a factor that is exactly 0."""
        if match := re.fullmatch(r"grad_act_(read|write)_strengths", key):  # differences were taken of the raw strength
            raw = f"in_{match[1]}_content_strengths"
            return self.tensor(f"fdgrad_{raw}") / torch.sigmoid(self.tensor(raw))
        return self.tensor(f"fd{key}")


def named(prefix: str, keys: Iterable[str], values: Iterable[Tensor]) -> dict[str, Tensor]:
    """Values under their keys in a file."""
    return {prefix + key: value for key, value in zip(keys, values, strict=True)}


def named_state(prefix: str, state: DNCState) -> dict[str, Tensor]:
    """A state of the whole network, whose controller is an LSTM of one layer, under its keys in a file."""
    ((hidden, cell),) = state.controller
    keys = [*STATE_KEYS, "access_output", "hidden", "cell"]
    return named(prefix, keys, [*state.memory, state.read_words, hidden, cell])


@cache
def load_golden(name: str) -> Golden:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return Golden(name, arrays, json.loads(str(arrays.pop("meta"))))
