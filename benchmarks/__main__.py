"""The command line: measure, report, compare.

python -m benchmarks --configurations sam_scaling,adnc_babi --rounds 10
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import apart, compare, files, report
from benchmarks.configurations import CONFIGURATIONS, SWEEPS, Case, LeftOutError, case_of, sweep_cases
from benchmarks.floors import bytes_per_second, product_speed
from benchmarks.goals import MOST_MICROSECONDS
from benchmarks.machine import describe_machine
from benchmarks.measure import FAILED, MEASURED, WRONG, Row, Session, in_a_line, measure
from benchmarks.modes import CAPTURED, MODES, TRAINING, TRAINS, modes_on
from benchmarks.peers import PEERS, is_ours
from benchmarks.progress import Progress
from dnc_triton.cli import INTERRUPTED

HERE = Path(__file__).parent
BUSY = 0.5  # average number of running processes in the last minute; waiting for a core costs up to a hundredfold


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        its exit status. 1: this project's layer or a backend was wrong or failed somewhere, the device stopped working,
        or `compare` found a regression. 2: nothing was measured, or compared, or a file could not be read or written.
        130: it was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "compare":
        return _compare(options)
    if options.command == "report":
        return _report(options)
    files.make_output(parser, options.output)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    started = time.monotonic()
    statuses = []
    for device in _devices(options.device):
        statuses.append(_run(torch.device(device), options, command, started))
        if statuses[-1] == INTERRUPTED:
            break
    return max(statuses, default=2)


# --- run --------------------------------------------------------------------------------------------------------------


def _devices(asked: Sequence[str]) -> list[str]:
    """The devices asked for that exist here; a message about those that do not."""
    here = torch.cuda.is_available()
    devices = ["cuda" if here else "cpu"] if "auto" in asked else list(dict.fromkeys(asked))
    if "cuda" in devices and not here:
        print("There is no GPU here: nothing was measured on one", file=sys.stderr)
        devices.remove("cuda")
    return devices


def _run(device: torch.device, options: argparse.Namespace, command: str, started: float) -> int:
    """Measure on one device, write, report."""
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers set another one by a variable
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # all compute in float32
    machine = {"device": device.type, **describe_machine(command)}
    if device.type == "cpu" and machine["load"] > BUSY:
        print(f"Other programs are running (load {machine['load']:.1f}): expect times far too long", file=sys.stderr)
    machine["bytes_per_second"] = bytes_per_second(device)
    machine["operations_per_second"] = product_speed(device)

    cases, notes = _cases(options, device.type)
    modes = [mode for mode in options.modes or MODES if mode in modes_on(device.type)]
    if CAPTURED in options.modes and CAPTURED not in modes:
        notes.append(f"{CAPTURED}: CUDA graphs need a GPU")
    session = Session(
        device=device,
        bytes_per_second=machine["bytes_per_second"],
        rounds=options.rounds,
        case_seconds=options.case_seconds,
        compile_seconds=options.compile_seconds,
        deadline=float("inf") if options.seconds is None else started + options.seconds,
        peak_memory=not options.no_memory,
        left_out=notes,
    )
    stem = options.output / f"{'gpu' if device.type == 'cuda' else 'cpu'}-{machine['date'][:10]}"
    another = stem.with_suffix(".json").exists()  # an earlier run's results are worth more than none

    def write(rows: list[dict[str, Any]]) -> None:
        if _tried(rows) or not another:
            files.write_results(stem, machine, rows, session.left_out)

    rows, interrupted = _measure_all(cases, modes, options, session, write)
    if not _tried(rows):
        notes = report.notes_of({"left_out": session.left_out, "rows": rows})
        print("Nothing was measured:", *notes, sep="\n- ", file=sys.stderr)
        return INTERRUPTED if interrupted else 2
    if not options.no_report:
        _write_report({"machine": machine, "left_out": session.left_out, "rows": rows}, stem)
    if interrupted:
        return INTERRUPTED
    return 1 if session.lost or any(row["status"] == WRONG or _broke(row) for row in rows) else 0


def _measure_all(
    cases: list[Case],
    modes: list[str],
    options: argparse.Namespace,
    session: Session,
    write: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], bool]:
    """Returns all rows, which are written whenever there are new ones, and whether it was interrupted."""
    on_gpu = session.device.type == "cuda"
    named = options.peers or [name for name, peer in PEERS.items() if on_gpu or not peer.gpu_only]
    alone = [name for name in named if on_gpu and len(named) > 1 and PEERS[name].apart]
    records: list[dict[str, Any]] = []
    records_apart: list[dict[str, Any]] = []

    def write_rows() -> list[dict[str, Any]]:
        rows = apart.merge(records, records_apart, [case.configuration for case in cases], modes, named)
        write(rows)
        return rows

    jobs = _jobs(cases, modes)
    with Progress(sum(len(of_job) for _, of_job in jobs)) as progress:
        session.report = progress.describe

        def done(of_a_mode: list[Row]) -> None:
            records.extend(map(files.record_of, of_a_mode))
            write_rows()  # so that it is there if the run is killed
            progress.advance()

        now, interrupted = "what is measured apart", False
        try:
            for name in alone:  # first, so that the others can use what it leaves of its time
                of_peer = [mode for mode in modes if mode != CAPTURED or PEERS[name].captured]
                if of_peer != modes:
                    session.left_out.append(f"{name}: it is not captured")
                for rows in apart.measure_apart(name, [c for c in cases if not c.sweep], of_peer, options, session):
                    records_apart += rows
                    write_rows()
            for case, of_job in jobs:
                now = case.configuration
                peers = [name for name in named if not case.sweep or PEERS[name].sweeps or options.peers]
                measure(case, [name for name in peers if name not in alone], of_job, session, done)
        except KeyboardInterrupt:
            interrupted = True
            session.left_out.append(f"{now} and what follows: interrupted")
        return write_rows(), interrupted


def _tried(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether anything was measured, or found to be wrong or to fail."""
    return any(row["status"] in (MEASURED, WRONG, FAILED) for row in rows)


