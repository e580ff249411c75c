"""Image reading and the transforms that move keypoints with their image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.io import write_jpeg

from gnnet.data.transforms import crop_around, limit_size, photometric_jitter, read_image


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


def test_crop_holds_the_anchor_and_moves_keypoints():
    image = torch.arange(50 * 70, dtype=torch.int32).reshape(1, 50, 70).expand(3, -1, -1)
    keypoints = np.array([[0.5, 0.5], [69.5, 49.5], [35.5, 20.5], [70.0, 50.0]])
    corners = set()
    for anchor in range(4):
        for seed in range(30):
            cut, moved = crop_around(image, keypoints, anchor, 32, np.random.default_rng(seed))
            assert cut.shape == (3, 32, 32)
            assert (moved[anchor] >= 0).all() and (moved[anchor] <= 32).all()
            if anchor != 3:
                x, y = np.floor(moved[anchor]).astype(int)
                expected = int(keypoints[anchor, 1]) * 70 + int(keypoints[anchor, 0])
                assert cut[0, y, x] == expected
            if anchor == 2:
                corners.add(tuple(keypoints[anchor] - moved[anchor]))
    assert len(corners) > 10


def test_crop_of_a_small_image_keeps_it():
    image = torch.zeros(3, 20, 90, dtype=torch.uint8)
    cut, moved = crop_around(image, np.array([[80.0, 10.0]]), 0, 32, np.random.default_rng(0))
    assert cut.shape == (3, 20, 32)
    assert moved[0, 1] == 10.0


def test_jitter_is_seeded_per_image_and_off_at_zero():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    off = photometric_jitter(images, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(off, images.float() / 255, atol=2e-4, rtol=0)
    one, same, other = (
        photometric_jitter(images, 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.min() >= 0 and one.max() <= 1
    twins = photometric_jitter(images[:1].expand(2, -1, -1, -1), 1.0, torch.Generator().manual_seed(0))
    assert (twins[0] - twins[1]).abs().mean() > 0.02
