"""Stories with questions, in the format in which bAbI is published; a generator for the first three of its kinds."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PEOPLE = ("daniel", "john", "mary", "sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "went back to", "travelled to", "journeyed to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")
ANSWER = "-"  # stands in the input where a word of the answer is asked for
KINDS = {1: "single-supporting-fact", 2: "two-supporting-facts", 3: "three-supporting-facts"}  # that can be generated


class Line(NamedTuple):
    """A sentence of a story.

    Attributes:
        text: with its full stop or question mark.
        answers: the words of the answer to a question; empty for a statement.
        supporting: the numbers, from 1, of the lines from which the answer follows.
    """

    text: str
    answers: tuple[str, ...] = ()
    supporting: tuple[int, ...] = ()


def words(text: str) -> list[str]:
    """The words of a sentence in lower case, each punctuation mark a word of its own."""
    return re.findall(r"[\w']+|[^\w\s]", text.lower())


def read_stories(path: Path) -> list[list[Line]]:
    """The stories in a file of bAbI.

    A line is a number, a space and a sentence; line 1 begins a story. A question is followed by a tab, its answer
    (several words with commas between them), a tab, and the numbers of the lines from which it follows.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not in this format, or ends within a story.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    stories: list[list[Line]] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        numbered = re.fullmatch(r"(\d+) (.+)", line)
        if not numbered:
            raise ValueError(f"{where}: expected a number, a space and a sentence, got {line!r}")
        expected = len(stories[-1]) + 1 if stories else 1
        if int(numbered[1]) == 1:
            stories.append([])
        elif int(numbered[1]) != expected:
            numbers = "1" if expected == 1 else f"{expected} or 1"
            raise ValueError(f"{where}: expected number {numbers}, got {line!r}")
        text, *rest = (part.strip() for part in numbered[2].split("\t"))
        if ANSWER in words(text):
            raise ValueError(f"{where}: expected no {ANSWER!r}, which stands for an answer, got {line!r}")
        if text.endswith("?") != bool(rest):
            raise ValueError(f"{where}: expected a question and its answer, or a statement and none, got {line!r}")
        if not rest:
            stories[-1].append(Line(text))
            continue
        if len(rest) != 2 or not re.fullmatch(r"[\w']+(,[\w']+)*", rest[0]) or not re.fullmatch(r"[\d ]*", rest[1]):
            raise ValueError(f"{where}: expected question, tab, answer, tab and numbers of lines, got {line!r}")
        stories[-1].append(Line(text, tuple(rest[0].lower().split(",")), tuple(map(int, rest[1].split()))))
    if not stories:
        raise ValueError(f"{path}: expected stories, got an empty file")
    for story in stories:
        if not any(line.answers for line in story):
            raise ValueError(f"{path}: expected a question in each story, got none in {story[0].text!r} …")
    if not stories[-1][-1].answers:
        raise ValueError(f"{path}: expected a question at the end, got {stories[-1][-1].text!r}: is the file cut off?")
    return stories


@dataclass
class _Person:
    place: str | None = None  # unknown until the first move
    line: int = 0  # of the last move
    carries: set[str] = field(default_factory=set)


@dataclass
class _Thing:
    visits: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # place, lines that say it came there
    place_known_by: tuple[int, ...] = ()  # the lines from which its place follows
    taken: int = 0  # the line in which it was last taken
    carried: bool = False


