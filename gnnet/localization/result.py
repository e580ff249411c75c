"""What became of one query: its pose, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.refinement import RefinementStatus


class Status(StrEnum):
    """How far the localization of a query got."""

    LOCALIZED = "localized"
    UNREADABLE = "image not readable"
    NO_CAMERA = "no fitting camera"
    NO_REFERENCE = "no reference"
    NO_MATCHES = "no matches"
    NO_POSE = "no pose"


@dataclass(frozen=True)
class Localization:
    """The localization of one query. Poses are unbatched, float64, on the CPU, in the map's world.

    Args:
        name: the query's.
        status: how far the query got.
        reason: why it ended there, in words.
        condition: the query's, as the dataset names it.
        cam_from_world: the pose to use; None if there is none.
        initial: the pose before refinement, from PnP, the nearest reference or the caller; None if there is none.
        refined: whether `cam_from_world` is the refined pose; False if refinement was not asked for,
            failed or lost against `initial`, which then stands.
        ended: why refinement ended; None if nothing was refined.
        references: names of the references that the query was compared with, the best first.
        matches: number of observations matched with the query's pixels.
        inliers: number of these that agree with `cam_from_world`.
        initial_cost, final_cost: mean robust cost of the features at `initial` and at the refined pose (also
            one that lost); None if nothing was refined.
        covariance: (6, 6) of the refined pose, of δ = (translation in metres, rotation in radians) in
            cam_from_world_true = exp(δ) cam_from_world; None without one. It holds the noise of the features and errors
            that parts of the image share (lens, references' poses, viewpoint), see
            `gnnet.localization.covariance`. It does not hold an error of the map as a whole, its scale or
            the query's focal length, nor a pose at a wrong place. It is meant not to be too small: where calibration
            is exact, σ is up to ten times too large.
        camera: of the image as it was given, with the focal length that was estimated; None where none was.
        seconds: by stage: `features`, `retrieval`, `matching`, `pose`, `refinement`.
    """

    name: str
    status: Status
    reason: str
    condition: str = ""
    cam_from_world: Pose | None = None
    initial: Pose | None = None
    refined: bool = False
    ended: RefinementStatus | None = None
    references: tuple[str, ...] = ()
    matches: int = 0
    inliers: int = 0
    initial_cost: float | None = None
    final_cost: float | None = None
    covariance: Tensor | None = None
    camera: Camera | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def at_limit(self) -> bool:
        """Whether the refinement ended at its limit of iterations or damping, and may have stopped too early."""
        return self.ended in (RefinementStatus.ITERATION_LIMIT, RefinementStatus.DAMPING_AT_MAXIMUM)
