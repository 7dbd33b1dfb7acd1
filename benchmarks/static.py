"""What the compiler makes of each kernel, for GPUs that nobody here need have: `python -m benchmarks.static`.

Triton compiles for a named target with no GPU present. That shows, per kernel, shape and target, the registers of a
thread, the bytes it spills, the shared memory of a block and the number of instructions, and it shows a type error that
the interpreter lets pass. On the way the intermediate code is searched for missing barriers (`benchmarks.barriers`).

The numbers of each Triton version are kept in `results/static.json`, and a number that grew is an error until that file
is written anew with --update. The same version of Triton gives the same numbers on every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from benchmarks import barriers
from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.buffers import ENDED, FRESH, LOST
from dnc_triton.kernels.launch import Launch, compile_options, launches
from dnc_triton.kernels.layout import Layout, default_layout, layouts, sequence_layouts
from dnc_triton.kernels.lstm import BLOCK, lstm_backward_kernel, lstm_forward_kernel
from dnc_triton.kernels.products import (
    LSTM_BACKWARD,
    LSTM_FORWARD,
    PRODUCT,
    Tiles,
    block_of,
    lstm_product_backward_kernel,
    lstm_product_forward_kernel,
    product_kernel,
)
from dnc_triton.kernels.sequence import Controller, sequence_backward_kernel, sequence_forward_kernel
from dnc_triton.kernels.sizes import TRITON_DTYPES, Sizes
from dnc_triton.kernels.step import FIRST, LAST, MIDDLE, WHOLE, step_backward_kernel, step_forward_kernel

Item = TypeVar("Item")
Result = TypeVar("Result")

RECORD = Path(__file__).parent / "results" / "static.json"
SHAPES = [(16, 16, 1), (16, 16, 4), (64, 32, 4), (128, 64, 4), (192, 64, 4), (256, 64, 4), (512, 64, 8)]  # N, W, R
LARGEST = (1024, 256, 16)
LONGEST = (2048, 32, 4)
SEQUENCES = [  # N, W, R, H
    (16, 16, 1, 32), (16, 16, 4, 64), (64, 32, 4, 64), (128, 32, 4, 128),
    (16, 16, 4, 128), (64, 32, 4, 128), (128, 64, 4, 128),
]  # fmt: skip
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a block may have. A kernel that wants more compiles, and fails when it is launched.
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
DIRECTIONS = ("forward", "backward")
LSTM = Layout(fused=False, rows=0, columns=0, num_warps=4)  # of which it takes the warps
SMALL = LSTM._replace(num_warps=PRODUCT.num_warps)
PRODUCTS = [
    (16, 4, 64),
    (64, 4, 256),
    (32, 4, 100),
    (16, 1, 101),
]  # W, R, H: with whole vectors in all rows and without
CONTROLLER = ("lstm", "lstm product", "product")  # phases that know no memory
PHASES = {"first": FIRST, "middle": MIDDLE, "last": LAST, "whole": WHOLE}
# Of what takes them: each step meets the one before and the one after, and of two blocks one is full, one is not. The
# row that runs to the end is reset before its first and its last step, the other one at both of its steps. Where a step
# is marked one row is reset at it and at the next, the other has ended.
ARGUMENTS = {
    "batch": 2,
    "steps": 3,
    "size": 300,
    "lengths_ptr": [3, 2],
    "reset_ptr": [1, 1, 0, 1, 1, 0],
    "marks_ptr": [FRESH.value | LOST.value, ENDED.value],
}
# Of the kernel that makes links again: from two steps back.
BEHIND = {"behind": 2, "row": 12, "precedence_ptr": 192, "write_weights_ptr": 96}
# Those that are not floating point.
POINTERS = {"free_list_ptr": "*i32", "lengths_ptr": "*i32", "reset_ptr": "*u8", "marks_ptr": "*u8"}
WEIGHTS = ("recurrent_ptr", "interface_weight_ptr", "recurrent_t_ptr", "interface_weight_t_ptr")
# What kernels are compiled as beside the plain ones: a step whose interface is activated already, one with rows that
# have ended or are reset; and sequences with such rows, without a clip, with weights in bfloat16.
STEP_VARIANTS = ("", "activated", "marked")
SEQUENCE_VARIANTS = ("", "lengths reset", "lengths", "reset", "unclipped", "autocast")
TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched, and what for."""

    direction: str
    phase: str
    shape: tuple[int, int, int]
    layout: Layout
    dtype: str
    target: str
    hidden_size: int = 0  # of the controller, where it is in the kernel
    variant: str = ""  # one of STEP_VARIANTS or SEQUENCE_VARIANTS

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) + (f"h{self.hidden_size}" if self.hidden_size else "")
        if self.phase in CONTROLLER:
            reads = "" if self.phase == "lstm" else "{1}x{2}".format(*self.shape)
            return f"{self.direction} {self.phase} {reads}h{self.hidden_size} {self.dtype} {self.target}"
        layout = f"{self.layout.rows}x{self.layout.columns}/{self.layout.num_warps}"
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.direction} {self.phase} {shape} {layout} {self.dtype} {self.target}{variant}"

    @property
    def launch(self) -> Launch:
        """As it is launched for two batch elements; not of the controller."""
        options = dict(raw=self.variant != "activated", compute=self.compute)
        if self.phase == "sequence":
            num_warps = self.layout.num_warps
            return Launch(WHOLE.value, (2,), num_warps, Sizes.of(*self.shape, self.layout, num_warps, **options))
        found = launches(2, *self.shape, self.layout, backward=self.direction == "backward", **options)
        return next(launch for launch in found if launch.phase == PHASES[self.phase].value)

    @property
    def compute(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def grid(self) -> tuple[int, ...]:
        """Of two batch elements."""
        if self.phase in CONTROLLER[1:]:
            return (triton.cdiv(self.hidden_size, _tiles(self).rows), 1)
        return (2,) if self.phase == "lstm" else self.launch.grid

    @property
    def may_spill(self) -> bool:
        """Held to spill nothing, on the target that they were chosen for, is every layout that may be taken.

        Not in float64, which is there to check gradients with: what fits in registers in float32 needs twice as many.
        """
        return self.phase not in CONTROLLER and (
            self.target != "sm_90" or self.dtype == "float64" or self.shape in (LARGEST, LONGEST)
        )


@dataclass(frozen=True)
class Numbers:
    """What a kernel takes."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    instructions: int


@dataclass(frozen=True)
class Measurement:
    """What became of a case."""

    case: Case
    numbers: Numbers | None  # None if it does not compile
    errors: list[str]  # of compiling it, and races
    barriers: dict[str, bool]  # by place in the source, whether the kernel would be wrong without it

    def problems(self) -> list[str]:
        """What must not be, in words."""
        return [f"{self.case}: {problem}" for problem in self.errors + self._excesses()]

    def _excesses(self) -> list[str]:
        found: list[str] = []
        if self.numbers is None:
            return found
        if self.numbers.spilled and not self.case.may_spill:
            found.append(f"spills {self.numbers.spilled} bytes")
        if self.numbers.shared > (limit := SHARED_LIMITS[self.case.target]):
            found.append(f"wants {self.numbers.shared:,} bytes of shared memory, there are {limit:,}")
        return found


# --- which ------------------------------------------------------------------------------------------------------------


def cases(complete: bool = False) -> list[Case]:
    """What to compile: every shape for every target, one shape at least of every dtype and variant, or everything.

    Everything is what may be taken on sm_90: all layouts that are measured against each other, in every dtype and
    variant.
    """
    found = []
    for shape in SHAPES:
        for target in TARGETS:
            found += _step(shape, target)
    # More threads than entries: several hold the same one, and what is stored by one was loaded by others.
    found += _step(SHAPES[0], "gfx942", layout=Layout(fused=True, rows=16, columns=16, num_warps=8))
    for dtype in TRITON_TYPES:
        found += _step(SHAPES[0], "sm_90", dtype=dtype)
    for variant in STEP_VARIANTS[1:]:
        found += _step(SHAPES[1], "sm_90", variant=variant)
    *shape, hidden_size = SEQUENCES[0]  # the one that takes the least time
    for target in TARGETS:
        found += _sequence(tuple(shape), hidden_size, target)
    found += _sequence(tuple(shape), hidden_size, "sm_90", variant="lengths reset")
    found += _lstm("sm_90")
    for shape in PRODUCTS:
        found += _small_products(shape, "sm_90")
    return list(dict.fromkeys(found + _everything() if complete else found))


def _everything() -> list[Case]:
    found = []
    for shape, dtype, variant in itertools.product(SHAPES, TRITON_TYPES, STEP_VARIANTS):
        candidates = layouts(*shape[:2])
        if variant == "marked" and dtype != "float32":
            continue
        for layout in candidates[:1] if dtype == "float64" else candidates:
            found += _step(shape, "sm_90", layout=layout, dtype=dtype, variant=variant)
    for dtype in TRITON_TYPES:
        for target in TARGETS:
            found += _step(LARGEST, target, dtype=dtype)
    for layout in layouts(*LONGEST[:2]):
        found += _step(LONGEST, "sm_90", layout=layout)
    for target in TARGETS:
        found += _step(LONGEST, target)
    for *shape, hidden_size in SEQUENCES:
        for layout, variant in itertools.product(sequence_layouts(*shape[:2]), SEQUENCE_VARIANTS):
            found += _sequence(tuple(shape), hidden_size, "sm_90", layout=layout, variant=variant)
            found += _step(tuple(shape), "sm_90", layout=layout._replace(whole=False))  # with checkpoints
        for target in TARGETS:
            found += _sequence(tuple(shape), hidden_size, target)
        found += _sequence(tuple(shape), hidden_size, "sm_90", dtype="float64")
    for target in TARGETS:
        found += _lstm(target)
        for size in PRODUCTS:
            found += _small_products(size, target)
    return found


def _step(
    shape: tuple[int, int, int],
    target: str,
    *,
    layout: Layout | None = None,
    dtype: str = "float32",
    variant: str = "",
) -> list[Case]:
    """Every launch of a step and its backward."""
    layout = layout or default_layout(*shape[:2])
    phases = ("whole",) if layout.fused else ("first", "middle", "last")
    return [
        Case(direction, phase, shape, layout, dtype, target, variant=variant)
        for direction in DIRECTIONS
        for phase in phases
    ]


def _sequence(
    shape: tuple[int, int, int],
    hidden_size: int,
    target: str,
    *,
    layout: Layout | None = None,
    dtype: str = "float32",
    variant: str = "",
) -> list[Case]:
    """Both launches of a whole sequence."""
    layout = layout or sequence_layouts(*shape[:2])[0]
    return [Case(direction, "sequence", shape, layout, dtype, target, hidden_size, variant) for direction in DIRECTIONS]


def _lstm(target: str) -> list[Case]:
    return [Case(direction, "lstm", (1, 1, 1), LSTM, "float32", target, 256) for direction in DIRECTIONS]


def _small_products(sizes: tuple[int, int, int], target: str) -> list[Case]:
    """Every launch of a controller's step at a small batch."""
    word, reads, hidden_size = sizes
    return [
        Case(direction, phase, (1, word, reads), SMALL, "float32", target, hidden_size)
        for direction in DIRECTIONS
        for phase in CONTROLLER[1:]
    ]


# --- one case ---------------------------------------------------------------------------------------------------------


def measure(case: Case) -> Measurement:
    """Compile a case, count what it takes and look for races."""
    try:
        asm, shared = _compile(case)
    except (TritonError, RuntimeError) as error:
        while isinstance(error.__cause__, TritonError):  # from a call to what stands in the called function
            error = error.__cause__
        return Measurement(case, None, [f"does not compile: {error}"], {})
    counts = _count_amd(asm["amdgcn"]) if case.target.startswith("gfx") else _count_nvidia(asm["cubin"])
    numbers, ttgir = Numbers(shared=shared, **counts), asm["ttgir"]
    try:
        # Which barriers are needed does not hang on the target; to find out takes a walk for each of them.
        without = barriers.without_barriers(ttgir) if case.target == "sm_90" else []
        behind = (case.direction, case.phase) == ("backward", "middle")
        arguments = ARGUMENTS | BEHIND if behind else ARGUMENTS
        needed = {place: bool(barriers.races(code, arguments=arguments)) for place, code in without}
        return Measurement(case, numbers, barriers.races(ttgir, case.grid, arguments), needed)
    except barriers.Unchecked as error:
        return Measurement(case, numbers, [f"barriers cannot be checked: {error}"], {})


def _compile(case: Case) -> tuple[dict[str, Any], int]:
    """The code at each stage of the compilation, and the bytes of shared memory."""
    kernel, constants, num_warps = _kernel(case)
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if not name.endswith("_ptr"):
            signature[name] = "i32"
            continue
        widened = "float64" if case.dtype == "float64" else "float32"
        dtype = TRITON_TYPES[widened if name in ("kept_ptr", "scratch_ptr") else case.dtype]
        if case.variant == "autocast" and name in WEIGHTS:
            dtype = TRITON_TYPES["bfloat16"]
        signature[name] = POINTERS.get(name, f"*{dtype}")
        attributes[(position,)] = [["tt.divisibility", 16]]  # as at a launch: tensors begin at multiples of 16 bytes
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[case.target],
        options=compile_options(
            case.layout,
            num_warps,
            backward=case.direction == "backward",
            hip=case.target.startswith("gfx"),
        ),
    )
    return compiled.asm, compiled.metadata.shared


