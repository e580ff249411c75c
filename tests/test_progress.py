import threading
from io import StringIO

import pytest
from rich.console import Console

from gnnet import progress


@pytest.fixture
def terminal(monkeypatch) -> StringIO:
    """What is drawn on a terminal."""
    text = StringIO()
    monkeypatch.setattr(progress, "get_console", lambda: Console(file=text, force_terminal=True, width=80))
    return text


def test_values_pass_and_a_bar_is_drawn_on_a_terminal(terminal):
    assert list(progress.track(iter("abc"), "Reading letters", total=3)) == ["a", "b", "c"]
    assert "Reading letters" in terminal.getvalue()


def test_nothing_is_drawn_where_it_is_not_wanted(terminal, capsys):
    assert list(progress.track([1, 2], "Counting", show=False)) == [1, 2]
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch):
    text = StringIO()
    monkeypatch.setattr(progress, "get_console", lambda: Console(file=text, force_terminal=False))
    assert list(progress.track([1, 2], "Counting")) == [1, 2]
    assert text.getvalue() == ""


def test_a_loop_that_ends_with_an_error_leaves_no_thread(terminal):
    before = threading.active_count()
    kept = progress.track([1, 0], "Dividing")  # held, as the traceback of an error holds it
    with pytest.raises(ZeroDivisionError):
        for value in kept:
            assert 1 / value and threading.active_count() == before
    assert threading.active_count() == before
