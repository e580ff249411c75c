"""Settings of feature-metric refinement, and its uses: one reference in validation, hypotheses of a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gnnet.data.batches import LocalizationBatch
from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import Gradient
from gnnet.geometry.pose import Pose
from gnnet.localization.hypotheses import Hypothesis
from gnnet.localization.map import Observations
from gnnet.localization.refinement import Refinement, refine_pose, sample_descriptors
from gnnet.localization.robust import Robust
from gnnet.models.pyramid import FeaturePyramid


@dataclass(frozen=True)
class Refiner:
    """Settings of feature-metric refinement, see `refine_pose`.

    Args:
        robust: cost of a residual.
        gradient: how gradients of the feature maps are taken.
        iterations: limit on each level.
        min_points: fewer valid points fail a query.
        levels: pyramid levels to use, by position; 0 is the coarsest. None uses all.
        points: limit on the observations that one refinement uses.
        hypotheses: limit on the clusters of covisible references that are refined; the lowest final cost wins.

    Raises:
        ValueError: if `points` or `hypotheses` is less than one.
    """

    robust: Robust = field(default_factory=lambda: Robust(kind="cauchy", scale=0.3))
    gradient: Gradient = "central"
    iterations: int = 20
    min_points: int = 12
    levels: Sequence[int] | None = None
    points: int = 2048
    hypotheses: int = 3

    def __post_init__(self) -> None:
        if self.points < 1 or self.hypotheses < 1:
            raise ValueError(f"{self.points} points and {self.hypotheses} hypotheses to refine; expected 1 or more")

    def refine(
        self, query: FeaturePyramid, reference: FeaturePyramid, batch: LocalizationBatch, initial: Pose
    ) -> Refinement:
        """Refine `initial`, `cam_from_world` (B,) of the queries, on the points that each one's reference observes.

        Args:
            query: maps of `batch.query.image`.
            reference: maps of `batch.reference.image`.
            batch: B queries with one reference each.
            initial: poses to start from, in the world of the batch.
        """
        descriptors, valid = sample_descriptors(reference, batch.keypoints)
        return self._refine(query, descriptors, valid, batch.points, batch.valid, batch.query.camera, initial)

    def refine_hypotheses(
        self, hypotheses: Sequence[Hypothesis], observations: Observations, pyramid: FeaturePyramid, camera: Camera
    ) -> Refinement:
        """Refine the poses of H hypotheses of one query together, each on observations of its own references.

        Args:
            hypotheses: H of them, each with a pose.
            observations: (M,) that the hypotheses tell of.
            pyramid: maps of the query, a batch of one.
            camera: of the query, unbatched.

        Returns:
            Poses (H,) in the map's world, float64 on the CPU.
        """
        device = pyramid.maps[0].device
        chosen = [h.observations(observations, self.points) for h in hypotheses]
        widest = max(1, *map(len, chosen))
        index = torch.stack([torch.nn.functional.pad(rows, (0, widest - len(rows))) for rows in chosen])
        valid = torch.arange(widest) < torch.tensor([len(rows) for rows in chosen])[:, None]
        # In a world with its origin near by, float32 is exact enough.
        poses = Pose.stack([h.cam_from_world for h in hypotheses if h.cam_from_world is not None])
        origin = poses[0].center()
        refined = self._refine(
            pyramid,
            tuple(d[index].to(device) for d in observations.descriptors),
            tuple(v[index].to(device) for v in observations.valid.unbind(-1)),
            (observations.points[index] - origin).float().to(device),
            valid.to(device),
            Camera.stack([camera] * len(hypotheses)).to(device=device, dtype=torch.float32),
            poses.shifted(origin).to(device=device, dtype=torch.float32),
        )
        back = refined.cam_from_world.to(device="cpu", dtype=torch.float64)
        # A float32 rotation is no rotation to the digits of float64, which far from the origin are metres.
        back = Pose.from_quaternion(back.quaternion(), back.translation)
        return replace(refined, cam_from_world=back.shifted(-origin))

    def _refine(
        self, pyramid: FeaturePyramid, descriptors: tuple[Tensor, ...], descriptor_valid: tuple[Tensor, ...],
        points: Tensor, valid: Tensor, camera: Camera, initial: Pose,
    ) -> Refinement:  # fmt: skip
        levels = list(range(len(pyramid.maps)) if self.levels is None else self.levels)
        return refine_pose(
            pyramid=pyramid.select(levels), descriptors=tuple(descriptors[i] for i in levels),
            descriptor_valid=tuple(descriptor_valid[i] for i in levels), points=points, valid=valid, camera=camera,
            initial=initial, robust=self.robust, gradient=self.gradient, iterations=self.iterations,
            min_points=self.min_points,
        )  # fmt: skip