def _broke(row: dict[str, Any]) -> bool:
    """Whether the project's layer or a backend of it raised. Others may, as the eager reference for lack of memory."""
    return row["status"] == FAILED and is_ours(row["peer"])


def _cases(options: argparse.Namespace, device: str) -> tuple[list[Case], list[str]]:
    """What to measure, and notes on what cannot be measured on this device."""
    cases, notes = [], []
    for name in options.configurations:
        try:
            cases.append(case_of(name, CONFIGURATIONS[name], device))
        except LeftOutError as reason:
            notes.append(str(reason))
    if not options.configurations and not options.sweeps:
        notes.append("neither configurations nor sweeps were asked for")
    return cases + sweep_cases(options.sweeps, device), notes


def _jobs(cases: Sequence[Case], modes: list[str]) -> list[tuple[Case, list[str]]]:
    """What is measured together, in order, should time run out: trainings first, of networks with goals before others.

    A sweep shows how training scales, or the modes asked for if training is not among them.
    """
    networks = [case for case in cases if not case.sweep]
    with_goals = [case for case in networks if case.configuration in MOST_MICROSECONDS]
    others = [case for case in networks if case not in with_goals]
    order = [(with_goals, TRAINS), (others, [TRAINING]), (others, [CAPTURED]), (networks, MODES.keys() - TRAINS)]
    jobs = [(case, some) for group, of in order if (some := [mode for mode in modes if mode in of]) for case in group]
    return jobs + [(case, [TRAINING] if TRAINING in modes else modes) for case in cases if case.sweep]


# --- report and compare -----------------------------------------------------------------------------------------------


def _write_report(results: dict[str, Any], stem: Path) -> None:
    """Write <stem>.md and the pictures, and print the tables."""
    pictures: list[Path] = []
    if find_spec("matplotlib"):
        from benchmarks.pictures import draw

        pictures = draw(results, stem)
    else:
        print("No pictures: matplotlib is not installed; install it with: pip install matplotlib", file=sys.stderr)
    page = report.markdown(results, [path.name for path in pictures])
    _beside(stem, ".md").write_text(page, encoding="utf-8")
    print(page)
    print(f"Written: {', '.join(str(path) for path in [*_written(stem), *pictures])}")


