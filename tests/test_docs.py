"""What the pages say to type works: every block of Python runs, every command exists and takes its arguments.

A page is picked up by being there. Its blocks of Python run in order in one namespace and in an empty folder; one that
imports a package of OPTIONAL that is not installed skips the rest of its page. Commands are those in blocks of `sh` and
those in backticks in the text; they are parsed, and as a slow test those of `dnc_triton` are carried out, in their
order, trainings two steps long and on a CPU.
"""

import argparse
import itertools
import random
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from stories import write_stories

from dnc_triton.cli import main
from dnc_triton.tasks.stories import generate_story

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "toml", "json", "text", ""}  # under another name, bash say, nothing would be checked
OPTIONAL = {"dnc", "lightning", "onnxruntime"}
# By `python -m`, with an argparse of their own.
RUNNABLE = ("dnc_triton", "benchmarks", "tests.fuzz", "tests.fuzz_layer")
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IN_TEXT = re.compile(r"`((?:\S*python -m|make|torchrun|pip) [^`]+)`")


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the page, where the text begins


def blocks(page: str) -> list[Block]:
    return [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in BLOCK.finditer(page)]


def commands(page: str) -> Iterator[list[str]]:
    """The words of each command, without variables in front and without comments."""
    lines = [line for block in blocks(page) if block.language == "sh"
             for line in block.text.replace("\\\n", " ").splitlines()]  # fmt: skip
    for line in lines + IN_TEXT.findall(BLOCK.sub("", page)):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


class Parsed(BaseException):
    """Raised where a program has understood its arguments and would set to work."""


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise an AssertionError unless the command exists and takes its arguments."""
    program = Path(words[0]).name
    if re.fullmatch(r"python3?(\.\d+)?|torchrun", program):
        assert "-m" in words, f"{words}: expected python -m"
        module, *arguments = words[words.index("-m") + 1 :]
        if program != "torchrun":
            assert words[1] == "-m", f"{words}: expected python -m"
        if module in ("pytest", "pip", "venv"):
            return
        assert module.split(".")[0] in RUNNABLE or module in RUNNABLE, f"{words}: no rule for this module"
        understand(module, arguments, monkeypatch)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        asked = {word for word in words[1:] if "=" not in word}
        assert asked <= targets, f"{words}: the Makefile has no {sorted(asked - targets)}"
    elif program == "pip":
        extras = {extra.strip() for word in words for found in re.findall(r"^(?:\.|dnc_triton)\[(.+)\]", word)
                  for extra in found.split(",")}  # fmt: skip
        section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
        there = set(re.findall(r"^([\w-]+) = ", section, re.MULTILINE))
        assert extras <= there, f"{words}: pyproject.toml has no {sorted(extras - there)}"
    else:
        assert words[0] in {"cd", "git", "tensorboard", ".ci/run"}, f"{words}: no rule for this command"


def understand(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module parse its arguments and go no further."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse_args(self, *given, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except Parsed:
            return
        except SystemExit as stopped:
            if stopped.code == 0 and {"-h", "--help"} & set(arguments):
                return
            raise AssertionError(f"{module} {arguments}: it stopped with {stopped.code}") from stopped
    raise AssertionError(f"{module} {arguments}: expected it to parse its arguments")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_that_is_checked(page):
    text = page.read_text()
    assert {block.language for block in blocks(text)} <= LANGUAGES
    assert text.count("\n```") == 2 * len(blocks(text)), "a block that does not end, or one that is indented"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text()):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")  # errors name the page's own line
        try:
            exec(code, namespace)
        except ModuleNotFoundError as missing:
            if missing.name not in OPTIONAL:
                raise
            pytest.skip(f"{missing.name} is not installed: not run from line {block.line} on")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_exist(page, monkeypatch):
    for words in commands(page.read_text()):
        check(words, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for kind, split in itertools.product(range(1, 21), ("train", "test")):  # stories in the place of the published ones
        path = tmp_path / f"tasks_1-20_v1-2/en-10k/qa{kind}_stories_{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_stories([generate_story(1 + kind % 3, 6, 2, draw) for _ in range(20)], path)
    for words in commands(page.read_text()):
        if "dnc_triton" not in words:
            continue
        arguments = ["cpu" if word == "cuda" else word for word in words[words.index("dnc_triton") + 1 :]]
        if arguments[0] == "train" and "--resume" not in arguments:
            arguments += ["--steps", "2"]
        if "RUN" in arguments:
            arguments[arguments.index("RUN")] = str(max(Path("runs").iterdir(), key=lambda run: run.stat().st_mtime))
        assert main(arguments) == 0, arguments
        assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "line",
    [
        "make demonstration",
        "python -m dnc_triton train copy --no-such-flag 3",
        ".venv/bin/python -m dnc_triton train no_such_task",
        "python -m benchmarks compare only_one.json",
        "python -m no_such_module",
        "python no_such_file.py",
        "pip install '.[no_such_extra]'",
        "no_such_program",
    ],
)
def test_a_wrong_command_is_noticed(line, monkeypatch):
    (words,) = commands(f"```sh\n{line}  # with a comment\n```\n")
    with pytest.raises(AssertionError):
        check(words, monkeypatch)


def test_commands_are_found():
    page = "Type `make test`, then:\n```sh\nA=1 make x \\\n  Y=2  # no\n# nothing\n```\n```python\nmake = 1\n```\n"
    assert list(commands(page)) == [["make", "x", "Y=2"], ["make", "test"]]


def test_every_environment_variable_is_listed_on_one_page():
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "dnc_triton").rglob("*.py")))
    read = set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)["']|(DNC_TRITON_[A-Z_]+)""", code))
    read = {name for pair in read for name in pair if name}
    listed = re.findall(r"^\| `(\w+)(?:=\w+)?` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    of_torchrun, of_the_system = {"WORLD_SIZE", "LOCAL_WORLD_SIZE"}, {"XDG_CACHE_HOME", "CXX"}
    assert read - of_torchrun - of_the_system == {name for name in listed if name.isupper()}
