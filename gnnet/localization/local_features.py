"""Sparse local features, for the structure-based baseline: detections of an image, and the 3D points behind them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gnnet.data.depth import lift_keypoints
from gnnet.data.sift import detect_sift, match_sift
from gnnet.localization.map import Observations
from gnnet.localization.matching import KeypointMatches
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
        count: at most so many detections an image.
        lightglue: match by LightGlue (Lindenberger et al., ICCV 2023; kornia's, weights as above) instead of by
            nearest descriptors with a ratio test. Not for SIFT.

    Raises:
        ValueError: if the name is not known, or LightGlue does not know the features.
    """

    name: Literal["sift", "disk", "aliked"] = "sift"
    count: int = 4096
    lightglue: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("sift", "disk", "aliked"):
            raise ValueError(f"local features {self.name!r} are not known; expected sift, disk or aliked")
        if self.lightglue and self.name == "sift":
            raise ValueError("local_features.lightglue=true goes with name=disk or name=aliked, not with sift")

    @property
    def channels(self) -> int:
        """Of a descriptor."""
        return 128

    def load(self) -> None:
        """Load what weights there are to load, before the first image is asked for.

        Raises:
            ConnectionError: if they are not in the cache and cannot be fetched.
        """
        if self.name != "sift":
            _load_network(self.name)
        if self.lightglue:
            _load_network(f"lightglue-{self.name}")

    def detect(self, image: Tensor) -> Detections:
        """Of an image (3, H, W) uint8."""
        if self.name != "sift":
            return _detect_learned(self.name, image, self.count)
        found = detect_sift(image)
        order = found.strength.argsort(descending=True, stable=True)[: self.count]
        return Detections(found.keypoints[order], found.descriptors[order])

    def match(
        self, observations: Observations, image: Tensor, *, reference_sizes: Tensor, ratio: float
    ) -> KeypointMatches:
        """Match what references observe (M,) with detections in a query (3, H, W) uint8, reference by reference.

        Args:
            observations: of some references.
            image: the query.
            reference_sizes: (R, 2) width and height of all references' images, in pixels of the observations.
            ratio: of Lowe's test, where LightGlue does not match.
        """
        detected = self.detect(image)
        if not len(detected.keypoints):
            nothing = torch.zeros(len(observations.points), dtype=torch.bool)
            return KeypointMatches(torch.zeros(len(nothing), 2, dtype=torch.float64), nothing)
        keypoints = torch.zeros(len(observations.points), 2, dtype=torch.float64)
        kept = torch.zeros(len(observations.points), dtype=torch.bool)
        for row in observations.reference.unique().tolist():
            mine = (observations.reference == row).nonzero().squeeze(1)
            descriptors = torch.nn.functional.normalize(observations.descriptors[0][mine], dim=-1)
            if self.lightglue:
                there = Detections(observations.keypoints[mine], descriptors)
                sizes = reference_sizes[row], torch.tensor([image.shape[-1], image.shape[-2]])
                nearest, known = _match_learned(self.name, there, detected, sizes)
            else:
                nearest, _, known = match_sift(descriptors, detected.descriptors, ratio=ratio)
            keypoints[mine] = detected.keypoints[nearest].double()
            kept[mine] = known
        return KeypointMatches(keypoints, kept)


_FIRST_CENTER = 0.5  # kornia's is (0, 0)


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
def _match_learned(name: str, a: Detections, b: Detections, sizes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Row of b's detections for each of a's, and whether LightGlue matches them, both (N,)."""
    sides = {
        key: {
            "keypoints": side.keypoints[None].float() - _FIRST_CENTER,
            "descriptors": side.descriptors[None],
            "image_size": size[None].float(),
        }
        for key, side, size in zip(("image0", "image1"), (a, b), sizes, strict=True)
    }
    matched = _load_network(f"lightglue-{name}")(sides)["matches0"][0]
    return matched.clamp(min=0), matched >= 0


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
