"""The kernels compile for every target, spill nothing, fit, have all their barriers, and take no more than is recorded.

Nothing here needs a GPU. Compilation happens in other processes, since the kernels of this one may be interpreted.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_layer import PROBLEM

pytest.importorskip("triton")

from benchmarks.static import compiling
from benchmarks.static.cases import (
    DATA_CENTERS,
    DIRECTIONS,
    LARGEST,
    SEQUENCES,
    SHAPES,
    WORKSTATIONS,
    cases,
    sequence,
    step,
)
from benchmarks.static.compiling import compiling_map
from benchmarks.static.measuring import idle_barriers, measure
from benchmarks.static.record import RECORD, read_record, worse_than_recorded
from dnc_triton import dispatch
from dnc_triton.kernels.layout import Layout, default_layout, layouts, sequence_layouts
from dnc_triton.kernels.step_launch import compile_options, is_capped, launches

pytestmark = pytest.mark.usefixtures("_compiled_once")
KERNELS = Path(__file__).parent.parent / "dnc_triton" / "kernels"


@pytest.fixture(scope="module")
def measurements():
    return list(compiling_map(measure, cases()))


def check(measurements):
    problems = [problem for measurement in measurements for problem in measurement.problems()]
    if record := read_record(RECORD):
        problems += worse_than_recorded(measurements, record)
        problems += ["If that has to be: python -m benchmarks.static --complete --update"] if problems else []
    assert not problems, "\n".join(problems)
    if not record:
        pytest.skip("nothing is on record for this version of Triton")


def test_kernels_compile_spill_nothing_fit_race_nowhere_and_take_no_more_than_recorded(measurements):
    check(measurements)


def test_the_versions_that_are_tested_are_on_record():
    """Otherwise there is nothing to compare with."""
    pins = [path.read_text() for path in RECORD.parents[2].glob("constraints*.txt")]
    versions = [set(re.findall(r"^triton==([\d.]+)", pin, re.MULTILINE)) for pin in pins]
    assert len(versions) == 3
    assert all(versions)
    assert set.union(*versions) <= json.loads(RECORD.read_text()).keys()


@pytest.mark.parametrize("pins", ["constraints", "constraints-oldest"])
def test_on_record_nothing_spills_that_must_not(pins):
    """Every kernel that may be taken on an H200, not only what the tests compile. The oldest Triton has run there."""
    text = (RECORD.parents[2] / f"{pins}.txt").read_text()
    version = re.search(r"^triton==([\d.]+)", text, re.MULTILINE)[1]
    numbers = json.loads(RECORD.read_text())[version]
    for case in [case for case in cases(complete=True) if case.target == "sm_90" and not case.may_spill]:
        assert numbers[str(case)]["spilled"] == case.accepted_spill(version), case


def test_every_shape_is_compiled_for_every_target():
    """In full, and without a GPU, each time that the tests run; with the slow tests for workstations as well."""
    assert SHAPES == [
        (16, 16, 1), (16, 16, 4), (64, 32, 4), (128, 64, 4), (192, 64, 4), (256, 64, 4), (512, 64, 8)
    ]  # fmt: skip
    assert DATA_CENTERS == ("sm_80", "sm_90", "sm_100", "gfx942")
    assert WORKSTATIONS == ("sm_89", "sm_120", "gfx1100")
    quick, complete = cases(), cases(complete=True)
    assert {case.target for case in quick} == {*DATA_CENTERS}
    for shape in SHAPES:
        for target, compiled in (dict.fromkeys(DATA_CENTERS, quick) | dict.fromkeys(WORKSTATIONS, complete)).items():
            phases = {(case.direction, case.phase) for case in compiled if (case.shape, case.target) == (shape, target)}
            fused = {(direction, "whole") for direction in DIRECTIONS}
            split = {(direction, phase) for direction in DIRECTIONS for phase in ("first", "middle", "last")}
            assert phases >= fused or phases >= split, (shape, target)


@pytest.mark.parametrize("hidden", [0, *sorted({hidden for *_, hidden in SEQUENCES})])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_the_dispatcher_may_take_is_compiled_and_held_to_spill_nothing(dtype, hidden, monkeypatch):
    """On sm_90, every layout of every backend, be it measured or not; in full with the slow tests."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    compiled = set(cases(complete=True))
    shapes = [tuple(shape) for *shape, size in SEQUENCES if size == hidden] if hidden else SHAPES
    for shape in shapes:
        slots, word, reads = shape
        problem = replace(
            PROBLEM,
            device=torch.device("cuda", 0),
            dtype=getattr(torch, dtype),
            batch=16,
            steps=20 if hidden else 1,
            memory_size=slots,
            word_size=word,
            num_reads=reads,
            controller="lstm" if hidden else None,
            hidden_size=hidden,
        )
        serving = [backend for backend in dispatch.BACKENDS.values() if backend.supports(problem)[0]]
        taken = []
        for layout in [layout for backend in serving for layout in backend.layouts(problem)]:
            if layout.whole_sequence:
                taken += sequence(shape, hidden, "sm_90", layout=layout, dtype=dtype)
                layout = default_layout(slots)  # which takes over with checkpoints
            elif hidden and shape not in SHAPES:  # step by step: the other shapes stand for it
                continue
            taken += step(shape, "sm_90", layout=layout, dtype=dtype)
        assert compiled.issuperset(taken), shape
        assert not any(case.may_spill for case in taken), shape


