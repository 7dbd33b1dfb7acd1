"""The tests of the kernels on a GPU: `pytest -m gpu tests/gpu`. Without one they are skipped.

`make gpu` has little time: it runs them in several processes, each of which takes the next test that no other has
taken, stops by itself and says what was not run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from dnc_triton import dispatch
from dnc_triton.sequence import graphs

# What is the same on every device is in tests/kernels.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

# What holds every kernel against the oracle comes before what surrounds it, where time is short.
FIRST = (
    "test_fifty_steps",
    "test_parity",
    "test_the_layer",
    "test_sizes",
    "test_float32",
    "test_random_problems",  # takes long
    "test_memory_step",
    "test_torch_sequence",
    "test_a_layer_in_bfloat16",
    "test_sixteen_bits_are_for_storage",
    "test_every_layout",
    "test_same_call_same_bits",
    "test_full_precision_whatever_is_allowed",
    "test_gradcheck",
    "test_trainings_are_the_same",
)
NOT_RUN = "not run: the time is up"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests on a GPU in little time")
    group.addoption("--seconds", type=float, help="begin no test after this time")
    group.addoption("--claims", type=Path, help="folder of several processes: each test is run by one of them")
    group.addoption("--record", type=Path, help="file to which a line per test is appended when it ends")


def pytest_configure(config: pytest.Config) -> None:
    # Without a default there is an error where this file is not among the first to be read.
    seconds, claims, record = (config.getoption(name, None) for name in ("--seconds", "--claims", "--record"))
    if seconds is not None or claims or record:
        config.pluginmanager.register(InLittleTime(seconds, claims, record))


class InLittleTime:
    """Runs the important tests first, begins none after the time is up, and keeps a record.

    A run that has left out a test does not succeed. With claims, a process in which the device stops working ends, and
    leaves the remaining tests to the others.
    """

    def __init__(self, seconds: float | None, claims: Path | None, record: Path | None) -> None:
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds
        self.claims = claims
        self.record = record
        self.not_run = 0

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: FIRST.index(item.originalname) if item.originalname in FIRST else len(FIRST))
        self.write(f"{len(items)} tests")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if self.claims is None or session.testsfailed:  # by an error while they were collected
            return None
        self.claims.mkdir(parents=True, exist_ok=True)
        for item in session.items:
            try:
                # With the test's name in it, which tells what never ended.
                with (self.claims / sha256(item.nodeid.encode()).hexdigest()).open("x", encoding="utf-8") as claim:
                    claim.write(item.nodeid)
            except FileExistsError:
                continue
            failed = session.testsfailed
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)  # nobody knows yet which comes next
            if session.testsfailed > failed and not device_works():
                raise session.Interrupted("the device has stopped working in this process")
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self.deadline:
            self.not_run += 1
            pytest.skip(NOT_RUN)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        late = report.skipped and NOT_RUN in str(report.longrepr)
        self.write(f"{'not run' if late else report.outcome}: {report.nodeid}, {report.duration:.1f} s")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.not_run and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.not_run:
            terminalreporter.write_line(f"{self.not_run} tests were {NOT_RUN}. This is not all of parity.", red=True)

    def write(self, line: str) -> None:
        if self.record is not None:
            with self.record.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def device_works() -> bool:
    """Whether the device still works in this process; after an access out of bounds, say, it does nothing any more."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test depends neither on what is fastest here nor on the tests before it: nothing is remembered."""
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    monkeypatch.setenv("DNC_TRITON_CACHE", "/dev/null/nowhere")
    monkeypatch.setattr(dispatch, "_settled", {})  # some have layouts of their own, for problems that others have too
    monkeypatch.setattr(graphs, "_graphs", {})


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Products outside of the kernels are in full precision, even where the environment asks for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
