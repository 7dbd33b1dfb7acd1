"""The memory step on a GPU: first parity, then the time of every layout beside the reference and the floors.

``python -m benchmarks.gpu``, or ``make gpu``, which first runs the parity tests on the device. For each bucket the
kernels are compared with the float64 oracle on the same data; a layout that is wrong is not timed. Kernels are timed as
replayed in a CUDA graph, the reference as it is used: eager, and compiled. Data are random, and a graph holds several
steps, each on a state of its own, so that they are not all in the cache. Where one launch can compute a whole sequence,
controller included, that is timed as well, per time step. The results are written after each row.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import files, goals, verify
from benchmarks.configurations import BASE, Case, case_of
from benchmarks.floors import bytes_per_second, cache_bytes_per_second, step_bytes
from benchmarks.machine import describe_machine
from benchmarks.measure import COMPILE_SECONDS, in_a_line
from benchmarks.modes import TRAINING, aside, draw_inputs
from benchmarks.peers import Network, compile_reference, dnc_layer
from dnc_reference import MemoryState, interface_step
from dnc_reference.interface import interface_sizes
from dnc_triton.cli import INTERRUPTED
from dnc_triton.dispatch import BACKENDS
from dnc_triton.kernels import launcher
from dnc_triton.kernels.layout import MOST_IN_ONE_LAUNCH, Layout, layouts, sequence_layouts
from dnc_triton.kernels.step_launch import step_backward, step_forward
from dnc_triton.tuning import device_time

# (B, N, W, R). The first two come first because the project's goals are set on them; the last is for the layouts that
# only a large memory and a small batch can use.
BUCKETS = (
    (16, 16, 16, 4),
    (64, 256, 64, 4),
    (16, 16, 16, 1),
    (64, 64, 32, 4),
    (64, 128, 64, 4),
    (32, 192, 64, 4),
    (64, 512, 64, 8),
    (8, 2048, 32, 4),
)
COMPILED = "reference, compiled"
STATES = 4  # each with a step in the graph
REPLAYS = 30
WAIT = 1_000_000  # clocks, half a millisecond: longer than launching a graph takes, which must not count
# The kernels in float32 compared with the float64 oracle: largest error over largest number of a tensor. Rounding alone
# causes about 1e-6; tf32 would cause 1e-3.
ALLOWED_ERROR = 2e-5
SEQUENCE_STEPS, SEQUENCE_HIDDEN = 32, 64  # of a whole sequence in one launch

Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Row:
    """One way to compute one bucket.

    Attributes:
        batch, memory_size, word_size, num_reads: B, N, W, R.
        who: the layout, or the reference, eager or compiled.
        error: largest error over largest number, forward and backward; None for the reference.
        forward_us, backward_us: median µs of a step; None if it was wrong, or does not apply.
        forward_floor_us, backward_floor_us: to move the bytes of link and memory, as fast as the device copies.
        forward_l2_floor_us, backward_l2_floor_us: the same at the speed of its L2 cache; None if they do not fit, or
            that speed is not known.
        note: why something is missing.
    """

    batch: int
    memory_size: int
    word_size: int
    num_reads: int
    who: str
    error: float | None = None
    forward_us: float | None = None
    backward_us: float | None = None
    forward_floor_us: float = 0.0
    backward_floor_us: float = 0.0
    forward_l2_floor_us: float | None = None
    backward_l2_floor_us: float | None = None
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it is a layout that raised, or differs from the oracle."""
        return self.forward_us is None and not self.who.startswith("reference")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 1 if a layout is wrong or raised, 2 and 130 as `benchmarks`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing after this time (default: 300)")
    parser.add_argument("--no-compiled", action="store_true", help="without torch.compile, which may take minutes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.", file=sys.stderr)
        return 2
    files.make_output(parser, options.output)
    torch.set_float32_matmul_precision("highest")  # as in `benchmarks`
    started, device = time.perf_counter(), torch.device("cuda")
    machine = {"device": "cuda", **describe_machine(shlex.join(["python", "-m", "benchmarks.gpu", *arguments]))}
    machine["bytes_per_second"] = bytes_per_second(device)
    stem = options.output / f"gpu-step-{machine['date'][:10]}"
    rows: list[Row] = []
    left_out: list[str] = []
    interrupted = False

    def write() -> None:
        files.write_results(stem, machine, [asdict(row) for row in rows], left_out)

    try:
        for row, measure in jobs(BUCKETS, device, graph_time, call_time, compiled=not options.no_compiled):
            # An estimate: the compiler unrolls the backward of a product over slots, so its time grows with them.
            needed = COMPILE_SECONDS * max(1, row.memory_size / 64) if row.who == COMPILED else 0
            if time.perf_counter() - started + needed > options.seconds:
                left_out.append(f"{sizes_of(row)}, {row.who}: the time is up")
                continue
            rows.append(measure_one(row, measure))
            write()  # so that it is there if the run is killed
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    except KeyboardInterrupt:
        interrupted = True
        left_out.append("what follows: interrupted")
    if not rows:
        print("Nothing was measured:", *left_out, sep="\n- ", file=sys.stderr)
        return INTERRUPTED if interrupted else 2
    write()
    reached = "Goals, set for an H200:\n\n" + goals.table(goals.STEPS, [asdict(row) for row in rows])
    print(markdown(rows), *left_out, "", reached, "", f"Written: {stem}.json, {stem}.csv", sep="\n")
    if any(row.is_wrong for row in rows):
        return 1
    return INTERRUPTED if interrupted else 0