def test_a_head_has_programs_of_its_own_where_a_layout_spreads_and_nowhere_else():
    """The others would repeat what the first does."""

    def programs(spread, backward):
        """Those of the first phase and of the last, and how many parts the last has."""
        layout, options = Layout(False, 32, 128, 1, spread=spread), dict(raw=True, compute=torch.float32)
        first, _, last = launches(2, 512, 64, 8, layout, backward=backward, **options)
        return first.grid[1], last.grid[1], last.sizes.PARTS

    for spread, backward, of_first, per_part, more in (
        (False, False, 1, 1, 0),
        (True, False, 1, 8, 0),
        (False, True, 1, 1, 8),
        (True, True, 8, 1, 9),
    ):
        first, last, parts = programs(spread, backward)
        assert (first, last) == (of_first, per_part * parts + more)


@pytest.mark.parametrize(
    ("fused", "whole", "warps", "told", "registers"),
    [
        (False, False, 1, {}, None),
        (False, False, 1, dict(backward=True), None),
        (False, False, 1, dict(backward=True, capped=True), 200),
        (True, False, 4, {}, None),
        (True, False, 4, dict(backward=True), 255),
        (True, True, 8, {}, 255),
        (True, True, 4, dict(backward=True), 255),
        (True, True, 8, dict(backward=True), None),  # it would spill
        (True, False, 8, dict(backward=True), None),
    ],
)
def test_how_many_registers_a_kernel_may_take(fused, whole, warps, told, registers):
    """AMD's compiler is told nothing of it."""
    layout = Layout(fused, 16, 16, warps, whole_sequence=whole)
    expected = dict(num_warps=warps) if registers is None else dict(num_warps=warps, maxnreg=registers)
    assert compile_options(layout, warps, hip=False, **told) == expected
    assert compile_options(layout, warps, hip=True, **told) == dict(num_warps=warps)


def test_fewer_registers_are_for_the_middle_of_a_backward_with_few_heads_in_float32():
    """Of three launches. Others would spill."""

    def capped(reads, dtype, layout):
        compute = torch.promote_types(dtype, torch.float32)
        found = launches(2, 64, 32, reads, layout, backward=True, raw=True, compute=compute)
        return [is_capped(launch, dtype) for launch in found]

    split, one = Layout(False, 16, 64, 1), Layout(True, 64, 64, 4)
    assert capped(4, torch.float32, split) == [False, True, False]
    assert capped(5, torch.float32, split) == capped(4, torch.bfloat16, split) == [False] * 3
    assert capped(4, torch.float64, split) == [False] * 3
    assert capped(4, torch.float32, one) == [False]


