"""What README's tables of times say is what the benchmark wrote into the file that is named after them."""

import json
import re
from pathlib import Path
from statistics import geometric_mean

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS = {  # peer and mode
    "this layer": ("dnc_triton", "training"),
    "`torch_compiled`": ("torch_compiled", "training"),
    "eager reference": ("reference", "training"),
    "`torch.compile`": ("compiled", "training"),
    "PyPI `dnc` 2.0.0b1": ("pypi_dnc", "training"),
    "`nn.LSTM`": ("lstm", "training"),
    "cuDNN's `nn.LSTM`": ("lstm", "training"),
    "this layer in one graph": ("dnc_triton", "captured"),
}
TABLE = re.compile(r"^\| configuration .*\n\|[-:|]+\|\n((?:\| .*\n)+)", re.MULTILINE)
FIGURE = re.compile(r"([\d.]+)(?: \(([\d.]+)×\))?")


def tables() -> list:
    found = []
    page = (ROOT / "README.md").read_text()
    for table in TABLE.finditer(page):
        (header, _, *rows) = table[0].splitlines()
        file = re.compile(r"benchmarks/results/[\w-]+\.md").search(page, table.end())
        found.append(pytest.param([cell.strip() for cell in header.split("|")[2:-1]], rows, file[0], id=file[0]))
    return found


def agree(figure: str, measured: float) -> bool:
    """Whether that is the number, rounded to the digits that are there."""
    decimals = len(figure.partition(".")[2])
    return abs(float(figure) - measured) <= 0.5001 * 10**-decimals


def measured(file: str) -> dict:
    """(configuration, peer, mode) → milliseconds per step, and how many times as long as this layer takes."""
    results = json.loads((ROOT / file).with_suffix(".json").read_text())["rows"]
    return {
        (row["configuration"], row["peer"], row["mode"]): (row["ms_per_step_p50"], row["ratio"])
        for row in results
        if not row["sweep"] and row["status"] == "measured"
    }


@pytest.mark.parametrize(("columns", "rows", "file"), tables())
def test_the_tables_of_times_are_the_files(columns, rows, file):
    times = measured(file)
    assert {name for name, *_ in times} == {row.split()[1] for row in rows}
    for row in rows:
        name, cells = row.split()[1], [cell.strip() for cell in row.split("|")[2:-1]]
        for column, cell in zip(columns, cells, strict=True):
            key = name, *COLUMNS[column]
            if cell == "not measured":
                assert key not in times, key
                continue
            figure, ratio = FIGURE.fullmatch(cell).groups()
            time, times_as_long = times[key]
            assert agree(figure, time), (key, cell, time)
            assert ratio is None or agree(ratio, times_as_long), (key, cell, times_as_long)


def test_there_are_two_of_them():
    assert len(tables()) == 2


def test_the_introduction_has_their_means():
    page = " ".join((ROOT / "README.md").read_text().split())  # wherever its lines break
    introduction = re.compile(
        r"trains ([\d.]+) times as fast as plain PyTorch and ([\d.]+) times as fast as the package on PyPI, .*?"
        r"on two CPU cores, without kernels, ([\d.]+) and ([\d.]+) times as fast",
    )
    figures = introduction.search(page).groups()
    on_cpu, on_gpu = sorted(table.values[2] for table in tables())
    kinds = [(file, peer) for file in (on_gpu, on_cpu) for peer in ("reference", "pypi_dnc")]
    expected = [
        geometric_mean(ratio for (_, *key), (_, ratio) in measured(file).items() if key == [peer, "training"])
        for file, peer in kinds
    ]
    for figure, mean in zip(figures, expected, strict=True):
        assert agree(figure, mean), (figure, mean)