def _kernel(case: Case) -> tuple[triton.JITFunction, dict[str, Any], int]:
    """The kernel, its constants, and the warps of a program."""
    num_warps, forward = case.layout.num_warps, case.direction == "forward"
    clip, max_gradient = (None, None) if case.variant == "unclipped" else (20.0, 10.0)
    constants: dict[str, Any]
    if case.phase == "sequence":
        sizes, words = case.launch.sizes, case.shape[1] * case.shape[2]
        kernel = sequence_forward_kernel if forward else sequence_backward_kernel
        bounds = dict(clip=clip, max_gradient=None if forward else max_gradient, compute=case.compute)
        controller = Controller.of(case.hidden_size, words, sizes.INTERFACE, case.layout, **bounds)
        absent = {f"{name}_ptr": None for name in ("lengths", "reset") if name not in case.variant}
        return kernel, dict(absent, sizes=sizes, controller=controller), num_warps
    if case.phase not in CONTROLLER:
        kernel, launch = step_forward_kernel if forward else step_backward_kernel, case.launch
        constants = {} if case.variant == "marked" else dict(marks_ptr=None, zeros_ptr=None)
        return kernel, dict(constants, PHASE=launch.phase, sizes=launch.sizes), launch.num_warps
    if case.phase == "lstm":
        kernel = lstm_forward_kernel if forward else lstm_backward_kernel
        constants = dict(H=case.hidden_size, BLOCK=BLOCK)
    else:
        kernel, constants = _small_product(case)
    if case.phase != "product":
        constants |= dict(COMPUTE=TRITON_DTYPES[case.compute], CLIP=clip)
        constants |= {} if forward else dict(MAX_GRADIENT=max_gradient)
    return kernel, constants, num_warps


