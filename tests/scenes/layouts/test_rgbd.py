"""Posed RGB-D folders, written here; and real ones where they are at hand."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from gnnet.data.agreement import match_agreement
from gnnet.data.depth import read_depth_view
from gnnet.scenes.check import checked
from gnnet.scenes.layouts.rgbd import load_rgbd
from gnnet.scenes.problems import BadInput

K = np.array([[50.0, 0, 31.5], [0, 51.0, 23.5], [0, 0, 1]])


def world_from_cam(number: int) -> np.ndarray:
    """A camera that goes along x, 5 cm an image, and turns a little."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec([0, 0.01 * number, 0.02]).as_matrix()
    matrix[:3, 3] = 0.05 * number, 0.3, -0.1
    return matrix


def write_sequence(folder: Path, count: int = 12) -> Path:
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / f"images/{2 * number:05d}.jpg")
        Image.fromarray(np.full((48, 64), 2000, np.uint16)).save(folder / f"depth/{2 * number:05d}.png")
    np.savetxt(folder / "K.txt", K)
    np.savetxt(folder / "poses.txt", np.array([world_from_cam(n).ravel() for n in range(count)]))
    return folder


def load(root: Path, **kwargs):
    return load_rgbd(root, progress=False, **kwargs)


def replace_line(path: Path, row: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[row] = line
    path.write_text("\n".join(lines) + "\n")


def test_images_poses_cameras_places_and_pairs(tmp_path):
    scene = load(write_sequence(tmp_path / "walk"), gaps=(1, 3), places=3)
    assert list(scene.images) == [f"{2 * n:05d}.jpg" for n in range(12)] and not scene.problems
    image = scene.images["00010.jpg"]
    assert image.is_reference and image.condition == "reference"
    assert image.depth.path == tmp_path / "walk/depth/00010.png"
    assert image.depth.camera is None and image.depth.image_from_depth is None
    np.testing.assert_allclose(image.cam_from_world.matrix(), np.linalg.inv(world_from_cam(5)), atol=1e-12)
    # OpenCV's 31.5 from the first pixel's centre is the middle of 64 pixels.
    np.testing.assert_array_equal(image.camera.parameters, [50, 51, 32, 24, 0, 0, 0, 0])
    assert image.camera.size.tolist() == [64, 48] and image.camera.parameters.dtype == torch.float64
    assert [i.place for i in scene.images.values()] == [f"walk/{n}" for n in range(3) for _ in range(4)]
    numbers = {(int(p.image_a[:5]) // 2, int(p.image_b[:5]) // 2, p.place) for p in scene.pairs}
    within = ((0, 1), (1, 2), (2, 3), (0, 3))
    assert numbers == {(4 * place + i, 4 * place + j, f"walk/{place}") for place in range(3) for i, j in within}
    train, validation = scene.split(0.3, seed=0)
    assert train.pairs and validation.pairs and not set(train.images) & set(validation.images)


def test_a_folder_of_sequences(tmp_path):
    for name in ("000", "001"):
        write_sequence(tmp_path / name, count=4)
    (tmp_path / "notes").mkdir()
    scene = load(tmp_path, gaps=(1,), places=1)
    assert scene.places == ("000/0", "001/0") and len(scene.images) == 8 and len(scene.pairs) == 6
    assert scene.images["001/00006.jpg"].path == tmp_path / "001/images/00006.jpg"


def test_pairs_that_see_nothing_in_common_are_left_out(tmp_path):
    folder = write_sequence(tmp_path / "walk", count=4)
    turned = world_from_cam(3)
    turned[:3, :3] = Rotation.from_rotvec([0, np.pi, 0]).as_matrix()
    replace_line(folder / "poses.txt", 3, " ".join(map(str, turned.ravel())))
    assert {(p.image_a, p.image_b) for p in load(folder, gaps=(1,), places=1).pairs} == {
        ("00000.jpg", "00002.jpg"), ("00002.jpg", "00004.jpg"),
    }  # fmt: skip
    assert len(load(folder, gaps=(1,), places=1, min_overlap=0.0).pairs) == 3
    without = load(folder, gaps=(5,))  # it may still be a map
    assert len(without.images) == 4 and not len(without.pairs)
    assert re.search(r"4 usable images and no pair at gaps \[5\].*dataset\.gaps", without.problems[0])
    with pytest.raises(ValueError, match=r"dataset\.gaps holds 0"):
        load(folder, gaps=(0,))
    with pytest.raises(ValueError, match=r"dataset\.places is 0"):
        load(folder, places=0)


def write_third_pose(line: str):
    return lambda folder: replace_line(folder / "poses.txt", 2, line)


BROKEN = {
    "a garbled pose": (write_third_pose("1 2 x"), r"poses\.txt line 3: .*'x'"),
    "a short pose": (write_third_pose("1 2 3"), r"line 3 has 3 numbers; expected a row-major"),
    "a lost pose": (write_third_pose(" ".join(["nan"] * 16)), "line 3 holds nan .* not finite"),
    "no last row": (write_third_pose(" ".join(["1"] * 16)), "line 3 ends with 1 1 1 1"),
    "no depth": (lambda f: (f / "depth/00004.png").unlink(), r"00004\.jpg has no depth map .*00004\.png"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_image_ends_the_reading_or_is_left_out(tmp_path, name):
    spoil, message = BROKEN[name]
    folder = write_sequence(tmp_path / "walk")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder)
    scene = load(folder, on_bad="skip", gaps=(1,), places=1)
    assert len(scene.images) == 11 and "00004.jpg" not in scene.images and len(scene.problems) == 1
    # The image after it stands in at its place.
    assert len(scene.pairs) == 10


def test_a_broken_sequence_is_left_out(tmp_path):
    for name in ("000", "001"):
        write_sequence(tmp_path / name, count=4)
    (tmp_path / "001/images/00000.jpg").unlink()
    with pytest.raises(ValueError, match=r"poses\.txt has 4 lines, .*images has 3 images; expected a line for each"):
        load(tmp_path)
    scene = load(tmp_path, on_bad="skip", gaps=(1,), places=1)
    assert len(scene.images) == 4 and len(scene.problems) == 1
    no_k = "1 2", "50 0 32 0 50 24 0 0 nan", "-50 0 32 0 50 24 0 0 1", "50 9 32 0 50 24 0 0 1", "50 0 32 0 50 24 1 0 1"
    for k in no_k:
        (tmp_path / "000/K.txt").write_text(k)
        with pytest.raises(ValueError, match=r"000/K\.txt"):
            load(tmp_path)
    with pytest.raises(ValueError, match=r"holds 0 usable images .*; the first problem: .*K\.txt"):
        load(tmp_path, on_bad="skip")


def test_a_broken_first_image_does_not_hide_the_size(tmp_path):
    folder = write_sequence(tmp_path / "walk", count=4)
    (folder / "images/00000.jpg").write_bytes(b"")
    assert load(folder, gaps=(1,), places=1).images["00002.jpg"].camera.size.tolist() == [64, 48]
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"image .*00006\.jpg \(0 bytes\)"):
        load(folder)


def test_the_layout_is_told(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"(?s)no posed RGB-D sequence \(dataset\.root\); .*images/"):
            load(root)
    folder = write_sequence(tmp_path / "walk", count=2)
    shutil.move(folder / "poses.txt", folder / "poses.csv")
    with pytest.raises(FileNotFoundError, match=r"poses\.txt does not exist"):
        load(folder)
    with pytest.raises(ValueError, match=r"dataset\.on_bad is 'ignore'"):
        load(folder, on_bad="ignore")


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds hololens/")
def test_real_sequence_agrees_with_its_images():
    scene = load(Path(os.environ["GNNET_DATA"]) / "hololens/000", gaps=(7,), places=1)
    assert len(scene.images) == 140
    assert np.median(np.concatenate([match_agreement(scene, pair)[0] for pair in scene.pairs])) < 3


@pytest.mark.cases
def test_frames_without_leading_zeros_keep_their_own_poses(tmp_path):
    folder = write_sequence(tmp_path / "walk")
    for kind in ("images", "depth"):
        for number, path in enumerate(sorted((folder / kind).iterdir())):
            path.rename(path.with_stem(f"{number}"))
    scene = load(folder, gaps=(1,), places=1)
    for number in range(12):
        found = scene.images[f"{number}.jpg"].cam_from_world.matrix()
        np.testing.assert_allclose(found, np.linalg.inv(world_from_cam(number)), atol=1e-12)


@pytest.mark.cases
def test_the_unit_of_depth_is_a_setting(tmp_path):
    folder = write_sequence(tmp_path / "walk", count=4)
    scene = checked(load(folder, depth_scale=5000, places=1, gaps=(1,)), BadInput(), progress=False)
    assert read_depth_view(scene.images["00000.jpg"]).at(np.zeros(1, int))[0] == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"dataset\.depth_scale is 0; expected units"):
        load(folder, depth_scale=0)


@pytest.mark.cases
def test_poses_that_are_not_finite_are_named_left_out_and_counted(tmp_path):
    folder = write_sequence(tmp_path / "walk")
    replace_line(folder / "poses.txt", 5, " ".join(["-inf"] * 16))
    replace_line(folder / "poses.txt", 6, " ".join(["nan"] * 16))
    with pytest.raises(ValueError, match=r"poses\.txt line 6 holds -inf .* not finite"):
        load(folder)
    scene = load(folder, on_bad="skip", places=1)
    assert len(scene.images) == 10 and len(scene.problems) == 2 and "line 7 holds nan" in scene.problems[1]
    for path in (folder / "images").iterdir():
        Image.new("RGB", (32, 24)).save(path)
    told = (
        r"12 problems, 10 of them alike: depth map .*\.png is 64×48 pixels, its image .*\.jpg is 32×24; .*; the first"
    )
    with pytest.raises(ValueError, match=told):
        checked(load(folder, on_bad="skip", places=1), BadInput("skip"), progress=False)
