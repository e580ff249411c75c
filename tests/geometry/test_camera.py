import pycolmap
import pytest
import torch
from torch.func import jacrev, vmap

from gnnet.geometry.camera import MIN_DEPTH, Camera

SHAPES = [(), (1,), (4,), (2, 3)]

MODELS = {
    "SIMPLE_PINHOLE": [500.0, 320.0, 240.0],
    "PINHOLE": [500.0, 480.0, 322.0, 238.0],
    "SIMPLE_RADIAL": [500.0, 320.0, 240.0, 0.06],
    "RADIAL": [500.0, 320.0, 240.0, -0.08, 0.02],
    "OPENCV": [868.99, 866.06, 525.94, 420.04, -0.39, 0.18, 0.0013, -0.0008],
}
SIZES = {name: (1024, 768) if name == "OPENCV" else (640, 480) for name in MODELS}


def camera_of(model):
    return Camera.from_colmap(model, *SIZES[model], MODELS[model], dtype=torch.float64)


def points_in_view(*shape, seed=0, spread=0.35):
    """Points (*shape, 3) at depths of 1 to 9 m."""
    generator = torch.Generator().manual_seed(seed)
    uv = (torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 2 - 1) * spread
    z = 1 + 8 * torch.rand(*shape, 1, generator=generator, dtype=torch.float64)
    return torch.cat([uv * z, z], -1)


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


