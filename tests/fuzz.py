"""Random small problems through the kernels against the oracle: `python -m tests.fuzz --count 1000000 --processes 2`.

A problem is one row: a step of the memory and its gradients, for one batch element. Rows of a batch are independent of
each other (tests/kernels/test_kernel_rows.py), so a batch of rows of one size is that many problems, and is computed at
once. Many rows are extreme: gates that are exactly 0 or 1, usages that are equal, or 0, or 1, keys, words and states of
zeros, saturated activations, large strengths.

float64 settles the formulas, to some ulps times the condition of a row; float32 the rest, by the tolerance rule of
tests/kernels/parity.py. The first row that is off ends the run, with the command that computes it again.

The kernels run on a GPU if there is one, else in tests/kernels/batched.py, which computes a batch of rows at once;
`--engine interpreter` takes Triton's own interpreter, a row at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

ENGINES = ("gpu", "batched", "interpreter")

if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "kernels")]

# ruff: noqa: E402
from batched import batched_interpreter
from parity import Outcome, Problem, activated, outcome, run_kernels, run_reference, slot_order_is_safe
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dnc_reference import Interface, MemoryState, addressing
from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.layout import Layout

# --- what is drawn ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What all rows of a batch share.

    Attributes:
        slots, word, reads: N, W, R.
        dtype: float64 or float32.
        layout: how the kernels cut it up.
        raw: the interface is not activated yet.
        strength, stop_usage_gradient: as in `run_kernels`.
    """

    slots: int
    word: int
    reads: int
    dtype: torch.dtype
    layout: Layout
    raw: bool
    strength: str
    stop_usage_gradient: bool


def draw_batch(seed: int, index: int, rows: int) -> tuple[Batch, Problem]:
    """The batch of that number: the same for the same seed and number of rows."""
    choose = random.Random(f"{seed}/{index}").choice
    batch = Batch(
        # Now and then more slots than one block of rows has.
        slots=choose([1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 12, 16, 17, 18, 20, 33]),
        word=choose([1, 2, 3, 4, 5, 17]),
        reads=choose([1, 1, 2, 2, 3, 4]),
        dtype=choose([torch.float64, torch.float32]),
        layout=choose(
            [
                Layout(True, choose([16, 16, 32]), choose([16, 32]), 4, backward_rows=choose([0, 0, 32])),
                Layout(False, choose([16, 16, 32]), choose([16, 32]), 4, backward_rows=choose([0, 0, 32])),
                Layout(False, choose([16, 32]), choose([16, 32]), 4, spread=choose([True, False]), ranks=True),
                Layout(False, choose([16, 32]), choose([16, 32]), 4, spread=True),
            ]
        ),
        raw=choose([True, False]),
        strength=choose(["oneplus", "softplus"]),
        stop_usage_gradient=choose([False, False, True]),
    )
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{index}/numbers").getrandbits(63))
    drawn: list[Problem] = []
    missing = rows
    while missing > 0:
        problem = Rows(batch, rows, generator).draw()
        # Where rounding decides the order of slots nothing can be compared.
        safe = slot_order_is_safe(problem, batch.dtype).nonzero().squeeze(1)[:missing]
        drawn.append(tree_map(lambda x, safe=safe: x[safe], problem))
        missing -= len(safe)
    return batch, tree_map(lambda *parts: torch.cat(parts), *drawn)


