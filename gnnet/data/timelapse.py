"""Correspondences of a still camera's images: each pixel with itself, where there is structure that lasts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates, uniform_filter

from gnnet.data.depth import Window
from gnnet.scenes.formats.correspondences import Correspondences
from gnnet.scenes.scene import Scene

_SIDE = 320  # pixels, largest side of the images that structure is found in
_WINDOW = 5  # cells, side of the square over which structure is averaged
_PLAIN = 0.15  # weight below which a point says nothing: sky, bare walls, moving water


def lasting_structure(paths: Sequence[Path]) -> np.ndarray:
    """How much structure that stays lies at each cell, (h, w) float32 in [0, 1], of images of one fixed camera.

    From doubled-angle gradients z, how far their sum over images is longer than that of random
    directions, √((|Σz|² − Σ|z|²) / (N² − N)): edges that are in every picture add up; clouds, noise and
    passing shadows do not. Of a single image it is its texture.

    Args:
        paths: images of one size; some twenty are enough.

    Raises:
        OSError: an image that cannot be read.
    """
    total, squares = 0.0, 0.0
    for path in paths:
        with Image.open(path) as image:
            factor = _SIDE / max(image.size)
            size = [max(8, round(s * factor)) for s in image.size]
            image.draft("L", tuple(size))
            grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), np.float32)
        dy, dx = np.gradient(grey)
        gradient = dx + 1j * dy
        magnitude = np.abs(gradient)
        doubled = gradient**2 / (magnitude * (magnitude + magnitude.mean() + 1.0) + 1e-9)  # longest 1
        total, squares = total + doubled, squares + np.abs(doubled) ** 2
    count = len(paths)
    power = squares if count == 1 else (np.abs(total) ** 2 - squares) / (count**2 - count)
    structure = np.sqrt(np.maximum(uniform_filter(power, _WINDOW), 0))
    return np.clip(structure / max(1e-6, np.percentile(structure, 80)), 0, 1).astype(np.float32)


def still_correspondences(
    size: tuple[int, int],
    structure: np.ndarray,
    *,
    count: int,
    generator: np.random.Generator,
    window: Window | None = None,
) -> Correspondences:
    """About `count` pixels spread evenly over an image, each corresponding to itself; weighted by structure.

    Points with next to no structure are left out.

    Args:
        size: width and height of the images in pixels.
        structure: (h, w) of any resolution, see `lasting_structure`.
        count: before points without structure are left out.
        generator: of the points' positions in their cells.
        window: what is spread over; None is the whole image.
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
    """About `count` points (N, 2) in an area, one at random in each of as many square cells."""
    cell = np.sqrt(width * height / max(1, count))
    columns, rows = max(1, round(width / cell)), max(1, round(height / cell))
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    return (grid + generator.random(grid.shape)) * (width / columns, height / rows)


class PlaceStructure:
    """`lasting_structure` of a scene's places, each worked out when first asked for, from images spread over it.

    Args:
        scene: whose images are by still cameras.
        images: so many of a place are looked at, at most.
        kept: so many places' maps stay in memory.
    """

    def __init__(self, scene: Scene, *, images: int = 24, kept: int = 256) -> None:
        self._scene = scene
        self._images = images
        self._paths: dict[str, list[Path]] | None = None
        self._kept = kept
        self._maps: dict[str, np.ndarray] = {}

    def __call__(self, place: str) -> np.ndarray:
        """The map (h, w) of a place."""
        if place not in self._maps:
            if len(self._maps) >= self._kept:
                self._maps.pop(next(iter(self._maps)))
            paths = self._paths_of(place)
            spread = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), self._images)).round().astype(int))
            self._maps[place] = lasting_structure([paths[i] for i in spread])
        return self._maps[place]

    def _paths_of(self, place: str) -> list[Path]:
        if self._paths is None:
            self._paths = {}
            for image in self._scene.images.values():
                self._paths.setdefault(image.place, []).append(image.path)
        return self._paths[place]
