from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.evaluation.inspect.contact_sheet import Row, choose_pairs, contact_sheet, draw_dataset, ground_axes, top_view
from gnnet.evaluation.inspect.inspection import inspect_scene
from gnnet.evaluation.report import pictures as drawing
from gnnet.geometry.pose import Pose, so3_exp
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import Pair, Scene, SceneImage

BLUE, VERMILLION = (0, 114, 178), (213, 94, 0)


def read(path: Path) -> np.ndarray:
    assert path.stat().st_size <= drawing.MAX_BYTES
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns (N, 2) of the pixels of a colour, but for rounding."""
    return np.argwhere((np.abs(pixels - np.array(colour)) <= 12).all(-1))


def test_correspondences_have_the_colour_of_their_place_in_the_left_image(tmp_path):
    grey = np.full((60, 80), 128, np.uint8)
    a, b = np.array([[10.0, 30], [70, 30]]), np.array([[70.0, 30], [10, 30]])  # left and right change places
    row = Row("day ↔ night", "a ↔ b", (grey, grey), (a, b), np.ones(2))
    drawing.save(contact_sheet([row]), tmp_path / "sheet.png")
    pixels = read(tmp_path / "sheet.png")
    # An image is shown 350 pixels wide; below a heading of 36 lies a at x = 4, and b 4 pixels beside it.
    blue, red = near(pixels[36:298, :708], BLUE)[:, 1], near(pixels[36:298, :708], VERMILLION)[:, 1]
    left, right = 350 * 10 / 80, 350 * 70 / 80
    assert (blue.min(), blue.max()) == pytest.approx((4 + left, 358 + right), abs=4)
    assert (red.min(), red.max()) == pytest.approx((4 + right, 358 + left), abs=4)


def test_patches_are_cut_around_the_correspondences(tmp_path):
    images = [np.zeros((320, 320), np.uint8) for _ in range(2)]
    images[0][100:, 200:], images[1][50:, 30:] = 255, 255  # the same corner at (200, 100) and (30, 50)
    row = Row("", "", tuple(images), (np.array([[200.0, 100]]), np.array([[30.0, 50]])), np.ones(1))
    drawing.save(contact_sheet([row]), tmp_path / "sheet.png")
    pixels = read(tmp_path / "sheet.png")[..., 0]
    left = 4 + 304 + 304 + 4  # both images are 300 pixels wide
    for patch in (pixels[36:104, left : left + 68], pixels[36:104, left + 69 : left + 137]):
        assert (patch[38:60, 44:66] > 240).all() and (patch[2:24, 2:24] < 15).all() and (patch[2:24, 44:66] < 15).all()


def test_pairs_cover_all_pairs_of_conditions():
    conditions = ["day"] * 20 + ["night", "snow", "snow"]
    images = {str(i): SceneImage(str(i), Path("x"), c, "p") for i, c in enumerate(conditions)}
    names = [(str(i), str(i + 1)) for i in range(19)] + [("20", "0"), ("0", "21"), ("22", "1")]
    pairs = [Pair(a, b, "p") for a, b in names]
    chosen = choose_pairs(Scene("s", images, tuple(pairs)), 6)
    kinds = ["".join(sorted(images[n].condition[0] for n in (p.image_a, p.image_b))) for p in chosen]
    assert sorted(kinds) == ["dd", "dd", "dd", "dn", "ds", "ds"] and len(set(map(str, chosen))) == 6
    assert len(choose_pairs(Scene("s", images, tuple(pairs)), 100)) == len(pairs)
    assert choose_pairs(Scene("s", images, ()), 5) == []


def test_the_ground_is_below_the_cameras_whatever_the_worlds_axes():
    world = so3_exp(torch.tensor([0.3, -1.1, 0.7], dtype=torch.float64)).numpy()
    angle = np.linspace(0, 5, 12)
    # Cameras on an ellipse look outwards; the world's up is -y of the cameras, before `world` turns it.
    forward = np.stack([np.cos(angle), np.zeros(12), np.sin(angle)], 1)
    down = np.broadcast_to([0.0, 1, 0], forward.shape)
    rotations = np.stack([np.cross(down, forward), down, forward], 1) @ world.T
    centers = (forward * [1, 1, 5]) @ world.T
    axes = ground_axes(rotations, centers)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(axes @ world @ [0, 1, 0], 0, atol=1e-9)
    assert np.ptp(centers @ axes[0]) > 2 * np.ptp(centers @ axes[1])
    still = ground_axes(rotations, np.zeros((12, 3)))  # all in one spot
    np.testing.assert_allclose(still @ still.T, np.eye(2), atol=1e-9)


@pytest.mark.parametrize("conditions", [1, 3, 12])
def test_top_view_of_many_conditions_and_single_cameras(conditions, tmp_path):
    pose = Pose.identity(dtype=torch.float64)
    images = {str(i): SceneImage(str(i), Path("x"), f"c{i}", "p", cam_from_world=pose) for i in range(conditions)}
    drawing.save(top_view(Scene("s", images, ())), tmp_path / "top.png")
    assert read(tmp_path / "top.png").std() > 5


@pytest.mark.slow
def test_all_pictures_of_a_dataset(toy_root, tmp_path):
    scene = load_robotcar(toy_root, progress=False)
    found = inspect_scene(scene, pairs=10, images=4, progress=False)
    written = draw_dataset(scene, found, tmp_path, pairs=5, progress=False)
    assert [p.name for p in written] == ["pairs-1.png", "pairs-2.png", "correspondences.png", "cameras.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        assert read(path).std() > 5


def test_pairs_that_cannot_be_read_are_left_out(toy_root, tmp_path):
    scene = load_robotcar(toy_root, progress=False)
    images = {name: SceneImage(name, Path("nowhere"), i.condition, i.place) for name, i in scene.images.items()}
    broken = Scene("broken", images, scene.pairs[:3])
    found = inspect_scene(broken, progress=False)
    assert draw_dataset(broken, found, tmp_path, progress=False) == [] and not found.training.yes
