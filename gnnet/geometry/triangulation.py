"""3D points from pixels of cameras whose poses are known."""

from __future__ import annotations

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose

STEPS = 10  # of Gauss-Newton; from the midpoint, three or four are enough
# Degrees between the rays of a point; below, its depth is noise. A point far ahead of a moving camera has small angles,
# and still tells how a camera between the others is turned.
MIN_ANGLE = 0.25


def triangulate(
    keypoints: Tensor, camera: Camera, cam_from_world: Pose, point: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Points of least squared reprojection error.

    Each starts at the point nearest to its rays and goes on by Gauss-Newton.

    Args:
        keypoints: (T, 2) pixels, observations of all points.
        camera, cam_from_world: (T,) of the images observed in, float64.
        point: (T,) which point is observed, below `count`.
        count: number of points N.

    Returns:
        Points (N, 3) in the world, in metres, and whether they are fixed (N,): seen by two rays at an angle of
        `MIN_ANGLE` or more (or by more rays that spread as much), and in front of every camera.
    """
    keypoints = keypoints.to(cam_from_world.dtype)
    observed = torch.bincount(point, minlength=count)
    rays, found = camera.unproject(keypoints[:, None])
    rays = torch.nn.functional.normalize(rays, dim=-1) @ cam_from_world.rotation  # [T, 1, 3] in the world
    eye = torch.eye(3, dtype=rays.dtype, device=rays.device)
    across = torch.where(found[..., None], eye - rays.mT * rays, 0)  # what is across a ray
    system = _sums(across, point, count)
    # Two rays at an angle a leave 1 - cos a, more rays more.
    spread = torch.linalg.eigvalsh(system)[:, 0]
    fixed = (observed > 1) & (spread > 1 - torch.cos(torch.deg2rad(torch.tensor(MIN_ANGLE, dtype=rays.dtype))))
    system = torch.where(fixed[:, None, None], system, eye)
    origin = cam_from_world.center()[:, :, None]
    points = torch.linalg.solve(system, _sums(across @ origin, point, count)).squeeze(-1)
    in_front = torch.ones_like(point, dtype=torch.bool)
    for step in range(STEPS + 1):
        in_camera = cam_from_world.transform(points[point][:, None])
        in_front = in_camera[:, 0, 2] > 0
        if step == STEPS:
            break
        xy, jacobian, _ = camera.project_with_jacobian(in_camera)
        jacobian = jacobian.squeeze(1) @ cam_from_world.rotation  # [T, 2, 3]
        gradient = jacobian.mT @ (xy.squeeze(1) - keypoints)[..., None]
        system = _sums(jacobian.mT @ jacobian, point, count)
        solvable = fixed & (torch.linalg.cholesky_ex(system).info == 0)
        move = torch.linalg.solve(torch.where(solvable[:, None, None], system, eye), _sums(gradient, point, count))
        points = points - torch.where(solvable[:, None], move.squeeze(-1), 0)
    behind = torch.bincount(point[~in_front], minlength=count) > 0
    return points, fixed & ~behind & points.isfinite().all(-1)


def _sums(values: Tensor, point: Tensor, count: int) -> Tensor:
    """Sums over the observations (T, ...) of each point, (N, ...)."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, point, values)
