"""Global descriptors of images: from a network's maps, whitened, and which of them are most similar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gnnet.models.pyramid import FeaturePyramid

_NEGLIGIBLE = 1e-10  # share of a squared length (or variance) below which float32 descriptors hold only rounding


def gem(pyramid: FeaturePyramid, *, power: float = 3.0) -> Tensor:
    """Global descriptors (B, 2 C) of length 1: generalised means of the coarsest map (Radenović et al., TPAMI 2018).

    Features are signed, so their positive parts (the first C dimensions) and their negative parts are pooled
    separately. The square root of each mean keeps a few strong channels from deciding alone.

    Args:
        pyramid: features of B images; the coarsest map has C channels.
        power: exponent of the mean: 1 is the average, infinity would be the maximum.

    Raises:
        ValueError: if the power is not positive.
    """
    if not power > 0:
        raise ValueError(f"power={power}; expected a positive number (3 is usual)")
    features = pyramid.maps[0].flatten(2).float()
    parts = torch.cat([features.clamp(min=0), (-features).clamp(min=0)], 1)
    # The root of a mean of 0 has no gradient.
    pooled = parts.pow(power).mean(-1).clamp(min=1e-30).pow(1 / power)
    return F.normalize(pooled.sqrt(), dim=1)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Centres descriptors and turns them into uncorrelated ones of about equal variance, see `fit_whitening`.

    Args:
        mean: (D,) float32.
        projection: (D, d) float32.
    """

    mean: Tensor
    projection: Tensor

    def apply(self, descriptors: Tensor) -> Tensor:
        """(..., D) to (..., d), of length 1, in float32."""
        return F.normalize((descriptors.to(self.mean.dtype) - self.mean) @ self.projection, dim=-1)


@torch.no_grad()
def fit_whitening(descriptors: Tensor, dimensions: int, *, regularisation: float = 0.05) -> Whitening:
    """PCA with whitening of descriptors (N, D) to min(`dimensions`, N - 1, D) dimensions (Jégou & Chum, ECCV 2012).

    It needs memory for a few N × D matrices and one N × N (D × D where that is smaller). Directions in which
    the descriptors do not vary are left out: their columns are 0.

    One or two descriptors, or descriptors that are all the same, have no statistics: they stay as they are,
    without centring. If D is more than `dimensions`, they are projected onto the space that they span, which
    keeps every inner product with them.

    Args:
        descriptors: (N, D), of any length.
        dimensions: limit on the dimensions that are left.
        regularisation: share of the largest variance that is added to each variance, so that a direction that
            hardly varies is not amplified above one that does.

    Raises:
        ValueError: if there are no descriptors, some are not finite, or the settings are out of range.
    """
    if descriptors.ndim != 2 or 0 in descriptors.shape:
        raise ValueError(f"descriptors of shape {tuple(descriptors.shape)} given; expected (N, D), one at least")
    if dimensions < 1 or not regularisation >= 0:
        raise ValueError(f"dimensions={dimensions}, regularisation={regularisation}; expected 1 or more, 0 or more")
    broken = int((~descriptors.isfinite()).any(1).sum())
    if broken:
        raise ValueError(f"{broken} of {len(descriptors)} global descriptors are not finite; the network is broken")
    count, width = descriptors.shape
    rows = descriptors.double()
    mean = rows.mean(0)
    if count > 2:
        kept = min(dimensions, count - 1, width)
        values, directions = _principal_directions(rows - mean, kept)
        if values[0] > _NEGLIGIBLE * rows.square().sum():
            variance = values / (count - 1)
            projection = directions * (variance + regularisation * variance[0]).rsqrt().nan_to_num(posinf=0)
            return Whitening(mean.float(), projection.float())
        projection = _principal_directions(rows, kept)[1]
    elif dimensions >= width:
        projection = torch.eye(width, device=rows.device)
    else:
        projection = _principal_directions(rows, dimensions)[1]
    return Whitening(torch.zeros_like(mean).float(), projection.float())


def _principal_directions(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest squared singular values (count,) of rows (N, D), and their directions (D, count).

    If the rows have fewer, the rest is 0.
    """
    if len(rows) <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        directions = rows.T @ vectors.flip(1)[:, :count]
    else:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        directions = vectors.flip(1)[:, :count]
    values = values.flip(0)[:count].clamp(min=0)
    known = values > _NEGLIGIBLE * values[0]
    directions = F.normalize(directions, dim=0) * known
    missing = count - len(values)
    return F.pad(values * known, (0, missing)), F.pad(directions, (0, missing))


@torch.no_grad()
def nearest_references(
    query: Tensor,
    references: np.ndarray,
    count: int,
    *,
    allowed: Tensor | None = None,
    values_at_once: int = 1 << 24,
) -> tuple[Tensor, Tensor]:
    """The references most similar to a query: rows (K,) and inner products (K,), the best first.

    K is at most `count`. A reference whose similarity is not finite is never found. Of two equal similarities the
    lower row comes first. Inner products are summed in float64, so that neither the order of the references nor the
    size of the chunks changes them.

    Args:
        query: (D,) descriptor.
        references: (R, D) descriptors of any floating type; may be mapped from disk, and is read once.
        count: limit on the references to find.
        allowed: (R,) bool, which references may be found; None allows all.
        values_at_once: limit on the numbers (8 bytes each) of references held in memory.

    Raises:
        ValueError: if shapes do not fit together.
    """
    shapes = tuple(query.shape), references.shape
    if len(shapes[0]) != 1 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][1] or count < 1:
        raise ValueError(
            f"query {shapes[0]}, references {shapes[1]}, count={count}; expected (D,), (R, D), 1 or more: "
            "descriptors of one network and one whitening"
        )
    total, width = references.shape
    if allowed is not None and tuple(allowed.shape) != (total,):
        raise ValueError(f"allowed is of shape {tuple(allowed.shape)}; expected {(total,)}")
    similarity, rows_at_once = torch.empty(total), max(1, values_at_once // max(1, width))
    for start in range(0, total, rows_at_once):
        chunk = torch.from_numpy(np.array(references[start : start + rows_at_once], np.float64))
        similarity[start : start + len(chunk)] = (chunk @ query.double()).float()
    found = similarity.isfinite() if allowed is None else similarity.isfinite() & allowed
    rows = found.nonzero().squeeze(1)
    best = similarity[rows].sort(descending=True, stable=True)
    return rows[best.indices[:count]], best.values[:count]
