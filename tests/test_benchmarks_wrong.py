"""The benchmark times nothing that is wrong or missing, and what breaks costs the others nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from tiny_benchmark import CASE, CPU, TINY, _tiny_configuration_without_peer, run, session  # noqa: F401

from benchmarks import measure, peers, verify
from benchmarks.configurations import CONFIGURATIONS
from benchmarks.modes import MODES, draw_inputs
from benchmarks.peers import EAGER, OURS, PEERS, MissingPeerError, Network
from dnc_reference.interface import interface_sizes

# --- right or wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [float("nan"), 1.0])
def test_a_wrong_layer_gets_no_time(tmp_path, monkeypatch, capsys, off):
    monkeypatch.setattr(verify, "error", lambda network, mode, truth: off)
    status, rows, _ = run(tmp_path, "--modes", "forward")
    assert status == 1
    assert [row["status"] for row in rows] == ["wrong", "wrong", "missing", "wrong"]
    assert not any(row["ms_per_step_p50"] for row in rows)
    assert f"{OURS} is wrong on tiny, forward: off by {off:.1e}" in capsys.readouterr().out


def test_another_wrong_network_costs_the_others_nothing(monkeypatch):
    exact = peers.make_layer

    def off(case, device, *, backend):
        network = exact(case, device, backend=backend)
        return replace(network, run=lambda inputs, state: (network.run(inputs, state)[0] * 1.01, None))

    monkeypatch.setitem(PEERS, EAGER, replace(PEERS[EAGER], make=partial(off, backend=EAGER)))
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, EAGER], ["training"], session())}
    assert (rows[OURS].status, rows[EAGER].status) == ("measured", "wrong")
    assert rows[EAGER].ms_per_step_p50 is None
    assert "reference is wrong on tiny, training: off by" in rows[EAGER].note


def test_a_wrong_gradient_is_noticed():
    """Of any parameter; and so is a gradient that is not there."""
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["training"])
    network = peers.make_layer(CASE, CPU, backend="auto")
    assert verify.error(network, "training", truth) <= truth.allowed["training"]
    for name, parameter in network.module.named_parameters():
        handle = parameter.register_hook(lambda gradient: gradient * 1.001)
        assert verify.error(network, "training", truth) > truth.allowed["training"], name
        handle.remove()
        parameter.requires_grad_(False)
        assert verify.error(network, "training", truth) > truth.allowed["training"], name
        parameter.requires_grad_(True)
    assert verify.error(network, "training", truth) <= truth.allowed["training"]


@pytest.mark.parametrize("field", interface_sizes(1, 1, 1))
def test_a_gradient_that_is_missing_is_noticed_however_small_it_is(field):
    """At these sizes those of free gates and the write strength are smaller than the error allowed for the largest."""
    case = replace(CASE, memory_size=64, word_size=16, hidden_size=32, num_layers=1, steps=5)
    truth = verify.find_truth(case, draw_inputs(case, CPU), ["training"])
    network = peers.make_layer(case, CPU, backend="auto")
    assert verify.error(network, "training", truth) <= truth.allowed["training"]
    sizes = interface_sizes(case.num_reads, 1, case.word_size)
    parts = [torch.full([size], float(name != field)) for name, size in sizes.items()]
    for parameter in network.module.interface.parameters():
        kept = torch.cat(parts).view(-1, *[1] * (parameter.dim() - 1))
        parameter.register_hook(lambda gradient, kept=kept: gradient * kept)
    assert verify.error(network, "training", truth) > truth.allowed["training"]


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("field", interface_sizes(1, 1, 1))
def test_a_field_that_is_not_used_is_noticed(field, mode):
    """In the memory, where outputs hardly tell: as long as no slot was written to twice, none is worth freeing."""
    case = replace(CASE, memory_size=16, word_size=16, num_reads=1, hidden_size=32, num_layers=1, steps=5)
    truth = verify.find_truth(case, draw_inputs(case, CPU), [mode])
    network = peers.make_layer(case, CPU, backend="auto")
    assert verify.error(network, mode, truth) <= truth.allowed[mode]
    sizes = interface_sizes(case.num_reads, 1, case.word_size)
    for parameter in network.module.interface.parameters():
        dict(zip(sizes, parameter.detach().split(list(sizes.values())), strict=True))[field].zero_()
    assert verify.error(network, mode, truth) > truth.allowed[mode]


def test_a_state_that_is_lost_is_noticed():
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["step"])
    layer = peers.make_layer(CASE, CPU, backend="auto").module
    assert verify.error(Network(layer, layer), "step", truth) <= truth.allowed["step"]
    forgetful = Network(layer, lambda inputs, state: layer(inputs, None))
    assert verify.error(forgetful, "step", truth) > truth.allowed["step"]


@pytest.mark.parametrize("mode", ["training", "forward"])
def test_steps_that_are_missing_are_noticed(mode):
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), [mode])
    layer = peers.make_layer(CASE, CPU, backend="auto").module
    with pytest.raises(ValueError, match=r"outputs: expected \[2, 3, 2\], got \[2, 2, 2\]"):
        verify.error(Network(layer, lambda inputs, state: layer(inputs[:, :2])), mode, truth)


def test_parameters_that_are_missing_are_noticed():
    """They would have no gradient to compare."""
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["training"])
    layer = peers.make_layer(CASE, CPU, backend="auto").module
    with pytest.raises(ValueError, match=r"parameters: expected .*interface.weight.*, got weight, bias"):
        verify.error(Network(layer.output, layer), "training", truth)


def test_as_many_steps_are_verified_as_is_said():
    """The first ones of a longer sequence; one by one, no more than ten."""
    case = replace(CASE, steps=60)
    inputs = draw_inputs(case, CPU)
    truth = verify.find_truth(case, inputs, ["forward", "step"])
    assert torch.equal(truth.inputs, inputs[:, :50])
    assert truth.outputs.shape == (case.batch, 50, case.output_size)
    assert truth.outputs.dtype == torch.float64
    layer = peers.make_layer(case, CPU, backend="auto").module
    for mode, last in (("forward", 49), ("step", 9)):
        assert verify.error(Network(layer, layer), mode, truth) <= truth.allowed[mode]
        steps = []

        def off(given, state, steps=steps, last=last):
            outputs, state = layer(given, state)
            steps.append(given.shape[1])
            wrong = torch.zeros_like(outputs)
            if sum(steps) > last:
                wrong[:, -1] = 0.01
            return outputs + wrong, state

        network = Network(layer, off)
        assert verify.error(network, mode, truth) > truth.allowed[mode]
        assert sum(steps) == last + 1


@pytest.mark.parametrize(("off", "allowed"), [(0.0, 1e-5), (3e-5, 7e-5), (0.5, 2.1e-4)])
def test_a_poor_reference_does_not_widen_the_tolerance_at_will(monkeypatch, off, allowed):
    monkeypatch.setattr(verify, "error", lambda network, mode, truth: off)
    truth = verify.find_truth(CASE, draw_inputs(CASE, CPU), ["forward"])
    assert truth.allowed == {"forward": pytest.approx(allowed)}


# --- missing ----------------------------------------------------------------------------------------------------------


def test_another_version_of_the_peer_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dnc", ModuleType("dnc"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    with pytest.raises(MissingPeerError, match=r"dnc is installed in version 1\.0; install it with"):
        peers.make_pypi_dnc(CASE, CPU)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(peers, "COMPILER", "no-compiler++")
    with pytest.raises(MissingPeerError, match=r"needs a compiler of C or C\+\+, there is no no-compiler\+\+"):
        PEERS["compiled"].make(CASE, CPU)


# --- broken -----------------------------------------------------------------------------------------------------------


def test_a_peer_that_breaks_costs_the_others_nothing(monkeypatch):
    def broken(case, device):
        def run(inputs, state):
            raise RuntimeError("no memory left\nand many more lines")

        return Network(torch.nn.Linear(1, 1), run)

    monkeypatch.setitem(PEERS, "lstm", replace(PEERS["lstm"], make=broken))
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, "lstm"], ["step"], session())}
    assert rows[OURS].status == "measured"
    assert (rows["lstm"].status, rows["lstm"].ms_per_step_p50) == ("failed", None)
    assert rows["lstm"].note == "lstm failed on tiny: RuntimeError: no memory left"


@pytest.mark.parametrize(
    ("peer", "status"), [(OURS, 1), ("torch_sequence", 1), ("triton_split_launched", 1), (EAGER, 0)]
)
def test_a_layer_of_ours_that_breaks_fails_the_run(tmp_path, monkeypatch, peer, status):
    monkeypatch.setitem(PEERS, peer, replace(PEERS[peer], make=lambda case, device: 1 / 0))
    ended, rows, _ = run(
        tmp_path, "--modes", "forward", "--peers", f"{OURS},torch_sequence,triton_split_launched,{EAGER}"
    )
    assert {row["peer"] for row in rows if row["status"] == "failed"} == {peer}
    assert ended == status


def test_an_oracle_that_breaks_leaves_the_case_without_times(monkeypatch):
    monkeypatch.setattr(verify, "find_truth", lambda *arguments: 1 / 0)
    rows = measure.measure(CASE, [OURS], list(MODES), session())
    assert [(row.mode, row.status) for row in rows] == [(mode, "failed") for mode in MODES]
    assert rows[0].note == "the oracle failed on tiny: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("name", "device", "mode", "checks"),
    [
        (OURS, "cuda", "training", 3),
        ("torch_sequence", "cuda", "forward", 3),
        (OURS, "cuda", "captured", 1),
        (OURS, "cpu", "training", 1),
        (EAGER, "cuda", "training", 1),
        ("lstm", "cuda", "training", 0),
    ],
)
def test_what_is_replayed_is_checked_when_it_is(monkeypatch, name, device, mode, checks):
    """It is captured in the second call, so one is not enough."""
    network, inputs = PEERS[name].make(CASE, CPU), draw_inputs(CASE, CPU)
    truth, checked = verify.find_truth(CASE, inputs, ["training", "forward"]), []
    truth.allowed["captured"] = truth.allowed["training"]
    monkeypatch.setattr(verify, "error", lambda network, mode, truth: checked.append(mode) or 0.0)
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    monkeypatch.setattr(measure, "call_of", lambda *arguments: lambda: None)
    row, _ = measure._check(CASE, mode, name, network, truth, inputs, session(device=torch.device(device)))
    assert (row.status, checked) == ("measured", [mode] * checks)


@pytest.mark.parametrize(("mode", "steps"), [("training", 3), ("forward", 3), ("step", 1)])
def test_a_backend_is_asked_for_what_is_timed(mode, steps):
    """Before and after: with gradients where it trains, one step where it is one."""
    asked = []

    def backend(inputs):
        asked.append((inputs.shape[1], torch.is_grad_enabled()))
        return EAGER

    network, inputs = replace(PEERS[EAGER].make(CASE, CPU), backend=backend), draw_inputs(CASE, CPU)
    truth = verify.find_truth(CASE, inputs, [mode])
    row, _ = measure._check(CASE, mode, EAGER, network, truth, inputs, session())
    assert (row.status, row.backend) == ("measured", EAGER)
    assert asked == [(steps, mode == "training")] * 2


def test_once_the_device_is_lost_no_other_network_is_run(monkeypatch):
    here = session()
    monkeypatch.setattr(verify, "error", lambda *arguments: setattr(here, "lost", "gone") or 0.0)
    monkeypatch.setattr(measure, "_time_all", lambda case, mode, checked, runs, session: (checked, runs))
    monkeypatch.setattr(verify, "find_truth", lambda *arguments: verify.Truth(None, None, {}, {}, [], {"forward": 1.0}))
    rows = {row.peer: row for row in measure.measure(CASE, [OURS, "lstm"], ["forward"], here)}
    assert (rows["lstm"].status, rows["lstm"].note) == ("left out", "lstm on tiny, forward: gone")


def test_a_failure_while_timing_or_counting_memory_is_noted(monkeypatch):
    monkeypatch.setattr(measure, "cpu_peak", lambda *arguments: 1 / 0)
    (row,) = measure.measure(CASE, [OURS], ["training"], session(peak_memory=True))
    assert row.status == "measured"
    assert row.note == "measuring the memory of dnc_triton failed on tiny: ZeroDivisionError: division by zero"
    monkeypatch.setattr(measure, "_time_in_turns", lambda *arguments: 1 / 0)
    (row,) = measure.measure(CASE, [OURS], ["training"], session())
    assert (row.status, row.ms_per_step_p50) == ("failed", None)


def test_of_a_device_that_stopped_working_the_first_failure_is_told(monkeypatch):
    monkeypatch.setattr(measure, "synchronize", lambda device: 1 / 0)
    here = session()
    for name in ("lstm", "timing"):
        measure._what_happened(name, CASE, RuntimeError("why"), here)
    assert here.lost == here.over == "the device was lost when lstm failed on tiny"


@pytest.mark.parametrize("place", ["timing", "cleaning up", "the oracle"])
def test_a_device_that_stops_working_costs_nothing_that_was_measured(tmp_path, monkeypatch, capsys, place):
    monkeypatch.setitem(CONFIGURATIONS, "tiny_too", TINY)
    broken = []
    message = "CUDA error: an illegal memory access was encountered\nand many more lines"

    def break_it(*arguments):
        broken.append(place)
        raise RuntimeError(message)

    def synchronize(device):
        if broken:
            raise RuntimeError(message)

    def time_in_turns(runs, session, in_a_row):
        return break_it() if place == "timing" and len(list(tmp_path.iterdir())) else {name: [1e-3] for name in runs}

    monkeypatch.setattr(measure, "synchronize", synchronize)
    monkeypatch.setattr(measure, "_time_in_turns", time_in_turns)
    if place == "cleaning up":
        monkeypatch.setattr(torch.compiler, "reset", break_it)
    if place == "the oracle":
        exact = verify.find_truth
        monkeypatch.setattr(
            verify, "find_truth", lambda c, *a: (break_it if "too" in c.configuration else exact)(c, *a)
        )
    arguments = ["--configurations", "tiny,tiny_too", "--modes", "forward,step", "--peers", "dnc_triton,lstm"]
    status, rows, content = run(tmp_path, *arguments)
    assert status == 1
    found = {(row["configuration"], row["mode"]): row["status"] for row in rows}
    lost = f"the device was lost when {place} failed on "
    error = f"{place} failed on {{}}: RuntimeError: CUDA error: an illegal memory access was encountered"
    if place == "timing":
        assert found == {("tiny", "forward"): "measured", ("tiny", "step"): "failed"}
        assert rows[-1]["note"] == error.format("tiny")
        assert content["left_out"] == [f"tiny_too, {mode}: {lost}tiny" for mode in ("forward", "step")]
    elif place == "cleaning up":
        assert found == {("tiny", mode): "measured" for mode in ("forward", "step")}
        assert content["left_out"] == [
            error.format("tiny"),
            *(f"tiny_too, {mode}: {lost}tiny" for mode in ("forward", "step")),
        ]
    else:
        assert [status for (name, _), status in found.items() if name == "tiny"] == ["measured"] * 2
        assert {row["note"] for row in rows if row["configuration"] == "tiny_too"} == {error.format("tiny_too")}
    assert error.format("tiny_too" if place == "the oracle" else "tiny") in capsys.readouterr().out
