"""Where a query's pose before refinement comes from: one class each, which `conf/localizer/` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.hypotheses import Hypothesis, pose_hypotheses
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.map import References
from gnnet.localization.matching import Matcher
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.query import Query
from gnnet.localization.result import Status
from gnnet.localization.rig import Matched, Rig
from gnnet.localization.stopwatch import Stopwatch


class View(NamedTuple):
    """A query image, the references that it is compared with, one at least, and those named that the map has not."""

    query: Query
    references: References
    unknown: tuple[str, ...] = ()


def rig_of(views: Sequence[View]) -> Rig:
    """The cameras that the images are localized with."""
    queries = [view.query for view in views]
    nowhere = Pose.identity(dtype=torch.float64)
    poses = [nowhere if q.cam_from_rig is None else q.cam_from_rig for q in queries]
    return Rig(tuple(q.camera for q in queries), Pose.stack(poses))


def _rows_of(views: Sequence[View]) -> Tensor:
    """Rows (K,) of the references of all images, none twice."""
    rows = [row for view in views for row in view.references.rows.tolist()]
    return torch.tensor(list(dict.fromkeys(rows)), dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Proposal:
    """Poses of a query, or of a rig, before refinement.

    Args:
        status, reason: why there is no pose, or `LOCALIZED` and how the best was found.
        hypotheses: with poses, the best first; empty if there is none.
        matched: the references' observations, matched with the query; None if nothing was to be matched.
        max_error: pixels, the largest reprojection error of a match that is an inlier.
        exact: whether the matches are local features', which hold the pose within the finest level's reach.
        camera: the query's with the focal length that was estimated; None where none was.
    """

    status: Status
    reason: str
    hypotheses: tuple[Hypothesis, ...] = ()
    matched: Matched | None = None
    max_error: float = 0.0
    exact: bool = False
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

    def propose(self, views: Sequence[View], best: int, watch: Stopwatch) -> Proposal:
        """Poses of a query, which is one image, or several of a rig.

        Args:
            views: with features.
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
        turn: number of references that are matched at a time, the best of retrieval first; None matches all at once.
            Local features, which cost little, always do. In a kitchen, the first four of ten references gave better
            poses than the four with most matches, many of which were wrong.
        certain: number of inliers; a pose with as many ends the matching of further references.

    Raises:
        ValueError: if a number is less than one.
    """

    matcher: Matcher | LocalFeatures = field(default_factory=lambda: Matcher(ratio=0.9))
    solver: PoseSolver = field(default_factory=PoseSolver)
    turn: int | None = 4
    certain: int = 200
    name: ClassVar[str] = "PnP"
    takes_initial: ClassVar[bool] = False
    companion: ClassVar[None] = None

    def __post_init__(self) -> None:
        if (self.turn is not None and self.turn < 1) or self.certain < 1:
            raise ValueError(f"turn {self.turn}, certain {self.certain}; expected 1 or more")

    @property
    def local_features(self) -> LocalFeatures | None:
        return self.matcher.local_features

    def propose(self, views: Sequence[View], best: int, watch: Stopwatch) -> Proposal:
        longest = max(len(view.references.rows) for view in views)
        step = longest if self.turn is None or self.local_features is not None else self.turn
        seen, found = [], []
        for start in range(0, longest, step):
            for view in views:
                rows = view.references.rows[start : start + step]
                seen.append(view.references.observed_by(rows))
                found.append(self.matcher.match_query(seen[-1], view.query, view.references.map.image_sizes))
            order = [k for i in range(len(views)) for k in range(i, len(seen), len(views))]  # image by image
            view_of = torch.tensor([k % len(views) for k in order])
            matched = Matched.of([found[k] for k in order], [seen[k] for k in order], rig_of(views), view_of)
            watch.lap("matching")
            proposal = self._solve(views, matched, best, watch)
            if proposal.hypotheses and proposal.hypotheses[0].count >= self.certain:
                break
        return proposal

    def _solve(self, views: Sequence[View], matched: Matched, best: int, watch: Stopwatch) -> Proposal:
        map = views[0].references.map
        kept = matched.matches.kept
        if not kept.any():
            return Proposal(Status.NO_MATCHES, "nothing matches", matched=matched)
        estimated = None
        if not views[0].query.focal_known:  # of a rig all are
            points = matched.observations.points
            estimated = self.solver.estimate_focal(
                matched.matches.keypoints[kept], points[kept] - points.mean(0), views[0].query.camera,
                likely=views[0].query.focal_likely,
            )  # fmt: skip
            if estimated is None:
                return Proposal(Status.NO_POSE, "no focal length agrees with the matches", matched=matched)
            matched = replace(matched, rig=Rig.of(estimated))
        rows = _rows_of(views)
        hypotheses = pose_hypotheses(matched, map.shared(rows), rows, self.solver, best=best)
        watch.lap("pose")
        first, posed = hypotheses[0], tuple(h for h in hypotheses if h.cam_from_world is not None)
        status = Status.LOCALIZED if posed else Status.NO_POSE
        return Proposal(status, first.reason, posed, matched, self.solver.max_error, camera=estimated)


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

    def propose(self, views: Sequence[View], best: int, watch: Stopwatch) -> Proposal:
        beside = [View(v.query, v.references.companion) for v in views if v.references.companion is not None]
        assert len(beside) == len(views), "the localizer gives the second map"
        found = self.local.propose(beside, best, watch)
        if not found.hypotheses or found.hypotheses[0].count < self.enough:
            dense = self.dense.propose(views, best, watch)
            if dense.hypotheses or not found.hypotheses:
                return dense
        name = self.local.local_features.name if self.local.local_features else ""
        named = tuple(replace(h, reason=f"{name}: {h.reason}") for h in found.hypotheses)
        return replace(found, reason=named[0].reason, hypotheses=named, exact=True)


class NearestPose:
    """The pose of the best reference."""

    name = "nearest"
    takes_initial = False
    local_features = None
    companion = None

    def propose(self, views: Sequence[View], best: int, watch: Stopwatch) -> Proposal:
        nearest = views[0].references
        return _unmatched(nearest.map.poses[int(nearest.rows[0])], views, "the nearest reference's pose")


class GivenPose:
    """The initial pose that the caller gives."""

    name = "given"
    takes_initial = True
    local_features = None
    companion = None

    def propose(self, views: Sequence[View], best: int, watch: Stopwatch) -> Proposal:
        initial = views[0].query.initial
        if initial is None:
            return Proposal(Status.NO_POSE, "no initial pose")
        return _unmatched(initial.to(torch.float64), views, "the pose given")


def _unmatched(cam_from_world: Pose, views: Sequence[View], reason: str) -> Proposal:
    """The pose that the first image is at."""
    relative = views[0].query.cam_from_rig
    pose = cam_from_world if relative is None else relative.inverse() @ cam_from_world
    nothing = torch.zeros(0, dtype=torch.bool)
    hypothesis = Hypothesis(pose, nothing, _rows_of(views), nothing, 0, reason)
    return Proposal(Status.LOCALIZED, reason, (hypothesis,))
