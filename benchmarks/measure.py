"""One case: first whether each network is right, then how long it and its peers take, in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks import verify
from benchmarks.configurations import Case
from benchmarks.floors import floor_bytes, synchronize
from benchmarks.memory import cpu_peak, gpu_peak
from benchmarks.modes import call_of, draw_inputs, inputs_of
from benchmarks.peers import OURS, DeclinedError, MissingPeerError, Network, all_peers

WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 5  # however long they take
COMPILED_CALLS = 3  # checked: CUDA graphs are warmed up in the first, captured in the second, replayed in the third
COMPILE_SECONDS = 60.0  # that compiling may take, so that none is begun shortly before the deadline
MISSING, DECLINED, LEFT_OUT, WRONG, FAILED, MEASURED = "missing", "declined", "left out", "wrong", "failed", "measured"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """What is known of one peer in one mode on one case.

    Attributes:
        case: what was run.
        mode: a key of `MODES`.
        peer: a key of `all_peers`.
        status: "measured"; or why there is no time: "missing" (not installed, or not for this device), "declined" (this
            backend does not serve the case), "left out" (for want of time), "wrong", "failed" (it raised).
        backend: of ours, which one ran.
        error, allowed_error: as `verify.error` has it; None for peers that compute something else.
        rounds: how often it was timed.
        ms_per_step_p20, ms_per_step_p50, ms_per_step_p80: per time step of the whole batch, over the rounds.
        ratio: its median over that of this project's layer in the same rounds; above 1 it is slower.
        peak_bytes: as `benchmarks.memory` has it; None where that does not apply.
        floor_bytes: that a step must move; None for networks without a memory.
        bytes_per_second: those bytes over the median.
        floor_share: the floor over the median, at most 1 unless caches serve it.
        note: why it, or its memory, was not measured; empty if it was.
    """

    case: Case
    mode: str
    peer: str
    status: str
    backend: str = ""
    error: float | None = None
    allowed_error: float | None = None
    rounds: int | None = None
    ms_per_step_p20: float | None = None
    ms_per_step_p50: float | None = None
    ms_per_step_p80: float | None = None
    ratio: float | None = None
    peak_bytes: int | None = None
    floor_bytes: int | None = None
    bytes_per_second: float | None = None
    floor_share: float | None = None
    note: str = ""


@dataclass
class Session:
    """What a whole run has in common.

    Attributes:
        device: where to measure.
        bytes_per_second: of memory, for the floor.
        rounds: how often each peer is timed at most.
        case_seconds: how long the rounds of a case in a mode may take, `LEAST_ROUNDS` aside.
        compile_seconds: once compiling has taken this long, no further peer is compiled.
        deadline: of `time.monotonic`; nothing is started after it.
        peak_memory: whether to measure it.
        report: called with what is being done, in a few words.
        left_out: what was not started, filled in as the run goes.
    """

    device: torch.device
    bytes_per_second: float
    rounds: int
    case_seconds: float
    compile_seconds: float
    deadline: float = float("inf")
    peak_memory: bool = True
    report: Callable[[str], None] = lambda text: None
    left_out: list[str] = field(default_factory=list)

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


def measure(
    case: Case,
    peers: Sequence[str],
    modes: Sequence[str],
    session: Session,
    done: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Check every network, then time those that are right.

    Args:
        case: what to run.
        peers: names.
        modes: in the order in which to measure.
        session: the run's settings, in which is noted what time left out.
        done: called after each mode.

    Returns:
        a row per peer and mode that was begun. If this project's layer is wrong in a mode, no row of it has a time.
    """
    inputs = draw_inputs(case, session.device)
    networks: dict[str, Network] = {}
    unmade: dict[str, Row] = {}
    truth: verify.Truth | None = None
    rows: list[Row] = []
    for mode in modes:
        if session.is_late:
            session.left_out.append(f"{case.configuration}, {mode}: the time is up")
            done()
            continue
        if truth is None:
            networks, unmade = _make_networks(case, peers, session)
            session.report(f"{case.configuration}: oracle")
            try:
                truth = verify.find_truth(case, inputs, list(modes))
            except Exception as error:  # out of memory, say; the next case may be smaller
                note = _what_happened("the oracle", case, error)
                rows += [Row(case, mode, name, FAILED, note=note) for name in peers for mode in modes]
                for _ in modes:
                    done()
                break
        checked = {name: replace(row, mode=mode) for name, row in unmade.items()}
        runs: dict[str, Callable[[], None]] = {}
        for name, network in networks.items():
            session.report(f"{case.configuration}, {mode}: checking {name}")
            checked[name], call = _check(case, mode, name, network, truth, inputs, session)
            if call is not None:
                runs[name] = call
        if OURS in checked and checked[OURS].status == WRONG:
            note = f"{OURS} is wrong on {case.configuration}, {mode}"
            checked |= {name: replace(checked[name], status=WRONG, note=note) for name in runs}
            runs = {}
        session.report(f"{case.configuration}, {mode}: timing")
        try:
            seconds = _time_in_turns(runs, session)
        except Exception as error:  # whose fault it was is not known, and the next mode may do
            note = _what_happened("timing", case, error)
            checked |= {name: replace(checked[name], status=FAILED, note=note) for name in runs}
            seconds, runs = {}, {}
        checked = {name: _timed(checked[name], seconds.get(name), seconds.get(OURS), session) for name in peers}
        if session.peak_memory and mode != "step":
            session.report(f"{case.configuration}, {mode}: memory")
            checked |= {name: _with_peak(checked[name], networks[name], call, session) for name, call in runs.items()}
        rows += checked.values()
        done()
    _clean_up(networks)
    return rows


