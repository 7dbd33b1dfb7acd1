"""The commands: each says what it is for, and does it on a run that is there."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from small_runs import SHORT, SMALL, assert_same_run

from dnc_triton.cli import main
from dnc_triton.tasks import Batch, CopyTask
from dnc_triton.training import checkpoint
from dnc_triton.training.folder import WRITTEN
from dnc_triton.training.learner import Learner
from dnc_triton.training.run import PARTS, Run
from dnc_triton.training.settings import Settings
from dnc_triton.tuning import NothingWorks, triton_version


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """What a shell runs in the background ignores Ctrl-C, unless it asks to be told."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    assert main([*SHORT, "--run", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["train", "evaluate", "trace", "bench", "info", "--resume", "first steps", "about a minute"]),
        (["train", "copy"], ["--resume", "--config", "--precision", "--max-length", "default: 10", "--workers"]),
        (["evaluate"], ["--checkpoint", "best", "--sequences", "at least"]),
        (["trace"], ["--size", "--index", "memory.html"]),
        (["bench", "copy"], ["--memory-size", "--device"]),
        (["info"], ["whose DNC", "--device"]),
    ],
    ids=lambda value: " ".join(value) or "none",
)
def test_help_says_what_there_is(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--help"])
    assert done.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in printed


def test_a_task_need_not_explain_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(CopyTask, "arguments", {})
    with pytest.raises(SystemExit) as done:
        main(["train", "copy", "--help"])
    assert done.value.code == 0
    assert "--num-bits NUM_BITS (default: 8)" in " ".join(capsys.readouterr().out.split())


def test_what_a_run_writes_is_known(run: Path) -> None:
    assert {path.name for path in run.iterdir()} <= set(WRITTEN)


@pytest.mark.parametrize("name", ["triton_fused", "nope"])
@pytest.mark.parametrize("command", ["train", "bench", "evaluate"])
def test_a_backend_that_cannot_serve_gets_a_clear_word(
    command: str, name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNC_TRITON_BACKEND", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([command, str(run)] if command == "evaluate" else [command, "copy", *SMALL]) == 2
    *logged, line = capsys.readouterr().err.splitlines()
    assert all("No CUDA runtime is found" in other for other in logged), (
        "but for what PyTorch says of a GPU that is not there"
    )
    assert line.startswith("dnc_triton: DNC_TRITON_BACKEND: expected 'auto' or ")
    assert f"got {name!r}" in line
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_run_time_are_not_hidden(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Run, "score", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["evaluate", str(run)])


@pytest.mark.parametrize(
    ("flag", "size", "words"),
    [
        ("--hidden-size", 10**12 - 1, "can't allocate memory"),
        ("--hidden-size", 10**18, "overflow"),  # more bytes than an integer can count
        ("--hidden-size", 10**19, "Overflow"),  # itself more than a size can be
        ("--num-layers", 10**19, "int"),
    ],
)
def test_want_of_memory_is_one_line(
    flag: str, size: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*SHORT, flag, str(size), "--run", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dnc_triton: no room for these sizes: ")
    assert words in line


def test_want_of_memory_of_a_gpu_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(run: Run) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")

    monkeypatch.setattr(Run, "train", full)
    assert main([*SHORT, "--run", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "dnc_triton: no room for these sizes: CUDA out of memory. Tried to allocate 2 GiB."


def test_a_backend_that_fails_on_this_gpu_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(run: Run) -> None:
        raise NothingWorks("backend 'triton_fused', asked for by DNC_TRITON_BACKEND: nothing works: wrong results")

    monkeypatch.setattr(Run, "train", fail)
    assert main([*SHORT, "--run", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dnc_triton: backend 'triton_fused', asked for by DNC_TRITON_BACKEND: ")


def test_want_of_memory_of_a_worker_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--batch-size", str(10**12), "--workers", "1"]
    assert main([*SHORT, *sizes, "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("dnc_triton: no room for these sizes: ")
    assert "can't allocate memory" in line


@pytest.mark.parametrize(
    ("asked", "unbuffered", "status"),
    [
        ("evaluate RUN --sequences 10", "", 141),
        ("evaluate RUN --sequences 10", "1", 141),
        ("--help", "", 141),
        ("--help", "1", 0),  # argparse does not look whether it could be written
    ],
)
def test_what_nobody_reads_any_more_is_no_error(asked: str, unbuffered: str, status: int, run: Path) -> None:
    """Whether it is written at once or waits in a buffer until the end."""
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "dnc_triton", *(str(run) if word == "RUN" else word for word in asked.split())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process: subprocess.Popen = subprocess.Popen(command, env=variables, **pipes)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", status)


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("train", "dnc_triton.training.run.make_fabric"),
        ("train", "dnc_triton.training.report.evaluate"),
        ("evaluate", "dnc_triton.training.report.evaluate"),
        ("bench", "dnc_triton.machine.bench"),
    ],
)
def test_ctrl_c_ends_any_command_with_a_word(
    command: str, where: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(where, lambda *arguments, **named: os.kill(os.getpid(), signal.SIGINT))
    arguments = {
        "train": [*SHORT, "--run", str(tmp_path / "run")],
        "evaluate": ["evaluate", str(run)],
        "bench": ["bench", "copy", *SMALL],
    }
    assert main(arguments[command]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "dnc_triton: interrupted"


@pytest.mark.parametrize("status", [0, 2])
def test_one_of_many_processes_ends_with_its_status_and_all_that_it_said(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends by `os._exit`, after which nothing that waits in a buffer is written."""
    said, ended = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), []

    def info(*arguments: object) -> str:
        print("to begin with")
        if status:
            raise ValueError("no such device")
        return "the rest"

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dnc_triton.machine.info", info)
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setattr(os, "_exit", lambda number: ended.append((number, said.buffer.getvalue())))
    main(["info"])
    assert ended == [(status, b"to begin with\n" + b"the rest\n" * (not status))]


def test_a_second_ctrl_c_in_training_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt_twice(*arguments: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(CopyTask, "sample_training", interrupt_twice)
    assert main([*SHORT, "--run", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "dnc_triton: interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "RUN", "--sequences", "0"], "--sequences: expected at least 1, got 0"),
        (["train", "copy", "--resume", "RUN", "--config", "RUN/settings.toml"], "leave --config out"),
        (["evaluate", "RUN", "--device", "nope"], "--device: expected a device that this machine has, got 'nope'"),
        (["trace", "RUN", "--device", "nope"], "--device: expected a device that this machine has, got 'nope'"),
        (["bench", "copy", "--device", "nope"], "--device: expected a device that this machine has, got 'nope'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_asked_of_a_run_gets_a_clear_word(
    arguments: list[str], words: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    assert words in capsys.readouterr().err


def test_evaluate_prints_the_table_of_the_training(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "copy, step 20 of 20"
    right = json.loads((run / "result.json").read_text())["sequences_right"]
    for name, by_model in right.items():
        (line,) = (line for line in lines if line.startswith(name))
        assert line.split()[-2:] == [f"{share:.1%}" for share in by_model.values()]


def test_the_best_checkpoint_is_that_of_the_best_validation(run: Path, capsys: pytest.CaptureFixture) -> None:
    validations = checkpoint.load(run / "checkpoint.pt")["validations"]
    assert [row["step"] for row in validations] == [10, 20]
    best = max(validations, key=lambda row: (row["dnc_right"], -row["dnc_loss"]))
    content = checkpoint.load(run / "best.pt")
    assert content["step"] == content["best"]["step"] == best["step"]
    # It has the weights of that step: validated again, they do as well.
    again = Run.resume(run, name="best.pt")
    assert again.score([1, 2, 3], 200, "validation")["dnc"]["loss"] == best["dnc_loss"]
    assert main(["evaluate", str(run), "--checkpoint", "best", "--sequences", "10"]) == 0
    assert f"step {best['step']} of 20" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "step"), [([], 20), (["--checkpoint", "last"], 20), (["--checkpoint", "best"], 10)])
def test_the_checkpoint_that_is_asked_for_is_evaluated(
    asked: list[str], step: int, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = checkpoint.load(run / "checkpoint.pt")
    for name, of_step in (("checkpoint.pt", 20), ("best.pt", 10)):
        checkpoint.save(tmp_path / name, {**content, "step": of_step})
    assert main(["evaluate", str(tmp_path), "--sequences", "10", *asked]) == 0
    assert capsys.readouterr().out.startswith(f"copy, step {step} of 20\n")


def test_trace_draws_the_memory(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["trace", str(run), "--size", "2", "--index", "1", "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "new" / "memory.html").read_text(encoding="utf-8")[:1000].lower()
    assert capsys.readouterr().out.startswith("input ")
    (tmp_path / "file").write_text("precious")
    assert main(["trace", str(run), "--output", str(tmp_path / "file")]) == 2
    assert f"folder: expected one that can be made, got {tmp_path / 'file'}: " in capsys.readouterr().err
    assert main(["trace", str(run), "--index", "-1"]) == 2
    assert "index: expected at least 0, got -1" in capsys.readouterr().err
    assert main(["trace", str(run), "--size", "0"]) == 2
    assert "size: expected an integer, at least 1, got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("_undrawn")
def test_the_settings_a_run_leaves_give_the_same_run(run: Path, tmp_path: Path) -> None:
    assert Settings.read("copy", run / "settings.toml") == Run.resume(run).settings
    assert main(["train", "copy", "--config", str(run / "settings.toml"), "--run", str(tmp_path / "again")]) == 0
    assert_same_run(run, tmp_path / "again")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 'many'", ["steps", "expected a value of type int", "got 'many'"]),
        ("steps = true", ["steps", "expected a value of type int", "got True"]),
        ("no_such = 1", ["no_such is no setting"]),
        ("task = 3", ["a table [task]", "got task = 3"]),
        ("[task]\nmax_length = 'long'", ["max_length", "expected a value of type int", "got 'long'"]),
        ("steps = ", ["expected a TOML file"]),
        ("[task]\nname = 'repeat_copy'", ["settings of the task 'copy'", "got those of 'repeat_copy'"]),
    ],
)
def test_a_file_of_settings_that_is_none_is_refused(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    assert main(["train", "copy", "--config", str(path), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_file_of_settings_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "none.toml"
    assert main(["train", "copy", "--config", str(path), "--run", str(tmp_path / "run")]) == 2
    assert f"{path}: expected a TOML file of settings, found none" in capsys.readouterr().err
    assert main(["train", "copy", "--config", str(tmp_path), "--run", str(tmp_path / "run")]) == 2
    assert f"{tmp_path}: expected a TOML file of settings, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "argument", "value", "expected"),
    [
        ("babi", "kinds", 1, "str"),
        ("babi", "path", ["a"], "str"),
        ("translation", "locales", ["en", "de"], "str"),
        ("babi", "min_facts", "6", "int"),
    ],
)
def test_an_argument_of_a_task_has_its_type(task: str, argument: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected a value of type {expected}, got"):
        Settings(task, {argument: value})


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    for given in ({"path": "data/📚 é", "kinds": "1"}, {"path": None}):
        path = tmp_path / "settings.toml"
        path.write_text(Settings("babi", given).toml(), encoding="utf-8")
        whole = {"path": os.path.abspath("data/📚 é"), "kinds": "1"} if given["path"] else {}
        assert Settings.read("babi", path).task_arguments == whole


def test_data_are_found_from_wherever_a_run_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_a_file.toml").write_text('[task]\npath = "en-10k"\n')
    for given in (["--path", "en-10k"], ["--config", "of_a_file.toml"]):
        assert main(["train", "babi", *given, "--run", "run"]) == 2
        assert f"got {tmp_path / 'en-10k'}: no such folder" in capsys.readouterr().err


@pytest.mark.usefixtures("_undrawn")
def test_a_run_goes_on_with_arguments_that_nobody_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One that the run's file does not hold has the task's own value, and no other."""
    folder = tmp_path / "a folder"
    Run(Settings("copy", {"max_length": 3}, steps=1, baseline=False), folder).save()
    assert main(["train", "copy", "--resume", str(folder), "--num-bits", "4"]) == 2
    assert "--num-bits 8, got 4; leave it out" in capsys.readouterr().err
    assert main(["train", "copy", "--resume", str(folder), "--num-bits", "8"]) == 0


def test_a_command_that_is_printed_can_be_given_to_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "a folder"
    monkeypatch.setattr(Run, "train", lambda run: run.save())
    assert main([*SHORT, "--run", str(folder)]) == 130
    assert f"--resume '{folder}'" in capsys.readouterr().out
    assert main([*SHORT, "--run", str(folder)]) == 2
    assert f"--resume '{folder}', or" in capsys.readouterr().err


def test_a_command_that_is_printed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Run, "train", lambda run: run.save())
    again = f"--resume {tmp_path / 'run'}"
    assert main([*SHORT, "--run", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().out.endswith(f"{again}\n")
    arguments = ["train", "copy", "--resume", str(tmp_path / "run"), "--device", "cpu:0", "--workers", "1"]
    assert main(arguments) == 130
    assert capsys.readouterr().out.endswith(f"{again} --device cpu:0 --workers 1\n")


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture) -> None:
    for device in ("mps", "cuda", "nope"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        if device == "mps" and torch.backends.mps.is_available():
            continue
        assert main(["info", "--device", device]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--device: expected a device that this machine has, got {device!r}: " in line
        assert len(line) < 400, "what PyTorch knows besides is no help here"


@pytest.mark.usefixtures("_undrawn")
def test_what_is_printed_is_printed_wherever_it_goes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a terminal that does not know all characters, too."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["trace", str(run)]) == 0
    assert b"target" in terminal.buffer.getvalue()


def test_a_table_is_printed_where_nothing_can_be_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "memory.png")

    monkeypatch.setattr("dnc_triton.training.report.draw", refuse)
    assert main(["train", "copy", "--resume", str(run)]) == 2
    printed = capsys.readouterr()
    assert "as trained" in printed.out
    assert "Permission denied" in printed.err


def test_a_run_that_has_ended_is_shown_where_nothing_can_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to add to it. Root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Run, "save", lambda *arguments: pytest.fail("it wrote"))
    assert Run.resume(run).train()


@pytest.mark.parametrize("precision", [pytest.param("64-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_a_run_in_another_precision(precision: str, tmp_path: Path) -> None:
    assert main([*SHORT, "--precision", precision, "--run", str(tmp_path)]) == 0
    weights = checkpoint.load(tmp_path / "checkpoint.pt")["learners"]["dnc"]["model"]["output.weight"]
    assert weights.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert main(["evaluate", str(tmp_path), "--sequences", "10"]) == 0
    assert main(["trace", str(tmp_path)]) == 0


def test_the_parts_of_the_time_are_said(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["seconds_in"].keys() == set(PARTS)
    assert 0 < sum(result["seconds_in"].values()) <= result["seconds"] + 0.1


def test_bench_computes_with_the_threads_that_it_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """PyTorch's timer takes a single one unless told otherwise."""
    used, before, outputs = set(), torch.get_num_threads(), Learner.outputs

    def counted(learner: Learner, batch: Batch) -> torch.Tensor:
        used.add(torch.get_num_threads())
        return outputs(learner, batch)

    monkeypatch.setattr("dnc_triton.machine.SECONDS", 0.01)
    monkeypatch.setattr(Learner, "outputs", counted)
    torch.set_num_threads(2)
    try:
        assert main(["bench", "copy", *SMALL, "--no-baseline"]) == 0
    finally:
        torch.set_num_threads(before)
    assert used == {2}
    assert ", 2 threads; " in capsys.readouterr().out


def test_bench_and_info(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dnc_triton.machine.SECONDS", 0.05)
    update = Learner.update
    # So that training takes longer however busy the machine is.
    monkeypatch.setattr(Learner, "update", lambda self: (time.sleep(0.3), update(self)))
    assert main(["bench", "copy", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "size 3: 4 sequences of 7 steps" in lines[0]
    for line, name in zip(lines[2:], ("DNC", "LSTM"), strict=True):
        words = line.split()
        assert words[0] == name
        forward, training, *per_step = map(float, words[1:])
        assert 0 < forward < 300 < training
        assert per_step == pytest.approx([forward / 7, training / 7], abs=2e-3)
    assert main(["info", "delayed_copy"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "* torch_sequence" in printed
    assert str(tmp_path / "runs") in printed

    def not_found(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dnc_triton.machine.version", not_found)  # as for Triton on ROCm, a package of another name
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info", "delayed_copy"]) == 0
    printed = capsys.readouterr().out
    assert f"{'cuda':<18}none\n" in printed
    assert f"{'cpu':<18}1 thread\n" in printed
    assert f"{'numpy':<18}not installed\n" in printed
    assert f"{'triton':<18}{triton_version() or 'not installed'}\n" in printed
    assert not list(tmp_path.iterdir())
