"""Lessons made of ranges, as in the paper's tables and on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Span = tuple[int, int]  # both ends included
Lesson = TypeVar("Lesson")


def read_curriculum(text: str, example: str, least: Sequence[int], most: Sequence[int]) -> list[list[Span]]:
    """The ranges of each lesson: "3-5/1/2, 5-9/1-2/2" are two lessons of three ranges.

    Args:
        text: the lessons, separated by commas.
        example: of a lesson, for the error message.
        least, most: the bounds of each range.

    Raises:
        ValueError: the text is not of that form, or a range exceeds its bounds.
    """
    lessons = []
    for lesson in text.split(","):
        found = [re.fullmatch(r"(\d+)(?:-(\d+))?", span.strip()) for span in lesson.split("/")]
        spans = [(int(span[1]), int(span[2] or span[1])) for span in found if span]
        if (
            not len(found) == len(spans) == len(least)
            or not all(low <= span[0] <= span[1] <= high for span, low, high in zip(spans, least, most, strict=True))
        ):  # fmt: skip
            limits = "/".join(f"{low}-{high}" for low, high in zip(least, most, strict=True))
            raise ValueError(
                f"curriculum: expected lessons as {example}, within {limits}, lower before upper, "
                f"got {lesson.strip()!r}"
            )
        lessons.append(spans)
    return lessons


def lesson_of(curriculum: Sequence[Lesson], size: int) -> Lesson:
    """The lesson with the number `size`, counted from 1. Raises ValueError if there is none."""
    if not 1 <= size <= len(curriculum):
        raise ValueError(f"size: expected the number of a lesson, 1 to {len(curriculum)}, got {size}")
    return curriculum[size - 1]


def describe(spans: Sequence[Span], names: Sequence[str]) -> str:
    """Ranges in words, with names in the plural: "3 to 5 nodes, 1 step"."""
    words = []
    for (low, high), name in zip(spans, names, strict=True):
        if low == high == 1:
            name = re.sub(r"s\b", "", name, count=1)
        words.append(f"{low} {name}" if low == high else f"{low} to {high} {name}")
    return ", ".join(words)


def with_earlier(count: int) -> list[list[int]]:
    """The sizes of lessons 1 to `count`; a tenth of each lesson is drawn evenly from the earlier ones."""
    return [[*range(1, size), *[size] * max(1, 9 * (size - 1))] for size in range(1, count + 1)]


def integers(span: Span, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random integers in a range."""
    return torch.randint(span[0], span[1] + 1, shape, generator=generator)
