"""Streets of the toy town: the boxes and lamps of each place, and the poses of a camera that drives through.

A place is one short street in its own frame, in metres: x along the street, y to the left, z up, the road
at z = 0. The `rear` camera looks along -x while the car drives along +x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnnet.geometry.pose import Pose, so3_exp

Triple = tuple[float, float, float]  # a point in metres, or a linear RGB colour
FRAME_STEP = 1.25  # metres between reference frames
FIRST_FRAME_X = 14.0
CURB = 3.6  # |y| where the road ends
LIGHT_TONES = [(0.62, 0.55, 0.42), (0.66, 0.62, 0.55), (0.55, 0.36, 0.27), (0.45, 0.5, 0.52), (0.6, 0.46, 0.3),
               (0.5, 0.52, 0.4), (0.64, 0.5, 0.46), (0.38, 0.4, 0.46)]  # fmt: skip
BRICK_TONES = [(0.36, 0.15, 0.1), (0.3, 0.2, 0.14), (0.42, 0.26, 0.16), (0.26, 0.13, 0.12), (0.4, 0.34, 0.26)]
PAVING_TONES = [(0.36, 0.34, 0.31), (0.3, 0.3, 0.31)]
BRIGHT_TONES = [(0.5, 0.06, 0.05), (0.05, 0.16, 0.4), (0.04, 0.28, 0.12), (0.65, 0.45, 0.05), (0.3, 0.06, 0.3),
                (0.7, 0.7, 0.68), (0.03, 0.03, 0.04), (0.04, 0.35, 0.38), (0.55, 0.22, 0.04)]  # fmt: skip

# Rotation `camera_from_place` of a camera that looks along -x: x right = +y, y down = -z, z forward = -x.
_CAMERA_FROM_PLACE = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Box:
    """An axis-aligned box in the place's frame.

    Args:
        low, high: opposite corners in metres.
        material: how its faces are painted, see `paint_face`.
        color: linear RGB.
        texel: side of a texture's pixel in metres.
    """

    low: Triple
    high: Triple
    material: str
    color: Triple
    texel: float = 0.03


@dataclass(frozen=True)
class Street:
    """One place.

    Args:
        boxes: all solid things, the ground included.
        lamps: (L, 3) positions of the lamps in metres, in the place's frame.
        to_sun: (3,) unit vector to the sun, in the place's frame.
        world_from_place: pose of the place's frame in the world, in metres.
    """

    boxes: tuple[Box, ...]
    lamps: Tensor
    to_sun: Tensor
    world_from_place: Pose

    def bounds(self, dtype: torch.dtype) -> Tensor:
        """Low and high corners of the K boxes, (K, 2, 3), in metres."""
        return torch.tensor([[box.low, box.high] for box in self.boxes], dtype=dtype)


def build_street(place: int, seed: int) -> Street:
    """Build the street of a place; the same (place, seed) gives the same street."""
    rng = np.random.default_rng([seed, place, 0])
    boxes = _ground(rng)
    for side in (-1, 1):
        boxes += _row_of_houses(rng, side)
    boxes += _end_of_street(rng) + _backdrop(rng)
    lamps: list[Triple] = []
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
    """Poses `camera_from_place` (frames,) of one drive, float64.

    Each drive keeps to its own line across the street; position and orientation vary around it.

    Args:
        frames: number of images of this drive.
        reference_frames: number of images of the reference drive, which sets the length of the stretch.
        rng: source of all random draws.
    """
    stretch = FRAME_STEP * reference_frames
    x = FIRST_FRAME_X + stretch * (np.arange(frames) + rng.uniform(0.2, 0.8, frames)) / frames
    y = rng.uniform(-0.4, 0.4) + rng.uniform(-0.12, 0.12, frames)
    z = 1.65 + rng.uniform(-0.05, 0.05) + rng.uniform(-0.03, 0.03, frames)
    pitch_yaw_roll = np.radians(
        rng.uniform(-1, 1, 3) * [1.0, 2.5, 0.5] + rng.uniform(-1, 1, (frames, 3)) * [0.8, 1.5, 0.4] + [2.0, 0, 0]
    )
    rotation = so3_exp(torch.from_numpy(pitch_yaw_roll)) @ _CAMERA_FROM_PLACE
    return Pose.from_center(rotation, torch.from_numpy(np.stack([x, y, z], -1)))


def _pick(rng: np.random.Generator, tones: Sequence[Triple]) -> Triple:
    """One of the tones, a little varied."""
    tone = np.array(tones[int(rng.integers(len(tones)))]) * rng.uniform(0.75, 1.2)
    red, green, blue = np.clip(tone * rng.uniform(0.92, 1.08, 3), 0.02, 0.8)
    return red, green, blue


def _ground(rng: np.random.Generator) -> list[Box]:
    road = "cobbles" if rng.random() < 0.3 else "asphalt"
    return [
        Box((-70, -60, -2), (60, 60, -0.03), "field", (0.2, 0.22, 0.16), texel=0.4),
        Box((-9, -CURB, -1), (25, CURB, 0), road, (0.15, 0.15, 0.155)),
        Box((-9, -9.5, -1), (20, -CURB, 0.13), "paving", _pick(rng, PAVING_TONES), texel=0.04),
        Box((-9, CURB, -1), (20, 9.5, 0.13), "paving", _pick(rng, PAVING_TONES), texel=0.04),
    ]


def _house(rng: np.random.Generator, low: Triple, high: Triple) -> Box:
    material = rng.choice(["brick", "plaster", "stone", "planks"], p=[0.4, 0.3, 0.18, 0.12])
    tone = _pick(rng, BRICK_TONES if material == "brick" else LIGHT_TONES)
    return Box(low, high, str(material), tone)


def _across(side: int, near: float, far: float) -> tuple[float, float]:
    """The interval of y from |y| = near to |y| = far on one side of the street, smaller end first."""
    return (near, far) if side > 0 else (-far, -near)


def _row_of_houses(rng: np.random.Generator, side: int) -> list[Box]:
    boxes = []
    x = -4.0 + rng.uniform(0, 1.5)
    while x < 16:
        width, height = rng.uniform(4.2, 8.5), rng.uniform(5.5, 11.5)
        front = 6.1 + rng.uniform(0, 1.6)
        y0, y1 = _across(side, front, front + 5)
        boxes.append(_house(rng, (x, y0, -0.2), (x + width, y1, height)))
        e0, e1 = _across(side, front - 0.3, front + 0.2)
        boxes.append(Box((x - 0.1, e0, height - 0.35), (x + width + 0.1, e1, height + 0.05), "trim", (0.6, 0.58, 0.54)))
        boxes += _attachments(rng, side, front, x, width, height)
        x += width + (rng.uniform(0.8, 2.2) if rng.random() < 0.35 else 0.0)
    return boxes


def _attachments(rng: np.random.Generator, side: int, front: float, x: float, width: float, height: float) -> list[Box]:
    """Awning, hanging sign, balcony and bay of one house, each with some probability."""
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
        boxes.append(_house(rng, (front - 5, y, -0.2), (front, y + width, height)))
        boxes.append(Box((front - 0.2, y - 0.05, height - 0.4), (front + 0.3, y + width + 0.05, height), "trim",
                         (0.55, 0.53, 0.5)))  # fmt: skip
        y += width
    return boxes


def _backdrop(rng: np.random.Generator) -> list[Box]:
    """Distant towers that are visible above the roofs."""
    boxes = []
    for _ in range(4):
        y, size, height = rng.uniform(-26, 26), rng.uniform(4, 8), rng.uniform(17, 28)
        x = rng.uniform(-50, -28)
        tone = _pick(rng, LIGHT_TONES + BRICK_TONES)
        boxes.append(Box((x - size, y, 0), (x, y + size, height), "tower", tone, texel=0.1))
    return boxes


def _furniture(rng: np.random.Generator, side: int, lamps: list[Triple]) -> list[Box]:
    """Lamp posts, traffic signs, kiosk, planters, bin, letter box and tree of one pavement; its lamps join `lamps`."""
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


def _box_at(
    x: float, y: float, size_x: float, size_y: float, low: float, high: float,
    material: str, color: Triple, texel: float = 0.03,
) -> list[Box]:  # fmt: skip
    """A box with its centre at (x, y), from height `low` to `high`."""
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
