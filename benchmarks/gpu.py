"""The memory step on a GPU: first parity, then the time of every layout beside the reference and the floor.

``python -m benchmarks.gpu``, or ``make gpu``, which runs the parity tests on the device before. For each bucket the
kernels are held against the float64 oracle on the same data; a layout that is wrong gets no time. Kernels are timed as
replayed in a CUDA graph, the reference as it is used: eager, and compiled. Data are random, and a graph holds several
steps, each on a state of its own, so that they do not all sit in the cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from dnc_reference import MemoryState, interface_step
from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.launch import step_backward, step_forward
from dnc_triton.kernels.layout import Layout, layouts

# (B, N, W, R). The project's goals are set on the first two, so they come first.
BUCKETS = (
    (16, 16, 16, 4),
    (64, 256, 64, 4),
    (16, 16, 16, 1),
    (64, 64, 32, 4),
    (64, 128, 64, 4),
    (32, 192, 64, 4),
    (64, 512, 64, 8),
)
BYTES_PER_SECOND = 4.3e12  # an H200 copying device memory
STATES = 4  # each with a step in the graph
REPLAYS = 30
# The kernels' float32 against the float64 oracle, largest error over largest number of a tensor. Rounding alone leaves
# about 1e-6; tf32 would leave 1e-3.
ALLOWED_ERROR = 2e-5


@dataclass(frozen=True)
class Row:
    """One way to compute one bucket.

    Attributes:
        batch, memory_size, word_size, num_reads: B, N, W, R.
        who: the layout, or the reference eager or compiled.
        error: largest error over largest number, forward and backward; None for the reference.
        forward_us, backward_us: median µs of a step; None if it was wrong, or does not apply.
        forward_floor_us, backward_floor_us: the bytes of link and memory that must move, at the copy's speed.
        note: why something is missing.
    """

    batch: int
    memory_size: int
    word_size: int
    num_reads: int
    who: str
    error: float | None
    forward_us: float | None
    backward_us: float | None
    forward_floor_us: float
    backward_floor_us: float
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 1 if a layout is wrong, 2 without a GPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=300, help="start no bucket after this time (default: 300)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.", file=sys.stderr)
        return 2
    machine = describe_machine(shlex.join(["python", "-m", "benchmarks.gpu", *arguments]))
    rows: list[Row] = []
    started = time.perf_counter()
    for bucket in BUCKETS:
        if time.perf_counter() - started > options.seconds:
            print(f"B, N, W, R = {bucket} and what follows: not measured, the time is up")
            break
        rows += measure(*bucket, torch.device("cuda"), graph_time, call_time)
        print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    if not rows:
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"gpu-step-{machine['date'][:10]}"
    records = [asdict(row) for row in rows]
    stem.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": records}, indent=2) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    print(markdown(rows))
    print(f"Written: {stem}.json, {stem}.csv")
    return 1 if any(row.error is not None and not row.error <= ALLOWED_ERROR for row in rows) else 0


def measure(
    batch: int,
    slots: int,
    word: int,
    reads: int,
    device: torch.device,
    kernel_time: Callable[[Callable[[], Any]], float],
    eager_time: Callable[[Callable[[], Any]], float],
) -> list[Row]:
    """All rows of one bucket. The clocks come as arguments: a graph's for kernels, an eager one for the reference."""
    floors = tuple(1e6 * batch * (link * slots * slots + 8 * slots * word) / BYTES_PER_SECOND for link in (8, 12))  # µs
    states = [random_step(batch, slots, word, reads, device, seed) for seed in range(STATES)]
    rows = []
    for layout in layouts(slots, word):
        who = f"{'fused' if layout.fused else 'split'} {layout.rows}×{layout.columns}, {layout.num_warps} warps"
        error = worst_error(*states[0], reads, layout)
        if not error <= ALLOWED_ERROR:
            rows.append(Row(batch, slots, word, reads, who, error, None, None, *floors, note="wrong: not timed"))
            continue
        forward, backward = kernel_calls(states, reads, layout)
        times = [kernel_time(call) / len(states) for call in (forward, backward)]
        rows.append(Row(batch, slots, word, reads, who, error, *times, *floors))
    for who, step in (("reference, eager", oracle_step), ("reference, compiled", torch.compile(oracle_step))):
        try:
            forward_time, both_time = (
                eager_time(reference_call(step, *states[0], reads, backward)) for backward in (False, True)
            )
        except Exception as error:  # a compiler that is not there must not cost the other figures
            note = f"not measured: {type(error).__name__}"
            rows.append(Row(batch, slots, word, reads, who, None, None, None, *floors, note=note))
            continue
        rows.append(Row(batch, slots, word, reads, who, None, forward_time, both_time - forward_time, *floors))
    return rows


