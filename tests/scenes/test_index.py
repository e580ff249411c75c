"""The index is taken while it holds, and made anew when anything it depends on has changed."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.arrays import ArrayFile
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes import index
from gnnet.scenes.formats.images import image_size
from gnnet.scenes.index import fingerprint, open_scene
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Pair, Scene, SceneImage
from tests.scenes.test_table import assert_equal

READS: list[Path] = []


def read_photos(root: Path, *, place: str = "p", elsewhere: str = "", on_bad: OnBad = "raise") -> Scene:
    """Every photo of a folder, in one chain of pairs."""
    READS.append(root)
    bad, images = BadInput(on_bad), {}
    for path in sorted(root.glob("*.jpg")):
        with bad.skipping():
            width, height = image_size(path)
            camera = Camera.from_colmap("SIMPLE_PINHOLE", width, height, [10, 4, 4], dtype=torch.float64)
            images[path.name] = SceneImage(
                path.name, path, "day", place, camera, Pose.identity(dtype=torch.float64), True,
                point_ids=np.array([0, 2]), keypoints=np.array([[1.5, 2.25], [3.0, 4.0]]),
            )  # fmt: skip
    names = list(images)
    pairs = tuple(Pair(a, b, place, static=True) for a, b in pairwise(names))
    points = torch.arange(9, dtype=torch.float64).reshape(3, 3)
    return Scene("photos", images, pairs, points, {"all": ("day",)}, tuple(bad.problems), ("camera", "place"), "photos")


def read_in_process(root: Path, index_dir: Path) -> None:
    assert len(open_scene(read_slowly, root, index_dir=index_dir, progress=False).images) == 4


def read_slowly(root: Path) -> Scene:
    with open(root.parent / "log", "a") as file:
        file.write("read\n")
    time.sleep(0.3)
    return read_photos(root)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i}.jpg")
    return root


@pytest.fixture
def opened(photos: Path, tmp_path: Path):
    """Opens the photos, and tells whether they were read."""

    def open_photos(reader=read_photos, root: Path = photos, **settings) -> tuple[Scene, bool]:
        READS.clear()
        scene = open_scene(reader, root, index_dir=tmp_path / "index", progress=False, **settings)
        return scene, bool(READS)

    return open_photos


def assert_same_scene(found: Scene, expected: Scene) -> None:
    for kept in ("name", "groups", "problems", "retrieve_within", "dataset"):
        assert getattr(found, kept) == getattr(expected, kept)
    assert torch.equal(found.points, expected.points) and found.points.dtype == torch.float64
    assert list(found.images) == list(expected.images) and found.pairs == tuple(expected.pairs)
    for name in expected.images:
        assert_equal(found.images[name], expected.images[name])


def test_the_index_gives_what_the_reader_gave(opened, photos):
    assert opened()[1]
    found, read = opened()
    assert not read
    assert_same_scene(found, read_photos(photos))
    assert found.pairs.columns.names is found.images.columns.names  # so that selecting is quick


def test_a_real_layout(toy_root: Path, tmp_path: Path):
    expected = load_robotcar(toy_root, progress=False)
    for _ in range(2):
        found = open_scene(load_robotcar, toy_root, index_dir=tmp_path, progress=False)
        assert_same_scene(found, expected)
    part, wanted = (s.with_conditions(["night"]).split(0.4, 0) for s in (found, expected))
    for a, b in zip(part, wanted, strict=True):
        assert_same_scene(a, b)


def test_without_a_folder_nothing_is_kept(photos, tmp_path):
    for _ in range(2):
        READS.clear()
        assert len(open_scene(read_photos, photos, progress=False).images) == 4 and READS
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def add(root):
    Image.new("RGB", (8, 8)).save(root / "9.jpg")


def remove(root):
    (root / "3.jpg").unlink()


def rename(root):
    (root / "3.jpg").rename(root / "7.jpg")


def touch(root):
    status = (root / "1.jpg").stat()
    os.utime(root / "1.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def add_below(root):
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "notes.txt").write_text("x")


@pytest.mark.parametrize("change", [add, remove, rename, touch, add_below])
def test_a_changed_file_is_read_anew(opened, photos, change):
    opened()
    change(photos)
    scene, read = opened()
    assert read and list(scene.images) == sorted(path.name for path in photos.glob("*.jpg"))
    assert not opened()[1]


def test_other_settings_have_other_indices(opened, photos, tmp_path, monkeypatch):
    opened()
    scene, read = opened(partial(read_photos, place="q"))
    assert read and scene.places == ("q",)
    assert opened(on_bad="skip")[1]
    assert opened(partial(read_photos, place="r"))[1]
    # All of them are kept side by side; a partial of a partial is what both bind.
    assert not opened()[1] and not opened(on_bad="skip")[1]
    scene, read = opened(partial(partial(read_photos, place="x"), place="q"))
    assert not read and scene.places == ("q",)
    monkeypatch.chdir(tmp_path)
    assert not opened(root=Path("photos"))[1]  # the same folder


class Deferred(partial):
    """A subclass of partial, as Hydra's `_partial_` makes: Python does not flatten a partial of it."""


def test_a_partial_of_a_subclass_of_partial_is_known_by_its_reader(opened):
    assert opened(partial(Deferred(read_photos, place="x"), on_bad="raise"))[1]
    scene, read = opened(partial(Deferred(read_photos, place="x"), on_bad="raise"))
    assert not read
    assert scene.places == ("x",)
    assert opened(partial(Deferred(read_photos, place="y"), on_bad="raise"))[1]


