"""`make gpu` without a GPU: its parts get their time, stop when it is up, and what was not run is told."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_other():
    pass

@pytest.mark.parametrize("number", range(4))
def test_parity(number):
    pass

def test_that_fails():
    assert not FAILS

def test_that_is_skipped():
    pytest.skip("there is one GPU")
"""
LOST = """
import torch

def test_fifty_steps():
    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, fail
    fail()
"""


@pytest.fixture
def run_tests(tmp_path):
    """Runs those tests with the conftest.py of tests/gpu. Returns exit status, what is printed, lines of the record."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", folder)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")

    def run(*arguments, fails=False, more=""):
        (folder / "test_some.py").write_text(f"FAILS = {fails}\n{TESTS}{more}", encoding="utf-8")
        record = tmp_path / "record.txt"
        record.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "gpu", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        lines = record.read_text().splitlines() if record.exists() else []
        return done.returncode, done.stdout + done.stderr, [line.split(", ")[0] for line in lines]

    return run


@pytest.mark.slow
def test_each_test_is_run_by_one_process_the_important_ones_first(run_tests, tmp_path):
    at = "gpu/test_some.py::test_"
    claims = tmp_path / "claims"
    claimed = ["--claims", str(claims), "--record", "record.txt"]
    status, _, lines = run_tests(*claimed, fails=True)
    assert status == 1
    assert lines == ["7 tests", *(f"passed: {at}parity[{number}]" for number in range(4)), f"passed: {at}other",
                     f"failed: {at}that_fails", f"skipped: {at}that_is_skipped"]  # fmt: skip
    (claims / sha256(f"{at}parity[2]".encode()).hexdigest()).unlink()
    assert run_tests(*claimed, fails=True)[::2] == (0, ["7 tests", f"passed: {at}parity[2]"])
    assert run_tests(*claimed, fails=True)[::2] == (0, ["7 tests"])


def test_where_the_device_stops_working_the_tests_that_come_are_left_to_others(run_tests, tmp_path):
    status, printed, lines = run_tests("--claims", "claims", "--record", "record.txt", more=LOST)
    assert status == pytest.ExitCode.INTERRUPTED
    assert "the device has stopped working in this process" in printed
    assert lines == ["8 tests", "failed: gpu/test_some.py::test_fifty_steps"]
    (claim,) = (tmp_path / "claims").iterdir()
    assert claim.read_text() == "gpu/test_some.py::test_fifty_steps"


@pytest.mark.slow
def test_the_tests_on_a_gpu_stop_in_time_and_say_so(run_tests):
    status, printed, lines = run_tests("--seconds", "0", "--record", "record.txt", fails=True)
    assert status == 1
    assert [line.split(":")[0] for line in lines] == ["7 tests", *["not run"] * 7]
    assert "7 tests were not run: the time is up. This is not all of parity." in printed
    status, printed, lines = run_tests()
    assert (status, lines) == (0, [])
    assert "not all of parity" not in printed


MODULES = {
    "good": "print('well')",
    "bad": "raise SystemExit(3)",
    "late": "import time\ntime.sleep(1)\nraise SystemExit(7)",  # it ends by itself soon after its time is up
    # What is started in the background by a shell without job control ignores interrupts, unless it says otherwise.
    "long": (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(5)"
    ),
    "deaf": "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_what_does_not_stop_is_interrupted_and_killed(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(on_gpu, "OVERTIME", 4.0)  # on a machine that is busy a process takes seconds to begin
    monkeypatch.setattr(on_gpu, "LAST_WORDS", 2.0)
    logs = [tmp_path / f"{name}.log" for name in MODULES]
    started = time.monotonic()
    statuses = on_gpu.run_all([[name] for name in MODULES], 0.5, logs, {"PYTHONPATH": str(tmp_path)})
    assert statuses == [0, 3, 7, 5, -9]
    assert time.monotonic() - started < 30
    assert logs[0].read_text() == "well\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_what_a_part_has_started_ends_with_it(tmp_path):
    """A compiler that it left behind would take the time of the next one."""
    import fcntl

    (tmp_path / "starts.py").write_text(
        "import fcntl, subprocess, sys\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[file.fileno()])"
    )
    held, variables = tmp_path / "held", {"PYTHONPATH": str(tmp_path)}
    assert on_gpu.run_all([["starts", str(held)]], 60, [tmp_path / "log"], variables) == [0]
    deadline = time.monotonic() + 10
    with held.open() as file:
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "it goes on"
                time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="no priorities there")
def test_who_gives_way_has_threads_that_do(tmp_path):
    """Those of the compilers, which are many, beside tests whose time is limited."""
    (tmp_path / "one.py").write_text(
        "import os, sys, threading, time\ntime.sleep(2)\nown = lambda: print(os.getpriority(os.PRIO_PROCESS, 0))\n"
        "own()\nthread = threading.Thread(target=own)\nthread.start()\nthread.join()"
    )
    logs, variables = [tmp_path / "0.log", tmp_path / "1.log"], {"PYTHONPATH": str(tmp_path)}
    assert on_gpu.run_all([["one"], ["one"]], 60, logs, variables, 1) == [0, 0]
    usual, late = (list(map(int, log.read_text().split())) for log in logs)
    assert usual == [os.getpriority(os.PRIO_PROCESS, 0)] * 2
    assert late == [max(on_gpu.NICE, *usual)] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_who_interrupts_all_interrupts_each_part(tmp_path, monkeypatch, capsys):
    """It may then write what it has."""
    (tmp_path / "asleep.py").write_text(
        "import pathlib, time\npathlib.Path('TMP/ready').touch()\ntry:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    pathlib.Path('TMP/written').touch()".replace("TMP", str(tmp_path))
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "run_parity", lambda *arguments: 0)
    monkeypatch.setattr(on_gpu, "PARTS", [("sleep", 1.0, "asleep"), ("again", 1.0, "asleep")])
    exact = on_gpu._stop

    def stop(processes, deadline):
        if deadline > time.monotonic() + 1:  # the first time
            while not (tmp_path / "ready").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt
        exact(processes, deadline)

    monkeypatch.setattr(on_gpu, "_stop", stop)
    assert on_gpu.main(["--seconds", "60", "--output", str(tmp_path)]) == 130
    assert (tmp_path / "written").exists()
    said = capsys.readouterr()
    assert f"Interrupted. What was measured until then is in {tmp_path}" in said.err
    assert "again" not in said.out


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_part_is_interrupted_also_where_a_shell_runs_it_in_the_background(tmp_path, monkeypatch, capsys):
    (tmp_path / "asleep.py").write_text(
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(5)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "run_parity", lambda *arguments: 0)
    monkeypatch.setattr(on_gpu, "PARTS", [("sleep", 1.0, "asleep")])
    monkeypatch.setattr(on_gpu, "OVERTIME", 4.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert on_gpu.main(["--seconds", "0.5", "--output", str(tmp_path)]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert "sleep: ended with status 5." in capsys.readouterr().out


def test_every_part_gets_its_time_and_failures_are_told(tmp_path, monkeypatch, capsys):
    """Nothing is run: the tests leave a record, one of their processes was killed; the benchmark of a step is wrong."""
    called = []

    def run_all(commands, seconds, logs=None, variables=None, giving_way=0):
        assert giving_way == sum(command[0] != "pytest" for command in commands if logs)
        called.append((commands, seconds))
        if logs is None:
            return [1 if commands[0][0] == "benchmarks.gpu" else 0]
        options = dict(zip(commands[0], commands[0][1:], strict=False))
        record, claims = Path(options["--record"]), Path(options["--claims"])
        claims.mkdir()
        for number, test in enumerate(["a.py::b", "a.py::c[1, 2]", "a.py::d", "a.py::that_hangs"]):
            (claims / str(number)).write_text(f"tests/gpu/{test}")
        (claims / "that was not written").touch()
        with record.open("a", encoding="utf-8") as file:
            file.write("5 tests\npassed: tests/gpu/a.py::b, 1 s\npassed: tests/gpu/a.py::c[1, 2], 1 s\n")
            file.write("failed: tests/gpu/a.py::c[1, 2], 0 s\n")
            file.write("not run: tests/gpu/a.py::d, 0 s\n5 tests\nskipped: tests/gpu/a.py::e, 0 s\n")
        for log in logs:
            log.write_text(f"what {log.name} printed\n{' ' * 9000}\nto the end\n")
        return [1, -9, *[0] * (len(commands) - 2)]

    monkeypatch.setattr(on_gpu, "run_all", run_all)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "describe_machine", lambda command: {"date": "2026-01-02T03", "gpu": "a GPU"})
    folder = tmp_path / "with a space"
    assert on_gpu.main(["--seconds", "100", "--output", str(folder)]) == 1
    parity, *others = called
    assert [command[0] for command in parity[0]] == ["pytest"] * 2 + ["benchmarks"] * 2 + ["benchmarks.gpu"]
    assert [command[0] for commands, _ in others for command in commands] == [
        "benchmarks.gpu",
        "benchmarks.lean",
        "benchmarks",
    ]
    assert [round(seconds) for _, seconds in called] == [50, 60, 64, 100]
    assert all(str(folder) in commands[0][-1] for commands, _ in others)
    printed = capsys.readouterr().out
    assert "Parity on a GPU: 1 passed, 1 failed, 1 skipped, 2 not run. This is not all of parity." in printed
    assert "failed: tests/gpu/a.py::c" in printed
    assert "to the end" in printed
    assert [line for line in printed.splitlines() if "not ended" in line] == ["not ended: tests/gpu/a.py::that_hangs"]
    failures = (folder / "gpu-parity-2026-01-02-failures.txt").read_text(encoding="utf-8")
    assert [line for line in failures.splitlines() if "printed" in line] == ["what 0.log printed", "what 1.log printed"]
    assert (
        "the memory step: wrong or incomplete, see above. lean memory: all right. the benchmark: all right." in printed
    )
    record = (folder / "gpu-parity-2026-01-02.txt").read_text(encoding="utf-8").splitlines()
    assert record[0] == '{"date": "2026-01-02T03", "gpu": "a GPU"}'
    assert record[-2] == "not ended: tests/gpu/a.py::that_hangs"
    assert record[-1].startswith("Parity on a GPU: 1 passed")


@pytest.mark.parametrize(
    ("lines", "ended", "compiled", "word"),
    [
        (["2 tests", "passed: tests/gpu/a.py::b", "skipped: tests/gpu/a.py::c"], 0, 1, ""),
        (["2 tests", "passed: tests/gpu/a.py::b"], 0, 0, "not all of parity"),
        (["2 tests", "passed: tests/gpu/a.py::b", "1 tests"], 0, 0, "not all of parity"),
        (["2 tests", "passed: tests/gpu/a.py::b", "failed: tests/gpu/a.py::c"], 1, 0, "not all of parity"),
        (["2 tests", "skipped: tests/gpu/a.py::b", "skipped: tests/gpu/a.py::c"], 0, 0, "not all of parity"),
    ],
    ids=["all", "one is missing", "one is missing to a process", "one failed", "none passed"],
)
def test_parity_is_what_ran_and_did_not_fail(lines, ended, compiled, word, tmp_path, monkeypatch, capsys):
    """What compiles beside it may fail. What failed the last time is not told again."""
    machine = {"date": "2026-01-02T03", "gpu": "a GPU"}
    failures = tmp_path / "gpu-parity-2026-01-02-failures.txt"
    failures.write_text("of the last time")
    own = []

    def run_all(commands, seconds, logs, variables, giving_way):
        own.append(Path(variables["DNC_TRITON_CACHE"]))
        with (tmp_path / "gpu-parity-2026-01-02.txt").open("a", encoding="utf-8") as record:
            record.writelines(f"{line}, 1 s\n" if "::" in line else f"{line}\n" for line in lines)
        for log in logs:
            log.write_text("of this time")
        return [ended] + [compiled] * giving_way

    monkeypatch.setattr(on_gpu, "run_all", run_all)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(on_gpu, "describe_machine", lambda command: dict(machine))
    assert on_gpu.run_parity(tmp_path, 10.0) == bool(word)
    assert ("not all of parity" in capsys.readouterr().out) == bool(word)
    assert (failures.read_text() if failures.exists() else "") == "of this time" * ended
    assert not own[0].exists(), "what is measured on the way is not kept for others"


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([222, 66, 22, 170], [240, 66, 45, 170]),  # as on an H200
        ([285, 45, 22, 128], [240, 45, 45, 128]),  # a test hangs
        ([285, 90, 90, 60], [240, 45, 45, 15]),  # everything does
    ],
)
def test_what_one_part_takes_too_long_the_last_one_has_less(tmp_path, monkeypatch, taken, expected):
    now, given, takes = [0.0], [], iter(taken)

    def run_part(seconds):
        given.append(round(seconds))
        now[0] += next(takes)
        return 0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(on_gpu, "run_all", lambda commands, seconds: [run_part(seconds)])
    monkeypatch.setattr(on_gpu, "run_parity", lambda folder, seconds: run_part(seconds))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert on_gpu.main(["--output", str(tmp_path)]) == 0
    assert given == expected
    assert now[0] <= on_gpu.SECONDS + on_gpu.OVERTIME + on_gpu.LAST_WORDS


@pytest.mark.parametrize(("cores", "tests", "compilers"), [(1, 1, 1), (6, 3, 3), (12, 6, 4), (16, 12, 4), (64, 12, 4)])
def test_cores_are_shared_between_tests_and_compilers(tmp_path, monkeypatch, cores, tests, compilers):
    called = []
    monkeypatch.setattr(on_gpu, "run_all", lambda commands, *arguments: called.extend(commands) or [0] * len(commands))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(on_gpu, "describe_machine", lambda command: {"date": "2026-01-02T03", "gpu": "a GPU"})
    on_gpu.run_parity(tmp_path, 10.0)
    assert [command[0] for command in called] == ["pytest"] * tests + ["benchmarks"] * compilers + ["benchmarks.gpu"]
    times = [command[command.index("--seconds") + 1] for command in called]
    assert times == ["10"] * tests + ["8"] * (compilers + 1), "what compiles is to have ended when the tests have"
    names = [command[command.index("--configurations") + 1] for command in called[tests:-1]]
    assert sorted(",".join(names).split(",")) == sorted(on_gpu.CONFIGURATIONS)


def test_its_tests_are_collected():
    """Without a GPU nothing else imports them; here in a process that is told that there is one."""
    pytest.importorskip("triton")
    program = """if True:
        import pytest, sys, torch

        torch.cuda.is_available = lambda: True
        sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]))
    """
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=on_gpu.ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "tests/gpu/test_gpu.py::" in done.stdout
    assert "tests/gpu/test_gpu_graphs.py::" in done.stdout
    first = re.findall(r'^    "(test_\w+)",', Path(on_gpu.ROOT, "tests/gpu/conftest.py").read_text(), re.MULTILINE)
    assert len(first) > 10
    assert set(first) <= set(re.findall(r"::(test_\w+)", done.stdout)), "which of them come first"


def test_what_it_runs_is_there(monkeypatch, capsys):
    """The options that it passes are those that the benchmarks take; no more than nine minutes, whatever happens."""
    pytest.importorskip("triton")
    from benchmarks.__main__ import _parser

    assert on_gpu.SECONDS + on_gpu.OVERTIME + on_gpu.LAST_WORDS <= 9 * 60 - 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _, _, command in on_gpu.PARTS[:-1]:
        module, *arguments = on_gpu.fill_in(command, 7.6, folder="here")
        assert import_module(module).main(arguments) == 2
        assert capsys.readouterr().err == "There is no GPU here: nothing was measured.\n"
    for command in (on_gpu.PARTS[-1][2], on_gpu.ONCE):
        module, *arguments = on_gpu.fill_in(command, 7.6, folder="here", names="adnc_babi,sam_scaling")
        options = _parser().parse_args(arguments)
        assert (module, options.seconds, options.output) == ("benchmarks", 8.0, Path("here"))


def test_without_a_gpu_the_cpus_are_compared(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(on_gpu, "benchmark", lambda arguments: called.append(arguments) or 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["--seconds", "7", "--output", str(tmp_path)]) == 3
    assert called == [["run", "--device", "cpu", "--seconds", "7.0", "--output", str(tmp_path)]]
    assert "There is no GPU here" in capsys.readouterr().err


needs_make = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("make") or not shutil.which("bash"), reason="needs make and a shell"
)
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]


def sanitize(folder, script):
    """`make sanitize` with a script in the place of compute-sanitizer, and `true` in that of Python."""
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}")
    tool.chmod(0o755)
    variables = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": "more"}
    variables = {name: value for name, value in variables.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = ["make", "sanitize", "PYTHON=true", "ARGS=--note 'a b'"]
    return subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **pipes)


@needs_make
@pytest.mark.parametrize("bad", [None, "racecheck"])
def test_sanitizers_run_at_once_and_one_that_finds_something_fails(tmp_path, bad):
    """A script in their place waits until all four have begun, and finds something or not."""
    process = sanitize(
        tmp_path,
        f"touch {tmp_path}/$2\n"
        f"for i in $(seq 200); do [ $(ls {tmp_path} | grep -c check) = 4 ] && break; sleep 0.1; done\n"
        f'[ $(ls {tmp_path} | grep -c check) = 4 ] && echo begun; echo "$PYTHONPATH $@"\n[ "$2" != {bad} ]\n',
    )
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode == 0) == (bad is None), errors
    lines = printed.splitlines()
    assert sorted(line for line in lines if line.endswith("begun")) == sorted(f"{name}: begun" for name in TOOLS)
    assert [line for line in lines if "FAILED" in line] == ([f"{bad}: FAILED"] if bad else [])
    assert all(f"{name}: .:reference:more --tool {name} " in printed for name in TOOLS)
    assert "true -m pytest -m gpu -v --color=no" in printed
    assert all(line.endswith(" --note a b") for line in lines if "pytest" in line)


@needs_make
def test_no_sanitizer_outlives_an_interrupt(tmp_path):
    """As the jobs of a shell would."""
    process = sanitize(tmp_path, f"while touch {tmp_path}/$2; do sleep 0.05; done\n")
    paths = [tmp_path / name for name in TOOLS]
    deadline = time.monotonic() + 30
    try:
        while not all(path.exists() for path in paths) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode
        for path in paths:
            path.unlink()
        time.sleep(0.5)
        assert not any(path.exists() for path in paths)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
