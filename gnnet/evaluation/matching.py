"""How well keypoints are matched across conditions, against known correspondences.

Keypoints of image A are matched in image B with a network's features, and with SIFT in the same
table. The first figure counts all keypoints, each put where its descriptor fits best. The second counts the
matches that are kept (by matching back; for SIFT by the ratio test and mutual nearest neighbours),
which is what an estimator of poses receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gnnet.data.batches import Matches, MatchingPair
from gnnet.data.sift import detect_sift, match_sift
from gnnet.evaluation.metrics import first_of_each_index
from gnnet.localization.matching import Matcher
from gnnet.models.pyramid import pair_features

THRESHOLDS: tuple[float, ...] = (1.0, 3.0, 5.0, 10.0)  # pixels within which a match is right


class MatchingSummary(NamedTuple):
    """The pairs of one condition, with all their keypoints taken together.

    `keypoints` and `kept` are means a pair; `within` is the share of all keypoints that are matched
    within each of `THRESHOLDS`, `kept_within` the share of the kept matches. NaN where there are none.
    """

    condition: str
    pairs: int
    keypoints: float
    within: tuple[float, ...]
    kept: float
    kept_within: tuple[float, ...]


@torch.no_grad()
def match_pair(network: nn.Module, pair: MatchingPair, matcher: Matcher = Matcher()) -> Matches:  # noqa: B008
    """Match the keypoints (N,) of image A in image B with a network's features, on its device if it has one."""
    device = next((t.device for t in (*network.parameters(), *network.buffers())), pair.image_a.device)
    a, b = pair_features(network, *(image.to(device)[None] for image in (pair.image_a, pair.image_b)))
    found = matcher.match(a, pair.keypoints_a.to(device)[None], b)
    return Matches(*(values[0] for values in found))


def match_pair_with_sift(pair: MatchingPair, *, upright: bool = False) -> Matches:
    """Match the keypoints (N,) of image A in image B with SIFT: A's detections at the keypoints, with all of B's.

    A keypoint without a detection within half a pixel is not matched: it is put infinitely far away, so it counts
    as wrong. Of several orientations at a keypoint a match that is kept goes first, then the more similar.
    """
    a, b = (detect_sift(image, upright=upright) for image in (pair.image_a, pair.image_b))
    keypoints = pair.keypoints_a.cpu().float()
    nowhere = torch.full_like(keypoints, torch.inf)
    matches = Matches(nowhere, -nowhere[:, 0], torch.zeros(len(keypoints), dtype=torch.bool))
    if not len(keypoints) or not len(a.keypoints) or not len(b.keypoints):
        return matches
    off, owner = _nearest_keypoint(a.keypoints, keypoints)
    found = match_sift(a.descriptors, b.descriptors, b.keypoints)
    # Written in turn, the best last.
    rows = (off <= 0.5).nonzero().squeeze(1)
    rows = rows[(found.similarity + 10 * found.kept.float())[rows].argsort()]
    best = torch.full((len(keypoints),), -1).scatter_reduce(
        0, owner[rows], torch.arange(len(rows)), reduce="amax", include_self=True
    )
    matched = best >= 0
    for column, values in zip(matches, found, strict=True):
        column[matched] = values[rows[best[matched]]]
    return matches


def _nearest_keypoint(detections: Tensor, keypoints: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (M,) from each detection to the nearest keypoint, and that one's row (M,)."""
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [torch.cdist(part, keypoints, compute_mode=exact).min(-1) for part in detections.split(1024)]
    return torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])


class MatchingMetrics(Metric):
    """Shares of right matches for each condition, gathered over processes; every pair counts exactly once.

    A pair that comes again, as a padding sampler repeats pairs, is known by its index.

    Args:
        conditions: all names of pairs' conditions, in the same order in every process.
    """

    pairs: list[Tensor]  # torchmetrics makes one tensor of them when it gathers
    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    def __init__(self, *, conditions: Sequence[str], **kwargs):
        super().__init__(**kwargs)
        self.conditions = tuple(conditions)
        # Flat and of the default type, as what torchmetrics gathers from a process without pairs.
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, matches: Matches, truth: Tensor, *, condition: str, index: int) -> None:
        """Add one pair.

        Args:
            matches: (N,) of its keypoints.
            truth: (N, 2) where they should be matched.
            condition: one of `conditions`.
            index: which pair it is, below 2²⁴ (float32 holds it exactly).

        Raises:
            ValueError: if the condition is not one of `conditions`.
        """
        if condition not in self.conditions:
            raise ValueError(
                f"condition {condition} is not among those given to MatchingMetrics: {', '.join(self.conditions)}"
            )
        error = (matches.keypoints - truth.to(matches.keypoints)).norm(dim=-1)
        within = error[:, None] <= error.new_tensor(THRESHOLDS)  # NaN is not
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
        pairs = first_of_each_index(self.pairs, 4 + 2 * len(THRESHOLDS))
        present = [i for i in range(len(self.conditions)) if (pairs[:, 1] == i).any()]
        lines = [self._summarize("all", pairs)]
        if len(present) > 1:
            lines += [self._summarize(self.conditions[i], pairs[pairs[:, 1] == i]) for i in present]
        return tuple(lines)

    def _summarize(self, condition: str, pairs: Tensor) -> MatchingSummary:
        keypoints, *within_kept = pairs[:, 2:].sum(0)
        count = len(THRESHOLDS)
        within, kept, kept_within = within_kept[:count], within_kept[count], within_kept[count + 1 :]
        return MatchingSummary(
            condition=condition,
            pairs=len(pairs),
            keypoints=(keypoints / len(pairs)).item() if len(pairs) else torch.nan,
            within=tuple((w / keypoints).item() for w in within),
            kept=(kept / len(pairs)).item() if len(pairs) else torch.nan,
            kept_within=tuple((w / kept).item() for w in kept_within),
        )
