"""Streets of the toy town: boxes and lamps of each place, where the camera drives, and exact ray casting.

A place is one short street in its own frame: x along the street, y to the left, z up, metres, the
road at z = 0. The `rear` camera looks along -x while the car drives along +x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, so3_exp

FRAME_STEP = 1.25  # metres between reference frames
FIRST_FRAME_X = 14.0
CURB = 3.6  # |y| where the road ends
LIGHT_TONES = [(0.62, 0.55, 0.42), (0.66, 0.62, 0.55), (0.55, 0.36, 0.27), (0.45, 0.5, 0.52), (0.6, 0.46, 0.3),
               (0.5, 0.52, 0.4), (0.64, 0.5, 0.46), (0.38, 0.4, 0.46)]  # fmt: skip
BRICK_TONES = [(0.36, 0.15, 0.1), (0.3, 0.2, 0.14), (0.42, 0.26, 0.16), (0.26, 0.13, 0.12), (0.4, 0.34, 0.26)]
PAVING_TONES = [(0.36, 0.34, 0.31), (0.3, 0.3, 0.31)]
BRIGHT_TONES = [(0.5, 0.06, 0.05), (0.05, 0.16, 0.4), (0.04, 0.28, 0.12), (0.65, 0.45, 0.05), (0.3, 0.06, 0.3),
                (0.7, 0.7, 0.68), (0.03, 0.03, 0.04), (0.04, 0.35, 0.38), (0.55, 0.22, 0.04)]  # fmt: skip

# Camera axes in the place's frame: x right = +y, y down = -z, z forward = -x.
_CAMERA_FROM_PLACE = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Box:
    """An axis-aligned box from `low` to `high` in metres; `texel` is its textures' resolution in metres."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    material: str
    color: tuple[float, float, float]
    texel: float = 0.03


@dataclass(frozen=True)
class Street:
    """One place: its boxes, lamps (L, 3), direction to the sun (3,), and `world_from_place`."""

    boxes: tuple[Box, ...]
    lamps: Tensor
    to_sun: Tensor
    world_from_place: Pose

    def bounds(self, dtype: torch.dtype) -> Tensor:
        """Low and high corners of the boxes, (K, 2, 3)."""
        return torch.tensor([[box.low, box.high] for box in self.boxes], dtype=dtype)


class Hits(NamedTuple):
    """Where rays first meet a box: `depth` in lengths of the ray's direction (inf: nowhere) and `box` (-1)."""

    depth: Tensor
    box: Tensor


def build_street(place: int, seed: int) -> Street:
    """The street of a place, the same for the same (place, seed)."""
    rng = np.random.default_rng([seed, place, 0])
    boxes = _ground(rng)
    for side in (-1, 1):
        boxes += _row_of_houses(rng, side)
    boxes += _end_of_street(rng) + _backdrop(rng)
    lamps: list[tuple[float, float, float]] = []
    for side in (-1, 1):
        boxes += _furniture(rng, side, lamps)
    boxes += _parked_cars(rng)
    azimuth = math.radians(rng.uniform(25, 100)) * rng.choice([-1, 1])
    elevation = math.radians(rng.uniform(24, 38))
    to_sun = [math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation)]
    heading = torch.tensor([0.0, 0.0, rng.uniform(-math.pi, math.pi)], dtype=torch.float64)
    origin = torch.tensor([200.0 * place, rng.uniform(-20, 20), rng.uniform(0, 5)], dtype=torch.float64)
    return Street(tuple(boxes), torch.tensor(lamps), torch.tensor(to_sun), Pose(so3_exp(heading), origin))


