"""Dates as people write them, translated into ISO 8601."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_triton.tasks.base import Batch, SymbolTask, check_range

if TYPE_CHECKING:
    from babel import Locale

STYLES = ("short", "medium", "long", "full")  # as Unicode's CLDR names them; a size is one of them, from 1
ANSWER = 10  # characters of an ISO date
LEAP_YEAR = 2024


class DatesTask(SymbolTask):
    """Translate a date from the format of some language into ISO 8601: ``3 de mayo de 1998`` gives ``1998-05-03``.

    Input: the characters of the text, one-hot, one per step; then a step with the end marker; then 10 blank steps, all
    zeros. Target: at those blank steps the 10 characters of the ISO date; before them, the output does not count. Texts
    differ in length: a batch is padded at the end.

    The formats are the four styles (short, medium, long, full) of each locale in Unicode's CLDR, from babel. All
    sequences of one batch have the same style; each has its own locale. A style that writes only two digits of the year
    is left out: the century does not follow from them. The network is not told the locale, hence no text may stand for
    two dates: 01/02/2003 must not be in January for one locale and in February for another. This is checked for all
    formats on every day of a leap year, without the names of weekdays, and locales that contradict each other are
    refused. (One year is enough, since the year is written out.)

    A day belongs to one split only, by its proleptic Gregorian ordinal (`datetime.date.toordinal`) modulo 10: 8 is
    validation, 9 is test, the rest training. No date of the test was seen in training, in any language.

    Args:
        locales: their identifiers, separated by commas.
        first_year, last_year: of the dates, both included; 1000 to 9999, so that years have four digits.

    Raises:
        ModuleNotFoundError: babel is not installed.
        ValueError: a locale that babel does not know, no format that has the whole year, two formats in which one text
            stands for two dates, a year out of range.
    """

    name: ClassVar[str] = "translation"
    summary: ClassVar[str] = "translate dates from the formats of several languages into ISO 8601"
    arguments: ClassVar[dict[str, str]] = {
        "locales": "identifiers of Unicode's CLDR, separated by commas",
        "first_year": "first year of the dates",
        "last_year": "last year of the dates",
    }

    def __init__(
        self, locales: str = "en,de,fr,es,it,pt,nl,sv,da,fi,pl,tr", first_year: int = 1950, last_year: int = 2049
    ) -> None:
        check_range("first_year", first_year, "last_year", last_year)
        if not 1000 <= first_year <= last_year <= 9999:
            raise ValueError(
                f"first_year, last_year: expected 1000 ≤ first_year ≤ last_year ≤ 9999, got {first_year}, {last_year}"
            )
        self.formats = _formats(locales)
        characters = _characters(self.formats)
        self.input_vocabulary = [*characters, "⏎"]
        self.vocabulary = [*"0123456789-"]
        self.input_size, self.output_size = len(self.input_vocabulary), len(self.vocabulary)
        self._channels = {character: channel for channel, character in enumerate(characters)}
        self._symbols = {character: symbol for symbol, character in enumerate(self.vocabulary)}

        days = torch.arange(
            datetime.date(first_year, 1, 1).toordinal(), datetime.date(last_year, 12, 31).toordinal() + 1
        )
        self.days = {
            "train": days[days % 10 < 8],
            "validation": days[days % 10 == 8],
            "test": days[days % 10 == 9],
        }
        self.lessons = [list(self.formats)]
        self.evaluations = {"all styles": list(self.formats)}
        for size, formats in self.formats.items():
            example = _write(datetime.date(2003, 9, 24), *formats[-1])
            self.evaluations[f"{STYLES[size - 1]}, as {example}"] = [size]

    def sample(self, batch_size: int, size: int, generator: torch.Generator, *, split: str = "train") -> Batch:
        """Sequences of one style, `STYLES[size - 1]`; see `Task.sample`."""
        if size not in self.formats:
            raise ValueError(f"size: expected the number of a style, {', '.join(map(str, self.formats))}, got {size}")
        formats, days = self.formats[size], self.days[split]
        chosen = days[torch.randint(len(days), (batch_size,), generator=generator)].tolist()
        written = torch.randint(len(formats), (batch_size,), generator=generator).tolist()
        dates = [datetime.date.fromordinal(day) for day in chosen]
        texts = [_write(date, *formats[index]) for date, index in zip(dates, written, strict=True)]
        return self.encode(texts, dates)

    def encode(self, texts: list[str], dates: list[datetime.date]) -> Batch:
        """The batch that asks to translate these texts into these dates."""
        read = torch.tensor([len(text) for text in texts])  # steps before the end marker
        steps = int(read.max()) + 1 + ANSWER
        inputs = torch.zeros(len(texts), steps, self.input_size)
        targets = torch.zeros(len(texts), steps, 1, dtype=torch.int64)
        for row, (text, date) in enumerate(zip(texts, dates, strict=True)):
            channels = [self._channels[character] for character in text] + [len(self._channels)]
            inputs[row, : len(channels)] = F.one_hot(torch.tensor(channels), self.input_size).float()
            answer = [self._symbols[character] for character in date.isoformat()]
            targets[row, len(channels) : len(channels) + ANSWER, 0] = torch.tensor(answer)
        place = torch.arange(steps) - read.unsqueeze(1)
        return Batch(inputs, targets, (place > 0) & (place <= ANSWER), read + 1 + ANSWER)

    def show(self, outputs: Tensor, batch: Batch) -> str:
        return "\n".join(f"{name:<8}{''.join(texts)}" for name, texts in self.symbols(outputs, batch).items())


def _formats(locales: str) -> dict[int, list[tuple[str, Locale]]]:
    """The formats of each size, as (style, locale)."""
    try:
        from babel import Locale, UnknownLocaleError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "babel is not installed; the task translation needs, in a clone: pip install '.[train]'", name="babel"
        ) from error
    known = []
    for name in locales.split(","):
        try:
            known.append(Locale.parse(name.strip()))
        except (ValueError, UnknownLocaleError) as error:
            raise ValueError(
                f"locales: expected identifiers that babel knows, as en or pt_BR, with commas between them, "
                f"got {name!r} in {locales!r}"
            ) from error
    formats: dict[int, list[tuple[str, Locale]]] = {}
    for size, style in enumerate(STYLES, start=1):
        for locale in known:
            letters = re.sub("'[^']*'", "", locale.date_formats[style].pattern)  # without quoted text
            if not re.search("(?<!y)yy(?!y)", letters):
                formats.setdefault(size, []).append((style, locale))
    if not formats:
        raise ValueError(f"locales: expected some that write the whole year in a format, got {locales!r}")
    _refuse_contradictions(formats)
    return formats


def _refuse_contradictions(formats: dict[int, list[tuple[str, Locale]]]) -> None:
    from babel.dates import format_date

    dates: dict[str, tuple[datetime.date, str]] = {}
    for style, locale in (each for of_size in formats.values() for each in of_size):
        # Without the weekday, which distinguishes two dates only in some years.
        pattern = re.sub("('[^']*')|[Ece]+", lambda match: match[1] or "", locale.date_formats[style].pattern)
        for date in _days_of_a_year():
            text = format_date(date, pattern, locale)
            other, where = dates.setdefault(text, (date, f"{locale} {style}"))
            if other != date:
                raise ValueError(
                    f"locales: expected formats that do not contradict each other, got {text!r} for {other} in {where} "
                    f"and for {date} in {locale} {style}"
                )


def _characters(formats: dict[int, list[tuple[str, Locale]]]) -> list[str]:
    """All characters that may occur in a text: a year has every month and weekday; digits are added."""
    each = [written for of_size in formats.values() for written in of_size]
    return sorted({*"0123456789"}.union(*(_write(date, *written) for date in _days_of_a_year() for written in each)))


def _days_of_a_year() -> list[datetime.date]:
    first = datetime.date(LEAP_YEAR, 1, 1)
    return [first + datetime.timedelta(days) for days in range(366)]


def _write(date: datetime.date, style: Any, locale: Locale) -> str:
    from babel.dates import format_date

    return format_date(date, style, locale)
