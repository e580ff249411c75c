"""Image retrieval: global descriptors of a network's maps, whitening, and the nearest references."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gnnet.geometry.pose import Pose, rotation_angle
from gnnet.models.pyramid import FeaturePyramid

METRES_PER_RADIAN = 10.0  # of a pose distance: an angle counts as the motion of what lies so far away


def gem(pyramid: FeaturePyramid, *, power: float = 3.0) -> Tensor:
    """Global descriptors (B, 2 C) of length 1: generalised means of the coarsest map (Radenović et al., TPAMI 2018).

    Features are signed, so their positive and their negative parts are pooled apart; roots of the means
    keep a few strong channels from deciding alone.
    """
    features = pyramid.maps[0].flatten(2)
    parts = torch.cat([features.clamp(min=0), (-features).clamp(min=0)], 1)
    pooled = parts.pow(power).mean(-1).clamp(min=1e-12).pow(1 / power)
    return F.normalize(pooled.sqrt(), dim=1)


@dataclass(frozen=True)
class Whitening:
    """Centres descriptors and turns them into uncorrelated ones of equal variance.

    Args:
        mean: (D,).
        projection: (D, d).
    """

    mean: Tensor
    projection: Tensor

    def apply(self, descriptors: Tensor) -> Tensor:
        """(..., D) to (..., d), of length 1."""
        return F.normalize((descriptors - self.mean) @ self.projection, dim=-1)


def fit_whitening(descriptors: Tensor, dimensions: int, *, regularisation: float = 0.05) -> Whitening:
    """PCA with whitening of descriptors (N, D) to at most `dimensions` (Jégou & Chum, ECCV 2012).

    Fewer than three descriptors have no statistics: they are left as they are, cut to `dimensions`.

    Args:
        regularisation: share of the largest variance that is added to each, so that what hardly varies is no
            louder than what does.
    """
    count, width = descriptors.shape
    if count < 3:
        return Whitening(torch.zeros(width), torch.eye(width)[:, :dimensions])
    mean = descriptors.mean(0)
    # The smaller of the two ways: of N × D it never makes D × D where D is large.
    _, values, directions = torch.linalg.svd((descriptors - mean).double() / (count - 1) ** 0.5, full_matrices=False)
    kept = min(dimensions, count - 1, width)
    variance = values[:kept].square()
    scale = (variance + regularisation * variance[0].clamp(min=1e-12)).rsqrt()
    return Whitening(mean, (directions[:kept].T * scale).to(descriptors.dtype))


def nearest_references(
    queries: Tensor,
    references: Tensor | np.ndarray,
    count: int,
    *,
    query_group: Tensor | None = None,
    reference_group: Tensor | None = None,
    not_itself: Tensor | None = None,
    values_at_once: int = 1 << 26,
) -> tuple[Tensor, Tensor]:
    """The most similar references of each query: rows (Q, count) and inner products (Q, count), the best first.

    Where fewer are allowed, the row is -1 and the similarity -inf. Similar alike, the lower row comes first.

    Args:
        queries: (Q, D).
        references: (R, D), may be mapped from disk.
        count: of each query.
        query_group, reference_group: labels (Q,) and (R,); only references of the query's group are allowed,
            -1 in the query allows all.
        not_itself: (Q,) a row that is not allowed, or -1.
        values_at_once: numbers held in memory together: neither all similarities nor all references are.
    """
    total, width = references.shape
    step = max(1, min(total, values_at_once // (2 * max(1, width))))
    rows_at_once = max(1, values_at_once // (2 * step))
    found = []
    for first in range(0, len(queries), rows_at_once):
        part = queries[first : first + rows_at_once].float()
        best = torch.full((len(part), count), -torch.inf)
        index = torch.full((len(part), count), -1, dtype=torch.int64)
        for start in range(0, total, step):
            chunk = torch.as_tensor(np.asarray(references[start : start + step])).float()
            similarity = part @ chunk.T
            rows = torch.arange(start, start + len(chunk))
            if reference_group is not None and query_group is not None:
                groups = query_group[first : first + len(part), None]
                other = (groups >= 0) & (groups != reference_group[rows][None])
                similarity = similarity.masked_fill(other, -torch.inf)
            if not_itself is not None:
                similarity = similarity.masked_fill(not_itself[first : first + len(part), None] == rows, -torch.inf)
            both = torch.cat([best, similarity], 1)
            order = both.sort(dim=1, descending=True, stable=True).indices[:, :count]
            best = both.gather(1, order)
            index = torch.cat([index, rows.expand(len(part), -1)], 1).gather(1, order)
            index = index.masked_fill(best == -torch.inf, -1)
        found.append((index, best))
    if not found:
        return torch.zeros(0, count, dtype=torch.int64), torch.zeros(0, count)
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def nearest_by_pose(query: Pose, references: Pose, count: int) -> Tensor:
    """Rows of the references (R,) nearest to a pose (): by distance in metres + angle in radians · 10 m."""
    distance = (references.center() - query.center()).norm(dim=-1)
    angle = rotation_angle(references.rotation @ query.rotation.mT)
    return (distance + METRES_PER_RADIAN * angle).sort(stable=True).indices[:count]
