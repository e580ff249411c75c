"""Points and correspondences from depth, against a world that is traced here: a slanted wall and a panel before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.data.agreement import match_agreement
from gnnet.data.depth import depth_correspondences, depth_points, lift_keypoints, read_depth, read_depth_view
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, exp
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage

PINHOLE = Camera.from_colmap("PINHOLE", 160, 120, (130.0, 132.0, 81.0, 58.0), dtype=torch.float64)
LARGE = Camera.from_colmap("PINHOLE", 240, 180, (200.0, 200.0, 118.0, 93.0), dtype=torch.float64)
DISTORTED = Camera.from_colmap("OPENCV", 160, 120, (130.0, 132.0, 81.0, 58.0, -0.1, 0.02, 1e-3, 2e-3), torch.float64)
LEFT = exp(torch.tensor([0.45, 0.05, 0.0, 0.01, -0.08, 0.02], dtype=torch.float64))
RIGHT = exp(torch.tensor([-0.45, -0.02, 0.1, -0.01, 0.09, -0.01], dtype=torch.float64))
COLOR_FROM_DEPTH = exp(torch.tensor([-0.12, 0.01, 0.0, 0.004, 0.01, -0.005], dtype=torch.float64))


@dataclass(frozen=True)
class World:
    """Wall z = 4 + 0.3 x, and, if it is there, the panel |x| < 0.4, |y| < 0.5 at z = 2; metres."""

    panel: bool = True

    def trace(self, camera: Camera, cam_from_world: Pose, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points (N, 3) that pixels (N, 2) see, and their depth (N,)."""
        rays = camera.unproject(torch.from_numpy(xy))[0].numpy() @ cam_from_world.rotation.numpy()
        eye = cam_from_world.center().numpy()
        depth = (4 + 0.3 * eye[0] - eye[2]) / (rays[:, 2] - 0.3 * rays[:, 0])
        if self.panel:
            near = (2 - eye[2]) / rays[:, 2]
            hit = eye + near[:, None] * rays
            depth = np.where((abs(hit[:, 0]) < 0.4) & (abs(hit[:, 1]) < 0.5), near, depth)
        return eye + depth[:, None] * rays, depth

    def blocks(self, cam_from_world: Pose, points: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """Whether the panel, smaller by a margin on each side, stands between a camera and points (N, 3)."""
        eye = cam_from_world.center().numpy()
        share = (2 - eye[2]) / (points[:, 2] - eye[2])
        hit = eye + share[:, None] * (points - eye)
        inside = (abs(hit[:, 0]) < 0.4 - margin) & (abs(hit[:, 1]) < 0.5 - margin)
        return inside & (share < 0.99) & self.panel


def pixel_centers(camera: Camera) -> np.ndarray:
    width, height = camera.size.int().tolist()
    return np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), -1).reshape(-1, 2)


def brightness(points: np.ndarray) -> np.ndarray:
    """A texture of waves in the plane of x and y, the same from everywhere."""
    waves = np.random.default_rng(0).normal(0, 9, (60, 2))
    phase = np.random.default_rng(1).uniform(0, 2 * np.pi, 60)
    return np.clip(128 + 14 * np.sin(points[:, :2] @ waves.T + phase).sum(1), 0, 255).astype(np.uint8)


def write_view(
    folder: Path, name: str, world: World, camera: Camera, pose: Pose, *,
    depth_camera: Camera | None = None, color_from_depth: Pose | None = None,
) -> SceneImage:  # fmt: skip
    """An image and its depth map in millimetres, with the depth camera beside the image's where one is given."""
    width, height = camera.size.int().tolist()
    points, _ = world.trace(camera, pose, pixel_centers(camera))
    Image.fromarray(brightness(points).reshape(height, width)).save(folder / f"{name}.png")
    taken_by = depth_camera or camera
    depth_pose = pose if color_from_depth is None else color_from_depth.inverse() @ pose
    _, depth = world.trace(taken_by, depth_pose, pixel_centers(taken_by))
    path = folder / f"{name}.depth.png"
    write_depth(path, depth.reshape(taken_by.size.int().tolist()[::-1]))
    return SceneImage(
        name=name, path=folder / f"{name}.png", condition="reference", place="room", camera=camera,
        cam_from_world=pose, is_reference=True, depth=Depth(path, depth_camera, color_from_depth),
    )  # fmt: skip


