"""Sparse-to-dense matching: where in a query's maps do descriptors of a reference fit best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from gnnet.data.batches import Matches
from gnnet.geometry.interpolation import sample_with_gradient
from gnnet.localization.dense_search import best_cells, levels_at_stride
from gnnet.localization.map import Observations
from gnnet.localization.query import Query
from gnnet.localization.refinement import sample_descriptors
from gnnet.models.pyramid import FeaturePyramid

VALUES_AT_ONCE = 1 << 26  # 256 MB in float32
DENSE_STRIDE = 4  # of the cells that a dense search goes through, S2DHM's
COMPARED_PER_READ = 64  # cells of a map that one product compares in the time in which one cell is read for a point
PEAK_STEPS = 3  # more change nothing
PEAK_RANGE = 0.75  # cells on each axis that a peak may lie from the best cell's centre: noise moves that cell


@dataclass(frozen=True)
class Matcher:
    """Settings of matching descriptors in feature maps, and of which matches to keep.

    Args:
        dense: search every cell at stride 4 (or the finest stride, if that is coarser) with all levels at once, as
            S2DHM does, see `search_dense`; False searches coarse to fine, see `search_coarse_to_fine`.
        fine_weight: weight of the finest level in comparing places far apart; to place a match within a cell each
            level counts in full. Coarse levels tell places apart, the finest one tells where exactly.
        ratio: limit of the ratio test; 1 keeps all. In a dense search a match is kept if the similarity at `rank`
            is at most `ratio` times the best (S2DHM's test); coarse to fine, if its feature distance is at most
            `ratio` times the runner-up's.
        rank: rank of the similarity that the best is compared with, as a share of the map's cells.
        mutual: pixels; a match is kept if matching it back ends within so many of where it began.
            None does not match back.
        subpixel: move a match from the cell's centre to the least distance of the interpolated finest map, by
            Gauss-Newton.
        candidates: cells of the coarsest map that are followed through the finer levels, coarse to fine.

    Raises:
        ValueError: if `candidates` is less than one.
    """

    dense: bool = True
    fine_weight: float = 0.25
    ratio: float = 1.0
    rank: float = 0.006
    mutual: float | None = 2.0
    subpixel: bool = True
    candidates: int = 8
    local_features: ClassVar[None] = None  # the network's maps describe the map's points

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"{self.candidates} candidates; expected at least 1")

    def search(self, descriptors: tuple[Tensor, ...], pyramid: FeaturePyramid) -> Matches:
        """Where descriptors (B, N, C_l) of each level fit best in a pyramid (B,), and which pass the ratio test."""
        search = partial(search_coarse_to_fine, candidates=self.candidates)
        if self.dense:
            search = partial(search_dense, rank=self.rank)
        return search(descriptors, pyramid, ratio=self.ratio, subpixel=self.subpixel, fine_weight=self.fine_weight)

    def match_query(self, observations: Observations, query: Query, image_sizes: Tensor) -> Matches:
        """Match what references observe (M,) in a query; matches (M,) on the CPU, keypoints in float64."""
        device = query.pyramid.maps[0].device
        there = observations._replace(descriptors=tuple(d.to(device) for d in observations.descriptors))
        found = self.match_observations(there, query.pyramid)
        keypoints = found.keypoints.cpu().double()
        return Matches(keypoints, found.similarity.cpu(), found.kept.cpu() & query.camera.contains(keypoints))

    @torch.no_grad()
    def match_observations(self, observations: Observations, pyramid: FeaturePyramid) -> Matches:
        """Match what references observe (M,) in the maps of one query; see `gnnet.localization.map.Observations`.

        A match is mutual if the descriptor of the same reference that is nearest to the query's at the match lies
        within `mutual` pixels of the observation.

        Args:
            observations: with descriptors on the pyramid's device.
            pyramid: of the query, a batch of one.
        """
        found = Matches(*(x[0] for x in self.search(tuple(d[None] for d in observations.descriptors), pyramid)))
        usable = observations.valid.all(-1)
        kept = usable & found.kept.to(usable.device)
        if self.mutual is not None:
            rows = kept.nonzero().squeeze(1)
            kept[rows] = self._agree(observations, rows, found.keypoints[rows.to(found.keypoints.device)], pyramid)
        return found._replace(kept=kept)

    def _agree(self, observations: Observations, rows: Tensor, keypoints: Tensor, pyramid: FeaturePyramid) -> Tensor:
        """Which matches of some observations (M',) with the query's keypoints (M', 2) are mutual, (M',)."""
        back, valid = sample_descriptors(pyramid, keypoints[None])
        columns = self._weighted([d[0] for d in back])
        references = self._weighted(observations.descriptors)
        usable = observations.valid.all(-1)
        agree = torch.stack([v[0] for v in valid]).all(0)
        parts = []
        for reference in observations.reference[rows].unique().tolist():
            mine = (observations.reference[rows] == reference).nonzero().squeeze(1)
            candidates = (usable & (observations.reference == reference)).nonzero().squeeze(1)
            there, here = (index.to(columns.device, non_blocking=True) for index in (candidates, mine))
            described = references[there]
            similarity = columns[here] @ described.T - described.square().sum(-1) / 2
            parts.append((mine, candidates, similarity.argmax(-1)))
        if not parts:
            return agree.to(usable.device)
        # Only now does the host wait for the device, once for all references.
        nearest = torch.cat([best for *_, best in parts]).to(usable.device).split([len(mine) for mine, *_ in parts])
        agree = agree.to(usable.device)
        for (mine, candidates, _), best in zip(parts, nearest, strict=True):
            distance = (observations.keypoints[candidates[best]] - observations.keypoints[rows[mine]]).norm(dim=-1)
            agree[mine] &= distance <= self.mutual
        return agree

    def _weighted(self, descriptors: Sequence[Tensor]) -> Tensor:
        """All levels' descriptors side by side, so that inner products are weighted sums of the levels'."""
        return torch.cat([*descriptors[:-1], descriptors[-1] * self.fine_weight**0.5], -1)

    @torch.no_grad()
    def match(self, a: FeaturePyramid, keypoints: Tensor, b: FeaturePyramid) -> Matches:
        """Match keypoints (B, N, 2) of images a in images b.

        A keypoint too near a's border has no descriptor, and its match is not kept.

        Args:
            a, b: pyramids of the same strides, each of B images or of one that serves all.
            keypoints: image pixels.
        """
        a, b = (_expanded(pyramid, len(keypoints)) for pyramid in (a, b))
        descriptors, valid = sample_descriptors(a, keypoints)
        found = self.search(descriptors, b)
        kept = found.kept & torch.stack(valid).all(0)
        if self.mutual is not None:
            back, valid = sample_descriptors(b, found.keypoints)
            returned = self.search(back, a).keypoints
            kept &= torch.stack(valid).all(0) & ((returned - keypoints).norm(dim=-1) <= self.mutual)
        return found._replace(kept=kept)


@torch.no_grad()
def search_coarse_to_fine(
    descriptors: tuple[Tensor, ...],
    pyramid: FeaturePyramid,
    *,
    candidates: int = 1,
    ratio: float = 1.0,
    subpixel: bool = False,
    fine_weight: float = 1.0,
    values_at_once: int = VALUES_AT_ONCE,
) -> Matches:
    """Nearest cells of the coarsest map, then at each finer level the nearest cell of a window around each.

    With several candidates, these are the best local maxima of the coarsest map's similarity. Each is
    followed to the finest level, and the one with the least sum of squared distances over all levels
    is the match: where a coarse map cannot tell two places apart, the finer ones decide. The similarity of a
    match is that sum with a minus sign; `fine_weight` is the finest level's weight in it.

    Args:
        descriptors: (B, N, C_l) of each level, coarse to fine.
        pyramid: of the images to search, batch B.
        candidates, ratio, subpixel, fine_weight: as in `Matcher`.
        values_at_once: limit on the numbers held in memory together; points are searched in chunks.
    """
    strides = pyramid.strides
    if descriptors[0].shape[1] == 0:
        nothing = descriptors[0].new_zeros(len(descriptors[0]), 0)
        return Matches(nothing[..., None].expand(-1, -1, 2), nothing, nothing.bool())
    radii = [0, *(max(1, round(a / b)) for a, b in pairwise(strides))]
    batch, _, height, width = pyramid.maps[0].shape
    each = [max(m.shape[1], COMPARED_PER_READ) for m in pyramid.maps]  # numbers held for a cell of a window
    windows = [candidates * (2 * r + 1) ** 2 * numbers for r, numbers in zip(radii, each, strict=True)]
    chunk = max(1, values_at_once // (batch * max(height * width, *windows)))
    parts = [
        _follow(part, pyramid, radii, candidates, ratio, subpixel, fine_weight)
        for part in zip(*(level.split(chunk, 1) for level in descriptors), strict=True)
    ]
    return Matches(*(torch.cat(column, 1) for column in zip(*parts, strict=True)))


@torch.no_grad()
def search_dense(
    descriptors: tuple[Tensor, ...],
    pyramid: FeaturePyramid,
    *,
    ratio: float = 1.0,
    rank: float = 0.006,
    subpixel: bool = False,
    fine_weight: float = 1.0,
    values_at_once: int | None = None,
) -> Matches:
    """Search descriptors in every cell of the query, all levels together (Germain et al., "S2DHM", 3DV 2019).

    The maps are brought to one stride, `DENSE_STRIDE` or the finest if that is coarser, where the
    similarities of all levels are summed: the hypercolumn's. The best cell is then placed within finer levels.
    The similarity of a match is that of the best cell: the weighted sum over levels of |d|² − ½|d − c|² for
    descriptor d and cell c, which is ⟨d, c⟩ if both are of unit length.

    Args:
        descriptors: (B, N, C_l) of each level, coarse to fine.
        pyramid: of the images to search, batch B.
        ratio, rank, subpixel, fine_weight: as in `Matcher`; S2DHM's `fine_weight` is 1.
        values_at_once: limit on the similarities held in memory together; None takes what suits the device.
    """
    stride = max(DENSE_STRIDE, pyramid.strides[-1])
    levels, width = levels_at_stride(pyramid, stride)
    weights = [1.0] * (len(levels) - 1) + [fine_weight]
    # The nearest cell, not that of the largest product: between centres of cells features are shorter, and some
    # networks' features are of any length. The squares stand as channels, so that all of it is one product.
    own = torch.stack([w * d.square().sum(-1) for w, d in zip(weights, descriptors, strict=True)], -1).sum(-1) / 2
    theirs = torch.stack([w * vector_norm(c, dim=1).square() for w, c in zip(weights, levels, strict=True)]).sum(0) / 2
    weighted = [w * d for w, d in zip(weights, descriptors, strict=True)]
    columns = torch.cat([*weighted, own[..., None], torch.ones_like(own)[..., None]], -1)
    cells = torch.cat([*levels, torch.ones_like(theirs)[:, None], -theirs[:, None]], 1)
    found = [
        best_cells(rows, image, ratio=ratio, rank=rank, values_at_once=values_at_once)
        for rows, image in zip(columns, cells, strict=True)
    ]
    index, similarity, kept = (torch.stack(column) for column in zip(*found, strict=True))
    at, before = torch.stack([index % width, index // width], -1)[:, :, None] + 0.5, stride
    for level, finer in enumerate(pyramid.strides):
        if finer < stride:
            at = at * (before / finer)
            at, _ = _best_in_window(descriptors[level], pyramid.maps[level], at, max(1, round(before / finer)))
            before = finer
    at = at.squeeze(2)
    if subpixel and before == pyramid.strides[-1]:
        at = align(descriptors[-1], pyramid.maps[-1], at)
    return Matches(at * before, similarity, kept)


def _follow(
    descriptors: tuple[Tensor, ...],
    pyramid: FeaturePyramid,
    radii: list[int],
    candidates: int,
    ratio: float,
    subpixel: bool,
    fine_weight: float,
) -> Matches:
    """`search_coarse_to_fine` for a chunk of points; at each level the window reaches `radii` cells to each side."""
    at, distance = _coarse_candidates(descriptors[0], pyramid.maps[0], candidates)  # [B, N, K, 2], [B, N, K]
    for i in range(1, len(radii)):
        at = at * (pyramid.strides[i - 1] / pyramid.strides[i])
        at, found = _best_in_window(descriptors[i], pyramid.maps[i], at, radii[i])
        distance = distance + (fine_weight if i == len(radii) - 1 else 1.0) * found
    order = distance.topk(min(2, distance.shape[-1]), largest=False)
    at = at.gather(2, order.indices[..., :1, None].expand(-1, -1, -1, 2)).squeeze(2)
    if subpixel:
        at = align(descriptors[-1], pyramid.maps[-1], at)
    best, runner_up = order.values[..., 0], order.values[..., -1]
    kept = torch.ones_like(best, dtype=torch.bool)
    if ratio < 1 and order.values.shape[-1] > 1:
        kept = best <= ratio**2 * runner_up
    return Matches(at * pyramid.strides[-1], -best, kept)


def _coarse_candidates(descriptors: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres (B, N, K, 2) of the nearest cells, no two of them neighbours, and squared distances (B, N, K)."""
    height, width = features.shape[-2:]
    flat = features.flatten(2)
    similarity = descriptors @ flat - flat.square().sum(1)[:, None] / 2  # the largest is nearest
    if count > 1:
        peaks = F.max_pool2d(similarity.unflatten(-1, (height, width)), 3, stride=1, padding=1).flatten(-2)
        similarity = similarity.masked_fill(similarity < peaks, -torch.inf)
    best = similarity.topk(min(count, height * width), dim=-1)
    at = torch.stack([best.indices % width, best.indices // width], -1) + 0.5
    distance = descriptors.square().sum(-1, keepdim=True) - 2 * best.values
    return at, distance.clamp(min=0)


def _best_in_window(descriptors: Tensor, features: Tensor, at: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """The cell nearest to each descriptor within `radius` cells of `at` (B, N, K, 2): its centre, squared distance."""
    batch, channels, height, width = features.shape
    steps = torch.arange(-radius, radius + 1, device=features.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
    x, y = (at.floor().long()[..., None, :] + offsets).unbind(-1)  # each [B, N, K, W], row by row
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    cells = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(2)  # [B, N, K · W]
    flat = features.flatten(2)
    if height * width <= COMPARED_PER_READ * cells.shape[-1]:  # one product with the whole map is quicker
        product = (descriptors @ flat).gather(2, cells)
    else:
        first = torch.arange(batch, device=cells.device)[:, None, None] * (height * width)
        rows = flat.mT.flatten(0, 1).index_select(0, (cells + first).flatten())
        product = (rows.view(*cells.shape, channels) @ descriptors[..., None]).squeeze(-1)
    square = flat.square().sum(1).gather(1, cells.flatten(1)).view(cells.shape)
    # |c − d|² less |d|², the same for all cells.
    distance = (square - 2 * product).view(x.shape).masked_fill_(outside, torch.inf)
    best = distance.min(-1)
    index = cells.view(x.shape).gather(-1, best.indices[..., None]).squeeze(-1)
    own = descriptors.square().sum(-1)[..., None]
    return torch.stack([index % width, index // width], -1) + 0.5, (best.values + own).clamp_(min=0)


def align(
    descriptors: Tensor, features: Tensor, at: Tensor, *, reach: float = PEAK_RANGE, steps: int = PEAK_STEPS
) -> Tensor:
    """Gauss-Newton on the squared feature distance from places (B, N, 2), within `reach` cells of them on each axis."""
    features, xy = features.float(), at
    for _ in range(steps):
        values, slopes, valid = sample_with_gradient(features, xy)
        residual = values - descriptors
        (xx, cross), (_, yy) = ((slopes[..., i, None] * slopes).sum(-2).unbind(-1) for i in (0, 1))
        gx, gy = (slopes * residual[..., None]).sum(-2).unbind(-1)
        damping = 1e-4 * (xx + yy)  # a map that is flat along an axis says nothing about it
        xx, yy = xx + damping, yy + damping
        determinant = xx * yy - cross * cross
        step = torch.stack([cross * gy - yy * gx, cross * gx - xx * gy], -1) / determinant[..., None]
        step = torch.where((valid & (determinant > 0))[..., None], step, 0)
        xy = at + (xy + step - at).clamp(-reach, reach)
    return xy


def _expanded(pyramid: FeaturePyramid, batch: int) -> FeaturePyramid:
    return pyramid.each(lambda m: m.expand(batch, -1, -1, -1))
