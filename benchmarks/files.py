"""Results on disk: JSON with everything, and CSV in which each row can be read by itself."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.configurations import Case
from benchmarks.measure import MEASURED, Row
from dnc_triton.files import write, write_table

# What every row of the CSV repeats, so that it can be read by itself.
MEANS = ("device", "cpu", "gpu", "threads", "load", "python", "torch", "triton", "commit", "date")
NEEDED = ("configuration", "peer", "mode", "status", "ms_per_step_p20", "ms_per_step_p50", "ms_per_step_p80")


def make_output(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Make the folder that `--output` names; end the program with a message if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    if not os.access(folder, os.W_OK):
        parser.error(f"argument --output: {folder} cannot be written to")


def record_of(row: Row) -> dict[str, Any]:
    """A row as it is written: a flat record."""
    record = asdict(row)
    return {**record.pop("case"), "dtype": "float32", **record}


def case_of_record(record: dict[str, Any]) -> Case:
    """The case of such a row."""
    return Case(**{field.name: record[field.name] for field in fields(Case)})


def write_results(stem: Path, machine: dict[str, Any], rows: list[dict[str, Any]], left_out: list[str]) -> None:
    """Write <stem>.json and <stem>.csv, each whole or not at all."""
    means = {key: machine[key] for key in MEANS}
    write_json(stem.with_suffix(".json"), {"machine": machine, "left_out": left_out, "rows": rows})
    write_table(stem.with_suffix(".csv"), [{**row, **means} for row in rows])


def write_json(path: Path, content: Any) -> None:
    """Write all of it, or leave the file as it was."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` has written as JSON.

    Raises:
        ValueError: the file cannot be read, or holds no results of this benchmark.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    results: dict[str, Any] = content if isinstance(content, dict) else {}
    if not isinstance(results.get("rows"), list) or not isinstance(results.get("machine"), dict):
        raise ValueError(f"{path}: expected a JSON object with machine and rows")
    for row in results["rows"]:
        missing = [key for key in NEEDED if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}: expected rows with {', '.join(NEEDED)}; {missing[0]} is missing in one")
        names, times = [row[key] for key in NEEDED[:4]], [row[key] for key in NEEDED[4:]]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: expected text for {', '.join(NEEDED[:4])}, got {names}")
        if row["status"] == MEASURED and not all(isinstance(ms, int | float) and ms > 0 for ms in times):
            raise ValueError(f"{path}: expected times above 0 where a row was measured, got {times}")
    return results
