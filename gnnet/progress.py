"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from time import monotonic
from typing import TypeVar

from rich import get_console
from rich.progress import Progress

_REFRESH_SECONDS = 0.1

T = TypeVar("T")


def track(values: Iterable[T], description: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """The values one by one, with a bar on the terminal that goes away at the end.

    No thread draws the bar, unlike `rich.progress.track`: that one's threads can wait for each other for ever if a
    loop ends with an error, and its bar is cleaned up while another is drawn.

    Args:
        values: any number.
        description: words before the bar.
        total: number of values; None asks `values`.
        show: False shows no bar; none is shown either where the output is no terminal.
    """
    console = get_console()
    if not show or not (console.is_terminal or console.is_jupyter):
        yield from values
        return
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(description, total=total or length_hint(values) or None)
        drawn = monotonic()
        for value in values:
            yield value
            bar.advance(task)
            if monotonic() - drawn >= _REFRESH_SECONDS:
                bar.refresh()
                drawn = monotonic()
