"""One configuration: first whether the layer is right, then how long it and its peers take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.configurations import Configuration
from benchmarks.peers import OURS, PEERS, ForwardBackward, MissingPeerError, dnc_layer
from dnc_reference import DNCCell, unroll

SEED = 0
WARM_UP_ROUNDS = 2
# In float32 the reference is off by at most 7e-7 of the largest number of a tensor, over all configurations.
ALLOWED_ERROR = 1e-5


@dataclass(frozen=True)
class Row:
    """What is known of one peer on one configuration.

    Attributes:
        status: "measured", "missing" (not installed) or "wrong" (our layer is, so nothing was timed).
        error: of our layer, as `worst_error` has it; None for the others, which compute something else.
        ms_per_step_p20, ms_per_step_p50, ms_per_step_p80: forward and backward, percentiles over the rounds; None if
            not measured.
        ratio: its median over that of this project's layer; above 1 it is slower.
        note: why it was not measured; empty if it was.
    """

    configuration: str
    peer: str
    status: str
    error: float | None = None
    ms_per_step_p20: float | None = None
    ms_per_step_p50: float | None = None
    ms_per_step_p80: float | None = None
    ratio: float | None = None
    note: str = ""


def measure(name: str, configuration: Configuration, *, rounds: int) -> list[Row]:
    """Check the layer, then time it and its peers in turns.

    Args:
        name: of the configuration.
        configuration: its sizes.
        rounds: how often each peer is timed.

    Returns:
        a row per peer. If the layer is wrong, no row has a time.
    """
    torch.manual_seed(SEED)
    inputs = torch.randn(configuration.cpu_batch, configuration.cpu_steps, configuration.input_size)
    error = worst_error(configuration, inputs)
    errors = {OURS: error}
    if not error <= ALLOWED_ERROR:  # so that NaN is wrong too
        note = f"{OURS} is wrong on {name}: off by {error:.1e} of the largest number, allowed is {ALLOWED_ERROR:.0e}"
        return [Row(name, peer, "wrong", error=errors.get(peer), note=note) for peer in PEERS]

    runs: dict[str, ForwardBackward] = {}
    rows: dict[str, Row] = {}
    for peer, make in PEERS.items():
        try:
            runs[peer] = make(configuration, inputs)
        except MissingPeerError as reason:
            rows[peer] = Row(name, peer, "missing", note=str(reason))
    percentiles = {
        peer: [float(p) * 1000 / configuration.cpu_steps for p in np.percentile(seconds, [20, 50, 80])]
        for peer, seconds in _time_in_turns(runs, rounds, description=name).items()
    }
    for peer, (p20, p50, p80) in percentiles.items():
        rows[peer] = Row(name, peer, "measured", errors.get(peer), p20, p50, p80, ratio=p50 / percentiles[OURS][1])
    return [rows[peer] for peer in PEERS]


def worst_error(configuration: Configuration, inputs: Tensor) -> float:
    """How far the layer is off in its outputs and in the gradients of its parameters.

    The truth is `dnc_reference.unroll` in float64 with the same parameters.

    Returns:
        the largest, over the outputs and every gradient, of max |error| / max |truth|.
    """
    layer = dnc_layer(configuration)
    oracle = DNCCell(
        layer.input_size,
        layer.hidden_size,
        layer.output_size,
        memory_size=layer.memory_size,
        word_size=layer.word_size,
        num_reads=layer.num_reads,
        num_layers=layer.num_layers,
        dtype=torch.float64,
    )
    oracle.load_state_dict(layer.state_dict())

    outputs, _ = layer(inputs)
    expected, _ = unroll(oracle, inputs.double().transpose(0, 1), oracle.initial_state(len(inputs)))
    gradients = torch.autograd.grad(outputs.square().mean(), list(layer.parameters()))
    expected_gradients = torch.autograd.grad(expected.square().mean(), list(oracle.parameters()))
    pairs = [(outputs.detach().transpose(0, 1), expected.detach())]
    pairs += zip(gradients, expected_gradients, strict=True)
    errors = [(actual.double() - truth).abs().max() / truth.abs().max() for actual, truth in pairs]
    return float(torch.stack(errors).max())  # NaN if any is


def _time_in_turns(runs: dict[str, ForwardBackward], rounds: int, *, description: str) -> dict[str, list[float]]:
    """Seconds of every call. A disturbance of the machine meets all peers, and each goes first as often as another."""
    for run in runs.values():
        for _ in range(WARM_UP_ROUNDS):
            run()
    seconds: dict[str, list[float]] = {peer: [] for peer in runs}
    peers = list(runs)
    for turn in _progress(range(rounds), description):
        first = turn % len(peers)
        for peer in peers[first:] + peers[:first]:
            start = time.perf_counter()
            runs[peer]()
            seconds[peer].append(time.perf_counter() - start)
    return seconds


def _progress(rounds: Iterable[int], description: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(f"{description} ...", file=sys.stderr)
        return rounds
    return tqdm(rounds, desc=description)
