"""COLMAP folders: the toy's own models read as such, and real ones where they are at hand."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gnnet.data.correspondences import load_correspondences
from gnnet.scenes.colmap import load_colmap


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
    matches = load_correspondences(scene, pair)
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
    with pytest.raises(ValueError, match="share 100000 points"):
        load_colmap(folder, min_shared_points=100_000)


def test_unsupported_cameras_are_said(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "fisheye")
    (tmp_path / "fisheye/sparse/cameras.txt").write_text("2 OPENCV_FISHEYE 96 96 60 60 48 48 0 0 0 0\n")
    with pytest.raises(ValueError, match=r"OPENCV_FISHEYE is not supported.*undistort"):
        load_colmap(tmp_path / "fisheye")


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds strecha/")
@pytest.mark.parametrize("name", ["herz-jesus-p25", "entry-p10"])
def test_real_reconstructions(name):
    scene = load_colmap(Path(os.environ["GNNET_DATA"]) / "strecha" / name)
    assert reprojection_errors(scene).median() < 0.4
    assert len(scene.pairs) > len(scene.images)
