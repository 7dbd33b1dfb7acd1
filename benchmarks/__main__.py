"""The command line: measure configurations on the CPU, write the results, print a table.

python -m benchmarks --configurations sam_scaling,adnc_babi --rounds 10
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.configurations import CONFIGURATIONS
from benchmarks.machine import describe_machine
from benchmarks.measure import Row, measure

HERE = Path(__file__).parent
BUSY = 0.5  # processes running on average in the last minute; threads that wait for a core cost up to a hundredfold


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit status: 1 if our layer was wrong on a configuration."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    torch.set_num_threads(options.threads)
    machine = describe_machine(shlex.join(["python", "-m", "benchmarks", *arguments]))
    if machine["load"] > BUSY:
        print(f"Other programs are running (load {machine['load']:.1f}): expect times far too long", file=sys.stderr)

    rows = [
        row for name in options.configurations for row in measure(name, CONFIGURATIONS[name], rounds=options.rounds)
    ]
    records = [_record(row, machine, options.rounds) for row in rows]
    stem = options.output / f"cpu-{machine['date'][:10]}"
    _write_csv(stem.with_suffix(".csv"), records)
    _write_json(stem.with_suffix(".json"), {"machine": machine, "rows": records})

    print(_markdown_table(rows))
    for note in dict.fromkeys(row.note for row in rows if row.note):
        print(f"Not measured: {note}")
    print(f"Written: {stem}.csv, {stem}.json")
    return 1 if any(row.status == "wrong" for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Milliseconds per time step, forward and backward, of this project's DNC and of its peers, taking "
        "turns in one process on the CPU. The layer is timed only if it agrees with the float64 oracle.",
        epilog=f"configurations: {', '.join(CONFIGURATIONS)}",
    )
    every = ",".join(CONFIGURATIONS)
    parser.add_argument(
        "--configurations", type=_names, default=every, metavar="A,B", help="which ones, with commas (default: all)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=50, metavar="N", help="how often each is timed (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=_positive, default=2, metavar="N", help="of torch's operations (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "results",
        metavar="DIR",
        help="folder for cpu-<date>.csv and .json, which replace those of the same day (default: %(default)s)",
    )
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONFIGURATIONS:
            known = ", ".join(CONFIGURATIONS)
            raise argparse.ArgumentTypeError(f"unknown configuration {name!r}, expected some of {known}")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _record(row: Row, machine: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A row that can be read without the others: what was measured, on what sizes, by what means."""
    means = {key: machine[key] for key in ("cpu", "threads", "load", "python", "torch", "commit", "date")}
    return {**asdict(row), "rounds": rounds, "dtype": "float32", **asdict(CONFIGURATIONS[row.configuration]), **means}


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _markdown_table(rows: list[Row]) -> str:
    lines = [
        "| configuration | N | W | R | H | B | T | who | ms per step, median | 20th to 80th percentile | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        c = CONFIGURATIONS[row.configuration]
        hidden = c.hidden_size if c.num_layers == 1 else f"{c.num_layers}×{c.hidden_size}"
        cells = [row.configuration, c.memory_size, c.word_size, c.num_reads, hidden, c.cpu_batch, c.cpu_steps, row.peer]
        if row.status == "measured":
            spread = f"{row.ms_per_step_p20:.2f} to {row.ms_per_step_p80:.2f}"
            cells += [f"{row.ms_per_step_p50:.2f}", spread, f"{row.ratio:.2f}"]
        else:
            cells += [row.status, "", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
