"""Stories as files, for tests that read them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dnc_triton.tasks.stories import Line


def write_stories(stories: Iterable[list[Line]], path: Path) -> None:
    """Write a file that `read_stories` reads."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for story in stories:
            for number, (text, answers, supporting) in enumerate(story, start=1):
                question = f" \t{','.join(answers)}\t{' '.join(map(str, supporting))}" if answers else ""
                file.write(f"{number} {text}{question}\n")
