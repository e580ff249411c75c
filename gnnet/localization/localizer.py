"""Feature-metric localization of a query against a reference, as training, evaluation and notebooks call it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gnnet.data.batches import LocalizationBatch
from gnnet.geometry.interpolation import Gradient
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.refinement import Refinement, refine_pose, sample_descriptors
from gnnet.localization.robust import Robust
from gnnet.models.pyramid import FeaturePyramid


@dataclass(frozen=True)
class StartPoses:
    """Where refinement starts from: the reference's pose, or the true pose moved at random.

    Args:
        kind: `perturbation` of the truth, or `reference`.
        position: metres, the largest offset of the camera centre.
        rotation: degrees, the largest angle.
        count: starts a query.
        seed: of the perturbations; each follows from (seed, sample, number of the start).
        exact: offsets are exactly `position` and `rotation`, not uniform up to them.
    """

    kind: str = "perturbation"
    position: float = 0.3
    rotation: float = 3.0
    count: int = 1
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("perturbation", "reference"):
            raise ValueError(f"start poses are of kind 'perturbation' or 'reference', not {self.kind!r}")

    def draw(self, batch: LocalizationBatch, number: int) -> Pose:
        """Start `number` of each query, `cam_from_world` (B,)."""
        if self.kind == "reference":
            return batch.reference.cam_from_world
        truth = batch.query.cam_from_world
        starts = []
        for sample, index in enumerate(batch.index.tolist()):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 1009 + number)
            share = torch.ones(2) if self.exact else torch.rand(2, generator=generator)
            position, rotation = (share * torch.tensor([self.position, self.rotation])).tolist()
            starts.append(perturb(truth[sample], position, rotation, generator))
        return Pose.stack(starts)


@dataclass(frozen=True)
class Localizer:
    """Settings of the feature-metric refinement, see `gnnet.localization.refinement.refine_pose`.

    Args:
        robust: cost of a residual.
        gradient: how gradients of the feature maps are taken.
        iterations: limit on each level.
        min_points: fewer valid points fail a query.
    """

    robust: Robust
    gradient: Gradient = "central"
    iterations: int = 20
    min_points: int = 12

    def features(self, network: nn.Module, batch: LocalizationBatch) -> tuple[FeaturePyramid, FeaturePyramid]:
        """Pyramids of the query and the reference images."""
        return network(batch.query.image), network(batch.reference.image)

    def refine(
        self, query: FeaturePyramid, reference: FeaturePyramid, batch: LocalizationBatch, initial: Pose
    ) -> Refinement:
        """Refine `initial` (cam_from_world of the queries, batch shape (B,)) on the reference's points."""
        in_reference = batch.reference.cam_from_world.transform(batch.points)
        keypoints, visible = batch.reference.camera.project(in_reference)
        descriptors, descriptor_valid = sample_descriptors(reference, keypoints)
        return refine_pose(
            pyramid=query,
            descriptors=descriptors,
            descriptor_valid=descriptor_valid,
            points=batch.points,
            valid=batch.valid & visible,
            camera=batch.query.camera,
            initial=initial,
            robust=self.robust,
            gradient=self.gradient,
            iterations=self.iterations,
            min_points=self.min_points,
        )
