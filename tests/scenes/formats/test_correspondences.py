from __future__ import annotations

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from gnnet.data.correspondences import PairPoints
from gnnet.scenes.formats.correspondences import read_correspondence_file, read_correspondence_header
from gnnet.scenes.formats.matlab import opened_matlab_file
from gnnet.scenes.scene import Pair, Scene, SceneImage
from gnnet.toy.layout import write_correspondences

A, B = "overcast-reference/rear/1.jpg", "night/rear/2.jpg"


@pytest.fixture
def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(1, 90, (7, 2)), rng.uniform(1, 90, (7, 2)), rng.uniform(0.1, 1, 7)


def test_v73_file_is_read_as_written(tmp_path: Path, points):
    path = tmp_path / "pair.mat"
    write_correspondences(path, A, B, *points)
    assert read_correspondence_header(path) == (A, B, 7)
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
    turn = (lambda x: x.T) if matlab_order else (lambda x: x)  # h5py reads the 2×N arrays of MATLAB as N×2
    content = {"pt_i": turn(xy_a - 0.5), "pt_j": turn(xy_b - 0.5), "dist_from_center": -np.log(weight)[None]}
    scipy.io.savemat(path, {"im_i_path": A, "im_j_path": B, **content})
    assert read_correspondence_header(path) == (A, B, 7)
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
    if "finite" not in message:  # the header is checked without the points
        with pytest.raises(ValueError, match=message):
            read_correspondence_header(path)


def test_header_reads_no_points(tmp_path: Path, points):
    path = tmp_path / "pair.mat"
    write_correspondences(path, A, B, *points)
    with h5py.File(path, "r+") as file:
        file["pt_i"][:] = np.nan
    assert read_correspondence_header(path) == (A, B, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/etc/passwd", "'/etc/passwd'; expected an image's path below"),
        ("a/../../b.jpg", r"a/\.\./\.\./b\.jpg"),
        ("..\\b.jpg", "below the images' folder"),
        ("C:\\b.jpg", "below the images' folder"),
        (".", "below the images' folder"),
        ("./", "below the images' folder"),
        ("a\0b.jpg", "below the images' folder"),
        ("a\nb.jpg", "below the images' folder"),
        ("a" * 5000, r"shape \(5000, 1\)"),
    ],
)
def test_paths_that_lead_elsewhere(tmp_path: Path, points, text, message):
    path = tmp_path / "pair.mat"
    write_correspondences(path, A, text, *points)
    with pytest.raises(ValueError, match=message) as error:
        read_correspondence_header(path)
    assert str(error.value).startswith(f"{path}: im_j_path")


def _replace(path: Path, key: str, put) -> None:
    with h5py.File(path, "r+") as file:
        del file[key]
        put(file, key)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda file, key: file.create_group(key), "pt_i is a group"),
        (lambda file, key: file.__setitem__(key, h5py.ExternalLink("other.mat", "pt_i")), r"a link \(ExternalLink\)"),
        (lambda file, key: file.__setitem__(key, h5py.SoftLink("/pt_j")), r"a link \(SoftLink\)"),
        (lambda file, key: file.create_dataset(key, (7, 2), "f8", external=[("other.raw", 0, 112)]), "another file"),
        (lambda file, key: file.create_dataset(key, (20_000_000, 2), "f8", chunks=(64, 2)), "at most 20,000,000"),
        (lambda file, key: file.create_dataset(key, (7, 2), "f8", chunks=(10**8, 2), maxshape=(None, 2)), "pieces"),
        (lambda file, key: file.create_dataset(key, (7, 2), h5py.ref_dtype), "expected an array of numbers"),
        (lambda file, key: file.create_dataset(key, data=h5py.Empty("f8")), "key without values"),
    ],
)
def test_arrays_in_another_file_or_missing(tmp_path: Path, points, put, message):
    path = tmp_path / "pair.mat"
    write_correspondences(tmp_path / "other.mat", A, B, *points)
    (tmp_path / "other.raw").write_bytes(b"\0" * 112)
    write_correspondences(path, A, B, *points)
    _replace(path, "pt_i", put)
    for read in (read_correspondence_header, read_correspondence_file):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: pt_i")


@pytest.mark.parametrize("kind", ["v7.3", "v5", "v5 compressed"])
def test_damaged_files_name_themselves(tmp_path: Path, points, kind: str):
    path = tmp_path / "pair.mat"
    write_correspondences(path, A, B, *points)
    if kind != "v7.3":
        content = {"pt_i": points[0].T, "pt_j": points[1].T, "dist_from_center": points[2]}
        scipy.io.savemat(path, {"im_i_path": A, "im_j_path": B, **content}, do_compression=kind.endswith("compressed"))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for trial in range(150):
        content = bytearray(good if trial % 3 else good[: rng.integers(len(good))])
        for position in rng.integers(len(content), size=rng.integers(1, 12)) if content else ():
            content[position] = rng.choice([0, 1, 127, 255, rng.integers(256)])
        path.write_bytes(content)
        for read in (read_correspondence_header, read_correspondence_file):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)


def test_a_small_v5_file_cannot_fill_the_memory(tmp_path: Path):
    path = tmp_path / "pair.mat"
    shape = np.array([10_000_000, 100], "<i4").tobytes()
    name = b"pt_i".ljust(8, b"\0")
    head = np.array([14, 0, 6, 8, 6, 0, 5, 8], "<u4").tobytes() + shape + np.array([1, 4], "<u4").tobytes() + name
    packed = zlib.compress(head + b"\0" * 100)
    path.write_bytes(b"MATLAB".ljust(124) + b"\0\x01IM" + np.array([15, len(packed)], "<u4").tobytes() + packed)
    with pytest.raises(ValueError, match=r"has no pt_j, dist_from_center; it has pt_i"):
        read_correspondence_file(path)
    with (
        pytest.raises(ValueError, match=r"pt_i is of shape \(100, 10000000\); expected at most"),
        opened_matlab_file(path, ("pt_i",)),
    ):
        pass


def test_a_folder_in_place_of_a_file(tmp_path: Path):
    (tmp_path / "pair.mat").mkdir()
    with pytest.raises(ValueError, match=r"pair\.mat.*no regular file"):
        read_correspondence_header(tmp_path / "pair.mat")


@pytest.mark.parametrize("content", [b"", b"not a mat file", b"\x89HDF\r\n\x1a\n" + b"\0" * 40])
def test_files_of_another_kind(tmp_path: Path, content: bytes):
    path = tmp_path / "pair.mat"
    path.write_bytes(content)
    for read in (read_correspondence_file, read_correspondence_header):
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
    found = PairPoints(scene, scene.pairs[0]).draw(10, np.random.default_rng(0))
    assert found.keypoints_a.tolist() == [[5.25, 5.25], [9.25, 9.25]]
    assert found.keypoints_b.tolist() == [[5.75, 5.75], [9.75, 9.75]] and found.weight.tolist() == [1, 1]
    assert all(array.dtype == np.float32 for array in found)


def test_no_common_points(tmp_path: Path):
    scene = scene_of([1, 2], [3, 4], tmp_path)
    with pytest.raises(ValueError, match="a and b observe no 3D point in common"):
        PairPoints(scene, scene.pairs[0]).draw(10, np.random.default_rng(0))
    bare = Scene("bare", {n: SceneImage(n, tmp_path, "day", "0") for n in "ab"}, scene.pairs)
    with pytest.raises(ValueError, match="a observes no 3D points"):
        PairPoints(bare, bare.pairs[0]).draw(10, np.random.default_rng(0))
