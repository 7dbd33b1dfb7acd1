"""What kernels are compiled for: shapes, targets, dtypes and variants, and combinations of these."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget

from dnc_reference.interface import interface_sizes
from dnc_triton.kernels.gradients import NUM_WARPS, tiles_of_products
from dnc_triton.kernels.layout import Layout, layouts, sequence_layouts
from dnc_triton.kernels.products import LSTM_BACKWARD, LSTM_FORWARD, PRODUCT, Tiles
from dnc_triton.kernels.sizes import Sizes
from dnc_triton.kernels.step import FIRST, LAST, MIDDLE, RANK, WHOLE
from dnc_triton.kernels.step_launch import Launch, launches

SHAPES = [(16, 16, 1), (16, 16, 4), (64, 32, 4), (128, 64, 4), (192, 64, 4), (256, 64, 4), (512, 64, 8)]  # N, W, R
LARGEST = (1024, 256, 16)
LONGEST = (2048, 32, 4)
MOST_HEADS = (2048, 32, 16)
SEQUENCES = [  # N, W, R, H
    (16, 16, 1, 32), (16, 16, 4, 64), (64, 32, 4, 64), (128, 32, 4, 128),
    (16, 16, 4, 128), (64, 32, 4, 128), (128, 64, 4, 128),
]  # fmt: skip
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
WORKSTATIONS = ("sm_89", "sm_120", "gfx1100")  # GeForce RTX 40 and 50, Radeon RX 7900; the others are of data centres
DATA_CENTERS = tuple(target for target in TARGETS if target not in WORKSTATIONS)
FEATURES = 8  # size of inputs and outputs, where the kernel depends on it
DIRECTIONS = ("forward", "backward")
LSTM = Layout(fused=False, rows=0, columns=0, num_warps=4, overlaps=True)  # only the warps and `overlaps` count
SMALL = LSTM._replace(num_warps=PRODUCT.num_warps)
PRODUCTS = [
    (16, 4, 64),
    (64, 4, 256),
    (32, 4, 100),
    (16, 1, 101),
]  # W, R, H: with rows that are whole vectors, and others
PRODUCTS_OF_A_STEP = ("lstm product", "product")
CONTROLLER = ("lstm", *PRODUCTS_OF_A_STEP, "weights")  # phases that know no memory
PHASES = {"rank": RANK, "first": FIRST, "middle": MIDDLE, "last": LAST, "whole": WHOLE}
# Variants of kernels besides the plain ones: a step whose interface is already activated, a step with rows that have
# ended or are reset; and sequences with such rows, without a clip, with weights in bfloat16.
STEP_VARIANTS = ("", "activated", "marked")
SEQUENCE_VARIANTS = ("", "lengths reset", "lengths", "reset", "unclipped", "autocast")
# What is spilled where nothing should be, in bytes of a thread, by version of Triton. So few are accepted.
ACCEPTED_SPILLS = {
    "3.6": {
        "backward sequence 128x32x4h128 32x128/8 float32 sm_90 lengths": 8,
        "backward sequence 128x32x4h128 32x128/8 float32 sm_90 reset": 8,
        "backward sequence 128x64x4h128 32x128/8 float32 sm_90": 8,
        "backward sequence 128x64x4h128 32x128/8 float32 sm_90 lengths": 8,
        "backward sequence 128x64x4h128 32x128/8 float32 sm_90 unclipped": 8,
        "backward last 256x64x4 8x128/1 bfloat16 sm_90 activated": 8,
        "backward last 512x64x8 32x128/1 float16 sm_90 activated": 8,
        "backward last 512x64x8 64x128/1 float16 sm_90 activated": 8,
    },
    # Although registers are left: the assembler makes room for a second program.
    "3.9": {"forward last 512x64x8 32x128/1 float32 sm_90": 16},
}
TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched, and its target."""

    direction: str
    phase: str
    shape: tuple[int, int, int]
    layout: Layout
    dtype: str
    target: str
    hidden_size: int = 0  # of the controller, where the kernel has one
    variant: str = ""  # one of STEP_VARIANTS or SEQUENCE_VARIANTS

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) + (f"h{self.hidden_size}" if self.hidden_size else "")
        if self.phase in CONTROLLER:
            reads = "" if self.phase == "lstm" else "{1}x{2}".format(*self.shape)
            return f"{self.direction} {self.phase} {reads}h{self.hidden_size} {self.dtype} {self.target}"
        layout = f"{self.layout.rows}x{self.layout.columns}/{self.layout.num_warps}"
        layout += " spread" * self.layout.spread + " ranks" * self.layout.ranks
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.direction} {self.phase} {shape} {layout} {self.dtype} {self.target}{variant}"

    @property
    def launch(self) -> Launch:
        """Its launch for two batch elements; not for kernels of the controller."""
        options = dict(raw=self.variant != "activated", compute=self.compute)
        if self.phase == "sequence":
            num_warps = self.layout.num_warps
            return Launch(WHOLE.value, (2,), num_warps, Sizes.of(*self.shape, self.layout, num_warps, **options))
        found = launches(2, *self.shape, self.layout, backward=self.direction == "backward", **options)
        return next(launch for launch in found if launch.phase == PHASES[self.phase].value)

    @property
    def num_warps(self) -> int:
        """The warps of a program."""
        return self.layout.num_warps if self.phase in CONTROLLER else self.launch.num_warps

    @property
    def overlaps(self) -> bool:
        """Whether it begins while the previous launch ends."""
        return self.layout.overlaps and self.target in ("sm_90", "sm_100", "sm_120")

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def interface_size(self) -> int:
        """How many numbers the interface vector has."""
        _, word, reads = self.shape
        return sum(interface_sizes(reads, 1, word).values())

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid for two batch elements."""
        if self.phase == "weights":
            return (weight_tiles(self)[-1],)
        if self.phase in PRODUCTS_OF_A_STEP:
            return (1, triton.cdiv(rows_of(self), tiles_of(self).rows))
        return (2,) if self.phase == "lstm" else self.launch.grid

    @property
    def may_spill(self) -> bool:
        """Every layout that may be taken must spill nothing on the target that it was chosen for, the H200's.

        Exceptions: float64, which serves to check gradients and needs twice the registers of float32, and the largest
        shapes. The controller's kernels, which are small, must spill nothing on any target of a data centre.
        """
        if self.phase in CONTROLLER:
            return self.target in WORKSTATIONS
        return self.target != "sm_90" or self.dtype == "float64" or self.shape in (LARGEST, LONGEST, MOST_HEADS)

    def accepted_spill(self, version: str) -> int:
        """Bytes that may be spilled all the same with a version of Triton."""
        return ACCEPTED_SPILLS.get(version.rpartition(".")[0], {}).get(str(self), 0)


def weight_tiles(case: Case) -> tuple[int, ...]:
    """Tiles of the gradients with respect to all weights, with `FEATURES` inputs and outputs."""
    _, word, reads = case.shape
    features = case.hidden_size + word * reads
    return tiles_of_products(FEATURES, case.hidden_size, features, case.interface_size, FEATURES)


def rows_of(case: Case) -> int:
    """Rows of the weights in a product for a small batch: how many numbers it computes."""
    if case.phase == "lstm product":
        return case.hidden_size
    if case.direction == "forward":
        return case.interface_size
    _, word, reads = case.shape
    return word * reads + case.hidden_size


def tiles_of(case: Case) -> Tiles:
    """Tiles of a product for a small batch."""
    return PRODUCT if case.phase == "product" else {"forward": LSTM_FORWARD, "backward": LSTM_BACKWARD}[case.direction]


def cases(complete: bool = False) -> list[Case]:
    """What to compile: every shape for the targets of data centres, at least one with each of float64, bfloat16 and the
    variants of a step.

    If `complete`, everything: all that may be taken on sm_90, that is, all layouts that are measured, in every dtype
    and variant; and every shape for every target, those of workstations too.
    """
    found = []
    for shape in SHAPES:
        for target in DATA_CENTERS:
            found += step(shape, target)
    found += step(SHAPES[-1], "sm_90", layout=spread(SHAPES[-1]))
    # More threads than entries: several hold the same one, and one stores what the others loaded.
    found += step(SHAPES[0], "gfx942", layout=Layout(fused=True, rows=16, columns=16, num_warps=8))
    for dtype in ("bfloat16", "float64"):  # float16 is loaded and stored as bfloat16 is
        found += step(SHAPES[0], "sm_90", dtype=dtype)
    for variant in STEP_VARIANTS[1:]:
        found += step(SHAPES[1], "sm_90", variant=variant)
    *shape, hidden_size = SEQUENCES[0]  # the one that takes the least time
    for target in ("sm_90", "gfx942"):
        found += sequence(tuple(shape), hidden_size, target)
    found += _lstm("sm_90")
    found += _weights(SEQUENCES[1], "sm_90")
    for shape in PRODUCTS:
        found += _small_products(shape, "sm_90")
    return list(dict.fromkeys(found + _everything() if complete else found))


def _everything() -> list[Case]:
    found = []
    for shape, dtype, variant in itertools.product(SHAPES, TRITON_TYPES, STEP_VARIANTS):
        candidates = layouts(shape[0])
        if variant == "marked" and dtype != "float32":
            continue
        for layout in candidates[:1] if dtype == "float64" else candidates:
            found += step(shape, "sm_90", layout=layout, dtype=dtype, variant=variant)
    found += step(SHAPES[-1], "gfx942", layout=spread(SHAPES[-1]))
    for dtype in TRITON_TYPES:
        for target in DATA_CENTERS:
            found += step(LARGEST, target, dtype=dtype)
            found += step(LARGEST, target, dtype=dtype, layout=spread(LARGEST))
    for layout in layouts(LONGEST[0]):
        found += step(LONGEST, "sm_90", layout=layout)
    for target in TARGETS:
        found += step(LONGEST, target)
    for target in DATA_CENTERS:
        found += step(MOST_HEADS, target, dtype="bfloat16")
    for shape in SHAPES:
        for target in WORKSTATIONS:
            found += step(shape, target)
    for *shape, hidden_size in SEQUENCES:
        for layout, variant in itertools.product(sequence_layouts(*shape[:2]), SEQUENCE_VARIANTS):
            found += sequence(tuple(shape), hidden_size, "sm_90", layout=layout, variant=variant)
        found += step(tuple(shape), "sm_90")  # with checkpoints
        for target in TARGETS:
            found += sequence(tuple(shape), hidden_size, target)
        found += sequence(tuple(shape), hidden_size, "sm_90", dtype="float64")
    for target in TARGETS:
        found += _lstm(target)
        for sequence_sizes in SEQUENCES:
            found += _weights(sequence_sizes, target)
        for size in PRODUCTS:
            found += _small_products(size, target)
    return found


def step(
    shape: tuple[int, int, int],
    target: str,
    *,
    layout: Layout | None = None,
    dtype: str = "float32",
    variant: str = "",
) -> list[Case]:
    """All launches of a step and of its backward."""
    layout = layout or layouts(shape[0], hip=target.startswith("gfx"))[0]
    phases = ("whole",) if layout.fused else ("first", "middle", "last")
    before = ("rank",) if layout.ranks else ()
    return [
        Case(direction, phase, shape, layout_of(layout, direction), dtype, target, variant=variant)
        for direction in DIRECTIONS
        for phase in ((*before, *phases) if direction == "forward" else phases)
    ]


def spread(shape: tuple[int, int, int]) -> Layout:
    """The first layout for a shape whose phases are spread."""
    return next(layout for layout in layouts(shape[0]) if layout.spread)


def layout_of(layout: Layout, direction: str) -> Layout:
    """The layout as used in a direction."""
    return layout.of_backward if direction == "backward" else layout._replace(backward_rows=0)


def sequence(
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
    return [
        Case(direction, "sequence", shape, layout_of(layout, direction), dtype, target, hidden_size, variant)
        for direction in DIRECTIONS
    ]


def _lstm(target: str) -> list[Case]:
    return [Case(direction, "lstm", (1, 1, 1), LSTM, "float32", target, 256) for direction in DIRECTIONS]


def _small_products(sizes: tuple[int, int, int], target: str) -> list[Case]:
    """All launches of a controller's step for a small batch."""
    word, reads, hidden_size = sizes
    return [
        Case(direction, phase, (1, word, reads), SMALL, "float32", target, hidden_size)
        for direction in DIRECTIONS
        for phase in PRODUCTS_OF_A_STEP
    ]


def _weights(sizes: tuple[int, int, int, int], target: str) -> list[Case]:
    """The gradients with respect to all weights of a network whose sequences take one launch."""
    _, word, reads, hidden_size = sizes
    layout = LSTM._replace(num_warps=NUM_WARPS, overlaps=False)
    # The kernel does not depend on the number of slots: memories that differ only in that share it.
    return [Case("backward", "weights", (1, word, reads), layout, "float32", target, hidden_size)]
