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
from gnnet.localization.covariance import SharedTerms, shared_covariance, shared_terms
from gnnet.localization.hypotheses import Hypothesis
from gnnet.localization.map import Observations
from gnnet.localization.normal_equations import MatchTerm
from gnnet.localization.refinement import Refinement, View, refine_pose, sample_confidences, sample_descriptors
from gnnet.localization.rig import Matched, Rig
from gnnet.localization.robust import Robust
from gnnet.models.pyramid import FeaturePyramid
from gnnet.sampling import evenly


@dataclass(frozen=True)
class Refiner:
    """Settings of feature-metric refinement, see `refine_pose`.

    Args:
        robust: cost of a residual.
        gradient: how gradients of the feature maps are taken.
        iterations: limit on each level.
        min_points: fewer valid points fail a query.
        levels: pyramid levels to use, by position; 0 is the coarsest. None uses all. Where matches of local features
            take part, the last of them alone is tried first.
        points: limit on the points that one refinement uses of each image.
        hypotheses: limit on the clusters of covisible references that are refined; that with most inliers wins.
        match_weight: squared residual of features of length one that a squared pixel of a match is worth; 0 leaves
            the matches out.
        match_scale: pixels beyond which a match loses weight (Cauchy's cost).

    Raises:
        ValueError: if a limit is less than one, the matches' weight is negative, or their scale is not positive.
    """

    robust: Robust = field(default_factory=lambda: Robust(kind="cauchy", scale=0.3))
    gradient: Gradient = "central"
    iterations: int = 50
    min_points: int = 12
    levels: Sequence[int] | None = None
    points: int = 16384
    hypotheses: int = 3
    match_weight: float = 0.2
    match_scale: float = 0.25

    def __post_init__(self) -> None:
        if self.points < 1 or self.hypotheses < 1:
            raise ValueError(f"{self.points} points and {self.hypotheses} hypotheses to refine; expected 1 or more")
        if not self.match_weight >= 0 or not self.match_scale > 0:
            raise ValueError(
                f"match_weight {self.match_weight}, match_scale {self.match_scale}; expected 0 or more, and above 0"
            )

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
        confidences = sample_confidences(reference, batch.keypoints)
        view = View(
            query, descriptors, valid, batch.points, batch.valid, batch.query.camera, confidences=confidences
        )
        return self._refine([view], initial)

    def refine_hypotheses(
        self, hypotheses: Sequence[Hypothesis], observations: Sequence[Observations],
        pyramids: Sequence[FeaturePyramid], rig: Rig, *, matched: Matched | None = None, exact: bool = False,
    ) -> Refinement:  # fmt: skip
        """Refine the poses of H hypotheses of one query together, each on the points that its cluster observes.

        Args:
            hypotheses: H of them, each with a pose, of the rig.
            observations: for each image those of its references, described by the network's maps.
            pyramids: maps of each image, a batch of one.
            rig: cameras of the images; one for a query that is one image.
            matched: matches that take part in the cost beside the features; None: features alone.
            exact: whether they are so exact that the finest level alone is tried first.

        Returns:
            Poses (H,) in the map's world, float64 on the CPU; the covariance holds errors that points share, too, see
            `shared_covariance`.
        """
        device = pyramids[0].maps[0].device
        matched = matched if self.match_weight else None
        # In a world with its origin near by, float32 is exact enough.
        poses = Pose.stack([h.cam_from_world for h in hypotheses if h.cam_from_world is not None])
        origin = poses[0].center()
        views, chosen = [], []
        for i in [i for i, seen in enumerate(observations) if len(seen.reference)] or [0]:
            # One residual a point costs half the time of one an observation, and is as exact.
            (seen, row), pyramid, camera = observations[i].by_point(), pyramids[i], rig.cameras[i]
            seen_by = [torch.isin(observations[i].reference, h.cluster) for h in hypotheses]
            index, valid = _padded([row[mine].unique() for mine in seen_by], self.points)
            term = None
            if matched is not None:
                rows, real = _padded([(h.used & (matched.view == i)).nonzero().squeeze(1) for h in hypotheses])
                term = MatchTerm(
                    (matched.observations.points[rows] - origin).float().to(device),
                    matched.matches.keypoints[rows].float().to(device),
                    (self.match_weight * real.float()).to(device), Robust("cauchy", self.match_scale),
                )  # fmt: skip
            views.append(View(
                pyramid,
                tuple(d[index].to(device) for d in seen.descriptors),
                tuple(v[index].to(device) for v in seen.valid.unbind(-1)),
                (seen.points[index] - origin).float().to(device),
                valid.to(device),
                Camera.stack([camera] * len(hypotheses)).to(device=device, dtype=torch.float32),
                term,
                None if rig.is_one_camera else rig.cam_from_rig[i].to(device=device, dtype=torch.float32),
                None if seen.confidence is None else seen.confidence[index].to(device).unbind(-1),
            ))  # fmt: skip
            chosen.append((i, seen, index, valid))
        initial = poses.shifted(origin).to(device=device, dtype=torch.float32)
        finest = exact and matched is not None
        refined = self._refine(views, initial, finest=finest)
        if finest and not refined.converged.all():  # the pose was farther off than that level reaches
            refined = self._refine(views, initial)
        back = refined.cam_from_world.to(device="cpu", dtype=torch.float64)
        # A float32 rotation is no rotation to the digits of float64, which far from the origin are metres.
        back = Pose.from_quaternion(back.quaternion(), back.translation)
        level = -1 if self.levels is None else self.levels[-1]

        def shared(hypothesis: int, view: int, seen: Observations, index: Tensor, real: Tensor) -> SharedTerms:
            pyramid, rows = pyramids[view], index[hypothesis]
            pose = rig.cam_from_rig[view] @ back[hypothesis]
            weighs = None if pyramid.confidences is None else pyramid.confidences[level]
            trusted = None if seen.confidence is None else seen.confidence[rows, level].to(device)
            return shared_terms(
                pyramid.maps[level], pyramid.strides[level], seen.descriptors[level][rows].to(device),
                (real[hypothesis] & seen.valid[rows, level]).to(device), (seen.points[rows] - origin).to(device),
                rig.cameras[view].to(device), pose.to(device), self.robust, self.gradient,
                None if rig.is_one_camera else rig.cam_from_rig[view], (weighs, trusted),
            )  # fmt: skip

        common = [shared_covariance([shared(h, *view) for view in chosen]) for h in range(len(hypotheses))]
        covariance = refined.covariance.double().cpu() + torch.stack(common)
        return replace(refined, cam_from_world=back.shifted(-origin), covariance=covariance)

    def _refine(self, views: Sequence[View], initial: Pose, *, finest: bool = False) -> Refinement:
        levels = list(range(len(views[0].pyramid.maps)) if self.levels is None else self.levels)
        levels = levels[-1:] if finest else levels
        first, *beside = (
            view._replace(
                pyramid=view.pyramid.select(levels), descriptors=tuple(view.descriptors[i] for i in levels),
                descriptor_valid=tuple(view.descriptor_valid[i] for i in levels),
                confidences=view.confidences and tuple(view.confidences[i] for i in levels),
            )
            for view in views
        )  # fmt: skip
        return refine_pose(
            **first._asdict(), beside=beside, initial=initial, robust=self.robust, gradient=self.gradient,
            iterations=self.iterations, min_points=self.min_points,
        )  # fmt: skip


def _padded(chosen: list[Tensor], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Lists of rows as one (H, N), at most `limit` of each, padded with zeros, and which of them are real (H, N)."""
    if limit is not None:
        chosen = [rows[evenly(len(rows), limit)] for rows in chosen]
    widest = max(1, *map(len, chosen))
    index = torch.stack([torch.nn.functional.pad(rows, (0, widest - len(rows))) for rows in chosen])
    return index, torch.arange(widest) < torch.tensor([len(rows) for rows in chosen])[:, None]
