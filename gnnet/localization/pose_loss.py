"""Pose loss: refinement, unrolled, must bring poses near the truth back to it.

From Sarlin et al., "Back to the feature: Learning robust camera localization from pixels to pose" (CVPR 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.refinement import MAX_DAMPING, MIN_DAMPING, refine_pose, sample_confidences, sample_descriptors
from gnnet.localization.robust import Robust
from gnnet.losses.pair_loss import level_names
from gnnet.losses.term import Loss, PyramidPair, PyramidTerm, uniform
from gnnet.models.pyramid import FeaturePyramid

_MOST_LEVELS = 8  # that a network may have; of the dampings it uses the first
_GAIN = 10.0  # of the dampings' learning rate, as features train with steps that would hardly move them


@dataclass(eq=False, kw_only=True)
class PoseLoss(PyramidTerm):
    """Reprojection error, in pixels, of the poses to which `refine_pose` refines a perturbed true pose.

    Image a is the reference, image b the query. The poses are refined level by level, each from the pose that the
    level before found, which carries no gradient. A level's loss is the mean over the points of
    2(√(1 + e²/4) − 1), which is about e − 2 for an error of e pixels, at most `clamp`, beyond which there is no
    gradient. A pair counts at a level only if the level before ended within `success` of its cells, so that what the
    coarse features cannot solve does not blur the fine ones. The loss is the mean over pairs, and over levels.

    Only pairs whose poses are known take part (`PairBatch.geometry`), with at least `min_points` points that both
    poses, the true one and the initial one, see. Without any the loss is zero.

    The damping λ at the start of each level is learned, one for each level and entry of δ (see `refine_pose`):
    log λ = log λ_min + (log λ_max − log λ_min) · sigmoid(θ), with the limits of `refine_pose`; it begins in the
    middle, at 0.01. It belongs to the loss: a checkpoint holds it, training alone uses it. Refinement with λ
    adapted from the usual start needs no other.

    Args:
        rotation: degrees by which the initial pose is turned, at most.
        position: distance by which it is moved, at most, as a share of the points' mean distance.
        iterations: of refinement at each level. Memory and time grow with it, see `benchmarks/pose_loss.py`.
        robust: cost of a residual in refinement.
        clamp: pixels.
        success: cells of the level.
        min_points: fewer points leave a pair out.
        learn_damping: False keeps λ at its beginning.
        weight, start_step, ramp_steps, levels: see `Scheduled`.

    Raises:
        ValueError: if a limit is out of range.
    """

    rotation: float = 5.0
    position: float = 0.05
    iterations: int = 5
    robust: Robust = field(default_factory=lambda: Robust(kind="cauchy", scale=0.3))
    clamp: float = 50.0
    success: float = 2.0
    min_points: int = 12
    learn_damping: bool = True
    refines_poses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rotation", "position", "iterations", "clamp", "success"):
            if not getattr(self, key) > 0:
                raise ValueError(f"PoseLoss.{key} is {getattr(self, key)}; expected more than zero")
        if self.min_points < 3:
            raise ValueError(f"PoseLoss.min_points is {self.min_points}; expected 3 or more")
        self.theta = nn.Parameter(torch.zeros(_MOST_LEVELS, 6), requires_grad=self.learn_damping)

    def damping(self, levels: int) -> Tensor:
        """λ at the start of each level (levels, 6), coarse to fine.

        Raises:
            ValueError: if there are more levels than dampings.
        """
        if levels > len(self.theta):
            raise ValueError(f"a pyramid of {levels} levels; the pose loss has dampings for {len(self.theta)}")
        return MIN_DAMPING * (MAX_DAMPING / MIN_DAMPING) ** (_GAIN * self.theta[:levels]).sigmoid()

    def forward(self, pair: PyramidPair, *, step: int, generator: torch.Generator | None = None) -> Loss:
        """See `PyramidTerm.forward`. The parts are in pixels, of the pairs that take part, and their share `pairs`.

        `initial` is the loss of the initial pose, `stride8` that of the pose after one level, for all pairs.
        """
        pyramid_a, pyramid_b, batch = pair
        names = ["initial", *level_names(pyramid_a.strides)]
        nothing = pyramid_a.maps[0].new_zeros(())
        parts = dict.fromkeys(["pairs", *names], nothing)
        if batch.geometry is None:
            return _zero(pyramid_a), parts
        points, valid, camera, truth = batch.geometry
        distance = (points.norm(dim=-1) * valid).sum(-1) / valid.sum(-1).clamp(min=1)
        position, rotation = (
            limit * uniform(distance.shape, like=distance, generator=generator)
            for limit in (self.position * distance, self.rotation)
        )
        initial = perturb(truth, position, rotation, generator)
        target, seen = camera.project(truth.transform(points))
        valid = valid & seen & camera.project(initial.transform(points))[1]
        # The host waits for the device here: what needs no refinement costs nothing.
        rows = (valid.sum(-1) >= self.min_points).nonzero().squeeze(1)
        parts["pairs"] = nothing + len(rows) / len(points)
        if len(rows) == 0:
            return _zero(pyramid_a), parts
        points, valid, target, camera = points[rows], valid[rows], target[rows], camera[rows]
        poses = [initial[rows]]
        if len(rows) < len(distance):
            pyramid_a, pyramid_b = (pyramid.each(lambda m: m[rows]) for pyramid in (pyramid_a, pyramid_b))
        described = sample_descriptors(pyramid_a, batch.keypoints_a[rows])
        confidences = sample_confidences(pyramid_a, batch.keypoints_a[rows])
        for level, (descriptors, described_here) in enumerate(zip(*described, strict=True)):
            refined = refine_pose(
                pyramid=pyramid_b.select([level]),
                descriptors=(descriptors,),
                descriptor_valid=(described_here,),
                points=points,
                valid=valid,
                camera=camera,
                confidences=None if confidences is None else (confidences[level],),
                initial=Pose(poses[-1].rotation.detach(), poses[-1].translation.detach()),
                robust=self.robust,
                iterations=self.iterations,
                initial_damping=self.damping(len(pyramid_a.maps))[level : level + 1],
                min_points=self.min_points,
                step_stds=0.0,
            )
            poses.append(refined.cam_from_world)
        errors = [reprojection_error(pose, points, valid, camera, target) for pose in poses]
        parts |= {name: error.detach().mean() for name, error in zip(names, errors, strict=True)}
        return self._staged(errors[1:], pyramid_a.strides), parts

    def _staged(self, errors: list[Tensor], strides: Sequence[int]) -> Tensor:
        """Mean over levels and pairs of the levels' errors (P,), where the level before succeeded."""
        total, succeeded = torch.zeros_like(errors[0]), torch.ones_like(errors[0], dtype=torch.bool)
        for error, stride in zip(errors, strides, strict=True):
            total = total + torch.where(succeeded, error.clamp(max=self.clamp), 0)
            succeeded = error.detach() < self.success * stride
        return total.mean() / len(errors)


def reprojection_error(pose: Pose, points: Tensor, valid: Tensor, camera: Camera, target: Tensor) -> Tensor:
    """Mean robust distance (B,) in pixels of the projections of valid points (B, N, 3) from `target` (B, N, 2)."""
    xy, _ = camera.project(pose.transform(points))
    cost, _ = Robust("barron", scale=2.0, alpha=1.0).cost_and_weight((xy - target).square().sum(-1))
    return torch.where(valid, cost / 4, 0).sum(-1) / valid.sum(-1).clamp(min=1)


def _zero(pyramid: FeaturePyramid) -> Tensor:
    """Zero with a gradient of zero, so that a batch without any pair to refine can be a training step too."""
    maps = (*pyramid.maps, *(pyramid.confidences or ()))
    return sum((m[:, :, :1, :1].sum() * 0 for m in maps), maps[0].new_zeros(()))
