"""How localization is measured: refine every query from its start poses, and compare with the truth.

The validation callback and `evaluate.py` both call `localize_batch`, so their figures agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnet.data.batches import LocalizationBatch
from gnnet.evaluation.starts import StartPoses
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.localizer import Localizer
from gnnet.localization.refinement import Refinement, RefinementStatus
from gnnet.models.pyramid import FeaturePyramid


class LocalizedStarts(NamedTuple):
    """What refinement made of S start poses, query by query: errors before and after.

    `index` (S,) is unique to query and start; positions in metres between camera centres,
    rotations in degrees, both (S,) float64; a start that failed has infinite errors after.
    """

    index: Tensor
    condition: list[str]
    initial_position: Tensor
    initial_rotation: Tensor
    position: Tensor
    rotation: Tensor


@torch.no_grad()
def localize_batch(
    network: nn.Module, localizer: Localizer, batch: LocalizationBatch, starts: StartPoses
) -> LocalizedStarts:
    """Refine all start poses of a batch of queries with the network's features."""
    query, reference = localizer.features(network, batch)
    return localize_features(localizer, query, reference, batch, starts)


@torch.no_grad()
def localize_features(
    localizer: Localizer,
    query: FeaturePyramid,
    reference: FeaturePyramid,
    batch: LocalizationBatch,
    starts: StartPoses,
) -> LocalizedStarts:
    """As `localize_batch`, for features that are there already."""
    rounds = []
    for number in range(starts.count):
        initial = starts.draw(batch, number)
        refinement = localizer.refine(query, reference, batch, initial)
        before = pose_errors(initial, batch.query.cam_from_world)
        after = refined_errors(refinement, batch.query.cam_from_world)
        rounds.append((batch.index * starts.count + number, *before, *after))
    index, *errors = (torch.cat(column) for column in zip(*rounds, strict=True))
    return LocalizedStarts(index, batch.condition * starts.count, *errors)


def refined_errors(refinement: Refinement, truth: Pose) -> tuple[Tensor, Tensor]:
    """Position (m) and rotation (°) errors (B,) after refinement; infinite where it failed."""
    failed = refinement.status >= RefinementStatus.TOO_FEW_POINTS
    return tuple(e.masked_fill(failed, torch.inf) for e in pose_errors(refinement.cam_from_world, truth))
