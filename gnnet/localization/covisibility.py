"""Covisibility: which references see the same points, and how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from gnnet.data.queries import nearest_by_pose
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose

_SEEN_AGAIN = 128  # points of a reference with depth that are projected into others


def covisible_by_points(point_ids: Sequence[np.ndarray], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each reference: rows (K,) of the others that observe some of its points, and how many points (K,).

    Args:
        point_ids: (K,) rows of the scene's points that each reference observes.
        count: number of the scene's points.
    """
    ids = [np.unique(i).astype(np.int32) for i in point_ids]
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int32)
    columns = np.concatenate(ids)
    del ids  # a model may have 100 million observations
    seen = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=(len(point_ids), count))
    transposed = seen.T.tocsr()
    for row in range(len(point_ids)):
        common = (seen[[row]] @ transposed).tocoo()
        others = common.coords[1] != row
        yield common.coords[1][others], common.data[others]


def covisible_by_depth(
    poses: Pose, cameras: Camera, places: Sequence[str], points_of: Callable[[int], Tensor], *, candidates: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same from projections: some points of each reference are projected into the nearest of its place.

    Occlusion is ignored, as neighbours are near and the exact number matters little.

    Args:
        poses, cameras, places: of the references, (R,).
        points_of: gives for the row of a reference the points (N, 3) that it observes, metres in the world.
        candidates: limit on the others that are looked at.
    """
    place = torch.from_numpy(np.unique(places, return_inverse=True)[1])
    for row in range(len(places)):
        near = nearest_by_pose(poses[row], poses, candidates + 1)
        near = near[(near != row) & (place[near] == place[row])]
        points = points_of(row)
        points = points[:: max(1, len(points) // _SEEN_AGAIN)]
        _, visible = cameras[near].project(poses[near].transform(points.expand(len(near), -1, -1)))
        yield near.numpy(), visible.sum(-1).numpy()
