"""One case: first check whether each network is right, then time it and its peers in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from benchmarks import verify
from benchmarks.configurations import Case
from benchmarks.floors import floor_bytes, synchronize
from benchmarks.memory import cpu_peak, gpu_peak
from benchmarks.modes import CAPTURED, TRAINING, TRAINS, call_of, draw_inputs, inputs_of
from benchmarks.peers import EAGER, OURS, PEERS, DeclinedError, MissingPeerError, Network, is_ours

WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 5  # however long they take
SLOW_SECONDS = 0.3  # of one call; a peer that takes longer gets one warm-up round, and at least
SLOW_ROUNDS = 3  # rounds of timing
SHORT_SECONDS = 0.05  # of one call; a shorter one is made once more before it is timed
# Calls that a GPU computes while Python prepares the next one, as in a training, are made in a row and waited for once:
# as many as take ROW_SECONDS together, but at most MOST_IN_A_ROW.
ROW_SECONDS, MOST_IN_A_ROW = 0.05, 10
# How many calls are checked of peers that compile, and of ours on a GPU: CUDA graphs are warmed up in the first,
# captured in the second, replayed in the third.
GRAPH_CALLS = 3
COMPILE_SECONDS = 45.0  # that compiling may take: none is begun with less than that left before the deadline
MISSING, DECLINED, LEFT_OUT, WRONG, FAILED, MEASURED = "missing", "declined", "left out", "wrong", "failed", "measured"


@dataclass(frozen=True)
class Row:
    """The result of one peer in one mode on one case.

    Attributes:
        case: what was run.
        mode: a key of `MODES`.
        peer: a key of `PEERS`.
        status: "measured"; or why there is no time: "missing" (not installed, or not for this device), "declined" (this
            backend does not serve the case, or the peer is not captured), "left out" (for want of time), "wrong",
            "failed" (it raised).
        backend: of ours, which one ran.
        error, allowed_error: as in `verify`; None for peers that compute something else.
        rounds: how often it was timed.
        calls: how many were made in a row each time.
        ms_per_step_p20, ms_per_step_p50, ms_per_step_p80: per time step of the whole batch, over the rounds.
        ratio: its median over that of this project's layer in the same rounds; above 1 it is slower. A slow peer has
            fewer rounds; one that is measured apart (`Peer.apart`) has its own, in another process some minutes before.
        peak_bytes: as in `benchmarks.memory`; None where that does not apply.
        floor_bytes: the bytes that a step must move; None for networks without a memory.
        bytes_per_second: `floor_bytes` over the median.
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
    calls: int | None = None
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
    """What all measurements of a run have in common.

    Attributes:
        device: where to measure.
        bytes_per_second: of memory, for the floor.
        rounds: how often each peer is timed at most.
        case_seconds: how long the rounds of a case in a mode may take, `LEAST_ROUNDS` and `SLOW_ROUNDS` aside.
        compile_seconds: once compiling has taken this long, no further peer is compiled.
        deadline: by `time.monotonic`; nothing is started after it.
        peak_memory: whether to measure it.
        report: called with what is being done, in a few words.
        left_out: what was not started, filled in as the run goes.
        lost: when the device stopped working, in words; empty if it did not. After an illegal access on a GPU, for
            example, the process can no longer use it; what was measured before is still valid.
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
    lost: str = ""

    @property
    def over(self) -> str:
        """Why nothing more is started; empty otherwise."""
        return self.lost or ("the time is up" if time.monotonic() > self.deadline else "")


def measure(
    case: Case,
    peers: Sequence[str],
    modes: Sequence[str],
    session: Session,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Check every network, then time those that are right.

    Args:
        case: what to run.
        peers: names.
        modes: in the order in which to measure.
        session: the run's settings; what was left out, and whether the device was lost, is noted in it.
        done: called after each mode, with its rows.

    Returns:
        a row per peer and mode that was begun. If this project's layer is among them and wrong in a mode, no row of
        that mode has a time.
    """
    networks: dict[str, Network] = {}
    unmade: dict[str, Row] = {}
    truth: verify.Truth | None = None
    rows: list[Row] = []
    for mode in modes:
        if reason := session.over:
            session.left_out.append(f"{case.configuration}, {mode}: {reason}")
            done([])
            continue
        if truth is None:
            networks, unmade = _make_networks(case, peers, session)
            session.report(f"{case.configuration}: oracle")
            try:
                inputs = draw_inputs(case, session.device)
                truth = verify.find_truth(case, inputs, list(modes))
            except Exception as error:  # out of memory, say; the next case may be smaller
                note = _what_happened("the oracle", case, error, session)
                for each in modes:
                    failed = [Row(case, each, name, FAILED, note=note) for name in peers]
                    rows += failed
                    done(failed)
                break
        checked, runs = _check_all(case, mode, peers, networks, unmade, truth, inputs, session)
        checked, runs = _time_all(case, mode, checked, runs, session)
        try:
            if session.peak_memory and mode not in ("step", CAPTURED):
                session.report(f"{case.configuration}, {mode}: memory")
                for name, call in runs.items():
                    checked[name] = _with_peak(checked[name], networks[name], call, session)
        finally:  # so that the times are kept if this is interrupted; on a CPU it takes long
            rows += checked.values()
            done(list(checked.values()))
    _clean_up(case, networks, session)
    return rows


