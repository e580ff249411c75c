"""Poses from matches, against exact projections by pycolmap."""

from __future__ import annotations

import math

import numpy as np
import pycolmap
import pytest
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, exp, pose_errors
from gnnet.localization.pnp import PoseSolver
from tests.geometry.test_camera import MODELS, SIZES, camera_of

OPENCV = [500.0, 510.0, 322.0, 238.0, -0.12, 0.05, 0.002, -0.001]
CAMERA = Camera.from_colmap("OPENCV", 640, 480, OPENCV, dtype=torch.float64)


def scene(count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Pose]:
    """Pixels projected by pycolmap, their world points, and the pose."""
    generator = np.random.default_rng(seed)
    in_camera = generator.uniform((-1.5, -1.2, 3), (1.5, 1.2, 8), (count, 3))
    keypoints = pycolmap.Camera(model="OPENCV", width=640, height=480, params=OPENCV).img_from_cam(in_camera)
    pose = exp(torch.tensor([0.4, -0.2, 1.0, 0.3, -0.5, 0.2], dtype=torch.float64))
    return keypoints, pose.inverse().transform(torch.from_numpy(in_camera)).numpy(), pose


def test_exact_projections_with_distortion_give_the_pose():
    keypoints, points, pose = scene()
    result = PoseSolver(max_error=1.0).solve(keypoints, points, CAMERA)
    position, rotation = pose_errors(result.cam_from_world, pose)
    assert position < 1e-6 and rotation < 1e-5
    assert result.inliers.all() and "200 inliers of 200" in result.reason


@pytest.mark.cases
@pytest.mark.parametrize("model", MODELS)
def test_every_camera_model_gives_the_pose(model):
    """Also panoramas and lenses that see what lies behind them."""
    width, height = SIZES[model]
    camera = pycolmap.Camera(model=model, width=width, height=height, params=MODELS[model])
    generator = np.random.default_rng(0)
    in_camera = generator.normal((0, 0, 1), 1, (3000, 3))
    keypoints = camera.img_from_cam(in_camera)
    seen = ((keypoints > 0) & (keypoints < camera_of(model).size.numpy())).all(1)
    pose = exp(torch.tensor([0.4, -0.2, 1.0, 0.3, -0.5, 0.2], dtype=torch.float64))
    points = pose.inverse().transform(torch.from_numpy(in_camera[seen]))
    keypoints = keypoints[seen] + generator.normal(0, 0.1, (seen.sum(), 2))
    result = PoseSolver(max_error=1.0).solve(keypoints, points, camera_of(model))
    position, rotation = pose_errors(result.cam_from_world, pose)
    assert position < 0.002 and rotation < 0.05
    assert result.inliers.double().mean() > 0.98


@pytest.mark.parametrize("guess", [200.0, 500.0, 2000.0])
def test_the_focal_length_is_estimated_whatever_the_guess(guess):
    generator = np.random.default_rng(0)
    in_camera = torch.from_numpy(generator.uniform((-1.5, -1.2, 3), (1.5, 1.2, 8), (200, 3)))
    camera = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, [700.0, 320.0, 240.0], dtype=torch.float64)
    keypoints = camera.project(in_camera)[0] + torch.from_numpy(generator.normal(0, 0.3, (200, 2)))
    keypoints[:80] = torch.from_numpy(generator.uniform((0, 0), (640, 480), (80, 2)))
    points = exp(torch.tensor([0.4, -0.2, 1.0, 0.3, -0.5, 0.2], dtype=torch.float64)).inverse().transform(in_camera)
    guessed = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, [guess, 320.0, 240.0], dtype=torch.float64)
    found = PoseSolver().estimate_focal(keypoints, points, guessed)
    assert found.parameters[:2] == pytest.approx(700, rel=0.003)
    assert PoseSolver().estimate_focal(keypoints[:8], points[:8], guessed) is None


def test_wrong_matches_are_found_and_one_seed_gives_one_pose():
    keypoints, points, pose = scene()
    generator = np.random.default_rng(1)
    keypoints = keypoints + generator.normal(0, 0.3, keypoints.shape)
    wrong = generator.permutation(200)[:120]
    keypoints[wrong] = generator.uniform((0, 0), (640, 480), (120, 2))
    keypoints[wrong[0]] = np.nan
    points[wrong[1]] = np.inf
    results = [PoseSolver(max_error=2.0, seed=3).solve(torch.from_numpy(keypoints), points, CAMERA) for _ in range(2)]
    position, rotation = pose_errors(results[0].cam_from_world, pose)
    assert position < 0.02 and rotation < 0.2
    right = np.ones(200, dtype=bool)
    right[wrong] = False
    assert (results[0].inliers.numpy() != right).sum() <= 3
    assert not results[0].inliers[wrong[:2]].any()
    assert torch.equal(results[0].cam_from_world.matrix(), results[1].cam_from_world.matrix())


