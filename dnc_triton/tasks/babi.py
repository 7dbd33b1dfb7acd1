"""Questions about stories: bAbI, published or generated."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dnc_triton.tasks.base import Batch, SymbolTask, check_at_least
from dnc_triton.tasks.stories import ANSWER, KINDS, VOCABULARY, Line, generate_story, read_stories, words

FAILED = 0.05  # a kind with more wrong words counts as failed
PUBLISHED_KINDS = range(1, 21)
ENCODINGS = ("words", "sentences")
NOTHING = -1  # where a step has no (more) words, or none is asked for


class BabiTask(SymbolTask):
    """Answer questions about stories, word by word, the 20 kinds of bAbI jointly.

    Input: the words of a story, a channel for each word of the vocabulary; a step is one word, or a sentence: which
    words occur in it, neither in what order nor how often. Lower case; full stop and question mark are words of their
    own; line numbers are left out. Questions keep their places in the story, and each is followed by as many ``-`` as
    its answer has words, one per step. Target: at each ``-`` a word of the answer, over the same vocabulary; at the
    other steps the output does not count. A size is a kind, 1 to 20: a batch has stories of one kind, padded at the
    end.

    Without `path`, stories of the kinds 1 to 3 are generated, anew for each batch; the vocabulary is the generator's.
    They have one to three people, places and things to keep apart like the published ones, and are shorter. With
    `path`, the stories in that folder are read; the vocabulary is every word in its files. Every tenth story of the
    training file is kept for validation. The test draws from the test file; when more sequences are drawn than it has,
    each comes equally often, give or take one.

    Args:
        path: the folder en-10k of bAbI, with qa1_single-supporting-fact_train.txt and so on; None: generate.
        kinds: the numbers of the kinds, separated by commas; None: all there are.
        max_words: longer stories of the training file are left out of training.
        min_facts, max_facts: statements in a generated story. Training begins with fewer: in each lesson the longest
            stories are one statement longer.
        questions: questions in a generated story; one of kind k has at least k statements for each.
        encoding: what a step holds: with "words" a word, with "sentences" the words of a sentence. Then a story takes a
            fifth of the steps, but what depends on the order of words is lost: who gave something to whom, or what
            is north of what (as in kinds 4 and 5).

    Raises:
        OSError: a file cannot be read.
        ValueError: an argument out of range; a folder without the files, a file that is not in bAbI's format.

    Source: Weston et al. 2015, "Towards AI-Complete Question Answering"; words as in Graves et al. 2016, Methods, "bAbI
    task descriptions", sentences as in Sukhbaatar et al. 2015, "End-To-End Memory Networks".
    """

    name: ClassVar[str] = "babi"
    summary: ClassVar[str] = "answer questions about stories: bAbI from its folder, or generated stories"
    unit: ClassVar[str] = "word"
    arguments: ClassVar[dict[str, str]] = {
        "path": "the folder en-10k of bAbI; without it stories of the kinds 1 to 3 are generated",
        "kinds": "numbers of the kinds, separated by commas; all if omitted",
        "max_words": "longer stories are left out of training; only with --path",
        "min_facts": "statements in the shortest generated story; only without --path",
        "max_facts": "statements in the longest generated story; only without --path",
        "questions": "questions in a generated story, fewer if it has too few statements; only without --path",
        "encoding": "words: a step is a word; sentences: a step is all words of a sentence, without their order",
    }

    def __init__(
        self,
        path: str | None = None,
        kinds: str | None = None,
        max_words: int = 800,
        min_facts: int = 6,
        max_facts: int = 8,
        questions: int = 2,
        encoding: str = "words",
    ) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")
        self.encoding = encoding
        numbers = _kinds(kinds, PUBLISHED_KINDS if path is not None else KINDS)
        for name, number in (("questions", questions), ("min_facts", min_facts), ("max_facts", max_facts)):
            check_at_least(name, number, 1)
        if path is None:
            if not max(numbers) <= min_facts <= max_facts:
                raise ValueError(
                    f"min_facts, max_facts: expected {max(numbers)} ≤ min_facts ≤ max_facts with kind {max(numbers)}, "
                    f"got {min_facts}, {max_facts}"
                )
            names = {number: KINDS[number] for number in numbers}
            self.vocabulary = VOCABULARY
        else:
            found = _find(Path(path), numbers)
            names = {number: files["train"].name.split("_")[1] for number, files in found.items()}
            read = {
                number: {split: read_stories(file) for split, file in files.items()} for number, files in found.items()
            }
            every = [
                line for splits in read.values() for stories in splits.values() for story in stories for line in story
            ]
            self.vocabulary = sorted({ANSWER}.union(*((*words(line.text), *line.answers) for line in every)))
        self.input_vocabulary = self.vocabulary
        self.input_size = self.output_size = len(self.vocabulary)
        self._index = {word: index for index, word in enumerate(self.vocabulary)}
        self.facts, self.questions = range(min_facts, max_facts + 1), questions
        self.stories = None if path is None else {n: self._split(n, splits, max_words) for n, splits in read.items()}
        # Generated: lesson by lesson one statement more, from the first kind's number on. Published: all at once, as in
        # the papers.
        most = range(min(numbers), max_facts + 1) if path is None else ()
        self.lessons = [[kind for kind in numbers if kind <= facts] for facts in most] or [numbers]
        self.evaluations = {f"{number} {name}": [number] for number, name in names.items()}

    def _split(
        self, kind: int, splits: dict[str, list[list[Line]]], max_words: int
    ) -> dict[str, list[tuple[Tensor, Tensor]]]:
        train, test = ([self.encode(story) for story in splits[split]] for split in ("train", "test"))
        training = [story for index, story in enumerate(train) if index % 10 != 9 and _count(story) <= max_words]
        validation = train[9::10]
        if not training or not validation:
            raise ValueError(
                f"path: expected at least 10 stories of kind {kind} to train on, some of them with at most "
                f"max_words = {max_words} words, got {len(train)} with at least {min(map(_count, train))} words"
            )
        return {"train": training, "validation": validation, "test": test}

    def encode(self, story: list[Line]) -> tuple[Tensor, Tensor]:
        """Indices of the input words [T, words of a step] and of the target words [T], int16; else NOTHING."""
        given: list[list[int]] = []
        wanted: list[int] = []
        for line in story:
            text = [self._index[word] for word in words(line.text)]
            steps = [text] if self.encoding == "sentences" else [[word] for word in text]
            given += steps + [[self._index[ANSWER]]] * len(line.answers)
            wanted += [NOTHING] * len(steps) + [self._index[word] for word in line.answers]
        most = max(map(len, given))
        filled = [step + [NOTHING] * (most - len(step)) for step in given]
        return torch.tensor(filled, dtype=torch.int16), torch.tensor(wanted, dtype=torch.int16)

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        """Stories of one kind; see `Task.sample`."""
        kinds = KINDS if self.stories is None else self.stories
        if size not in kinds:
            raise ValueError(f"size: expected the number of a kind, {', '.join(map(str, kinds))}, got {size}")
        if self.stories is None:
            drawn = self._generate(batch_size, size, self.facts, generator)
        else:
            stories = self.stories[size][split]
            if split == "test":
                rounds = -(-batch_size // len(stories))
                order = torch.cat([torch.randperm(len(stories), generator=generator) for _ in range(rounds)])
            else:
                order = torch.randint(len(stories), (batch_size,), generator=generator)
            drawn = [stories[index] for index in order[:batch_size].tolist()]
        return self._pad(drawn)

    def sample_training(self, batch_size: int, lesson: int, generator: torch.Generator) -> Batch:
        if self.stories is not None:
            return super().sample_training(batch_size, lesson, generator)
        kinds = self.lessons[lesson]
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        return self._pad(self._generate(batch_size, kind, range(kind, self.lessons[0][0] + lesson + 1), generator))

    def _generate(
        self, number: int, kind: int, facts: range, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        counts = [draw.choice(facts) for _ in range(number)]
        return [self.encode(generate_story(kind, count, min(self.questions, count // kind), draw)) for count in counts]

    def _pad(self, drawn: list[tuple[Tensor, Tensor]]) -> Batch:
        lengths = torch.tensor([len(given) for given, _ in drawn])
        inputs = torch.zeros(len(drawn), int(lengths.max()), self.input_size)
        targets = torch.full(inputs.shape[:2], NOTHING)
        for row, (given, wanted) in enumerate(drawn):
            step, place = (given != NOTHING).nonzero(as_tuple=True)
            inputs[row, step, given[step, place].long()] = 1
            targets[row, : len(wanted)] = wanted
        scored = targets >= 0
        return Batch(inputs, targets.clamp(min=0).unsqueeze(-1), scored, lengths)

    def table(self, errors: dict[str, dict[str, float]]) -> str:
        """The papers' table: wrong words for each kind, their mean, and how many kinds failed."""
        models = list(next(iter(errors.values())))
        width = max(map(len, [*errors, "failed kinds (above 5 %)"]))
        rows = [f"{'wrong words, %':<{width}}" + "".join(f"{model.upper():>10}" for model in models)]
        for name, by_model in errors.items():
            rows.append(f"{name:<{width}}" + "".join(f"{100 * by_model[model]:>10.1f}" for model in models))
        columns = [[by_model[model] for by_model in errors.values()] for model in models]
        means = "".join(f"{100 * sum(column) / len(column):>10.1f}" for column in columns)
        failed = "".join(f"{sum(error > FAILED for error in column):>10}" for column in columns)
        return "\n".join([*rows, f"{'mean':<{width}}{means}", f"{'failed kinds (above 5 %)':<{width}}{failed}"])

    def show(self, outputs: Tensor, batch: Batch) -> str:
        return " ".join(
            f"{word}[{output}; right: {target}]" if target else word
            for word, target, output in zip(*self.symbols(outputs, batch).values(), strict=True)
            if word  # no padding
        )


