"""Images matched with what the scene says of them: a painted wall before cameras side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.data.agreement import depth_factor, errors_in_images, refuse_contradiction
from gnnet.data.datamodule import CorrespondenceData
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage

SIDE, FOCAL, FAR = 200, 200.0, 4.0  # pixels, pixels, metres to the wall
STEPS = ((0.0, 0.0), (0.5, 0.1), (0.9, -0.2))  # metres of the cameras to the right and down
CAMERA = Camera.from_colmap("PINHOLE", SIDE, SIDE, (FOCAL, FOCAL, SIDE / 2, SIDE / 2), dtype=torch.float64)
UPRIGHT = Image.Transpose.ROTATE_90  # what a camera stores that tags its picture 6


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    coarse = np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8)
    wall = Image.fromarray(coarse).resize((360, 360), Image.Resampling.BICUBIC).convert("RGB")
    corners = [(60 + round(FOCAL * x / FAR), 60 + round(FOCAL * y / FAR)) for x, y in STEPS]
    return [wall.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def wall_scene(folder: Path, pictures: list[Image.Image], *, depth: float | None = None, **saving) -> Scene:
    """Three images of the wall: of its 3D points, or with depth maps of so many units a metre."""
    grid = torch.cartesian_prod(torch.arange(-2.5, 3.5, 0.08), torch.arange(-2.5, 3.0, 0.08), torch.tensor([FAR]))
    images = {}
    for number, ((x, y), picture) in enumerate(zip(STEPS, pictures, strict=True)):
        picture.save(folder / f"{number}.jpg", quality=95, **saving)
        pose = Pose(torch.eye(3, dtype=torch.float64), torch.tensor([-x, -y, 0], dtype=torch.float64))
        xy, seen = CAMERA.project(pose.transform(grid.double()))
        known: dict = {"point_ids": np.flatnonzero(seen), "keypoints": xy[seen].numpy()}
        if depth is not None:
            path = folder / f"{number}.png"
            Image.fromarray(np.full((SIDE, SIDE), FAR * depth, np.uint16)).save(path)
            known = {"depth": Depth(path)}
        images[str(number)] = SceneImage(
            str(number), folder / f"{number}.jpg", "day", "wall", CAMERA, pose, is_reference=True, **known
        )
    pairs = [Pair(a, b, "wall") for a, b in ("01", "12", "02")]
    return Scene("wall", images, pairs, grid.double())


@pytest.mark.slow
@pytest.mark.cases
def test_a_model_of_these_pixels_is_taken_whatever_the_tag(tmp_path, pictures):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = wall_scene(tmp_path, pictures, exif=exif)
    errors = errors_in_images(scene, progress=False).errors
    assert list(errors) == ["SIFT matches to common 3D points near them"]
    assert np.median(np.concatenate(errors["SIFT matches to common 3D points near them"])) < 1
    refuse_contradiction(scene)


@pytest.mark.slow
@pytest.mark.cases
def test_square_photographs_whose_model_is_of_upright_pixels_are_refused(tmp_path, pictures):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = wall_scene(tmp_path, [picture.transpose(UPRIGHT) for picture in pictures], exif=exif)
    with pytest.raises(
        ValueError, match=r"contradict each other.* 3 of the 3 images have an orientation tag .*auto-or"
    ):
        refuse_contradiction(scene)
    with pytest.raises(ValueError, match=r"dataset\.check_images=false"):
        CorrespondenceData(scene=lambda root: scene, root=tmp_path, validation_fraction=0, check_images=True).setup()
    CorrespondenceData(scene=lambda root: scene, root=tmp_path, validation_fraction=0).setup()


@pytest.mark.slow
@pytest.mark.cases
def test_images_that_have_each_others_poses_are_refused(tmp_path, pictures):
    scene = wall_scene(tmp_path, [pictures[i] for i in (2, 0, 1)], depth=1000)
    with pytest.raises(ValueError, match="in the order"):
        refuse_contradiction(scene)


@pytest.mark.slow
@pytest.mark.cases
@pytest.mark.parametrize("unit", [5000.0, 256.0])
def test_depth_of_another_unit_than_the_poses_is_refused_and_the_unit_named(tmp_path, pictures, unit):
    refuse_contradiction(wall_scene(tmp_path, pictures, depth=1000))
    scene = wall_scene(tmp_path, pictures, depth=unit)
    with pytest.raises(ValueError, match=rf"depth and poses contradict.*; {unit:g} would fit .*depth_scale"):
        refuse_contradiction(scene)
    images = {n: replace(i, depth=replace(i.depth, scale=unit)) for n, i in scene.images.items()}
    refuse_contradiction(Scene("wall", images, scene.pairs))


def test_a_factor_of_depth_needs_many_ratios_that_agree():
    assert depth_factor(np.full(20, 0.2)) is None and depth_factor(np.full(200, 1.1)) is None
    assert depth_factor(np.full(200, 0.2)) == pytest.approx(0.2)
    assert depth_factor(np.exp(np.random.default_rng(0).normal(size=500) - 1)) is None
