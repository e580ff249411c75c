"""Where a query's pose before refinement comes from: one class each, which `conf/localizer/` names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gnnet.data.batches import Matches
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.hypotheses import Hypothesis, pose_hypotheses
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.map import Observations, References
from gnnet.localization.matching import Matcher
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.query import Query
from gnnet.localization.result import Status
from gnnet.localization.stopwatch import Stopwatch


@dataclass(frozen=True, eq=False)
class Proposal:
    """Poses of a query before refinement.

    Args:
        status, reason: why there is no pose, or `LOCALIZED` and how the best was found.
        hypotheses: with poses, the best first; empty if there is none.
        matches: (M,) of the references' observations with the query; None if nothing was to be matched.
        observations: (M,) that were matched; None if nothing was.
        max_error: pixels, the largest reprojection error of a match that is an inlier.
        joint: whether the matches are exact enough to take part in the refinement, beside the features.
        camera: the query's with the focal length that was estimated; None where none was.
    """

    status: Status
    reason: str
    hypotheses: tuple[Hypothesis, ...] = ()
    matches: Matches | None = None
    observations: Observations | None = None
    max_error: float = 0.0
    joint: bool = False
    camera: Camera | None = None


class PoseSource(Protocol):
    """Gives a query's poses before refinement.

    `name` is what tables call these poses; `takes_initial`, whether the caller must give an initial pose;
    `local_features` describe the map's points, None if the network's maps do; `companion` are the local features of
    a second map of the same references, None if there is none.
    """

    @property
    def name(self) -> str: ...
    @property
    def takes_initial(self) -> bool: ...
    @property
    def local_features(self) -> LocalFeatures | None: ...
    @property
    def companion(self) -> LocalFeatures | None: ...

    def propose(self, query: Query, references: References, best: int, watch: Stopwatch) -> Proposal:
        """Poses of a query.

        Args:
            query: with features.
            references: that the query is compared with, one at least.
            best: limit on the references of a cluster of covisible ones whose matches PnP uses.
            watch: told when a stage ends.
        """
        ...


@dataclass(frozen=True)
class PoseFromMatches:
    """Poses by PnP in RANSAC from matches of the references' observations, one for each cluster of covisible ones.

    Args:
        matcher: finds the observations in the query: in its feature maps, or among its own local features.
        solver: finds a pose from matches.
    """

    matcher: Matcher | LocalFeatures = field(default_factory=lambda: Matcher(ratio=0.9))
    solver: PoseSolver = field(default_factory=PoseSolver)
    name: ClassVar[str] = "PnP"
    takes_initial: ClassVar[bool] = False
    companion: ClassVar[None] = None

    @property
    def local_features(self) -> LocalFeatures | None:
        return self.matcher.local_features

    def propose(self, query: Query, references: References, best: int, watch: Stopwatch) -> Proposal:
        observations, map = references.observations, references.map
        matches = self.matcher.match_query(observations, query, map.image_sizes)
        watch.lap("matching")
        if not matches.kept.any():
            return Proposal(Status.NO_MATCHES, "nothing matches", matches=matches)
        camera, estimated = query.camera, None
        if not query.focal_known:
            origin = observations.points.mean(0)
            estimated = self.solver.estimate_focal(
                matches.keypoints[matches.kept], observations.points[matches.kept] - origin, camera
            )
            if estimated is None:
                return Proposal(Status.NO_POSE, "no focal length agrees with the matches", matches=matches)
            camera = estimated
        hypotheses = pose_hypotheses(
            matches, observations, map.shared(references.rows), references.rows, camera, self.solver, best=best
        )
        watch.lap("pose")
        first, posed = hypotheses[0], tuple(h for h in hypotheses if h.cam_from_world is not None)
        status = Status.LOCALIZED if posed else Status.NO_POSE
        return Proposal(
            status, first.reason, posed, matches, observations, self.solver.max_error, camera=estimated
        )


@dataclass(frozen=True)
class HybridPose:
    """Poses from matches of local features where enough of them agree, else from the network's features.

    Local features such as SIFT's are placed more exactly than matches in feature maps, and cost less to match; by
    night or in snow few of them match. Those that a pose was found from take part in its refinement.

    Args:
        local: finds poses from local features, which describe the points of a second map.
        dense: finds poses from the network's features.
        enough: inliers of local features from which on their pose is taken.

    Raises:
        ValueError: if `local` does not match local features, or `dense` does.
    """

    local: PoseFromMatches = field(default_factory=lambda: PoseFromMatches(LocalFeatures()))
    dense: PoseFromMatches = field(default_factory=PoseFromMatches)
    enough: int = 50
    name: ClassVar[str] = "PnP"
    takes_initial: ClassVar[bool] = False
    local_features: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.local.local_features is None or self.dense.local_features is not None:
            raise ValueError("a hybrid pose takes LocalFeatures in `local.matcher` and a Matcher in `dense.matcher`")

    @property
    def companion(self) -> LocalFeatures | None:
        return self.local.local_features

    def propose(self, query: Query, references: References, best: int, watch: Stopwatch) -> Proposal:
        assert references.companion is not None, "the localizer gives the second map"
        found = self.local.propose(query, references.companion, best, watch)
        if not found.hypotheses or found.hypotheses[0].count < self.enough:
            dense = self.dense.propose(query, references, best, watch)
            if dense.hypotheses or not found.hypotheses:
                return dense
        name = self.local.local_features.name if self.local.local_features else ""
        named = tuple(replace(h, reason=f"{name}: {h.reason}") for h in found.hypotheses)
        return replace(found, reason=named[0].reason, hypotheses=named, joint=True)


class NearestPose:
    """The pose of the best reference."""

    name = "nearest"
    takes_initial = False
    local_features = None
    companion = None

    def propose(self, query: Query, references: References, best: int, watch: Stopwatch) -> Proposal:
        pose = references.map.poses[int(references.rows[0])]
        return _unmatched(pose, references.rows, "the nearest reference's pose")


class GivenPose:
    """The initial pose that the caller gives."""

    name = "given"
    takes_initial = True
    local_features = None
    companion = None

    def propose(self, query: Query, references: References, best: int, watch: Stopwatch) -> Proposal:
        if query.initial is None:
            return Proposal(Status.NO_POSE, "no initial pose")
        return _unmatched(query.initial.to(torch.float64), references.rows, "the pose given")


def _unmatched(pose: Pose, rows: Tensor, reason: str) -> Proposal:
    hypothesis = Hypothesis(pose, rows, rows, torch.zeros(0, dtype=torch.bool), 0, reason)
    return Proposal(Status.LOCALIZED, reason, (hypothesis,))
