"""Pose hypotheses, one for each cluster of covisible references, and the choice among the refined ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gnnet.geometry.pose import Pose
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import Refinement, RefinementStatus
from gnnet.localization.result import Localization
from gnnet.localization.rig import Matched

COST_TOLERANCE = 2.0  # standard errors by which the mean cost may rise: less is noise
# Factor by which the matches' mean squared reprojection error, cut at `max_error`, may rise. At the true pose it is
# above its least by a share of 3 / N, as the least is fitted to N errors with six numbers; four times that is allowed.
ERROR_TOLERANCE, ERROR_TOLERANCE_OF_FEW = 1.1, 12.0
AGREEING = 4  # inliers of a cluster that agrees with a rig's pose: three fix a pose, one more confirms it


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A pose that the references of one cluster suggest.

    Args:
        cam_from_world: unbatched, float64; None if no pose was found. Of a rig it is `rig_from_world`.
        used: (M,) bool, the matched observations that the pose was sought from: those of the cluster's references
            with most matches; empty if nothing was matched.
        cluster: (K,) rows of the map, all references of the cluster: refinement uses what they observe.
        inliers: (M,) bool, which of the matched observations agree with the pose; empty if nothing was matched.
        count: number of inliers.
        reason: how the pose was found, or why there is none, in words.
    """

    cam_from_world: Pose | None
    used: Tensor
    cluster: Tensor
    inliers: Tensor
    count: int
    reason: str


def pose_hypotheses(
    matched: Matched, shared: Tensor, rows: Tensor, solver: PoseSolver, *, best: int | None = None
) -> list[Hypothesis]:
    """One pose for each cluster of covisible references, those with most inliers first.

    Images of a rig look to several sides, where their references share no points. So of several images there is one
    pose more, from all references together; its cluster are those whose clusters agree with it.

    PnP uses only the `best` references of a cluster by number of matches: those that see the query's points from
    elsewhere match fewer, and less exactly. A cluster without a pose comes last, with its reason.

    Args:
        matched: the observations of the references `rows`, matched with the query.
        shared: (K, K) points that these references observe in common.
        rows: (K,) rows of the map.
        solver: finds a pose from matches.
        best: references of a cluster to use for each image; None uses all.
    """
    observations, kept = matched.observations, matched.matches.kept
    mine = [matched.view == view for view in range(len(matched.rig.cameras))]
    counts = [(observations.reference[kept & view][:, None] == rows).sum(0) for view in mine]
    # PnP solves for a translation, which far from the world's origin changes much with a tiny rotation. So the
    # world is moved to an origin among the points.
    origin = observations.points.mean(0) if len(observations.points) else torch.zeros(3, dtype=torch.float64)

    def solve(cluster: Tensor) -> Hypothesis:
        used = torch.zeros_like(kept)
        for view, count in zip(mine, counts, strict=True):
            members = rows[cluster[count[cluster].sort(descending=True, stable=True).indices]][:best]
            used |= kept & view & torch.isin(observations.reference, members)
        chosen = used.nonzero().squeeze(1)
        result = solver.solve(
            matched.matches.keypoints[chosen], observations.points[chosen] - origin, matched.rig, matched.view[chosen]
        )
        pose = None if result.cam_from_world is None else result.cam_from_world.shifted(-origin)
        inliers = torch.zeros_like(kept)
        inliers[chosen[result.inliers]] = True
        return Hypothesis(pose, used, rows[cluster], inliers, int(result.inliers.sum()), result.reason)

    clusters = covisibility_clusters(shared)
    found = [solve(cluster) for cluster in clusters]
    if len(mine) > 1 and len(clusters) > 1:
        whole = solve(torch.arange(len(rows)))
        agreeing = [c for c in clusters if _inliers_of(whole, observations.reference, rows[c]) >= AGREEING]
        if len(agreeing) > 1:
            found.insert(0, replace(whole, cluster=rows[torch.cat(agreeing)]))
    return sorted(found, key=lambda h: (h.cam_from_world is None, -h.count))


def _inliers_of(hypothesis: Hypothesis, reference: Tensor, cluster: Tensor) -> int:
    """How many inliers are by references of a cluster."""
    return int((hypothesis.inliers & torch.isin(reference, cluster)).sum())


def covisibility_clusters(shared: Tensor) -> list[Tensor]:
    """Positions of the references of each connected component; an edge joins two that share points."""
    count, labels = connected_components(csr_array((shared > 0).numpy()), directed=False)
    return [torch.from_numpy(np.flatnonzero(labels == label)) for label in range(count)]


def choose_hypothesis(
    result: Localization,
    hypotheses: Sequence[Hypothesis],
    refinement: Refinement,
    matched: Matched | None,
    max_error: float,
) -> Localization:
    """The pose with most inliers among the hypotheses', each refined unless its refinement failed or lost.

    A refinement has failed if it did not converge. It has lost if the mean cost of the points that count both
    before and after rose by more than `COST_TOLERANCE` standard errors, or the robust reprojection error of the
    matches by more than `ERROR_TOLERANCE` allows. Then the pose before it stands.

    Args:
        result: with the pose of the first hypothesis.
        hypotheses: H of them, with poses.
        refinement: of these (H,), in the map's world.
        matched: the observations matched with the query; None if nothing was matched.
        max_error: pixels, the largest reprojection error of an inlier.
    """
    costs = refinement.initial_cost, refinement.final_cost, refinement.cost_noise
    initial, final, noise = (x.tolist() for x in costs)
    converged = refinement.converged.tolist()
    results = []
    for i, hypothesis in enumerate(hypotheses):
        assert hypothesis.cam_from_world is not None, "hypotheses without a pose are not refined"
        pose, why = refinement.cam_from_world[i], refinement.reason(i)
        before, _ = _reprojection(hypothesis.cam_from_world, matched, hypothesis, max_error)
        error, count = _reprojection(pose, matched, hypothesis, max_error)
        allowed = ERROR_TOLERANCE + ERROR_TOLERANCE_OF_FEW / max(1, hypothesis.count)
        kept = converged[i]
        if not kept:
            why = f"refinement failed: {why}"
        elif not final[i] - initial[i] <= COST_TOLERANCE * noise[i]:
            kept, why = False, f"refinement lost (cost {initial[i]:.4g} to {final[i]:.4g})"
        elif not error <= allowed * before:
            kept, why = False, f"refinement lost (reprojection error {before**0.5:.3g} to {error**0.5:.3g} pixels)"
        results.append(
            replace(
                result,
                reason=f"{hypothesis.reason}; {why}",
                initial=hypothesis.cam_from_world,
                cam_from_world=pose if kept else hypothesis.cam_from_world,
                refined=kept,
                ended=RefinementStatus(int(refinement.status[i])),
                inliers=count if kept else hypothesis.count,
                initial_cost=initial[i],
                final_cost=final[i],
                covariance=refinement.covariance[i].double().cpu() if kept else None,
            )
        )
    return max(results, key=lambda r: r.inliers)  # of equal ones the first


def _reprojection(
    pose: Pose, matched: Matched | None, hypothesis: Hypothesis, max_error: float
) -> tuple[float, int]:
    """Mean squared reprojection error, each cut at `max_error`, of a hypothesis' matches, and how many are inliers."""
    if matched is None:
        return 0.0, 0
    squared = matched.squared_errors(pose)[hypothesis.used]
    return squared.clamp(max=max_error**2).mean().item(), int((squared <= max_error**2).sum())
