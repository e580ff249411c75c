"""Several cameras with known relative poses: normal equations, PnP and the localizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gnnet.data.images import read_image
from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import sample
from gnnet.geometry.pose import Pose, exp, perturb, pose_errors
from gnnet.localization.compile import compile_map
from gnnet.localization.initial_pose import GivenPose, NearestPose, PoseFromMatches
from gnnet.localization.localizer import Localizer
from gnnet.localization.matching import Matcher
from gnnet.localization.normal_equations import RigLevel, linearise
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import RefinementStatus, View, refine_pose
from gnnet.localization.result import Status
from gnnet.localization.rig import Rig, RigImage
from gnnet.localization.robust import Robust
from gnnet.models.unet import UNet
from gnnet.scenes.layouts.robotcar import load_robotcar
from tests.localization.test_refinement import MODELS, element, level_of, problem, with_confidences

DOUBLE = torch.float64


def random_poses(count: int, seed: int = 0) -> Pose:
    return perturb(Pose.identity(count, dtype=DOUBLE), 0.5, 30.0, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_the_adjoint_takes_a_step_to_the_other_side(shape):
    generator = torch.Generator().manual_seed(1)
    pose = perturb(Pose.identity(*shape, dtype=DOUBLE), 2.0, 70.0, generator)
    delta = torch.randn(*shape, 6, generator=generator, dtype=DOUBLE)
    moved = (pose.adjoint() @ delta[..., None]).squeeze(-1)
    torch.testing.assert_close((pose @ exp(delta)).matrix(), (exp(moved) @ pose).matrix())


# --- normal equations and refinement


def rig_problem(points: int | None = None, *, confident: bool = False, **settings) -> tuple[list[View], Pose, Pose]:
    """Two views of one instant, with so many valid points each, and the true and the initial pose of the rig."""
    arguments, truth = problem(batch=2, models=MODELS[1:3], **settings)
    arguments = with_confidences(arguments) if confident else arguments
    rig_from_world = random_poses(1, seed=5)
    views = []
    for i in range(2):
        one = element(arguments, i)
        valid = one["valid"].clone()
        if points is not None:
            valid[:, points:] = False
        views.append(View(
            one["pyramid"], one["descriptors"], one["descriptor_valid"], one["points"], valid, one["camera"],
            cam_from_rig=(truth[i : i + 1] @ rig_from_world.inverse())[0], confidences=one.get("confidences"),
        ))  # fmt: skip
    start = perturb(rig_from_world, 0.03, 0.3, torch.Generator().manual_seed(2))
    return views, rig_from_world, start


@pytest.mark.parametrize("robust", [Robust(), Robust("cauchy", scale=0.05)], ids=str)
@pytest.mark.parametrize("confident", [False, True])
def test_normal_equations_of_a_rig_against_autograd(robust, confident):
    views, _, start = rig_problem(confident=confident)
    levels = tuple(level_of(view._asdict(), robust=robust) for view in views)
    poses = Pose.stack([view.cam_from_rig for view in views])
    found = linearise(RigLevel(levels, poses), start)

    def residual(delta):  # [1, N of both images, C]
        parts = []
        for level, pose in zip(levels, (poses[0], poses[1]), strict=True):
            xy, _ = level.camera.project((pose @ (exp(delta) @ start)).transform(level.points))
            parts.append(sample(level.features, xy / level.stride)[0] - level.descriptors)
        return torch.cat(parts, 1)

    zero = torch.zeros(1, 6, dtype=DOUBLE)
    keep = found.valid[0]
    r, jacobian = residual(zero)[0, keep], torch.func.jacrev(residual)(zero)[0, keep][:, :, 0]
    cost, weight = robust.cost_and_weight(r.square().sum(-1))
    assert keep.sum() > 100 and (found.confidence[0, keep].std() > 0.1) == confident
    weight = weight * found.confidence[0, keep]
    torch.testing.assert_close(found.cost[0, keep], cost)
    torch.testing.assert_close(found.hessian[0], torch.einsum("n,nci,ncj->ij", weight, jacobian, jacobian))
    torch.testing.assert_close(found.gradient[0], torch.einsum("n,nci,nc->i", weight, jacobian, r))
    torch.testing.assert_close(found.weighted_square[0], (weight * r.square().sum(-1)).sum())


@pytest.mark.parametrize("strides", [(4,), (8, 4)])
def test_one_camera_where_the_rig_is_gives_the_plain_result(strides):
    arguments, _ = problem(batch=2, strides=strides)
    plain = refine_pose(**arguments)
    found = refine_pose(**arguments, cam_from_rig=Pose.identity(dtype=DOUBLE))
    torch.testing.assert_close(found.cam_from_world.matrix(), plain.cam_from_world.matrix(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.covariance, plain.covariance)
    assert torch.equal(found.status, plain.status) and torch.equal(found.iterations, plain.iterations)


def test_images_with_too_few_points_each_fix_the_pose_together():
    views, truth, start = rig_problem(points=8)
    alone, *others = views
    one = refine_pose(**alone._asdict(), initial=start)
    assert int(one.status) == RefinementStatus.TOO_FEW_POINTS
    both = refine_pose(**alone._asdict(), beside=others, initial=start)
    position, rotation = pose_errors(both.cam_from_world, truth)
    assert both.converged.all() and position < 1e-3 and rotation < 1e-2 and int(both.valid_count) == 16


@pytest.mark.parametrize("confident", [False, True])
def test_a_batch_of_rigs_is_as_one_by_one(confident):
    views, _, start = rig_problem(strides=(8, 4), confident=confident)
    starts = Pose.stack([start[0], perturb(start[0], 0.02, 0.2, torch.Generator().manual_seed(9))])

    def twice(view: View) -> View:
        two = lambda x: x.expand(2, *x.shape[1:])  # noqa: E731
        return view._replace(
            descriptors=tuple(map(two, view.descriptors)), descriptor_valid=tuple(map(two, view.descriptor_valid)),
            confidences=view.confidences and tuple(map(two, view.confidences)),
            points=two(view.points), valid=two(view.valid), camera=Camera.stack([view.camera[0]] * 2),
        )  # fmt: skip

    first, second = map(twice, views)
    batch = refine_pose(**first._asdict(), beside=[second], initial=starts)
    for i in range(2):
        one = refine_pose(**views[0]._asdict(), beside=views[1:], initial=starts[i : i + 1])
        torch.testing.assert_close(
            batch.cam_from_world[i : i + 1].matrix(), one.cam_from_world.matrix(), atol=1e-9, rtol=0
        )
        assert batch.iterations[i] == one.iterations[0]


# --- PnP

CAMERA = Camera.from_colmap("OPENCV", 640, 480, (400.0, 410.0, 320.0, 240.0, -0.1, 0.02, 1e-3, 0), dtype=DOUBLE)


def seen_by_rig(rig: Rig, rig_from_world: Pose, each: int = 30, wrong: int = 10):
    """Keypoints, points and views; of each image the first `wrong` matches are wrong."""
    generator = torch.Generator().manual_seed(0)
    keypoints, points = [], []
    for i, camera in enumerate(rig.cameras):
        xy = 20 + torch.rand(each, 2, generator=generator, dtype=DOUBLE) * (camera.size - 40)
        depth = 3 + 6 * torch.rand(each, 1, generator=generator, dtype=DOUBLE)
        points.append((rig.cam_from_rig[i] @ rig_from_world).inverse().transform(camera.unproject(xy)[0] * depth))
        xy[:wrong] = torch.rand(wrong, 2, generator=generator, dtype=DOUBLE) * camera.size
        keypoints.append(xy)
    return torch.cat(keypoints), torch.cat(points), torch.arange(len(rig.cameras)).repeat_interleave(each)


@pytest.mark.parametrize("apart", [1.0, 0.0])
@pytest.mark.parametrize("unit", [1.0, 1e3])
def test_matches_of_all_images_give_the_rigs_pose(apart, unit):
    """Cameras at one place, too; and in a world whose unit is a millimetre."""
    poses, truth = random_poses(3, seed=1), random_poses(1, seed=2)[0]
    rig = Rig((CAMERA,) * 3, Pose(poses.rotation, poses.translation * apart))
    keypoints, points, view = seen_by_rig(rig, truth)
    scaled = Rig(rig.cameras, Pose(rig.cam_from_rig.rotation, rig.cam_from_rig.translation * unit))
    found = PoseSolver().solve(keypoints, points * unit, scaled, view)
    position, rotation = pose_errors(found.cam_from_world, Pose(truth.rotation, truth.translation * unit))
    assert position < 1e-5 * unit and rotation < 1e-4 and 60 <= int(found.inliers.sum()) <= 62
    xy, valid = scaled.project(found.cam_from_world, points * unit, view)
    assert valid[found.inliers].all() and (xy - keypoints)[found.inliers].norm(dim=-1).max() <= 4.0


def test_matches_in_one_image_of_a_rig_give_the_rigs_pose_too():
    rig, truth = Rig((CAMERA,) * 2, random_poses(2, seed=1)), random_poses(1, seed=2)[0]
    keypoints, points, view = seen_by_rig(rig, truth)
    second = view == 1
    found = PoseSolver().solve(keypoints[second], points[second], rig, view[second])
    position, rotation = pose_errors(found.cam_from_world, truth)
    assert position < 1e-6 and rotation < 1e-5 and found.inliers.sum() >= 20


# --- the localizer: the references of one place, as if taken by three cameras at one instant


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


def untrained() -> UNet:
    torch.manual_seed(0)
    return UNet(widths=[16, 32, 32], channels=16, strides=[4, 2]).eval()


@pytest.fixture(scope="module")
def town(scene, tmp_path_factory):
    return compile_map(tmp_path_factory.mktemp("maps") / "town.gnmap", scene, untrained(), points=400, progress=False)


@pytest.fixture(scope="module")
def instant(scene) -> list[RigImage]:
    taken = [i for i in scene.images.values() if i.is_reference and i.place == scene.places[0]]
    rig_from_world = random_poses(1, seed=3)[0] @ taken[0].cam_from_world
    return [
        RigImage(read_image(i.path), i.camera, i.cam_from_world @ rig_from_world.inverse(), i.name, itself=i.name)
        for i in taken
    ]


def localizer(town, **settings) -> Localizer:
    return Localizer(**{"pose": PoseFromMatches(Matcher()), "references": 3, **settings}).on(untrained(), town)


@pytest.mark.parametrize("refine", [False, True])
def test_one_camera_where_the_rig_is_is_localized_as_alone(town, instant, refine):
    tool = localizer(town) if refine else localizer(town, refiner=None)
    image = replace(instant[1], cam_from_rig=Pose.identity(dtype=DOUBLE))
    alone = tool.localize(image.image, image.camera, name=image.name, itself=image.name)
    rig = tool.localize_rig([image])
    (found,) = rig.images
    assert alone.status == Status.LOCALIZED and alone.refined == refine
    assert torch.equal(found.cam_from_world.matrix(), alone.cam_from_world.matrix())
    assert torch.equal(rig.rig_from_world.matrix(), alone.cam_from_world.matrix())
    assert (found.reason, found.matches, found.references) == (alone.reason, alone.matches, alone.references)
    assert not refine or torch.equal(found.covariance, alone.covariance)


@pytest.mark.slow
def test_three_cameras_get_one_pose_and_covariances_in_their_frames(town, instant, scene):
    rig = localizer(town).localize_rig(instant)
    assert rig.rig_from_world is not None and rig.covariance.isfinite().all()
    for image, found in zip(instant, rig.images, strict=True):
        expected = image.cam_from_rig @ rig.rig_from_world
        torch.testing.assert_close(found.cam_from_world.matrix(), expected.matrix())
        position, rotation = pose_errors(found.cam_from_world, scene.images[image.name].cam_from_world)
        assert found.status == Status.LOCALIZED and found.refined and position < 0.1 and rotation < 1.0
        assert 12 <= found.inliers <= found.matches and image.name not in found.references
        # Steps of the camera that the covariance allows are those of the rig, seen from the camera.
        adjoint = image.cam_from_rig.adjoint()
        torch.testing.assert_close(found.covariance, adjoint @ rig.covariance @ adjoint.mT)
    assert {found.name for found in rig.images} == {image.name for image in instant}


def test_an_image_of_no_use_does_not_hold_up_the_others(town, instant):
    wrong = replace(instant[0], camera=instant[0].camera.scale(2.0))
    lost = replace(instant[1], references=["no/such.jpg"])
    rig = localizer(town).localize_rig([wrong, lost, instant[2]])
    first, second, third = rig.images
    assert first.status == Status.NO_CAMERA and first.cam_from_world is None and "camera says" in first.reason
    assert third.status == Status.LOCALIZED
    assert second.status == Status.LOCALIZED and "none of the references named" in second.reason
    torch.testing.assert_close(second.cam_from_world.matrix(), (lost.cam_from_rig @ rig.rig_from_world).matrix())
    nothing = localizer(town).localize_rig([wrong])
    assert nothing.rig_from_world is None and nothing.images[0].status == Status.NO_CAMERA


@pytest.mark.slow
@pytest.mark.parametrize("pose", [NearestPose(), GivenPose()])
def test_other_poses_of_a_rig(town, instant, scene, pose):
    truth = instant[0].cam_from_rig.inverse() @ scene.images[instant[0].name].cam_from_world
    start = perturb(truth, 0.05, 0.3, torch.Generator().manual_seed(1))
    rig = localizer(town, pose=pose).localize_rig(instant, initial=start if pose.takes_initial else None)
    first, second, _ = rig.images
    second_from_first = instant[1].cam_from_rig @ instant[0].cam_from_rig.inverse()
    torch.testing.assert_close(second.initial.matrix(), (second_from_first @ first.initial).matrix())
    assert first.status == Status.LOCALIZED
    if pose.takes_initial:
        torch.testing.assert_close(first.initial.matrix(), (instant[0].cam_from_rig @ start).matrix())
        assert first.refined and pose_errors(rig.rig_from_world, truth)[0] < 0.1
        other = localizer(town, pose=pose).localize_rig(instant, initial=perturb(start, 0.02, 0.1, torch.Generator()))
        assert pose_errors(rig.rig_from_world, other.rig_from_world)[0] < 1e-3  # where the features put it


def test_what_a_rig_needs_is_said(town, instant):
    with pytest.raises(ValueError, match="0 images of a rig"):
        localizer(town).localize_rig([])
    with pytest.raises(ValueError, match="estimate_focal=True"):
        replace(localizer(town), estimate_focal=True).localize_rig(instant)
