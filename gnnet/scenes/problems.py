"""What to do with broken input: end with the first one's message, or leave it out and count it."""

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

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Around the reading of one file, image or line: what is wrong with it is reported, and leaves the block."""
        try:
            yield
        except (OSError, ValueError) as error:
            self.report(error)
