"""How refinement is measured: every query is refined from initial poses around the truth, and compared with it.

The validation callback and `evaluate.py` both call `localize_batch`, so their figures agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gnnet.data.batches import LocalizationBatch
from gnnet.geometry.pose import Pose, perturb, pose_errors
from gnnet.localization.refinement import Refinement, RefinementStatus
from gnnet.localization.refiner import Refiner
from gnnet.models.pyramid import FeaturePyramid


class InitialPoses(Protocol):
    """Where refinement starts from: `count` initial poses of each query."""

    @property
    def count(self) -> int: ...

    def draw(self, batch: LocalizationBatch, number: int) -> Pose:
        """Initial pose `number` of each query, `cam_from_world` (B,)."""
        ...

    def farthest(self) -> InitialPoses:
        """The same, as far from the truth as they get."""
        ...

    def describe(self) -> str:
        """Where they lie, in words."""
        ...


@dataclass(frozen=True)
class PerturbedPoses:
    """The true poses, moved at random.

    Args:
        position: metres, the largest offset of the camera centre.
        rotation: degrees, the largest angle.
        count: initial poses of each query.
        seed: seed of the perturbations; each follows from (seed, sample, number of the initial pose).
        exact: offsets are exactly `position` and `rotation`, instead of uniform up to them.
    """

    position: float = 0.3
    rotation: float = 3.0
    count: int = 1
    seed: int = 0
    exact: bool = False

    def draw(self, batch: LocalizationBatch, number: int) -> Pose:
        truth = batch.query.cam_from_world
        poses = []
        for sample, index in enumerate(batch.index.tolist()):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 1009 + number)
            share = torch.ones(2) if self.exact else torch.rand(2, generator=generator)
            position, rotation = (share * torch.tensor([self.position, self.rotation])).tolist()
            poses.append(perturb(truth[sample], position, rotation, generator))
        return Pose.stack(poses)

    def farthest(self) -> PerturbedPoses:
        return replace(self, exact=True)

    def describe(self) -> str:
        return f"initial pose up to {self.position:g} m and {self.rotation:g}° off"


@dataclass(frozen=True)
class ReferencePoses:
    """The pose of each query's reference."""

    count: int = 1

    def draw(self, batch: LocalizationBatch, number: int) -> Pose:
        return batch.reference.cam_from_world

    def farthest(self) -> ReferencePoses:
        return self

    def describe(self) -> str:
        return "initial pose: the reference's"


class LocalizedStarts(NamedTuple):
    """What refinement made of S initial poses, query by query: errors before and after.

    `index` (S,) is unique to query and initial pose; positions in metres between camera centres,
    rotations in degrees, both (S,) float64; a refinement that failed has infinite errors after.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    condition: list[str]
    initial_position: Tensor
    initial_rotation: Tensor
    position: Tensor
    rotation: Tensor


@torch.no_grad()
def localize_batch(
    network: nn.Module, refiner: Refiner, batch: LocalizationBatch, starts: InitialPoses
) -> LocalizedStarts:
    """Refine all initial poses of a batch of queries with the features of a network."""
    return localize_features(refiner, network(batch.query.image), network(batch.reference.image), batch, starts)


@torch.no_grad()
def localize_features(
    refiner: Refiner,
    query: FeaturePyramid,
    reference: FeaturePyramid,
    batch: LocalizationBatch,
    starts: InitialPoses,
) -> LocalizedStarts:
    """As `localize_batch`, for features that are there already."""
    rounds = []
    for number in range(starts.count):
        initial = starts.draw(batch, number)
        refinement = refiner.refine(query, reference, batch, initial)
        before = pose_errors(initial, batch.query.cam_from_world)
        after = refined_errors(refinement, batch.query.cam_from_world)
        rounds.append((batch.index * starts.count + number, *before, *after))
    index, *errors = (torch.cat(column) for column in zip(*rounds, strict=True))
    return LocalizedStarts(index, batch.condition * starts.count, *errors)


def refined_errors(refinement: Refinement, truth: Pose) -> tuple[Tensor, Tensor]:
    """Position (m) and rotation (°) errors (B,) after refinement; infinite where it failed."""
    failed = refinement.status >= RefinementStatus.TOO_FEW_POINTS
    position, rotation = pose_errors(refinement.cam_from_world, truth)
    return position.masked_fill(failed, torch.inf), rotation.masked_fill(failed, torch.inf)