def jobs(
    buckets: Sequence[tuple[int, int, int, int]],
    device: torch.device,
    kernel_time: Clock,
    eager_time: Clock,
    *,
    compiled: bool = True,
) -> Iterator[tuple[Row, Callable[[Row], Row]]]:
    """Rows without figures, each with a function that fills them in; important ones first, long compilations last.

    The clocks are arguments: for kernels that of a graph, for the reference an eager one.
    """
    speed = bytes_per_second(device)

    def row_of(bucket: tuple[int, int, int, int], who: str) -> Row:
        moved = step_bytes(*bucket[:3])
        memory = [1e6 * size / speed for size in moved]  # µs
        from_cache = [cache_bytes_per_second(device, size) for size in moved]
        cache = [fast and 1e6 * size / fast for size, fast in zip(moved, from_cache, strict=True)]
        return Row(
            *bucket,
            who,
            forward_floor_us=memory[0],
            backward_floor_us=memory[1],
            forward_l2_floor_us=cache[0],
            backward_l2_floor_us=cache[1],
        )

    for bucket in buckets:
        _, slots, word, _ = bucket
        of_step, of_sequence = layouts(slots), sequence_layouts(slots, word) if slots <= MOST_IN_ONE_LAUNCH else []
        ahead = of_step + of_sequence  # by the first row, for all of them
        for layout in of_step:
            row = row_of(bucket, f"{'fused' if layout.fused else 'split'} {layout.describe()}")
            yield row, partial(step_row, device=device, layout=layout, clock=kernel_time, ahead=ahead)
            ahead = []
        for layout in of_sequence:
            row = row_of(bucket, f"sequence of {SEQUENCE_STEPS}, H = {SEQUENCE_HIDDEN}, {layout.describe()}")
            yield row, partial(sequence_row, device=device, layout=layout, clock=kernel_time)
        row = row_of(bucket, "reference, eager")
        yield row, partial(reference_row, device=device, compiled=False, clock=eager_time)
    for bucket in sorted(buckets, key=lambda bucket: bucket[1]) if compiled else ():
        row = row_of(bucket, COMPILED)
        yield row, partial(reference_row, device=device, compiled=True, clock=eager_time)


def measure_one(row: Row, measure: Callable[[Row], Row]) -> Row:
    """A row with its figures, or with the reason why there are none."""
    try:
        return measure(row)
    except Exception as error:  # one failure must not cost the others' figures
        return replace(row, note=f"not measured: {in_a_line(error)}")


def states_of(row: Row, device: torch.device, count: int) -> list[tuple[Tensor, MemoryState, list[Tensor]]]:
    """Random steps of a row's sizes."""
    sizes = row.batch, row.memory_size, row.word_size, row.num_reads
    return [random_step(*sizes, device, seed) for seed in range(count)]


