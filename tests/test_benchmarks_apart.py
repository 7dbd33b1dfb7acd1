"""What the benchmark measures in a process of its own, and how that stands among the others."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from itertools import chain

import pytest
import torch
from tiny_benchmark import CASE, _tiny_configuration_without_peer, session  # noqa: F401

from benchmarks import apart, measure
from benchmarks.__main__ import main
from benchmarks.peers import OURS

# In the place of `python -m benchmarks`: measures, dies in the second mode, finds nothing to measure, does not stop, or
# dies while it writes.
CHILD = """
import json, pathlib, sys, time
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
mode, names, how = value("--modes"), value("--configurations").split(","), HOW
row = lambda name: dict(ROW, configuration=name, mode=mode, peer=value("--peers"))
out = pathlib.Path(value("--output"), "gpu-2026-01-02.json")
def write(names, notes=()):
    out.write_text(json.dumps(dict(machine={}, left_out=list(notes), rows=[row(name) for name in names])))
if how == "good":
    write(names, ["tiny: too large"])
if how == "dies" and mode == "forward":
    write(names[:1])
    print("tiny: timing\\rCUDA error\\r", end="")
    sys.exit(5)
if how == "nothing":
    write([], ["tiny: too large"])
    sys.exit(2)
if how == "hangs":
    write(names[:1])
    time.sleep(60)
if how == "half":
    out.write_text('{"machine": ')
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Makes the peer's process do what a test says. Returns what sets that, and the list of commands asked for."""
    times = {f"ms_per_step_p{percentile}": 6.0 for percentile in (20, 50, 80)}
    record = apart.files.record_of(measure.Row(CASE, "", "", "measured", **times))
    exact, asked = apart._command, []

    def be(how):
        def command(*arguments):
            asked.append(exact(*arguments))
            text = CHILD.replace("HOW", repr(how), 1).replace("ROW", repr(record), 1)
            return [sys.executable, "-c", text, *asked[-1][4:]]

        monkeypatch.setattr(apart, "_command", command)

    return be, asked


def options_of(*arguments):
    from benchmarks.__main__ import _parser

    return _parser().parse_args(["run", *arguments])


def test_a_peer_is_measured_apart_a_process_per_mode(child):
    be, asked = child
    be("good")
    here = session()
    numbers = ["--rounds", "7", "--case-seconds", "1.5", "--compile-seconds", "9", "--threads", "1"]
    options = options_of("--modes", "training,forward", *numbers)
    other = replace(CASE, configuration="other")
    found = apart.measure_apart("compiled_cuda_graphs", [CASE, other], options.modes, options, here)
    rows = list(chain.from_iterable(found))
    names = [("tiny", "training"), ("other", "training"), ("tiny", "forward"), ("other", "forward")]
    assert [(row["configuration"], row["mode"]) for row in rows] == names
    where = "compiled_cuda_graphs, {}, in a process of its own: tiny: too large"
    assert here.left_out == [where.format(mode) for mode in ("training", "forward")]
    assert [command[:4] for command in asked] == [[sys.executable, "-m", "benchmarks", "run"]] * 2
    theirs = options_of(*[word.replace("tiny,other", "tiny") for word in asked[0][4:]])
    assert (theirs.device, theirs.peers, theirs.modes) == (["cuda"], ["compiled_cuda_graphs"], ["training"])
    assert (theirs.rounds, theirs.case_seconds, theirs.threads, theirs.seconds) == (7, 1.5, 1, None)
    assert theirs.compile_seconds == 9
    assert theirs.no_memory
    assert theirs.no_report


def test_a_peer_apart_that_dies_costs_only_its_own_rows(child, monkeypatch):
    be, _ = child
    where = "compiled_cuda_graphs, {}, in a process of its own: "
    other = replace(CASE, configuration="other")

    def outcome(how, here):
        be(how)
        options = options_of("--modes", "training,forward")
        found = apart.measure_apart("compiled_cuda_graphs", [CASE, other], options.modes, options, here)
        rows = list(chain.from_iterable(found))
        return [(row["configuration"], row["mode"]) for row in rows], here.left_out

    rows, notes = outcome("dies", session())
    assert rows == [("tiny", "forward")]
    assert notes == [where.format("forward") + "ended with status 5: CUDA error"]
    rows, notes = outcome("nothing", session())
    assert (rows, notes) == ([], [where.format(mode) + "tiny: too large" for mode in ("training", "forward")])
    rows, notes = outcome("half", session())
    assert rows == []
    assert ["Expecting value" in note for note in notes] == [True, True]
    monkeypatch.setattr(apart, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(apart, "OVERTIME", 3.0)
    rows, notes = outcome("hangs", session(deadline=time.monotonic() + 1 / apart.SHARE))
    assert rows == [("tiny", "training")]
    stopped = "killed, for it did not stop when its time was up"
    assert notes == [where.format("training") + stopped, where.format("forward") + "the time is up"]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("", ""),
        ("import sys; print('tiny: timing'); sys.exit('no memory')", "ended with status 1: no memory"),
        ("raise SystemExit(3)", "ended with status 3: it said nothing"),
    ],
)
def test_what_a_process_says_at_its_end_is_told(code, word, tmp_path):
    """One that ends by itself shortly after its time is up has ended well."""
    assert apart._run([sys.executable, "-u", "-c", code], 0.0, tmp_path / "log") == word


