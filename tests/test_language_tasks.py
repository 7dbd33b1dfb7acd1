"""Dates and stories: what is asked follows from what is told, worked out in another way than the task's own."""

from __future__ import annotations

import datetime
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from babel import Locale
from stories import write_stories

from dnc_triton.cli import main
from dnc_triton.tasks import BabiTask, Batch, DatesTask
from dnc_triton.tasks.data import generator
from dnc_triton.tasks.stories import KINDS, VOCABULARY, Line, generate_story, read_stories, words
from dnc_triton.tasks.translation import STYLES

SPLITS = ("train", "validation", "test")


# --- dates ------------------------------------------------------------------------------------------------------------


def read_date(text: str, locale: Locale, style: str) -> datetime.date:
    """What a reader who knows the names of the months makes of it."""
    names = {
        name: month
        for context in ("format", "stand-alone")
        for width in ("wide", "abbreviated")
        for month, name in locale.months[context][width].items()
    }
    year = int(re.findall(r"\d{4}", text)[0])
    numbers = [int(number) for number in re.findall(r"(?<!\d)\d{1,2}(?!\d)", text)]
    if len(numbers) == 1:
        name = max((name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)), key=len)
        return datetime.date(year, names[name], numbers[0])
    letters = re.sub("'[^']*'", "", locale.date_formats[style].pattern)
    month_first = letters.index("M") < letters.index("d")
    month, day = numbers if month_first else numbers[::-1]
    return datetime.date(year, month, day)