class Rows:
    """Draws rows. Every [B, ...] that is drawn is extreme in some rows, in ways of its own."""

    def __init__(self, batch: Batch, rows: int, generator: torch.Generator) -> None:
        self.batch, self.rows, self.generator = batch, rows, generator

    def draw(self) -> Problem:
        slots, word, reads = self.batch[:3]
        usage, read_weights, write_weights = self.equal_slots(
            self.unit(slots), self.weights(reads, slots), self.weights(1, slots)
        )
        state = MemoryState(
            memory=self.words(slots, word),
            usage=usage,
            link=self.weights(1, slots, slots),
            precedence=self.weights(1, slots),
            read_weights=read_weights,
            write_weights=write_weights,
        )
        fresh = self.some(0.05)
        state = tree_map(lambda x: self.where(fresh, torch.zeros_like(x), x), state)
        inputs = self.vector() if self.batch.raw else self.interface(state.memory)
        sent_back = [self.normal(reads, word), *(self.normal(*x.shape[1:]) for x in state)]
        sent_back = [self.where(self.some(0.2), torch.zeros_like(x), x) for x in sent_back]
        problem = Problem(inputs, state, (sent_back[0], MemoryState(*sent_back[1:])))
        return tree_map(lambda x: x.to(self.batch.dtype), problem)

    def interface(self, memory: Tensor) -> Interface:
        _, word, reads = self.batch[:3]
        row = torch.randint(memory.shape[1], (self.rows, 1, 1), generator=self.generator)
        read_keys = self.words(reads, word)
        key_of_a_slot = memory.gather(1, row.expand(-1, 1, word))
        modes = self.normal(reads, 3)
        largest = (modes == modes.amax(-1, keepdim=True)).double()
        return Interface(
            read_keys=read_keys,
            read_strengths=self.strengths(reads),
            write_keys=self.where(self.some(0.2), key_of_a_slot, self.words(1, word)),
            write_strengths=self.strengths(1),
            erase_vectors=self.unit(1, word),
            write_vectors=self.words(1, word),
            free_gates=self.unit(reads),
            allocation_gates=self.unit(1),
            write_gates=self.unit(1),
            read_modes=self.where(self.some(0.3), largest, modes.softmax(-1)),
        )

    def vector(self) -> Tensor:
        _, word, reads = self.batch[:3]
        sizes = interface_sizes(reads, 1, word)
        vector = 2 * self.normal(sum(sizes.values()))
        fields = dict(zip(sizes, vector.split(list(sizes.values()), -1), strict=True))
        for name in ("read_keys", "write_keys", "write_vectors"):
            fields[name] = self.words(sizes[name])
        for name in ("read_strengths", "write_strengths"):
            fields[name] = self.where(self.some(0.2), 15 * fields[name], fields[name])
        for name in ("erase_vectors", "free_gates", "allocation_gates", "write_gates", "read_modes"):
            for factor in (20.0, 1000.0):  # all but saturated, and saturated
                fields[name] = self.where(self.some(0.15), factor * fields[name], fields[name])
        return torch.cat(list(fields.values()), -1)

    def words(self, *shape: int) -> Tensor:
        """Any value; in some rows tiny or large, with some zero words or nothing else."""
        values = self.normal(*shape)
        for scale in (1e-3, 30.0):
            values = self.where(self.some(0.07), scale * values, values)
        values = self.where(self.some(0.15), values * (self.uniform(*shape[:-1], 1) < 0.5), values)
        return self.where(self.some(0.07), torch.zeros_like(values), values)

    def unit(self, *shape: int) -> Tensor:
        """Between 0 and 1; in some rows all of them one or the other."""
        values = self.uniform(*shape)
        values = self.where(self.some(0.3), values.round(), values)
        return self.where(self.some(0.1), values.round().flatten(1)[:, :1].view(-1, *[1] * len(shape)), values)

    def strengths(self, *shape: int) -> Tensor:
        values = 1 - 2 * self.uniform(*shape).log()
        values = self.where(self.some(0.1), 30 * values, values)
        return self.where(self.some(0.1), torch.zeros_like(values), values)

    def weights(self, *shape: int) -> Tensor:
        """Along the last axis not negative, with a sum of at most 1; in some rows all at one place, or none."""
        logits = 2 * self.normal(*shape)
        weights = logits.softmax(-1) * self.uniform(*shape[:-1], 1)
        largest = (logits == logits.amax(-1, keepdim=True)).double()
        weights = self.where(self.some(0.2), largest, weights)
        return self.where(self.some(0.1), torch.zeros_like(weights), weights)

    def equal_slots(self, *tensors: Tensor) -> list[Tensor]:
        """In some rows, some slots are like other ones: they will be equally used, in any precision."""
        slots = tensors[0].shape[-1]
        others = torch.randint(slots, (self.rows, slots), generator=self.generator)
        changed = self.some(0.3).unsqueeze(1) & (self.uniform(slots) < 0.5)
        source = torch.where(changed, others, torch.arange(slots))
        return [x.gather(-1, source.view(self.rows, *[1] * (x.dim() - 2), slots).expand_as(x)) for x in tensors]

    def some(self, share: float) -> Tensor:
        """[B], True in that share of the rows."""
        return self.uniform() < share

    def where(self, rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (no.dim() - 1)), yes, no)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.rows, *shape, generator=self.generator, dtype=torch.float64)