def _written(stem: Path) -> list[Path]:
    return [path for path in (_beside(stem, suffix) for suffix in (".json", ".csv", ".md")) if path.exists()]


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # a stem may have a dot of its own


def _report(options: argparse.Namespace) -> int:
    try:
        results = files.read_results(options.result)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        _write_report(results, options.result.with_suffix(""))
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:  # of numbers that `run` never writes
        print(f"{options.result}: expected results as `run` writes them: {in_a_line(error)}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> int:
    try:
        old, new = files.read_results(options.old), files.read_results(options.new)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    comparison = compare.compare(old, new, options.margin / 100)
    print(compare.describe(comparison, options.margin / 100))
    return 1 if comparison.regressions else 0 if comparison.compared else 2


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="How long a DNC takes per time step: this project's layer and its backends beside the reference, "
        "eager and compiled, the package dnc of PyPI, and nn.LSTM, taking turns in one process, on a GPU if there is "
        "one; there torch.compile with CUDA graphs goes before them, in a process of its own. A network is timed only "
        "if it agrees with the float64 oracle, except dnc and nn.LSTM, which compute something else.",
        epilog="Without a command: run. `python -m benchmarks run --help` lists its arguments.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands.add_parser("run", help="measure, write the results, print the tables", epilog=_epilog()))
    told = commands.add_parser("report", help="write the tables and pictures of a result beside it")
    told.add_argument("result", type=Path, metavar="RESULT", help="a JSON file that `run` has written")
    compared = commands.add_parser("compare", help="what became slower: status 1 if anything, 2 if nothing can be told")
    compared.add_argument("old", type=Path, metavar="OLD", help="a JSON file that `run` has written")
    compared.add_argument("new", type=Path, metavar="NEW", help="a later one, of the same machine")
    compared.add_argument(
        "--margin",
        type=_number,
        default=100 * compare.MARGIN,
        metavar="PERCENT",
        help="slower means: the 20th percentile exceeds the old 80th by more than this (default: %(default)g)",
    )
    return parser


def _epilog() -> str:
    known = {
        "Configurations": list(CONFIGURATIONS),
        "Peers": list(PEERS),
        "Modes": list(MODES),
        "Sweeps": list(SWEEPS),
    }
    return " ".join(f"{title}: {', '.join(names)}." for title, names in known.items())


def _add_run(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, kind: Callable[[str], Any], default: Any, metavar: str, text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)

    devices = {"auto": None, "cpu": None, "cuda": None}
    add("--device", _some("device", devices), "auto", "A,B", "auto, cpu, cuda (default: the GPU if there is one)")
    every = ",".join(CONFIGURATIONS)
    add("--configurations", _some("configuration", CONFIGURATIONS), every, "A,B", "networks to measure (default: all)")
    add("--sweeps", _some("sweep", SWEEPS), [], "A,B", "sizes to vary, one at a time: B,N,T (default: none)")
    add("--peers", _some("peer", PEERS), [], "A,B", "implementations to measure (default: all that can run here)")
    add("--modes", _some("mode", MODES), [], "A,B", "what to time (default: all that can be done here)")
    add("--rounds", _positive, 30, "N", "how often each is timed, at most (default: %(default)s)")
    add(
        "--case-seconds",
        _number,
        10.0,
        "S",
        "limit for the rounds of a case; at least 5 are timed, 3 of slow peers (default: %(default)g)",
    )
    add("--compile-seconds", _number, 150.0, "S", "no torch.compile once it has taken this long (default: %(default)g)")
    add("--seconds", _number, None, "S", "start nothing after this time, and say what was left out (default: no limit)")
    add("--threads", _positive, 2, "N", "threads of PyTorch's operations on the CPU (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-report", action="store_true", help="write .json and .csv only, no tables and pictures")
    add(
        "--output",
        Path,
        HERE / "results",
        "DIR",
        "folder for cpu-<date> or gpu-<date> .json, .csv, .md and pictures, which replace those of the same day "
        "(default: %(default)s)",
    )


def _some(what: str, known: Any) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}, expected some of {', '.join(known)}")
        return list(dict.fromkeys(found))

    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
