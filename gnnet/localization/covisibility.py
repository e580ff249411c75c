"""Covisibility of references that have depth; by 3D points it is `gnnet.scenes.pairing.shared_points`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gnnet.data.queries import nearest_by_pose
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.scene import SceneImage

_SEEN_AGAIN = 128  # points of a reference with depth that are projected into others


def covisible_by_depth(
    references: Sequence[SceneImage], points_of: Callable[[int], Tensor], *, candidates: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each reference: rows (K,) of others of its place, and how many of some of its points project into each (K,).

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
