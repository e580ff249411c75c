"""What a scene holds: images, depth maps, pairs of images, and the correspondences of a pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose


@dataclass(frozen=True)
class Depth:
    """A depth map along the optical axis, and the camera that took it.

    Args:
        path: a 16-bit PNG; 0 and 65535 are unknown.
        camera: intrinsics of the depth map, unbatched, float64; None: the image's own (registered depth).
        image_from_depth: maps points of the depth camera to the image's camera; None: they are one.
        scale: units of the file in a metre; 1000: millimetres.
    """

    path: Path
    camera: Camera | None = None
    image_from_depth: Pose | None = None
    scale: float = 1000.0


@dataclass(frozen=True)
class SceneImage:
    """One image of a scene; what a layout does not know is None.

    Args:
        name: unique in the scene, as the dataset's own files name it (posix path).
        path: the file on disk.
        condition: `night`, `snow`, …; `reference` where a dataset has one condition only; empty where it is not known.
        place: unit of the train/validation split: images of two places see nothing in common;
            empty where it is not known.
        camera: intrinsics, unbatched, float64.
        cam_from_world: pose, unbatched, float64, metres.
        is_reference: part of the map, so a localization sample may start from it.
        point_ids: (K,) rows of `Scene.points` that the image observes.
        keypoints: (K, 2) where it observes them, COLMAP pixels.
        depth: the depth map.
    """

    name: str
    path: Path
    condition: str = ""
    place: str = ""
    camera: Camera | None = None
    cam_from_world: Pose | None = None
    is_reference: bool = False
    point_ids: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    depth: Depth | None = None


@dataclass(frozen=True)
class Pair:
    """Two images of one place with known correspondences.

    A file lists these, or they follow from what the scene knows: a fixed camera, the images' depth maps
    and poses, or the 3D points that both images observe.

    Args:
        image_a, image_b: names; they may be the same for a `static` pair.
        place: of both images.
        correspondences: the `.mat` file that lists them.
        static: both images are of one fixed camera, so each pixel corresponds to itself.
        count: number of correspondences; 0 where it is not known.
    """

    image_a: str
    image_b: str
    place: str
    correspondences: Path | None = None
    static: bool = False
    count: int = 0


class Correspondences(NamedTuple):
    """Matching points of two images: (N, 2) float32 COLMAP pixels each, and confidence (N,) float32 in (0, 1]."""

    keypoints_a: np.ndarray
    keypoints_b: np.ndarray
    weight: np.ndarray
