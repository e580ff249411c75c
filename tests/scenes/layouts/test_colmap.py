"""COLMAP folders: the toy's own models read as such, and real ones where they are at hand."""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from gnnet.data.correspondences import PairPoints
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.check import checked
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.pairing import covisible_pairs
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import SceneImage


@pytest.fixture(scope="module")
def folder(toy_root, tmp_path_factory) -> Path:
    """One street of the toy town as a COLMAP folder."""
    root = tmp_path_factory.mktemp("colmap")
    robotcar = toy_root / "robotcar"
    model = sorted((robotcar / "3D-models/individual/colmap_reconstructions").iterdir())[0]
    shutil.copytree(model, root / "sparse")
    shutil.copytree(robotcar / "images", root / "images")
    for path in (root / "sparse").glob("images.txt"):  # the model says .png, the files are .jpg
        path.write_text(path.read_text().replace(".png", ".jpg"))
    return root


def reprojection_errors(scene) -> torch.Tensor:
    errors = []
    for image in scene.images.values():
        xy, _ = image.camera.project(image.cam_from_world.transform(scene.points[image.point_ids]))
        errors.append((xy - torch.from_numpy(image.keypoints)).norm(dim=-1))
    return torch.cat(errors)


def test_points_project_to_their_observations(folder):
    scene = load_colmap(folder, places=2)
    assert len(scene.images) == 3 and scene.pairs
    assert reprojection_errors(scene).max() < 0.05
    pair = scene.pairs[0]
    matches = PairPoints(scene, pair).draw(100, np.random.default_rng(0))
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    shared = np.intersect1d(a.point_ids, b.point_ids)
    assert len(matches.weight) == len(shared) >= 30
    xy, _ = b.camera.project(b.cam_from_world.transform(scene.points[shared]))
    np.testing.assert_allclose(matches.keypoints_b, xy, atol=0.05)


def test_missing_model_images_and_pairs_are_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no COLMAP model \(dataset\.root\)"):
        load_colmap(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"3 of 3 images .* are not on disk"):
        load_colmap(folder, images="elsewhere")
    without = load_colmap(folder, min_shared_points=100_000)  # it may still be a map
    assert len(without.images) == 3 and not len(without.pairs)
    assert re.search("share 100000 points, to train on", without.problems[0])


def as_binary(sparse: Path) -> None:
    """Turn a text model into a binary one, in place."""
    import pycolmap

    model = pycolmap.Reconstruction(str(sparse))
    shutil.rmtree(sparse)
    sparse.mkdir()
    model.write_binary(str(sparse))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.cases
@pytest.mark.parametrize(
    "model",
    [
        "OPENCV_FISHEYE 96 96 60 60 48 48 0.01 0 0 0", "FULL_OPENCV 96 96 60 60 48 48 0 0 0 0 0 0 0 0",
        "SIMPLE_DIVISION 96 96 60 48 48 -0.01", "SIMPLE_FISHEYE 96 96 60 48 48", "EUCM 96 96 60 60 48 48 0.6 1.1",
    ],
)  # fmt: skip
@pytest.mark.parametrize("binary", [False, True])
def test_cameras_of_all_models_are_read(copy, model, binary):
    (copy / "sparse/cameras.txt").write_text(f"2 {model}\n")
    if binary:
        as_binary(copy / "sparse")
    name, width, height, *parameters = model.split()
    expected = Camera.from_colmap(name, int(width), int(height), list(map(float, parameters)), dtype=torch.float64)
    scene = checked(load_colmap(copy, progress=False), BadInput("raise"), progress=False)
    for image in scene.images.values():
        assert torch.equal(image.camera.parameters, expected.parameters)


def test_a_camera_model_newer_than_this_reader_is_said(copy):
    as_binary(copy / "sparse")
    file = copy / "sparse/cameras.bin"
    file.write_bytes(file.read_bytes()[:12] + (99).to_bytes(4, "little") + file.read_bytes()[16:])
    with pytest.raises(ValueError, match=r"cameras.bin .* model number 99, EQUIRECTANGULAR, the last .*, 17"):
        load_colmap(copy, progress=False)


def test_text_and_binary_models_are_one(copy):
    text = load_colmap(copy, progress=False)
    as_binary(copy / "sparse")
    binary = load_colmap(copy, progress=False)
    assert binary.pairs == text.pairs and list(binary.images) == list(text.images)
    assert torch.equal(binary.points, text.points)
    for a, b in zip(binary.images.values(), text.images.values(), strict=True):
        assert np.array_equal(a.point_ids, b.point_ids) and np.array_equal(a.keypoints, b.keypoints)
        assert torch.equal(a.cam_from_world.rotation, b.cam_from_world.rotation)


