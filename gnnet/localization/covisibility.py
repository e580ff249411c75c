"""Which references see the same points, and how many: of each, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.retrieval import nearest_by_pose
from gnnet.scenes.scene import SceneImage

_SEEN_AGAIN = 128  # points of a reference that tell, where it has depth, which others see them too


def covisible_by_points(references: Sequence[SceneImage], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each reference: rows (K,) of the others that observe points of its, and how many (K,).

    Args:
        references: with `point_ids`.
        count: of the scene's points.
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
    """The same by projecting some points of each reference into those of its place taken from nearby.

    What hides a point is not looked at: neighbours are taken from nearby, and their number matters little.

    Args:
        references: with cameras and poses.
        points_of: row of a reference to what it observes (N, 3), metres in the world.
        candidates: others that are looked at, at most.
    """
    poses = Pose.stack([i.cam_from_world for i in references])
    cameras = Camera.stack([i.camera for i in references])
    places = torch.from_numpy(np.unique([i.place for i in references], return_inverse=True)[1])
    for row, pose in enumerate(references):
        near = nearest_by_pose(pose.cam_from_world, poses, candidates + 1)
        near = near[(near != row) & (places[near] == places[row])]
        points = points_of(row)
        points = points[:: max(1, len(points) // _SEEN_AGAIN)]
        _, visible = cameras[near].project(poses[near].transform(points.expand(len(near), -1, -1)))
        yield near.numpy(), visible.sum(-1).numpy()
