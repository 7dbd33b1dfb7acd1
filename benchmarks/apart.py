"""Peers that are measured in a process of their own, which may crash without harm to the others (`Peer.apart`)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.configurations import Case
from benchmarks.measure import Session
from benchmarks.peers import OURS

Record = dict[str, Any]
SHARE = 0.35  # part of the remaining time for one such peer
LEAST_SECONDS = 20.0  # with less a process would hardly get beyond importing and compiling
NOTHING = "ended with status 2"  # nothing was measured
OVERTIME = 15.0  # seconds past its limit until it is killed: importing comes before its clock starts, ending after


def measure_apart(
    name: str, cases: Sequence[Case], modes: Sequence[str], options: argparse.Namespace, session: Session
) -> Iterator[list[Record]]:
    """Measure one peer on a GPU, a process per mode: the first mode on every case matters more than every mode on one.

    Args:
        name: of the peer.
        cases: without those of sweeps.
        modes: in the order in which to measure.
        options: of the run, as on the command line.
        session: the run's settings. At most `SHARE` of its time is taken; what went wrong is noted in `left_out`.

    Yields:
        after each mode its rows as they are written, without a ratio. A process that dies leaves what it has done.
    """
    now = time.monotonic()
    deadline = now + SHARE * (session.deadline - now)
    for mode in modes if cases else []:
        where = f"{name}, {mode}, in a process of its own"
        seconds = deadline - time.monotonic()
        if seconds < LEAST_SECONDS:
            session.left_out.append(f"{where}: the time is up")
            continue
        session.report(where)
        records: list[Record] = []
        interrupted = False
        with tempfile.TemporaryDirectory() as folder:
            try:
                status = _run(_command(name, mode, cases, options, seconds, folder), seconds, Path(folder, "log"))
            except KeyboardInterrupt:
                status, interrupted = "interrupted", True
            for path in Path(folder).glob("*.json"):
                try:
                    results = files.read_results(path)
                except ValueError as error:  # killed while it wrote the file
                    status = str(error)
                    continue
                records += results["rows"]
                notes = results.get("left_out", [])
                session.left_out += [f"{where}: {note}" for note in notes]
                if (notes or results["rows"]) and status.startswith(NOTHING):  # these say why
                    status = ""
        if status:
            session.left_out.append(f"{where}: {status}")
        yield records
        if interrupted:
            raise KeyboardInterrupt


def _command(
    name: str, mode: str, cases: Sequence[Case], options: argparse.Namespace, seconds: float, folder: str
) -> list[str]:
    values = {
        "device": "cuda",
        "peers": name,  # the only one, so that it is measured in that process
        "modes": mode,
        "configurations": ",".join(case.configuration for case in cases),
        "rounds": options.rounds,
        "case-seconds": options.case_seconds,
        "compile-seconds": options.compile_seconds,
        "threads": options.threads,
        "output": folder,
    }
    if seconds < float("inf"):
        values["seconds"] = f"{seconds:.0f}"
    flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "benchmarks", "run", *flags, "--no-memory", "--no-report"]


def _run(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run the command, and return what went wrong; empty if nothing did."""
    limit = seconds + OVERTIME if seconds < float("inf") else None
    with log.open("wb") as file:  # not a pipe: its children may hold that open after its end
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return "killed, for it did not stop when its time was up"
    if not done.returncode:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()  # those of a progress bar end with \r
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"ended with status {done.returncode}: {last}"


def merge(
    records: Sequence[Record],
    apart: Sequence[Record],
    configurations: Sequence[str],
    modes: Sequence[str],
    peers: Sequence[str],
) -> list[Record]:
    """The rows of a run and those measured apart, which get their ratio here, sorted as the three lists."""
    ours = {(row["configuration"], row["mode"]): row["ms_per_step_p50"] for row in records if row["peer"] == OURS}
    rows = list(records)
    for row in apart:
        theirs, own = row["ms_per_step_p50"], ours.get((row["configuration"], row["mode"]))
        rows.append({**row, "ratio": theirs / own if theirs and own else None})
    return sorted(
        rows,
        key=lambda row: (
            configurations.index(row["configuration"]),
            modes.index(row["mode"]),
            peers.index(row["peer"]),
        ),
    )