def _make_networks(case: Case, names: Sequence[str], session: Session) -> tuple[dict[str, Network], dict[str, Row]]:
    """The networks that can be made, and rows, of no mode yet, for those that cannot."""
    networks: dict[str, Network] = {}
    unmade: dict[str, Row] = {}
    for name in names:
        session.report(f"{case.configuration}: {name}")
        try:
            networks[name] = all_peers()[name].make(case, session.device)
        except MissingPeerError as reason:
            unmade[name] = Row(case, "", name, MISSING, note=str(reason))
        except Exception as error:  # one peer that breaks must not cost the others' figures
            unmade[name] = Row(case, "", name, FAILED, note=_what_happened(name, case, error))
    return networks, unmade


def _check(
    case: Case,
    mode: str,
    name: str,
    network: Network,
    truth: verify.Truth,
    inputs: torch.Tensor,
    session: Session,
) -> tuple[Row, Callable[[], None] | None]:
    """A row without times, and what is to be timed if all is well. The calls here are the first ones of the network."""
    peer = all_peers()[name]
    row = Row(case, mode, name, MEASURED)
    started = time.monotonic()
    if session.is_late:
        return replace(row, status=LEFT_OUT, note=f"{name} on {case.configuration}, {mode}: the time is up"), None
    if peer.compiles and (session.compile_seconds <= 0 or session.deadline - started < COMPILE_SECONDS):
        return replace(row, status=LEFT_OUT, note=f"{name}, where it has no time: that for compiling was spent"), None
    try:
        with torch.set_grad_enabled(mode == "training"):
            network.backend(inputs_of(mode, inputs))
        for _ in range(COMPILED_CALLS if peer.compiles else 1 if peer.checked else 0):
            off, allowed = verify.error(network, mode, truth), truth.allowed[mode]
            row = replace(row, error=off, allowed_error=allowed)
            if not off <= allowed:  # so that NaN is wrong too
                where = f"{case.configuration}, {mode}"
                note = f"{name} is wrong on {where}: off by {off:.1e} of the largest number, allowed is {allowed:.1e}"
                return replace(row, status=WRONG, note=note), None
        call = call_of(mode, network, inputs)
        for _ in range(WARM_UP_ROUNDS):
            call()
        synchronize(session.device)
        with torch.set_grad_enabled(mode == "training"):  # after the calls, in which a choice may have been measured
            backend = network.backend(inputs_of(mode, inputs))
    except DeclinedError as reason:
        return replace(row, status=DECLINED, note=f"{name}: {reason}"), None
    except Exception as error:  # one peer that breaks must not cost the others' figures
        return replace(row, status=FAILED, note=_what_happened(name, case, error)), None
    finally:
        if peer.compiles:
            session.compile_seconds -= time.monotonic() - started
    return replace(row, backend=backend), call


def _what_happened(name: str, case: Case, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{name} failed on {case.configuration}: {type(error).__name__}: {lines[0]}"


def _time_in_turns(runs: dict[str, Callable[[], Any]], session: Session) -> dict[str, list[float]]:
    """Seconds of every call. A disturbance of the machine meets all peers, and each goes first as often as another."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    started = time.monotonic()
    for turn in range(session.rounds if runs else 0):
        if turn >= LEAST_ROUNDS and (session.is_late or time.monotonic() - started > session.case_seconds):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize(session.device)
            start = time.perf_counter()
            runs[name]()
            synchronize(session.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _timed(row: Row, seconds: list[float] | None, ours: list[float] | None, session: Session) -> Row:
    """A row with its times and what follows from them."""
    if not seconds:
        return row
    steps = 1 if row.mode == "step" else row.case.steps
    p20, p50, p80 = (float(p) * 1000 / steps for p in np.percentile(seconds, [20, 50, 80]))
    row = replace(row, rounds=len(seconds), ms_per_step_p20=p20, ms_per_step_p50=p50, ms_per_step_p80=p80)
    if ours:
        row = replace(row, ratio=float(np.median(seconds) / np.median(ours)))
    if not all_peers()[row.peer].has_memory:
        return row
    moved = floor_bytes(row.case, row.mode)
    achieved = moved / (p50 / 1000)
    share = achieved / session.bytes_per_second
    return replace(row, floor_bytes=moved, bytes_per_second=achieved, floor_share=share)


def _with_peak(row: Row, network: Network, call: Callable[[], None], session: Session) -> Row:
    """A row with its peak of memory, where that can be told and there is time for it."""
    peer = all_peers()[row.peer]
    if session.is_late:
        return row
    try:
        if session.device.type == "cuda":
            return row if peer.hides_memory else replace(row, peak_bytes=gpu_peak(call, network.module))
        if peer.compiles or row.mode != "training":  # the compiler's memory would count; and a process takes its time
            return row
        return replace(row, peak_bytes=cpu_peak(row.case, row.peer, row.mode, torch.get_num_threads()))
    except Exception as error:  # the process was killed, say; the time is known all the same
        return replace(row, note=_what_happened(f"measuring the memory of {row.peer}", row.case, error))


def _clean_up(networks: dict[str, Network]) -> None:
    """Give back what a case has compiled and allocated: the next one is another network."""
    networks.clear()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
