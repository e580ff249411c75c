"""Sparse local features, for the structure-based baseline: detections of an image, and the 3D points behind them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from gnnet.data.batches import Matches
from gnnet.data.depth import lift_keypoints
from gnnet.data.sift import detect_sift, match_sift
from gnnet.localization.map import Observations
from gnnet.localization.query import Query
from gnnet.models.weights import tensors_only
from gnnet.scenes.scene import Scene, SceneImage

NEAR_POINT = 3.0  # pixels within which a detection takes the depth of a known point


class Detections(NamedTuple):
    """`keypoints` (N, 2) pixels and `descriptors` (N, C) of length 1, the strongest first, float32 on the CPU."""

    keypoints: Tensor
    descriptors: Tensor


@dataclass(frozen=True)
class LocalFeatures:
    """A detector with its descriptors, and how they are matched.

    Args:
        name: `sift` (COLMAP's, no weights needed), or kornia's `disk` (Tyszkiewicz et al., NeurIPS 2020) or `aliked`
            (Zhao et al., IEEE TIM 2023), whose weights come from torch hub's cache or the network.
        count: limit on the detections of an image.
        lightglue: match by LightGlue (Lindenberger et al., ICCV 2023; kornia's, weights as above) instead of by
            nearest descriptors with a ratio test. Not for SIFT.
        ratio: limit of Lowe's test, of the nearest distance to the second nearest; not for LightGlue.

    Raises:
        ValueError: if the name is not known, or LightGlue does not know the features.
    """

    name: Literal["sift", "disk", "aliked"] = "sift"
    count: int = 4096
    lightglue: bool = False
    ratio: float = 0.8

    def __post_init__(self) -> None:
        if self.name not in ("sift", "disk", "aliked"):
            raise ValueError(f"local features {self.name!r} are not known; expected sift, disk or aliked")
        if self.lightglue and self.name == "sift":
            raise ValueError("lightglue=true goes with name=disk or name=aliked, not with sift")

    channels: ClassVar[int] = 128

    @property
    def local_features(self) -> LocalFeatures:
        """What describes the map's points for this matcher: itself."""
        return self

    def load(self) -> None:
        """Load the weights, if there are any, before the first image is to be described.

        Raises:
            ConnectionError: if they are not in the cache and cannot be fetched.
        """
        if self.name != "sift":
            _load_network(self.name)
        if self.lightglue:
            _load_network(f"lightglue-{self.name}")

    def detect(self, image: Tensor) -> Detections:
        """Detections of an image (3, H, W) uint8."""
        if self.name != "sift":
            return _detect_learned(self.name, image, self.count)
        found = detect_sift(image)
        order = found.strength.argsort(descending=True, stable=True)[: self.count]
        return Detections(found.keypoints[order], found.descriptors[order])

    def match_query(self, observations: Observations, query: Query, image_sizes: Tensor) -> Matches:
        """Match what references observe with detections in a query, reference by reference.

        Args:
            observations: (M,) of some references, made by the same features.
            query: its image is described.
            image_sizes: (R, 2) width and height of all references' images, in pixels of the observations.

        Returns:
            A match (M,) for each observation, on the CPU, in float64.
        """
        detected, count = self.detect(query.image), len(observations.points)
        matches = Matches(
            torch.zeros(count, 2, dtype=torch.float64), torch.zeros(count), torch.zeros(count, dtype=torch.bool)
        )
        for row in observations.reference.unique().tolist():
            mine = (observations.reference == row).nonzero().squeeze(1)
            descriptors = torch.nn.functional.normalize(observations.descriptors[0][mine], dim=-1)
            if self.lightglue and len(detected.keypoints):
                there = Detections(observations.keypoints[mine], descriptors)
                size = torch.tensor([query.image.shape[-1], query.image.shape[-2]])
                found = _match_learned(self.name, there, detected, (image_sizes[row], size))
            else:
                found = match_sift(descriptors, detected.descriptors, detected.keypoints, ratio=self.ratio)
            for column, values in zip(matches, found, strict=True):
                column[mine] = values.to(column.dtype)
        return matches


_FIRST_CENTER = 0.5  # of the first pixel; kornia counts it as (0, 0)


@torch.no_grad()
def _detect_learned(name: str, image: Tensor, count: int) -> Detections:
    network, image = _load_network(name), image[None].float() / 255
    if name == "disk":
        found = network(image, n=count, pad_if_not_divisible=True)[0]
        scores = found.detection_scores
    else:
        found = network(image)[0]
        scores = found.keypoint_scores
    order = scores.argsort(descending=True, stable=True)[:count]
    return Detections(found.keypoints[order] + _FIRST_CENTER, found.descriptors[order])


@torch.no_grad()
def _match_learned(name: str, a: Detections, b: Detections, sizes: tuple[Tensor, Tensor]) -> Matches:
    """What LightGlue matches of b's detections with each of a's (N,); `sizes` are of the two images, (2,) each."""
    sides = {
        key: {
            "keypoints": side.keypoints[None].float() - _FIRST_CENTER,
            "descriptors": side.descriptors[None],
            "image_size": size[None].float(),
        }
        for key, side, size in zip(("image0", "image1"), (a, b), sizes, strict=True)
    }
    found = _load_network(f"lightglue-{name}")(sides)
    nearest = found["matches0"][0]
    return Matches(b.keypoints[nearest.clamp(min=0)], found["matching_scores0"][0], nearest >= 0)


@cache
@tensors_only()
def _load_network(name: str) -> nn.Module:
    """A detector, or `lightglue-` with the name of one; with weights, in evaluation mode.

    Raises:
        ConnectionError: if the weights are not in the cache and cannot be fetched.
        ValueError: if their file holds more than tensors and plain values.
    """
    from kornia import feature  # slow to import

    try:
        if name == "disk":
            return feature.DISK.from_pretrained("depth").eval()
        if name == "aliked":
            return feature.ALIKED.from_pretrained("aliked-n16").eval()
        return feature.LightGlue(name.removeprefix("lightglue-")).eval()
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of {name} could not be fetched ({error}); place them in {torch.hub.get_dir()}/checkpoints, "
            "or take localizer.pose.matcher.name=sift, which needs none"
        ) from error


def points_of_detections(scene: Scene, reference: SceneImage, detections: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 3D points behind detections: points (N, 3) float64 in the world, their ids (N,), and which are known (N,).

    With depth, a detection is lifted by it. Without, it is put on its own ray at the depth of the nearest point
    that the reference observes, if that lies within `NEAR_POINT` pixels. An id is a row of the scene's points,
    -1 with depth.

    Args:
        detections: (N, 2) pixels of the image as it is on disk.
    """
    xy = detections.double()
    nowhere = torch.full((len(xy),), -1)
    camera, cam_from_world = reference.camera, reference.cam_from_world
    if reference.point_ids is None or camera is None or cam_from_world is None:  # what is missing, this says
        points, known = lift_keypoints(reference, xy.numpy())
        return torch.from_numpy(points), nowhere, torch.from_numpy(known)
    ids = torch.from_numpy(np.asarray(reference.point_ids, np.int64))
    in_camera = cam_from_world.transform(scene.points[ids])
    projected, visible = camera.project(in_camera)
    ids, in_camera, projected = ids[visible], in_camera[visible], projected[visible]
    if not len(ids) or not len(xy):
        return torch.zeros(len(xy), 3).double(), nowhere, torch.zeros(len(xy), dtype=torch.bool)
    distance, nearest = map(torch.from_numpy, cKDTree(projected.numpy()).query(xy.numpy()))
    rays = camera.unproject(xy) * in_camera[nearest, 2:]
    return cam_from_world.inverse().transform(rays), ids[nearest], (distance <= NEAR_POINT) & camera.contains(xy)
