"""Names that files write otherwise than the scene does."""

from __future__ import annotations

import re

import pytest

from gnnet.scenes.names import by_known_name, match_names

pytestmark = pytest.mark.cases


@pytest.mark.parametrize(
    ("given", "known", "expected", "ambiguous"),
    [
        (["x/a", "b"], ["b", "x/a"], {"b": "b", "x/a": "x/a"}, ()),
        (["a", "b"], ["db/day/a", "db/day/b"], {"db/day/a": "a", "db/day/b": "b"}, ()),  # hloc's results
        (["day/a"], ["db/day/a", "db/night/a"], {"db/day/a": "day/a"}, ()),  # prepend_camera_name
        (["query/a", "query/b"], ["a", "b"], {"a": "query/a", "b": "query/b"}, ()),
        (["a"], ["day/a", "night/a"], {}, ("a",)),
        (["day/a", "night/a"], ["a"], {}, ("day/a", "night/a")),
        (["day/a", "a"], ["db/day/a"], {"db/day/a": "day/a"}, ()),  # the longest
        (["x/db/a"], ["a", "db/a"], {"db/a": "x/db/a"}, ()),
        (["left/a"], ["rear/a"], {}, ()),  # one must be the ending of the other
        (["1a.jpg"], ["a.jpg"], {}, ()),  # of whole parts
        (["a", "db/b"], ["a", "b"], {"a": "a"}, ()),  # names are whole here, so db/b is another image
        (["a", "b"], ["a", "x/b"], {"a": "a", "x/b": "b"}, ()),
        (["day/a", "a"], ["day/a", "night/b"], {"day/a": "day/a"}, ()),  # each is taken once
        ([r"db\day\a"], ["db/day/a"], {"db/day/a": r"db\day\a"}, ()),
        (["./a"], ["a"], {"a": "./a"}, ()),
        (["db/IMG_1.JPG"], ["db/img_1.jpg"], {"db/img_1.jpg": "db/IMG_1.JPG"}, ()),  # as Windows sees it
        (["A.JPG"], ["db/a.jpg", "db/b.jpg"], {"db/a.jpg": "A.JPG"}, ()),
        (["cafe\u0301.jpg", "b"], ["caf\u00e9.jpg", "b"], {"b": "b", "caf\u00e9.jpg": "cafe\u0301.jpg"}, ()),  # macOS
        (["a%20b"], ["a b"], {"a b": "a%20b"}, ()),
        (["A"], ["a", "%61"], {}, ()),  # which of them is not certain
        (["A", "a"], ["a"], {"a": "a"}, ()),
        (["x/A", "b"], ["a", "b"], {"b": "b"}, ()),
        ([], ["a"], {}, ()),
        (["a"], [], {}, ()),
    ],
)
def test_exactly_else_by_the_longest_ending_that_leaves_one_choice(given, known, expected, ambiguous):
    for names in (known, known[::-1]):
        match = match_names(given, names)
        assert match.given == expected and match.ambiguous == ambiguous
        assert set(match.by_ending) == {name for name, other in expected.items() if name != other}


def test_a_file_is_told_by_the_names_that_are_known(caplog):
    found = by_known_name({"a": 1, "b": 2, "c": 3}, ["x/a", "x/b", "y/b"], source="poses.txt", what="queries")
    assert found == {"x/a": 1}
    how = "matched by the ending or the likeness of their names, as a in the file is x/a"
    assert f"poses.txt: 1 of 3 queries are {how}" in caplog.text
    assert "1 names could be several of the queries, and are left out: b" in caplog.text
    caplog.clear()
    assert by_known_name({"a": 1, "z": 2}, ["a", "b"], source="poses.txt", what="queries") == {"a": 1}
    assert not caplog.text


@pytest.mark.parametrize(
    ("given", "known", "message"),
    [
        (["db/1", "db/2"], ["q/1", "q/2"], "poses.txt has names as db/1, db/2, and the queries are called q/1, q/2"),
        (["a"], ["x/a", "y/a"], "none is the same (a could be several of them)"),
        ([], ["x/a"], "poses.txt holds no name; expected those of the queries"),
        (["a"], [], "there are no queries"),
    ],
)
def test_a_file_of_other_names_is_refused_with_a_name_of_each_side(given, known, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        by_known_name(dict.fromkeys(given, 0), known, source="poses.txt", what="queries")
