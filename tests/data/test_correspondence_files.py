from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from gnnet.data.correspondences import load_correspondences, read_correspondence_file, read_correspondence_paths
from gnnet.scenes.scene import Pair, Scene, SceneImage
from gnnet.scenes.toy_layout import write_correspondences

A, B = "overcast-reference/rear/1.jpg", "night/rear/2.jpg"


@pytest.fixture
def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(1, 90, (7, 2)), rng.uniform(1, 90, (7, 2)), rng.uniform(0.1, 1, 7)


def test_v73_file_is_read_as_written(tmp_path: Path, points):
    path = tmp_path / "pair.mat"
    write_correspondences(path, A, B, *points)
    assert read_correspondence_paths(path) == (A, B)
    found = read_correspondence_file(path)
    for got, expected in zip(found, points, strict=True):
        assert got.dtype == np.float32 and np.allclose(got, expected, atol=1e-5)


def test_file_counts_from_the_first_pixels_centre(tmp_path: Path):
    path = tmp_path / "pair.mat"
    with h5py.File(path, "w") as file:
        file["pt_i"], file["pt_j"] = np.zeros((1, 2)), np.array([[3, 4]], np.uint16)
        file["dist_from_center"] = np.ones((1, 1))
    found = read_correspondence_file(path)
    assert found.keypoints_a.tolist() == [[0.5, 0.5]] and found.keypoints_b.tolist() == [[3.5, 4.5]]


@pytest.mark.parametrize("matlab_order", [True, False])
def test_v5_file(tmp_path: Path, points, matlab_order: bool):
    path = tmp_path / "pair.mat"
    xy_a, xy_b, weight = points
    turn = (lambda x: x.T) if matlab_order else (lambda x: x)  # MATLAB saves 2×N what h5py reads as N×2
    content = {"pt_i": turn(xy_a - 0.5), "pt_j": turn(xy_b - 0.5), "dist_from_center": weight[None]}
    scipy.io.savemat(path, {"im_i_path": A, "im_j_path": B, **content})
    assert read_correspondence_paths(path) == (A, B)
    found = read_correspondence_file(path)
    assert np.allclose(found.keypoints_a, xy_a, atol=1e-5) and np.allclose(found.keypoints_b, xy_b, atol=1e-5)
    assert np.allclose(found.weight, weight)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pt_i", None, r"has no pt_i; it has dist_from_center, im_i_path, im_j_path, pt_j"),
        ("pt_i", np.zeros((0, 2)), r"pt_i is float64 of shape \(0, 2\); expected N×2"),
        ("pt_j", np.zeros((7, 3)), r"pt_j is float64 of shape \(7, 3\); expected N×2"),
        ("pt_j", np.zeros(14), r"pt_j is float64 of shape \(14,\)"),
        ("pt_j", np.zeros((6, 2)), r"pt_i has 7 points, pt_j has 6"),
        ("pt_i", np.full((7, 2), np.nan), r"pt_i holds numbers that are not finite"),
        ("dist_from_center", np.zeros((6, 1)), r"dist_from_center .*\(6, 1\); expected one number for each of the 7"),
        ("dist_from_center", np.full((7, 1), np.inf), r"dist_from_center holds numbers that are not finite"),
    ],
)
def test_malformed_file_names_file_key_found_and_expected(tmp_path: Path, points, key, value, message):
    path = tmp_path / "pair.mat"
    write_correspondences(path, A, B, *points)
    with h5py.File(path, "r+") as file:
        del file[key]
        if value is not None:
            file[key] = value
    with pytest.raises(ValueError, match=message) as error:
        read_correspondence_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a mat file", b"\x89HDF\r\n\x1a\n" + b"\0" * 40])
def test_files_of_another_kind(tmp_path: Path, content: bytes):
    path = tmp_path / "pair.mat"
    path.write_bytes(content)
    for read in (read_correspondence_file, read_correspondence_paths):
        with pytest.raises(ValueError, match=r"pair\.mat.*cannot be read as a MATLAB"):
            read(path)


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.mat"):
        read_correspondence_file(tmp_path / "gone.mat")


def scene_of(ids_a, ids_b, path: Path) -> Scene:
    images = {
        name: SceneImage(
            name, path, "day", "0", point_ids=np.array(ids), keypoints=np.stack([np.array(ids), np.array(ids)], -1) + s
        )
        for name, ids, s in (("a", ids_a, 0.25), ("b", ids_b, 0.75))
    }  # fmt: skip
    return Scene("points", images, (Pair("a", "b", "0"),))


def test_correspondences_from_common_points(tmp_path: Path):
    scene = scene_of([9, 2, 5], [5, 1, 9], tmp_path)
    found = load_correspondences(scene, scene.pairs[0])
    assert found.keypoints_a.tolist() == [[5.25, 5.25], [9.25, 9.25]]
    assert found.keypoints_b.tolist() == [[5.75, 5.75], [9.75, 9.75]] and found.weight.tolist() == [1, 1]
    assert all(array.dtype == np.float32 for array in found)


def test_no_common_points(tmp_path: Path):
    scene = scene_of([1, 2], [3, 4], tmp_path)
    with pytest.raises(ValueError, match="a and b observe no 3D point in common"):
        load_correspondences(scene, scene.pairs[0])
    bare = Scene("bare", {n: SceneImage(n, tmp_path, "day", "0") for n in "ab"}, scene.pairs)
    with pytest.raises(ValueError, match="a observes no 3D points"):
        load_correspondences(bare, bare.pairs[0])
