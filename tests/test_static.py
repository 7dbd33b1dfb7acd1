"""The kernels compile for every target, spill nothing, fit, have all their barriers, and take no more than is recorded.

Nothing here needs a GPU. Compilation happens in other processes, since those of this one may be made to be interpreted.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks import barriers, static  # noqa: E402
from dnc_triton import dispatch  # noqa: E402
from dnc_triton.kernels.layout import layouts, sequence_layouts  # noqa: E402
from dnc_triton.problem import Problem  # noqa: E402

KERNELS = Path(static.__file__).parent.parent / "dnc_triton" / "kernels"


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(request, tmp_path_factory):
    """Keep what is compiled beside pytest's own notes, so that a second run compiles only what changed."""
    notes = getattr(request.config, "cache", None)  # None with -p no:cacheprovider
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(notes.mkdir("triton") if notes else tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def measurements():
    return list(static.compiling_map(static.measure, static.cases()))


# --- our kernels ------------------------------------------------------------------------------------------------------


def check(measurements):
    problems = [problem for measurement in measurements for problem in measurement.problems()]
    if record := static.read_record(static.RECORD):
        problems += static.worse_than_recorded(measurements, record)
        problems += ["If that has to be: python -m benchmarks.static --complete --update"] if problems else []
    assert not problems, "\n".join(problems)


def test_kernels_compile_spill_nothing_fit_race_nowhere_and_take_no_more_than_recorded(measurements):
    check(measurements)


def test_every_shape_is_compiled_for_every_target():
    """In full, and without a GPU, each time that the tests run."""
    assert static.SHAPES == [
        (16, 16, 1), (16, 16, 4), (64, 32, 4), (128, 64, 4), (192, 64, 4), (256, 64, 4), (512, 64, 8)
    ]  # fmt: skip
    assert list(static.TARGETS) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    compiled = static.cases()
    for shape in static.SHAPES:
        for target in static.TARGETS:
            phases = {(case.direction, case.phase) for case in compiled if (case.shape, case.target) == (shape, target)}
            fused = {(direction, "whole") for direction in static.DIRECTIONS}
            split = {(direction, phase) for direction in static.DIRECTIONS for phase in ("first", "middle", "last")}
            assert phases >= fused or phases >= split, (shape, target)


@pytest.mark.parametrize("hidden", [0, *sorted({hidden for *_, hidden in static.SEQUENCES})])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_the_dispatcher_may_take_is_compiled_and_held_to_spill_nothing(dtype, hidden, monkeypatch):
    """On sm_90, every layout of every backend, be it measured or not; in full with the slow tests."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    compiled = set(static.cases(complete=True))
    shapes = [tuple(shape) for *shape, size in static.SEQUENCES if size == hidden] if hidden else static.SHAPES
    for shape in shapes:
        slots, word, reads = shape
        problem = Problem(
            device=torch.device("cuda", 0),
            dtype=getattr(torch, dtype),
            batch=16,
            steps=20 if hidden else 1,
            memory_size=slots,
            word_size=word,
            num_reads=reads,
            num_writes=1,
            controller="lstm" if hidden else None,
            needs_gradient=True,
            hidden_size=hidden,
            num_layers=1 if hidden else 0,
        )
        serving = [backend for backend in dispatch.BACKENDS.values() if backend.supports(problem)[0]]
        cases = []
        for layout in [layout for backend in serving for layout in backend.layouts(problem)]:
            if layout.whole:
                cases += static._sequence(shape, hidden, "sm_90", layout=layout, dtype=dtype)
                layout = layout._replace(whole=False)  # of the same sequence with checkpoints
            elif hidden and shape not in static.SHAPES:  # step by step: the other shapes stand for it
                continue
            cases += static._step(shape, "sm_90", layout=layout, dtype=dtype)
        assert compiled.issuperset(cases), shape
        assert not any(case.may_spill for case in cases), shape


def test_float64_is_compiled_at_every_shape_and_may_spill():
    """It is only there to check gradients with."""
    compiled = set(static.cases(complete=True))
    shapes = [*static.SHAPES, static.LARGEST]
    cases = [case for shape in shapes for case in static._step(shape, "sm_90", dtype="float64")]
    for *shape, hidden in static.SEQUENCES:
        cases += static._sequence(tuple(shape), hidden, "sm_90", dtype="float64")
    assert compiled.issuperset(cases)
    assert all(case.may_spill for case in cases)


@pytest.mark.slow
def test_a_sequence_is_served_where_its_kernels_fit():
    """At the corners of what is served: as many numbers in a word, heads and hidden units as may be."""
    limits = dict(num_layers=1, hidden_size=128, num_reads=16, word_size=64)
    problem = Problem(
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch=1,
        steps=1,
        memory_size=128,
        num_writes=1,
        controller="lstm",
        needs_gradient=True,
        **limits,
    )
    for name, limit in limits.items():
        _, reason = dispatch.BACKENDS["triton_sequence"].supports(replace(problem, **{name: limit + 1}))
        assert f"goes up to {limit}" in reason or f"go up to {limit}" in reason
    cases = [
        case
        for slots in (16, 32, 64, 128)
        for layout in sequence_layouts(slots, 64)
        for case in static._sequence((slots, 64, 16), 128, "sm_90", layout=layout)
    ]
    for measurement in static.compiling_map(static.measure, cases):
        assert not measurement.errors
        assert measurement.numbers.spilled <= 24, measurement
        assert measurement.numbers.shared <= 101_376, measurement


@pytest.mark.slow
def test_wide_words_fit_on_small_gpus():
    """The widest, with few slots, since there loops are unrolled; at N = 1024 the record shows it."""
    shapes = [(16, 256, 16), (32, 256, 16)]
    cases = [
        case
        for shape in shapes
        for layout in layouts(*shape[:2])
        for case in static._step(shape, "sm_80", layout=layout)
    ]
    for measurement in static.compiling_map(static.measure, cases):
        assert not measurement.problems()
        # Of capability 8.6, 8.9 and 12.0. With 4 warps it spilled 5 KB.
        assert measurement.numbers.shared <= 101_376, measurement
        assert measurement.numbers.spilled <= 80, measurement


def test_every_barrier_is_needed_and_would_be_missed(measurements):
    """Without any one of them, some kernel has a race, and it is found."""
    assert static.idle_barriers(measurements) == []
    in_source = {
        f"{file.name}:{number}"
        for file in KERNELS.glob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if "tl.debug_barrier()" in line
    }
    assert {place for measurement in measurements for place in measurement.barriers} == in_source


@pytest.mark.slow
def test_every_target_dtype_and_layout():
    check(static.compiling_map(static.measure, static.cases(complete=True)))


# --- the check for barriers, on kernels with a race planted -----------------------------------------------------------


@triton.jit
def reversing(data_ptr, out_ptr, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    here = tl.arange(0, SIZE)
    tl.store(data_ptr + here, tl.load(out_ptr + here) + 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + SIZE - 1 - here))


@triton.jit
def reversing_again_and_again(data_ptr, out_ptr, BARRIER_BEFORE: tl.constexpr, BARRIER_AFTER: tl.constexpr):
    here = tl.arange(0, 256)
    for _ in range(5):
        value = tl.load(data_ptr + 255 - here)
        if BARRIER_BEFORE:
            tl.debug_barrier()
        tl.store(data_ptr + here, value)
        if BARRIER_AFTER:
            tl.debug_barrier()


@triton.jit
def reversing_in_a_branch(data_ptr, out_ptr, index_ptr, COUNT: tl.constexpr, BARRIER: tl.constexpr):
    """COUNT 0: the barrier is in a branch that data decide on."""
    here = tl.arange(0, 256)
    tl.store(data_ptr + here, tl.load(out_ptr + here) + 1.0)
    if COUNT == 0:
        if tl.load(index_ptr) > 0:
            tl.debug_barrier()
    else:
        for i in range(COUNT):
            if i == BARRIER:
                tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + 255 - here))


@triton.jit
def in_place(data_ptr, out_ptr, SIZE: tl.constexpr, SUM: tl.constexpr):
    """A thread loads what it stored itself, unless there are more threads than elements and all load."""
    here = tl.arange(0, SIZE)
    tl.store(data_ptr + here, tl.load(out_ptr + here) + 1.0)
    value = tl.load(data_ptr + here) * 2.0
    if SUM:
        value += tl.sum(value)
    tl.store(out_ptr + here, value)


@triton.jit
def other_layout(data_ptr, out_ptr):
    """A thread stores two numbers in a row, and loads four."""
    rows, columns = tl.arange(0, 512), tl.arange(0, 2)
    tl.store(data_ptr + rows[:, None] * 2 + columns[None, :], tl.zeros([512, 2], tl.float32))
    here = tl.arange(0, 1024)
    tl.store(out_ptr + here, tl.load(data_ptr + here))


@triton.jit
def parts(data_ptr, out_ptr, N: tl.constexpr, MASKED: tl.constexpr):
    """The buffer's first N numbers are stored, the next N loaded; without the mask they overlap."""
    here = tl.arange(0, 256)
    mask = here < (N if MASKED else 256)
    tl.store(data_ptr + here, tl.load(out_ptr + here, mask=mask, other=0.0) + 1.0, mask=mask)
    tl.store(out_ptr + here, tl.load(data_ptr + N + here, mask=mask, other=0.0), mask=mask)


@triton.jit
def scattering(data_ptr, out_ptr, index_ptr, BARRIER: tl.constexpr):
    here = tl.arange(0, 256)
    tl.store(data_ptr + tl.load(index_ptr + here), tl.load(out_ptr + here))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + here, tl.load(data_ptr + here))


