"""The recorded numbers of each Triton version: read them, rewrite them, compare them with new ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from benchmarks.static.cases import cases
from benchmarks.static.measuring import Measurement, Numbers

RECORD = Path(__file__).parent.parent / "results" / "static.json"


def read_record(path: Path) -> dict[str, Numbers]:
    """The numbers recorded for this version of Triton, by case; empty if there are none."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {case: Numbers(**numbers) for case, numbers in recorded.get(triton.__version__, {}).items()}


def update_record(measurements: Iterable[Measurement], path: Path) -> None:
    """Record these numbers for this version of Triton; drop those of cases that no longer exist."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {str(measured.case): asdict(measured.numbers) for measured in measurements if measured.numbers}
    before = recorded.get(triton.__version__, {})
    numbers = {name: now.get(name, before.get(name)) for name in map(str, cases(complete=True))}
    recorded[triton.__version__] = {name: entry for name, entry in numbers.items() if entry}
    versions = []
    for version, numbers in sorted(recorded.items()):
        lines = [f"    {json.dumps(case)}: {json.dumps(entry)}" for case, entry in numbers.items()]
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n", encoding="utf-8")


def worse_than_recorded(measurements: Iterable[Measurement], record: dict[str, Numbers]) -> list[str]:
    """Numbers that grew, and cases that were never recorded."""
    found = []
    for measurement in measurements:
        if measurement.numbers is None:  # reported as a problem of its own
            continue
        before = record.get(str(measurement.case))
        if before is None:
            found.append(f"{measurement.case}: not recorded")
            continue
        for name, number in asdict(measurement.numbers).items():
            if number > (was := getattr(before, name)):
                found.append(f"{measurement.case}: {name} {was} -> {number}")
    return found
