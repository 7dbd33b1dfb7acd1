"""Everything that is done on a GPU, in under nine minutes: `make gpu`.

First parity, in several processes at once, since most of its time is compilation. Meanwhile the benchmarks run once
just to fill the compilers' caches; their times are thrown away. Then one thing at a time: the memory step in every
layout, the memory that training takes, and the benchmark with its report. Each part stops by itself when its time is
up, and has written its results so far; one that does not stop is interrupted, and finally killed. The time that it
overran is taken from the last part, so that one hanging test does not leave the memory step without any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.__main__ import main as benchmark
from benchmarks.configurations import CONFIGURATIONS
from benchmarks.files import make_output
from benchmarks.machine import describe_machine
from dnc_triton.cli import INTERRUPTED

ROOT = Path(__file__).parents[1]
SECONDS = 480.0
# When a part stops by itself, as a share of all the time. What one part does not need, the later ones have.
PARITY = 0.5
# The peers that goals are set against, if they do not compile for minutes. `torch.compile` of the reference, and our
# backends one by one, are left to `make bench`, which has more time.
PEERS = "dnc_triton,reference,pypi_dnc,lstm"
STEP = "benchmarks.gpu --no-compiled --seconds {seconds} --output {folder}"
PARTS = [
    ("the memory step", 0.6, STEP),
    ("lean memory", 0.64, "benchmarks.lean --device cuda --output {folder}/lean-gpu.json"),
    (
        "the benchmark",
        1.0,
        f"benchmarks run --device cuda --peers {PEERS} --sweeps B,N,T --rounds 15 --case-seconds 1.5 "
        "--seconds {seconds} --output {folder}",
    ),
]
TESTS = (
    "pytest -m gpu -q --color=no -p no:cacheprovider -o faulthandler_timeout=60 tests/gpu "  # says where it hangs
    "--claims {folder}/claims --seconds {seconds} --record {record}"
)
ONCE = (
    f"benchmarks run --device cuda --peers {PEERS} --modes training --rounds 1 --case-seconds 0 --no-memory "
    "--no-report --configurations {names} --seconds {seconds} --output {folder}"
)
LEAST = 45.0  # seconds that a part gets whatever those before it took, as long as so many are left
OVERTIME, LAST_WORDS = 30.0, 15.0  # seconds until a part is interrupted; from then on until it is killed
MANY_CORES, MOST_TESTS = 16, 12  # with 16 cores or more, 12 processes for parity; with fewer, one for two cores
MOST_COMPILERS = 4  # beside them, each with threads; they use the cores that the tests leave
NICE = 10  # their priority
COMPILING = 0.75  # they begin nothing after this share of parity's time, so that the tests need not wait for them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 0 if all of parity ran and nothing failed, 130 if interrupted.

    Without a GPU, only the comparison on this CPU is run; the status is its status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin nothing after this time (%(default)g)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "There is no GPU here: no parity on one, and no times of the kernels; `make test` interprets them. What "
            "follows is the comparison on this CPU.",
            file=sys.stderr,
        )
        seconds, output = str(options.seconds), str(options.output)
        return benchmark(["run", "--device", "cpu", "--seconds", seconds, "--output", output])
    # A shell's background jobs ignore interrupts, and so would the parts, which must stop at one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()

    def left(share: float) -> float:
        return max(0.0, started + share * options.seconds - time.monotonic())

    folder = options.output.resolve()
    make_output(parser, folder)
    try:
        statuses = {"parity": run_parity(folder, left(PARITY))}
        for name, share, command in PARTS:
            seconds = max(left(share), min(LEAST, left(1.0)))
            print(f"--- {name}: {seconds:.0f} s", flush=True)
            (statuses[name],) = run_all([fill_in(command, seconds, folder=folder)], seconds)
    except KeyboardInterrupt:
        print(f"Interrupted. What was measured until then is in {folder}.", file=sys.stderr)
        return INTERRUPTED
    print(
        f"Done in {time.monotonic() - started:.0f} s.",
        *(f"{name}: {word(status)}." for name, status in statuses.items()),
    )
    return 1 if any(statuses.values()) else 0


def fill_in(command: str, seconds: float, **values: object) -> list[str]:
    """A command with its time and its other values, as a list."""
    return shlex.split(command.format(seconds=round(seconds), **{k: shlex.quote(str(v)) for k, v in values.items()}))


def word(status: int) -> str:
    """What an exit status means."""
    return {0: "all right", 1: "wrong or incomplete, see above"}.get(status, f"ended with status {status}")


def run_parity(output: Path, seconds: float) -> int:
    """Run the tests in tests/gpu and, to fill the compilers' caches, the benchmarks. Returns the tests' status."""
    machine = describe_machine("make gpu")
    record = output / f"gpu-parity-{machine['date'][:10]}.txt"
    failures = record.with_name(f"{record.stem}-failures.txt")
    failures.unlink(missing_ok=True)
    record.write_text(json.dumps(machine, ensure_ascii=False) + "\n", encoding="utf-8")
    cores = os.cpu_count() or 2
    count = MOST_TESTS if cores >= MANY_CORES else max(1, cores // 2)
    print(f"--- parity: {count} processes, {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the rest matters more
        tests = [fill_in(TESTS, seconds, folder=folder, record=record)] * count
        compiling = min(count, MOST_COMPILERS)
        names = [",".join(list(CONFIGURATIONS)[part::compiling]) for part in range(compiling)]
        compilers = [fill_in(ONCE, COMPILING * seconds, names=some, folder=folder) for some in names if some]
        compilers.append(fill_in(STEP, COMPILING * seconds, folder=folder))
        variables = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2", "DNC_TRITON_CACHE": folder}
        logs = [Path(folder, f"{index}.log") for index in range(len(tests + compilers))]
        statuses = run_all(tests + compilers, seconds, logs, variables, len(compilers))[:count]
        for status, log in zip(statuses, logs, strict=False):
            if status:
                printed = log.read_text(encoding="utf-8", errors="replace")
                print(printed[-6000:])
                with failures.open("a", encoding="utf-8") as file:  # all of it: the logs' folder is deleted
                    file.write(printed)
        claimed = [claim.read_text(encoding="utf-8") for claim in Path(folder, "claims").glob("*")]
    lines = record.read_text(encoding="utf-8").splitlines()[1:]
    outcomes = {}
    for line in lines:
        outcome, _, test = line.partition(": ")
        if test.startswith("tests/"):  # by name, without seconds; what fails in its teardown has a second line
            outcomes[test.rpartition(", ")[0]] = outcome
    # Tests that hung, or ended their process.
    lost = [f"not ended: {test}" for test in sorted(claimed) if test and test not in outcomes]
    counts = Counter(outcomes.values())
    total = max((int(line.split()[0]) for line in lines if line.endswith(" tests")), default=0)
    missing = total - sum(counts[name] for name in ("passed", "failed", "skipped"))
    counted = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    complete = missing == 0 and counts["passed"] and not any(statuses)
    text = f"Parity on {machine['gpu']}: {counted}, {missing} not run."
    text += "" if complete else " This is not all of parity."
    with record.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in [*lost, text])
    written = [str(path) for path in (record, failures) if path.exists()]
    told = [line for line in lines if line.startswith(("failed", "not run"))] + lost
    print(text, *told, f"Written: {', '.join(written)}", sep="\n")
    return 0 if complete else 1


def run_all(
    commands: Sequence[Sequence[str]],
    seconds: float,
    logs: Sequence[Path] | None = None,
    variables: dict[str, str] | None = None,
    giving_way: int = 0,
) -> list[int]:
    """Run modules of Python side by side.

    Args:
        commands: each a module and its arguments.
        seconds: after which they should have stopped. `OVERTIME` later they are interrupted.
        logs: a file each for what they print; without, they print here.
        variables: of the environment, added to the present ones.
        giving_way: how many of the commands, the last ones, use only cores that the others do not need.

    Returns:
        the exit statuses, negative for those that had to be killed.
    """
    deadline = time.monotonic() + seconds + OVERTIME
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index, command in enumerate(commands):
            log = logs[index].open("wb") if logs else None
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    stdout=log,
                    stderr=subprocess.STDOUT if log else None,
                    cwd=ROOT,
                    env={**os.environ, **(variables or {})},
                    start_new_session=True,  # a group, so that what they start ends with them
                )
            )
            if log:
                log.close()
            if index >= len(commands) - giving_way:
                nice = max(NICE, os.getpriority(os.PRIO_PROCESS, 0))
                with suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, processes[-1].pid, nice)  # its threads, still to come, inherit it
        try:
            _stop(processes, deadline)
        except KeyboardInterrupt:  # it does not reach processes in groups of their own
            _stop(processes, time.monotonic())
            raise
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _stop(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait for all until `deadline`, interrupt those still running, and kill the rest `LAST_WORDS` later."""
    for limit, number in ((deadline, signal.SIGINT), (deadline + LAST_WORDS, signal.SIGKILL)):
        for process in processes:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
