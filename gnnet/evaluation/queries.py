"""What is asked of localization: an image, and what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose


class Query(NamedTuple):
    """A query image to localize. `camera` and `truth` (cam_from_world, float64) are None where they are not known."""

    name: str
    path: Path
    camera: Camera | None
    condition: str = ""
    place: str | None = None
    truth: Pose | None = None
