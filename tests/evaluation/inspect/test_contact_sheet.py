from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from gnnet.evaluation.inspect.contact_sheet import Row, choose_pairs, contact_sheet, draw_dataset
from gnnet.evaluation.inspect.inspection import inspect_scene
from gnnet.evaluation.report import style
from gnnet.evaluation.report.cameras import ground_axes, top_view
from gnnet.geometry.pose import Pose, so3_exp
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import Pair, Scene, SceneImage


def read(path: Path) -> np.ndarray:
    assert path.stat().st_size <= style.MAX_BYTES
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_correspondences_have_the_colour_of_their_place_in_the_left_image():
    grey = np.full((60, 80), 128, np.uint8)
    a, b = np.array([[10.0, 30], [70, 30]]), np.array([[70.0, 30], [10, 30]])  # left and right change places
    row = Row("day ↔ night", "a ↔ b", (grey, grey), (a, b), np.array([1.0, 0.5]))
    figure = contact_sheet([row, row])
    axes, patches = figure.axes[:2]
    lines, in_a, in_b = axes.collections
    np.testing.assert_allclose(in_a.get_offsets(), a)
    beside = b + np.array([1.02 * 80, 0])  # b stands beside a, as high
    np.testing.assert_allclose(in_b.get_offsets(), beside)
    np.testing.assert_allclose(lines.get_segments(), np.stack([a, beside], 1))
    blue, red = to_rgb(style.BLUE), to_rgb(style.VERMILLION)
    for artist in (lines.get_colors(), in_a.get_facecolors(), in_b.get_facecolors()):
        np.testing.assert_allclose(artist[:, :3], [blue, red], atol=1e-6)
    assert lines.get_colors()[0, 3] == 1 and lines.get_colors()[1, 3] < 0.7  # of half the weight, and fainter
    assert axes.get_title(loc="left") == "day ↔ night\na ↔ b" and len(patches.images) == 4


def test_patches_are_cut_around_the_correspondences():
    images = [np.zeros((320, 320), np.uint8) for _ in range(2)]
    images[0][100:, 200:], images[1][50:, 30:] = 255, 255  # the same corner at (200, 100) and (30, 50)
    row = Row("", "", tuple(images), (np.array([[200.0, 100]]), np.array([[30.0, 50]])), np.ones(1))
    patches = contact_sheet([row]).axes[1]
    assert [image.get_extent() for image in patches.images] == [[0, 1, 1, 0], [1, 2, 1, 0]]
    for image in patches.images:
        patch = image.get_array()
        assert patch.shape == (68, 68)
        assert (patch[38:60, 44:66] > 240).all() and (patch[2:24, 2:24] < 15).all() and (patch[2:24, 44:66] < 15).all()
    np.testing.assert_allclose(patches.collections[0].get_offsets(), [[0.5, 0.5], [1.5, 0.5]])


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
    names = [f"_c$x_{i}$" for i in range(conditions)]
    images = {name: SceneImage(name, Path("x"), name, "p", cam_from_world=pose) for name in names}
    figure = top_view(Scene("s", images, ()))
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == ({f" _c\\$x_{i}\\$" for i in range(conditions)} if conditions > 1 else {"place p"})
    style.save(figure, tmp_path / "top.png")
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