@triton.jit
def squeezing(data_ptr, out_ptr):
    here = tl.arange(0, 256)
    tl.store(data_ptr + here // 2, tl.load(out_ptr + here))


@triton.jit
def as_told(data_ptr, out_ptr, index_ptr, LAST: tl.constexpr):
    """As often as the index says at first, stores entry i; loads it where the index says so then, until LAST."""
    here = tl.arange(0, 256)
    for i in range(tl.load(index_ptr)):
        told = tl.load(index_ptr + 1 + i, mask=i <= LAST, other=0) != 0
        tl.store(data_ptr + i * 256 + here, tl.load(out_ptr + here))
        entry = tl.where(told, i, 9)
        tl.store(out_ptr + here, tl.load(data_ptr + entry * 256 + 255 - here))


@triton.jit
def changing_what_is_known(index_ptr):
    tl.store(index_ptr, tl.load(index_ptr) + 1)


@triton.jit
def prefetching(data_ptr, out_ptr, NEXT: tl.constexpr):
    """The loads of this loop are moved to earlier iterations, before the stores."""
    here = tl.arange(0, 32)
    tile = here[:, None] * 32 + here[None, :]
    weights = tl.load(out_ptr + tile)
    total = tl.zeros([32, 32], tl.float32)
    for i in range(6):
        total = tl.dot(tl.load(data_ptr + i * 1024 + tile), weights, total, input_precision="ieee")
        tl.store(data_ptr + (i + NEXT) * 1024 + tile, total)


@triton.jit
def beyond_its_own(data_ptr, out_ptr, SIZE: tl.constexpr):
    """Each program has 256 numbers, and stores SIZE."""
    here = tl.program_id(0) * 256 + tl.arange(0, SIZE)
    tl.store(data_ptr + here, tl.load(out_ptr + here))


@triton.jit
def looking_back(data_ptr, out_ptr):
    here = tl.arange(0, 256)
    tl.store(out_ptr + here, tl.load(data_ptr + here - 64))


@triton.jit
def counting(data_ptr, out_ptr):
    tl.atomic_add(data_ptr + tl.arange(0, 256), 1.0)


class Planted(NamedTuple):
    kernel: str
    constants: dict[str, int]
    finds: str | None  # part of what is to be found; None if the kernel is right
    target: str = "sm_90"
    index: list[int] | None = None  # what is in index_ptr, if that is known
    before: int = 0  # how many numbers lie before the one that data_ptr points to


PLANTED = {
    "no barrier": Planted("reversing", dict(SIZE=256, BARRIER=0), "loads from data_ptr"),
    "no barrier, gfx942": Planted("reversing", dict(SIZE=512, BARRIER=0), "loads from data_ptr", "gfx942"),
    "barrier": Planted("reversing", dict(SIZE=256, BARRIER=1), None),
    "barrier, gfx942": Planted("reversing", dict(SIZE=512, BARRIER=1), None, "gfx942"),
    "loop, no barrier between load and store": Planted(
        "reversing_again_and_again", dict(BARRIER_BEFORE=0, BARRIER_AFTER=1), "stores to data_ptr"
    ),
    "loop, no barrier before the next iteration": Planted(
        "reversing_again_and_again", dict(BARRIER_BEFORE=1, BARRIER_AFTER=0), "loads from data_ptr"
    ),
    "loop, both barriers": Planted("reversing_again_and_again", dict(BARRIER_BEFORE=1, BARRIER_AFTER=1), None),
    "barrier perhaps": Planted("reversing_in_a_branch", dict(COUNT=0, BARRIER=0), "loads from data_ptr"),
    "barrier in the last iteration": Planted("reversing_in_a_branch", dict(COUNT=3, BARRIER=2), None),
    "barrier in no iteration": Planted("reversing_in_a_branch", dict(COUNT=3, BARRIER=3), "loads from data_ptr"),
    "same thread": Planted("in_place", dict(SIZE=128, SUM=1), None),
    "other threads too": Planted("in_place", dict(SIZE=64, SUM=1), "loads from data_ptr"),
    "other threads too, which store nothing": Planted("in_place", dict(SIZE=64, SUM=0), None),
    "other layout": Planted("other_layout", {}, "loads from data_ptr"),
    "other part": Planted("parts", dict(N=100, MASKED=1), None),
    "other part without mask": Planted("parts", dict(N=100, MASKED=0), "loads from data_ptr"),
    "place from data": Planted("scattering", dict(BARRIER=0), "loads from data_ptr"),
    "place from data, barrier": Planted("scattering", dict(BARRIER=1), None),
    "two threads, one place": Planted("squeezing", {}, "from several threads"),
    "told once too often": Planted("as_told", dict(LAST=9), "loads from data_ptr", index=[3, 0, 0, 1]),
    "told in time": Planted("as_told", dict(LAST=9), None, index=[2, 0, 0, 1]),
    "told beyond the mask": Planted("as_told", dict(LAST=1), None, index=[3, 0, 0, 1]),
    "told who knows what": Planted("as_told", dict(LAST=9), "cannot be checked: the bounds of the loop"),
    "told otherwise meanwhile": Planted(
        "changing_what_is_known", {}, "stores to index_ptr, whose contents are given", index=[1]
    ),
    "loaded too early": Planted("prefetching", dict(NEXT=1), "data_ptr"),
    "loaded early": Planted("prefetching", dict(NEXT=6), None),
    "programs apart": Planted("beyond_its_own", dict(SIZE=256), None),
    "programs that overlap": Planted("beyond_its_own", dict(SIZE=512), "in program (1,)"),
    "back too far": Planted("looking_back", {}, "touches what lies before data_ptr", before=63),
    "back": Planted("looking_back", {}, None, before=64),
    "atomic": Planted("counting", {}, "cannot be checked: tt.atomic_rmw"),
}


def find_races(name):
    """Compile a planted kernel and check it, in another process."""
    planted = PLANTED[name]
    kernel = globals()[planted.kernel]
    arguments = {
        argument: "constexpr" if argument in planted.constants else "*i32" if argument == "index_ptr" else "*fp32"
        for argument in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind != "constexpr"}
    source = ASTSource(kernel, arguments, planted.constants, aligned)
    compiled = triton.compile(source, target=static.TARGETS[planted.target], options={"num_warps": 4})
    grid = (2,) if planted.kernel == "beyond_its_own" else (1,)
    known = {"data_ptr": planted.before} | ({} if planted.index is None else {"index_ptr": planted.index})
    try:
        return barriers.races(compiled.asm["ttgir"], grid, known)
    except barriers.Unchecked as reason:
        return [f"cannot be checked: {reason}"]


@pytest.fixture(scope="module")
def races():
    return dict(zip(PLANTED, static.compiling_map(find_races, PLANTED), strict=True))


@pytest.mark.parametrize("name", PLANTED)
def test_planted_races_are_found_and_nothing_else(races, name):
    expected = PLANTED[name].finds
    if expected is None:
        assert races[name] == []
    else:
        assert races[name], "nothing found"
        assert all(expected in race for race in races[name]), races[name]


def test_a_race_is_told_by_its_lines(races):
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (race,) = races["no barrier"]
    loading, storing = (lines[int(number) - 1] for number in re.findall(r"test_static\.py:(\d+)", race))
    assert "tl.load(data_ptr" in loading
    assert "tl.store(data_ptr" in storing


# --- the record and the command line ----------------------------------------------------------------------------------


CASE = next(case for case in static.cases() if case.target == "sm_90")
NUMBERS = static.Numbers(registers=64, spilled=0, shared=1024, instructions=500)
GOOD = static.Measurement(CASE, NUMBERS, [], {"step.py:1": True})


def with_numbers(**numbers):
    return replace(GOOD, numbers=replace(NUMBERS, **numbers))


@pytest.mark.parametrize("number", ["registers", "spilled", "shared", "instructions"])
def test_more_than_recorded_is_worse_and_less_is_not(number):
    recorded = {str(CASE): replace(NUMBERS, **{number: 2000})}
    assert static.worse_than_recorded([with_numbers(**{number: 2001})], recorded) == [f"{CASE}: {number} 2000 -> 2001"]
    assert static.worse_than_recorded([with_numbers(**{number: 1999})], recorded) == []


def test_a_case_that_is_not_recorded_is_named():
    assert static.worse_than_recorded([GOOD], {}) == [f"{CASE}: not recorded"]


def test_updating_the_record_keeps_other_cases_and_versions_and_drops_what_is_no_more(tmp_path, monkeypatch):
    path = tmp_path / "new" / "record.json"
    other = replace(GOOD, case=static.cases()[1])
    no_more = replace(GOOD, case=replace(CASE, phase="gone"))
    monkeypatch.setattr(triton, "__version__", "0.1")
    static.update_record([GOOD], path)
    monkeypatch.setattr(triton, "__version__", "0.2")
    static.update_record([GOOD, other, no_more], path)
    static.update_record([with_numbers(registers=65)], path)
    assert static.read_record(path) == {str(CASE): replace(NUMBERS, registers=65), str(other.case): NUMBERS}
    monkeypatch.setattr(triton, "__version__", "0.1")
    assert static.read_record(path) == {str(CASE): NUMBERS}


@pytest.mark.parametrize(
    ("measurement", "complaint"),
    [
        (with_numbers(spilled=8), "spills 8 bytes"),
        (replace(with_numbers(spilled=8), case=replace(CASE, target="sm_80")), None),
        (replace(with_numbers(spilled=8), case=replace(CASE, dtype="float64")), None),
        (with_numbers(shared=232_448), None),
        (with_numbers(shared=232_449), "wants 232,449 bytes of shared memory, there are 232,448"),
        (replace(GOOD, numbers=None, errors=["does not compile: why"]), "does not compile: why"),
        (replace(GOOD, errors=["a race"]), "a race"),
    ],
)
def test_what_counts_as_a_problem(measurement, complaint):
    assert measurement.problems() == ([f"{measurement.case}: {complaint}"] if complaint else [])


def test_a_barrier_is_idle_if_no_kernel_needs_it():
    without = replace(GOOD, barriers={"step.py:1": False, "step.py:2": False})
    assert static.idle_barriers([GOOD, without]) == ["step.py:2"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line as if `measurement` were what came out. Returns its status, output and errors."""
    monkeypatch.setattr(static, "RECORD", tmp_path / "record.json")

    def run(measurement, *arguments):
        monkeypatch.setattr(static, "compiling_map", lambda function, items, jobs: (one for one in [measurement]))
        return (static.main(arguments), *capsys.readouterr())

    return run


def test_the_command_fails_on_what_is_worse_until_it_is_recorded(command):
    status, _, errors = command(GOOD)
    assert (status, errors) == (0, f"Nothing is recorded for Triton {triton.__version__}\n")
    status, output, errors = command(GOOD, "--update")
    assert (status, errors) == (0, "")
    assert f"| {CASE} | 64 | 0 | 1024 | 500 |" in output
    worse = with_numbers(registers=65)
    status, _, errors = command(worse)
    assert (status, errors) == (1, f"{CASE}: registers 64 -> 65\n")
    assert command(worse, "--update")[0] == 0
    assert command(worse)[0] == 0


def test_the_command_fails_on_a_problem_even_if_it_is_recorded(command):
    status, _, errors = command(with_numbers(spilled=8), "--update")
    assert status == 1
    assert "spills 8 bytes" in errors


# --- processes where kernels compile ----------------------------------------------------------------------------------


def is_compilable(_):
    return isinstance(reversing, triton.JITFunction)


def test_other_processes_compile_also_if_this_one_interprets(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert list(static.compiling_map(is_compilable, [0], jobs=1)) == [True]
    assert os.environ["TRITON_INTERPRET"] == "1"