def test_a_peer_apart_has_its_share_of_the_time_that_is_left(child):
    be, asked = child
    be("good")
    here = session(deadline=time.monotonic() + 1000)
    list(apart.measure_apart("compiled_cuda_graphs", [CASE], ["forward"], options_of(), here))
    (seconds,) = (options_of(*command[4:]).seconds for command in asked)
    assert 300 < seconds <= 1000 * apart.SHARE


def test_who_is_interrupted_has_what_a_peer_apart_has_done(child, monkeypatch):
    be, _ = child
    be("good")
    exact, here = apart._run, session()

    def interrupted(*arguments):
        exact(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(apart, "_run", interrupted)
    options = options_of("--modes", "training,forward")
    found = apart.measure_apart("compiled_cuda_graphs", [CASE], options.modes, options, here)
    assert [row["configuration"] for row in next(found)] == ["tiny"]
    assert here.left_out[-1] == "compiled_cuda_graphs, training, in a process of its own: interrupted"
    with pytest.raises(KeyboardInterrupt):
        next(found)


@pytest.mark.parametrize("peers_asked", ["dnc_triton,compiled_cuda_graphs,lstm", "compiled_cuda_graphs"])
def test_what_was_measured_apart_stands_among_the_others(tmp_path, monkeypatch, peers_asked):
    """On the CPU in a GPU's place. Alone, the peer is measured in this process, else there would be no end."""
    record = apart.files.record_of(
        measure.Row(CASE, "forward", "compiled_cuda_graphs", "measured", ms_per_step_p50=6.0)
    )
    called = []

    def measure_apart(name, cases, modes, options, session):
        called.append((name, [case.configuration for case in cases]))
        return ([dict(record, mode=mode)] for mode in ("forward", "step"))

    def measured(case, names, modes, session, done):
        assert called == [("compiled_cuda_graphs", ["tiny"])] * ("," in peers_asked)
        for mode in modes:
            done([measure.Row(case, mode, name, "measured", ms_per_step_p50=2.0) for name in names])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # put back
    monkeypatch.setattr(apart, "measure_apart", measure_apart)
    monkeypatch.setattr("benchmarks.__main__.measure", measured)
    for speed in ("bytes_per_second", "product_speed"):
        monkeypatch.setattr(f"benchmarks.__main__.{speed}", lambda device: 1e9)
    machine = {"date": "2026-01-02T03", **dict.fromkeys(apart.files.MEANS[1:-1])}
    monkeypatch.setattr("benchmarks.__main__.describe_machine", lambda command: {**machine, "device": "cuda"})
    arguments = ["--device", "cuda", "--configurations", "tiny", "--sweeps", "T", "--modes", "step,training,forward"]
    assert main([*arguments, "--peers", peers_asked, "--no-report", "--output", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv"}
    rows = json.loads((tmp_path / "gpu-2026-01-02.json").read_text())["rows"]
    found = [(row["mode"], row["peer"], row["ratio"]) for row in rows if not row["sweep"]]
    assert [row["configuration"] for row in rows if row["sweep"]] != []
    if "," not in peers_asked:
        assert found == [(mode, "compiled_cuda_graphs", None) for mode in ("step", "training", "forward")]
        return
    assert {row["peer"] for row in rows if row["sweep"]} == {OURS, "lstm"}
    theirs = [("compiled_cuda_graphs", 3.0)]
    expected = {"step": theirs, "training": [], "forward": theirs}
    assert found == [
        (mode, *row) for mode, between in expected.items() for row in [(OURS, None), *between, ("lstm", None)]
    ]
