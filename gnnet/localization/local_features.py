"""Sparse local features, for the structure-based baseline: detections of an image, and the 3D points behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from gnnet.data.batches import Matches
from gnnet.data.depth import lift_keypoints
from gnnet.data.observed_points import on_rays
from gnnet.data.sift import detect_sift, match_sift
from gnnet.localization.map import Observations
from gnnet.localization.query import Query
from gnnet.models.weights import fingerprint, load_strictly, read_plain, state_dict_of, tensors_only
from gnnet.scenes.scene import Scene, SceneImage

NEAR_POINT = 3.0  # pixels within which a detection takes the depth of a known point

# Published files of weights, under the names that kornia gives them in torch hub's cache.
_FILES = {
    "disk": "depth-save.pth", "lightglue-disk": "disk_lightglue_v0-1_arxiv-pth",
    "aliked": "aliked-n16.pth", "lightglue-aliked": "aliked_lightglue_v0-1_arxiv-pth",
}  # fmt: skip
_OTHER_ALIKED = ("aliked-t16", "aliked-n32")  # aliked-n16rot has the same network as aliked-n16, and is taken


class Detections(NamedTuple):
    """`keypoints` (N, 2) pixels and `descriptors` (N, C) of length 1, the strongest first, float32 on the CPU."""

    keypoints: Tensor
    descriptors: Tensor


@dataclass(frozen=True)
class LocalFeatures:
    """A detector with its descriptors, and how they are matched.

    Args:
        name: `sift` (COLMAP's, no weights needed), or kornia's `disk` (Tyszkiewicz et al., NeurIPS 2020) or `aliked`
            (Zhao et al., IEEE TIM 2023).
        count: limit on the detections of an image.
        lightglue: match by LightGlue (Lindenberger et al., ICCV 2023; kornia's, weights from torch hub's cache or the
            network) instead of by nearest descriptors with a ratio test. Not for SIFT.
        ratio: limit of Lowe's test, of the nearest distance to the second nearest; not for LightGlue.
        weights: published file of the detector's weights, `depth-save.pth` of DISK or `aliked-n16.pth`; None takes
            torch hub's cache, or the network.
        lightglue_weights: published file of LightGlue's weights for these features, as `disk_lightglue.pth`; None as
            `weights`.

    Raises:
        ValueError: if the name is not known, or LightGlue or weights do not go with the features.
    """

    name: Literal["sift", "disk", "aliked"] = "sift"
    count: int = 4096
    lightglue: bool = False
    ratio: float = 0.8
    weights: str | Path | None = None
    lightglue_weights: str | Path | None = None

    def __post_init__(self) -> None:
        if self.name not in ("sift", "disk", "aliked"):
            raise ValueError(f"local features {self.name!r} are not known; expected sift, disk or aliked")
        if self.lightglue and self.name == "sift":
            raise ValueError("lightglue=true goes with name=disk or name=aliked, not with sift")
        if self.weights is not None and self.name == "sift":
            raise ValueError(f"weights={self.weights} go with name=disk or name=aliked; sift has none")
        if self.lightglue_weights is not None and not self.lightglue:
            raise ValueError(f"lightglue_weights={self.lightglue_weights} go with lightglue=true alone")

    channels: ClassVar[int] = 128

    @property
    def local_features(self) -> LocalFeatures:
        """What describes the map's points for this matcher: itself."""
        return self

    @property
    def identity(self) -> str:
        """What a map of these features must have been made with: their name, and weights that were given."""
        if self.weights is None:
            return self.name
        return f"{self.name} {fingerprint(_load_network(self.name, self.weights))}"

    def load(self) -> None:
        """Load the weights, if there are any, before the first image is to be described.

        Raises:
            FileNotFoundError, ValueError: if their file is missing, damaged, or of another network.
            ConnectionError: if they are not in the cache and cannot be fetched.
        """
        if self.name != "sift":
            _load_network(self.name, self.weights)
        if self.lightglue:
            _load_network(f"lightglue-{self.name}", self.lightglue_weights)

    def detect(self, image: Tensor) -> Detections:
        """Detections of an image (3, H, W) uint8; a network runs on the image's device."""
        if self.name != "sift":
            return _detect_learned(_load_network(self.name, self.weights).to(image.device), image, self.count)
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
        device, count = query.pyramid.maps[0].device, len(observations.points)
        detected = self.detect(query.image.to(device))
        matches = Matches(
            torch.zeros(count, 2, dtype=torch.float64), torch.zeros(count), torch.zeros(count, dtype=torch.bool)
        )
        for row in observations.reference.unique().tolist():
            mine = (observations.reference == row).nonzero().squeeze(1)
            descriptors = torch.nn.functional.normalize(observations.descriptors[0][mine], dim=-1)
            if self.lightglue and len(detected.keypoints):
                there = Detections(observations.keypoints[mine], descriptors)
                size = torch.tensor([query.image.shape[-1], query.image.shape[-2]])
                matcher = _load_network(f"lightglue-{self.name}", self.lightglue_weights).to(device)
                found = _match_learned(matcher, there, detected, (image_sizes[row], size), device)
            else:
                found = match_sift(descriptors, detected.descriptors, detected.keypoints, ratio=self.ratio)
            for column, values in zip(matches, found, strict=True):
                column[mine] = values.to(column.dtype)
        return matches


_FIRST_CENTER = 0.5  # of the first pixel; kornia counts it as (0, 0)


@torch.no_grad()
def _detect_learned(network: nn.Module, image: Tensor, count: int) -> Detections:
    image = image[None].float() / 255
    if type(network).__name__ == "DISK":
        found = network(image, n=count, pad_if_not_divisible=True)[0]
        scores = found.detection_scores
    else:
        found = network(image)[0]
        scores = found.keypoint_scores
    order = scores.argsort(descending=True, stable=True)[:count]
    return Detections((found.keypoints[order] + _FIRST_CENTER).cpu(), found.descriptors[order].cpu())


@torch.no_grad()
def _match_learned(
    matcher: nn.Module, a: Detections, b: Detections, sizes: tuple[Tensor, Tensor], device: torch.device
) -> Matches:
    """What LightGlue, on a device, matches of b's detections with each of a's (N,); `sizes` (2,) of the images."""
    sides = {
        key: {
            "keypoints": side.keypoints[None].float().to(device) - _FIRST_CENTER,
            "descriptors": side.descriptors[None].to(device),
            "image_size": size[None].float().to(device),
        }
        for key, side, size in zip(("image0", "image1"), (a, b), sizes, strict=True)
    }
    found = matcher(sides)
    nearest = found["matches0"][0].cpu()
    return Matches(b.keypoints[nearest.clamp(min=0)], found["matching_scores0"][0].cpu(), nearest >= 0)


@cache
@tensors_only()
def _load_network(name: str, weights: str | Path | None = None) -> nn.Module:
    """A detector, or `lightglue-` with the name of one; with weights, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: if the file of weights is missing, damaged, holds more than tensors and plain
            values, or is of another network.
        ConnectionError: if the weights are not in the cache and cannot be fetched.
    """
    from kornia import feature  # slow to import

    cached = Path(torch.hub.get_dir()) / "checkpoints" / _FILES[name]
    if weights is not None or cached.is_file():
        return _read_network(name, cached if weights is None else Path(weights).expanduser())
    try:
        if name == "disk":
            return feature.DISK.from_pretrained("depth").float().eval()
        if name == "aliked":
            return feature.ALIKED.from_pretrained("aliked-n16").float().eval()
        return feature.LightGlue(name.removeprefix("lightglue-")).float().eval()
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of {name} could not be fetched ({error}); fetch the published file where there is a network "
            f"and give it by {_setting(name)}=PATH/{_FILES[name]}, or place it at {cached}, or take "
            "localizer.pose.matcher.name=sift, which needs none"
        ) from error


