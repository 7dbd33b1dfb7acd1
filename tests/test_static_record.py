"""What is compared with the record of compiled kernels, and what the command line makes of it. Nothing compiles."""

from __future__ import annotations

from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")

from benchmarks.static.__main__ import main  # noqa: E402
from benchmarks.static.cases import LARGEST, LONGEST, MOST_HEADS, cases  # noqa: E402
from benchmarks.static.measuring import Measurement, Numbers, idle_barriers  # noqa: E402
from benchmarks.static.record import read_record, update_record, worse_than_recorded  # noqa: E402

CASE = next(case for case in cases() if case.target == "sm_90")
LSTM = next(case for case in cases() if case.phase == "lstm")
HUGE = (LARGEST, LONGEST, MOST_HEADS)
NUMBERS = Numbers(registers=64, spilled=0, shared=1024, instructions=500)
GOOD = Measurement(CASE, NUMBERS, [], {"step.py:1": True})


def with_numbers(**numbers):
    return replace(GOOD, numbers=replace(NUMBERS, **numbers))


@pytest.mark.parametrize("number", ["registers", "spilled", "shared", "instructions"])
def test_more_than_recorded_is_worse_and_less_is_not(number):
    recorded = {str(CASE): replace(NUMBERS, **{number: 2000})}
    assert worse_than_recorded([with_numbers(**{number: 2001})], recorded) == [f"{CASE}: {number} 2000 -> 2001"]
    assert worse_than_recorded([with_numbers(**{number: 1999})], recorded) == []


def test_every_case_has_a_name_of_its_own():
    """It is recorded by that name."""
    complete = cases(complete=True)
    assert len(set(map(str, complete))) == len(complete)


def test_a_case_that_is_not_recorded_is_named():
    assert worse_than_recorded([GOOD], {}) == [f"{CASE}: not recorded"]


def test_updating_the_record_keeps_other_cases_and_versions_and_drops_what_is_no_more(tmp_path, monkeypatch):
    path = tmp_path / "new" / "record.json"
    other = replace(GOOD, case=cases()[1])
    no_more = replace(GOOD, case=replace(CASE, phase="gone"))
    monkeypatch.setattr(triton, "__version__", "0.1")
    update_record([GOOD], path)
    monkeypatch.setattr(triton, "__version__", "0.2")
    update_record([GOOD, other, no_more], path)
    update_record([with_numbers(registers=65)], path)
    assert read_record(path) == {str(CASE): replace(NUMBERS, registers=65), str(other.case): NUMBERS}
    monkeypatch.setattr(triton, "__version__", "0.1")
    assert read_record(path) == {str(CASE): NUMBERS}


@pytest.mark.parametrize(
    ("measurement", "complaint"),
    [
        (with_numbers(spilled=8), "spills 8 bytes"),
        (replace(with_numbers(spilled=8), case=replace(CASE, target="sm_80")), None),
        (replace(with_numbers(spilled=8), case=replace(CASE, dtype="float64")), None),
        *((replace(with_numbers(spilled=8), case=replace(CASE, shape=shape)), None) for shape in HUGE),
        (replace(with_numbers(spilled=8), case=LSTM), "spills 8 bytes"),
        (replace(with_numbers(spilled=8), case=replace(LSTM, target="gfx942")), "spills 8 bytes"),
        (replace(with_numbers(spilled=8), case=replace(LSTM, target="gfx1100")), None),
        (with_numbers(shared=232_448), None),
        (with_numbers(shared=232_449), "wants 232,449 bytes of shared memory, there are 232,448"),
        (replace(GOOD, numbers=None, errors=["does not compile: why"]), "does not compile: why"),
        (replace(GOOD, errors=["a race"]), "a race"),
    ],
)
def test_what_counts_as_a_problem(measurement, complaint):
    assert measurement.problems() == ([f"{measurement.case}: {complaint}"] if complaint else [])


@pytest.mark.parametrize(
    ("version", "spilled", "problems"), [("3.7.1", 16, 1), ("3.9.0", 16, 0), ("3.9.1", 17, 1), ("3.8.0", 0, 0)]
)
def test_one_kernel_may_spill_a_little_where_one_version_makes_room(version, spilled, problems, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    case = next(case for case in cases() if str(case) == "forward last 512x64x8 32x128/1 float32 sm_90")
    assert len(replace(with_numbers(spilled=spilled), case=case).problems()) == problems
    assert len(with_numbers(spilled=16).problems()) == 1


def test_a_barrier_is_idle_if_no_kernel_needs_it():
    without = replace(GOOD, barriers={"step.py:1": False, "step.py:2": False})
    assert idle_barriers([GOOD, without]) == ["step.py:2"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line as if `measurement` were what came out. Returns its status, output and errors."""
    monkeypatch.setattr("benchmarks.static.__main__.RECORD", tmp_path / "record.json")

    def run(measurement, *arguments):
        monkeypatch.setattr(
            "benchmarks.static.__main__.compiling_map", lambda function, items, jobs: (one for one in [measurement])
        )
        return (main(arguments), *capsys.readouterr())

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


@pytest.mark.parametrize(
    ("select", "arguments"),
    [("forward hole", []), ("forward hole", ["--update"]), ("gfx942", ["--clocks"])],  # it looks at NVIDIA's alone
    ids=str,
)
def test_the_command_refuses_to_look_at_no_case_at_all(select, arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--select", select, *arguments])
    assert exit_.value.code == 2
    assert f"argument --select: no case that is looked at has {select!r} in its name" in capsys.readouterr().err


def test_the_command_fails_on_a_problem_even_if_it_is_recorded(command):
    status, _, errors = command(with_numbers(spilled=8), "--update")
    assert status == 1
    assert "spills 8 bytes" in errors
