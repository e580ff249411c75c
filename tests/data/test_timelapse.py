"""Where the images of a fixed camera have structure that lasts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from gnnet.data.correspondences import PairPoints
from gnnet.data.timelapse import PlaceStructure, evenly_spread, fixed_camera_correspondences, lasting_structure
from gnnet.scenes.layouts.timelapse import load_timelapse


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """Eight pictures: houses that stay below, clouds that go above, bare wall at the right."""
    root = tmp_path_factory.mktemp("timelapse")
    generator = np.random.default_rng(0)
    houses = np.kron(generator.uniform(0, 255, (12, 24)), np.ones((10, 10)))  # 120 × 240
    (root / "town").mkdir()
    for number in range(8):
        clouds = gaussian_filter(generator.normal(0, 1, (120, 320)), 3)
        clouds = 128 + 60 * clouds / clouds.std()
        picture = np.full((240, 320), 120.0)
        picture[:120] = clouds.clip(0, 255)
        picture[120:, :240] = houses * generator.uniform(0.5, 1.0)
        Image.fromarray(picture.astype(np.uint8)).convert("RGB").save(root / "town" / f"{number}.png")
    return load_timelapse(root, max_shift=1000, progress=False)


def test_what_stays_counts_and_what_changes_does_not(town):
    structure = PlaceStructure(town)("town")
    houses = structure[130:230, 10:230].mean()
    assert structure.shape == (240, 320) and structure.max() <= 1
    assert structure[5:115].mean() < 0.35 * houses
    assert structure[130:, 260:].mean() < 0.02
    single = lasting_structure([town.images["town/0.png"].path])
    assert single[5:115].mean() > 0.8 * single[130:230, 10:230].mean()


def test_correspondences_are_even_weighted_and_the_pixel_itself(town):
    matches = PairPoints(town, town.pairs[0], structure=PlaceStructure(town)).draw(1000, np.random.default_rng(0))
    assert np.array_equal(matches.keypoints_a, matches.keypoints_b)
    assert not ((matches.keypoints_a > (262, 124)).all(1)).any()  # none on the wall
    below = matches.keypoints_a[:, 1] > 120
    assert matches.weight[below].mean() > 1.5 * matches.weight[~below].mean()
    houses = matches.keypoints_a[below]
    cells = np.histogram2d(houses[:, 0], houses[:, 1], bins=(6, 3), range=((0, 240), (120, 240)))[0]
    assert cells.min() > 0.4 * cells.mean()


def test_a_window_gets_all_the_points():
    window = (40.0, 30.0, 90.0, 80.0)
    generator = np.random.default_rng(0)
    found = fixed_camera_correspondences((200, 100), np.ones((1, 1)), count=400, generator=generator, window=window)
    assert len(found.weight) == 400
    counts = np.histogram2d(*found.keypoints_a.T, bins=5, range=((40, 90), (30, 80)))[0]
    assert (counts == 16).all()


def test_structure_of_any_resolution_is_read_at_the_right_place():
    structure = np.zeros((10, 10), np.float32)
    structure[:, 5:] = 1
    matches = fixed_camera_correspondences((200, 100), structure, count=2000, generator=np.random.default_rng(0))
    assert matches.keypoints_a[:, 0].min() > 85
    assert matches.weight[matches.keypoints_a[:, 0] > 111].min() == 1


@pytest.mark.parametrize(("width", "height", "count"), [(640, 480, 1000), (33, 500, 40), (10, 10, 1)])
def test_points_spread_evenly(width, height, count):
    xy = evenly_spread(width, height, count, np.random.default_rng(0))
    assert ((xy >= 0) & (xy <= (width, height))).all()
    assert 0.5 * count <= len(xy) <= 1.6 * count + 1