# --- what is compared -------------------------------------------------------------------------------------------------

# Twice the reference's error in the same dtype, as everywhere, and a floor for rows in which that is small by luck: so
# many ulps, at the largest magnitude that goes into a sum.
FACTOR, FLOOR_ULPS = 2, 16


class Mismatch(NamedTuple):
    """The first row that is off, and the worst of its numbers."""

    row: int
    text: str


def compare(batch: Batch, problem: Problem, actual: Outcome) -> Mismatch | None:
    """Hold each row against the oracle by itself."""
    options = dict(strength=batch.strength, stop_usage_gradient=batch.stop_usage_gradient)
    exact = outcome(run_reference, tree_map(torch.Tensor.double, problem), **options)
    same_dtype = exact if batch.dtype == torch.float64 else outcome(run_reference, problem, **options)
    lookup, gradient = _condition(batch, problem, exact)
    complaints: list[tuple[int, float, str]] = []
    for expected, ours, theirs in zip(exact, actual, same_dtype, strict=True):
        condition = lookup if expected is exact.forward else lookup * gradient
        for name, want in expected.items():
            flat, got = want.flatten(1), ours[name].detach().cpu().double().flatten(1)
            if got.shape != flat.shape:
                return Mismatch(0, f"{name}: expected shape {list(want.shape)}, got {list(ours[name].shape)}")
            error = (got - flat).abs().nan_to_num(nan=torch.inf)
            floor = FLOOR_ULPS * torch.finfo(batch.dtype).eps * condition * flat.abs().amax(1).clamp(min=1)
            as_large = (theirs[name].double().flatten(1) - flat).abs().amax(1)
            limit = floor + FACTOR * as_large.nan_to_num(nan=0.0, posinf=0.0)  # where that is lost, it allows nothing
            worst, place = error.max(1)
            for row in (worst > limit).nonzero().flatten().tolist()[:1]:
                index = [int(x) for x in torch.unravel_index(place[row], want.shape[1:])]
                text = (
                    f"{name}{index}: got {got[row, place[row]]:.17g}, expected {flat[row, place[row]]:.17g}, "
                    f"off by {worst[row]:.3g} of at most {limit[row]:.3g}"
                )
                complaints.append((row, (worst / limit)[row].item(), text))
    if not complaints:
        return None
    row = min(complaint[0] for complaint in complaints)
    return Mismatch(row, "\n".join(text for at, _, text in sorted(complaints, key=lambda x: -x[1]) if at == row))


def _condition(batch: Batch, problem: Problem, exact: Outcome) -> tuple[Tensor, Tensor]:
    """[B] each: by how much a lookup magnifies a rounding, and by how much more its gradient does."""
    interface, state = activated(tree_map(torch.Tensor.double, problem), batch.strength)
    strengths = torch.cat([interface.read_strengths, interface.write_strengths], 1).amax(1)
    # A word may come out far smaller than what it is made from: a rounding of the write weights, times what is written.
    made_from = state.memory.abs().amax(2) + interface.write_gates * interface.write_vectors.abs().amax(2)
    new_norms = addressing.norm(exact.forward["memory"])
    lookup = 1 + strengths * (made_from / new_norms).amax(1).clamp(min=1)
    # The gradient of a similarity is divided by the words' norms, that of a weight is a sum of products with words.
    others = torch.cat([interface.read_keys, interface.write_keys, interface.write_vectors, state.memory], 1)
    norms = torch.cat([addressing.norm(others), new_norms], 1)
    return lookup, lookup * norms.amax(1).clamp(min=1) / norms.amin(1).clamp(max=1)


