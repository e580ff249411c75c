import math

import pytest
import torch
from kornia.geometry.liegroup import Se3
from scipy.spatial.transform import Rotation
from torch.func import jacrev, vmap

from gnnet.geometry.pose import Pose, exp, perturb, pose_errors, rotation_angle, skew, so3_exp

SHAPES = [(), (1,), (4,), (2, 3)]


def random_twist(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, 6, generator=generator, dtype=torch.float64)


def random_pose(*shape, seed=0):
    return exp(random_twist(*shape, seed=seed))


def close(actual: Pose, expected: Pose, **tolerance):
    torch.testing.assert_close(actual.rotation, expected.rotation, **tolerance)
    torch.testing.assert_close(actual.translation, expected.translation, **tolerance)


def twist_matrix(delta):
    matrix = torch.zeros(*delta.shape[:-1], 4, 4, dtype=delta.dtype)
    matrix[..., :3, :3] = skew(delta[..., 3:])
    matrix[..., :3, 3] = delta[..., :3]
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.03, 1.0, 3.0])
def test_exp_is_the_matrix_exponential(shape, scale):
    delta = random_twist(*shape, scale=scale)
    pose = exp(delta)
    assert pose.shape == shape
    torch.testing.assert_close(pose.matrix(), torch.linalg.matrix_exp(twist_matrix(delta)), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(pose.rotation, so3_exp(delta[..., 3:]))


@pytest.mark.parametrize("angle", [0.0999, 0.1, 0.1001])
def test_exp_where_the_series_ends(angle):
    """The series takes over at an angle of 0.1: both sides must be exact in float64."""
    delta = torch.tensor([1.0, -2.0, 0.5, angle, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        exp(delta).matrix(), torch.linalg.matrix_exp(twist_matrix(delta)), rtol=1e-13, atol=1e-13
    )


def test_exp_in_float32_at_every_scale():
    """(1 - cos t) / t² must not suffer from cancellation: the error stays that of float32 numbers near one."""
    for scale in (1e-6, 1e-3, 0.02, 0.06, 0.2, 1.0):
        delta = random_twist(100, scale=scale)
        expected = exp(delta).matrix()
        torch.testing.assert_close(exp(delta.float()).matrix().double(), expected, rtol=1e-5, atol=2e-6)


def test_exp_against_kornia():
    delta = random_twist(5)
    torch.testing.assert_close(exp(delta).matrix(), Se3.exp(delta).matrix(), rtol=1e-9, atol=1e-9)


def test_exp_has_finite_gradients_at_zero():
    delta = torch.zeros(6, dtype=torch.float64)
    jacobian = jacrev(lambda d: exp(d).matrix())(delta)
    expected = torch.stack([twist_matrix(row) for row in torch.eye(6, dtype=torch.float64)], -1)
    torch.testing.assert_close(jacobian, expected)


def test_exp_gradcheck():
    delta = random_twist(3, scale=0.5).requires_grad_()
    torch.autograd.gradcheck(lambda d: exp(d).matrix(), delta)
    small = random_twist(3, scale=1e-3).requires_grad_()
    torch.autograd.gradcheck(lambda d: exp(d).matrix(), small)


@pytest.mark.parametrize("shape", SHAPES)
def test_retract_jacobian(shape):
    """∂(exp(δ) T · X)/∂δ at δ = 0 is [I | −[T · X]×], translation first."""
    pose = random_pose(*shape)
    point = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def moved(delta, rotation, translation):
        return Pose(rotation, translation).retract(delta).transform(point[None])[0]

    function = jacrev(moved)
    for _ in shape:
        function = vmap(function)
    jacobian = function(torch.zeros(*shape, 6, dtype=torch.float64), pose.rotation, pose.translation)
    transformed = pose.transform(point.expand(*shape, 1, 3)).squeeze(-2)
    eye = torch.eye(3, dtype=torch.float64).expand(*shape, 3, 3)
    torch.testing.assert_close(jacobian, torch.cat([eye, -skew(transformed)], -1))


@pytest.mark.parametrize("shape", SHAPES)
def test_skew_is_the_cross_product(shape):
    a, b = random_twist(*shape).split(3, -1)
    torch.testing.assert_close((skew(a) @ b[..., None]).squeeze(-1), torch.linalg.cross(a, b))


@pytest.mark.parametrize("shape", SHAPES)
def test_composition_and_inverse(shape):
    a, b = random_pose(*shape, seed=1), random_pose(*shape, seed=2)
    points = torch.randn(*shape, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close((a @ b).matrix(), a.matrix() @ b.matrix())
    torch.testing.assert_close((a @ b).transform(points), a.transform(b.transform(points)))
    torch.testing.assert_close(a.inverse().matrix(), torch.linalg.inv(a.matrix()))
    close(a @ a.inverse(), Pose.identity(*shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_center_is_what_maps_to_the_origin(shape):
    pose = random_pose(*shape)
    origin = pose.transform(pose.center()[..., None, :])
    torch.testing.assert_close(origin, torch.zeros_like(origin), rtol=0, atol=1e-12)
    torch.testing.assert_close(pose.center(), pose.inverse().translation)


def test_transform_broadcasts_one_pose_over_a_batch_of_points():
    pose, points = random_pose(), torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(pose.transform(points)[2], pose.transform(points[2]))


@pytest.mark.parametrize("shape", SHAPES)
def test_quaternions_against_scipy(shape):
    pose = random_pose(*shape)
    flat = pose.rotation.reshape(-1, 3, 3).numpy()
    xyzw = torch.from_numpy(Rotation.from_matrix(flat).as_quat())
    expected = xyzw[:, [3, 0, 1, 2]]
    expected = torch.where(expected[:, :1] < 0, -expected, expected).reshape(*shape, 4)
    torch.testing.assert_close(pose.quaternion(), expected)
    close(Pose.from_quaternion(-3.0 * expected, pose.translation), pose)


def test_quaternions_at_half_turns():
    """At 180° w is zero; in each case one of x, y, z is the only component that is not."""
    axes = torch.cat([torch.eye(3), torch.tensor([[1.0, 1, 0], [0, -1, 1], [1, 1, 1], [1, -2, 3]])]).double()
    axes = axes / axes.norm(dim=-1, keepdim=True)
    for offset in (0.0, 1e-9, -1e-9, 1e-5):
        rotation = torch.from_numpy(Rotation.from_rotvec(((math.pi + offset) * axes).numpy()).as_matrix())
        pose = Pose(rotation, torch.zeros(len(axes), 3, dtype=torch.float64))
        quaternion = pose.quaternion()
        assert (quaternion[:, 0] >= 0).all()
        torch.testing.assert_close(quaternion.norm(dim=-1), torch.ones(len(axes), dtype=torch.float64))
        close(Pose.from_quaternion(quaternion, pose.translation), pose, rtol=0, atol=1e-14)


def test_quaternion_of_the_identity():
    expected = torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(Pose.identity().quaternion(), expected)


def test_rotation_angle_down_to_tiny_ones_in_float32():
    axis = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5]), dim=0)
    for angle in (1e-6, 1e-5, 1e-4, 1e-2, 1.0, 3.0, math.pi):
        found = rotation_angle(so3_exp(axis * angle))
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(angle, rel=1e-3)
    assert rotation_angle(torch.eye(3)).item() == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_angle_against_scipy(shape):
    rotation = random_pose(*shape).rotation
    expected = Rotation.from_matrix(rotation.reshape(-1, 3, 3).numpy()).magnitude()
    torch.testing.assert_close(rotation_angle(rotation), torch.from_numpy(expected).reshape(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_perturb_moves_by_exactly_that_much(shape):
    pose = random_pose(*shape)
    moved = perturb(pose, 0.3, 7.0, torch.Generator().manual_seed(0))
    position, rotation = pose_errors(moved, pose)
    assert position.shape == rotation.shape == shape
    torch.testing.assert_close(position, torch.full_like(position, 0.3))
    torch.testing.assert_close(rotation, torch.full_like(rotation, 7.0))
    again = perturb(pose, 0.3, 7.0, torch.Generator().manual_seed(0))
    assert torch.equal(moved.translation, again.translation)


def test_perturbing_on_a_device_does_not_make_the_host_wait(no_host_numbers):
    generator, pose = torch.Generator().manual_seed(0), Pose.identity(3).to("meta")
    with no_host_numbers:
        moved = perturb(pose, 0.3, 7.0, generator)
    assert moved.device.type == "meta" and moved.shape == (3,)


def test_perturb_takes_one_amount_for_each_element():
    pose = random_pose(4)
    amount = torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=torch.float64)
    position, rotation = pose_errors(perturb(pose, amount, 10 * amount, torch.Generator().manual_seed(0)), pose)
    torch.testing.assert_close(position, amount)
    torch.testing.assert_close(rotation, 10 * amount, rtol=1e-6, atol=1e-6)


def test_perturb_directions_are_spread_evenly():
    pose = Pose.identity(2000, dtype=torch.float64)
    moved = perturb(pose, 1.0, 90.0, torch.Generator().manual_seed(0))
    assert moved.center().mean(0).norm() < 0.06
    assert (moved.center().square().mean(0) - 1 / 3).abs().max() < 0.03


def test_pose_errors_are_between_centres_not_translations():
    """A camera 100 m from the origin that turns by 1° on the spot has not moved."""
    truth = Pose(torch.eye(3), torch.tensor([-100.0, 0.0, 0.0]))
    rotation = so3_exp(torch.tensor([0.0, 0.0, math.radians(1.0)]))
    turned = Pose(rotation, -(rotation @ torch.tensor([100.0, 0.0, 0.0])))
    assert (turned.translation - truth.translation).norm() > 1.0
    position, angle = pose_errors(turned, truth)
    assert position < 1e-5
    assert angle.item() == pytest.approx(1.0, rel=1e-4)


def test_pose_errors_are_symmetric():
    a, b = random_pose(4, seed=1), random_pose(4, seed=2)
    for forward, backward in zip(pose_errors(a, b), pose_errors(b, a), strict=True):
        torch.testing.assert_close(forward, backward)


@pytest.mark.parametrize("size", [3, 4])
def test_matrices_indexing_and_stacking(size):
    poses = [random_pose(seed=seed) for seed in range(3)]
    stacked = Pose.stack(poses)
    assert stacked.shape == (3,)
    close(stacked[1], poses[1])
    close(Pose.from_matrix(stacked.matrix()[..., :size, :]), stacked)
    assert stacked.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
def test_a_pose_from_its_centre_has_that_centre(shape):
    center = torch.randn(*shape, 3, dtype=torch.float64)
    rotation = so3_exp(torch.randn(*shape, 3, dtype=torch.float64))
    torch.testing.assert_close(Pose.from_center(rotation, center).center(), center)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
def test_a_shifted_pose_sees_shifted_points_the_same_and_can_be_shifted_back(shape):
    pose = exp(torch.randn(*shape, 6, dtype=torch.float64))
    origin, points = torch.randn(*shape, 3, dtype=torch.float64), torch.randn(*shape, 5, 3, dtype=torch.float64)
    moved = pose.shifted(origin)
    torch.testing.assert_close(moved.transform(points - origin[..., None, :]), pose.transform(points))
    torch.testing.assert_close(moved.shifted(-origin).translation, pose.translation)
