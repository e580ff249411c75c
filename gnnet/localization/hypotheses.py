"""Poses that matches suggest, one a cluster of covisible references, and which of the refined ones to take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.map import Observations
from gnnet.localization.matching import KeypointMatches
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import Refinement, RefinementStatus
from gnnet.localization.result import Localization

KEPT_INLIERS = 0.9  # a refined pose keeps so many of the inliers at least, or it is none


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A pose that the references of one cluster suggest.

    Args:
        cam_from_world: unbatched, float64; None where there is none.
        rows: (K,) of the map, the cluster's references.
        inliers: (M,) of all observations, which agree; empty where nothing was matched.
        count: of inliers.
        reason: what came of it, in words.
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
        chosen = _evenly(first.nonzero().squeeze(1), limit)
        return torch.cat([chosen, _evenly((mine & ~first).nonzero().squeeze(1), limit - len(chosen))])


def _evenly(rows: Tensor, limit: int) -> Tensor:
    if len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit).round().long()] if limit > 0 else rows[:0]


def pose_hypotheses(
    keypoints: Tensor,
    kept: Tensor,
    observations: Observations,
    shared: Tensor,
    rows: Tensor,
    camera: Camera,
    solver: PoseSolver,
    *,
    best: int | None = None,
) -> list[Hypothesis]:
    """One pose a cluster of covisible references, those with most inliers first; never none in the list.

    Of a cluster only the `best` references by number of matches are used: those that see the query's
    points from elsewhere match fewer, and less exactly.

    Args:
        keypoints: (M, 2) pixels of the query, one an observation.
        kept: (M,) which are matches.
        observations: of the references `rows`.
        shared: (K, K) points that these observe in common.
        rows: (K,) of the map.
        camera: of the query, unbatched.
        solver: of the poses.
        best: references of a cluster; None uses all.
    """
    found = []
    counts = (observations.reference[kept][:, None] == rows).sum(0)
    # PnP solves for a translation, which far from the world's origin even a tiny rotation changes much: around its own.
    origin = observations.points.mean(0) if len(observations.points) else torch.zeros(3, dtype=torch.float64)
    for cluster in covisibility_clusters(shared):
        members = rows[cluster[counts[cluster].sort(descending=True, stable=True).indices[:best]]]
        used = (kept & torch.isin(observations.reference, members)).nonzero().squeeze(1)
        result = solver.solve(keypoints[used], observations.points[used] - origin, camera)
        pose = result.cam_from_world
        if pose is not None:
            pose = Pose(pose.rotation, pose.translation - pose.rotation @ origin)
        inliers = torch.zeros_like(kept)
        inliers[used[result.inliers]] = True
        found.append(Hypothesis(pose, members, inliers, int(result.inliers.sum()), result.reason))
    return sorted(found, key=lambda h: (h.cam_from_world is None, -h.count))


def covisibility_clusters(shared: Tensor, minimum: int = 1) -> list[Tensor]:
    """Positions of the references of each connected component, where edges are `minimum` points seen in common."""
    count, labels = connected_components(csr_array((shared >= minimum).numpy()), directed=False)
    return [torch.from_numpy(np.flatnonzero(labels == label)) for label in range(count)]


def choose_hypothesis(
    result: Localization,
    hypotheses: list[Hypothesis],
    refinement: Refinement,
    matches: KeypointMatches | None,
    observations: Observations,
    camera: Camera,
    solver: PoseSolver,
) -> Localization:
    """The refined pose of least cost that has enough inliers, if it has not lost against where it started.

    It has lost if its cost rose, or, where there are matches, if less than `KEPT_INLIERS` of the inliers
    agree with it. Then the pose that stands in `result` stays.

    Args:
        result: with the pose of the first hypothesis.
        hypotheses: B of them.
        refinement: of these (B,), in the map's world.
        matches: of the observations with the query, (M,); None where nothing was matched.
        observations: (M,).
        camera: of the query.
        solver: tells what an inlier is.
    """
    best, why = None, "refinement failed: " + refinement.reason(0)
    initial, final = refinement.initial_cost.tolist(), refinement.final_cost.tolist()
    most = max(h.count for h in hypotheses)
    for i, hypothesis in enumerate(hypotheses):
        pose = refinement.cam_from_world[i]
        if int(refinement.status[i]) in (RefinementStatus.TOO_FEW_POINTS, RefinementStatus.SINGULAR):
            continue
        count = _inliers(pose, matches, observations, hypothesis, camera, solver)
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
        start=hypotheses[i].cam_from_world,
        cam_from_world=refinement.cam_from_world[i],
        refined=True,
        inliers=count,
        initial_cost=initial[i],
        final_cost=final[i],
        covariance=refinement.covariance[i].double().cpu(),
    )


def _inliers(
    pose: Pose, matches: KeypointMatches | None, observations: Observations, hypothesis: Hypothesis, camera: Camera,
    solver: PoseSolver,
) -> int:  # fmt: skip
    """Matches of the hypothesis' references that agree with a pose."""
    if matches is None:
        return 0
    used = matches.kept & torch.isin(observations.reference, hypothesis.rows)
    xy, valid = camera.project(pose.transform(observations.points[used]))
    return int((valid & ((xy - matches.keypoints[used]).norm(dim=-1) <= solver.max_error)).sum())
