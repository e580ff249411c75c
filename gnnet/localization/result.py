"""What became of one query: its pose, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from gnnet.geometry.pose import Pose


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
        name: of the query.
        status: how far it got.
        reason: in words, why it ended there.
        condition: of the query, as the dataset names it.
        cam_from_world: the pose to use, None where there is none.
        start: the pose before refinement (of PnP, of the nearest reference, or of a file); None where there is none.
        refined: whether `cam_from_world` is the refined pose; False where refinement was not asked for,
            failed or lost against `start`, which then stands.
        references: names of the references that were matched, the nearest first.
        matches: pixels matched with 3D points.
        inliers: of these, as many agree with `cam_from_world`.
        initial_cost, final_cost: mean robust cost of the features at `start` and at the refined pose (also
            one that lost), None where nothing was refined.
        covariance: (6, 6) of the refined pose, see `gnnet.localization.refinement.Refinement`; None without one.
        seconds: by stage, as `features`, `retrieval`, `matching`, `pose`, `refinement`.
    """

    name: str
    status: Status
    reason: str
    condition: str = ""
    cam_from_world: Pose | None = None
    start: Pose | None = None
    refined: bool = False
    references: tuple[str, ...] = ()
    matches: int = 0
    inliers: int = 0
    initial_cost: float | None = None
    final_cost: float | None = None
    covariance: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