def drive(*, frames: int, reference_frames: int, rng: np.random.Generator) -> Pose:
    """Poses `camera_from_place` (frames,) of one drive; every drive keeps its own line and wobbles."""
    stretch = FRAME_STEP * reference_frames
    x = FIRST_FRAME_X + stretch * (np.arange(frames) + rng.uniform(0.2, 0.8, frames)) / frames
    y = rng.uniform(-0.4, 0.4) + rng.uniform(-0.12, 0.12, frames)
    z = 1.65 + rng.uniform(-0.05, 0.05) + rng.uniform(-0.03, 0.03, frames)
    pitch_yaw_roll = np.radians(
        rng.uniform(-1, 1, 3) * [1.0, 2.5, 0.5] + rng.uniform(-1, 1, (frames, 3)) * [0.8, 1.5, 0.4] + [2.0, 0, 0]
    )
    rotation = so3_exp(torch.from_numpy(pitch_yaw_roll)) @ _CAMERA_FROM_PLACE
    center = torch.from_numpy(np.stack([x, y, z], -1))
    return Pose(rotation, -(rotation @ center[..., None]).squeeze(-1))


def toy_camera(image_size: int) -> Camera:
    """PINHOLE, f = 0.625 of the image's size, centre in the middle (COLMAP pixels), float64."""
    focal, center = 0.625 * image_size, 0.5 * image_size
    return Camera.from_colmap("PINHOLE", image_size, image_size, [focal, focal, center, center], dtype=torch.float64)


