"""One pair's correspondences: how many, how evenly spread, how large the common area, and how far from the poses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError

from gnnet.data.correspondences import PairPoints
from gnnet.data.images import read_image
from gnnet.data.sift import detect_sift, match_sift
from gnnet.data.timelapse import PlaceStructure
from gnnet.evaluation.inspect.agreement import match_agreement
from gnnet.geometry.pose import skew
from gnnet.sampling import evenly
from gnnet.scenes.formats.correspondences import Correspondences
from gnnet.scenes.scene import Pair, Scene, SceneImage

CELLS = 8  # of the grid on an image, a side
MOST_CORRESPONDENCES = 10_000  # read of a pair
_KEPT_ERRORS = 500  # of a pair


class PairMeasure(NamedTuple):
    """Of one pair.

    Args:
        pair: which.
        count: number of correspondences.
        spread: share of an image's 8×8 cells that hold a correspondence, of the emptier image.
        overlap: share of an image's area inside the hull of its correspondences, of the image that shares less.
        errors: (K,) pixels, of some of the correspondences; empty where unknown.
        how: in words, what the errors are distances to; None where unknown.
    """

    pair: Pair
    count: int
    spread: float
    overlap: float
    errors: np.ndarray
    how: str | None


class PairReader:
    """Reads correspondences of a scene's pairs as training does, all that are there or some `MOST_CORRESPONDENCES`.

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
    """Read a pair's correspondences and measure them; with messages about points outside their image.

    Raises:
        ValueError, OSError: if they cannot be read, or none lies inside both images.
    """
    matches = reader(pair)
    inside, problems = np.ones(len(matches.weight), dtype=bool), []
    for name, xy in ((pair.image_a, matches.keypoints_a), (pair.image_b, matches.keypoints_b)):
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
    xy_a, xy_b = (np.asarray(xy, dtype=np.float64)[inside] for xy in (matches.keypoints_a, matches.keypoints_b))
    both = ((xy_a, reader.sizes[pair.image_a]), (xy_b, reader.sizes[pair.image_b]))
    errors, how = correspondence_errors(reader.scene, pair, xy_a, xy_b)
    measure = PairMeasure(
        pair=pair,
        count=max(len(matches.weight), pair.count),
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


def correspondence_errors(
    scene: Scene, pair: Pair, xy_a: np.ndarray, xy_b: np.ndarray
) -> tuple[np.ndarray, str | None]:
    """Errors (K,) in pixels of correspondences (N, 2) in a and b, and how they were measured.

    Empty and None where poses are not known, and where the correspondences were made from depth and the
    poses, so that they agree in any case: see `image_errors`.
    """
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    unknown = np.zeros(0), None
    if any(image.camera is None or image.cam_from_world is None for image in (a, b)):
        return unknown
    if pair.correspondences is not None:
        errors = epipolar_distances(a, b, xy_a, xy_b)
        return (errors, "correspondences to the epipolar lines of the poses") if len(errors) else unknown
    made_from_depth = a.depth is not None and b.depth is not None
    if pair.static or made_from_depth or a.point_ids is None or b.point_ids is None:
        return unknown
    shared, in_a, in_b = np.intersect1d(a.point_ids, b.point_ids, return_indices=True)
    points = scene.points[torch.from_numpy(shared)]
    errors = [reprojection_errors(image, points, rows) for image, rows in ((a, in_a), (b, in_b))]
    return np.concatenate(errors), "common 3D points projected to both images"


def image_pairs(scene: Scene, count: int) -> list[Pair]:
    """At most `count` pairs, spread over the list, whose correspondences `image_errors` can measure."""
    with_depth = {image.name for image in scene.images.values() if image.depth is not None}
    pairs = [
        pair
        for pair in scene.pairs
        if pair.correspondences is None
        and pair.image_a != pair.image_b
        and (pair.static or (pair.image_a in with_depth and pair.image_b in with_depth))
    ]
    return [pairs[i] for i in sample_evenly(len(pairs), count)]


def image_errors(scene: Scene, pair: Pair) -> np.ndarray:
    """Pixel distances (K,) between SIFT's matches and where depth or a still camera puts them.

    Some matches are wrong, so look at the median.

    Raises:
        ValueError, OSError: if an image or depth map cannot be read.
    """
    if not pair.static:
        return match_agreement(scene, pair)
    a, b = (detect_sift(read_image(scene.images[name].path), upright=True) for name in (pair.image_a, pair.image_b))
    matches = match_sift(a.descriptors, b.descriptors)
    moved = b.keypoints[matches.nearest[matches.kept]] - a.keypoints[matches.kept]
    return moved.norm(dim=-1).double().numpy()


def sample_evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` indices (None: all) in rising order: one at random of each of as many stretches of `count`.

    Not every so many, as lists of pairs are periodic.
    """
    if limit is None or count <= limit:
        return list(range(count))
    edges = np.arange(limit + 1) * count // max(1, limit)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:]).tolist()


def reprojection_errors(image: SceneImage, points: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Distances (K,) in pixels from an image's keypoints `rows` to projected points (K, 3); inf where not visible."""
    xy, valid = image.camera.project(image.cam_from_world.transform(points))
    distance = np.linalg.norm(xy.numpy() - np.asarray(image.keypoints)[rows], axis=-1)
    return np.where(valid.numpy(), distance, np.inf)


def epipolar_distances(a: SceneImage, b: SceneImage, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """Mean distance (N,) in undistorted pixels of points (N, 2) to each other's epipolar line.

    Empty where both cameras stand at one spot, where there are no such lines.
    """
    b_from_a = b.cam_from_world @ a.cam_from_world.inverse()
    baseline = b_from_a.translation.norm()
    if baseline < 1e-6:
        return np.zeros(0)
    rays_a, rays_b = a.camera.unproject(torch.from_numpy(xy_a)), b.camera.unproject(torch.from_numpy(xy_b))
    essential = skew(b_from_a.translation / baseline) @ b_from_a.rotation
    lines_b, lines_a = rays_a @ essential.T, rays_b @ essential  # [N, 3]
    residual = (rays_b * lines_b).sum(-1).abs()
    distances = [
        residual / lines[:, :2].norm(dim=-1).clamp(min=1e-12) * image.camera.parameters[:2].mean()
        for image, lines in ((a, lines_a), (b, lines_b))
    ]
    return ((distances[0] + distances[1]) / 2).numpy()
