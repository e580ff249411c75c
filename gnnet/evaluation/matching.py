"""How well keypoints are matched across conditions, against known correspondences.

Keypoints of image A are matched in image B with a network's features, and with SIFT in the same
table. The first figure is of all keypoints, each put where its descriptor fits best; the second of the
matches that a check keeps (there and back again; for SIFT the ratio test and mutual nearest
neighbours), which is what an estimator of poses receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from gnnet.data.batches import MatchingPair
from gnnet.data.sift import detect_sift, match_sift
from gnnet.localization.matching import Matcher
from gnnet.models.grey import GreyValues
from gnnet.models.pyramid import FeaturePyramid

THRESHOLDS: tuple[float, ...] = (1.0, 3.0, 5.0, 10.0)  # pixels


class PairMatches(NamedTuple):
    """Of a pair's N keypoints: pixels off the truth (N,), infinite if not matched at all; and whether kept (N,)."""

    error: Tensor
    kept: Tensor


class MatchingSummary(NamedTuple):
    """The pairs of one condition, with all their keypoints taken together.

    `keypoints` and `kept` are means a pair; `within` is the share of all keypoints that are matched
    within each threshold, `kept_within` the share of the kept matches. NaN where there are none.
    """

    condition: str
    pairs: int
    keypoints: float
    within: tuple[float, ...]
    kept: float
    kept_within: tuple[float, ...]


@torch.no_grad()
def match_pair(network: nn.Module, pair: MatchingPair, matcher: Matcher = Matcher()) -> PairMatches:  # noqa: B008
    """Match a pair with a network's features, on the network's device as far as it has one."""
    device = next((t.device for t in (*network.parameters(), *network.buffers())), pair.image_a.device)
    images = [image.to(device)[None] for image in (pair.image_a, pair.image_b)]
    if images[0].shape == images[1].shape:
        both = network(torch.cat(images))
        a, b = (FeaturePyramid(tuple(m[i : i + 1] for m in both.maps), both.strides) for i in (0, 1))
    else:
        a, b = map(network, images)
    found = matcher.match(a, pair.keypoints_a.to(device)[None], b)
    error = (found.keypoints[0] - pair.keypoints_b.to(device)).norm(dim=-1)
    return PairMatches(error, found.kept[0])


def match_pair_with_sift(pair: MatchingPair, *, upright: bool = False, ratio: float = 0.8) -> PairMatches:
    """Match a pair with SIFT: the detections of A at the keypoints, with all detections of B.

    A keypoint without a detection within half a pixel is not matched, so it counts as wrong; of several
    orientations at a keypoint a match that is kept goes first, then the nearer.
    """
    a, b = (detect_sift(image, upright=upright) for image in (pair.image_a, pair.image_b))
    keypoints, truth = pair.keypoints_a.cpu().float(), pair.keypoints_b.cpu().float()
    error, kept = torch.full((len(keypoints),), torch.inf), torch.zeros(len(keypoints), dtype=torch.bool)
    if not len(keypoints) or not len(a.keypoints) or not len(b.keypoints):
        return PairMatches(error, kept)
    off, owner = _nearest_keypoint(a.keypoints, keypoints)
    found = match_sift(a.descriptors, b.descriptors, ratio=ratio)
    # Written in turn, the best last.
    rows = (off <= 0.5).nonzero().squeeze(1)
    rows = rows[(found.distance - 10 * found.kept.float())[rows].argsort(descending=True)]
    best = torch.full((len(keypoints),), -1).scatter_reduce(
        0, owner[rows], torch.arange(len(rows)), reduce="amax", include_self=True
    )
    matched = best >= 0
    row = rows[best[matched]]
    error[matched] = (b.keypoints[found.nearest[row]] - truth[matched]).norm(dim=-1)
    kept[matched] = found.kept[row]
    return PairMatches(error, kept)


def _nearest_keypoint(detections: Tensor, keypoints: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (M,) from each detection to the nearest keypoint, and that one's row (M,)."""
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [torch.cdist(part, keypoints, compute_mode=exact).min(-1) for part in detections.split(1024)]
    return torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])