def _tiles(case: Case) -> Tiles:
    """Of a product at a small batch."""
    return PRODUCT if case.phase == "product" else {"forward": LSTM_FORWARD, "backward": LSTM_BACKWARD}[case.direction]


def _small_product(case: Case) -> tuple[triton.JITFunction, dict[str, Any]]:
    """The kernel, and all of its constants but those of its arithmetic."""
    _, word, reads = case.shape
    below, size, tiles = word * reads, case.hidden_size, _tiles(case)
    vector = sum(interface_sizes(reads, 1, word).values())
    constants: dict[str, Any]
    if case.phase == "lstm product" and case.direction == "forward":
        kernel, constants, longest = lstm_product_forward_kernel, dict(BELOW=below, H=size), max(below, size)
    elif case.phase == "lstm product":
        kernel, constants, longest = lstm_product_backward_kernel, dict(K=vector, H=size), vector
    elif case.direction == "forward":  # the interface vector
        absent = dict(addend_ptr=None, second_out_ptr=None)
        kernel, constants, longest = product_kernel, dict(K=size, OUT=vector, SECOND_OUT=0, ADD=True, **absent), size
    else:
        wide = dict(K=4 * size, OUT=below, SECOND_OUT=size, ADD=False, bias_ptr=None)
        kernel, constants, longest = product_kernel, wide, 4 * size
    block = block_of(longest, tiles.block, itemsize=4)
    return kernel, dict(constants, ROWS=tiles.rows, BLOCK=block, BATCH=tiles.batch, AT_ONCE=tiles.at_once)


