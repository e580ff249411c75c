"""The camera of the toy town, and exact ray casting against the boxes of a street.

Rays are in the place's frame, in metres. Pixels are COLMAP's: the centre of the first is (0.5, 0.5).
"""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose

Window = tuple[slice, slice]  # rows and columns


class Hits(NamedTuple):
    """Where rays first meet a box.

    Fields:
        depth: in lengths of the ray's direction, infinite where the ray meets none.
        box: int32 index of the box, -1 where the ray meets none.
    """

    depth: Tensor
    box: Tensor


def toy_camera(image_size: int) -> Camera:
    """PINHOLE camera of square images, float64: f = 0.625 image sizes, principal point in the middle.

    Args:
        image_size: width and height in pixels.
    """
    focal, center = 0.625 * image_size, 0.5 * image_size
    return Camera.from_colmap("PINHOLE", image_size, image_size, [focal, focal, center, center], dtype=torch.float64)


def rays_to_depth(camera: Camera, xy: Tensor) -> Tensor:
    """Rays (..., N, 3) of the camera's frame through pixels (..., N, 2) that end at depth 1."""
    rays, _ = camera.unproject(xy)
    return rays / rays[..., 2:].clamp(min=1e-3)


def pixel_rays(camera: Camera, camera_from_place: Pose, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Rays in the place's frame through pixels (N, 2): origin (3, 1), directions (3, N) that end at depth 1."""
    rays = rays_to_depth(camera, xy) @ camera_from_place.rotation
    return camera_from_place.center()[:, None], rays.T.contiguous()


def image_rays(camera: Camera, camera_from_place: Pose) -> tuple[Tensor, Tensor]:
    """Two rays for each pixel, in the place's frame: origin (3, 1), directions (3, H, 2·W), float32.

    They pass through the points at 1/4 and 3/4 of the pixel's diagonal and end at depth 1.
    """
    if (camera.parameters[4:] != 0).any():  # the lens distorts
        u, v = _ray_grid(_size(camera), tuple(camera.parameters.tolist()))
    else:
        width, height = _size(camera)
        fx, fy, cx, cy = camera.parameters[:4].tolist()
        u = ((torch.arange(2 * width) + 0.5) / 2 - cx) / fx
        v = (torch.arange(height)[:, None] + torch.tensor([0.25, 0.75]).repeat(width) - cy) / fy
    axes = camera_from_place.rotation.float()[..., None, None]  # the camera's axes in the place's frame
    return camera_from_place.center()[:, None].float(), axes[0] * u + axes[1] * v + axes[2]


def pixel_centers(width: int, height: int) -> Tensor:
    """Centres of the pixels, (H, W, 2), float64; the first is (0.5, 0.5)."""
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def trace(bounds: Tensor, origin: Tensor, direction: Tensor, windows: list[Window] | None = None) -> Hits:
    """First box that each ray meets, by the slab test.

    Args:
        bounds: (K, 2, 3) corners of the boxes.
        origin: (3, 1), or (3, ...) like `direction`.
        direction: (3, ...) of any length, which is the unit of the depths.
        windows: for directions (3, H, W), the rows and columns where each box may be visible; None tests every
            ray against every box.
    """
    inverse = 1 / _nonzero(direction)
    depth = torch.full(direction.shape[1:], torch.inf, dtype=direction.dtype)
    box = torch.full(direction.shape[1:], -1, dtype=torch.int32)
    if origin.ndim < direction.ndim:
        origin = origin.reshape(3, *[1] * (direction.ndim - 1))
    for k in range(len(bounds)):
        window = (slice(None),) * (direction.ndim - 1) if windows is None else windows[k]
        near, far = _slab(bounds[k], origin, inverse[(slice(None), *window)])
        best = depth[window]
        hit = (near <= far) & (near > 1e-6) & (near < best)
        best.copy_(torch.where(hit, near, best))
        box[window].masked_fill_(hit, k)
    return Hits(depth, box)


def occluded(bounds: Tensor, origin: Tensor, direction: Tensor, reach: Tensor | float) -> Tensor:
    """Whether a box blocks the ray from origin (3, N) along direction (3, N) or (3, 1) within `reach`, (N,) bool."""
    inverse = 1 / _nonzero(direction)
    blocked = torch.zeros(origin.shape[1], dtype=torch.bool)
    for corners in bounds:
        near, far = _slab(corners, origin, inverse)
        blocked |= (near <= far) & (far > 1e-4) & (near < reach)
    return blocked


def windows_in_image(bounds: Tensor, camera: Camera, camera_from_place: Pose) -> list[Window]:
    """For each box (K, 2, 3), rows and columns of `image_rays` that contain every ray that meets it."""
    corner = torch.cartesian_prod(*[torch.arange(2)] * 3)  # [8, 3]: 0 takes the low corner, 1 the high one
    corners = bounds[:, corner, torch.arange(3)]  # [K, 8, 3]
    in_camera = camera_from_place.transform(corners.flatten(0, 1).double()).unflatten(0, corners.shape[:2])
    depth = in_camera[..., 2]
    uv = in_camera[..., :2] / depth.clamp(min=0.1)[..., None]
    low, high = uv.amin(1) - 1e-3, uv.amax(1) + 1e-3  # [K, 2]; the margin exceeds all rounding
    ahead, behind = (depth >= 0.1).all(1, keepdim=True), (depth < 0.1).all(1, keepdim=True)
    # A box that is partly behind the camera may be anywhere in the image.
    low, high = torch.where(ahead, low, -torch.inf), torch.where(ahead, high, torch.inf)
    u, v = _ray_grid(_size(camera), tuple(camera.parameters.tolist()))
    rows = _extent(~behind & (v.amax(1) >= low[:, 1:]) & (v.amin(1) <= high[:, 1:]))
    columns = _extent(~behind & (u.amax(0) >= low[:, :1]) & (u.amin(0) <= high[:, :1]))
    return list(zip(rows, columns, strict=True))


def _extent(met: Tensor) -> list[slice]:
    """For each row of (K, M) bool, the slice from its first True to its last; an empty slice without one."""
    first, after = met.byte().argmax(1), met.shape[1] - met.flip(1).byte().argmax(1)
    after = torch.where(met.any(1), after, first)
    return [slice(a, b) for a, b in zip(first.tolist(), after.tolist(), strict=True)]


def _size(camera: Camera) -> tuple[int, int]:
    width, height = camera.size.tolist()
    return int(width), int(height)


@lru_cache(maxsize=4)
def _ray_grid(size: tuple[int, int], parameters: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """x / z and y / z, each (H, 2·W), of the rays of `image_rays` in the camera's frame."""
    width, height = size
    x = (torch.arange(2 * width, dtype=torch.float64) + 0.5) / 2
    y = torch.arange(height)[:, None] + torch.tensor([0.25, 0.75], dtype=torch.float64).repeat(width)
    camera = Camera(torch.tensor(size, dtype=torch.float64), torch.tensor(parameters, dtype=torch.float64))
    rays = rays_to_depth(camera, torch.stack(torch.broadcast_tensors(x, y), -1)).float()
    return rays[..., 0].contiguous(), rays[..., 1].contiguous()


def _nonzero(direction: Tensor) -> Tensor:
    return torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)


def _slab(corners: Tensor, origin: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Depths at which rays enter and leave a box (2, 3); a ray with near > far misses the box."""
    slabs = [((corners[0, i] - origin[i]) * inverse[i], (corners[1, i] - origin[i]) * inverse[i]) for i in range(3)]
    near = reduce(torch.maximum, [torch.minimum(a, b) for a, b in slabs])
    far = reduce(torch.minimum, [torch.maximum(a, b) for a, b in slabs])
    return near, far
