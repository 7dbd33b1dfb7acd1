"""How the kernels are held against the oracle: what is drawn, what surrounds the buffers, what error is allowed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_close, gradient_floor, has_no_gaps, random_like, random_problem
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from dnc_reference import Interface, MemoryState, addressing, interface_step, memory_step
from dnc_reference.interface import activate_interface, interface_sizes
from dnc_triton.kernels import gradients, lstm, products, step_launch
from dnc_triton.kernels.layout import Layout, layouts
from dnc_triton.ops.kernel_step import kernel_interface_step, kernel_memory_step
from dnc_triton.sequence import one_launch

# --- what surrounds a buffer ------------------------------------------------------------------------------------------


class Margins(TorchFunctionMode):
    """In the launching code, what `new_empty` and `empty_like` return holds NaN and lies in a larger buffer of NaN.

    So a number that a kernel does not write, or reads from beside a tensor, is a NaN in the result, and one that it
    writes beside a tensor shows in `check`. Integers are −1: an index that leads from a tensor into its margin.
    """

    SIZE = 64  # elements on either side; a multiple of 16 bytes, as far as allocations are aligned

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, Tensor]] = []  # the margins, one before and one after

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (Tensor.new_empty, torch.empty_like) and result.numel():
            return self.place(result.shape, result.dtype, result.device)
        return result

    def place(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of NaN inside of a buffer of NaN."""
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * self.SIZE,), self._fill(dtype), dtype=dtype, device=device)
        before, inside, after = buffer.split([self.SIZE, size, self.SIZE])
        self.buffers.append((before, after))
        return inside.view(*shape)

    def copy(self, tensor: Tensor, strides: str = "contiguous") -> Tensor:
        """The same values inside of a buffer of NaN, which also fills the gaps that the strides leave."""
        if strides == "contiguous":
            return self.place(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)
        if strides == "expanded":
            return self.copy(tensor[:1]).expand_as(tensor)
        if strides == "transposed":
            return self.copy(tensor.transpose(0, -1)).transpose(0, -1)
        assert strides == "gaps", strides
        wide = self.place((*tensor.shape[:-1], 3 * tensor.shape[-1] + 1), tensor.dtype, tensor.device)
        return wide[..., 1::3].copy_(tensor)

    def check(self) -> None:
        """Assert that nobody wrote into a margin."""
        for margin in (margin for pair in self.buffers for margin in pair):
            untouched = margin.isnan() if margin.is_floating_point() else margin == self._fill(margin.dtype)
            assert untouched.all(), "something was written beside a tensor"

    @staticmethod
    def _fill(dtype: torch.dtype) -> float:
        return torch.nan if dtype.is_floating_point else -1