def test_files_that_the_settings_name_elsewhere(opened, tmp_path):
    other = tmp_path / "model"
    other.mkdir()
    reader = partial(read_photos, elsewhere=str(other))
    assert opened(reader)[1] and not opened(reader)[1]
    (other / "points.bin").write_bytes(b"x")
    assert opened(reader)[1]
    reader = partial(read_photos, elsewhere="../model")
    assert opened(reader)[1] and not opened(reader)[1]
    (other / "points.bin").write_bytes(b"xy")
    assert opened(reader)[1]


def test_a_raised_version_reads_anew(opened, monkeypatch):
    opened()
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    assert opened()[1] and not opened()[1]
    monkeypatch.setattr(sys.modules[__name__], "READER_VERSION", 1, raising=False)
    assert opened()[1] and not opened()[1]


def test_an_edited_source_text_keeps_the_index_until_its_version_is_raised(tmp_path, photos, monkeypatch):
    source = tmp_path / "their_reader.py"
    text = "from tests.scenes.test_index import read_photos\n\ndef read(root):\n    return read_photos(root)\n"
    source.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def is_read() -> bool:
        READS.clear()
        sys.modules.pop("their_reader", None)
        importlib.invalidate_caches()
        reader = importlib.import_module("their_reader").read
        open_scene(reader, photos, index_dir=tmp_path / "index", progress=False)
        return bool(READS)

    assert is_read() and not is_read()
    source.write_text(text + "# edited\n")
    assert not is_read()
    source.write_text(text + "READER_VERSION = 1\n")
    assert is_read() and not is_read()


def test_an_index_of_an_older_kind_is_read_anew_and_told_of(opened, tmp_path, caplog):
    opened()
    (path,) = (tmp_path / "index").glob("*.index")
    path.unlink()
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "scene.json").write_text('{"version": 2}')
    with caplog.at_level(logging.INFO):
        assert opened()[1] and not opened()[1]
    assert caplog.text.count(str(folder)) == 1 and (folder / "scene.json").exists()


def test_a_reader_without_a_name_is_not_kept(opened, tmp_path):
    for _ in range(2):
        assert opened(lambda root: read_photos(root))[1]
    assert not (tmp_path / "index").exists()


def truncate(path: Path, at: int) -> None:
    path.write_bytes(path.read_bytes()[:at])


def zero(path: Path, at: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"\1\2\3\4" + content[at + 4 :])


def delete(path: Path, at: int) -> None:
    path.unlink()


def scribble(path: Path, at: int) -> None:
    path.write_bytes(b"\x80\x04c")


@pytest.mark.parametrize("damage", [truncate, zero, delete, scribble])
@pytest.mark.parametrize("name", [None, "images.names.offsets", "images.keypoints", "pair_rows"])
def test_a_damaged_index_is_made_anew(opened, tmp_path, photos, damage, name):
    opened()
    (path,) = (tmp_path / "index").glob("*.index")
    damage(path, 30 if name is None else ArrayFile(path).mapped(name, "r").offset)
    scene, read = opened()
    assert read and not opened()[1]
    assert_same_scene(scene, read_photos(photos))


def test_an_index_without_an_array(opened, tmp_path, caplog):
    opened()
    (path,) = (tmp_path / "index").glob("*.index")
    path.write_bytes(path.read_bytes().replace(b'"images.flags": [', b'"images.flegs": ['))
    with caplog.at_level(logging.WARNING):
        assert opened()[1]
    assert "is damaged" in caplog.text


def test_an_index_is_one_file_of_plain_arrays(opened, tmp_path):
    opened()
    kinds = [path.suffix for path in (tmp_path / "index").rglob("*")]
    assert sorted(kinds) == [".index", ".lock"]
    (path,) = (tmp_path / "index").glob("*.index")
    file = ArrayFile(path)
    assert {file[name].dtype.kind for name in file.arrays} <= set("uif")


def test_broken_input_is_raised_or_counted(opened, photos):
    (photos / "2.jpg").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2\.jpg"):
            opened()
    for expected in (True, False):
        scene, read = opened(on_bad="skip")
        assert read == expected and list(scene.images) == ["0.jpg", "1.jpg", "3.jpg"]
        assert len(scene.problems) == 1 and "2.jpg (0 bytes)" in scene.problems[0]


def test_a_place_that_cannot_be_written(photos, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        scene = open_scene(read_photos, photos, index_dir=tmp_path / "file" / "index", progress=False)
    assert len(scene.images) == 4 and "no index of the dataset can be kept" in caplog.text


def test_an_index_inside_the_dataset(photos):
    for expected in (True, False, False):
        READS.clear()
        open_scene(read_photos, photos, index_dir=photos / "index", progress=False)
        assert bool(READS) == expected


def test_several_processes_read_once(photos, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_in_process, args=(photos, tmp_path / "index")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "read\n"
    assert not list((tmp_path / "index").glob(".*.part"))


def test_a_killed_process_leaves_no_waste(opened, tmp_path):
    opened()
    (path,) = (tmp_path / "index").glob("*.index")
    waste = path.with_name(f".{path.name}.1234.part")
    waste.write_bytes(b"half")
    path.unlink()
    assert opened()[1] and not waste.exists()


def test_links_are_followed_once(photos, tmp_path):
    (photos / "loop").symlink_to(photos)
    (photos / "nowhere").symlink_to(photos / "missing")
    (photos / "self").symlink_to(photos / "self")
    other = tmp_path / "other"
    other.mkdir()
    (photos / "link").symlink_to(other)
    first = fingerprint([photos])
    assert fingerprint([photos]) == first
    (other / "x").write_text("x")
    assert fingerprint([photos]) != first
    assert fingerprint([photos], leave_out=other) == fingerprint([photos], leave_out=other)
    assert fingerprint([tmp_path / "missing"]) == fingerprint([tmp_path / "missing"])