def compile_ahead(row: Row, device: torch.device, layouts: Sequence[Layout]) -> None:
    """Compile what layouts launch for a row's sizes, several kernels at once: each takes seconds on one core."""
    (step,) = states_of(row, device, 1)
    with torch.autograd.set_multithreading_enabled(False), launcher.compiling_ahead(device):
        for layout in layouts:
            with suppress(Exception):  # it is raised again in the layout's own row
                if layout.whole_sequence:
                    network, inputs, _ = sequence_of(row, device, layout)
                    torch.autograd.grad(network.run(inputs, None)[0].sum(), list(network.module.parameters()))
                else:
                    kernel_calls([step], row.num_reads, layout)[1]()


def step_row(row: Row, *, device: torch.device, layout: Layout, clock: Clock, ahead: Sequence[Layout] = ()) -> Row:
    """One layout of the memory step, after the layouts in `ahead` have been compiled."""
    if ahead:
        compile_ahead(row, device, ahead)
    states = states_of(row, device, STATES)
    error = worst_error(*states[0], row.num_reads, layout)
    if not error <= ALLOWED_ERROR:
        return replace(row, error=error, note="wrong: not timed")
    forward, backward = (clock(call) / len(states) for call in kernel_calls(states, row.num_reads, layout))
    return replace(row, error=error, forward_us=forward, backward_us=backward)


