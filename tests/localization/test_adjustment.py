"""Keypoint adjustment: observations of a point agree afterwards, in one process as in several, and after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.compile import compile_map
from gnnet.localization.map import Map
from gnnet.processes import devices_of
from gnnet.scenes.scene import Scene, SceneImage
from tests.localization.test_map import Counting, contents, small_unet

DEPTH, FOCAL, STEP = 4.0, 100.0, 8  # metres, pixels, pixels from one image to the next
TRUE = np.stack(np.meshgrid(np.arange(36, 84, 4), np.arange(24, 72, 4)), -1).reshape(-1, 2) + 0.3  # in the first image


@pytest.fixture(scope="module")
def wall(tmp_path_factory) -> Scene:
    """Three cameras that look at a wall from beside each other; their keypoints are up to 0.8 pixels off."""
    folder, rng = tmp_path_factory.mktemp("wall"), np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((1, 3, 24, 32))).float()
    picture = F.interpolate(noise, (96, 128), mode="bicubic", align_corners=False).clamp(0, 1)[0]
    pixels = (255 * picture).byte().permute(1, 2, 0).numpy()
    camera = Camera.from_colmap("PINHOLE", 96, 96, (FOCAL, FOCAL, 48, 48), dtype=torch.float64)
    images = {}
    for k in range(3):
        name = f"{k}.png"
        Image.fromarray(pixels[:, STEP * k : STEP * k + 96]).save(folder / name)
        center = torch.tensor([k * STEP * DEPTH / FOCAL, 0, 0], dtype=torch.float64)
        keypoints = TRUE - [STEP * k, 0] + rng.uniform(-0.8, 0.8, TRUE.shape)
        images[name] = SceneImage(
            name, folder / name, camera=camera, cam_from_world=Pose(torch.eye(3, dtype=torch.float64), -center),
            is_reference=True, point_ids=np.arange(len(TRUE)), keypoints=keypoints,
        )  # fmt: skip
    points = np.concatenate([(TRUE - 48) * DEPTH / FOCAL, np.full((len(TRUE), 1), DEPTH)], 1)
    return Scene("wall", images, (), torch.from_numpy(points))


def compiled(path: Path, scene: Scene, network=None, **settings) -> Map:
    network = network or small_unet(channels=(6, 16))
    return compile_map(path, scene, network, **{"points": 500, "adjust": 1.0, "progress": False, **settings})


@pytest.fixture(scope="module")
def adjusted(wall, tmp_path_factory) -> Map:
    return compiled(tmp_path_factory.mktemp("maps") / "adjusted", wall)


def test_keypoints_of_a_point_agree_and_the_point_is_where_they_meet(wall, adjusted, tmp_path):
    before = compiled(tmp_path / "before", wall, adjust=None)
    apart, depths = [], []
    for town in (before, adjusted):
        keypoints = np.asarray(town.tracks.keypoints).reshape(-1, 3, 2) + np.arange(3)[:, None] * [STEP, 0]
        apart.append(np.abs(keypoints - keypoints.mean(1, keepdims=True)).mean())
        found = town.tracks.triangulated(wall.points, town.poses, town.cameras)
        depths.append((found[:, 2] - DEPTH).abs().mean().item())
        seen = town.observations(torch.arange(3))
        on_disk = np.asarray(town.tracks.keypoints).reshape(-1, 3, 2)[seen.ids, seen.reference]
        np.testing.assert_allclose(seen.keypoints, on_disk, atol=1e-4)
        xy, _ = town.cameras[seen.reference].project(town.poses[seen.reference].transform(seen.points[:, None]))
        torch.testing.assert_close(xy.squeeze(1).float(), seen.keypoints, atol=1e-3, rtol=0)
    assert apart[1] < 0.5 * apart[0] and depths[1] < 0.5 * depths[0]
    moved = np.abs(np.asarray(adjusted.tracks.keypoints) - np.asarray(before.tracks.keypoints)).max()
    assert 0.5 < moved <= 2.001  # one cell of stride 2


@pytest.mark.slow
def test_several_processes_make_the_same_map(wall, adjusted, tmp_path):
    compiled(tmp_path / "two", wall, device=devices_of("cpu", 2))
    assert contents(tmp_path / "two") == contents(adjusted.path)


def test_one_that_was_interrupted_makes_the_same_map(wall, adjusted, tmp_path):
    for fails_at in (4, 8):  # while keypoints are moved; while references are described
        path = tmp_path / str(fails_at)
        with pytest.raises(KeyboardInterrupt):
            compiled(path, wall, Counting(small_unet(channels=(6, 16)), fails_at=fails_at))
        assert path.exists() == (fails_at == 8)
        if fails_at == 4:  # what one that was killed leaves
            (tmp_path / ".4.sums").write_bytes(b"half a file")
        compiled(path, wall, Counting(small_unet(channels=(6, 16))))
        assert contents(path) == contents(adjusted.path)
        assert not list(tmp_path.glob(".*.sums"))


def test_a_map_says_how_its_keypoints_were_adjusted(wall, adjusted):
    with pytest.raises(ValueError, match=r"adjust 1\.0 instead of None"):
        compiled(adjusted.path, wall, adjust=None)
    for wrong in (0, "one"):
        with pytest.raises(ValueError, match=rf"adjust={wrong!r} \(map_adjust=\); expected a number of cells above 0"):
            compiled(adjusted.path, wall, adjust=wrong)


def test_a_point_that_one_image_sees_and_an_image_that_cannot_be_read_stay(wall, tmp_path):
    images = dict(wall.images)
    images["2.png"] = replace(images["2.png"], path=tmp_path / "nowhere.png")
    first = images["0.png"]
    images["0.png"] = replace(first, point_ids=first.point_ids[50:], keypoints=first.keypoints[50:])
    some = Scene("wall", images, (), wall.points)
    found = compiled(tmp_path / "map", some, on_bad="skip")
    moved = [
        np.abs(np.asarray(found.tracks.keypoints)[np.asarray(found.tracks.images) == row] - image.keypoints).max(1)
        for row, image in enumerate(images.values())
    ]
    assert moved[2].max() < 1e-4 and moved[1][:50].max() < 1e-4 and moved[0].max() > 0.1 and moved[1][50:].max() > 0.1
