"""Sparse local features, for the structure-based baseline: detections of an image, and the 3D points behind them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gnnet.data.depth import lift_keypoints
from gnnet.data.sift import detect_sift, match_sift
from gnnet.localization.map import Observations
from gnnet.localization.matching import KeypointMatches
from gnnet.scenes.scene import Scene, SceneImage

NEAR_POINT = 3.0  # pixels within which a detection takes the depth of a known point


class Detections(NamedTuple):
    """`keypoints` (N, 2) pixels and `descriptors` (N, C) of length 1, the strongest first, float32 on the CPU."""

    keypoints: Tensor
    descriptors: Tensor


@dataclass(frozen=True)
class LocalFeatures:
    """A detector with its descriptors.

    Args:
        name: `sift` (COLMAP's, no weights needed), or `disk` (kornia's; weights from torch hub's cache or network).
        count: at most so many detections an image.

    Raises:
        ValueError: if the name is not known.
    """

    name: Literal["sift", "disk"] = "sift"
    count: int = 4096

    def __post_init__(self) -> None:
        if self.name not in ("sift", "disk"):
            raise ValueError(f"local features {self.name!r} are not known; expected sift or disk")

    @property
    def channels(self) -> int:
        """Of a descriptor."""
        return 128

    def detect(self, image: Tensor) -> Detections:
        """Of an image (3, H, W) uint8."""
        if self.name == "disk":
            return _disk(image, self.count)
        found = detect_sift(image)
        order = found.strength.argsort(descending=True, stable=True)[: self.count]
        return Detections(found.keypoints[order], found.descriptors[order])

    def match(self, observations: Observations, image: Tensor, *, ratio: float) -> KeypointMatches:
        """Match what references observe (M,) with detections in a query (3, H, W) uint8, reference by reference."""
        detected = self.detect(image)
        keypoints = torch.zeros(len(observations.points), 2, dtype=torch.float64)
        kept = torch.zeros(len(observations.points), dtype=torch.bool)
        for row in observations.reference.unique().tolist():
            mine = (observations.reference == row).nonzero().squeeze(1)
            descriptors = torch.nn.functional.normalize(observations.descriptors[0][mine], dim=-1)
            found = match_sift(descriptors, detected.descriptors, ratio=ratio)
            if len(detected.keypoints):
                keypoints[mine] = detected.keypoints[found.nearest].double()
            kept[mine] = found.kept
        return KeypointMatches(keypoints, kept)


def _disk(image: Tensor, count: int) -> Detections:
    with torch.no_grad():
        found = _load_disk()(image[None].float() / 255, n=count, pad_if_not_divisible=True)[0]
    order = found.detection_scores.argsort(descending=True)
    return Detections(found.keypoints[order] + 0.5, found.descriptors[order])  # kornia's first centre is (0, 0)


@lru_cache(maxsize=1)
def _load_disk() -> nn.Module:
    from kornia.feature import DISK  # slow to import

    try:
        return DISK.from_pretrained("depth").eval()
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of DISK could not be fetched ({error}); place them in {torch.hub.get_dir()}/checkpoints, "
            "or take localizer.local_features.name=sift, which needs none"
        ) from error


def points_of_detections(scene: Scene, reference: SceneImage, detections: Tensor) -> tuple[Tensor, np.ndarray, Tensor]:
    """World points (N, 3), rows of the scene's points (N,) (-1: none), and which are known (N,), of detections (N, 2).

    With depth, a detection is lifted by it. Else it lies on its own ray, at the depth of the nearest point
    that the reference observes, if that is within `NEAR_POINT` pixels.

    Args:
        detections: in pixels of the image as it is on disk.
    """
    xy = detections.double()
    if reference.point_ids is None:
        points, known = lift_keypoints(reference, xy.numpy())
        return torch.from_numpy(points), np.full(len(xy), -1), torch.from_numpy(known)
    ids = np.asarray(reference.point_ids, np.int64)
    in_camera = reference.cam_from_world.transform(scene.points[torch.from_numpy(ids)])
    projected, visible = reference.camera.project(in_camera)
    ids, in_camera, projected = ids[visible.numpy()], in_camera[visible], projected[visible]
    if not len(ids) or not len(xy):
        return torch.zeros(len(xy), 3).double(), np.full(len(xy), -1), torch.zeros(len(xy), dtype=torch.bool)
    from scipy.spatial import cKDTree

    distance, nearest = cKDTree(projected.numpy()).query(xy.numpy())
    rays = reference.camera.unproject(xy) * in_camera[nearest, 2:]
    known = torch.from_numpy(distance <= NEAR_POINT) & reference.camera.contains(xy)
    return reference.cam_from_world.inverse().transform(rays), ids[nearest], known
