"""Several processes, half the batch each, get the gradients of one with all of it; weights that are kept in parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import train_in_two_processes

SLOW = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("reference", "triton_fused")]


@pytest.mark.parametrize("backend", ["auto", *SLOW])
def test_two_processes_have_the_gradients_of_one(backend: str, tmp_path: Path) -> None:
    if backend == "triton_fused":
        pytest.importorskip("triton")
    train_in_two_processes(backend, "cpu", tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


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