@contextmanager
def margins() -> Iterator[Margins]:
    """`Margins` around the buffers of all kernels that are launched meanwhile; checked in the end."""
    around = Margins()

    def allocating_in_margins(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with around:
                return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("step_forward", "step_backward"):
            patch.setattr(step_launch, name, allocating_in_margins(getattr(step_launch, name)))
        yield around
    around.check()


class LaunchesInMargins:
    """Takes the place of `launch_or_compile`: what a kernel is given lies in larger buffers while it runs.

    For launches into buffers that the caller has made. Arguments that share storage share a buffer, and lie in it as
    they did. What surrounds them, or lies between them, is 0xFF in every byte: NaN, or −1. A kernel that writes there
    fails at once; what it reads there shows in its results.
    """

    SIZE = 1024  # bytes on either side

    def __init__(self) -> None:
        self.seen: set[str] = set()  # names of the kernels

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        tensors = {name: x for name, x in enumerate(arguments) if isinstance(x, Tensor)}
        tensors |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
        storages: dict[int, list[int | str]] = {}
        for name, x in tensors.items():
            assert has_no_gaps(x)
            storages.setdefault(x.untyped_storage().data_ptr(), []).append(name)
        moved: dict[int | str, Tensor] = {}
        buffers = []
        for names in storages.values():
            own = {name: _bytes_of(tensors[name]) for name in names}
            first = min(x.storage_offset() for x in own.values())
            first -= first % 16 + self.SIZE  # what is aligned stays so
            last = max(x.storage_offset() + x.numel() for x in own.values())
            buffer = torch.full((last - first + self.SIZE,), 0xFF, dtype=torch.uint8, device=own[names[0]].device)
            beside = torch.ones_like(buffer, dtype=torch.bool)
            for name, x in own.items():
                place = slice(x.storage_offset() - first, x.storage_offset() - first + x.numel())
                like = tensors[name]
                moved[name] = torch.as_strided(buffer[place].copy_(x).view(like.dtype), like.shape, like.stride())
                beside[place] = False
            buffers.append((buffer, beside))
        arguments = tuple(moved.get(index, x) for index, x in enumerate(arguments))
        kernel[grid](*arguments, **{name: moved.get(name, x) for name, x in options.items()})
        self.seen.add(kernel.__name__)
        for buffer, beside in buffers:
            assert (buffer[beside] == 0xFF).all(), f"{kernel.__name__} wrote beside a tensor"
        for name, x in tensors.items():
            _bytes_of(x).copy_(_bytes_of(moved[name]))


@contextmanager
def launches_of_aligned() -> Iterator[None]:
    """All that kernels are given begins at a multiple of 16 bytes, as they are compiled for. Not what those of the
    controller's step are given, nor the features after each step, which begin with the second entry of a buffer.
    """

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        for name, x in (dict(zip(kernel.arg_names, arguments, strict=False)) | options).items():
            if isinstance(x, Tensor) and name != "after_ptr":
                assert x.data_ptr() % 16 == 0, (kernel.__name__, name)
        kernel[grid](*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (gradients, step_launch, one_launch):
            patch.setattr(module, "launch_or_compile", launch)
        yield


def beside_16_bytes(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins one number past a multiple of 16 bytes."""
    wide = tensor.new_empty(tensor.numel() + 16 // tensor.itemsize)
    first = (16 - wide.data_ptr() % 16) // tensor.itemsize % (16 // tensor.itemsize) + 1
    copy = wide[first : first + tensor.numel()].view(tensor.shape).copy_(tensor.detach())
    assert copy.data_ptr() % 16 == tensor.itemsize
    return copy.requires_grad_(tensor.requires_grad)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory, as bytes that can be written to without autograd noticing."""
    size, offset = tensor.nbytes, tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), offset, (size,))


@contextmanager
def launches_in_margins() -> Iterator[LaunchesInMargins]:
    """`LaunchesInMargins` around all launches meanwhile; not for three launches of a step, which read earlier steps."""
    around = LaunchesInMargins()
    with pytest.MonkeyPatch.context() as patch:
        for module in (gradients, lstm, one_launch, products, step_launch):
            patch.setattr(module, "launch_or_compile", around)
        yield around


# --- problems ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A problem, and how it is put to the kernels.

    Attributes:
        batch, slots, word, reads: B, N, W, R.
        dtype: name in torch.
        layout: as `pick_layout` takes it.
        interface: "activated", or the strength of a raw one: "oneplus" or "softplus".
        stop_usage_gradient: as in `memory_step`.
        strides: of all inputs, as `Margins.copy` takes them.
    """

    batch: int
    slots: int
    word: int
    reads: int
    dtype: str = "float32"
    layout: str = "fused"
    interface: str = "activated"
    stop_usage_gradient: bool = False
    strides: str = "contiguous"

    @property
    def options(self) -> dict[str, Any]:
        """Of `run_reference` and `run_kernels`."""
        strength = "oneplus" if self.interface == "activated" else self.interface
        return dict(strength=strength, stop_usage_gradient=self.stop_usage_gradient)

    def __str__(self) -> str:
        stop = "stop" if self.stop_usage_gradient else "flow"
        sizes = f"B{self.batch}N{self.slots}W{self.word}R{self.reads}"
        return "-".join([sizes, self.dtype, self.layout, self.interface, stop, self.strides])


def pick_layout(name: str, slots: int) -> Layout:
    """The first layout for this size of those that are "fused" or "split"; or a "spread" one."""
    layout = next(layout for layout in layouts(slots) if layout.fused == (name == "fused"))
    # At any size, and with several tiles beside each other.
    return layout._replace(columns=16, spread=True, ranks=True) if name == "spread" else layout


class Problem(NamedTuple):
    """Inputs of a step, what it is asked, and what is sent back through it."""

    inputs: Interface | Tensor  # or a raw vector
    state: MemoryState
    gradients: tuple[Tensor, MemoryState]


def draw(case: Case, *, tie: bool = True) -> Problem:
    """The first random problem of that case in which the order of slots is decided by more than rounding.

    Args:
        case: what is drawn.
        tie: let two slots be equally used, exactly: there a step is not continuous, but has the gradient of its order.
    """
    dtype = getattr(torch, case.dtype)
    for seed in range(100):
        problem = _draw(case, dtype, seed, tie)
        if slot_order_is_safe(problem, dtype).all():
            return problem
    raise AssertionError(f"{case}: no problem found")


def _draw(case: Case, dtype: torch.dtype, seed: int, tie: bool) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    size = sum(interface_sizes(case.reads, 1, case.word).values())
    inputs: Interface | Tensor = 1.5 * torch.randn(case.batch, size, generator=generator, dtype=torch.float64)
    _, state = random_problem(case.batch, case.slots, case.word, case.reads, seed=seed)
    if torch.finfo(dtype).bits == 16:
        state = _with_coarse_usage(state, inputs, generator)
    if tie:
        state = _with_a_tie(state, inputs)
    if case.strides == "expanded":
        inputs, state = tree_map(lambda x: x[:1].expand_as(x), (inputs, state))
    if case.interface == "activated":
        inputs = activate_interface(inputs, num_reads=case.reads, num_writes=1, word_size=case.word)
    inputs, state = tree_map(lambda x: x.to(dtype), (inputs, state))
    results = random_like((state.read_weights @ state.memory, state), seed=seed)
    if case.strides == "expanded":
        results = tree_map(lambda x: x[:1].expand_as(x), results)
    return Problem(inputs, state, results)


def _with_coarse_usage(state: MemoryState, vector: Tensor, generator: torch.Generator) -> MemoryState:
    """The state, with usages that 8 bits tell apart, or do not tell apart in any precision.

    A few of the slots, at random, end up far from each other in the lower half, whatever frees and fills them. The
    others are neither read nor written before and so keep a usage that is exact in 8 bits, some of them the same one.
    """
    batch, slots, _ = state.memory.shape
    few = min(slots, 8)
    order = torch.rand(batch, slots, generator=generator).argsort(-1)
    steps = torch.rand(batch, few, generator=generator, dtype=torch.float64) / 4 + torch.arange(few) + 0.5
    aims = torch.zeros(batch, slots, dtype=torch.float64).scatter(1, order[:, :few], steps / (2 * few + 1))
    chosen = aims > 0
    read_weights = torch.where(chosen.unsqueeze(1), state.read_weights, 0)
    write_weights = torch.where(chosen.unsqueeze(1), state.write_weights.clamp(max=aims.unsqueeze(1)), 0)
    retention = _retention(state._replace(read_weights=read_weights), vector)
    written = write_weights[:, 0]
    usage = ((aims / retention - written) / (1 - written)).clamp(0, 1)
    others = torch.randint(128, 256, (batch, slots), generator=generator) / 256
    return state._replace(
        usage=torch.where(chosen, usage, others), read_weights=read_weights, write_weights=write_weights
    )


def _with_a_tie(state: MemoryState, vector: Tensor) -> MemoryState:
    """The state, with a slot that comes out just as used as the least used one: the lower of them comes first."""
    slots = state.memory.shape[1]
    usage = addressing.update_usage(state.usage, state.write_weights, _retention(state, vector))
    least = usage.argmin(-1, keepdim=True)
    source = torch.arange(slots).expand(len(usage), slots).scatter(1, (least + slots // 2) % slots, least)
    fields = {name: getattr(state, name) for name in ("usage", "read_weights", "write_weights")}
    shaped = {name: source.view(-1, *[1] * (x.dim() - 2), slots).expand_as(x) for name, x in fields.items()}
    return state._replace(**{name: x.gather(-1, shaped[name]) for name, x in fields.items()})


def _retention(state: MemoryState, vector: Tensor) -> Tensor:
    sizes = dict(num_reads=state.read_weights.shape[1], num_writes=1, word_size=state.memory.shape[-1])
    return addressing.retention(activate_interface(vector, **sizes).free_gates, state.read_weights)


# Usages that differ by less than this may come out in another order, those that do not differ at all may not.
LEAST_GAP = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2**-9}


def slot_order_is_safe(problem: Problem, dtype: torch.dtype) -> Tensor:
    """[B]: whether usages are far apart in units of the dtype or equal, and the dtype's own reference agrees."""
    usages = [run_reference(*rounded_to(problem[:2], precision))[1].usage for precision in (torch.float64, dtype)]
    gaps = usages[0].sort(-1).values.diff()
    (_, exact), (_, same_dtype) = map(addressing.sort_usage, usages)
    return ((gaps == 0) | (gaps > LEAST_GAP[dtype])).all(-1) & (exact == same_dtype).all(-1)


# --- the step and its gradients ---------------------------------------------------------------------------------------


def run_reference(
    inputs: Interface | Tensor, state: MemoryState, *, strength: str = "oneplus", stop_usage_gradient: bool = False
) -> tuple[Tensor, MemoryState]:
    """The oracle's step, from an activated interface or a raw vector."""
    if isinstance(inputs, Interface):
        return memory_step(inputs, state, stop_usage_gradient=stop_usage_gradient)
    sizes = dict(num_reads=state.read_weights.shape[1], num_writes=1)
    return interface_step(inputs, state, **sizes, strength=strength, stop_usage_gradient=stop_usage_gradient)


def run_kernels(
    inputs: Interface | Tensor,
    state: MemoryState,
    *,
    layout: Layout,
    strength: str = "oneplus",
    stop_usage_gradient: bool = False,
) -> tuple[Tensor, MemoryState]:
    """The kernels' step, likewise."""
    options = dict(stop_usage_gradient=stop_usage_gradient, layout=layout)
    if isinstance(inputs, Interface):
        return kernel_memory_step(inputs, state, **options)
    sizes = dict(num_reads=state.read_weights.shape[1], num_writes=1)
    return kernel_interface_step(inputs, state, **sizes, strength=strength, **options)


class Outcome(NamedTuple):
    """Everything that a step computes, forward and backward, by name."""

    forward: dict[str, Tensor]
    backward: dict[str, Tensor]


def outcome(step: Callable[..., tuple[Tensor, MemoryState]], problem: Problem, **options: Any) -> Outcome:
    """A step, and what it sends back."""
    inputs, state = tree_map(lambda x: x.detach().requires_grad_(), problem[:2])
    read_words, new = step(inputs, state, **options)
    outputs = {"read_words": read_words, **new._asdict()}
    gradients = torch.autograd.grad(
        list(outputs.values()), tree_leaves((inputs, state)), tree_leaves(problem.gradients), materialize_grads=True
    )
    if isinstance(inputs, Tensor):
        gradients = (*split_vector(gradients[0], state), *gradients[1:])
    names = [*interface_sizes(1, 1, 1)] if isinstance(inputs, Tensor) else [*inputs._fields]
    return Outcome(
        {name: output.detach() for name, output in outputs.items()},
        {f"d_{name}": gradient for name, gradient in zip([*names, *state._fields], gradients, strict=True)},
    )


def split_vector(vector: Tensor, state: MemoryState) -> Sequence[Tensor]:
    """The fields of an interface vector, or of its gradient, in the order of `interface_sizes`."""
    sizes = interface_sizes(state.read_weights.shape[1], 1, state.memory.shape[-1])
    return vector.split(list(sizes.values()), -1)


def rounded_to(nest: Any, dtype: torch.dtype) -> Any:
    """On the CPU, where the oracle runs whatever the kernels run on."""
    return tree_map(lambda x: x.cpu().to(dtype), nest)


# --- what error is allowed --------------------------------------------------------------------------------------------

# Twice the reference's error in the same dtype: it is one draw of rounding errors, the kernel another.
FACTOR = 2
# What counts as no error, in ulps of the dtype at the largest magnitude of a tensor: one of few elements, as a gate's
# gradient may be, is now and then right by luck.
FLOOR_ULPS = 2
# In float64 the reference is the oracle itself. What is left are rounding errors.
F64_FORWARD_RTOL, F64_GRADIENT_RTOL = 1e-13, 1e-12


def assert_parity(actual: Outcome, problem: Problem, *, only: str | None = None, **options: Any) -> None:
    """Assert that an outcome is as close to the oracle as the reference in the same dtype is, within `FACTOR`.

    Args:
        actual: what the kernels made of the problem.
        problem: what was put to them; the oracle gets the same numbers.
        only: the name of the one tensor to look at.
        options: strength and stop_usage_gradient, as they went to the kernels.
    """
    dtype = problem.state.memory.dtype
    exact = outcome(run_reference, rounded_to(problem, torch.float64), **options)
    same_dtype = outcome(run_reference, rounded_to(problem, dtype), **options)
    # A gradient is a sum of terms that may be larger than itself. What is stored in 16 bits is summed up in 32.
    ulp = torch.finfo(dtype).eps
    cancelling = gradient_floor(*activated(problem, options.get("strength", "oneplus"))) if ulp < 1e-6 else 0.0
    complaints = []
    for ours, expected, theirs in zip(actual, exact, same_dtype, strict=True):
        assert ours.keys() == expected.keys()
        forward = expected is exact.forward
        rtol = 0.0 if dtype != torch.float64 else F64_FORWARD_RTOL if forward else F64_GRADIENT_RTOL
        for name, want in expected.items():
            if only not in (None, name):
                continue
            magnitude = want.abs().max().item()
            floor = FLOOR_ULPS * ulp * magnitude if forward else max(FLOOR_ULPS * ulp, cancelling) * max(magnitude, 1)
            complaints.append(_complaint(name, ours[name], want, theirs[name], rtol, floor))
    assert not any(complaints), "\n".join(filter(None, complaints))


def activated(problem: Problem, strength: str) -> tuple[Interface, MemoryState]:
    """The interface, whichever way it is given, and the state."""
    inputs, state = problem[:2]
    if isinstance(inputs, Tensor):
        sizes = dict(num_reads=state.read_weights.shape[1], num_writes=1, word_size=state.memory.shape[-1])
        inputs = activate_interface(inputs, **sizes, strength=strength)
    return inputs, state


def _complaint(name: str, actual: Tensor, exact: Tensor, same_dtype: Tensor, rtol: float, floor: float) -> str:
    """What is wrong with a tensor, or nothing: the worst element, or else the RMS over all of them."""
    allowed = FACTOR * (same_dtype.double() - exact).abs()
    try:
        assert_close(actual, exact, rtol=rtol, atol=floor + allowed.max().item(), name=name)
    except AssertionError as error:
        return str(error)
    rms = (actual.cpu().double() - exact).square().mean().sqrt().item()
    limit = floor + allowed.square().mean().sqrt().item() + rtol * exact.square().mean().sqrt().item()
    return "" if rms <= limit else f"{name}: the RMS of its error is {rms:.3g}, at most {limit:.3g} is allowed"


# --- which cases ------------------------------------------------------------------------------------------------------


def pairwise(factors: dict[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """A few combinations in which every two values of two factors meet, chosen greedily."""
    names = list(factors)
    missing = {
        ((first, a), (second, b))
        for first, second in combinations(names, 2)
        for a, b in product(factors[first], factors[second])
    }
    chosen = []
    while missing:
        row: dict[str, Any] = dict(min(missing, key=str))
        for name in names:
            if name not in row:
                row[name] = max(
                    factors[name],
                    key=lambda value, name=name: sum(
                        pair in missing or pair[::-1] in missing
                        for pair in (((name, value), other) for other in row.items())
                    ),
                )
        met = set(combinations(((name, row[name]) for name in names), 2))
        missing -= met
        chosen.append(row)
    return chosen
