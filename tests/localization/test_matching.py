"""Matching of descriptors in maps, and SIFT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gnnet.data.sift import SiftFeatures, detect_sift, match_sift, strongest_spread
from gnnet.localization import matching
from gnnet.localization.matching import Matcher, search_coarse_to_fine
from gnnet.localization.refinement import sample_descriptors
from gnnet.models.pyramid import FeaturePyramid


def smooth_maps(batch=2, size=64, seed=0):
    """A pyramid at strides 8 and 2 of random smooth maps."""
    noise = torch.randn(batch, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(noise, size=(size // 2, size // 2), mode="bicubic")
    return FeaturePyramid((torch.nn.functional.avg_pool2d(fine, 4), fine), (8, 2))


def test_finer_levels_choose_between_coarse_candidates():
    """The coarse map likes a wrong cell a little better; with one candidate that is final."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(1, 8, 6, 6, generator=generator), torch.randn(1, 8, 24, 24, generator=generator)
    descriptor = torch.randn(8, generator=generator)
    coarse[0, :, 1, 1] = descriptor  # exact, but the fine map has nothing there
    coarse[0, :, 4, 3] = descriptor + 0.01
    fine_descriptor = fine[0, :, 18, 13].clone()
    descriptors = (descriptor.view(1, 1, 8), fine_descriptor.view(1, 1, 8))
    pyramid = FeaturePyramid((coarse, fine), (8, 2))
    truth = torch.tensor([[[27.0, 37.0]]])
    assert not torch.equal(search_coarse_to_fine(descriptors, pyramid).keypoints, truth)
    found = search_coarse_to_fine(descriptors, pyramid, candidates=2)
    torch.testing.assert_close(found.keypoints, truth)
    torch.testing.assert_close(found.similarity, torch.tensor([[-8 * 0.01**2]]), atol=1e-5, rtol=0)
    assert found.kept.all()
    # The other candidate's distance is that of the nearest fine cell around the wrong coarse one.
    least = (fine[0] - fine_descriptor[:, None, None]).square().sum(0)[2:11, 2:11].min()
    for share, kept in ((1.01, True), (0.99, False)):
        ratio = share * (8 * 0.01**2 / least).sqrt().item()
        assert search_coarse_to_fine(descriptors, pyramid, candidates=2, ratio=ratio).kept.all() == kept
    assert search_coarse_to_fine(descriptors, pyramid, ratio=1e-6).kept.all()  # nothing to compare with


@pytest.mark.parametrize("candidates", [1, 4, 1000])
def test_chunks_do_not_change_the_matches(candidates):
    pyramid = smooth_maps()
    xy = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(1)) * 48 + 8
    descriptors, _ = sample_descriptors(pyramid, xy)
    settings = {"candidates": candidates, "subpixel": True, "ratio": 0.9}
    few = search_coarse_to_fine(descriptors, pyramid, **settings, values_at_once=1)
    many = search_coarse_to_fine(descriptors, pyramid, **settings)
    torch.testing.assert_close(few, many)
    assert many.keypoints.isfinite().all()


@pytest.mark.parametrize("whole", [True, False])
def test_the_nearest_cell_of_a_window_is_found(monkeypatch, whole):
    """Whether the map is compared as a whole or its windows are read, at the border too, as by one cell at a time."""
    monkeypatch.setattr(matching, "COMPARED_PER_READ", 100 if whole else 0)
    generator = torch.Generator().manual_seed(0)
    features, descriptors = torch.randn(2, 5, 9, 12, generator=generator), torch.randn(2, 7, 5, generator=generator)
    at = torch.rand(2, 7, 3, 2, generator=generator) * torch.tensor([12.0, 9.0])
    found, distance = matching._best_in_window(descriptors, features, at, 2)
    for b, n, k in np.ndindex(2, 7, 3):
        x, y = at[b, n, k].floor().int().tolist()
        window = [(i, j) for j in range(y - 2, y + 3) for i in range(x - 2, x + 3) if 0 <= i < 12 and 0 <= j < 9]
        distances = torch.stack([(features[b, :, j, i] - descriptors[b, n]).square().sum() for i, j in window])
        expected = torch.tensor(window[int(distances.argmin())]) + 0.5
        torch.testing.assert_close(found[b, n, k], expected)
        torch.testing.assert_close(distance[b, n, k], distances.min())


@pytest.mark.parametrize("dense", [True, False])
def test_the_host_does_not_wait_for_a_device(dense, no_host_numbers):
    pyramid = smooth_maps()
    keypoints = torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(1)) * 48 + 8
    with no_host_numbers:
        Matcher(dense=dense).match(pyramid, keypoints, pyramid)


def test_subpixel_peaks_are_nearer_than_cells():
    pyramid = smooth_maps()
    xy = torch.rand(2, 200, 2, generator=torch.Generator().manual_seed(1)) * 46 + 9
    descriptors, _ = sample_descriptors(pyramid, xy)
    cells = search_coarse_to_fine(descriptors, pyramid, candidates=4).keypoints
    peaks = search_coarse_to_fine(descriptors, pyramid, candidates=4, subpixel=True).keypoints
    error_cells, error_peaks = ((found - xy).norm(dim=-1).median() for found in (cells, peaks))
    assert error_peaks < 0.05 * error_cells
    assert (peaks - cells).abs().max() <= 1.5 + 1e-5  # 0.75 cells of the finest map


