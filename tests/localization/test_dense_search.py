"""Dense search in all cells against a plain loop, and the mutual check of observations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gnnet.localization.dense_search import best_cells, values_for
from gnnet.localization.map import Observations
from gnnet.localization.matching import DENSE_STRIDE, Matcher, search_dense
from gnnet.localization.refinement import sample_descriptors
from gnnet.models.pyramid import FeaturePyramid

CHANNELS = {16: 6, 8: 5, 4: 7, 2: 4, 1: 3}


def pyramid(strides, size, *, batch=1, seed=0) -> FeaturePyramid:
    """Random maps of unit length as a network gives them: ceil(side / stride) cells, channels last."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for stride in strides:
        shape = (batch, CHANNELS[stride], *(-(-side // stride) for side in size))
        features = F.normalize(torch.randn(shape, generator=generator), dim=1)
        maps.append(features.contiguous(memory_format=torch.channels_last))
    return FeaturePyramid(tuple(maps), tuple(strides))


def interpolate(features: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear value of a map (C, H, W) at level pixels, the border going on beyond the outer centres."""
    _, height, width = features.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    fx, fy = x - left, y - top
    upper = (1 - fx) * features[:, top, left] + fx * features[:, top, right]
    lower = (1 - fx) * features[:, bottom, left] + fx * features[:, bottom, right]
    return (1 - fy) * upper + fy * lower


def search_by_loops(descriptors, maps: FeaturePyramid, image: int, row: int, *, ratio: float, rank: float):
    """Keypoint (2,), similarity and whether distinct, of one descriptor."""
    levels = [m[image].double().numpy() for m in maps.maps]
    own = [d[image, row].double().numpy() for d in descriptors]
    stride = max(4, maps.strides[-1])
    height, width = (side * maps.strides[-1] // stride for side in levels[-1].shape[-2:])
    similarities = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            for features, descriptor, s in zip(levels, own, maps.strides, strict=True):
                cell = interpolate(features, (j + 0.5) * stride / s, (i + 0.5) * stride / s)
                similarities[i, j] += descriptor @ descriptor - ((cell - descriptor) ** 2).sum() / 2
    best_y, best_x = np.unravel_index(similarities.argmax(), similarities.shape)
    ordered = np.sort(similarities.ravel())[::-1]
    at_rank = ordered[max(2, round(rank * ordered.size)) - 1]
    distinct = ratio >= 1 or (ordered[0] > 0 and at_rank <= ratio * ordered[0])
    x, y = (best_x + 0.5) * stride, (best_y + 0.5) * stride
    for features, descriptor, s in zip(levels, own, maps.strides, strict=True):
        if s >= stride:
            continue
        radius, cells = max(1, round(stride / s)), []
        for i in range(int(y / s) - radius, int(y / s) + radius + 1):
            for j in range(int(x / s) - radius, int(x / s) + radius + 1):
                if 0 <= i < features.shape[1] and 0 <= j < features.shape[2]:
                    cells.append((((features[:, i, j] - descriptor) ** 2).sum(), (j + 0.5) * s, (i + 0.5) * s))
        _, x, y = min(cells)
        stride = s
    return (x, y), ordered[0], distinct


@pytest.mark.parametrize("strides", [(8, 2), (16, 8, 4), (8, 4, 2, 1), (8,), (4,), (2, 1), (16, 8)])
@pytest.mark.parametrize("size", [(48, 64), (45, 61), (50, 33)])
@pytest.mark.slow
def test_it_finds_what_a_loop_finds(strides, size):
    query = pyramid(strides, size, batch=2)
    generator = torch.Generator().manual_seed(1)
    descriptors = tuple(F.normalize(torch.randn(2, 6, m.shape[1], generator=generator), dim=-1) for m in query.maps)
    # Some of them are of the query itself: their similarity is high above the others'.
    xy = torch.rand(2, 3, 2, generator=generator) * torch.tensor([size[1] - 20.0, size[0] - 20.0]) + 10
    own, _ = sample_descriptors(query, xy)
    descriptors = tuple(torch.cat([a[:, :3], b], 1) for a, b in zip(descriptors, own, strict=True))
    for ratio, rank in ((1.0, 0.006), (0.9, 0.006), (0.8, 0.1), (0.7, 0.001)):
        found = search_dense(descriptors, query, ratio=ratio, rank=rank)
        for image in range(2):
            for row in range(6):
                keypoint, similarity, distinct = search_by_loops(descriptors, query, image, row, ratio=ratio, rank=rank)
                assert found.keypoints[image, row].tolist() == pytest.approx(keypoint)
                assert found.similarity[image, row].item() == pytest.approx(similarity, abs=1e-5)
                assert bool(found.kept[image, row]) == distinct
    few = search_dense(descriptors, query, ratio=0.9, values_at_once=1)
    for a, b in zip(few, search_dense(descriptors, query, ratio=0.9), strict=True):
        torch.testing.assert_close(a, b)


def test_features_of_any_length_are_searched_for_the_nearest():
    """A cell twice as long has the larger product with a descriptor, and is no nearer to it."""
    features = torch.zeros(1, 2, 6, 6)
    features[0, :, 1, 1], features[0, :, 4, 4] = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])
    found = search_dense((torch.tensor([[[1.0, 0.0], [2.0, 1.0]]]),), FeaturePyramid((features,), (4,)))
    assert found.keypoints[0].tolist() == [[6.0, 6.0], [18.0, 18.0]]
    assert found.similarity[0].tolist() == [1.0, 5.0]


def test_memory_is_the_maps_and_the_chunk(largest_tensor):
    query = pyramid((8, 2), (256, 256))
    xy = torch.rand(1, 500, 2, generator=torch.Generator().manual_seed(2)) * 200 + 20
    descriptors, _ = sample_descriptors(query, xy)
    with largest_tensor:
        search_dense(descriptors, query, ratio=0.9, values_at_once=1 << 14)
    cells, channels = (256 // DENSE_STRIDE) ** 2, CHANNELS[8] + CHANNELS[2] + 2
    assert largest_tensor.elements <= max(query.maps[1].numel(), cells * channels)


def test_every_image_of_a_batch_is_searched_alone_and_none_is_no_error():
    query = pyramid((8, 2), (40, 56), batch=3)
    xy = torch.rand(3, 9, 2, generator=torch.Generator().manual_seed(2)) * 24 + 8
    descriptors, _ = sample_descriptors(query, xy)
    together = search_dense(descriptors, query, ratio=0.9, subpixel=True)
    for image in range(3):
        one = FeaturePyramid(tuple(m[image : image + 1] for m in query.maps), query.strides)
        alone = search_dense(tuple(d[image : image + 1] for d in descriptors), one, ratio=0.9, subpixel=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[image], b[0])
    nothing = search_dense(tuple(d[:, :0] for d in descriptors), query, ratio=0.9)
    assert nothing.keypoints.shape == (3, 0, 2) and nothing.kept.shape == (3, 0)


def test_subpixel_stays_near_the_cell_and_comes_nearer_to_the_truth():
    noise = torch.randn(1, 12, 8, 10, generator=torch.Generator().manual_seed(0))
    fine = F.normalize(F.interpolate(noise, scale_factor=4, mode="bicubic"), dim=1)
    fine = fine.contiguous(memory_format=torch.channels_last)
    query = FeaturePyramid((fine,), (4,))
    xy = torch.rand(1, 60, 2, generator=torch.Generator().manual_seed(1)) * 90 + 20
    descriptors, _ = sample_descriptors(query, xy)
    cells = search_dense(descriptors, query).keypoints
    peaks = search_dense(descriptors, query, subpixel=True).keypoints
    assert (cells - xy).abs().max() > 1 and (peaks - cells).abs().max() <= 0.75 * DENSE_STRIDE + 1e-4
    right = (cells - xy).norm(dim=-1) < 4
    assert right.float().mean() > 0.9
    assert (peaks - xy).norm(dim=-1)[right].median() < 0.1 * (cells - xy).norm(dim=-1)[right].median()


@pytest.mark.parametrize("cells", [1, 2, 7, 255, 256, 257, 1024, 1025, 2600])
@pytest.mark.parametrize("values_at_once", [1, 3000, 1 << 20])
def test_best_cells_against_sorting(cells, values_at_once):
    generator = torch.Generator().manual_seed(cells)
    descriptors = torch.randn(23, 4, generator=generator)
    columns = torch.randn(4, cells, generator=generator) - 0.2
    similarity = descriptors.double().numpy() @ columns.double().numpy()
    for ratio, rank in ((1.0, 0.006), (0.95, 0.006), (0.9, 0.02), (0.5, 0.3), (0.3, 1.0)):
        index, best, distinct = best_cells(descriptors, columns, ratio=ratio, rank=rank, values_at_once=values_at_once)
        assert index.tolist() == similarity.argmax(1).tolist()
        np.testing.assert_allclose(best.numpy(), similarity.max(1), atol=1e-5)
        ordered = np.sort(similarity, 1)[:, ::-1]
        position = max(2, round(rank * cells)) - 1
        at_rank = ordered[:, position] if position < cells else np.full(23, -np.inf)
        expected = (ratio >= 1) | ((at_rank <= ratio * ordered[:, 0]) & (ordered[:, 0] > 0))
        assert distinct.tolist() == expected.tolist()


def test_a_small_map_can_be_distinct():
    """With few cells the rank's share is less than one cell; the best is not held against itself."""
    descriptor, columns = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
    assert best_cells(descriptor, columns, ratio=0.9, rank=0.006)[2].all()
    columns[0, 3] = 0.85
    assert not best_cells(descriptor, columns, ratio=0.9, rank=0.006)[2].any()


def observed(strides=(8, 4), *, references=(4, 9), per_reference=25, seed=0):
    """Observations of references whose maps differ, their descriptors sampled there, some not known."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, row in enumerate(references):
        xy = torch.rand(1, per_reference, 2, generator=generator) * torch.tensor([40.0, 28.0]) + 10
        descriptors, _ = sample_descriptors(pyramid(strides, (48, 64), seed=10 + number), xy)
        parts.append((xy[0], tuple(d[0] for d in descriptors), torch.full((per_reference,), row)))
    valid = torch.rand(len(references) * per_reference, len(strides), generator=generator) > 0.1
    nothing = torch.zeros(len(valid))
    levels = tuple(torch.cat([p[1][i] for p in parts]) for i in range(len(strides)))
    return Observations(
        nothing, nothing, torch.cat([p[0] for p in parts]), levels, valid, torch.cat([p[2] for p in parts])
    )


def mutual_by_loops(observations: Observations, keypoints, query: FeaturePyramid, limit: float) -> list[bool]:
    usable = observations.valid.all(1).tolist()
    *coarse, fine = observations.descriptors
    weight = np.r_[np.ones(sum(d.shape[1] for d in coarse)), np.full(fine.shape[1], Matcher.fine_weight)]
    own = [np.concatenate([d[i] for d in observations.descriptors]).astype(float) for i in range(len(usable))]
    there, known = sample_descriptors(query, keypoints)
    agree = []
    for i, (x, y) in enumerate(observations.keypoints.tolist()):
        others = [j for j in range(len(usable)) if usable[j] and observations.reference[j] == observations.reference[i]]
        if not usable[i] or not all(k[0, i] for k in known):
            agree.append(False)
            continue
        column = np.concatenate([t[0, i] for t in there]).astype(float)
        back = min(others, key=lambda j: weight @ (own[j] - column) ** 2)
        bx, by = observations.keypoints[back].tolist()
        agree.append(float(np.hypot(bx - x, by - y)) <= limit)
    return agree


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("limit", [0.5, 3.0, 12.0])
def test_mutual_matches_are_those_of_a_loop(dense, limit):
    observations = observed()
    # The query looks like the first reference, and a little like the second.
    first, second, noise = (pyramid((8, 4), (48, 64), seed=s) for s in (10, 11, 3))
    maps = tuple(a + 0.5 * b + 0.3 * c for a, b, c in zip(first.maps, second.maps, noise.maps, strict=True))
    query = FeaturePyramid(maps, (8, 4))
    everything = Matcher(dense=dense, mutual=None).match_observations(observations, query)
    assert everything.kept.shape == (50,) and torch.equal(everything.kept, observations.valid.all(1))
    found = Matcher(dense=dense, mutual=limit).match_observations(observations, query)
    torch.testing.assert_close(found.keypoints, everything.keypoints)
    expected = mutual_by_loops(observations, found.keypoints[None], query, limit)
    assert found.kept.tolist() == expected
    assert 0 < sum(expected) < 50


def test_order_and_other_references_change_nothing():
    observations, query = observed(), pyramid((8, 4), (48, 64), seed=10)
    whole = Matcher().match_observations(observations, query)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))

    def take(rows):
        return observations.select(rows)

    for rows in (order, torch.arange(25), torch.arange(25, 50)):
        part = Matcher().match_observations(take(rows), query)
        torch.testing.assert_close(part.keypoints, whole.keypoints[rows])
        assert torch.equal(part.kept, whole.kept[rows])
    nothing = Matcher().match_observations(take(order[:0]), query)
    assert nothing.keypoints.shape == (0, 2) and nothing.kept.shape == (0,)


def test_observations_of_the_query_itself_are_found():
    observations, query = observed(references=(4,)), pyramid((8, 4), (48, 64), seed=10)
    for matcher in (Matcher(dense=False), Matcher(), Matcher(ratio=0.95), Matcher(dense=False, ratio=0.9)):
        found = matcher.match_observations(observations, query)
        error = (found.keypoints - observations.keypoints).norm(dim=-1)[found.kept]
        assert found.kept.sum() > 10 and error.median() < 2.5


def test_more_is_searched_at_once_where_there_is_more_memory():
    descriptors, cells = torch.empty(4000, 16), torch.empty(16, 256 * 256)
    products = CountProducts()
    with products:
        best_cells(descriptors.to("meta"), cells.to("meta"))
    assert products.count == 1
    assert values_for(torch.device("cpu")) < 4000 * 256 * 256 // 2


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.out
        return func(*args, **(kwargs or {}))