@pytest.mark.cases
@pytest.mark.parametrize("binary", [False, True])
def test_names_with_spaces_are_found(copy, binary):
    model = copy / "sparse"
    if binary:
        as_binary(model)
    path = next(model.glob("images.*"))
    old = sorted(load_colmap(copy, progress=False).images)
    new = {name: f"Survey A/DJI  {i:04d} map plan ({i}).jpg" for i, name in enumerate(old)}
    content = path.read_bytes()
    for name, spaced in new.items():
        content = content.replace(name.encode(), spaced.encode())
        (copy / "images" / spaced).parent.mkdir(exist_ok=True)
        (copy / "images" / name).rename(copy / "images" / spaced)
    path.write_bytes(content)
    assert sorted(load_colmap(copy, progress=False).images) == sorted(new.values())


@pytest.mark.cases
def test_a_text_model_beside_other_binary_files_and_photographs_with_other_endings(copy):
    expected = load_colmap(copy, progress=False)
    (copy / "sparse" / "rigs.bin").write_bytes(b"of a newer COLMAP")
    for path in (copy / "images").rglob("*.jpg"):
        path.rename(path.with_suffix(".JPG"))
    found = load_colmap(copy, progress=False)
    assert list(found.images) == list(expected.images) and all(i.path.suffix == ".JPG" for i in found.images.values())


@pytest.mark.cases
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_models_as_windows_writes_them(copy, encoding):
    expected = load_colmap(copy, progress=False)
    for path in (copy / "sparse").glob("*.txt"):
        numbers = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.17e}".replace("e-", "e-0"), path.read_text())
        path.write_bytes(numbers.replace("\n", "\r\n").encode(encoding))
    found = load_colmap(copy, progress=False)
    assert list(found.images) == list(expected.images) and torch.equal(found.points, expected.points)
    for a, b in zip(found.images.values(), expected.images.values(), strict=True):
        assert np.array_equal(a.keypoints, b.keypoints) and np.array_equal(a.point_ids, b.point_ids)
        assert torch.equal(a.camera.parameters, b.camera.parameters)
        assert torch.equal(a.cam_from_world.matrix(), b.cam_from_world.matrix())


@pytest.mark.cases
@pytest.mark.parametrize(
    ("file", "row", "line", "message"),
    [
        ("images", 0, "1 1 0 0 0 0 0 nan 2 x.jpg", r"images\.txt line \d+ holds .*nan.*not finite"),
        ("images", 0, "1 1 0 0 0 x.jpg", r"images\.txt line \d+ is '1 1 0 0 0 x\.jpg'; expected IMAGE_ID"),
        ("images", 1, "1.0 2.0", r"images\.txt line \d+ is '1\.0 2\.0'; expected the line below an image's"),
        ("points3D", 0, "1 2 nonsense", r"points3D\.txt line \d+ is '1 2 nonsense'; expected POINT3D_ID"),
        ("points3D", 0, "-1 2 3 4", r"points3D\.txt line \d+ has '-1' where a whole number stands"),
        ("cameras", 0, "2 PINHOLE 96 96 1 2", r"cameras\.txt line \d+ has 2 numbers; expected 4 parameters of PINHOLE"),
        ("cameras", 0, "2 LENS 96 96 1 2", r"cameras\.txt line \d+ is '2 LENS 96 96 1 2'; expected CAMERA_ID"),
    ],
)
def test_a_damaged_line_of_a_text_model_is_named_and_left_out(copy, file, row, line, message):
    path = copy / "sparse" / f"{file}.txt"
    lines = path.read_text().splitlines()
    first = next(i for i, text in enumerate(lines) if not text.startswith("#"))
    lines[first + row] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        load_colmap(copy, progress=False)
    if file != "cameras":  # there is one camera
        scene = load_colmap(copy, on_bad="skip", progress=False)
        assert len(scene.images) == (2 if file == "images" else 3) and re.search(message, scene.problems[0])


@pytest.mark.parametrize("place", [".", "sparse/0", "sparse/7", "sfm", "sfm_superpoint+superglue"])
def test_models_are_found_where_colmap_and_hloc_put_them(copy, place):
    (copy / "sparse").rename(copy / "model")
    target = copy / place
    target.mkdir(parents=True, exist_ok=True)
    for path in (copy / "model").iterdir():
        path.rename(target / path.name)
    assert len(load_colmap(copy, progress=False).images) == 3


def test_folders_elsewhere(copy, tmp_path):
    (copy / "images").rename(tmp_path / "photos")
    (copy / "sparse").rename(tmp_path / "model")
    for images, sparse in (("../photos", "../model"), (tmp_path / "photos", str(tmp_path / "model"))):
        assert len(load_colmap(copy, images=images, sparse=sparse, progress=False).images) == 3
    assert len(load_colmap(tmp_path / "model", images="../photos", progress=False).images) == 3


