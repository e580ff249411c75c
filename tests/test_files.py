"""Text as it comes from other systems, and files and folders that appear when they are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gnnet.files import (
    below,
    found_below,
    new_file,
    new_folder,
    parse_numbers,
    read_lines,
    read_text,
    results_folder,
    write_json,
)
from gnnet.scenes.formats.poses import read_pairs_file, read_pose_file


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa 1\r\n\r\n# note\r\nb \xc3\xa4\r\n")
    assert read_text(path, "words") == "a 1\n\n# note\nb ä\n"
    lines = read_lines(path, "words")
    assert [(line.number, line.words) for line in lines] == [(1, ["a", "1"]), (4, ["b", "ä"])]
    assert lines[1].source == f"{path} line 4"


def test_files_written_by_other_systems_are_read_alike(tmp_path: Path):
    path = tmp_path / "poses.txt"
    path.write_bytes(b"\xef\xbb\xbfa.jpg 1 0 0 0 1 2 3\r\nb.jpg 1 0 0 0 4 5 6\r\n")
    assert list(read_pose_file(path)) == ["a.jpg", "b.jpg"]
    path.write_bytes(b"\xef\xbb\xbfq.jpg r.jpg\r\n")
    assert read_pairs_file(path) == {"q.jpg": ("r.jpg",)}


def test_what_is_no_text_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.txt does not exist; expected words"):
        read_text(tmp_path / "gone.txt", "words")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_text(tmp_path, "words")
    (tmp_path / "x").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"x cannot be read as text .*; expected words"):
        read_text(tmp_path / "x", "words")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1", "x"], r"f line 3: could not convert string to float: 'x'; expected two"),
        (["1"], r"f line 3 has 1 numbers; expected two"),
        (["1", "nan"], r"f line 3 holds 1 nan, which is not finite; expected two"),
    ],
)
def test_numbers_name_file_and_line(words, message):
    with pytest.raises(ValueError, match=message):
        parse_numbers(words, 2, "f line 3", "two")
    assert parse_numbers(["1", "-2e3"], 2, "f", "two").tolist() == [1, -2000]


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../../x", "C:\\x", "a\0"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="list line 1 names"):
        below(tmp_path, name, "list line 1")
    assert below(tmp_path, "a\\b", "list") == tmp_path / "a" / "b"


@pytest.mark.cases
def test_a_folder_that_cannot_take_results_is_said_before_there_are_any(tmp_path: Path, monkeypatch):
    assert results_folder(tmp_path / "a b" / "é").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"{path} cannot take results \(.*paths.output_dir"):
            results_folder(path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match="no permission"):
        results_folder(tmp_path)


@pytest.mark.cases
def test_a_file_is_found_under_the_name_that_another_system_gave_it(tmp_path: Path):
    on_disk = tmp_path / "Night" / "caf\u00e9 1.JPG"
    on_disk.parent.mkdir()
    on_disk.touch()
    for name in ("Night/caf\u00e9 1.JPG", "night/cafe\u0301 1.jpg", r".\Night\caf%C3%A9%201.jpg"):
        assert found_below(tmp_path, name, "list") == on_disk
    assert found_below(tmp_path, "night/other.jpg", "list") == tmp_path / "Night" / "other.jpg"
    (tmp_path / "Night" / "CAF\u00c9 1.jpg").touch()  # now which one is meant is not certain
    assert not found_below(tmp_path, "Night/caf\u00e9 1.jpg", "list").exists()
    assert found_below(tmp_path, "Night/caf\u00e9 1.JPG", "list") == on_disk
    with pytest.raises(ValueError, match=r"list names '../x'"):
        found_below(tmp_path, "../x", "list")
    with pytest.raises(ValueError, match=r"list names 'xxx.*which cannot be looked for \(File name too long\)"):
        found_below(tmp_path, 300 * "x", "list")


def test_a_file_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "deep" / "x.txt"
    with new_file(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), new_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "town"
    for content in ("one", "two"):
        with new_folder(path) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
            assert not (path / content).exists()
        assert [p.name for p in path.iterdir()] == [content]
    with pytest.raises(RuntimeError), new_folder(path) as partial:
        partial.mkdir()
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["two"]
    with new_folder(path) as partial:  # what the failure left is no hindrance
        partial.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["town"]


def test_json_is_strict(tmp_path: Path):
    assert json.loads(write_json(tmp_path / "x.json", {"ä": 1}).read_text(encoding="utf-8")) == {"ä": 1}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": 1}
