"""Which references with depth see the same points, and how many; see `shared_points` for those with 3D points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gnnet.data.queries import nearest_by_pose
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose

_SEEN_AGAIN = 128  # points of a reference with depth that are projected into others


def covisible_by_depth(
    poses: Pose, cameras: Camera, places: Sequence[str], points_of: Callable[[int], Tensor], *, candidates: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each reference: rows (K,) of the nearest of its place, and how many of its points they see, (K,).

    Some points of the reference are projected into them. Occlusion is ignored, as neighbours are near and the
    exact number matters little.

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