def _count_nvidia(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(cuobjdump), "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spilled": _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        "instructions": _count_instructions(cubin),
    }


def _count_instructions(cubin: bytes) -> int:
    """Instructions in the executable sections of an ELF file, no-operations aside, which fill them up.

    An instruction has 16 bytes, its operation in the low 12 bits. nvdisasm counts the same, and takes half a second.
    """
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    total = 0
    for header in range(headers, headers + count * size, size):
        flags, _, start, length = struct.unpack_from("<QQQQ", cubin, header + 8)
        if flags & 4:  # executable
            operations = np.frombuffer(cubin, "<u2", length // 2, start)[::8] & 0xFFF
            total += int((operations != 0x918).sum())
    return total


def _count_amd(listing: str) -> dict[str, int]:
    return {
        "registers": _number(r"^\s+\.vgpr_count:\s+(\d+)", listing),
        "spilled": _number(r"^\s+\.private_segment_fixed_size:\s+(\d+)", listing),
        "instructions": len(re.findall(r"^\t[a-z]\w+(?!\w*:)", listing, re.M)),
    }


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text, re.M)
    if not match:
        raise ValueError(f"nothing matches {pattern!r} in {text[:500]!r}")
    return int(match[1])


# --- all of them ------------------------------------------------------------------------------------------------------