def random_step(
    batch: int, slots: int, word: int, reads: int, device: torch.device, seed: int
) -> tuple[Tensor, MemoryState, list[Tensor]]:
    """A raw interface vector, a state in the middle of a sequence, and gradients by what the step returns."""
    generator = torch.Generator(device).manual_seed(seed)
    size = sum(interface_sizes(reads, 1, word).values())

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    state = MemoryState.zeros(batch, slots, word, reads, 1, device=device)
    state = state._replace(memory=draw(batch, slots, word))
    with torch.no_grad():
        for _ in range(4):
            _, state = oracle_step(draw(batch, size), state, reads)
    # The order of the free list must not hang on a rounding: kernels and oracle are to take the same one.
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
    """A step forward on every state, and a step backward."""
    settings: dict[str, Any] = {"raw": True, "strength_offset": 1.0, "layout": layout}

    def forward() -> list[Any]:
        return [step_forward(vector, tuple(state), num_reads=reads, **settings) for vector, state, _ in steps]

    results = forward()

    def backward() -> list[Any]:
        return [
            step_backward(
                vector,
                tuple(state),
                memory=result.memory,
                usage=result.usage,
                read_weights=result.read_weights,
                write_weights=result.write_weights,
                kept=result.kept,
                free_list=result.free_list,
                gradients=tuple(gradients),
                stop_usage_gradient=False,
                **settings,
            )
            for (vector, state, gradients), result in zip(steps, results, strict=True)
        ]

    return forward, backward


def worst_error(vector: Tensor, state: MemoryState, gradients: list[Tensor], reads: int, layout: Layout) -> float:
    """How far the kernels are from the float64 oracle: largest error over largest number, of a result or gradient."""
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
    """The reference forward, or forward and backward."""
    inputs = [tensor.detach().requires_grad_(backward) for tensor in (vector, *state)]

    def call() -> Any:
        with torch.set_grad_enabled(backward):
            read_words, new_state = step(inputs[0], MemoryState(*inputs[1:]), reads)
        return torch.autograd.grad([read_words, *new_state], inputs, gradients) if backward else read_words

    return call


def graph_time(call: Callable[[], Any]) -> float:
    """Median µs of a call's kernels, as replayed in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return call_time(graph.replay)


def call_time(call: Callable[[], Any]) -> float:
    """Median µs of a call as the device sees it, launches included where they are what takes the time."""
    for _ in range(5):
        call()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = [
        "| B, N, W, R | who | error | forward µs | backward µs | floor µs, forward and backward |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        forward, backward = ("not measured" if us is None else f"{us:.1f}" for us in (row.forward_us, row.backward_us))
        sizes = f"{row.batch}, {row.memory_size}, {row.word_size}, {row.num_reads}"
        error = "" if row.error is None else f"{row.error:.0e}"
        floors = f"{row.forward_floor_us:.2f}, {row.backward_floor_us:.2f}"
        lines.append(f"| {sizes} | {row.who} | {error} | {forward} | {backward} | {floors} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
