"""Which images of a scene make training pairs: by common 3D points, by gaps in a sequence, and within one stretch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.progress import track
from gnnet.scenes.values import Pair, SceneImage

_CHUNK = 64  # images whose common points with all others are counted at once
_PROBES = torch.cartesian_prod(*2 * [torch.linspace(0.1, 0.9, 5, dtype=torch.float64)])  # (25, 2) of the image's size
_PROBE_DEPTHS = (1.0, 2.0, 4.0)  # metres

_log = logging.getLogger(__name__)


def shared_points(point_ids: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each image in turn: which other images observe some of its points, and how many.

    Args:
        point_ids: (K,) for each image, rows of the scene's points that it observes; a repeated row counts once.

    Yields:
        Positions (M,) of the other images, in any order, and the numbers (M,) of common points, 1 or more.
    """
    ids = [np.unique(rows).astype(np.int32) for rows in point_ids]
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int32)  # as the columns: scipy would widen these in a copy
    columns = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    shape = (len(ids), int(columns.max(initial=-1)) + 1)
    del ids  # a model may have 100 million observations
    seen = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=shape)
    seen_by = seen.T.tocsr()
    for start in range(0, shape[0], _CHUNK):
        shared = seen[start : start + _CHUNK] @ seen_by
        for i in range(shared.shape[0]):
            part = slice(shared.indptr[i], shared.indptr[i + 1])
            others = shared.indices[part] != start + i
            yield shared.indices[part][others], shared.data[part][others]


def covisible_pairs(images: Sequence[SceneImage], min_shared: int, per_image: int, progress: bool) -> list[Pair]:
    """Pair each image with the `per_image` others that share most points with it; each pair comes once.

    Args:
        images: with `point_ids`, rows of the same points.
        min_shared: fewer common points make no pair.
        per_image: partners that an image chooses at most; others may choose it besides.
        progress: show a progress bar.

    Returns:
        Pairs with the number of common points as their `count`, in the order of the images.
    """
    found: dict[tuple[int, int], int] = {}
    counted = shared_points(image.point_ids for image in images if image.point_ids is not None)
    for i, (others, counts) in enumerate(
        track(counted, "Pairing images", total=len(images), show=progress)
    ):
        enough = counts >= min_shared
        others, counts = others[enough], counts[enough]
        best = np.lexsort((-others, -counts))[:per_image]
        found |= {(min(i, j), max(i, j)): n for j, n in zip(others[best].tolist(), counts[best].tolist(), strict=True)}
    return [Pair(images[i].name, images[j].name, images[i].place, count=n) for (i, j), n in sorted(found.items())]


def pairs_at_gaps(
    images: Sequence[SceneImage], numbers: Iterable[int], gaps: Iterable[int], min_overlap: float
) -> list[Pair]:
    """Pair images of one sequence whose numbers differ by a gap, if their views overlap.

    Args:
        images: of one place, with camera and pose.
        numbers: of each image, ascending. Where a number is missing, the next one stands in for it,
            up to half a gap later.
        gaps: positive differences.
        min_overlap: see `overlapping_pairs`.

    Raises:
        ValueError: if a gap is not positive.
    """
    numbers = np.fromiter(numbers, dtype=np.int64, count=len(images))
    rows: set[tuple[int, int]] = set()
    for gap in gaps:
        if gap < 1:
            raise ValueError(f"dataset.gaps holds {gap}; expected positive numbers")
        later = np.searchsorted(numbers, numbers + gap)
        first = np.flatnonzero(later < len(numbers))
        later = later[first]
        near = numbers[later] - numbers[first] <= 1.5 * gap
        rows |= set(zip(first[near].tolist(), later[near].tolist(), strict=True))
    return overlapping_pairs(images, sorted(rows), min_overlap)


def overlapping_pairs(images: Sequence[SceneImage], rows: Sequence[tuple[int, int]], min_overlap: float) -> list[Pair]:
    """Keep the pairs whose views share at least `min_overlap` (0 to 1) in both directions, see `view_overlap`.

    Args:
        images: with camera and pose.
        rows: positions of both images of each pair.
        min_overlap: share of one view that lies in the other.
    """
    if not rows:
        return []
    a, b = (np.array(side) for side in zip(*rows, strict=True))
    cameras = Camera.stack([image.camera for image in images if image.camera is not None])
    poses = Pose.stack([image.cam_from_world for image in images if image.cam_from_world is not None])
    overlap = torch.minimum(
        view_overlap(cameras[a], poses[a], cameras[b], poses[b]),
        view_overlap(cameras[b], poses[b], cameras[a], poses[a]),
    )
    return [
        Pair(images[i].name, images[j].name, images[i].place)
        for (i, j), share in zip(rows, overlap.tolist(), strict=True)
        if share >= min_overlap
    ]


def view_overlap(camera_a: Camera, a_from_world: Pose, camera_b: Camera, b_from_world: Pose) -> Tensor:
    """Share (N,) of points 1, 2 and 4 m in front of cameras a (N,) that lie in images b (N,); no depth is read."""
    rays, found = camera_a.unproject(camera_a.size[:, None, :] * _PROBES)  # [N, 25, 3]
    points = torch.cat([rays * depth for depth in _PROBE_DEPTHS], 1)
    _, seen = camera_b.project((b_from_world @ a_from_world.inverse()).transform(points))
    return (seen & found.repeat(1, len(_PROBE_DEPTHS))).double().mean(1)


def within_places(pairs: Sequence[Pair], places: Mapping[str, str]) -> list[Pair]:
    """Keep the pairs of which both images are in one place, and give them that place.

    Args:
        pairs: their place does not count.
        places: by name of an image; an image that is not there has no pair.
    """
    kept = [
        replace(pair, place=places[pair.image_a])
        for pair in pairs
        if pair.image_a in places and places[pair.image_a] == places.get(pair.image_b)
    ]
    if len(kept) < len(pairs):
        _log.info("%d of %d pairs left out, as their images are in two places", len(pairs) - len(kept), len(pairs))
    return kept


def centers_of(images: Iterable[SceneImage]) -> np.ndarray:
    """Camera centres (N, 3) in metres of images that have a pose."""
    poses = [image.cam_from_world for image in images if image.cam_from_world is not None]
    return Pose.stack(poses).center().numpy()


def stretches_of(centers: np.ndarray, count: int) -> np.ndarray:
    """Cut a path into `count` stretches along its main axis, each with equally many camera centres, up to one.

    Args:
        centers: (N, 3) camera centres in metres.
        count: number of stretches; with fewer centres than that, each centre is one.

    Returns:
        (N,) number of the stretch that each centre lies in.
    """
    offsets = centers - centers.mean(0)
    axis = np.linalg.svd(offsets, full_matrices=False)[2][0]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])  # the sign of a singular vector is arbitrary
    rank = np.argsort(np.argsort(offsets @ axis, kind="stable"), kind="stable")
    return rank * min(count, len(centers)) // len(centers)


def stretches_by_length(centers: np.ndarray, length: float) -> list[int]:
    """Cut a drive into stretches: a new one begins `length` metres from its start, or where the drive jumps as far.

    Args:
        centers: (N, 3) camera centres in metres, in the order of the drive.
        length: metres.

    Returns:
        The number of the stretch that each centre lies in.
    """
    numbers: list[int] = []
    number = start = 0
    for i, center in enumerate(centers):
        jumped = i > 0 and np.linalg.norm(center - centers[i - 1]) > length
        if jumped or np.linalg.norm(center - centers[start]) > length:
            number, start = number + 1, i
        numbers.append(number)
    return numbers