def write_depth(path: Path, metres: np.ndarray) -> None:
    Image.fromarray(np.round(metres * 1000).astype(np.uint16)).save(path)


def project(camera: Camera, pose: Pose, points: np.ndarray) -> np.ndarray:
    return camera.project(pose.transform(torch.from_numpy(points)))[0].numpy()


def draw(a: SceneImage, b: SceneImage, count: int = 400, seed: int = 0, window=None):
    views = read_depth_view(a), read_depth_view(b)
    return depth_correspondences(*views, count=count, generator=np.random.default_rng(seed), window=window)


@pytest.mark.parametrize(("camera_a", "camera_b"), [(PINHOLE, LARGE), (LARGE, DISTORTED), (DISTORTED, PINHOLE)])
def test_correspondences_are_the_projections_of_points_that_both_see(tmp_path, camera_a, camera_b):
    world = World()
    a = write_view(tmp_path, "a", world, camera_a, LEFT)
    b = write_view(tmp_path, "b", world, camera_b, RIGHT)
    found = draw(a, b)
    assert 250 < len(found.weight) <= 400
    assert all(array.dtype == np.float32 for array in found)
    points, _ = world.trace(camera_a, LEFT, found.keypoints_a.astype(np.float64))
    np.testing.assert_allclose(found.keypoints_b, project(camera_b, RIGHT, points), atol=0.05)
    assert not world.blocks(RIGHT, points).any()
    np.testing.assert_allclose(found.weight, 1, atol=0.01)
    again, other = draw(a, b), draw(a, b, seed=1)
    np.testing.assert_array_equal(found.keypoints_a, again.keypoints_a)
    assert not np.array_equal(found.keypoints_a[:100], other.keypoints_a[:100])


def test_what_stands_before_them_in_the_other_image_removes_points(tmp_path):
    """Without the panel in b's depth the same points are hidden, so the check has something to remove."""
    world = World()
    a = write_view(tmp_path, "a", world, PINHOLE, LEFT)
    seen_through = write_view(tmp_path, "empty", World(panel=False), PINHOLE, RIGHT)
    b = write_view(tmp_path, "b", world, PINHOLE, RIGHT)
    for other, least, most in ((seen_through, 30, 400), (b, 0, 0)):
        found = draw(a, other)
        points, _ = world.trace(PINHOLE, LEFT, found.keypoints_a.astype(np.float64))
        assert least <= world.blocks(RIGHT, points).sum() <= most


def test_points_spread_evenly_whatever_share_of_the_depth_is_known(tmp_path):
    a = write_view(tmp_path, "a", World(panel=False), PINHOLE, LEFT)
    depth = read_depth(a.depth.path)
    depth[:60, 1::2] = 0  # half of the upper half's pixels are unknown
    write_depth(a.depth.path, depth)
    generator = np.random.default_rng(0)
    for keypoints in (draw(a, a, count=600).keypoints_a, depth_points(a, count=600, generator=generator)[1]):
        assert len(keypoints) == 600
        counts = np.histogram2d(keypoints[:, 0], keypoints[:, 1], bins=(4, 4), range=((0, 160), (0, 120)))[0]
        assert counts.min() > 22 and counts.max() < 53  # 37.5 on average