def test_projection_against_pycolmap(model):
    width, height = SIZES[model]
    reference = pycolmap.Camera(model=model, width=width, height=height, params=MODELS[model])
    points = points_in_view(50)
    xy, valid = camera_of(model).project(points)
    expected = torch.from_numpy(reference.img_from_cam(points.numpy()))
    assert valid.all()
    torch.testing.assert_close(xy, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_shapes(shape):
    """A batch of cameras with several models gives the same projections as each camera alone."""
    count = torch.Size(shape).numel()
    names = [list(MODELS)[i % len(MODELS)] for i in range(count)]
    cameras = [camera_of(name) for name in names]
    stacked = Camera.stack(cameras)
    batch = Camera(stacked.size.reshape(*shape, 2), stacked.parameters.reshape(*shape, 8))
    assert batch.shape == shape
    points = points_in_view(*shape, 6)
    xy, jacobian, valid = batch.project_with_jacobian(points)
    assert xy.shape == (*shape, 6, 2)
    assert jacobian.shape == (*shape, 6, 2, 3)
    assert valid.shape == (*shape, 6)
    rays = batch.unproject(xy)
    for i, alone in enumerate(cameras):
        of_one = points.reshape(count, 6, 3)[i]
        expected_xy, expected_jacobian, expected_valid = alone.project_with_jacobian(of_one)
        torch.testing.assert_close(xy.reshape(count, 6, 2)[i], expected_xy)
        torch.testing.assert_close(jacobian.reshape(count, 6, 2, 3)[i], expected_jacobian)
        assert torch.equal(valid.reshape(count, 6)[i], expected_valid)
        torch.testing.assert_close(rays.reshape(count, 6, 3)[i], of_one / of_one[:, 2:])


def test_jacobian_against_autograd(model):
    camera, points = camera_of(model), points_in_view(20)
    xy, jacobian, valid = camera.project_with_jacobian(points)
    expected = vmap(jacrev(lambda point: camera.project(point[None])[0][0]))(points)
    torch.testing.assert_close(jacobian, expected, rtol=1e-10, atol=1e-10)
    expected_xy, expected_valid = camera.project(points)
    torch.testing.assert_close(xy, expected_xy)
    assert torch.equal(valid, expected_valid)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_unprojection_is_the_inverse(model, dtype, tolerance):
    camera, points = camera_of(model).to(dtype), points_in_view(50).to(dtype)
    rays = camera.unproject(camera.project(points)[0])
    torch.testing.assert_close(rays, points / points[:, 2:], rtol=0, atol=tolerance)


def test_behind_the_camera_is_invalid_and_finite():
    camera = camera_of("OPENCV")
    points = torch.tensor([[0.0, 0.0, -2.0], [0.1, 0.1, 0.0], [0.0, 0.0, MIN_DEPTH / 2], [0.0, 0.0, 1.0]])
    xy, jacobian, valid = camera.project_with_jacobian(points.double())
    assert valid.tolist() == [False, False, False, True]
    assert xy.isfinite().all()
    assert jacobian.isfinite().all()


def test_outside_the_image_is_invalid():
    camera = camera_of("PINHOLE")
    pixels = torch.tensor([[0.0, 0.0], [640.0, 480.0], [-0.1, 10.0], [10.0, 480.1], [640.1, 5.0]]).double()
    expected = [True, True, False, False, False]
    assert camera.contains(pixels).tolist() == expected
    inner = camera.unproject(pixels * 0.999 + 0.001 * torch.tensor([320.0, 240.0]).double())
    assert camera.project(inner)[1].tolist() == [True, True, True, True, True]
    far = camera.unproject(torch.tensor([[-20.0, 100.0], [100.0, 500.0]]).double())
    assert not camera.project(far)[1].any()


def test_not_a_number_is_invalid():
    points = torch.tensor([[torch.nan, 0.0, 1.0], [0.0, 0.0, torch.nan], [0.0, torch.inf, 1.0]], dtype=torch.float64)
    assert not camera_of("RADIAL").project(points)[1].any()


@pytest.mark.parametrize(("k1", "k2"), [(-0.3, 0.0), (-0.3, 0.01), (0.1, -0.05), (0.0, -0.1)])
def test_beyond_the_fold_of_the_distortion_is_invalid(k1, k2):
    """Where r (1 + k1 r² + k2 r⁴) decreases again, points far from the axis project into the image."""
    camera = Camera.from_colmap("RADIAL", 4000, 4000, [500.0, 2000.0, 2000.0, k1, k2], dtype=torch.float64)
    radius = torch.linspace(0.01, 8, 4000, dtype=torch.float64)
    slope = 1 + 3 * k1 * radius**2 + 5 * k2 * radius**4
    fold = radius[slope <= 0].min()
    points = torch.stack([radius, torch.zeros_like(radius), torch.ones_like(radius)], -1)
    xy, valid = camera.project(points)
    step = radius[1] - radius[0]
    assert valid[radius < fold - step].all()
    assert not valid[radius > fold + step].any()
    assert camera.contains(xy)[radius > fold + step].any()  # the image's border alone would not exclude them


@pytest.mark.parametrize(("k1", "k2"), [(0.0, 0.0), (0.2, 0.0), (-0.3, 0.2), (0.1, 0.1)])
def test_distortion_that_never_folds_excludes_nothing(k1, k2):
    camera = Camera.from_colmap("RADIAL", 10**9, 10**9, [1.0, 5e8, 5e8, k1, k2], dtype=torch.float64)
    assert camera.project(points_in_view(100, spread=20.0))[1].all()


@pytest.mark.parametrize("factor", [0.5, (0.25, 0.5)])
def test_scaling_the_camera_scales_its_pixels(model, factor):
    camera, points = camera_of(model), points_in_view(10)
    factor = torch.tensor(factor, dtype=torch.float64)
    scaled = camera.scale(factor if factor.ndim else float(factor))
    torch.testing.assert_close(scaled.project(points)[0], camera.project(points)[0] * factor)
    torch.testing.assert_close(scaled.size, camera.size * factor)
    batch = Camera.stack([camera, camera]).scale(factor.expand(2, 2))
    torch.testing.assert_close(batch.parameters[1], scaled.parameters)


def test_indexing_and_types():
    cameras = Camera.stack([camera_of("PINHOLE"), camera_of("RADIAL")])
    assert cameras.shape == (2,)
    torch.testing.assert_close(cameras[1].parameters, camera_of("RADIAL").parameters)
    assert cameras.to(torch.float32).parameters.dtype == torch.float32


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="FISHEYE is not supported; expected one of SIMPLE_PINHOLE"):
        Camera.from_colmap("FISHEYE", 10, 10, [1.0])
    with pytest.raises(ValueError, match="PINHOLE has 4 parameters, found 3"):
        Camera.from_colmap("PINHOLE", 10, 10, [1.0, 2.0, 3.0])
