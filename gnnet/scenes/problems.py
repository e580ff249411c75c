"""What to do with broken input: end at the first problem, or leave the broken part out and keep the message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

OnBad = Literal["raise", "skip"]
_PARTICULAR = re.compile(r"\S*[/\\0-9]\S*|(?<!\S)(?:nan|[+-]?inf)\b")  # words with a path or a number in them


def kinds_of_problems(problems: Sequence[str]) -> list[list[str]]:
    """Messages that are alike but for paths and numbers, together; the most frequent kind first."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"(?:· ?)+", "·", _PARTICULAR.sub("·", problem)), []).append(problem)
    return sorted(kinds.values(), key=lambda alike: -len(alike))


def describe_problems(problems: Sequence[str]) -> str:
    """How many there are, the most frequent one, and the first one; empty if there is none."""
    return f"{len(problems)} problems, {_named(problems, 'of them', 'the first')}" if problems else ""


def _named(problems: Sequence[str], of: str, first: str) -> str:
    """The most frequent problem, where it is another than the first, and the first, which may be the cause."""
    alike = kinds_of_problems(problems)[0]
    most = "" if len(alike) == 1 or alike[0] == problems[0] else f"{len(alike)} {of} alike: {alike[0]}; "
    return f"{most}{first}: {problems[0]}"


class BadInput:
    """Under `raise` the first problem ends the reading; under `skip` it is kept as a message, and reading goes on.

    Args:
        on_bad: `raise` or `skip`.

    Raises:
        ValueError: if `on_bad` is neither.
    """

    def __init__(self, on_bad: OnBad = "raise") -> None:
        if on_bad not in ("raise", "skip"):
            raise ValueError(
                f"dataset.on_bad is {on_bad!r}; expected raise (end at the first broken file) or skip "
                "(leave it out and count it)"
            )
        self.on_bad = on_bad
        self.problems: list[str] = []

    def report(self, error: Exception) -> None:
        """Raise `error`, or keep its message."""
        if self.on_bad == "raise":
            raise error
        self.problems.append(str(error))

    def note(self, problem: str) -> None:
        """Keep a message about what does not end the reading even under `raise`; it comes first."""
        self.problems.insert(0, problem)

    def no_pairs(self, why: str, *, usable: bool) -> None:
        """Keep why no images make a pair, as they may still be a map; ValueError if none of them is `usable`."""
        if not usable:
            raise ValueError(f"{why}{self.first}")
        self.note(why)

    @property
    def first(self) -> str:
        """`; the first problem: …`, to end a message with, after the most frequent one; empty if there is none."""
        return f"; {_named(self.problems, 'problems', 'the first problem')}" if self.problems else ""

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Put around the reading of one file, image or line: an error in the block ends the block and is reported."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.report(error)
