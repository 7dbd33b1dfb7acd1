"""Several processes: half the batch each, and the gradients of one with all of it; weights that are kept in parts."""

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


SHARDED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dnc_triton import DNC


def make():
    torch.manual_seed(0)
    return DNC(3, 8, 2, memory_size=6, word_size=4, num_reads=2, num_writes=2, checkpoint=2)


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
alone, sharded, inputs = make(), make(), torch.randn(2, 4, 3)
for part in (sharded.interface, sharded.output, sharded):
    fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
register_fsdp_forward_method(sharded, "step")
for dnc in (alone, sharded):
    dnc(inputs)[0].square().sum().backward()
for parameter, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)
with torch.no_grad():
    torch.testing.assert_close(sharded.step(inputs[:, 0])[0], alone.step(inputs[:, 0])[0])
dist.destroy_process_group()
os._exit(0)
"""


def test_sharded_parts_are_put_in_place_for_checkpoints(tmp_path: Path) -> None:
    """By PyTorch's FSDP2, in the backward as in the forward."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "store")]
    worker = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert worker.returncode == 0, worker.stderr
