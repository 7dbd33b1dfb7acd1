"""A result as a Markdown page: a table per mode with the peers side by side, then every figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import goals
from benchmarks.measure import FAILED, MEASURED, WRONG
from benchmarks.modes import MODES
from benchmarks.peers import OURS, PEERS, is_ours

Record = dict[str, Any]
OF_A_GPU = (
    "Peaks are of tensors, with plain launches. A CUDA graph of this layer keeps its memory from call to call, within "
    "the bound of `DNC_TRITON_GRAPH_MEMORY`. Of calls in a row, as a training makes them, only the last one is waited "
    "for; a single step always is."
)


def markdown(results: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The page.

    Args:
        results: as `read_results` gives them.
        pictures: file names beside the page.
    """
    machine, rows = results["machine"], results["rows"]
    parts = ["# Milliseconds per time step", describe_means(machine), *(f"![]({name})" for name in pictures)]
    for mode, meaning in MODES.items():
        rows_of_mode = [row for row in rows if row["mode"] == mode and not row.get("sweep")]
        table = side_by_side(rows_of_mode)
        parts += [f"## {mode.capitalize()}: {meaning}", table] if table else []
        parts += [means] if (means := geometric_means(rows_of_mode)) else []
    if machine.get("device") == "cuda":
        parts += ["## Goals, set for an H200", goals.table(goals.TIMES, rows)]
    parts += ["## Every figure", *([OF_A_GPU] if machine.get("device") == "cuda" else []), every_figure(rows)]
    notes = notes_of(results)
    parts += ["## Not measured", "\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def describe_means(machine: Record) -> str:
    """On what machine, with which versions and when it was measured."""
    cpu = f"{machine.get('cpu')}, threads: {machine.get('threads')}"
    where = machine.get("gpu") if machine.get("device") == "cuda" else cpu
    triton = f", Triton {machine['triton']}" if machine.get("triton") and machine.get("device") == "cuda" else ""
    speed = machine.get("bytes_per_second")
    floor = f" The floor is reckoned with {speed / 1e9:.0f} GB/s." if speed else ""
    commit, dash, dirty = str(machine.get("commit")).partition("-")  # a dirty tree is not that commit
    return (
        f"{where}; Python {machine.get('python')}, PyTorch {machine.get('torch')}{triton}; {machine.get('date')}, "
        f"commit {commit[:10]}{dash}{dirty}; float32. Medians; in brackets how many times as long as dnc_triton "
        f"takes, in the same run.{floor}"
    )


def side_by_side(rows: list[Record]) -> str:
    """A line per configuration, a column per peer: the median, and in brackets the ratio. Empty without any times."""
    times = {(row["configuration"], row["peer"]): row for row in rows if row["status"] == MEASURED}
    if not times:
        return ""
    peers = list(dict.fromkeys(row["peer"] for row in rows if (row["configuration"], row["peer"]) in times))
    lines = [
        f"| configuration (N, W, R, H; B, T) | {' | '.join(map(label_of, peers))} |",
        f"|---|{'--:|' * len(peers)}",
    ]
    for name, row in {row["configuration"]: row for row in rows}.items():
        cells = [_cell(times.get((name, peer))) for peer in peers]
        lines.append(f"| {name} ({sizes_of(row)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Record | None) -> str:
    if row is None:
        return "–"
    ratio = "" if row.get("ratio") is None or row["peer"] == OURS else f" ({row['ratio']:.2f}×)"
    backend = f" ({row['backend']})" if row["peer"] == OURS and row.get("backend") else ""
    return f"{milliseconds(row['ms_per_step_p50'])}{backend}{ratio}"


def geometric_means(rows: list[Record]) -> str:
    """How many times as long each peer takes as each of ours, over the configurations where both were measured."""
    names = list(dict.fromkeys(row["peer"] for row in rows if row["status"] == MEASURED))
    ours = [name for name in names if is_ours(name)]
    peers = [name for name in names if name not in ours]
    if not ours or not peers:
        return ""
    lines = [
        "How many times as long they take, the geometric mean, in brackets over how many configurations:",
        "",
        f"| than | {' | '.join(map(label_of, peers))} |",
        f"|---|{'--:|' * len(peers)}",
    ]
    for own in ours:
        means = [goals.geometric_mean(goals.ratios(rows, peer, own).values()) for peer in peers]
        cells = ["–" if mean is None else f"{mean[0]:.2f}× ({mean[1]})" for mean in means]
        lines.append(f"| {label_of(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def every_figure(rows: list[Record]) -> str:
    """A line per row that has a time, or is wrong or failed. Columns that would be empty are left out."""
    titles = ["configuration (N, W, R, H; B, T)", "mode", "who", "ms per step", "20th to 80th percentile"]
    titles += ["calls in a row", "ratio", "peak MB", "GB/s", "of the floor's speed", "error"]
    lines = []
    for row in rows:
        cells = [f"{row['configuration']} ({sizes_of(row)})", row["mode"], label_of(row["peer"])]
        if row["status"] == MEASURED:
            spread = f"{milliseconds(row['ms_per_step_p20'])} to {milliseconds(row['ms_per_step_p80'])}"
            cells += [
                milliseconds(row["ms_per_step_p50"]),
                spread,
                str(calls) if (calls := row.get("calls") or 1) > 1 else "",
                _number(row.get("ratio"), "{:.2f}"),
                _number(row.get("peak_bytes"), "{:.1f}", 1e-6),
                _number(row.get("bytes_per_second"), "{:.1f}", 1e-9),
                _number(row.get("floor_share"), "{:.1%}"),
            ]
        elif row["status"] in (WRONG, FAILED):
            cells += [row["status"], *[""] * 6]
        else:
            continue
        lines.append([*cells, _number(row.get("error"), "{:.0e}")])
    shown = [column for column in range(len(titles)) if column < 4 or any(cells[column] for cells in lines)]
    rule = [*["---"] * 3, *["--:"] * (len(titles) - 3)]
    table = [[cells[column] for column in shown] for cells in [titles, rule, *lines]]
    return "\n".join(f"| {' | '.join(cells)} |" if cells[0] != "---" else f"|{'|'.join(cells)}|" for cells in table)


def notes_of(results: dict[str, Any]) -> list[str]:
    """The reasons why something has no time, each once."""
    notes = [row["note"] for row in results["rows"] if row.get("note")]
    return list(dict.fromkeys([*notes, *results.get("left_out", [])]))


def label_of(peer: str) -> str:
    """A peer's name in a table; a result may have one that no longer exists."""
    return PEERS[peer].label if peer in PEERS else peer


def sizes_of(row: Record) -> str:
    """N, W, R, H; B, T."""
    layers = row.get("num_layers", 1)
    hidden = row.get("hidden_size") if layers == 1 else f"{layers}×{row.get('hidden_size')}"
    size = [row.get("memory_size"), row.get("word_size"), row.get("num_reads"), hidden]
    return f"{', '.join(map(str, size))}; {row.get('batch')}, {row.get('steps')}"


def milliseconds(value: float) -> str:
    """With three significant digits, or from 1 on two decimals: 0.0123, 1.23, 12.34."""
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)
