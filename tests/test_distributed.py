"""Data-parallel training: two processes with half the batch each have the gradients of one with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dnc_triton import DNC

backend, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
dnc = DNC(3, 6, 2, memory_size=5, word_size=4, num_reads=2, backend=backend)
inputs, lengths = torch.randn(4, 3, 3), torch.tensor([3, 1, 2, 3])

dnc(inputs, lengths=lengths)[0].square().mean().backward()
alone = [parameter.grad.clone() for parameter in dnc.parameters()]
dnc.zero_grad()

parallel = DistributedDataParallel(dnc)
half = slice(2 * rank, 2 * rank + 2)
parallel(inputs[half], lengths=lengths[half])[0].square().mean().backward()
for parameter, expected in zip(dnc.parameters(), alone, strict=True):
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)
dist.destroy_process_group()
# Without the interpreter's own end: in it, a thread of gloo that lets go of a tensor aborts the process now and then,
# whatever the module was (an nn.LSTM does it too).
os._exit(0)
"""


SLOW = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("reference", "triton_fused")]


@pytest.mark.parametrize("backend", ["auto", *SLOW])
def test_two_processes_have_the_gradients_of_one(backend: str, tmp_path: Path) -> None:
    if backend == "triton_fused":
        pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, backend, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