def sequence_of(row: Row, device: torch.device, layout: Layout) -> tuple[Network, Tensor, Case]:
    """A layer that takes one launch for a whole sequence, its inputs, and their case."""
    case = replace(
        case_of("sequence", BASE, "cuda"),
        batch=row.batch,
        steps=SEQUENCE_STEPS,
        memory_size=row.memory_size,
        word_size=row.word_size,
        num_reads=row.num_reads,
        hidden_size=SEQUENCE_HIDDEN,
    )
    inputs = draw_inputs(case, device)
    layer = dnc_layer(case, device, "triton_sequence")

    def run(inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = layer.initial_state(len(inputs))
        unroll = BACKENDS["triton_sequence"].unroll
        outputs, state = unroll(layer, inputs.transpose(0, 1), state, layout=layout)
        return outputs.transpose(0, 1), state

    return Network(layer, run), inputs, case


def sequence_row(row: Row, *, device: torch.device, layout: Layout, clock: Clock) -> Row:
    """A whole sequence in one launch each way; the error may be as large as the benchmark allows for a sequence."""
    network, inputs, case = sequence_of(row, device, layout)
    truth = verify.find_truth(case, inputs, [TRAINING])
    error = verify.error(network, TRAINING, truth)
    if not error <= truth.allowed[TRAINING]:
        return replace(row, error=error, note="wrong: not timed")
    parameters = list(network.module.parameters())
    forward = clock(lambda: network.run(inputs, None))
    both = clock(lambda: torch.autograd.grad(network.run(inputs, None)[0].square().mean(), parameters))
    return replace(row, error=error, forward_us=forward / SEQUENCE_STEPS, backward_us=(both - forward) / SEQUENCE_STEPS)


def reference_row(row: Row, *, device: torch.device, compiled: bool, clock: Clock) -> Row:
    """The reference; its backward time is that of forward and backward less that of the forward."""
    torch.compiler.reset()  # code compiled for a second size serves all sizes, and is slower
    step = compile_reference(oracle_step, row.memory_size) if compiled else oracle_step
    (state,) = states_of(row, device, 1)
    forward, both = (clock(reference_call(step, *state, row.num_reads, backward)) for backward in (False, True))
    return replace(row, forward_us=forward, backward_us=both - forward)


def random_step(
    batch: int, slots: int, word: int, reads: int, device: torch.device, seed: int
) -> tuple[Tensor, MemoryState, list[Tensor]]:
    """A raw interface vector, a state in the middle of a sequence, and gradients with respect to what it returns."""
    generator = torch.Generator(device).manual_seed(seed)
    size = sum(interface_sizes(reads, 1, word).values())

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    state = MemoryState.zeros(batch, slots, word, reads, 1, device=device)
    state = state._replace(memory=draw(batch, slots, word))
    with torch.no_grad():
        for _ in range(4):
            _, state = oracle_step(draw(batch, size), state, reads)
    # The order of the free list must not depend on rounding: kernels and oracle must use the same one.
    order = torch.stack([torch.randperm(slots, generator=generator, device=device) for _ in range(batch)])
    state = state._replace(usage=(order + 0.5) / slots)
    gradients = [draw(batch, reads, word), *(draw(*tensor.shape) for tensor in state)]
    return draw(batch, size), state, gradients


def oracle_step(vector: Tensor, state: MemoryState, reads: int) -> tuple[Tensor, MemoryState]:
    """The reference, as the layer calls it."""
    return interface_step(vector, state, num_reads=reads, num_writes=1, strength="oneplus", stop_usage_gradient=False)


def kernel_calls(
    steps: list[tuple[Tensor, MemoryState, list[Tensor]]], reads: int, layout: Layout
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that compute a step forward on every state, and a step backward."""
    settings: dict[str, Any] = {"raw": True, "strength_offset": 1.0, "layout": layout}

    def forward() -> list[Any]:
        return [step_forward(vector, tuple(state), num_reads=reads, **settings) for vector, state, _ in steps]

    results = forward()

    def backward() -> list[Any]:
        return [
            step_backward(
                vector,
                tuple(state),
                (result.memory, result.usage, *result[5:]),
                tuple(gradients),
                stop_usage_gradient=False,
                **settings,
            )
            for (vector, state, gradients), result in zip(steps, results, strict=True)
        ]

    return forward, backward


def worst_error(vector: Tensor, state: MemoryState, gradients: list[Tensor], reads: int, layout: Layout) -> float:
    """How far the kernels are off the float64 oracle: largest error over largest number of any result or gradient."""
    forward, backward = kernel_calls([(vector, state, gradients)], reads, layout)
    wide = [tensor.double().requires_grad_() for tensor in (vector, *state)]
    read_words, new_state = oracle_step(wide[0], MemoryState(*wide[1:]), reads)
    expected = [read_words, *new_state]
    expected_gradients = torch.autograd.grad(expected, wide, [gradient.double() for gradient in gradients])
    pairs = [*zip(forward()[0], expected, strict=False), *zip(backward()[0], expected_gradients, strict=True)]
    errors = [(actual.double() - truth.detach()).abs().max() / truth.detach().abs().max() for actual, truth in pairs]
    return float(torch.stack(errors).max())  # NaN if any is


def reference_call(
    step: Callable[..., Any], vector: Tensor, state: MemoryState, gradients: list[Tensor], reads: int, backward: bool
) -> Callable[[], Any]:
    """A function that runs the reference forward, or forward and backward."""
    inputs = [tensor.detach().requires_grad_(backward) for tensor in (vector, *state)]

    def call() -> Any:
        read_words, new_state = step(inputs[0], MemoryState(*inputs[1:]), reads)
        return torch.autograd.grad([read_words, *new_state], inputs, gradients) if backward else read_words

    return call


def graph_time(call: Callable[[], Any]) -> float:
    """Median µs of a call's kernels, as replayed in a CUDA graph."""
    with aside():
        for _ in range(3):
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return call_time(graph.replay, wait=WAIT)


def call_time(call: Callable[[], Any], wait: int = 0) -> float:
    """Median `device_time` of a call, including launches where these take longer than the device."""
    for _ in range(5):
        call()
    return statistics.median(device_time(call, wait) for _ in range(REPLAYS))


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| B, N, W, R | who | error | forward µs | backward µs | floor µs of memory | floor µs of L2 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        forward, backward = ("not measured" if us is None else f"{us:.1f}" for us in (row.forward_us, row.backward_us))
        error = "" if row.error is None else f"{row.error:.0e}"
        memory = f"{row.forward_floor_us:.2f}, {row.backward_floor_us:.2f}"
        floors = row.forward_l2_floor_us, row.backward_l2_floor_us
        cache = ", ".join("–" if us is None else f"{us:.2f}" for us in floors)
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {sizes_of(row)} | {row.who}{note} | {error} | {forward} | {backward} | {memory} | {cache} |")
    return "\n".join(lines)


def sizes_of(row: Row) -> str:
    """B, N, W, R."""
    return f"{row.batch}, {row.memory_size}, {row.word_size}, {row.num_reads}"


if __name__ == "__main__":
    sys.exit(main())