def pixel_rays(camera: Camera, camera_from_place: Pose, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Origin (3, 1) and directions (3, N) in the place's frame of pixels (N, 2); depth 1 a direction's length."""
    rays = camera.unproject(xy) @ camera_from_place.rotation
    return camera_from_place.center()[:, None], rays.T.contiguous()


def image_rays(camera: Camera, camera_from_place: Pose) -> tuple[Tensor, Tensor]:
    """Two rays a pixel, through the quarters of its diagonal: origin (3, 1), directions (3, H, 2·W), float32."""
    width, height = (int(s) for s in camera.size)
    if _is_distorted(camera):
        u, v = _distorted_rays((width, height), tuple(camera.parameters.tolist()))
    else:
        fx, fy, cx, cy = camera.parameters[:4].tolist()
        u = ((torch.arange(2 * width) + 0.5) / 2 - cx) / fx
        v = (torch.arange(height)[:, None] + torch.tensor([0.25, 0.75]).repeat(width) - cy) / fy
    axes = camera_from_place.rotation.float()[..., None, None]  # rows: the camera's axes in the place's frame
    return camera_from_place.center()[:, None].float(), axes[0] * u + axes[1] * v + axes[2]


def pixel_centers(width: int, height: int) -> Tensor:
    """COLMAP pixels (H, W, 2), float64."""
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def trace(bounds: Tensor, origin: Tensor, direction: Tensor, windows: list[tuple[slice, slice]] | None = None) -> Hits:
    """First box that each ray meets (slab test).

    Args:
        bounds: (K, 2, 3).
        origin: (3, 1) or (3, ...) as `direction`.
        direction: (3, ...) of any length; depths are multiples of it.
        windows: for directions (3, H, W): the rows and columns where each box can be seen.
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
    """Whether a box stands on the ray from origin (3, N) along direction (3, N) or (3, 1) within `reach`, (N,)."""
    inverse = 1 / _nonzero(direction)
    blocked = torch.zeros(origin.shape[1], dtype=torch.bool)
    for corners in bounds:
        near, far = _slab(corners, origin, inverse)
        blocked |= (near <= far) & (far > 1e-4) & (near < reach)
    return blocked


def windows_in_image(bounds: Tensor, camera: Camera, camera_from_place: Pose) -> list[tuple[slice, slice]]:
    """Rows and columns of `image_rays` between which each box's silhouette lies."""
    corner = torch.cartesian_prod(*[torch.arange(2)] * 3)  # [8, 3] which of low and high
    corners = bounds[:, corner, torch.arange(3)]  # [K, 8, 3]
    in_camera = camera_from_place.transform(corners.flatten(0, 1).double()).unflatten(0, corners.shape[:2])
    depth = in_camera[..., 2]
    if _is_distorted(camera):
        return _windows_on_rays(camera, in_camera[..., :2] / depth.clamp(min=0.1)[..., None], depth)
    width, height = 2 * int(camera.size[0]), int(camera.size[1])
    fx, fy, cx, cy = camera.parameters[:4].tolist()
    fx, cx = 2 * fx, 2 * cx
    x = fx * in_camera[..., 0] / depth.clamp(min=0.1) + cx
    y = fy * in_camera[..., 1] / depth.clamp(min=0.1) + cy
    extent = torch.stack([y.amin(1) - 1, y.amax(1) + 2, x.amin(1) - 1, x.amax(1) + 2], -1)
    whole = torch.tensor([0, height, 0, width], dtype=extent.dtype)
    crosses = (depth < 0.1).any(1, keepdim=True)  # reaches behind the camera: anywhere in the image
    extent = torch.where(crosses, whole, extent)
    extent = extent.masked_fill((depth < 0.1).all(1, keepdim=True), 0)
    limits = torch.tensor([height, height, width, width], dtype=extent.dtype)
    extent = extent.clamp(min=0).minimum(limits).long()
    return [(slice(top, bottom), slice(left, right)) for top, bottom, left, right in extent.tolist()]


def _is_distorted(camera: Camera) -> bool:
    return bool((camera.parameters[4:] != 0).any())


@lru_cache(maxsize=4)
def _distorted_rays(size: tuple[int, int], parameters: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """x / z and y / z (H, 2·W) of `image_rays` in the frame of a camera with lens distortion."""
    width, height = size
    x = (torch.arange(2 * width, dtype=torch.float64) + 0.5) / 2
    y = torch.arange(height)[:, None] + torch.tensor([0.25, 0.75], dtype=torch.float64).repeat(width)
    camera = Camera(torch.tensor(size, dtype=torch.float64), torch.tensor(parameters, dtype=torch.float64))
    rays = camera.unproject(torch.stack(torch.broadcast_tensors(x, y), -1)).float()
    return rays[..., 0].contiguous(), rays[..., 1].contiguous()


def _windows_on_rays(camera: Camera, uv: Tensor, depth: Tensor) -> list[tuple[slice, slice]]:
    """Rows and columns whose rays may meet boxes with corners at uv = (x, y) / z, (K, 8, 2), and depths (K, 8)."""
    u, v = _distorted_rays(tuple(int(s) for s in camera.size), tuple(camera.parameters.tolist()))
    low, high = uv.amin(1) - 1e-3, uv.amax(1) + 1e-3
    ahead, behind = (depth >= 0.1).all(1, keepdim=True), (depth < 0.1).all(1, keepdim=True)
    low, high = torch.where(ahead, low, -torch.inf), torch.where(ahead, high, torch.inf)
    windows = []
    for axis, least, most in ((1, v.amin(1), v.amax(1)), (0, u.amin(0), u.amax(0))):
        met = ~behind & (most >= low[:, axis, None]) & (least <= high[:, axis, None])  # [K, rows or columns]
        first, after = met.byte().argmax(1), met.shape[1] - met.flip(1).byte().argmax(1)
        windows.append([slice(a, b) if some else slice(0, 0) for a, b, some in zip(
            first.tolist(), after.tolist(), met.any(1).tolist(), strict=True)])  # fmt: skip
    return list(zip(*windows, strict=True))


def _nonzero(direction: Tensor) -> Tensor:
    return torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)


def _slab(corners: Tensor, origin: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Depths at which rays enter and leave a box (2, 3); they miss it where near > far."""
    near = far = None
    for axis in range(3):
        a = (corners[0, axis] - origin[axis]) * inverse[axis]
        b = (corners[1, axis] - origin[axis]) * inverse[axis]
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        near = low if near is None else torch.maximum(near, low)
        far = high if far is None else torch.minimum(far, high)
    return near, far


def _pick(rng: np.random.Generator, tones: list) -> tuple[float, float, float]:
    tone = np.array(tones[rng.integers(len(tones))]) * rng.uniform(0.75, 1.2)
    return tuple(np.clip(tone * rng.uniform(0.92, 1.08, 3), 0.02, 0.8))


def _ground(rng: np.random.Generator) -> list[Box]:
    road = "cobbles" if rng.random() < 0.3 else "asphalt"
    return [
        Box((-70, -60, -2), (60, 60, -0.03), "field", (0.2, 0.22, 0.16), texel=0.4),
        Box((-9, -CURB, -1), (25, CURB, 0), road, (0.15, 0.15, 0.155)),
        Box((-9, -9.5, -1), (20, -CURB, 0.13), "paving", _pick(rng, PAVING_TONES), texel=0.04),
        Box((-9, CURB, -1), (20, 9.5, 0.13), "paving", _pick(rng, PAVING_TONES), texel=0.04),
    ]


def _house(rng: np.random.Generator, low: list[float], high: list[float]) -> Box:
    material = rng.choice(["brick", "plaster", "stone", "planks"], p=[0.4, 0.3, 0.18, 0.12])
    tone = _pick(rng, BRICK_TONES if material == "brick" else LIGHT_TONES)
    return Box(tuple(low), tuple(high), str(material), tone)


def _across(side: int, near: float, far: float) -> tuple[float, float]:
    """The interval of y from |y| = near to far on one side, in rising order."""
    return (near, far) if side > 0 else (-far, -near)


def _row_of_houses(rng: np.random.Generator, side: int) -> list[Box]:
    boxes = []
    x = -4.0 + rng.uniform(0, 1.5)
    while x < 16:
        width, height = rng.uniform(4.2, 8.5), rng.uniform(5.5, 11.5)
        front = 6.1 + rng.uniform(0, 1.6)
        y0, y1 = _across(side, front, front + 5)
        boxes.append(_house(rng, [x, y0, -0.2], [x + width, y1, height]))
        e0, e1 = _across(side, front - 0.3, front + 0.2)
        boxes.append(Box((x - 0.1, e0, height - 0.35), (x + width + 0.1, e1, height + 0.05), "trim", (0.6, 0.58, 0.54)))
        boxes += _attachments(rng, side, front, x, width, height)
        x += width + (rng.uniform(0.8, 2.2) if rng.random() < 0.35 else 0.0)
    return boxes


def _attachments(rng, side: int, front: float, x: float, width: float, height: float) -> list[Box]:
    """Awning, hanging sign, balcony and bay of one house."""
    boxes = []
    if rng.random() < 0.5:
        a = x + rng.uniform(0.2, 0.3) * width
        y0, y1 = _across(side, front - rng.uniform(0.8, 1.3), front)
        boxes.append(Box((a, y0, 2.75), (a + 0.5 * width, y1, 2.95), "awning", _pick(rng, BRIGHT_TONES)))
    if rng.random() < 0.7:
        a, z = x + rng.uniform(0.1, 0.9) * width, rng.uniform(3.0, 3.6)
        y0, y1 = _across(side, front - 0.95, front - 0.1)
        boxes.append(Box((a, y0, z), (a + 0.1, y1, z + rng.uniform(0.6, 1.1)), "sign", _pick(rng, BRIGHT_TONES), 0.02))
    if height > 7 and rng.random() < 0.45:
        a = x + rng.uniform(0.1, 0.45) * width
        y0, y1 = _across(side, front - 0.9, front)
        boxes.append(Box((a, y0, 3.7), (a + 0.42 * width, y1, 4.75), "railing", (0.25, 0.25, 0.26)))
    if rng.random() < 0.25:
        a = x + rng.uniform(0.1, 0.5) * width
        y0, y1 = _across(side, front - 0.6, front)
        boxes.append(Box((a, y0, 3.3), (a + 1.8, y1, min(height - 0.6, 6.2)), "planks", _pick(rng, LIGHT_TONES)))
    return boxes


def _end_of_street(rng: np.random.Generator) -> list[Box]:
    boxes, y = [], -13.0
    while y < 13:
        width, height, front = rng.uniform(4.5, 9), rng.uniform(6.5, 13.5), -5.0 - rng.uniform(0, 4.5)
        boxes.append(_house(rng, [front - 5, y, -0.2], [front, y + width, height]))
        boxes.append(Box((front - 0.2, y - 0.05, height - 0.4), (front + 0.3, y + width + 0.05, height), "trim",
                         (0.55, 0.53, 0.5)))  # fmt: skip
        y += width
    return boxes


def _backdrop(rng: np.random.Generator) -> list[Box]:
    """Far towers that stand above the roofs."""
    boxes = []
    for _ in range(4):
        y, size, height = rng.uniform(-26, 26), rng.uniform(4, 8), rng.uniform(17, 28)
        x = rng.uniform(-50, -28)
        tone = _pick(rng, LIGHT_TONES + BRICK_TONES)
        boxes.append(Box((x - size, y, 0), (x, y + size, height), "tower", tone, texel=0.1))
    return boxes


def _furniture(rng: np.random.Generator, side: int, lamps: list) -> list[Box]:
    """Lamp posts, kiosk or planter, bin, letter box, trees and traffic signs of one pavement."""
    boxes, steel = [], (0.12, 0.13, 0.14)
    start = rng.uniform(-2, 1)
    for x in (start, start + 7.5, start + 15.0):
        boxes += _box_at(x, side * 4.1, 0.16, 0.16, 0.13, 4.9, "metal", steel)
        y0, y1 = _across(side, 2.9, 4.1)
        boxes.append(Box((x - 0.06, y0, 4.9), (x + 0.06, y1, 5.0), "metal", steel))
        y0, y1 = _across(side, 2.7, 3.3)
        boxes.append(Box((x - 0.15, y0, 4.76), (x + 0.15, y1, 4.9), "lamp", (0.5, 0.5, 0.48)))
        lamps.append((x, side * 3.0, 4.6))
    for x in rng.uniform(-1, 17, 2):
        boxes += _box_at(x, side * rng.uniform(3.9, 4.4), 0.08, 0.08, 0.13, 2.9, "metal", (0.3, 0.3, 0.31))
        boxes += _box_at(x + 0.06, side * 4.15, 0.04, 0.7, 2.15, 2.85, "sign", _pick(rng, BRIGHT_TONES), 0.02)
    x = rng.uniform(2, 13)
    if rng.random() < 0.7:
        boxes += _box_at(x, side * 5.1, 1.9, 1.5, 0.13, 2.4, "kiosk", _pick(rng, BRIGHT_TONES))
        boxes += _box_at(x, side * 5.1, 2.2, 1.8, 2.4, 2.55, "trim", (0.5, 0.5, 0.5))
    for _ in range(2):
        x = rng.uniform(0, 16)
        boxes += _box_at(x, side * 4.6, 1.8, 0.6, 0.13, 0.6, "stone", (0.4, 0.38, 0.35))
        boxes += _box_at(x, side * 4.6, 1.7, 0.5, 0.6, 1.05, "leaves", (0.07, 0.17, 0.05))
    boxes += _box_at(rng.uniform(0, 17), side * 4.3, 0.5, 0.5, 0.13, 1.1, "kiosk", _pick(rng, BRIGHT_TONES), 0.02)
    boxes += _box_at(rng.uniform(0, 17), side * 4.3, 0.45, 0.4, 0.13, 1.5, "sign", _pick(rng, BRIGHT_TONES), 0.02)
    if rng.random() < 0.6:
        x = rng.uniform(-3, 10)
        boxes += _box_at(x, side * 4.5, 0.28, 0.28, 0.13, 2.5, "bark", (0.16, 0.11, 0.07))
        for size, low, high in ((1.9, 2.5, 3.3), (2.3, 3.1, 4.2), (1.5, 4.0, 4.9)):
            boxes += _box_at(x, side * 4.5, size, size, low, high, "leaves", (0.09, 0.2, 0.05))
    return boxes


def _box_at(x, y, size_x, size_y, low, high, material, color, texel=0.03) -> list[Box]:
    half_x, half_y = size_x / 2, size_y / 2
    return [Box((x - half_x, y - half_y, low), (x + half_x, y + half_y, high), material, color, texel)]


def _parked_cars(rng: np.random.Generator) -> list[Box]:
    boxes = []
    for side in (-1, 1):
        x = rng.uniform(-3, 3)
        while x < 15:
            length, tone = rng.uniform(3.8, 4.6), _pick(rng, BRIGHT_TONES)
            boxes += _box_at(x + length / 2, side * 2.65, length, 1.65, 0.16, 0.88, "car", tone, 0.025)
            boxes += _box_at(x + length * 0.47, side * 2.65, length * 0.52, 1.45, 0.88, 1.42, "cabin", tone, 0.025)
            x += length + rng.uniform(0.8, 7.5)
    return boxes