@pytest.mark.parametrize("depth_camera", [None, LARGE, DISTORTED])
def test_a_window_gets_all_the_points_and_the_rest_none(tmp_path, depth_camera):
    """Also where the depth camera is elsewhere, so that near and far surfaces of the window lie apart in its map."""
    beside = None if depth_camera is None else COLOR_FROM_DEPTH
    a, b = (
        write_view(tmp_path, n, World(), PINHOLE, pose, depth_camera=depth_camera, color_from_depth=beside)
        for n, pose in (("a", LEFT), ("b", RIGHT))
    )
    window = (60.0, 40.0, 120.0, 90.0)
    low, high = np.array(window[:2]), np.array(window[2:])
    everywhere, there = draw(a, b, count=4000).keypoints_a, draw(a, b, count=1000, window=window).keypoints_a
    inside = [((xy >= low) & (xy <= high)).all(1) for xy in (everywhere, there)]
    assert inside[1].mean() > (0.95 if depth_camera is None else 0.5) > 2 * inside[0].mean()
    cells = [
        np.histogram2d(*xy[i].T, bins=(6, 5), range=((60, 120), (40, 90)))[0]
        for xy, i in zip((everywhere, there), inside, strict=True)
    ]
    assert ((cells[1] > 0) == (cells[0] > 0)).all()  # no part of the window is missed
    beyond = draw(a, b, window=(-50.0, -40.0, -20.0, -10.0)).keypoints_a  # no surface is there, but for the border's
    assert not len(beyond) or (beyond < 12).all()


def test_edges_of_objects_give_no_points(tmp_path):
    world = World()
    a = write_view(tmp_path, "a", world, PINHOLE, LEFT)
    _, keypoints = depth_points(a, count=3000, generator=np.random.default_rng(0))
    around = keypoints[:, None] + np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
    depths = world.trace(PINHOLE, LEFT, around.reshape(-1, 2))[1].reshape(-1, 9)
    assert np.ptp(depths, axis=1).max() < 0.3  # the panel's edge is a step of more than 1.5 m
    assert (depths[:, 4] < 2.5).sum() > 100 and (depths[:, 4] > 3).sum() > 100  # of panel and wall


@pytest.mark.parametrize("depth_camera", [LARGE, DISTORTED])
def test_a_depth_camera_of_its_own(tmp_path, depth_camera):
    """Depth of a camera 12 cm beside: exact projections, and nothing that the panel hides from either image."""
    world = World()
    a, b = (
        write_view(tmp_path, name, world, PINHOLE, pose, depth_camera=depth_camera, color_from_depth=COLOR_FROM_DEPTH)
        for name, pose in (("a", LEFT), ("b", RIGHT))
    )
    found = draw(a, b)
    assert len(found.weight) > 200
    points, _ = world.trace(PINHOLE, LEFT, found.keypoints_a.astype(np.float64))
    np.testing.assert_allclose(found.keypoints_b, project(PINHOLE, RIGHT, points), atol=0.05)
    assert not world.blocks(RIGHT, points).any()
    points, keypoints = depth_points(a, count=9000, generator=np.random.default_rng(0))
    np.testing.assert_allclose(project(PINHOLE, LEFT, points), keypoints, atol=1e-6)
    pixel = 2 / 130  # metres on the panel; its edge is known to a pixel or so
    assert not world.blocks(LEFT, points, margin=1.3 * pixel).any()
    # Points of the wall that the depth camera sees past the panel, and the image does not: there are some to remove.
    depth_pose = COLOR_FROM_DEPTH.inverse() @ LEFT
    lifted, _ = world.trace(depth_camera, depth_pose, pixel_centers(depth_camera))
    assert world.blocks(LEFT, lifted, margin=1.3 * pixel).sum() > 100


def test_points_lie_on_the_surfaces(tmp_path):
    a = write_view(tmp_path, "a", World(panel=False), DISTORTED, LEFT)
    points, keypoints = depth_points(a, count=300, generator=np.random.default_rng(0))
    assert points.dtype == keypoints.dtype == np.float64 and len(points) == len(keypoints) == 300
    np.testing.assert_allclose(points[:, 2], 4 + 0.3 * points[:, 0], atol=1e-3)
    np.testing.assert_allclose(project(DISTORTED, LEFT, points), keypoints, atol=1e-6)


