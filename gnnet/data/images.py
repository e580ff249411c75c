"""Image reading, and geometric transforms of images with their keypoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

_PNG_MARK = b"\x89PNG\r\n\x1a\n"


def read_image(path: Path) -> Tensor:
    """RGB image (3, H, W) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no readable image; it names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        with open(path, "rb") as file:
            is_png = file.read(len(_PNG_MARK)) == _PNG_MARK
        if is_png:  # not by torchvision, which ends the process on a damaged PNG
            with Image.open(path) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        return decode_image(str(path), mode=ImageReadMode.RGB)
    except Exception as error:  # Pillow raises many types on a damaged file
        raise ValueError(
            f"image {path} cannot be read ({(str(error) or type(error).__name__).splitlines()[0][:120]}); "
            "it may be truncated: fetch it again, or remove it from the dataset"
        ) from error


def limit_size(image: Tensor, largest_side: int | None) -> tuple[Tensor, np.ndarray]:
    """Shrink an image (3, H, W) to `largest_side` pixels, and the factors (2,) for x and y of its pixels."""
    height, width = image.shape[-2:]
    if largest_side is None or max(height, width) <= largest_side:
        return image, np.ones(2)
    ratio = largest_side / max(height, width)
    new_height, new_width = round(height * ratio), round(width * ratio)
    factors = np.array([new_width / width, new_height / height])
    return resize(image, [new_height, new_width], antialias=True), factors


def random_crop(extent: tuple[int, int], anchor: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """A random upright square of `size` pixels that holds the point `anchor` (2,), as `image_from_square` (3, 3).

    An axis on which the image of `extent` (width, height) is smaller than the square is kept whole.
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
    """A square of `size` pixels near the point `anchor` (2,) seen from aside, as `image_from_square` (3, 3).

    Args:
        extent: width and height of the image, which the square's middle does not leave.
        anchor: image pixels; it lies in the square, but for strong tilts.
        size: of the square.
        strength: 1 turns by up to 30°, scales by up to 1.6, stretches by up to 1.3 and tilts as a
            view from some 20° aside does; 0 is a shift alone.
        generator: of the draw.
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


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1.0, y], [0, 0, 1.0]])


def cut_image(image: Tensor, image_from_square: np.ndarray, size: int) -> Tensor:
    """The square of `size` pixels of an image (3, H, W) uint8 that a homography picks.

    A shift by whole pixels cuts, and keeps an axis shorter than `size` short; any other homography
    samples (3, size, size), black outside the image.
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
    grid = _grid(torch.from_numpy(unit_from_square).float(), size)
    return F.grid_sample(part, grid[None], align_corners=False)[0].round_().to(torch.uint8)


def _grid(homography: Tensor, size: int) -> Tensor:
    """Where a homography (3, 3) maps the pixels of a square, (size, size, 2).

    Each row of it is a sum of a column's and a row's share: half the time of a matrix product of all pixels.
    """
    center = torch.arange(size) + 0.5
    x, y, w = (row[0] * center + (row[1] * center + row[2])[:, None] for row in homography)
    grid = torch.empty(size, size, 2)
    w.reciprocal_()
    torch.mul(x, w, out=grid[..., 0])
    torch.mul(y, w, out=grid[..., 1])
    return grid


def map_points(homography: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points (N, 2) through a homography (3, 3)."""
    mapped = xy @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / mapped[:, 2:]


def even_subset(
    xy: np.ndarray,
    size: tuple[int, int],
    count: int,
    generator: np.random.Generator,
    *,
    preference: np.ndarray | None = None,
) -> np.ndarray:
    """Indices of at most `count` of the points (N, 2), spread evenly over an image of `size` (width, height).

    The image is cut into about `count` / 2 cells; each gives its points in turn, a random one first,
    likelier the larger its preference (N,), where there is one. (A training pair's confidence is none: the
    loss weighs points by it, and to choose by it as well counts it twice.)
    """
    if len(xy) <= count:
        return np.arange(len(xy))
    cell = np.sqrt(2 * size[0] * size[1] / count)
    columns = int(size[0] // cell) + 1
    cells = (xy[:, 1] // cell).astype(np.int64) * columns + (xy[:, 0] // cell).astype(np.int64)
    # Exponential clocks: the first to ring is one with probability proportional to its preference.
    turn = generator.exponential(size=len(xy)) / (1 if preference is None else np.maximum(preference, 1e-6))
    order = np.lexsort((turn, cells))
    first = np.r_[True, np.diff(cells[order]) != 0]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    return order[np.lexsort((turn[order], rank))[:count]]