def compiling_map(function: Callable[[Item], Result], items: Iterable[Item], *, jobs: int = 2) -> Generator[Result]:
    """Map a function over items, in order, in processes where kernels compile.

    They do not in one that came up with TRITON_INTERPRET=1, as that of the tests does.
    """
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(function, items)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def idle_barriers(measurements: Iterable[Measurement]) -> list[str]:
    """Barriers that no kernel would be wrong without."""
    needed: dict[str, bool] = {}
    for measurement in measurements:
        for place, is_needed in measurement.barriers.items():
            needed[place] = needed.get(place, False) or is_needed
    return sorted(place for place, is_needed in needed.items() if not is_needed)


# --- the record -------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Numbers]:
    """The numbers committed for this version of Triton, by case; empty for a version that has none."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {case: Numbers(**numbers) for case, numbers in recorded.get(triton.__version__, {}).items()}


def update_record(measurements: Iterable[Measurement], path: Path) -> None:
    """Record these numbers for this version of Triton; drop those of cases that are no more."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {str(measured.case): asdict(measured.numbers) for measured in measurements if measured.numbers}
    before = recorded.get(triton.__version__, {})
    numbers = {name: now.get(name, before.get(name)) for name in map(str, cases(complete=True))}
    recorded[triton.__version__] = {name: entry for name, entry in numbers.items() if entry}
    versions = []
    for version, numbers in sorted(recorded.items()):
        lines = [f"    {json.dumps(case)}: {json.dumps(entry)}" for case, entry in numbers.items()]
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n", encoding="utf-8")


def worse_than_recorded(measurements: Iterable[Measurement], record: dict[str, Numbers]) -> list[str]:
    """Numbers that grew, and cases that were never recorded."""
    found = []
    for measurement in measurements:
        if measurement.numbers is None:  # a problem of its own
            continue
        before = record.get(str(measurement.case))
        if before is None:
            found.append(f"{measurement.case}: not recorded")
            continue
        for name, number in asdict(measurement.numbers).items():
            if number > (was := getattr(before, name)):
                found.append(f"{measurement.case}: {name} {was} -> {number}")
    return found


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 1 if something is wrong, or worse than recorded."""
    options = _parser().parse_args(arguments)
    selected = [case for case in cases(options.complete) if options.select in str(case)]
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
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once (default: %(default)s)")
    parser.add_argument(
        "--update", action="store_true", help=f"record the numbers in {RECORD.name}, as those of this Triton version"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