def test_distortion_counts():
    """Without distortion the pose is wrong, so that the camera's distortion must reach the solver."""
    keypoints, points, pose = scene()
    straight = Camera(CAMERA.size, torch.cat([CAMERA.parameters[:4], torch.zeros(4, dtype=torch.float64)]))
    result = PoseSolver(max_error=10.0).solve(keypoints, points, straight)
    assert pose_errors(result.cam_from_world, pose)[0] > 1e-3


@pytest.mark.parametrize("case", ["none", "few", "one point", "a line", "nan", "chance", "huge"])
def test_degenerate_input_gives_a_reason(case):
    keypoints, points, _ = scene()
    if case == "none":
        keypoints, points = keypoints[:0], points[:0]
    elif case == "few":
        keypoints, points = keypoints[:11], points[:11]
    elif case == "one point":
        keypoints[:], points[:] = keypoints[0], points[0]
    elif case == "a line":
        in_camera = np.array([0.1, 0.2, 4]) + np.linspace(-1, 1, 200)[:, None] * np.array([1, 0.3, 0.5])
        points = in_camera
        keypoints = pycolmap.Camera(model="OPENCV", width=640, height=480, params=OPENCV).img_from_cam(in_camera)
    elif case == "nan":
        keypoints[:] = math.nan
    elif case == "chance":
        keypoints = np.random.default_rng(2).uniform((0, 0), (640, 480), (200, 2))
    else:
        points = points * 1e300
    result = PoseSolver(max_error=1.0).solve(keypoints, points, CAMERA)
    assert result.cam_from_world is None
    assert len(result.inliers) == len(keypoints) and not result.inliers.any()
    assert result.reason


def test_wrong_shapes_and_settings_are_explained():
    keypoints, points, _ = scene(20)
    with pytest.raises(ValueError, match=r"keypoints \(20, 2\), points \(19, 3\)"):
        PoseSolver().solve(keypoints, points[:19], CAMERA)
    with pytest.raises(ValueError, match=r"camera \(2,\)"):
        PoseSolver().solve(keypoints, points, Camera.stack([CAMERA, CAMERA]))
    with pytest.raises(ValueError, match="min_inliers 3"):
        PoseSolver(min_inliers=3).solve(keypoints, points, CAMERA)


@pytest.mark.cases
def test_a_likely_focal_length_is_kept_where_the_points_fix_none():
    """All points in a plane that faces the camera: distance and focal length cannot be told apart."""
    generator = np.random.default_rng(0)
    in_camera = torch.from_numpy(generator.uniform((-2, -1.5, 4), (2, 1.5, 4.0000001), (30, 3)))
    camera = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, [600.0, 320.0, 240.0], dtype=torch.float64)
    keypoints = camera.project(in_camera)[0] + torch.from_numpy(generator.normal(0, 1.5, (30, 2)))
    near = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, [612.0, 320.0, 240.0], dtype=torch.float64)
    likely, free = (
        PoseSolver().estimate_focal(keypoints, in_camera, near, likely=likely).parameters[0].item()
        for likely in (True, False)
    )
    assert abs(likely - 600) < abs(free - 600) and likely == pytest.approx(600, rel=0.1)


@pytest.mark.cases
def test_a_focal_length_that_is_wrongly_told_does_not_count():
    generator = np.random.default_rng(0)
    in_camera = torch.from_numpy(generator.uniform((-1.5, -1.2, 3), (1.5, 1.2, 8), (200, 3)))
    camera = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, [700.0, 320.0, 240.0], dtype=torch.float64)
    keypoints = camera.project(in_camera)[0] + torch.from_numpy(generator.normal(0, 0.3, (200, 2)))
    wrong = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, [2100.0, 320.0, 240.0], dtype=torch.float64)
    found = PoseSolver().estimate_focal(keypoints, in_camera, wrong, likely=True)
    assert found.parameters[:2] == pytest.approx(700, rel=0.005)
