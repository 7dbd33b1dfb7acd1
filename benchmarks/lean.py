"""The memory that a training step takes: `python -m benchmarks.lean`, on a GPU with `--device cuda`.

A large memory compared with the eager reference, N = 512 on a CPU, N = 256 over 256 steps on a GPU; and a long
sequence, T = 1,000, which must fit into 8 GB. It counts as `memory` does: on a CPU the growth of the process's peak
memory in forward and backward, on a GPU the tensors at their peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import files, goals
from benchmarks.machine import describe_machine
from benchmarks.measure import in_a_line
from benchmarks.memory import gpu_peak, most_held
from dnc_triton import DNC

RESULT = Path(__file__).parent / "results" / "lean.json"
LARGE = {"batch": 8, "memory_size": 512, "word_size": 32, "num_reads": 4, "hidden_size": 100, "features": 8}
WIDE = {"batch": 16, "memory_size": 256, "word_size": 64, "num_reads": 4, "hidden_size": 256, "features": 64}
LONG = {"batch": 32, "memory_size": 256, "word_size": 64, "num_reads": 4, "hidden_size": 256, "features": 64}
Case = tuple[str, int, int | str | None, dict[str, int]]  # backend, T, checkpoint, sizes
CASES: list[Case] = [
    ("reference", 100, None, LARGE),
    ("auto", 100, None, LARGE),
    ("auto", 100, "auto", LARGE),
    ("torch_compiled", 100, "auto", LARGE),
    ("auto", 1000, "auto", LONG),
]
GPU_CASES: list[Case] = [
    ("reference", 256, None, WIDE),
    ("auto", 256, "auto", WIDE),
    ("auto", 256, None, WIDE),
    ("auto", 256, 16, WIDE),
    ("auto", 1000, 32, LONG),
]


def train_once(
    backend: str, steps: int, checkpoint: int | str | None, sizes: dict[str, int], device: str = "cpu"
) -> dict[str, Any]:
    """Forward and backward over `steps` steps; on a CPU, call it in a process that has done nothing yet."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = sizes["features"]
    shape = {name: sizes[name] for name in ("memory_size", "word_size", "num_reads")}
    dnc = DNC(features, sizes["hidden_size"], features, **shape, backend=backend, checkpoint=checkpoint).to(device)
    inputs = torch.randn(sizes["batch"], steps, features).to(device)

    def train() -> None:
        dnc(inputs)[0].square().mean().backward()

    if backend != "torch_compiled":  # where the compiler counts, from its import on
        dnc(inputs[:1, :1])[0].sum().backward()  # loads libraries
        dnc.zero_grad(set_to_none=True)
    started = time.process_time()
    if device == "cuda":
        train()  # measures the candidates
        grown = gpu_peak(train, dnc)
    else:
        before = most_held()
        train()
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        its exit status: 1 if a case could not be measured, or its gradients are not finite; 2 if none could be.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.lean", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: results/lean.json, lean-gpu.json")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.", file=sys.stderr)
        return 2
    output = options.output or (RESULT.with_name("lean-gpu.json") if on_gpu else RESULT)
    if output.is_dir():
        parser.error(f"argument --output: expected a file, got the folder {output}")
    files.make_output(parser, output.parent)
    machine = describe_machine("python -m benchmarks.lean" + (" --device cuda" if on_gpu else ""))
    machine["threads"] = 1
    rows: list[dict[str, Any]] = []
    cases = GPU_CASES if on_gpu else CASES
    for case in cases:
        backend, steps, checkpoint, sizes = case
        try:
            if on_gpu:
                rows.append(train_once(*case, device="cuda"))
            else:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    rows.append(pool.submit(train_once, *case).result())
            result = f"{rows[-1]['grown_bytes'] / 1e6:,.0f} MB" + ", not finite" * (not rows[-1]["finite"])
        except Exception as error:  # out of memory, for example; the next case may take less
            result = f"not measured: {in_a_line(error)}"
        print(f"{backend}, N = {sizes['memory_size']}, T = {steps}, checkpoint = {checkpoint}: {result}", flush=True)
        if rows:
            files.write_json(output, {"machine": machine, "rows": rows})
    if on_gpu and rows:
        print("", goals.table(goals.MEMORY, rows), f"Written: {output}", sep="\n")
    return 0 if sum(row["finite"] for row in rows) == len(cases) else 1 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
