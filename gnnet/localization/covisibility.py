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
from gnnet.scenes.scene import SceneImage

_SEEN_AGAIN = 128  # points of a reference with depth that are projected into others


def covisible_by_points(references: Sequence[SceneImage], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each reference: rows (K,) of the others that observe some of its points, and how many points (K,).

    Args:
        references: with `point_ids`.
        count: number of the scene's points.
    """
    ids = [np.unique(i.point_ids).astype(np.int32) for i in references]
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int32)
    columns = np.concatenate(ids)
    del ids  # a model may have 100 million observations
    seen = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=(len(references), count))
    transposed = seen.T.tocsr()
    for row in range(len(references)):
        common = (seen[[row]] @ transposed).tocoo()
        others = common.coords[1] != row
        yield common.coords[1][others], common.data[others]


def covisible_by_depth(
    references: Sequence[SceneImage], points_of: Callable[[int], Tensor], *, candidates: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same from projections: some points of each reference are projected into the nearest of its place.

    Occlusion is ignored, as neighbours are near and the exact number matters little.

    Args:
        references: with cameras and poses.
        points_of: gives for the row of a reference the points (N, 3) that it observes, metres in the world.
        candidates: limit on the others that are looked at.
    """
    poses = Pose.stack([i.cam_from_world for i in references])
    cameras = Camera.stack([i.camera for i in references])
    places = torch.from_numpy(np.unique([i.place for i in references], return_inverse=True)[1])
    for row in range(len(references)):
        near = nearest_by_pose(poses[row], poses, candidates + 1)
        near = near[(near != row) & (places[near] == places[row])]
        points = points_of(row)
        points = points[:: max(1, len(points) // _SEEN_AGAIN)]
        _, visible = cameras[near].project(poses[near].transform(points.expand(len(near), -1, -1)))
        yield near.numpy(), visible.sum(-1).numpy()
