"""Small random level pairs in float64, and a literal bilinear sampler as the reference for the losses."""

import pytest
import torch
import torch.nn.functional as F

from gnnet.losses.term import LevelPair


def random_map(generator, *, batch, channels, height, width, normalize=True, dtype=torch.float64):
    features = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    # Smoothed, because neighbouring cells of a real map are similar.
    features = F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)
    features = F.normalize(features, dim=1) if normalize else features
    return features.to(dtype).contiguous(memory_format=torch.channels_last)


def random_points(generator, *, batch, points, height, width, margin=2.6):
    size = torch.tensor([width, height], dtype=torch.float64)
    unit = torch.rand(batch, points, 2, generator=generator, dtype=torch.float64)
    return margin + unit * (size - 2 * margin)


def make_pair(
    *, seed=0, batch=2, channels=6, height=12, width=15, points=7, normalize=True, requires_grad=False
) -> LevelPair:
    generator = torch.Generator().manual_seed(seed)
    size = {"batch": batch, "height": height, "width": width}
    maps = [random_map(generator, channels=channels, normalize=normalize, **size) for _ in range(2)]
    xy_a, xy_b = (random_points(generator, points=points, **size) for _ in range(2))
    weight = torch.rand(batch, points, generator=generator, dtype=torch.float64) + 0.1
    valid = torch.ones(batch, points, dtype=torch.bool)
    valid[0, 2] = False
    if requires_grad:
        maps = [features.requires_grad_() for features in maps]
    return LevelPair.from_maps(*maps, xy_a=xy_a, xy_b=xy_b, weight=weight, valid=valid)


def at(features, x, y):
    """F(x, y), (C,), of one map (C, H, W): bilinear interpolation of the four cells around the point."""
    x, y = float(x) - 0.5, float(y) - 0.5
    i, j = int(x // 1), int(y // 1)
    a, b = x - i, y - j
    return (
        (1 - a) * (1 - b) * features[:, j, i]
        + a * (1 - b) * features[:, j, i + 1]
        + (1 - a) * b * features[:, j + 1, i]
        + a * b * features[:, j + 1, i + 1]
    )


def mean_of(values, pair, keep=None):
    """Σ w·l / Σ w over valid points, computed by a loop; `values` maps (b, n) to a number."""
    top = bottom = 0.0
    for b, n in values:
        if pair.valid[b, n] and (keep is None or keep[b, n]):
            top = top + pair.weight[b, n] * values[b, n]
            bottom = bottom + pair.weight[b, n]
    return top / bottom


def every_point(pair):
    return [(b, n) for b in range(pair.valid.shape[0]) for n in range(pair.valid.shape[1])]


@pytest.fixture
def pair() -> LevelPair:
    return make_pair()
