"""Pose hypotheses, one for each cluster of covisible references, and the choice among the refined ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gnnet.data.batches import Matches
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.map import Observations
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import Refinement, RefinementStatus
from gnnet.localization.result import Localization
from gnnet.sampling import evenly

KEPT_INLIERS = 0.9  # share of the inliers that a refined pose must keep, or it is refused


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A pose that the references of one cluster suggest.

    Args:
        cam_from_world: unbatched, float64; None if no pose was found.
        rows: (K,) rows of the map, the cluster's references.
        inliers: (M,) bool, which of all observations agree with the pose; empty if nothing was matched.
        count: number of inliers.
        reason: how the pose was found, or why there is none, in words.
    """

    cam_from_world: Pose | None
    rows: Tensor
    inliers: Tensor
    count: int
    reason: str

    def observations(self, observations: Observations, limit: int) -> Tensor:
        """At most `limit` rows of the observations by the cluster's references: inliers first, then evenly others."""
        mine = torch.isin(observations.reference, self.rows)
        first = (mine & self.inliers) if len(self.inliers) else torch.zeros_like(mine)
        inliers, others = first.nonzero().squeeze(1), (mine & ~first).nonzero().squeeze(1)
        inliers = inliers[evenly(len(inliers), limit)]
        return torch.cat([inliers, others[evenly(len(others), limit - len(inliers))]])


def pose_hypotheses(
    matches: Matches,
    observations: Observations,
    shared: Tensor,
    rows: Tensor,
    camera: Camera,
    solver: PoseSolver,
    *,
    best: int | None = None,
) -> list[Hypothesis]:
    """One pose for each cluster of covisible references, those with most inliers first.

    Of a cluster only the `best` references by number of matches are used: those that see the query's
    points from elsewhere match fewer, and less exactly. A cluster without a pose comes last, with its reason.

    Args:
        matches: (M,) of the observations with the query, keypoints in its pixels.
        observations: (M,) of the references `rows`.
        shared: (K, K) points that these references observe in common.
        rows: (K,) rows of the map.
        camera: of the query, unbatched.
        solver: finds a pose from matches.
        best: references of a cluster to use; None uses all.
    """
    found, kept = [], matches.kept
    counts = (observations.reference[kept][:, None] == rows).sum(0)
    # PnP solves for a translation, which far from the world's origin changes much with a tiny rotation. So the
    # world is moved to an origin among the points.
    origin = observations.points.mean(0) if len(observations.points) else torch.zeros(3, dtype=torch.float64)
    for cluster in covisibility_clusters(shared):
        members = rows[cluster[counts[cluster].sort(descending=True, stable=True).indices[:best]]]
        used = (kept & torch.isin(observations.reference, members)).nonzero().squeeze(1)
        result = solver.solve(matches.keypoints[used], observations.points[used] - origin, camera)
        pose = None if result.cam_from_world is None else result.cam_from_world.shifted(-origin)
        inliers = torch.zeros_like(kept)
        inliers[used[result.inliers]] = True
        found.append(Hypothesis(pose, members, inliers, int(result.inliers.sum()), result.reason))
    return sorted(found, key=lambda h: (h.cam_from_world is None, -h.count))


def covisibility_clusters(shared: Tensor) -> list[Tensor]:
    """Positions of the references of each connected component; an edge joins two that share points."""
    count, labels = connected_components(csr_array((shared > 0).numpy()), directed=False)
    return [torch.from_numpy(np.flatnonzero(labels == label)) for label in range(count)]


def choose_hypothesis(
    result: Localization,
    hypotheses: Sequence[Hypothesis],
    refinement: Refinement,
    matches: Matches | None,
    observations: Observations,
    camera: Camera,
    max_error: float,
) -> Localization:
    """The refined pose of least cost that has enough inliers, unless it lost against its initial pose.

    It has lost if its cost rose, or, where there are matches, if less than `KEPT_INLIERS` of the inliers
    agree with it. Then the pose in `result` stays.

    Args:
        result: with the pose of the first hypothesis.
        hypotheses: H of them, with poses.
        refinement: of these (H,), in the map's world.
        matches: (M,) of the observations with the query; None if nothing was matched.
        observations: (M,).
        camera: of the query, unbatched.
        max_error: pixels, the largest reprojection error of an inlier.
    """
    best, why = None, "refinement failed: " + refinement.reason(0)
    initial, final = refinement.initial_cost.tolist(), refinement.final_cost.tolist()
    most = max(h.count for h in hypotheses)
    for i, hypothesis in enumerate(hypotheses):
        pose = refinement.cam_from_world[i]
        if int(refinement.status[i]) in (RefinementStatus.TOO_FEW_POINTS, RefinementStatus.SINGULAR):
            continue
        count = _inliers(pose, matches, observations, hypothesis, camera, max_error)
        if not final[i] <= initial[i] or count < KEPT_INLIERS * hypothesis.count:
            if i == 0:
                costs = f"cost {initial[i]:.4g} to {final[i]:.4g}"
                why = f"refinement lost ({costs}, inliers {hypothesis.count} to {count})"
            continue
        if 2 * count >= most and (best is None or final[i] < final[best[0]]):
            best = i, count
    if best is None:
        return replace(result, reason=f"{result.reason}; {why}", initial_cost=initial[0], final_cost=final[0])
    i, count = best
    return replace(
        result,
        reason=f"{hypotheses[i].reason}; {refinement.reason(i)}",
        initial=hypotheses[i].cam_from_world,
        cam_from_world=refinement.cam_from_world[i],
        refined=True,
        inliers=count,
        initial_cost=initial[i],
        final_cost=final[i],
        covariance=refinement.covariance[i].double().cpu(),
    )


def _inliers(
    pose: Pose, matches: Matches | None, observations: Observations, hypothesis: Hypothesis, camera: Camera,
    max_error: float,
) -> int:  # fmt: skip
    """How many matches of the hypothesis' references agree with a pose."""
    if matches is None:
        return 0
    used = matches.kept & torch.isin(observations.reference, hypothesis.rows)
    xy, valid = camera.project(pose.transform(observations.points[used]))
    return int((valid & ((xy - matches.keypoints[used]).norm(dim=-1) <= max_error)).sum())
