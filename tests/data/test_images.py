"""Image reading and the transforms that move keypoints with their image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import write_jpeg

from gnnet.data.images import (
    cut_image,
    even_subset,
    limit_size,
    map_points,
    random_crop,
    random_homography,
    read_image,
)


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
    whole = tmp_path / "whole.jpg"
    write_jpeg(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), str(whole))
    assert read_image(whole).shape == (3, 64, 64)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        read_image(tmp_path / "cut.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg cannot be read"):
        read_image(tmp_path / "text.jpg")


def test_resized_image_and_keypoints_stay_together():
    # A bright square of 8 pixels; its centre of mass must be at the scaled keypoint.
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    image[:, 40:48, 60:68] = 255
    small, factors = limit_size(image, 60)
    assert small.shape == (3, 45, 60)
    weight = small[0].double()
    ys, xs = torch.meshgrid(torch.arange(45) + 0.5, torch.arange(60) + 0.5, indexing="ij")
    center = torch.stack([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()
    np.testing.assert_allclose(center, np.array([64.0, 44.0]) * factors, atol=0.02)
    same, factors = limit_size(image, 120)
    assert same is image and (factors == 1).all()


def test_crop_holds_the_anchor_and_cuts_whole_pixels():
    image = torch.arange(50 * 70, dtype=torch.int32).reshape(1, 50, 70).expand(3, -1, -1)
    anchors = np.array([[0.5, 0.5], [69.5, 49.5], [35.5, 20.5], [70.0, 50.0]])
    corners = set()
    for number, anchor in enumerate(anchors):
        for seed in range(30):
            cut = random_crop((70, 50), anchor, 32, np.random.default_rng(seed))
            part, moved = cut_image(image, cut, 32), map_points(np.linalg.inv(cut), anchor[None])[0]
            assert part.shape == (3, 32, 32)
            assert (moved >= 0).all() and (moved <= 32).all()
            if number != 3:
                x, y = np.floor(moved).astype(int)
                assert part[0, y, x] == int(anchor[1]) * 70 + int(anchor[0])
            if number == 2:
                corners.add(tuple(cut[:2, 2]))
    assert len(corners) > 10


def test_crop_of_a_small_image_keeps_it():
    cut = random_crop((90, 20), np.array([80.0, 10.0]), 32, np.random.default_rng(0))
    assert cut_image(torch.zeros(3, 20, 90, dtype=torch.uint8), cut, 32).shape == (3, 20, 32)
    assert cut[1, 2] == 0


def test_content_and_keypoints_go_through_one_homography():
    """Small blobs of an image are found at their mapped places in the warped square."""
    ys, xs = np.mgrid[0:180, 0:240] + 0.5
    blobs = np.array([[x + 0.3 * y, y] for x in (40.2, 90.4, 140.9) for y in (40.6, 80.1, 120.3)])
    image = sum(255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * 2.0**2)) for x, y in blobs)
    image = torch.from_numpy(image).clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    rows, columns = np.mgrid[0:128, 0:128] + 0.5
    errors = []
    for seed in range(20):
        warp = random_homography((240, 180), np.array([120.0, 90.0]), 128, 1.0, np.random.default_rng(seed))
        square = cut_image(image, warp, 128)[0].double().numpy()
        for xy in map_points(np.linalg.inv(warp), blobs):
            near = (columns - xy[0]) ** 2 + (rows - xy[1]) ** 2 < 8**2
            if (xy > 10).all() and (xy < 118).all():
                weight = square * near
                center = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
                errors.append(np.linalg.norm(center - xy))
    assert len(errors) > 80
    assert np.median(errors) < 0.1 and max(errors) < 0.4  # a tilt moves a blob's centre of mass a little


def test_homographies_differ_and_keep_the_anchor_near():
    warps = [
        random_homography((640, 480), np.array([320.0, 240.0]), 256, 0.5, np.random.default_rng(s)) for s in range(50)
    ]
    moved = np.stack([map_points(np.linalg.inv(w), np.array([[320.0, 240.0]]))[0] for w in warps])
    assert ((moved > 0) & (moved < 256)).all()
    assert moved.std(0).min() > 10
    assert np.std([np.arctan2(w[1, 0], w[0, 0]) for w in warps]) > np.radians(5)


def test_black_lies_outside_the_image():
    image = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    far = np.array([[0.999, 0, -30.0], [0, 1.001, -30.0], [0, 0, 1.0]])
    square = cut_image(image, far, 48)
    assert not square[:, :28, :28].any() and (square[:, 33:, 33:] == 200).all()


def test_even_subset_is_even_without_repeats():
    generator = np.random.default_rng(0)
    dense = generator.uniform((0, 0), (20, 20), (5000, 2))
    sparse = generator.uniform((0, 0), (200, 200), (500, 2))
    xy = np.concatenate([dense, sparse])
    chosen = even_subset(xy, (200, 200), 200, generator)
    assert len(set(chosen.tolist())) == 200
    assert (chosen < 5000).mean() < 0.1  # 1 % of the area, 91 % of the points
    preference = np.ones(len(xy))
    preference[5000::2] = 0.01
    preferred = even_subset(xy, (200, 200), 200, generator, preference=preference)
    assert (preference[preferred[preferred >= 5000]] == 1).mean() > 0.6
    assert even_subset(xy[:7], (200, 200), 10, generator).tolist() == list(range(7))


def test_a_damaged_png_is_an_error_that_names_the_file_not_a_crash(tmp_path):
    path, generator = tmp_path / "damaged.png", np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for _ in range(40):
        content = bytearray(whole)
        content[generator.integers(60, len(whole) - 30)] ^= 1 << generator.integers(0, 8)
        path.write_bytes(content)
        try:
            assert read_image(path).shape == (3, 60, 80)
        except ValueError as error:
            assert "damaged.png" in str(error)
    path.write_bytes(whole)
    assert (read_image(path).permute(1, 2, 0).numpy() == np.asarray(Image.open(path))).all()