def _make_networks(case: Case, names: Sequence[str], session: Session) -> tuple[dict[str, Network], dict[str, Row]]:
    """The networks that can be made, and rows, without a mode yet, for those that cannot."""
    networks: dict[str, Network] = {}
    unmade: dict[str, Row] = {}
    for name in names:
        session.report(f"{case.configuration}: {name}")
        try:
            networks[name] = PEERS[name].make(case, session.device)
        except MissingPeerError as reason:
            unmade[name] = Row(case, "", name, MISSING, note=str(reason))
        except Exception as error:  # one peer that breaks must not cost the others' figures
            unmade[name] = Row(case, "", name, FAILED, note=_what_happened(name, case, error, session))
    return networks, unmade


def _check_all(
    case: Case,
    mode: str,
    peers: Sequence[str],
    networks: dict[str, Network],
    unmade: dict[str, Row],
    truth: verify.Truth,
    inputs: torch.Tensor,
    session: Session,
) -> tuple[dict[str, Row], dict[str, Callable[[], Any]]]:
    """A row of this mode for each peer, and the calls to be timed: none if this project's layer is wrong."""
    checked: dict[str, Row] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name in peers:
        if name in unmade:
            checked[name] = replace(unmade[name], mode=mode)
            continue
        session.report(f"{case.configuration}, {mode}: checking {name}")
        checked[name], call = _check(case, mode, name, networks[name], truth, inputs, session)
        if call is not None:
            runs[name] = call
    if OURS in checked and checked[OURS].status == WRONG:
        note = f"{OURS} is wrong on {case.configuration}, {mode}"
        return checked | {name: replace(checked[name], status=WRONG, note=note) for name in runs}, {}
    return checked, runs


def _check(
    case: Case,
    mode: str,
    name: str,
    network: Network,
    truth: verify.Truth,
    inputs: torch.Tensor,
    session: Session,
) -> tuple[Row, Callable[[], Any] | None]:
    """A row without times, and the call to be timed if all is well. The calls made here are the network's first."""
    peer = PEERS[name]
    row = Row(case, mode, name, MEASURED)
    started = time.monotonic()
    if reason := session.over:
        return replace(row, status=LEFT_OUT, note=f"{name} on {case.configuration}, {mode}: {reason}"), None
    needed = 0 if peer.apart else COMPILE_SECONDS  # a peer in a process of its own may be stopped while it compiles
    if mode == CAPTURED and not peer.captured:
        return replace(row, status=DECLINED, note=f"{name}: it is not captured"), None
    if peer.compiles and (session.compile_seconds <= 0 or session.deadline - started < needed):
        return replace(row, status=LEFT_OUT, note=f"{name}: not timed where the time for compiling was up"), None
    try:
        with torch.set_grad_enabled(mode in TRAINS):
            backend = network.backend(inputs_of(mode, inputs))
        settled = backend in ("", EAGER)  # others may choose, or capture graphs, in their first calls
        has_graphs = peer.compiles or (is_ours(name) and session.device.type == "cuda" and mode != CAPTURED)
        for _ in range(GRAPH_CALLS if has_graphs else 1 if peer.checked else 0):
            off, allowed = verify.error(network, mode, truth), truth.allowed[mode]
            row = replace(row, error=off, allowed_error=allowed)
            if not off <= allowed:  # so that NaN is wrong too
                where = f"{case.configuration}, {mode}"
                note = f"{name} is wrong on {where}: off by {off:.1e} of the largest number, allowed is {allowed:.1e}"
                return replace(row, status=WRONG, note=note), None
        call = call_of(mode, network, inputs)
        for _ in range(WARM_UP_ROUNDS):
            start = time.perf_counter()
            call()
            synchronize(session.device)
            if settled and time.perf_counter() - start > SLOW_SECONDS:
                break
        with torch.set_grad_enabled(mode in TRAINS):  # after the calls, in which a choice may have been measured
            backend = network.backend(inputs_of(mode, inputs))
    except DeclinedError as reason:
        return replace(row, status=DECLINED, note=f"{name}: {reason}"), None
    except Exception as error:  # one peer that breaks must not cost the others' figures
        return replace(row, status=FAILED, note=_what_happened(name, case, error, session)), None
    finally:
        if peer.compiles:
            session.compile_seconds -= time.monotonic() - started
    return replace(row, backend=backend), call


def _what_happened(name: str, case: Case, error: Exception, session: Session) -> str:
    """A failure in one line. If the device no longer works after it, that is noted in the session."""
    try:
        synchronize(session.device)
    except Exception:  # it persists: every later call raises it, too
        session.lost = session.lost or f"the device was lost when {name} failed on {case.configuration}"
    return f"{name} failed on {case.configuration}: {in_a_line(error)}"


