"""Triangulation against exact points, and against scipy's least squares of the reprojection error."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import least_squares

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, so3_exp
from gnnet.geometry.triangulation import triangulate

SIZE, PARAMETERS = [640.0, 480.0], [500.0, 510.0, 321.0, 239.0, -0.1, 0.02, 0.001, -0.002]


def seen(points: int = 30, images: int = 4, noise: float = 0.0):
    """Cameras side by side that look at points some metres away: points, keypoints, cameras, poses, point."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(points, 3, generator=generator, dtype=torch.float64) - 0.5 + torch.tensor([0, 0, 4.0])
    rotations = so3_exp(0.1 * torch.randn(images, 3, generator=generator, dtype=torch.float64))
    centers = torch.tensor([[0.4 * i, 0.1 * i * i, 0.0] for i in range(images)], dtype=torch.float64)
    camera = Camera(torch.tensor(SIZE).double(), torch.tensor(PARAMETERS).double())
    poses = Pose.from_center(rotations, centers)
    image = torch.arange(images).repeat_interleave(points)
    point = torch.arange(points).repeat(images)
    cameras = Camera.stack([camera] * len(image))
    xy, _ = cameras.project(poses[image].transform(truth[point][:, None]))
    xy = xy.squeeze(1) + noise * torch.randn(len(image), 2, generator=generator, dtype=torch.float64)
    return truth, xy, cameras, poses[image], point


def test_exact_observations_give_the_exact_point_through_distortion():
    truth, xy, cameras, poses, point = seen()
    found, fixed = triangulate(xy, cameras, poses, point, len(truth))
    assert fixed.all()
    torch.testing.assert_close(found, truth, atol=1e-9, rtol=0)


def test_of_noisy_observations_it_is_the_least_squares_point():
    truth, xy, cameras, poses, point = seen(points=8, noise=0.7)
    found, fixed = triangulate(xy, cameras, poses, point, len(truth))
    assert fixed.all()

    def residuals(values: np.ndarray, mine: torch.Tensor) -> np.ndarray:
        at = torch.from_numpy(values).expand(int(mine.sum()), 1, 3)
        return (cameras[mine].project(poses[mine].transform(at))[0].squeeze(1) - xy[mine]).numpy().ravel()

    for n in range(len(truth)):
        best = least_squares(residuals, truth[n].numpy(), args=(point == n,), xtol=1e-14, ftol=1e-14, gtol=1e-14)
        np.testing.assert_allclose(found[n], best.x, atol=1e-6)
        assert np.linalg.norm(found[n] - truth[n]) > 1e-4  # the noise is felt, so the two could differ


def test_one_ray_parallel_rays_and_none_fix_nothing_and_leave_the_others_as_they_are():
    truth, xy, cameras, poses, point = seen(points=4, images=3)
    image = torch.arange(3).repeat_interleave(4)
    kept = ~((point == 0) & (image > 0)) & (point != 2)  # point 0 is seen once, 2 never
    twice = torch.where(point == 1, 0, image) * 4 + point  # 1 by the same camera three times
    xy, cameras, poses = xy[twice][kept], cameras[twice][kept], poses[twice][kept]
    found, fixed = triangulate(xy, cameras, poses, point[kept], 4)
    assert fixed.tolist() == [False, False, False, True] and found.isfinite().all()
    torch.testing.assert_close(found[3], truth[3], atol=1e-9, rtol=0)
    nothing, none = triangulate(xy[:0], cameras[:0], poses[:0], point[:0], 2)
    assert nothing.shape == (2, 3) and not none.any()


def test_rays_that_meet_behind_the_cameras_fix_nothing():
    _, xy, cameras, poses, point = seen(points=1)
    poses = Pose.from_center(torch.eye(3, dtype=torch.float64).expand(len(xy), 3, 3), poses.center())
    ahead = torch.tensor([[0.0, 0.0, 4.0]], dtype=torch.float64).expand(len(xy), 1, 3)
    plain = Camera(cameras.size, cameras.parameters * torch.tensor([1.0] * 4 + [0.0] * 4))
    towards = plain.project(poses.transform(ahead))[0].squeeze(1)
    assert triangulate(towards, plain, poses, point, 1)[1].all()
    assert not triangulate(2 * plain.parameters[:, 2:4] - towards, plain, poses, point, 1)[1].any()