# --- the run ----------------------------------------------------------------------------------------------------------


def check_batch(index: int, *, seed: int, rows: int, engine: str, row: int | None = None) -> tuple[int, str]:
    """Compute a batch, or one row of it. Returns how many problems these were, and what is wrong, or nothing."""
    torch.set_num_threads(1)
    batch, problem = draw_batch(seed, index, rows)
    first = 0
    if row is not None:
        first, problem = row, tree_map(lambda x: x[row : row + 1], problem)
    given = tree_map(lambda x: x.to("cuda" if engine == "gpu" else "cpu"), problem)
    options = dict(strength=batch.strength, stop_usage_gradient=batch.stop_usage_gradient)
    try:
        with batched_interpreter() if engine == "batched" else nullcontext():
            actual = outcome(run_kernels, given, layout=batch.layout, **options)
        mismatch = compare(batch, problem, actual)
    except Exception as error:  # whatever it is, the reader will want to reproduce it
        mismatch = Mismatch(0, f"{type(error).__name__}: {error}")
    count = tree_leaves(problem)[0].shape[0]
    if mismatch is None:
        return count, ""
    place = f"--seed {seed} --rows {rows} --batch {index} --row {first + mismatch.row}"
    return count, f"{mismatch.text}\n{batch}\nagain: python -m tests.fuzz {place} --engine {engine}"


def run(
    count: int,
    *,
    seed: int = 0,
    processes: int = 1,
    engine: str | None = None,
    rows: int | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Check that many problems. Returns how many were checked, all of them right.

    Raises:
        AssertionError: one is wrong.
    """
    engine = engine or ("gpu" if torch.cuda.is_available() else "batched")
    # On a GPU each batch may be compiled for; in the interpreter each row takes a tenth of a second.
    rows = rows or min(count, {"gpu": 1024, "batched": 512, "interpreter": 4}[engine])
    check = partial(check_batch, seed=seed, rows=rows, engine=engine)
    batches = range(-(-count // rows))
    done, started, told = 0, time.monotonic(), time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else nullcontext() as pool:
        for computed, complaint in map(check, batches) if pool is None else pool.imap(check, batches):
            if complaint:
                raise AssertionError(f"after {done:,} problems that are right:\n{complaint}")
            done += computed
            if time.monotonic() - told > 5:
                told = time.monotonic()
                report(f"{done:,} of {count:,} problems, {done / (told - started):,.0f} a second")
    report(f"{done:,} problems, {engine}, seed {seed}: all right, in {time.monotonic() - started:.1f} s")
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Random problems through the kernels.")
    parser.add_argument("--count", type=int, default=1000, help="problems; rounded up to whole batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--engine", choices=ENGINES, help="where the kernels run")
    parser.add_argument("--rows", type=int, help="problems in a batch; other problems are drawn for another number")
    parser.add_argument("--batch", type=int, help="compute this batch alone")
    parser.add_argument("--row", type=int, help="of --batch, this row alone")
    options = parser.parse_args(arguments)
    try:
        if options.batch is None:
            run(
                options.count,
                seed=options.seed,
                processes=options.processes,
                engine=options.engine,
                rows=options.rows,
                report=partial(print, flush=True),
            )
            return 0
        engine = options.engine or ("gpu" if torch.cuda.is_available() else "batched")
        count, complaint = check_batch(
            options.batch, seed=options.seed, rows=options.rows, engine=engine, row=options.row
        )
        print(complaint or f"{count:,} problems: all right")
        return 1 if complaint else 0
    except AssertionError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
