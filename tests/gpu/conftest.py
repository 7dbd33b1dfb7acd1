"""The tests of the kernels on a GPU: `pytest -m gpu tests/gpu`. Without one they are skipped.

`make gpu` has little time: it runs them in several processes, each with a part of them, which stop by themselves and
say what was not run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
    "test_layouts",
    "test_same_call_same_bits",
    "test_full_precision_whatever_is_allowed",
    "test_gradcheck",
    "test_trainings_are_the_same",
)
NOT_RUN = "not run: the time is up"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests on a GPU in little time")
    group.addoption("--seconds", type=float, help="begin no test after this time")
    group.addoption("--part", help="K/N: of N parts, in the order of importance, the K-th")
    group.addoption("--record", type=Path, help="file to which a line per test is appended when it ends")


def pytest_configure(config: pytest.Config) -> None:
    # Without a default there is an error where this file is not among the first to be read.
    seconds, part, record = (config.getoption(name, None) for name in ("--seconds", "--part", "--record"))
    if seconds is not None or part or record:
        config.pluginmanager.register(InLittleTime(seconds, part or "1/1", record))


class InLittleTime:
    """Picks a part of the tests, the important ones first, begins none after the time is up, and keeps a record.

    A run that has left out a test does not succeed.
    """

    def __init__(self, seconds: float | None, part: str, record: Path | None) -> None:
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds
        self.part, self.parts = map(int, part.split("/"))
        self.record = record
        self.not_run = 0

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: FIRST.index(item.originalname) if item.originalname in FIRST else len(FIRST))
        items[:] = items[self.part - 1 :: self.parts]
        self.write(f"{len(items)} tests in part {self.part}/{self.parts}")

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


@pytest.fixture(autouse=True)
def _first_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested does not depend on what is the fastest here: nothing is measured, or remembered."""
    monkeypatch.setenv("DNC_TRITON_MEASURE", "0")
    monkeypatch.setenv("DNC_TRITON_CACHE", "/dev/null/nowhere")


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Of products outside of the kernels, also where the environment asks for TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
