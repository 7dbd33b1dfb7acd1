"""The project's goals on an H200, and whether a result reaches them. The limits are stated here and nowhere else.

A value is computed from the rows of one kind of result as they are written: of `python -m benchmarks`, of
`benchmarks.gpu`, or of `benchmarks.lean`. It is None where nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.configurations import CONFIGURATIONS
from benchmarks.measure import MEASURED
from benchmarks.modes import TRAINING, TRAINS
from benchmarks.peers import EAGER, OURS

Records = Sequence[dict[str, Any]]
ALL = len(CONFIGURATIONS)


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        what: in words, with the unit.
        limit: what is to be reached.
        value: rows → the measured value, and over how many configurations; None if there is none.
        at_least: whether the limit is a minimum; else it is a maximum.
        over: how many configurations the goal covers.
    """

    what: str
    limit: float
    value: Callable[[Records], tuple[float, int] | None]
    at_least: bool = False
    over: int = 1


def table(goals: Sequence[Goal], rows: Records) -> str:
    """A line per goal: the limit, the measured value, whether that is enough."""
    lines = ["| goal | limit | measured | |", "|---|--:|--:|---|"]
    for goal in goals:
        sign = "≥" if goal.at_least else "≤"
        found = goal.value(rows)
        if found is None:
            lines.append(f"| {goal.what} | {sign} {goal.limit:.3g} | | not measured |")
            continue
        value, count = found
        reached = value >= goal.limit if goal.at_least else value <= goal.limit
        verdict = ("reached" if reached else "missed") + (" so far" if count < goal.over else "")
        verdict += f", over {count} of {goal.over} configurations" if goal.over > 1 else ""
        lines.append(f"| {goal.what} | {sign} {goal.limit:.3g} | {value:.4g} | {verdict} |")
    return "\n".join(lines)


# --- of `python -m benchmarks` ----------------------------------------------------------------------------------------


def trainings(rows: Records, mode: str = TRAINING) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows measured in a mode, training by default, without sweeps, by configuration and peer."""
    return {
        (row["configuration"], row["peer"]): row
        for row in rows
        if row["mode"] == mode and row["status"] == MEASURED and not row.get("sweep")
    }


def geometric_mean(ratios: Iterable[float]) -> tuple[float, int] | None:
    """The mean, and the number of ratios; None if there are none."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return (math.exp(sum(logarithms) / len(logarithms)), len(logarithms)) if logarithms else None


def ratios(rows: Records, peer: str, ours: str, key: str = "ms_per_step_p50") -> dict[str, float]:
    """Configuration → how many times as much a peer takes as one of ours, where both were measured."""
    values = {(row["configuration"], row["peer"]): row.get(key) for row in rows if row["status"] == MEASURED}
    found = {}
    for configuration in dict.fromkeys(row["configuration"] for row in rows):
        theirs, own = values.get((configuration, peer)), values.get((configuration, ours))
        if theirs and own:
            found[configuration] = theirs / own
    return found


def _microseconds(configuration: str, mode: str, rows: Records) -> tuple[float, int] | None:
    row = trainings(rows, mode).get((configuration, OURS))
    return None if row is None else (1000 * row["ms_per_step_p50"], 1)


def _over_the_floor(configuration: str, rows: Records) -> tuple[float, int] | None:
    row = trainings(rows).get((configuration, OURS))
    return None if row is None else (1 / row["floor_share"], 1)


def _times_faster(peer: str, rows: Records) -> tuple[float, int] | None:
    return geometric_mean(ratios(list(trainings(rows).values()), peer, OURS).values())


def _of_the_lstm(configuration: str, rows: Records) -> tuple[float, int] | None:
    ratio = ratios(list(trainings(rows).values()), "lstm", OURS).get(configuration)
    return None if ratio is None else (1 / ratio, 1)


def _most_memory(rows: Records) -> tuple[float, int] | None:
    shares = [1 / ratio for ratio in ratios(list(trainings(rows).values()), EAGER, OURS, "peak_bytes").values()]
    return (max(shares), len(shares)) if shares else None


MOST_MICROSECONDS = {
    "deepmind_repeat_copy": 20,
    "csordas_repeat_copy": 20,
    "nature_babi": 60,
    "adnc_babi": 60,
    "nature_babi_wide": 60,
}
TIMES_FASTER = {EAGER: 30, "pypi_dnc": 30, "compiled_cuda_graphs": 4}
TIMES = [
    *(
        Goal(f"{name}, {mode}, µs per time step", limit, partial(_microseconds, name, mode))
        for name, limit in MOST_MICROSECONDS.items()
        for mode in TRAINS
    ),
    Goal("sam_scaling_2048, training, times its byte floor", 2, partial(_over_the_floor, "sam_scaling_2048")),
    *(
        Goal(f"training, {peer} over {OURS}, geometric mean", limit, partial(_times_faster, peer), True, ALL)
        for peer, limit in TIMES_FASTER.items()
    ),
    *(
        Goal(f"{name}, training, {OURS} over lstm", 4, partial(_of_the_lstm, name))
        for name in ("deepmind_repeat_copy", "csordas_repeat_copy")
    ),
    Goal("training, peak of memory, part of eager's, the largest", 1 / 3, _most_memory, over=ALL),
]


# --- of `benchmarks.gpu` ----------------------------------------------------------------------------------------------


def _fastest(bucket: tuple[int, int, int, int], direction: str, rows: Records) -> tuple[float, int] | None:
    """The time of the fastest layout of a step, for each direction by itself, as the limits are."""
    keys = ("batch", "memory_size", "word_size", "num_reads")
    times = [
        row[f"{direction}_us"]
        for row in rows
        if tuple(row[key] for key in keys) == bucket and row["who"].startswith(("fused", "split"))
    ]
    return min(((us, 1) for us in times if us is not None), default=None)


STEP_MICROSECONDS = {(16, 16, 16, 4): (6, 10), (64, 256, 64, 4): (16, 28)}  # forward, backward
STEPS = [
    Goal(f"memory step {bucket}, {direction}, µs", limit, partial(_fastest, bucket, direction))
    for bucket, limits in STEP_MICROSECONDS.items()
    for direction, limit in zip(("forward", "backward"), limits, strict=True)
]


# --- of `benchmarks.lean` ---------------------------------------------------------------------------------------------


def _lean(checkpoint: int | None, rows: Records) -> tuple[float, int] | None:
    ours, eager = _grown("auto", 256, checkpoint, rows), _grown(EAGER, 256, None, rows)
    return (ours / eager, 1) if ours and eager else None


def _long(rows: Records) -> tuple[float, int] | None:
    grown = _grown("auto", 1000, 32, rows)
    return (grown / 1e9, 1) if grown else None


def _grown(backend: str, steps: int, checkpoint: int | None, rows: Records) -> int | None:
    wanted = backend, steps, checkpoint
    found = (row for row in rows if (row["backend"], row["steps"], row["checkpoint"]) == wanted and row["finite"])
    return next((row["grown_bytes"] for row in found), None)


MEMORY = [
    Goal("N = 256, T = 256, memory, part of eager's, everything kept", 1 / 3, partial(_lean, None)),
    Goal("N = 256, T = 256, memory, part of eager's, every 16th step kept", 1 / 10, partial(_lean, 16)),
    Goal("N = 256, T = 1000, memory in GB, every 32nd step kept", 8, _long),
]