def test_several_models_are_listed(copy):
    (copy / "sparse").rename(copy / "sfm_a")
    shutil.copytree(copy / "sfm_a", copy / "sfm_b")
    with pytest.raises(FileNotFoundError, match=r"holds 2 COLMAP models .*: sfm_a, sfm_b; name one by dataset\.sparse"):
        load_colmap(copy, progress=False)
    assert len(load_colmap(copy, sparse="sfm_b", progress=False).images) == 3
    with pytest.raises(FileNotFoundError, match=r"copy/sfm_c holds no COLMAP .*found there: images, sfm_a, sfm_b"):
        load_colmap(copy, sparse="sfm_c", progress=False)


def test_images_that_are_not_on_disk(copy):
    first = sorted(load_colmap(copy, progress=False).images)[0]
    (copy / "images" / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 images .*{first}; put the images there"):
        load_colmap(copy, progress=False)
    scene = load_colmap(copy, on_bad="skip", progress=False)
    assert len(scene.images) == 2 and first not in scene.images
    assert len(scene.problems) == 1 and first in scene.problems[0]
    shutil.rmtree(copy / "images")
    with pytest.raises(ValueError, match="holds no image that can be used"):
        load_colmap(copy, on_bad="skip", progress=False)


def test_names_that_leave_the_folder(copy):
    path = copy / "sparse/images.txt"
    name = next(line.split()[9] for line in path.read_text().splitlines() if line.endswith(".jpg"))
    path.write_text(path.read_text().replace(name, "../../etc/x.jpg"))
    with pytest.raises(ValueError, match=r"names '\.\./\.\./etc/x\.jpg'; expected a path inside"):
        load_colmap(copy, progress=False)
    assert len(load_colmap(copy, on_bad="skip", progress=False).images) == 2


@pytest.mark.parametrize("binary", [False, True])
def test_a_damaged_image_is_left_out_and_the_others_stay(copy, binary):
    path = copy / "sparse/images.txt"
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith(".jpg"))
    words = lines[at].split()
    lines[at] = " ".join([*words[:5], "1e300", *words[6:]])
    path.write_text("\n".join(lines) + "\n")
    if binary:
        as_binary(copy / "sparse")
    with pytest.raises(ValueError, match=r"copy/sparse/images\.(txt|bin) .*is damaged: image \d+ has pose"):
        load_colmap(copy, progress=False)
    scene = load_colmap(copy, on_bad="skip", progress=False)
    assert len(scene.images) == 2 and words[9] not in scene.images and len(scene.problems) == 1


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_damaged_models_are_named_at_once(copy, binary, name):
    """Also such as make pycolmap fill the memory or go round for ever."""
    if binary:
        as_binary(copy / "sparse")
    path = next((copy / "sparse").glob(f"{name}.*"))
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for trial in range(12):
        content = bytearray(good if trial % 3 else good[: rng.integers(len(good))])
        if trial % 3 == 1:
            content[:8] = int(rng.choice([2**31, 2**40, 2**62])).to_bytes(8, "little")
        for position in rng.integers(min(len(content), 2000), size=rng.integers(1, 12)) if content else ():
            content[position] = rng.choice([0, 1, 127, 255, rng.integers(256)])
        path.write_bytes(content)
        for on_bad in ("raise", "skip"):
            try:
                load_colmap(copy, on_bad=on_bad, progress=False)
            except (ValueError, FileNotFoundError) as error:
                assert str(copy) in str(error)


@pytest.mark.parametrize("per_image", [1, 3, 100])
def test_pairs_are_those_that_share_most_points(per_image):
    rng, pose = np.random.default_rng(0), Pose.identity()
    seen = [rng.choice(400, rng.integers(0, 250)) for _ in range(300)]  # more images than are counted at once
    images = [
        SceneImage(f"{i:03d}", Path(f"{i}.jpg"), "day", "p", cam_from_world=pose, point_ids=ids)
        for i, ids in enumerate(seen)
    ]
    points = [set(ids.tolist()) for ids in seen]
    shared = {(i, j): len(points[i] & points[j]) for i, j in combinations(range(len(seen)), 2)}
    partners = defaultdict(list)
    for (i, j), count in shared.items():
        if count >= 40:
            partners[i].append((count, j))
            partners[j].append((count, i))
    best = {i: sorted(others, reverse=True)[:per_image] for i, others in partners.items()}
    expected = {(min(i, j), max(i, j)): count for i, others in best.items() for count, j in others}
    found = covisible_pairs(images, 40, per_image, progress=False)
    assert {(int(p.image_a), int(p.image_b)): p.count for p in found} == expected
    assert [(p.image_a, p.image_b) for p in found] == sorted((p.image_a, p.image_b) for p in found)
    assert covisible_pairs(images, 401, per_image, progress=False) == []


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds strecha/")
@pytest.mark.parametrize("name", ["herz-jesus-p25", "entry-p10"])
def test_real_reconstructions(name):
    scene = load_colmap(Path(os.environ["GNNET_DATA"]) / "strecha" / name)
    assert reprojection_errors(scene).median() < 0.4
    assert len(scene.pairs) > len(scene.images)
