"""Homographies: random squares of an image, the pixels in a square, and the points that move with them.

A homography is a matrix (3, 3), float64. `image_from_square` maps pixels of a square to pixels of the image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(extent: tuple[int, int], anchor: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Draw an upright square that holds a point, as `image_from_square` (3, 3).

    Args:
        extent: width and height of the image in pixels; an axis shorter than `size` is kept whole.
        anchor: (2,) the point, in image pixels.
        size: side of the square in pixels.
        generator: draws the position.
    """
    matrix = np.eye(3)
    for axis in (0, 1):
        if extent[axis] > size:
            low = max(0, int(np.ceil(anchor[axis])) - size)
            high = max(low, min(extent[axis] - size, int(np.floor(anchor[axis]))))
            matrix[axis, 2] = generator.integers(low, high + 1)
    return matrix


def random_homography(
    extent: tuple[int, int], anchor: np.ndarray, size: int, strength: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw a square near a point, seen from another side, as `image_from_square` (3, 3).

    Args:
        extent: width and height of the image in pixels; the square's middle stays inside.
        anchor: (2,) the point, in image pixels; it lies in the square unless the tilt is strong.
        size: side of the square in pixels.
        strength: 0 only shifts; 1 rotates by up to 30°, scales by up to 1.6, stretches by up to 1.3, and
            tilts as a view from some 20° aside does.
        generator: draws the homography.
    """
    center = anchor + 0.3 * size * generator.uniform(-1, 1, 2)
    margin = np.minimum(0.5 * size, np.array(extent) / 2)
    center = np.clip(center, margin, extent - margin)
    angle = np.radians(30 * strength) * generator.uniform(-1, 1)
    scale = np.exp(0.47 * strength * generator.uniform(-1, 1))
    stretch, shear = 0.25 * strength * generator.uniform(-1, 1, 2)
    tilt = 0.35 * strength * generator.uniform(-1, 1, 2) / size
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * rotation @ np.array([[np.exp(stretch), shear], [0.0, np.exp(-stretch)]])
    around_middle = np.array([[*linear[0], 0], [*linear[1], 0], [*tilt, 1.0]])
    return _shift(*center) @ around_middle @ _shift(-size / 2, -size / 2)


def cut_image(image: Tensor, image_from_square: np.ndarray, size: int) -> Tensor:
    """The square (3, size, size) uint8 of an image (3, H, W) uint8 that a homography picks, black outside the image.

    A shift by whole pixels copies them; then an axis of the image that is shorter than `size` stays short.
    """
    corner = image_from_square[:2, 2]
    if np.array_equal(image_from_square, _shift(*np.round(corner))):
        x, y = corner.astype(int)
        return image[:, y : y + size, x : x + size]
    edge = np.array([[0, 0], [size, 0], [0, size], [size, size]], dtype=np.float64)
    seen = map_points(image_from_square, edge)
    extent = np.array([image.shape[-1], image.shape[-2]])
    # Only the part that is seen becomes floating point.
    low = np.clip(np.floor(seen.min(0)).astype(int) - 2, 0, extent - 2)
    high = np.clip(np.ceil(seen.max(0)).astype(int) + 2, low + 2, extent)
    part = image[None, :, low[1] : high[1], low[0] : high[0]].float()
    unit_from_square = np.diag([*(2 / (high - low)), 1.0]) @ _shift(*-(low + high) / 2) @ image_from_square
    grid = _sampling_grid(torch.from_numpy(unit_from_square).float(), size)
    return F.grid_sample(part, grid[None], align_corners=False)[0].round_().to(torch.uint8)


def map_points(homography: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points (N, 2) mapped by a homography (3, 3)."""
    x, y, w = homography[:, :2] @ xy.T + homography[:, 2:]  # numpy is slow along an axis of two
    return np.stack([x / w, y / w], 1)


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1.0, y], [0, 0, 1.0]])


def _sampling_grid(homography: Tensor, size: int) -> Tensor:
    """Where a homography (3, 3) maps the pixel centres of a square, (size, size, 2).

    Each coordinate is a column's share plus a row's: half the time of a matrix product over all pixels.
    """
    center = torch.arange(size) + 0.5
    x, y, w = (row[0] * center + (row[1] * center + row[2])[:, None] for row in homography)
    grid = torch.empty(size, size, 2)
    w.reciprocal_()
    torch.mul(x, w, out=grid[..., 0])
    torch.mul(y, w, out=grid[..., 1])
    return grid
