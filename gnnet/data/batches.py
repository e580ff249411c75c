"""The typed batches that pass from the data to the network, the losses and the localizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose


class PairGeometry(NamedTuple):
    """What the poses of image pairs tell: the 3D points of the correspondences, and how image b sees them.

    Shapes: points (B, N, 3) metres in the frame of camera a, valid (B, N) bool, False where the point is not known;
    camera_b (B,) of the images b as they are in the batch; b_from_a (B,).
    """

    points: Tensor
    valid: Tensor
    camera_b: Camera
    b_from_a: Pose


class PairBatch(NamedTuple):
    """Image pairs with pixel correspondences keypoints_a[i] ↔ keypoints_b[i].

    Shapes: images (B, 3, H, W) uint8 RGB, keypoints (B, N, 2) COLMAP pixels, weight (B, N)
    confidence, valid (B, N) bool (False is padding), index (B,) position in the dataset, skipped (B,)
    how many broken pairs were passed over to get this one. `geometry` is of the same N correspondences.
    """

    image_a: Tensor
    image_b: Tensor
    keypoints_a: Tensor
    keypoints_b: Tensor
    weight: Tensor
    valid: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    skipped: Tensor
    geometry: PairGeometry | None = None


class MatchingPair(NamedTuple):
    """Two images whose keypoints' true partners are known: what matching is measured on.

    Shapes: images (3, H, W) uint8 RGB (of two sizes, if need be), keypoints (N, 2) COLMAP pixels;
    `condition` is of the pair (`day-dusk`), `index` its position in the dataset.
    """

    image_a: Tensor
    image_b: Tensor
    keypoints_a: Tensor
    keypoints_b: Tensor
    condition: str
    name: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls


class Matches(NamedTuple):
    """Where things of one image are found in another, with any leading batch shape.

    `keypoints` (..., N, 2) COLMAP pixels of the other image, where each fits best; `similarity` (..., N) there,
    the larger the better, comparable within one method only; `kept` (..., N) bool, whether the match passed the
    method's tests.
    """

    keypoints: Tensor
    similarity: Tensor
    kept: Tensor


class View(NamedTuple):
    """Images (B, 3, H, W) uint8 RGB with their cameras and poses `cam_from_world`, batch shape (B,)."""

    image: Tensor
    camera: Camera
    cam_from_world: Pose


class LocalizationBatch(NamedTuple):
    """Queries of known pose, each with one reference image and the 3D points that it observes.

    `points` (B, N, 3) are metres in a world moved by `origin` (B, 3, float64) so that float32 is
    exact enough: x_dataset = x + origin; both views' poses are of the moved world. `keypoints` (B, N, 2)
    are the reference's pixels at which they are described, see `gnnet.data.observed_points`. `valid` (B, N)
    is False for padding, and where that pixel cannot be trusted. `condition` and `name` are of the queries;
    `index` (B,) is the sample's position in the dataset.
    """

    query: View
    reference: View
    points: Tensor
    keypoints: Tensor
    valid: Tensor
    origin: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    condition: list[str]
    name: list[str]

    def to(self, device: torch.device | str, **kwargs) -> LocalizationBatch:
        """The batch on another device."""

        def move(value):
            if isinstance(value, View):
                return View(*map(move, value))
            return value if isinstance(value, list) else value.to(device, **kwargs)

        return LocalizationBatch(*map(move, self))


Batch = TypeVar("Batch", PairBatch, LocalizationBatch)


def collate_by_size(items: Sequence[Batch]) -> list[Batch]:
    """Stack samples by `collate` into one batch for each size of images.

    Images of different sizes are not padded to one size, because a network with GroupNorm sees the whole image:
    the features of a sample would depend on the other samples of its batch.
    """
    by_size: dict[tuple[torch.Size, ...], list[Batch]] = {}
    for item in items:
        by_size.setdefault(tuple(_image_sizes(item)), []).append(item)
    return [collate(group) for group in by_size.values()]


def _image_sizes(values: Iterable[Any]) -> Iterator[torch.Size]:
    """Shapes of the images (all that is uint8) of a sample."""
    for value in values:
        if isinstance(value, View):
            yield from _image_sizes(value)
        elif isinstance(value, Tensor) and value.dtype == torch.uint8:
            yield value.shape


def collate(items: Sequence[Batch]) -> Batch:
    """Stack samples, which have no batch axis, and whose images have one size. Shorter rows are padded with zeros."""
    return type(items[0])(*map(_stack, zip(*items, strict=True)))


def _stack(values: tuple[Any, ...]) -> Any:
    """One field of all samples."""
    first = values[0]
    if first is None:
        return None
    if isinstance(first, View | PairGeometry):
        return type(first)(*map(_stack, zip(*values, strict=True)))
    if isinstance(first, Camera | Pose):
        return type(first).stack(list(values))
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    if first.ndim == 0 or first.dtype == torch.uint8:
        return torch.stack(values)
    count = max(map(len, values))
    return torch.stack([torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])]) for rows in values])