def in_a_line(error: Exception) -> str:
    """The error's type, and the first line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _time_all(
    case: Case,
    mode: str,
    checked: dict[str, Row],
    runs: dict[str, Callable[[], Any]],
    session: Session,
) -> tuple[dict[str, Row], dict[str, Callable[[], Any]]]:
    """The rows with their times, and the calls that were timed: none if that failed."""
    session.report(f"{case.configuration}, {mode}: timing")
    try:
        in_a_row = _calls_in_a_row(runs, mode, session)
        seconds = _time_in_turns(runs, session, in_a_row)
    except Exception as error:  # which peer caused it is not known, and the next mode may work
        note = _what_happened("timing", case, error, session)
        return checked | {name: replace(checked[name], status=FAILED, note=note) for name in runs}, {}
    rows = {name: replace(row, calls=in_a_row.get(name)) for name, row in checked.items()}
    return {name: _timed(row, seconds.get(name), seconds.get(OURS), session) for name, row in rows.items()}, runs


def _calls_in_a_row(runs: dict[str, Callable[[], Any]], mode: str, session: Session) -> dict[str, int]:
    """How many calls each makes in a row: one on a CPU, and one of a single step, whose latency counts."""
    counts = dict.fromkeys(runs, 1)
    if session.device.type == "cpu" or mode == "step" or session.over:
        return counts
    for name, call in runs.items():
        fastest = float("inf")
        for _ in range(3):  # one disturbed call must not decide
            start = time.perf_counter()
            call()
            synchronize(session.device)
            fastest = min(fastest, time.perf_counter() - start)
            if fastest > SLOW_SECONDS:
                break
        counts[name] = max(1, min(MOST_IN_A_ROW, round(ROW_SECONDS / fastest)))
    return counts


def _time_in_turns(
    runs: dict[str, Callable[[], Any]], session: Session, in_a_row: Mapping[str, int]
) -> dict[str, list[float]]:
    """Seconds of a call, each the mean of `in_a_row` calls.

    A disturbance of the machine affects all peers, and all go first equally often.

    A short call is made once more before it is timed: in a loop it finds its code and data in the processor's caches;
    here it would only if the call before it were of the same kind.

    Once the time for the case is over, only peers go on that have not had their share of it, or have had too few
    rounds: fewer than `LEAST_ROUNDS`, or, for a slow peer, `SLOW_ROUNDS`, or 1 once all time is up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    names = list(runs)
    started = time.monotonic()

    def goes_on(name: str) -> bool:
        slow = bool(seconds[name]) and min(seconds[name]) > SLOW_SECONDS
        least = LEAST_ROUNDS if not slow else 1 if session.over else SLOW_ROUNDS
        in_time = time.monotonic() - started <= session.case_seconds
        more = not session.over and (in_time or spent[name] <= session.case_seconds / len(names))
        return len(seconds[name]) < least or more

    for turn in range(session.rounds if runs else 0):
        first = turn % len(names)
        for name in filter(goes_on, names[first:] + names[:first]):
            begun = time.monotonic()
            if seconds[name] and min(seconds[name]) < SHORT_SECONDS:
                runs[name]()
            synchronize(session.device)
            start = time.perf_counter()
            for _ in range(in_a_row[name]):
                runs[name]()
            synchronize(session.device)
            seconds[name].append((time.perf_counter() - start) / in_a_row[name])
            spent[name] += time.monotonic() - begun
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
    if not PEERS[row.peer].has_memory:
        return row
    moved = floor_bytes(row.case, row.mode)
    achieved = moved / (p50 / 1000)
    share = achieved / session.bytes_per_second
    return replace(row, floor_bytes=moved, bytes_per_second=achieved, floor_share=share)


def _with_peak(row: Row, network: Network, call: Callable[[], Any], session: Session) -> Row:
    """A row with its peak memory, where it can be measured, or with the reason why it was not."""
    peer, on_gpu = PEERS[row.peer], session.device.type == "cuda"
    # On a CPU the compiler's memory would count, and each process takes long.
    if peer.hides_memory or (not on_gpu and (peer.compiles or row.mode != TRAINING)):
        return row
    if reason := session.over:
        return replace(row, note=f"the memory of {row.peer} on {row.case.configuration}, {row.mode}: {reason}")
    try:
        if on_gpu:
            return replace(row, peak_bytes=gpu_peak(call, network.module))
        return replace(row, peak_bytes=cpu_peak(row.case, row.peer, row.mode, torch.get_num_threads()))
    except Exception as error:  # the process was killed, say; the time is known nevertheless
        return replace(row, note=_what_happened(f"measuring the memory of {row.peer}", row.case, error, session))


def _clean_up(case: Case, networks: dict[str, Network], session: Session) -> None:
    """Release what a case has compiled and allocated: the next case is another network."""
    if session.lost:  # there is no next case, and nothing can be released
        return
    try:
        networks.clear()
        torch.compiler.reset()
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:  # of an earlier call, reported by the device only now
        session.left_out.append(_what_happened("cleaning up", case, error, session))
