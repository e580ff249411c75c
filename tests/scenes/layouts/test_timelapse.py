"""Folders of pictures of fixed cameras, and of any photographs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnnet.data.pairs import PairDataset
from gnnet.scenes.layouts.homography import load_homography
from gnnet.scenes.layouts.timelapse import load_timelapse


def write_place(folder: Path, count: int, *, seed: int = 0, gains: list[float] | None = None) -> list[Path]:
    """Pictures of one fixed camera: the same blocks, each time in another light, with noise."""
    generator = np.random.default_rng(seed)
    blocks = np.kron(generator.uniform(40, 220, (12, 16)), np.ones((10, 10)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        gain = gains[number] if gains else generator.uniform(0.9, 1.1)
        picture = np.clip(blocks * gain + generator.normal(0, 4, blocks.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"2012050{number}_120000.jpg")
        Image.fromarray(np.repeat(picture[..., None], 3, -1)).save(paths[-1], quality=95)
    return paths


def test_places_conditions_and_pairs(tmp_path):
    write_place(tmp_path / "harbour", 6, gains=[1, 1, 1, 1, 0.5, 0.2])
    write_place(tmp_path / "square", 4, seed=1)
    scene = load_timelapse(tmp_path, partners=2, progress=False)
    assert scene.places == ("harbour", "square") and len(scene.images) == 10 and not scene.problems
    conditions = [scene.images[name].condition for name in sorted(scene.images) if name.startswith("harbour")]
    assert conditions == ["day"] * 4 + ["dusk", "night"]
    assert all(pair.static and pair.image_a != pair.image_b for pair in scene.pairs)
    names = {frozenset((pair.image_a, pair.image_b)) for pair in scene.pairs}
    assert len(names) == len(scene.pairs)
    for name in scene.images:
        assert sum(name in pair for pair in names) >= 2
    assert all(scene.images[p.image_a].place == scene.images[p.image_b].place == p.place for p in scene.pairs)


def test_one_folder_is_one_place_and_places_are_chosen(tmp_path):
    write_place(tmp_path / "harbour", 3)
    write_place(tmp_path / "square", 3)
    assert load_timelapse(tmp_path / "harbour", progress=False).places == ("harbour",)
    assert load_timelapse(tmp_path, folders=["square"], progress=False).places == ("square",)
    with pytest.raises(ValueError, match=r"dataset\.folders names moon.*it has harbour, square"):
        load_timelapse(tmp_path, folders=["moon"], progress=False)


def test_pictures_of_a_moved_camera_are_found_and_left_out(tmp_path):
    paths = write_place(tmp_path / "harbour", 6)
    picture = np.asarray(Image.open(paths[2]))
    Image.fromarray(np.roll(picture, (9, 14), (0, 1))).save(paths[2], quality=95)
    scene = load_timelapse(tmp_path, progress=False)
    assert len(scene.images) == 5 and f"harbour/{paths[2].name}" not in scene.images
    assert len(scene.problems) == 1 and paths[2].name in scene.problems[0]
    assert "shifted by 16" in scene.problems[0]  # to about a pixel
    assert len(load_timelapse(tmp_path, max_shift=20, progress=False).images) == 6


def test_broken_images_end_the_reading_or_are_counted(tmp_path):
    paths = write_place(tmp_path / "harbour", 6)
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    paths[4].write_bytes(b"")
    Image.open(paths[0]).resize((80, 60)).save(paths[0])
    with pytest.raises(ValueError, match=rf"{paths[1].name} .*truncated"):
        load_timelapse(tmp_path, progress=False)
    scene = load_timelapse(tmp_path, on_bad="skip", progress=False)
    assert len(scene.images) == 3 and len(scene.problems) == 3
    assert "80×60 pixels, the others of harbour are 160×120" in scene.problems[-1]


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder \(dataset\.root\)"):
        load_timelapse(tmp_path / "none", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no place with two images.*expected"):
        load_timelapse(tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="holds no image"):
        load_homography(tmp_path)


def test_homography_pairs_each_photograph_with_itself(tmp_path):
    write_place(tmp_path / "a", 2)
    write_place(tmp_path / "b" / "c", 2)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    scene = load_homography(tmp_path)
    assert scene.places == ("a", "b/c") and len(scene.pairs) == len(scene.images) == 4
    assert all(pair.static and pair.image_a == pair.image_b for pair in scene.pairs)
    assert len(load_homography(tmp_path / "a").places) == 2  # one folder: each photograph is a place


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds timelapse/")
def test_real_timelapses():
    scene = load_timelapse(Path(os.environ["GNNET_DATA"]) / "timelapse", progress=False)
    assert len(scene.images) == 170 and len(scene.places) == 4 and not scene.problems
    dusk = [image for image in scene.images.values() if image.place == "stlouis" and image.condition == "dusk"]
    assert 5 <= len(dusk) <= 15


def test_photographs_of_one_folder_may_differ_in_size(tmp_path):
    generator = np.random.default_rng(0)
    for number, shape in enumerate([(120, 160, 3), (160, 120, 3), (90, 140, 3)]):
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    scene = load_homography(tmp_path)
    pairs = PairDataset(scene, correspondences=20, largest_side=None, crop=64, warp=0.3, seed=0)
    for index in range(len(pairs)):
        assert pairs[0, index].valid.any()