def text_and_answer(task: DatesTask, batch: Batch, row: int) -> tuple[str, str]:
    """What a sequence says and what it asks for, from its tensors alone."""
    inputs, scored = batch.inputs[row], batch.scored[row]
    assert batch.lengths is not None
    length = int(batch.lengths[row])
    end = int((inputs.argmax(-1) == task.input_size - 1).nonzero()[0])
    assert inputs[: end + 1].sum(-1).eq(1).all()  # one character per step up to the end marker,
    assert not inputs[end + 1 :].any()  # then nothing
    assert scored.nonzero().flatten().tolist() == list(range(end + 1, end + 11))
    assert length == end + 11
    text = "".join(task.input_vocabulary[channel] for channel in inputs[:end].argmax(-1).tolist())
    return text, "".join(task.vocabulary[symbol] for symbol in batch.targets[row, scored, 0].tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_date_is_what_a_reader_makes_of_it(size: int) -> None:
    task = DatesTask()
    style = STYLES[size - 1]
    locales = [locale for _, locale in task.formats[size]]
    read: set[str] = set()
    for split in SPLITS:
        batch = task.sample(100, size, generator(0, split, 0), split=split)
        for row in range(100):
            text, answer = text_and_answer(task, batch, row)
            made = {read_date(text, locale, style).isoformat() for locale in locales if can_read(text, locale, style)}
            assert made == {answer}, text  # whoever can read it reads the same
            day = datetime.date.fromisoformat(answer)
            assert 1950 <= day.year <= 2049
            assert {8: "validation", 9: "test"}.get(day.toordinal() % 10, "train") == split
            read.add(answer)
    assert len(read) > 250


def can_read(text: str, locale: Locale, style: str) -> bool:
    from babel.dates import format_date

    try:
        return format_date(read_date(text, locale, style), style, locale) == text
    except (KeyError, ValueError):  # another language
        return False


def test_no_day_is_in_two_splits_and_each_in_one() -> None:
    task = DatesTask(first_year=2000, last_year=2003)
    days = [set(task.days[split].tolist()) for split in SPLITS]
    assert sum(map(len, days)) == len(set.union(*days)) == 4 * 365 + 1
    assert [round(10 * len(each) / 1461) for each in days] == [8, 1, 1]
    for split, each in zip(SPLITS, days, strict=True):
        months = {datetime.date.fromordinal(day).timetuple()[1] for day in each}
        assert months == set(range(1, 13)), split


def test_two_digits_of_a_year_are_never_written() -> None:
    task = DatesTask("en,de,es")
    assert [len(task.formats.get(size, ())) for size in (1, 2, 3, 4)] == [0, 3, 3, 3]
    assert task.lessons == [[2, 3, 4]]
    assert "short" not in " ".join(task.evaluations)


def test_a_date_is_shown_as_it_is_written() -> None:
    task = DatesTask("en,pt")
    day = datetime.date(1998, 5, 3)
    batch = task.encode(["3 de maio de 1998", "May 3, 1998"], [day, day])
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [28, 22]
    right = torch.nn.functional.one_hot(batch.targets.squeeze(-1), task.output_size).float()
    assert task.show(right, batch).split("\n") == [
        "input   3 de maio de 1998⏎",
        "target  1998-05-03",
        "output  1998-05-03",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"locales": "en,xx"}, "locales: .*en or pt_BR.* got 'xx' in 'en,xx'"),
        ({"locales": ""}, "locales: .* got ''"),
        ({"locales": "fr,iu"}, "locales: .*contradict.*2024-.* in fr short and for 2024-.* in iu short"),
        ({"first_year": 2000, "last_year": 1999}, "first_year, last_year: .* got 2000, 1999"),
        ({"first_year": 999}, "first_year, last_year: .* got 999, 2049"),
    ],
)
def test_bad_arguments_of_translation(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatesTask(**arguments)


@pytest.mark.slow  # other processes, which import everything
def test_without_babel_only_translation_is_missing() -> None:
    code = (
        "import sys; sys.modules['babel'] = None; from dnc_triton.cli import main; "
        "from dnc_triton.tasks import BabiTask; "
        "BabiTask(); sys.exit(main(['train', 'translation']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "babel is not installed" in done.stderr
    assert "pip install '.[train]'" in done.stderr


# --- stories ----------------------------------------------------------------------------------------------------------


def solve(told: list[str], question: str) -> str:
    """The answer to a question, from the sentences before it: where everything is after each sentence."""
    person_at: dict[str, str] = {}
    carried_by: dict[str, str | None] = {}
    thing_at: dict[str, list[str]] = {}
    for sentence in told:
        name, what = sentence.split()[0], re.findall(r"the (\w+)", sentence)[0]
        if re.search(r"\b(moved|went|travelled|journeyed)\b", sentence):
            assert person_at.get(name) != what
            person_at[name] = what
        elif re.search(r"\b(took|got|grabbed|picked up)\b", sentence):
            assert carried_by.get(what) is None
            assert what not in thing_at or thing_at[what][-1] == person_at[name]
            carried_by[what] = name
        else:
            assert re.search(r"\b(dropped|left|discarded|put down)\b", sentence), sentence
            assert carried_by[what] == name
            carried_by[what] = None
        for thing, carrier in carried_by.items():
            places = thing_at.setdefault(thing, [])
            if carrier is not None and places[-1:] != [person_at[carrier]]:
                places.append(person_at[carrier])
    if asked := re.fullmatch(r"Where is (\w+)\?", question):
        return person_at[asked[1]]
    if asked := re.fullmatch(r"Where is the (\w+)\?", question):
        return thing_at[asked[1]][-1]
    asked = re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question)
    assert asked, question
    places = thing_at[asked[1]]
    return places[max(index for index, place in enumerate(places) if place == asked[2]) - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("questions", [1, 2, 3])
def test_a_solver_agrees_with_every_generated_answer(kind: int, questions: int) -> None:
    draw = random.Random(kind)
    asked: dict[str, int] = {}
    for number in range(300):
        facts = kind * questions + number % 8
        story = generate_story(kind, facts, questions, draw)
        assert len(story) == facts + questions
        assert sum(bool(line.answers) for line in story) == questions
        assert story[-1].answers
        for index, (text, answers, supporting) in enumerate(story):
            assert set(words(text)) | set(answers) <= set(VOCABULARY)
            if answers:
                told = [line.text for line in story[:index] if not line.answers]
                assert (solve(told, text),) == answers
                # The lines that are said to support the answer are statements before it, one of which names it.
                assert all(1 <= line <= index and not story[line - 1].answers for line in supporting)
                assert len(set(supporting)) == kind
                assert any(answers[0] in words(story[line - 1].text) for line in supporting)
                asked[answers[0]] = asked.get(answers[0], 0) + 1
    # No single place is a good guess.
    assert len(asked) == 6
    assert max(asked.values()) < 0.25 * sum(asked.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 10, 1), "kind: expected one of 1, 2, 3, got 4"),
        ((2, 3, 2), "facts: expected at least 4 for 2 question"),
        ((1, 3, 0), "questions: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_of_a_story(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_story(*arguments, random.Random(0))


STORY = [  # the paper's own example, with an answer of two words
    Line("John picked up the milk there."),
    Line("What is John carrying?", ("milk",), (1,)),
    Line("John took the apple there."),
    Line("What is John carrying?", ("milk", "apple"), (1, 3)),
]


def write_example(folder: Path) -> None:
    """A folder with this story alone, which is of kind 8."""
    for split in ("train", "test"):
        write_stories([STORY] * 10, folder / f"qa8_lists-sets_{split}.txt")


def test_a_story_is_encoded_as_the_paper_does(tmp_path: Path) -> None:
    write_example(tmp_path)
    task = BabiTask(str(tmp_path), kinds="8")
    names = task.vocabulary
    given, wanted = task.encode(STORY)
    assert given.shape == (26, 1)
    assert " ".join(names[index] for index in given.flatten()) == (
        "john picked up the milk there . what is john carrying ? - "
        "john took the apple there . what is john carrying ? - -"
    )
    assert [names[index] if index >= 0 else "" for index in wanted] == (
        [""] * 12 + ["milk"] + [""] * 11 + ["milk", "apple"]
    )


def test_a_sentence_is_one_step_if_asked_for(tmp_path: Path) -> None:
    write_example(tmp_path)
    task = BabiTask(str(tmp_path), kinds="8", encoding="sentences")
    batch = task.sample(2, 8, generator(0, "test", 0), split="test")
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [7, 7]
    for row in range(2):
        steps = [{task.vocabulary[place] for place in step.nonzero().flatten()} for step in batch.inputs[row]]
        asked = {"what", "is", "john", "carrying", "?"}
        assert steps == [
            {"john", "picked", "up", "the", "milk", "there", "."},
            asked,
            {"-"},
            {"john", "took", "the", "apple", "there", "."},
            asked,
            {"-"},
            {"-"},
        ]
        assert batch.scored[row].nonzero().flatten().tolist() == [2, 5, 6]
        answers = [task.vocabulary[index] for index in batch.targets[row, batch.scored[row], 0]]
        assert answers == ["milk", "milk", "apple"]
    assert set(batch.inputs.unique().tolist()) == {0, 1}  # a word that comes twice is on like any other


def both_encodings(path: Path | None, kinds: str) -> dict[str, BabiTask]:
    folder = None if path is None else str(path)
    return {encoding: BabiTask(folder, kinds, encoding=encoding) for encoding in ("words", "sentences")}


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_both_encodings_tell_the_same_stories(published: bool, kind: int, split: str, tmp_path: Path) -> None:
    if published:
        write_folder(tmp_path)
    tasks = both_encodings(tmp_path if published else None, "1,2,3")
    words, sentences = (task.sample(20, kind, generator(0, split, 5), split=split) for task in tasks.values())
    assert words.lengths is not None
    assert sentences.lengths is not None
    vocabulary = tasks["words"].vocabulary
    assert vocabulary == tasks["sentences"].vocabulary
    ends = [vocabulary.index(word) for word in ".?-"]
    for row in range(20):
        told, length = words.inputs[row, : words.lengths[row]], int(sentences.lengths[row])
        cuts = [-1, *told[:, ends].any(1).nonzero().flatten().tolist()]
        expected = [told[after + 1 : end + 1].amax(0) for after, end in itertools.pairwise(cuts)]
        assert torch.equal(sentences.inputs[row, :length], torch.stack(expected))
        assert not sentences.inputs[row, length:].any()
        assert torch.equal(sentences.scored[row, :length], words.scored[row, cuts[1:]])
        assert torch.equal(sentences.targets[row, sentences.scored[row]], words.targets[row, words.scored[row]])


def test_a_story_of_sentences_is_shown_sentence_by_sentence() -> None:
    task = BabiTask(encoding="sentences", kinds="1", min_facts=1, max_facts=1, questions=1)
    batch = task.sample(1, 1, generator(0, "test", 0))
    right = torch.nn.functional.one_hot(batch.targets.squeeze(-1), task.output_size).float()
    told, asked, answer = (
        " ".join(task.vocabulary[place] for place in step.nonzero().flatten()) for step in batch.inputs[0]
    )
    place = task.vocabulary[int(batch.targets[0, 2, 0])]
    assert place in told.split()
    assert answer == "-"
    assert task.show(right, batch) == f"{told} {asked} -[{place}; right: {place}]"


@pytest.mark.parametrize("kind", KINDS)
def test_generated_batches_are_padded_stories(kind: int) -> None:
    task = BabiTask(min_facts=6, max_facts=9)
    batch = task.sample(40, kind, generator(0, "train", 1))
    assert batch.lengths is not None
    assert int(batch.lengths.max()) == batch.inputs.shape[1]
    for row, length in enumerate(batch.lengths.tolist()):
        inputs = batch.inputs[row]
        assert inputs[:length].sum(-1).eq(1).all()
        assert not inputs[length:].any()
        text = [task.vocabulary[index] for index in inputs[:length].argmax(-1).tolist()]
        assert batch.scored[row].nonzero().flatten().tolist() == [i for i, word in enumerate(text) if word == "-"]
        assert text.count("-") == 2
        # Read it as a story again: the solver finds the targets.
        told, answers = [], iter(batch.targets[row, batch.scored[row], 0].tolist())
        for sentence in re.findall(r"[^.?]+[.?]", " ".join(text).replace(" - ", " ").removesuffix(" -")):
            sentence = re.sub(r" ([.?])", r"\1", sentence.strip()).capitalize()
            if sentence.endswith("?"):
                sentence = re.sub(r"is (\w+)\?", lambda found: f"is {found[1].capitalize()}?", sentence)
                assert solve(told, sentence) == task.vocabulary[next(answers)]
            else:
                told.append(sentence)


def write_folder(folder: Path) -> None:
    """Generated stories in the layout in which bAbI is published."""
    draw = random.Random(0)
    for kind, name in KINDS.items():
        for split in ("train", "test"):
            written = (generate_story(kind, 6 + number % 3, 2, draw) for number in range(30))
            write_stories(written, folder / f"qa{kind}_{name}_{split}.txt")


def test_stories_survive_the_round_trip_through_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "qa2_two-supporting-facts_train.txt"
    assert re.match(r"1 [A-Z].*\.\n2 .*\.\n3 .*\.\n4 Where is the \w+\? \t\w+\t\d \d\n", path.read_text())
    stories = read_stories(path)
    again = tmp_path / "again.txt"
    write_stories(stories, again)
    assert again.read_bytes() == path.read_bytes()
    draw = random.Random(0)
    for kind in KINDS:
        for split in ("train", "test"):
            expected = [generate_story(kind, 6 + number % 3, 2, draw) for number in range(30)]
            assert read_stories(tmp_path / f"qa{kind}_{KINDS[kind]}_{split}.txt") == expected

    task = BabiTask(str(tmp_path), kinds="3,1,2")
    assert task.lessons == [[1, 2, 3]]
    assert list(task.evaluations) == [f"{kind} {name}" for kind, name in KINDS.items()]
    assert task.vocabulary == VOCABULARY
    for kind in KINDS:
        assert [len(task.stories[kind][split]) for split in SPLITS] == [27, 3, 30]  # type: ignore[index]


def test_the_test_takes_every_story_equally_often(tmp_path: Path) -> None:
    write_folder(tmp_path)
    task = BabiTask(str(tmp_path), kinds="1,2,3")
    batch = task.sample(90, 2, generator(0, "test", 0), split="test")
    assert batch.lengths is not None
    drawn = [tuple(row[:length].argmax(-1).tolist()) for row, length in zip(batch.inputs, batch.lengths, strict=True)]
    stories = [
        task.encode(story)[0].flatten() for story in read_stories(tmp_path / "qa2_two-supporting-facts_test.txt")
    ]
    assert sorted(drawn) == sorted(tuple(story.tolist()) for story in stories for _ in range(3))


@pytest.mark.parametrize("encoding", ["words", "sentences"])
def test_long_stories_are_left_out_of_training_only(encoding: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    whole, cut = (BabiTask(str(tmp_path), kinds="1", max_words=words, encoding=encoding) for words in (800, 50))
    assert whole.stories is not None
    assert cut.stories is not None
    short = [story for story, _ in whole.stories[1]["train"] if (story >= 0).sum() <= 50]
    assert 0 < len(short) < 27
    assert [story.tolist() for story, _ in cut.stories[1]["train"]] == [story.tolist() for story in short]
    for split in ("validation", "test"):
        assert len(cut.stories[1][split]) == len(whole.stories[1][split])
    with pytest.raises(ValueError, match=r"path: .*kind 1.* at most max_words = 5 words, got 30"):
        BabiTask(str(tmp_path), kinds="1", max_words=5, encoding=encoding)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": "4"}, "kinds: expected numbers from 1 to 3 .* got '4'"),
        ({"kinds": "one"}, "kinds: expected numbers .* got 'one'"),
        ({"path": "nowhere", "kinds": "21"}, "kinds: expected numbers from 1 to 20 .* got '21'"),
        ({"min_facts": 2}, "min_facts, max_facts: expected 3 ≤ min_facts .* got 2, 8"),
        ({"min_facts": 9}, "min_facts, max_facts: .* got 9, 8"),
        ({"questions": 0}, "questions: expected an integer, at least 1, got 0"),
        ({"encoding": "letters"}, "encoding: expected one of words, sentences, got 'letters'"),
        ({"path": "nowhere", "questions": -5}, "questions: expected an integer, at least 1, got -5"),
        ({"path": "nowhere", "max_facts": -1}, "max_facts: expected an integer, at least 1, got -1"),
        ({"path": "nowhere"}, r"path: expected the folder en-10k of bAbI .* 40 files .* got nowhere: no such folder"),
    ],
)
def test_bad_arguments_of_babi(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BabiTask(**arguments)


def test_a_folder_that_is_not_whole_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "en-10k").mkdir()
    write_folder(tmp_path / "en-10k")
    with pytest.raises(ValueError, match=r"6 of them missing: qa1_\*_train.txt, .*; \S*en-10k is there"):
        BabiTask(str(tmp_path), kinds="1,2,3")
    with pytest.raises(ValueError, match=r"34 of them missing: qa4_\*_train.txt"):
        BabiTask(str(tmp_path / "en-10k"))
    (tmp_path / "en-10k" / "qa1_copy_train.txt").write_text("")
    with pytest.raises(ValueError, match=r"path: expected one file qa1_\*_train.txt .* got 2"):
        BabiTask(str(tmp_path / "en-10k"), kinds="1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected stories, got an empty file"),
        ("1 Mary moved to the garden.\n2 Where is Mary? \tgar", "line 2: expected question, tab, answer, tab"),
        ("1 Mary moved to the garden.\n2 Where is Mary?", "line 2: expected a question and its answer"),
        ("1 Mary moved to the garden.\tgarden\t1", "line 1: .* or a statement and none"),
        ("1 Mary moved to the garden.\n3 Where is Mary?\tgarden\t1", "line 2: expected number 2 or 1"),
        ("2 Mary moved to the garden.", "line 1: expected number 1, got"),
        ("Mary moved to the garden.", "line 1: expected a number, a space and a sentence"),
        ("1 Where is Mary?\t\t1", "line 1: expected question, tab, answer, tab"),
        ("1 Where - is Mary?\tgarden\t1", "line 1: expected no '-'"),
        ("1 Mary moved to the garden.\n1 Where is Mary?\tgarden\t1", "expected a question in each story"),
        ("1 Where is Mary?\tgarden\t1\n2 Mary moved to the", "expected a question at the end.*cut off"),
        (b"\xff\xfe1", "expected text in UTF-8"),
    ],
)
def test_a_damaged_file_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "qa1_single-supporting-fact_test.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"qa1_single-supporting-fact_test.txt.*{message}"):
        BabiTask(str(tmp_path), kinds="1,2,3")