def _setting(name: str) -> str:
    return f"localizer.pose.matcher.{'lightglue_' if name.startswith('lightglue-') else ''}weights"


def _read_network(name: str, path: Path) -> nn.Module:
    """A detector, or LightGlue, with the weights of a published file."""
    from kornia import feature  # slow to import

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file ({_setting(name)}); expected {_FILES[name]}")
    content = read_plain(path)
    if name == "disk" and isinstance(content, dict):
        content = content.get("extractor", content)
    state = state_dict_of(content, path)
    if name.startswith("lightglue-"):
        settings = feature.LightGlue.features[name.removeprefix("lightglue-")]
        matcher = feature.LightGlue(None, **{**settings, "weights": None})  # type: ignore[arg-type]  # no download
        state = {re.sub(r"^(self|cross)_attn\.(\d+)", r"transformers.\2.\1_attn", key): v for key, v in state.items()}
        computed = {"confidence_thresholds": matcher.state_dict()["confidence_thresholds"]}  # in no file
        load_strictly(matcher, {**computed, **state}, source=str(path), kind=f"weights of {name} expected")
        return matcher.float().eval()
    for other in _OTHER_ALIKED if name == "aliked" else ():
        shapes = {key: value.shape for key, value in feature.ALIKED(other).state_dict().items()}
        if all(value.shape == shapes.get(key) for key, value in state.items()):
            raise ValueError(f"{path} holds the weights of {other}; expected those of aliked-n16")
    network = feature.DISK() if name == "disk" else feature.ALIKED("aliked-n16")
    constants = {key: value for key, value in network.state_dict().items() if key.endswith("hw_grid")}  # in no file
    load_strictly(network, {**constants, **state}, source=str(path), kind=f"weights of {name} expected")
    return network.float().eval()


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
    moved, found = on_rays(in_camera[nearest], projected[nearest], xy, camera)
    found = found & (distance <= NEAR_POINT) & camera.contains(xy)
    return cam_from_world.inverse().transform(moved), ids[nearest], found