def generate_story(kind: int, facts: int, questions: int, draw: random.Random) -> list[Line]:
    """A story of people who walk from place to place, take things and put them down.

    Before somebody takes a thing, the story has said where that person is. The last question ends the story, the others
    come at equal distances.

    Args:
        kind: 1 asks where a person is ("Where is Mary?"), in a story in which nobody carries anything; 2 where a thing
            is; 3 where a thing was before it was last brought to a place ("Where was the milk before the garden?").
        facts: statements in the story, at least kind · questions.
        questions: questions in it, at least 1.
        draw: what is drawn depends on it alone.

    Returns:
        the lines, statements and questions.

    Raises:
        ValueError: another kind, too few facts or questions.

    Source: after the simulation that Weston et al. 2015, "Towards AI-Complete Question Answering", describe. These are
    not the published stories, which are longer.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(str, KINDS))}, got {kind}")
    if questions < 1:
        raise ValueError(f"questions: expected at least 1, got {questions}")
    if facts < kind * questions:
        raise ValueError(f"facts: expected at least {kind * questions} for {questions} question(s), got {facts}")
    ends = {-(-facts * (question + 1) // questions) for question in range(questions)}
    while True:  # until there is something to ask at each of `ends`
        world = _World(draw)
        for fact in range(1, facts + 1):
            world.happen(things=kind > 1)
            if fact in ends and not world.ask(kind):
                break
        else:
            return world.lines


class _World:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.lines: list[Line] = []
        self.people = {name: _Person() for name in PEOPLE}
        self.things = {name: _Thing() for name in OBJECTS}

    def happen(self, *, things: bool) -> None:
        """One more statement."""
        number, draw = len(self.lines) + 1, self.draw
        drops = [(name, thing) for name, person in self.people.items() for thing in sorted(person.carries)]
        takes = [
            (name, label)
            for name, person in self.people.items()
            for label, thing in self.things.items()
            if person.place and not thing.carried and (not thing.visits or thing.visits[-1][0] == person.place)
        ]
        chance = draw.random() if things else 1.0
        if chance < 0.1 and drops:
            name, label = draw.choice(drops)
            person, thing = self.people[name], self.things[label]
            person.carries.remove(label)
            thing.carried = False
            thing.place_known_by = (number, person.line)
            self._say(name, draw.choice(DROPS), label, draw.choice(("", " there")))
        elif chance < 0.4 and takes:
            name, label = draw.choice(takes)
            person, thing = self.people[name], self.things[label]
            assert person.place is not None
            person.carries.add(label)
            thing.carried, thing.taken = True, number
            thing.place_known_by = (number, person.line)
            if not thing.visits:
                thing.visits.append((person.place, (person.line,)))
            self._say(name, draw.choice(TAKES), label, draw.choice(("", " there")))
        else:
            # Half of the time somebody who carries something moves; otherwise there would be little to ask.
            carriers = [name for name, person in self.people.items() if person.carries]
            name = draw.choice(carriers if carriers and draw.random() < 0.5 else PEOPLE)
            person = self.people[name]
            person.place = draw.choice([place for place in PLACES if place != person.place])
            person.line = number
            for label in person.carries:
                thing = self.things[label]
                thing.visits.append((person.place, (thing.taken, number)))
                thing.place_known_by = (thing.taken, number)
            self._say(name, draw.choice(MOVES), person.place)

    def _say(self, name: str, verb: str, what: str, end: str = "") -> None:
        self.lines.append(Line(f"{name.capitalize()} {verb} the {what}{end}."))

    def ask(self, kind: int) -> bool:
        """One more question, if there is one to ask."""
        possible = []
        if kind == 1:
            for name, person in self.people.items():
                if person.place:
                    possible.append(Line(f"Where is {name.capitalize()}?", (person.place,), (person.line,)))
        for label, thing in self.things.items():
            places = [place for place, _ in thing.visits]
            if kind == 2 and thing.visits:
                possible.append(Line(f"Where is the {label}?", (places[-1],), thing.place_known_by))
            for index in range(1, len(places)) if kind == 3 else ():
                if places[index] not in places[index + 1 :]:
                    (before, known), (place, brought) = thing.visits[index - 1 : index + 1]
                    supporting = (known[-1], *brought)
                    possible.append(Line(f"Where was the {label} before the {place}?", (before,), supporting))
        if possible:
            self.lines.append(self.draw.choice(possible))
        return bool(possible)


VOCABULARY = sorted(
    {
        *PEOPLE,
        *PLACES,
        *OBJECTS,
        *words(" ".join((*MOVES, *TAKES, *DROPS))),
        *words(f"the there where is was before .?{ANSWER}"),
    }
)