def test_float64_is_compiled_at_every_shape_and_may_spill():
    """It is only there to check gradients with."""
    compiled = set(cases(complete=True))
    shapes = [*SHAPES, LARGEST]
    doubles = [case for shape in shapes for case in step(shape, "sm_90", dtype="float64")]
    for *shape, hidden in SEQUENCES:
        doubles += sequence(tuple(shape), hidden, "sm_90", dtype="float64")
    assert compiled.issuperset(doubles)
    assert all(case.may_spill for case in doubles)


@pytest.mark.slow
def test_a_sequence_is_served_where_its_kernels_fit():
    """At the corners of what is served: as many numbers in a word, heads and hidden units as may be."""
    limits = dict(num_layers=1, hidden_size=128, num_reads=16, word_size=64)
    problem = replace(PROBLEM, batch=1, steps=1, memory_size=128, **limits)
    for name, limit in limits.items():
        _, reason = dispatch.BACKENDS["triton_sequence"].supports(replace(problem, **{name: limit + 1}))
        assert f"goes up to {limit}" in reason or f"go up to {limit}" in reason
    served = [
        case
        for slots in (16, 32, 64, 128)
        for layout in sequence_layouts(slots, 64)
        for reads in (4, 16)
        for case in sequence((slots, 64, reads), 128, "sm_90", layout=layout)
    ]
    for measurement in compiling_map(measure, served):
        assert not measurement.errors
        # In bytes. With sixteen heads, since products are rounded before sums, up to 14 numbers.
        assert measurement.numbers.spilled <= (0 if measurement.case.shape[2] == 4 else 56), measurement
        assert measurement.numbers.shared <= 101_376, measurement


@pytest.mark.slow
def test_wide_words_fit_on_small_gpus():
    """The widest, with few slots, since there loops are unrolled; at N = 1024 the record shows it."""
    shapes = [(16, 256, 16), (32, 256, 16)]
    wide = [case for shape in shapes for layout in layouts(shape[0]) for case in step(shape, "sm_80", layout=layout)]
    for measurement in compiling_map(measure, wide):
        assert not measurement.problems()
        # What GPUs of capability 8.6, 8.9 and 12.0 have. With 4 warps it spilled 5 KB.
        assert measurement.numbers.shared <= 101_376, measurement
        assert measurement.numbers.spilled <= 80, measurement


def test_every_barrier_is_needed_and_would_be_missed(measurements):
    """Without any one of them, some kernel has a race, and it is found."""
    assert idle_barriers(measurements) == []
    in_source = {
        f"{file.name}:{number}"
        for file in KERNELS.glob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if "tl.debug_barrier()" in line
    }
    assert {place for measurement in measurements for place in measurement.barriers} == in_source


@pytest.mark.slow
def test_every_target_dtype_and_layout():
    check(compiling_map(measure, cases(complete=True)))


def by_stages(case):
    """What a case compiles to, up to lines and symbols for a debugger, for each number of stages of a loop."""
    usual, codes = compiling.compile_options, set()
    for stages in (1, 3, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                compiling, "compile_options", lambda *of, n=stages, **how: usual(*of, **how) | {"num_stages": n}
            )
            code = compiling.compile_case(case)[0]["ptx"].split(".section")[0]
        codes.add(re.sub(r"//.*|\.(loc|file).*", "", code))
    return codes


@pytest.mark.slow
def test_stages_change_nothing_but_the_gradients_of_weights():
    """So there is nothing to choose among, as docs/kernels.md says."""
    chosen = [case for case in cases() if case.target == "sm_90" and case.dtype == "float32"]
    assert len(chosen) > 50
    differ = [
        case.phase for case, codes in zip(chosen, compiling_map(by_stages, chosen), strict=True) if len(codes) > 1
    ]
    assert differ == ["weights"]