def test_the_table_is_that_of_the_papers() -> None:
    errors = {"1 single-supporting-fact": {"dnc": 0.0, "lstm": 0.2}, "2 two-supporting-facts": {"dnc": 0.05, "lstm": 1}}
    table = [line.split() for line in BabiTask().table(errors).splitlines()]
    assert table == [
        ["wrong", "words,", "%", "DNC", "LSTM"],
        ["1", "single-supporting-fact", "0.0", "20.0"],
        ["2", "two-supporting-facts", "5.0", "100.0"],
        ["mean", "2.5", "60.0"],
        ["failed", "kinds", "(above", "5", "%)", "0", "2"],
    ]


@pytest.mark.usefixtures("_undrawn")
def test_babi_trains_from_a_folder_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_folder(tmp_path)
    run = tmp_path / "run"
    arguments = ["--hidden-size", "8", "--memory-size", "4", "--word-size", "4", "--batch-size", "4", "--steps", "3"]
    assert main(["train", "babi", "--path", str(tmp_path), "--kinds", "1,2", *arguments, "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "failed kinds (above 5 %)" in printed
    result = json.loads((run / "result.json").read_text())
    assert list(result["words_wrong"]) == ["1 single-supporting-fact", "2 two-supporting-facts"]
    for by_model in result["words_wrong"].values():
        assert 0.5 < by_model["dnc"] <= 1  # nothing is learned in three steps

    assert main(["train", "babi", "--path", str(tmp_path), "--run", str(tmp_path / "other")]) == 2
    assert "qa4_*_train.txt" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
