"""Compare two results of the benchmark: what became slower, beyond what noise explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.configurations import SIZES
from benchmarks.measure import FAILED, MEASURED, WRONG
from benchmarks.peers import PEERS

MARGIN = 0.05
MACHINE = ("device", "cpu", "gpu", "threads", "python", "torch", "triton", "environment")

# Peers with code that this project does not change: their times tell whether the machine was the same.
FOREIGN = [name for name, peer in PEERS.items() if not peer.checked]

Key = tuple[str, str, str]


@dataclass
class Comparison:
    """What differs, in words.

    Attributes:
        regressions: slower beyond the noise, or measured before and now wrong or failed.
        improvements: faster beyond the noise.
        incomparable: on one side only, not measured on one side, or of other sizes.
        cautions: why times may differ even where the code does not.
        compared: how many rows have times on both sides.
    """

    regressions: list[str] = field(default_factory=list)
    improvements: list[str] = field(default_factory=list)
    incomparable: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    compared: int = 0


def compare(old: dict[str, Any], new: dict[str, Any], margin: float = MARGIN) -> Comparison:
    """Compare two results, row by row.

    A row has become slower if its new 20th percentile exceeds the old 80th by more than the margin: the fast end of the
    new times is slower than the slow end of the old ones. Faster is the reverse. The noise within a run is not that
    between two runs: where others' code differs as much, a caution says so.

    Args:
        old, new: as `read_results` gives them.
        margin: a fraction, 0.05 for 5 %.
    """
    found = Comparison()
    for name in MACHINE:
        before, now = old["machine"].get(name) or None, new["machine"].get(name) or None
        if before != now:
            found.cautions.append(f"{name}: {before} before, {now} now")
    old_rows, new_rows = _by_key(old), _by_key(new)
    for key in {**old_rows, **new_rows}:
        _compare_rows(key, old_rows.get(key), new_rows.get(key), margin, found)
    return found


def _by_key(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {(row["configuration"], row["mode"], row["peer"]): row for row in results["rows"]}


def _compare_rows(
    key: Key, old: dict[str, Any] | None, new: dict[str, Any] | None, margin: float, found: Comparison
) -> None:
    name = ", ".join(key)
    if old is None or new is None:
        found.incomparable.append(f"{name}: only in the {'new' if old is None else 'old'} results")
        return
    resized = [size for size in ("batch", "steps", *SIZES) if size in old and size in new and old[size] != new[size]]
    if resized:
        changes = ", ".join(f"{size} {old[size]} → {new[size]}" for size in resized)
        found.incomparable.append(f"{name}: other sizes, {changes}")
        return
    if old["status"] != MEASURED or new["status"] != MEASURED:
        if old["status"] == MEASURED and new["status"] in (WRONG, FAILED):
            found.regressions.append(f"{name}: now {new['status']}")
        elif old["status"] != new["status"]:
            found.incomparable.append(f"{name}: {old['status']} before, {new['status']} now")
        return
    if ((old.get("calls") or 1) > 1) != ((new.get("calls") or 1) > 1):
        found.incomparable.append(f"{name}: calls in a row on one side, each waited for on the other")
        return
    found.compared += 1
    before, now = (f"{row['ms_per_step_p20']:.4g} to {row['ms_per_step_p80']:.4g} ms" for row in (old, new))
    change = new["ms_per_step_p50"] / old["ms_per_step_p50"] - 1
    text = f"{name}: {before} before, {now} now, the median {change:+.0%}"
    slower = new["ms_per_step_p20"] > old["ms_per_step_p80"] * (1 + margin)
    faster = new["ms_per_step_p80"] * (1 + margin) < old["ms_per_step_p20"]
    if (slower or faster) and key[2] in FOREIGN:
        found.cautions.append(f"{text}; that is not this project's code, so the machine was another or busy")
    elif slower:
        found.regressions.append(text)
    elif faster:
        found.improvements.append(text)


def describe(comparison: Comparison, margin: float = MARGIN) -> str:
    """The comparison as it is printed."""
    sections = [
        ("Not on the same footing", comparison.cautions),
        ("Not compared", comparison.incomparable),
        ("Faster", comparison.improvements),
        ("Slower", comparison.regressions),
    ]
    lines = []
    for title, entries in sections:
        lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
    lines.append(
        f"Rows compared: {comparison.compared}; slower: {len(comparison.regressions)}, faster: "
        f"{len(comparison.improvements)}, both beyond the 20th to 80th percentile and {margin:.0%}"
    )
    return "\n".join(lines)
