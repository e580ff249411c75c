"""Homographies, and the keypoints that move with their image."""

from __future__ import annotations

import numpy as np
import torch

from gnnet.data.warps import cut_image, map_points, random_crop, random_homography


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