class GreyPatches(nn.Module):
    """Pyramid of grey patches, each freed of its mean and its contrast: squared distances rank as correlation (ZNCC).

    The fairer baseline beside single grey values, which nothing tells apart. It has no parameters.

    Args:
        strides: of the maps, coarse to fine, in pixels.
        size: cells of a patch on each axis, odd.
    """

    def __init__(self, *, strides: Sequence[int] = (8, 2), size: int = 7):
        super().__init__()
        self.grey, self.size = GreyValues(strides=strides), size
        self.strides, self.channels = self.grey.strides, (size * size,) * len(strides)

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB, to maps (B, size², H_l, W_l)."""
        maps = []
        for grey in self.grey(images).maps:
            padded = F.pad(grey, (self.size // 2,) * 4, mode="replicate")
            patches = F.unfold(padded, self.size)  # [B, size², H·W]
            patches = patches - patches.mean(1, keepdim=True)
            # A flat patch stays near zero, not noise blown up.
            patches = patches / patches.norm(dim=1, keepdim=True).clamp(min=0.02 * self.size)
            maps.append(patches.unflatten(-1, grey.shape[-2:]).contiguous(memory_format=torch.channels_last))
        return FeaturePyramid(tuple(maps), self.strides)


class MatchingMetrics(Metric):
    """Shares of right matches a condition, gathered over processes; every pair counts exactly once.

    A pair that is seen again, as a padding sampler repeats it, is known by its index.

    Args:
        conditions: all names of pairs' conditions, in one order in every process.
        thresholds: pixels.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, *, conditions: Sequence[str], thresholds: Sequence[float] = THRESHOLDS, **kwargs):
        super().__init__(**kwargs)
        self.conditions = tuple(conditions)
        self.thresholds = tuple(float(pixels) for pixels in thresholds)
        # Flat and of the default type, as what torchmetrics gathers from a process without pairs.
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, matches: PairMatches, *, condition: str, index: int) -> None:
        """Add one pair.

        Args:
            matches: of it.
            condition: one of `conditions`.
            index: which pair it is, below 2²⁴ (float32 holds it exactly).

        Raises:
            ValueError: if the condition is not one of `conditions`.
        """
        if condition not in self.conditions:
            raise ValueError(
                f"condition {condition} is not among those given to MatchingMetrics: {', '.join(self.conditions)}"
            )
        limits = torch.tensor(self.thresholds, dtype=matches.error.dtype, device=matches.error.device)
        within = matches.error[:, None] <= limits  # NaN is not
        counts = torch.cat(
            [
                torch.tensor([index, self.conditions.index(condition), len(within)], device=within.device),
                within.sum(0),
                matches.kept.sum()[None],
                (within & matches.kept[:, None]).sum(0),
            ]
        )
        self.pairs.append(counts.to(device=self.device, dtype=torch.get_default_dtype()))

    def compute(self) -> tuple[MatchingSummary, ...]:
        """All pairs of all processes together (`all`), then each condition that has pairs, if there are several."""
        pairs = torch.cat(self.pairs) if isinstance(self.pairs, list) and self.pairs else self.pairs
        pairs = torch.as_tensor(pairs, dtype=torch.float64).cpu().view(-1, 4 + 2 * len(self.thresholds))
        pairs = pairs[pairs[:, 0].argsort(stable=True)]
        new = torch.ones(len(pairs), dtype=torch.bool)
        new[1:] = pairs[1:, 0] != pairs[:-1, 0]
        pairs = pairs[new]
        present = [i for i in range(len(self.conditions)) if (pairs[:, 1] == i).any()]
        lines = [self._summarize("all", pairs)]
        if len(present) > 1:
            lines += [self._summarize(self.conditions[i], pairs[pairs[:, 1] == i]) for i in present]
        return tuple(lines)

    def _summarize(self, condition: str, pairs: Tensor) -> MatchingSummary:
        keypoints, *within_kept = pairs[:, 2:].sum(0)
        count = len(self.thresholds)
        within, kept, kept_within = within_kept[:count], within_kept[count], within_kept[count + 1 :]
        return MatchingSummary(
            condition=condition,
            pairs=len(pairs),
            keypoints=(keypoints / len(pairs)).item() if len(pairs) else torch.nan,
            within=tuple((w / keypoints).item() for w in within),
            kept=(kept / len(pairs)).item() if len(pairs) else torch.nan,
            kept_within=tuple((w / kept).item() for w in kept_within),
        )
