"""Correspondences of a fixed camera's images: each pixel with itself, weighted by the structure that lasts there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates, uniform_filter

from gnnet.data.depth import Window
from gnnet.sampling import evenly
from gnnet.scenes.formats.images import eight_bits, open_image
from gnnet.scenes.scene import Correspondences, Scene

_SIDE = 320  # pixels, largest side of the images that structure is found in
_AVERAGED = 5  # cells, side of the square over which structure is averaged
_LOOKED_AT = 24  # images of a place, at most
_KEPT = 256  # places whose maps stay in memory
_PLAIN = 0.15  # weight below which a point says nothing: sky, bare walls, moving water


def lasting_structure(paths: Sequence[Path]) -> np.ndarray:
    """How much structure each cell keeps over the images of one fixed camera, (h, w) float32 in [0, 1].

    Each gradient becomes z, of doubled angle, so that an edge counts the same from dark to light and back. The
    result is by how much the sum of N images is longer than that of random directions,
    √((|Σz|² − Σ|z|²) / (N² − N)). Edges that are in every picture add up; clouds, noise and passing shadows
    do not. For one image it is the texture.

    Args:
        paths: images of one size; some twenty are enough.

    Raises:
        OSError, ValueError: if an image cannot be read.
    """
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    for path in paths:
        with open_image(path) as image:
            factor = _SIDE / max(image.size)
            size = max(8, round(image.width * factor)), max(8, round(image.height * factor))
            image.draft("L", size)
            grey = np.asarray(eight_bits(image).convert("L").resize(size, Image.Resampling.BOX), np.float32)
        dy, dx = np.gradient(grey)
        gradient = dx + 1j * dy
        magnitude = np.abs(gradient)
        doubled = gradient**2 / (magnitude * (magnitude + magnitude.mean() + 1.0) + 1e-9)  # longest 1
        total, squares = total + doubled, squares + np.abs(doubled) ** 2
    count = len(paths)
    power = squares if count == 1 else (np.abs(total) ** 2 - squares) / (count**2 - count)
    structure = np.sqrt(np.maximum(uniform_filter(power, _AVERAGED), 0))
    return np.clip(structure / max(1e-6, np.percentile(structure, 80)), 0, 1).astype(np.float32)


def fixed_camera_correspondences(
    size: tuple[int, int],
    structure: np.ndarray,
    *,
    count: int,
    generator: np.random.Generator,
    window: Window | None = None,
) -> Correspondences:
    """About `count` pixels spread evenly over an image, each corresponding to itself, weighted by structure.

    Points with next to no structure are left out afterwards.

    Args:
        size: width and height of the images in pixels.
        structure: (h, w) weights in [0, 1] over the image, at any resolution, see `lasting_structure`.
        count: points to spread.
        generator: draws each point's position in its cell.
        window: the part of the image to spread over; None is the whole.
    """
    width, height = size
    left, top, right, bottom = (0, 0, width, height) if window is None else window
    xy = evenly_spread(right - left, bottom - top, count, generator) + np.array([left, top])
    rows, columns = structure.shape
    at = np.stack([xy[:, 1] * (rows / height) - 0.5, xy[:, 0] * (columns / width) - 0.5])
    weight = map_coordinates(structure, at, order=1, mode="nearest")
    xy, weight = xy[weight > _PLAIN].astype(np.float32), weight[weight > _PLAIN]
    return Correspondences(xy, xy.copy(), weight.astype(np.float32))


def evenly_spread(width: float, height: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """About `count` points (N, 2) in an area: one at a random position in each of as many square cells."""
    cell = np.sqrt(width * height / max(1, count))
    columns, rows = max(1, round(width / cell)), max(1, round(height / cell))
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    return (grid + generator.random(grid.shape)) * (width / columns, height / rows)


class PlaceStructure:
    """The map of `lasting_structure` of each place of a scene, made when it is first asked for.

    Args:
        scene: its images are by fixed cameras, one at each place.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._paths: dict[str, list[Path]] = {}
        self._maps: dict[str, np.ndarray] = {}

    def __call__(self, place: str) -> np.ndarray:
        """The map (h, w) of a place, from images spread evenly over it."""
        if not self._paths:
            for image in self._scene.images.values():
                self._paths.setdefault(image.place, []).append(image.path)
        if place not in self._maps:
            if len(self._maps) >= _KEPT:
                self._maps.pop(next(iter(self._maps)))
            paths = self._paths[place]
            self._maps[place] = lasting_structure([paths[row] for row in evenly(len(paths), _LOOKED_AT)])
        return self._maps[place]
