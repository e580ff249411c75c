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

    If fewer than `count` references are allowed, the remaining rows are -1 with similarity -inf. A similarity
    that is not finite counts as not allowed. Of two equal similarities the lower row comes first. Inner products
    are summed in float64, so that neither the order of the references nor the size of the chunks changes them.
    Results are on the queries' device.

    Args:
        queries: (Q, D) descriptors.
        references: (R, D) descriptors of any floating type; may be mapped from disk, and is read once.
        count: references to find for each query.
        query_group, reference_group: integer labels (Q,) and (R,), both or none, as of places or cameras; only
            references of the query's group are allowed, -1 in the query allows all.
        not_itself: (Q,) row of the reference that is the query itself and is not allowed, or -1.
        values_at_once: limit, roughly, on the numbers (8 bytes each) held in memory besides queries and results;
            neither all similarities nor all references are held.

    Raises:
        ValueError: if shapes do not fit together, or there is one group without the other.
    """
    _check_shapes(queries, references, count, query_group, reference_group, not_itself)
    device, (total, width) = queries.device, references.shape
    rows_at_once = max(1, min(total, values_at_once // (4 * max(1, width))))
    queries_at_once = max(1, min(values_at_once // (4 * max(1, width)), values_at_once // (8 * rows_at_once)))
    groups = None if query_group is None else (query_group.to(device)[:, None], reference_group.to(device))
    itself = None if not_itself is None else not_itself.to(device)[:, None]
    best = _ranks(torch.full((len(queries), count), -torch.inf, device=device), torch.zeros(1, device=device).long())
    # References on the outside: they may come from a disk, the queries are in memory.
    for start in range(0, total, rows_at_once):
        chunk = references[start : start + rows_at_once]
        chunk = torch.from_numpy(np.array(chunk, np.float64)) if isinstance(chunk, np.ndarray) else chunk
        chunk = chunk.to(device, torch.float64)
        rows = torch.arange(start, start + len(chunk), device=device)
        for first in range(0, len(queries), queries_at_once):
            part = slice(first, first + queries_at_once)
            similarity = (queries[part].double() @ chunk.T).float()
            forbidden = ~similarity.isfinite()
            if groups is not None:
                forbidden |= (groups[0][part] != -1) & (groups[0][part] != groups[1][rows])
            if itself is not None:
                forbidden |= itself[part] == rows
            ranks = _ranks(similarity.masked_fill_(forbidden, -torch.inf), rows)
            best[part] = torch.cat([best[part], ranks], 1).topk(count, dim=1).values
    return _rows_and_similarities(best)


def _ranks(similarity: Tensor, rows: Tensor) -> Tensor:
    """Integers (Q, R) in the order of the similarities; of equal similarities the lower row (R,) ranks higher.

    Unlike floats with ties these have only one order, so the best of them do not depend on the chunks.
    """
    bits = (similarity + 0.0).view(torch.int32)  # -0 + 0 is 0
    # As integers, the bits of positive floats are in the floats' order, those of negative ones in the reverse.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (0xFFFFFFFF - rows)


def _rows_and_similarities(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and similarities that `_ranks` were made of; row -1 where the similarity is -inf."""
    ordered, rows = ranks >> 32, 0xFFFFFFFF - (ranks & 0xFFFFFFFF)
    similarity = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).int().view(torch.float32)
    return rows.masked_fill(similarity == -torch.inf, -1), similarity


def _check_shapes(queries, references, count, query_group, reference_group, not_itself) -> None:
    shapes = tuple(queries.shape), tuple(references.shape)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1] or count < 1:
        raise ValueError(
            f"queries {shapes[0]}, references {shapes[1]}, count={count}; expected (Q, D), (R, D), 1 or more: "
            "descriptors of one network and one whitening"
        )
    if (query_group is None) != (reference_group is None):
        raise ValueError("query_group and reference_group go together; one is given without the other")
    labels = {"query_group": (query_group, 0), "reference_group": (reference_group, 1), "not_itself": (not_itself, 0)}
    for name, (values, side) in labels.items():
        if values is not None and tuple(values.shape) != shapes[side][:1]:
            raise ValueError(f"{name} is of shape {tuple(values.shape)}; expected {shapes[side][:1]}")
