"""The typed batches that pass from the data to the network, the losses and the localizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose


class PairBatch(NamedTuple):
    """Image pairs with pixel correspondences keypoints_a[i] ↔ keypoints_b[i].

    Shapes: images (B, 3, H, W) uint8 RGB, keypoints (B, N, 2) COLMAP pixels, weight (B, N)
    confidence, valid (B, N) bool (False is padding), index (B,) position in the dataset.
    """

    image_a: Tensor
    image_b: Tensor
    keypoints_a: Tensor
    keypoints_b: Tensor
    weight: Tensor
    valid: Tensor
    index: Tensor

    def swap(self) -> PairBatch:
        """The same pairs from b to a."""
        return self._replace(
            image_a=self.image_b, image_b=self.image_a,
            keypoints_a=self.keypoints_b, keypoints_b=self.keypoints_a,
        )  # fmt: skip


class View(NamedTuple):
    """Images (B, 3, H, W) uint8 RGB with their cameras and poses `cam_from_world`, batch shape (B,)."""

    image: Tensor
    camera: Camera
    cam_from_world: Pose


class LocalizationBatch(NamedTuple):
    """Queries of known pose, each with one reference image and the 3D points that it observes.

    `points` (B, N, 3) are metres in a world moved by `origin` (B, 3, float64) so that float32 is
    exact enough: x_dataset = x + origin; both views' poses are of the moved world. `valid` (B, N)
    is False for padding. `condition` and `name` are of the queries; `index` (B,) is the sample's
    position in the dataset.
    """

    query: View
    reference: View
    points: Tensor
    valid: Tensor
    origin: Tensor
    index: Tensor
    condition: list[str]
    name: list[str]

    def to(self, device: torch.device | str, **kwargs) -> LocalizationBatch:
        """The batch on another device."""

        def move(value):
            if isinstance(value, View):
                return View(*map(move, value))
            return value if isinstance(value, list) else value.to(device, **kwargs)

        return LocalizationBatch(*map(move, self))