@pytest.mark.parametrize("dense", [True, False])
def test_one_image_serves_many_and_the_mutual_check_drops_what_is_not_there(dense):
    a, other = smooth_maps(), smooth_maps(batch=1, seed=5)
    first = FeaturePyramid(tuple(m[:1] for m in a.maps), a.strides)
    xy = torch.rand(2, 100, 2, generator=torch.Generator().manual_seed(2)) * 46 + 9
    matches = Matcher(dense=dense).match(a, xy, first)
    assert matches.kept[0].float().mean() > 0.95
    assert (matches.keypoints - xy)[0].norm(dim=-1).median() < 0.5
    assert matches.kept[1].float().mean() < 0.2
    unchecked = Matcher(dense=dense, mutual=None)
    assert unchecked.match(a, xy, other).kept.all()
    assert replace(unchecked, ratio=0.5).match(a, xy, other).kept.float().mean() < 0.2
    outside = torch.full((2, 1, 2), 1.0)  # descriptors need four cells of the map
    assert not unchecked.match(a, outside, first).kept.any()


def test_matcher_settings_are_checked():
    with pytest.raises(ValueError, match="0 candidates"):
        Matcher(candidates=0)


def blobs(*centers, size=(96, 128), sigma=3.0):
    """A grey image (3, H, W) with dark Gaussian blobs at pixels (x, y), first centre at 0.5."""
    y, x = torch.meshgrid(*(torch.arange(s) + 0.5 for s in size), indexing="ij")
    image = torch.full(size, 200.0)
    for cx, cy in centers:
        image -= 150 * torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))
    return image.round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)


def test_sift_keypoints_are_colmap_pixels():
    found = detect_sift(blobs((40.25, 30.5), (90.5, 60.75)))
    for center in ((40.25, 30.5), (90.5, 60.75)):
        distance = (found.keypoints - torch.tensor(center)).norm(dim=1)
        assert distance.min() < 0.1
        assert found.scale[distance.argmin()] == pytest.approx(3.0, rel=0.2)
    torch.testing.assert_close(found.descriptors.norm(dim=1), torch.ones(len(found.keypoints)))
    assert (found.descriptors >= 0).all()


def test_sift_of_an_empty_image_and_bad_images():
    nothing = detect_sift(torch.zeros(3, 40, 50, dtype=torch.uint8))
    assert [tuple(t.shape) for t in nothing] == [(0, 2), (0, 128), (0,), (0,)]
    assert len(strongest_spread(nothing, 10)) == 0
    assert detect_sift(torch.zeros(3, 2, 3, dtype=torch.uint8)).keypoints.shape == (0, 2)
    with pytest.raises(ValueError, match=r"\(1, 40, 50\)"):
        detect_sift(torch.zeros(1, 40, 50, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        detect_sift(torch.zeros(3, 40, 50))


def test_strongest_spread_takes_each_square_in_turn():
    xy = torch.tensor([[1.0, 1], [2, 2], [2, 2], [3, 3], [70, 1], [1, 70], [71, 1]])
    strength = torch.tensor([0.5, 0.9, 0.9, 0.7, 0.2, 0.3, 0.1])
    features = SiftFeatures(xy, torch.zeros(7, 128), torch.ones(7), strength)
    expected = torch.tensor([[2.0, 2], [1, 70], [70, 1], [3, 3], [71, 1], [1, 1]])
    for count in (0, 1, 3, 5, 6, 10):
        torch.testing.assert_close(strongest_spread(features, count), expected[:count])


def test_sift_matches_against_plain_numpy():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.rand(n, 16, generator=generator), dim=1) for n in (40, 60))
    b[:20] = torch.nn.functional.normalize(a[:20] + 0.02 * torch.randn(20, 16, generator=generator), dim=1)
    distance = np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=-1)
    order = np.sort(distance, 1)
    lowe, mutual = order[:, 0] < 0.8 * order[:, 1], distance.argmin(0)[distance.argmin(1)] == np.arange(40)
    xy = 100 * torch.rand(60, 2, generator=generator)
    for values_at_once in (1, 1 << 20):
        found = match_sift(a, b, xy, values_at_once=values_at_once)
        assert torch.equal(found.keypoints, xy[distance.argmin(1)])
        np.testing.assert_allclose((2 - 2 * found.similarity).sqrt().numpy(), distance.min(1), atol=1e-3)
        assert (found.kept.numpy() == (lowe & mutual)).all()
    assert match_sift(a, b, xy, ratio=1, mutual=False).kept.all()
    nothing = match_sift(a, b[:0], xy[:0])
    assert not nothing.kept.any() and nothing.keypoints.isinf().all() and nothing.similarity.isinf().all()
    assert match_sift(a[:0], b, xy).keypoints.shape == (0, 2)
    assert match_sift(a, b[:1], xy[:1]).kept.sum() == 1


@pytest.mark.parametrize("dense", [True, False])
def test_fine_levels_of_little_weight_do_not_choose_between_places(dense):
    """The coarse level prefers the first place by little, the fine one the second by much."""
    coarse, fine = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 16, 16)
    coarse[0, 0, 2, 2], coarse[0, 0, 6, 6], fine[0, 0, 12, 12] = 1.0, 0.8, 1.0
    pyramid = FeaturePyramid((coarse, fine), (8, 4))
    wanted = torch.tensor([[[1.0, 0.0]]])
    for weight, place in ((1.0, 50.0), (0.01, 20.0)):
        matcher = Matcher(dense=dense, subpixel=False, mutual=None, fine_weight=weight)
        found = matcher.search((wanted, wanted), pyramid).keypoints
        assert (found - place).abs().max() <= 8
