"""One pair's correspondences: how many, how evenly spread, how large the common area, and how far from the poses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from gnnet.data.agreement import correspondence_errors
from gnnet.data.correspondences import PairPoints
from gnnet.data.timelapse import PlaceStructure
from gnnet.sampling import evenly
from gnnet.scenes.scene import Correspondences, Pair, Scene

CELLS = 8  # of the grid on an image, a side
MOST_CORRESPONDENCES = 10_000  # read of a pair
_KEPT_ERRORS = 500  # of a pair


class PairMeasure(NamedTuple):
    """What was measured of one pair.

    Args:
        correspondences: how many there are.
        spread: share of an image's 8×8 cells that hold a correspondence; of the two images, the lower one.
        overlap: share of an image's area inside the hull of its correspondences; of the two images, the lower one.
        errors: (K,) pixels, of some of the correspondences; empty where unknown.
        how: in words, what the errors are distances to; None where unknown.
    """

    correspondences: int
    spread: float
    overlap: float
    errors: np.ndarray
    how: str | None


class PairReader:
    """Reads correspondences of a scene's pairs as training does, at most about `MOST_CORRESPONDENCES` of a pair.

    Args:
        scene: with pairs.
        sizes: width and height in pixels of its images, by name; an image that is not there cannot be read.
    """

    def __init__(self, scene: Scene, sizes: dict[str, tuple[int, int]]) -> None:
        self.scene = scene
        self.sizes = sizes
        self._structure = PlaceStructure(scene)

    def __call__(self, pair: Pair) -> Correspondences:
        """Correspondences of a pair, the same at every call.

        Raises:
            ValueError, OSError: if they cannot be read, or there are none.
        """
        for name in (pair.image_a, pair.image_b):
            if name not in self.sizes:
                raise ValueError(f"image {name} cannot be read")
        points = PairPoints(self.scene, pair, size=self.sizes[pair.image_a], structure=self._structure)
        matches = points.draw(MOST_CORRESPONDENCES, np.random.default_rng(0))
        if len(matches.weight) == 0:
            raise ValueError("holds no correspondence; leave out this pair")
        return matches


def measure_pair(reader: PairReader, pair: Pair) -> tuple[PairMeasure, list[str]]:
    """Read a pair's correspondences and measure them; also messages about points outside their image.

    Raises:
        ValueError, OSError: if they cannot be read, or none lies inside both images.
    """
    matches = reader(pair)
    names, keypoints = (pair.image_a, pair.image_b), (matches.keypoints_a, matches.keypoints_b)
    inside, problems = np.ones(len(matches.weight), dtype=bool), []
    for name, xy in zip(names, keypoints, strict=True):
        width, height = reader.sizes[name]
        within = ((xy >= 0) & (xy <= (width, height))).all(1)
        inside &= within
        if not within.all():
            x, y = xy[np.flatnonzero(~within)[0]]
            problems.append(
                f"{describe(pair)}: {np.sum(~within)} of {len(xy)} correspondences lie outside {name} "
                f"({width}×{height}), the first at ({x:.1f}, {y:.1f})"
            )
    if not inside.any():
        raise ValueError("no correspondence lies inside both images")
    xy_a, xy_b = (np.asarray(xy, dtype=np.float64)[inside] for xy in keypoints)
    both = ((xy_a, reader.sizes[pair.image_a]), (xy_b, reader.sizes[pair.image_b]))
    errors, how = correspondence_errors(reader.scene, pair, xy_a, xy_b)
    measure = PairMeasure(
        correspondences=max(len(matches.weight), pair.count),
        spread=min(occupied_share(xy, size) for xy, size in both),
        overlap=min(hull_share(xy, size) for xy, size in both),
        errors=errors[evenly(len(errors), _KEPT_ERRORS)],
        how=how,
    )
    return measure, problems


def describe(pair: Pair) -> str:
    """A pair in a message, with its file of correspondences."""
    source = f" ({pair.correspondences})" if pair.correspondences else ""
    return f"pair {pair.image_a} ↔ {pair.image_b}{source}"


def occupied_share(xy: np.ndarray, size: tuple[int, int]) -> float:
    """Share of an image's 8×8 cells that hold one of the points (N, 2); size is width, height."""
    cells = np.clip((xy / size * CELLS).astype(int), 0, CELLS - 1)
    return len(np.unique(cells[:, 0] * CELLS + cells[:, 1])) / CELLS**2


def hull_share(xy: np.ndarray, size: tuple[int, int]) -> float:
    """Share of an image's area inside the convex hull of points (N, 2); 0 where they span none."""
    try:
        return float(ConvexHull(xy).volume) / (size[0] * size[1]) if len(xy) > 2 else 0.0
    except QhullError:  # all on one line
        return 0.0
