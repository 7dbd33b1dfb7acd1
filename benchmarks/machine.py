"""The machine, the versions and the commit with which something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import dnc_triton
from dnc_triton import environment
from dnc_triton.tuning import triton_version

VARIABLES = (  # environment variables that change what a command measures
    environment.BACKEND,
    environment.MEASURE,
    environment.GRAPHS,
    environment.GRAPH_MEMORY,
    "TRITON_INTERPRET",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_LAUNCH_BLOCKING",
)


def describe_machine(command: str) -> dict[str, Any]:
    """What gives a time its meaning: date, commit, processor, versions, the command, and what changes it."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,  # Windows has none
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version() or None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "dnc_triton": dnc_triton.__version__,
        "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }


def _commit() -> str:
    """The commit, with "-dirty" behind it if tracked files differ from it; "unknown" outside a git repository.

    Files under results/ do not count: an earlier run may have written them.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    differs = [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        return commit + "-dirty" * (subprocess.run(differs, capture_output=True, check=False).returncode == 1)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
