"""The memory that a training step takes on a CPU: `python -m benchmarks.lean`.

A large memory, N = 512, beside the eager reference, and a long sequence, T = 1,000, which is to fit into 8 GB. As in
`memory`, what counts is by how much the most memory that a process ever held has grown in forward and backward.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.memory import most_held
from dnc_triton import DNC

RESULT = Path(__file__).parent / "results" / "lean.json"
LARGE = {"batch": 8, "memory_size": 512, "word_size": 32, "num_reads": 4, "hidden_size": 100, "features": 8}
LONG = {"batch": 32, "memory_size": 256, "word_size": 64, "num_reads": 4, "hidden_size": 256, "features": 64}
CASES: list[tuple[str, int, int | str | None, dict[str, int]]] = [  # backend, T, checkpoint, sizes
    ("reference", 100, None, LARGE),
    ("auto", 100, None, LARGE),
    ("auto", 100, "auto", LARGE),
    ("auto", 1000, "auto", LONG),
]


def train_once(backend: str, steps: int, checkpoint: int | str | None, sizes: dict[str, int]) -> dict[str, Any]:
    """Forward and backward over that many steps; call it in a process that has done nothing yet."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = sizes["features"]
    shape = {name: sizes[name] for name in ("memory_size", "word_size", "num_reads")}
    dnc = DNC(features, sizes["hidden_size"], features, **shape, backend=backend, checkpoint=checkpoint)
    inputs = torch.randn(sizes["batch"], steps, features)
    dnc(inputs[:1, :1])[0].sum().backward()  # loads libraries
    dnc.zero_grad(set_to_none=True)
    before, started = most_held(), time.process_time()
    dnc(inputs)[0].square().mean().backward()
    grown = most_held() - before
    return {
        "backend": backend,
        **sizes,
        "steps": steps,
        "checkpoint": checkpoint,
        "grown_bytes": grown,
        "cpu_seconds": round(time.process_time() - started, 1),
        "finite": all(bool(x.grad.isfinite().all()) for x in dnc.parameters() if x.grad is not None),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.lean", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    options = parser.parse_args(arguments)
    machine = describe_machine("python -m benchmarks.lean")
    machine["threads"] = 1
    rows = []
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(train_once, *case).result())
        backend, steps, checkpoint, sizes = case
        grown = rows[-1]["grown_bytes"] / 1e6
        print(f"{backend}, N = {sizes['memory_size']}, T = {steps}, checkpoint = {checkpoint}: {grown:,.0f} MB")
    text = json.dumps({"machine": machine, "rows": rows}, indent=2, ensure_ascii=False)
    options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
