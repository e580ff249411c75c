"""Detections of local features."""

from __future__ import annotations

import kornia.feature
import numpy as np
import pytest
import torch

from gnnet.localization import local_features
from gnnet.localization.local_features import LocalFeatures


def test_sift_comes_strongest_first_and_not_more_than_asked():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 120, 160), dtype=np.uint8))
    many, few = LocalFeatures("sift", 200).detect(image), LocalFeatures("sift", 20).detect(image)
    assert len(few.keypoints) == 20 and torch.equal(few.keypoints, many.keypoints[:20])
    torch.testing.assert_close(many.descriptors.norm(dim=-1), torch.ones(len(many.descriptors)))


def test_disk_gives_colmap_pixels_strongest_first(monkeypatch):
    torch.manual_seed(0)
    network = kornia.feature.DISK().eval()  # random: its weights are not at hand everywhere
    monkeypatch.setattr(local_features, "_load_disk", lambda: network)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 96, 130), dtype=np.uint8))  # not of 16
    found = LocalFeatures("disk", 50).detect(image)
    assert found.descriptors.shape == (len(found.keypoints), LocalFeatures("disk").channels)
    assert 0 < len(found.keypoints) <= 50
    # Whole cells of kornia's, whose first centre is (0, 0): here halves.
    assert (found.keypoints % 1 == 0.5).all()
    assert (found.keypoints > 0).all() and (found.keypoints < torch.tensor([130.0, 96.0])).all()
    with torch.no_grad():
        raw = network(image[None].float() / 255, n=50, pad_if_not_divisible=True)[0]
    best = raw.keypoints[raw.detection_scores.argmax()] + 0.5
    assert torch.equal(found.keypoints[0], best)


def test_weights_that_cannot_be_fetched_are_said(monkeypatch):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(kornia.feature.DISK, "from_pretrained", fail)
    local_features._load_disk.cache_clear()
    with pytest.raises(ConnectionError, match="DISK could not be fetched"):
        LocalFeatures("disk").detect(torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="superpoint"):
        LocalFeatures("superpoint")
