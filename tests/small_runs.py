"""What the tests of training share: a small run, and how two runs are compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import assert_same_bits
from torch.utils._pytree import tree_leaves

from dnc_triton.training import checkpoint
from dnc_triton.training.settings import Settings

SIZES = {"hidden_size": 8, "memory_size": 4, "word_size": 4, "batch_size": 4}
SMALL = ["--hidden-size", "8", "--memory-size", "4", "--word-size", "4", "--batch-size", "4", "--max-length", "3"]
SHORT = ["train", "copy", *SMALL, "--steps", "20", "--validate-every", "10"]


def small(**changes: Any) -> Settings:
    """Settings of a run that takes milliseconds a step."""
    return Settings("copy", {"max_length": 3}, **{**SIZES, **changes})


def start(*arguments: str, processes: int = 1, **options: Any) -> subprocess.Popen:
    """`python -m dnc_triton`, by torchrun if there are several processes."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launch, "-m", "dnc_triton", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"env": environment, **pipes, **options})


def assert_same_run(a: Path, b: Path) -> None:
    """Two folders hold the same run, to the last bit of all but the time it took."""
    contents = [checkpoint.load(folder / "checkpoint.pt") for folder in (a, b)]
    for content in contents:
        content["seconds"] = None
        for row in content["rows"]:
            row["seconds"] = None
    assert_same_bits(contents[0]["learners"], contents[1]["learners"])
    assert tree_leaves(contents[0].pop("sums")) == tree_leaves(contents[1].pop("sums"))
    del contents[0]["learners"], contents[1]["learners"]
    assert contents[0] == contents[1]
