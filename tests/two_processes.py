"""A layer in two processes by PyTorch's DistributedDataParallel: half the batch each, the gradients of all of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dnc_triton import DNC

backend, device, rank, store = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
if device == "cuda":
    device = torch.device("cuda", rank % torch.cuda.device_count())
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
dnc = DNC(3, 6, 2, memory_size=5, word_size=4, num_reads=2, backend=backend).to(device)
parallel = DistributedDataParallel(dnc)
lengths, half = torch.tensor([3, 1, 2, 3], device=device), slice(2 * rank, 2 * rank + 2)
for _ in range(3):  # on a GPU the second and the third are replayed
    inputs = torch.randn(4, 3, 3).to(device)
    dnc(inputs, lengths=lengths)[0].square().mean().backward()
    alone = [parameter.grad.clone() for parameter in dnc.parameters()]
    dnc.zero_grad()
    parallel(inputs[half], lengths=lengths[half])[0].square().mean().backward()
    for parameter, expected in zip(dnc.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
    dnc.zero_grad()
dist.destroy_process_group()
# Without the interpreter's own end: in it, a thread of gloo that lets go of a tensor aborts the process now and then,
# whatever the module was (an nn.LSTM does it too).
os._exit(0)
"""


def train_in_two_processes(backend: str, device: str, folder: Path, **environment: str) -> None:
    """Three steps of a training, each compared with what one process computes of the whole batch.

    Args:
        backend: of the layer.
        device: "cpu", or "cuda": the GPUs in turn.
        folder: where they meet.
        environment: what their environment has beside this process's.
    """
    # By itself gloo asks for the address of this machine's name, and waits where nobody answers.
    local = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in (name for _, name in socket.if_nameindex()) else {}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, backend, device, str(rank), str(folder / "store")],
            env={**local, **os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