def _count(story: tuple[Tensor, Tensor]) -> int:
    """The number of input words."""
    return int((story[0] != NOTHING).sum())


def _kinds(kinds: str | None, possible: range | dict[int, str]) -> list[int]:
    if kinds is None:
        return list(possible)
    try:
        numbers = sorted({int(number) for number in kinds.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= set(possible):
        raise ValueError(f"kinds: expected numbers from 1 to {max(possible)} with commas between them, got {kinds!r}")
    return numbers


def _find(folder: Path, kinds: list[int]) -> dict[int, dict[str, Path]]:
    """The files of a folder, kind → split → path."""
    files: dict[int, dict[str, Path]] = {}
    missing = []
    for kind in kinds:
        files[kind] = {}
        for split in ("train", "test"):
            found = sorted(folder.glob(f"qa{kind}_*_{split}.txt"))
            if len(found) > 1:
                raise ValueError(f"path: expected one file qa{kind}_*_{split}.txt in {folder}, got {len(found)}")
            if found:
                files[kind][split] = found[0]
            else:
                missing.append(f"qa{kind}_*_{split}.txt")
    if missing:
        what = "no such folder" if not folder.is_dir() else f"{len(missing)} of them missing: {', '.join(missing)}"
        hint = f"; {folder / 'en-10k'} is there" if (folder / "en-10k").is_dir() else ""
        raise ValueError(
            f"path: expected the folder en-10k of bAbI (tasks_1-20_v1-2) with the {2 * len(kinds)} files of kinds "
            f"{', '.join(map(str, kinds))}, got {folder}: {what}{hint}"
        )
    return files
