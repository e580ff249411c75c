"""What is known of the image that is being localized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.models.pyramid import FeaturePyramid


@dataclass(frozen=True, eq=False)
class Query:
    """An image that is being localized, its features, and what is known of it.

    Args:
        name: for records and messages; it does not tell which image of the map this is.
        image: (3, H, W) uint8 RGB, shrunk as the map's images were.
        pyramid: its feature maps, a batch of one, on the network's device.
        camera: intrinsics of `image`, unbatched, float64; points are projected with it.
        full_camera: intrinsics of the image as it was given, before it was shrunk.
        place: the place of the dataset it lies in; None or empty if not known.
        initial: `cam_from_world` known beforehand, which is to be refined, unbatched; None if there is none.
        focal_known: whether the focal length of `camera` is known; else it is to be estimated.
        focal_likely: whether it is about right where it is not known, as EXIF's is; else it is only a guess.
        truth: its true `cam_from_world`, for `OracleRetrieval` alone; None if not known.
        cam_from_rig: pose of its camera relative to the rig that is localized; None: it is localized alone.
        itself: name of the reference that is this very image, which is never used for it; None if the map has it not.
    """

    name: str
    image: Tensor
    pyramid: FeaturePyramid
    camera: Camera
    full_camera: Camera
    place: str | None = None
    initial: Pose | None = None
    truth: Pose | None = None
    itself: str | None = None
    focal_known: bool = True
    focal_likely: bool = False
    cam_from_rig: Pose | None = None
