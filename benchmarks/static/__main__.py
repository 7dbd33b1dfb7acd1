"""The command line: compile, show what each kernel uses, and compare that with the record."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import astuple

import triton

from benchmarks.static.cases import cases
from benchmarks.static.clocks import estimate
from benchmarks.static.compiling import compiling_map
from benchmarks.static.measuring import idle_barriers, measure
from benchmarks.static.record import RECORD, read_record, update_record, worse_than_recorded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 1 if something is wrong, or worse than recorded."""
    parser = _parser()
    options = parser.parse_args(arguments)
    selected = [case for case in cases(options.complete) if options.select in str(case)]
    if options.clocks:  # for which there are only NVIDIA's tables
        selected = [case for case in selected if case.target.startswith("sm_")]
    if not selected:  # else nothing would be wrong
        parser.error(f"argument --select: no case that is looked at has {options.select!r} in its name")
    if options.clocks:
        print("| kernel | clocks, + for each further time through a loop |\n|---|---|")
        with contextlib.closing(compiling_map(estimate, selected, jobs=options.jobs)) as results:
            for case, clocks in zip(selected, results, strict=True):
                print(f"| {case} | {clocks} |", flush=True)
        return 0
    measurements = []
    print("| kernel | registers | spilled | shared | instructions |\n|---|---|---|---|---|")
    with contextlib.closing(compiling_map(measure, selected, jobs=options.jobs)) as results:
        for measurement in results:
            measurements.append(measurement)
            if measurement.numbers:
                print(f"| {measurement.case} | {' | '.join(map(str, astuple(measurement.numbers)))} |", flush=True)

    problems = [problem for measurement in measurements for problem in measurement.problems()]
    if options.update:
        update_record(measurements, RECORD)
    elif record := read_record(RECORD):
        problems += worse_than_recorded(measurements, record)
    else:
        print(f"Nothing is recorded for Triton {triton.__version__}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    for place in idle_barriers(measurements):
        print(f"No kernel here would be wrong without the barrier at {place}", file=sys.stderr)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static",
        description="Compile the kernels for GPUs that need not be there. Prints, per kernel, shape (N x W x R), "
        "layout (rows x columns / warps), dtype and target, the registers and spilled bytes of a thread, the shared "
        "memory of a block and the number of instructions. Fails on spills where there must be none, too much shared "
        "memory, a missing barrier, or a number above the recorded one.",
    )
    parser.add_argument("--complete", action="store_true", help="every target, dtype and layout; takes minutes")
    parser.add_argument("--select", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--clocks", action="store_true", help="only estimate how long a lone program takes")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once (default: %(default)s)")
    parser.add_argument(
        "--update", action="store_true", help=f"record the numbers in {RECORD.name}, as those of this Triton version"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
