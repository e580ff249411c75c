"""What to do with broken input: end at the first problem, or leave the broken part out and keep the message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

OnBad = Literal["raise", "skip"]


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

    @property
    def first(self) -> str:
        """`; the first problem: …`, to end a message with; empty if there is none."""
        return f"; the first problem: {self.problems[0]}" if self.problems else ""

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Put around the reading of one file, image or line: an error in the block ends the block and is reported."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.report(error)