def test_disagreeing_depth_weighs_less_and_then_removes(tmp_path):
    world = World(panel=False)
    a = write_view(tmp_path, "a", world, PINHOLE, LEFT)
    b = write_view(tmp_path, "b", world, PINHOLE, RIGHT)
    depth = read_depth(b.depth.path)
    write_depth(b.depth.path, depth * 1.015)
    weight = draw(a, b).weight
    assert weight.min() > 0.36 and weight.max() < 1 and 0.4 < weight.mean() < 0.95
    write_depth(b.depth.path, depth * 1.1)
    assert len(draw(a, b).weight) == 0
    write_depth(b.depth.path, depth * 0)
    assert len(draw(a, b).weight) == 0
    with pytest.raises(ValueError, match=r"b\.depth\.png holds no smooth surface"):
        depth_points(b, count=5, generator=np.random.default_rng(0))


@pytest.mark.parametrize("registered", [True, False])
def test_keypoints_are_lifted_to_the_surface_they_show(tmp_path, registered):
    world = World(panel=False)
    own = {} if registered else {"depth_camera": LARGE, "color_from_depth": COLOR_FROM_DEPTH}
    a = write_view(tmp_path, "a", world, PINHOLE, LEFT, **own)
    keypoints = np.random.default_rng(0).uniform((20, 20), (140, 100), (200, 2))
    points, valid = lift_keypoints(a, keypoints)
    expected, _ = world.trace(PINHOLE, LEFT, keypoints)
    assert valid.mean() > 0.9
    np.testing.assert_allclose(points[valid], expected[valid], atol=0.03)  # depth is of the nearest pixel
    np.testing.assert_allclose(project(PINHOLE, LEFT, points), keypoints, atol=1e-6)


@pytest.mark.slow
def test_agreement_is_of_the_images_with_the_poses(tmp_path):
    world = World()
    a = write_view(tmp_path, "a", world, LARGE, LEFT)
    b = write_view(tmp_path, "b", world, LARGE, RIGHT)
    pair = Pair("a", "b", "room")
    errors, _ = match_agreement(Scene("room", {"a": a, "b": b}, (pair,)), pair)
    assert len(errors) > 50 and np.median(errors) < 0.5
    # A camera that looks one degree aside sees everything 3.5 px aside.
    turned = exp(torch.tensor([0, 0, 0, 0, np.deg2rad(1), 0], dtype=torch.float64)) @ RIGHT
    off, _ = match_agreement(Scene("room", {"a": a, "b": replace(b, cam_from_world=turned)}, (pair,)), pair)
    assert 3 < np.median(off) < 4.5
    Image.fromarray(np.full((180, 240), 90, np.uint8)).save(a.path)
    assert len(match_agreement(Scene("room", {"a": a, "b": b}, (pair,)), pair)[0]) == 0


def test_depth_is_read_in_metres_and_broken_files_are_named(tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(np.array([[0, 1, 1500], [65535, 65534, 7]], np.uint16)).save(path)
    depth = read_depth(path)
    assert depth.dtype == np.float32 and depth.shape == (2, 3)
    np.testing.assert_allclose(depth, [[0, 0.001, 1.5], [0, 65.534, 0.007]], rtol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"nothing\.png does not exist"):
        read_depth(tmp_path / "nothing.png")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_depth(tmp_path)
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png has 1 channels of 8 bits; expected a 16-bit PNG"):
        read_depth(tmp_path / "grey.png")
    write_depth(path, np.random.default_rng(0).uniform(0, 60, (50, 60)))
    content, depth = path.read_bytes(), read_depth(path)
    path.write_bytes(content[:-12])  # without the mark of the end all depths are there
    np.testing.assert_array_equal(read_depth(path), depth)
    noise = np.random.default_rng(0).bytes(500)
    for broken in (b"", content[:20], content[: len(content) // 2], noise, content[:33] + noise + content[-12:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"depth\.png \({len(broken)} bytes\) cannot be read"):
            read_depth(path)


def test_what_is_missing_is_said(tmp_path):
    a = write_view(tmp_path, "a", World(), PINHOLE, LEFT)
    for lacking, word in (("depth", "depth map"), ("camera", "camera"), ("cam_from_world", "pose")):
        with pytest.raises(ValueError, match=f"a has no {word}"):
            draw(a, replace(a, **{lacking: None}))
    with pytest.raises(ValueError, match=r"a\.depth\.png is 160×120 pixels, its camera says 240×180"):
        draw(a, replace(a, camera=LARGE))
