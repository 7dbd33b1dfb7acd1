"""The interface vector, by which the controller addresses the memory: its layout and its activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dnc_reference.addressing import oneplus, softplus
from dnc_reference.checks import check_dense
from dnc_reference.types import Interface

STRENGTHS: dict[str, Callable[[Tensor], Tensor]] = {"oneplus": oneplus, "softplus": softplus}


def check_strength(strength: Any) -> None:
    """Raise ValueError unless it is a key of `STRENGTHS`."""
    if not isinstance(strength, str) or strength not in STRENGTHS:
        raise ValueError(f"strength: expected one of {', '.join(map(repr, STRENGTHS))}, got {strength!r}")


def interface_sizes(num_reads: int, num_writes: int, word_size: int) -> dict[str, int]:
    """How many numbers of the interface vector each field of `Interface` takes, in the order of the vector.

    The paper prescribes no order. Here fields with the same activation are adjacent, so that each activation is
    applied once.

    Returns:
        field → size; the sizes sum to the length of the interface vector.
    """
    return {
        "read_keys": num_reads * word_size,
        "write_keys": num_writes * word_size,
        "write_vectors": num_writes * word_size,
        "read_strengths": num_reads,
        "write_strengths": num_writes,
        "erase_vectors": num_writes * word_size,
        "free_gates": num_reads,
        "allocation_gates": num_writes,
        "write_gates": num_writes,
        "read_modes": num_reads * (1 + 2 * num_writes),
    }


def activate_interface(
    vector: Tensor, *, num_reads: int, num_writes: int, word_size: int, strength: str = "oneplus"
) -> Interface:
    """Split the interface vector and bring each part into its range.

    Keys and write vectors stay as they are; strengths pass through `oneplus` or `softplus`, the erase vectors and the
    gates through the logistic sigmoid, the read modes through a softmax per head.

    Args:
        vector: [B, S], S the sum of `interface_sizes`.
        num_reads: R.
        num_writes: K.
        word_size: W.
        strength: "oneplus", as in the paper, or "softplus", as in DeepMind's published code.

    Returns:
        the `Interface`.

    Raises:
        TypeError, ValueError: the vector is no tensor, or has another size; `strength` is neither of the two.

    Source: Graves et al. 2016, Methods, "Interface parameters".
    """
    sizes = list(interface_sizes(num_reads, num_writes, word_size).values())
    check_strength(strength)
    check_dense("vector", vector, "a tensor [B, S]")
    if vector.dim() != 2 or vector.shape[1] != sum(sizes):
        raise ValueError(f"vector: expected shape [B, {sum(sizes)}], got {list(vector.shape)}")
    linear, strengths, squashed, modes = vector.split([sum(sizes[:3]), sum(sizes[3:5]), sum(sizes[5:9]), sizes[9]], -1)
    read_keys, write_keys, write_vectors = linear.split(sizes[:3], -1)
    read_strengths, write_strengths = STRENGTHS[strength](strengths).split(sizes[3:5], -1)
    erase_vectors, free_gates, allocation_gates, write_gates = torch.sigmoid(squashed).split(sizes[5:9], -1)
    return Interface(
        read_keys=read_keys.unflatten(-1, (num_reads, word_size)),
        read_strengths=read_strengths,
        write_keys=write_keys.unflatten(-1, (num_writes, word_size)),
        write_strengths=write_strengths,
        erase_vectors=erase_vectors.unflatten(-1, (num_writes, word_size)),
        write_vectors=write_vectors.unflatten(-1, (num_writes, word_size)),
        free_gates=free_gates,
        allocation_gates=allocation_gates,
        write_gates=write_gates,
        read_modes=torch.softmax(modes.unflatten(-1, (num_reads, 1 + 2 * num_writes)), dim=-1),
    )
