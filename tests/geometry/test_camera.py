import numpy as np
import pycolmap
import pytest
import torch
from torch.func import jacrev, vmap

from gnnet.geometry.camera import COLMAP_MODELS, Camera

SHAPES = [(), (1,), (4,), (2, 3)]

MODELS = {
    "SIMPLE_PINHOLE": [500.0, 320.0, 240.0],
    "PINHOLE": [500.0, 480.0, 322.0, 238.0],
    "SIMPLE_RADIAL": [500.0, 320.0, 240.0, 0.06],
    "RADIAL": [500.0, 320.0, 240.0, -0.08, 0.02],
    "OPENCV": [868.99, 866.06, 525.94, 420.04, -0.39, 0.18, 0.0013, -0.0008],
    "OPENCV_FISHEYE": [300.0, 310.0, 320.0, 240.0, 0.02, 0.01, -0.003, 0.001],
    "FULL_OPENCV": [500.0, 490.0, 322.0, 240.0, -0.3, 0.1, 0.001, 0.002, 0.01, 0.02, 0.03, 0.004],
    "FOV": [300.0, 310.0, 318.0, 240.0, 0.9],
    "SIMPLE_RADIAL_FISHEYE": [300.0, 320.0, 240.0, 0.05],
    "RADIAL_FISHEYE": [300.0, 320.0, 240.0, -0.05, 0.01],
    "THIN_PRISM_FISHEYE": [300.0, 310.0, 320.0, 240.0, 0.02, 0.01, 0.001, 0.002, -0.003, 0.001, 0.002, 0.003],
    "RAD_TAN_THIN_PRISM_FISHEYE": [
        300.0, 310.0, 320.0, 240.0, 0.02, 0.01, -0.003, 0.001, 2e-4, 1e-4, 0.001, 0.002, 0.001, 0.002, 3e-4, 4e-4,
    ],
    "SIMPLE_DIVISION": [300.0, 320.0, 240.0, 0.05],
    "DIVISION": [300.0, 310.0, 320.0, 240.0, -0.3],
    "SIMPLE_FISHEYE": [300.0, 320.0, 240.0],
    "FISHEYE": [300.0, 310.0, 322.0, 240.0],
    "EUCM": [300.0, 310.0, 320.0, 240.0, 0.6, 1.1],
    "EQUIRECTANGULAR": [640.0, 480.0],
}  # fmt: skip
SEES_BEHIND = {"SIMPLE_DIVISION", "DIVISION", "EUCM", "EQUIRECTANGULAR"} | {m for m in MODELS if "FISHEYE" in m}
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


def points_around(count, seed=0):
    """Points (count, 3) in all directions, 0.1 to 10 m away."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return direction * (0.1 + 10 * torch.rand(count, 1, generator=generator, dtype=torch.float64))


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def of_pycolmap(model):
    width, height = SIZES[model]
    return pycolmap.Camera(model=model, width=width, height=height, params=MODELS[model])


def test_every_model_of_colmap_is_known_by_its_number():
    theirs = {m.name: int(m) for m in pycolmap.CameraModelId.__members__.values() if int(m) >= 0}
    assert theirs == {name: number for number, (name, _) in enumerate(COLMAP_MODELS)}
    assert set(MODELS) == set(theirs)
    for name, count in COLMAP_MODELS:
        assert len(pycolmap.Camera.create_from_model_name(1, name, 500, 640, 480).params) == count


@pytest.mark.cases
def test_projection_against_pycolmap(model):
    """The largest difference is 2e-13 pixels; a point in all directions is seen where pycolmap sees it."""
    points = torch.cat([points_in_view(50), points_around(3000)])
    xy, valid = camera_of(model).project(points)
    expected = torch.from_numpy(of_pycolmap(model).img_from_cam(points.numpy()))
    assert valid[:50].all()
    torch.testing.assert_close(xy[valid], expected[valid], rtol=0, atol=1e-11)
    assert torch.equal(valid, camera_of(model).contains(expected))  # NaN is in no image


def test_fisheye_images_see_what_lies_behind_the_camera():
    """pycolmap stops at 90° off the axis; the formula goes on."""
    camera = Camera.from_colmap("OPENCV_FISHEYE", 1000, 1000, [200.0, 200.0, 500.0, 500.0, 0, 0, 0, 0])
    angle = torch.tensor([85.0, 95.0, 120.0]).deg2rad()
    points = torch.stack([angle.sin(), torch.zeros(3), angle.cos()], -1)
    xy, valid = camera.project(points)
    assert valid.all()
    torch.testing.assert_close(xy[:, 0], 500 + 200 * angle)
    torch.testing.assert_close(camera.unproject(xy)[0], points)
    assert not camera.project(torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))[1].any()


@pytest.mark.cases
def test_full_opencv_without_its_own_parameters_is_opencv():
    plain = MODELS["OPENCV"]
    camera = Camera.from_colmap("FULL_OPENCV", 1024, 768, [*plain, 0, 0, 0, 0], dtype=torch.float64)
    assert torch.equal(camera.parameters, camera_of("OPENCV").parameters)
    assert camera.to_colmap() == ("OPENCV", 1024, 768, plain)
    assert Camera.from_colmap("FULL_OPENCV", 10, 10, [*plain[:4], *[0] * 8]).to_colmap()[0] == "PINHOLE"


def test_a_camera_goes_back_to_colmap(model):
    name, width, height, parameters = camera_of(model).to_colmap()
    points = points_in_view(50).numpy()
    again = pycolmap.Camera(model=name, width=width, height=height, params=parameters).img_from_cam(points)
    np.testing.assert_allclose(again, of_pycolmap(model).img_from_cam(points), atol=1e-11)
    mixed = Camera.stack([camera_of(model), camera_of("EUCM")])[0]
    assert mixed.to_colmap() == camera_of(model).to_colmap()


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_shapes(shape):
    """A batch of cameras with several models gives the same projections as each camera alone."""
    count = torch.Size(shape).numel()
    names = [list(MODELS)[(4 + 7 * i) % len(MODELS)] for i in range(count)]
    cameras = [camera_of(name) for name in names]
    stacked = Camera.stack(cameras)
    batch = Camera(stacked.size.reshape(*shape, 2), stacked.parameters.reshape(*shape, -1))
    assert batch.shape == shape
    points = points_in_view(*shape, 6)
    xy, jacobian, valid = batch.project_with_jacobian(points)
    assert xy.shape == (*shape, 6, 2)
    assert jacobian.shape == (*shape, 6, 2, 3)
    assert valid.shape == (*shape, 6)
    rays, found = batch.unproject(xy)
    assert found.all()
    for i, alone in enumerate(cameras):
        of_one = points.reshape(count, 6, 3)[i]
        expected_xy, expected_jacobian, expected_valid = alone.project_with_jacobian(of_one)
        torch.testing.assert_close(xy.reshape(count, 6, 2)[i], expected_xy)
        torch.testing.assert_close(jacobian.reshape(count, 6, 2, 3)[i], expected_jacobian)
        assert torch.equal(valid.reshape(count, 6)[i], expected_valid)
        torch.testing.assert_close(rays.reshape(count, 6, 3)[i], alone.unproject(xy.reshape(count, 6, 2)[i])[0])
        torch.testing.assert_close(unit(rays.reshape(count, 6, 3)[i]), unit(of_one))


def test_jacobian_against_autograd(model):
    camera, points = camera_of(model), torch.cat([points_in_view(20), points_around(300)])
    points = points[camera.project(points)[1]]
    points = torch.cat([points, torch.tensor([[0, 0, 2], [1e-9, 0, 2], [1e-3, 2e-3, 1]]).double()])  # near the axis
    xy, jacobian, valid = camera.project_with_jacobian(points)
    expected = vmap(jacrev(lambda point: camera.project(point[None])[0][0]))(points)
    torch.testing.assert_close(jacobian, expected, rtol=1e-10, atol=1e-10)
    expected_xy, expected_valid = camera.project(points)
    torch.testing.assert_close(xy, expected_xy)
    assert torch.equal(valid, expected_valid)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_unprojection_is_the_inverse(model, dtype, tolerance):
    camera, points = camera_of(model).to(dtype), torch.cat([points_in_view(50), points_around(300)]).to(dtype)
    xy, valid = camera.project(points)
    rays, found = camera.unproject(xy[valid])
    assert found.all() and valid[:50].all()
    torch.testing.assert_close(unit(rays), unit(points[valid]), rtol=0, atol=tolerance)
    length = rays.norm(dim=-1) if model in SEES_BEHIND else rays[:, 2]
    torch.testing.assert_close(length, torch.ones_like(length))


def test_unprojection_beyond_the_fold_is_masked():
    """A pixel that no point projects to has no ray; the others have the right one, up to the fold."""
    camera = Camera.from_colmap("SIMPLE_RADIAL", 2000, 2000, [500.0, 1000.0, 1000.0, -0.3], dtype=torch.float64)
    fold = (1 / 0.9) ** 0.5
    farthest = 500 * fold * (1 - 0.3 * fold**2)
    radius = torch.linspace(0, 1.5 * farthest, 400, dtype=torch.float64)
    xy = 1000 + torch.stack([radius, torch.zeros_like(radius)], -1)
    for lens in (camera, camera.with_lens()):
        rays, found = lens.unproject(xy)
        assert found[radius < 0.999 * farthest].all() and not found[radius > 1.001 * farthest].any()
        torch.testing.assert_close(lens.project(rays)[0][found], xy[found], rtol=0, atol=0.02)
        assert lens.project(rays)[1][radius < 0.999 * farthest].all() and rays.isfinite().all()


@pytest.mark.parametrize(
    ("model", "distortion"),
    [("OPENCV_FISHEYE", (-0.2, 0.0, 0.0, 0.0)), ("FULL_OPENCV", (-0.3, 0.0, 0.0, 0.0, 0.0, 0.02, 0.0, 0.0)),
     ("RAD_TAN_THIN_PRISM_FISHEYE", (0.0, -0.05, *[0.0] * 10))],
)  # fmt: skip
def test_lenses_fold_where_their_radius_stops_growing(model, distortion):
    camera = Camera.from_colmap(model, 9000, 9000, [500.0, 500.0, 4500.0, 4500.0, *distortion], dtype=torch.float64)
    angle = torch.linspace(0.001, 3.1 if "FISHEYE" in model else 1.5, 3000, dtype=torch.float64)
    points = torch.stack([angle.sin(), torch.zeros_like(angle), angle.cos()], -1)
    free = Camera(camera.size, camera.parameters.index_fill(0, torch.tensor(16), torch.inf))
    radius = free._through_lens(points)[0][:, 0]
    fold = angle[int((radius.diff() <= 0).byte().argmax())]
    assert 0.5 < fold < 1.7  # there is one
    valid = camera.project(points)[1]
    assert valid[angle < fold - 0.002].all() and not valid[angle > fold + 0.002].any()


def test_the_unit_of_the_world_does_not_matter(model):
    """A model in kilometres or nanometres projects as in metres."""
    points = torch.cat([points_in_view(50), points_around(300)])
    xy, jacobian, valid = camera_of(model).project_with_jacobian(points)
    for unit_length in (1e-6, 1e-3, 1e3, 1e9):
        again = camera_of(model).project_with_jacobian(points * unit_length)
        assert torch.equal(again[2], valid)
        torch.testing.assert_close(again[0][valid], xy[valid])
        torch.testing.assert_close(again[1][valid] * unit_length, jacobian[valid])


def test_behind_the_camera_is_invalid_and_finite():
    camera = camera_of("OPENCV")
    points = torch.tensor([[0.0, 0.0, -2.0], [0.1, 0.1, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    xy, jacobian, valid = camera.project_with_jacobian(points.double())
    assert valid.tolist() == [False, False, False, True]
    assert xy.isfinite().all()
    assert jacobian.isfinite().all()


def test_outside_the_image_is_invalid():
    camera = camera_of("PINHOLE")
    pixels = torch.tensor([[0.0, 0.0], [640.0, 480.0], [-0.1, 10.0], [10.0, 480.1], [640.1, 5.0]]).double()
    expected = [True, True, False, False, False]
    assert camera.contains(pixels).tolist() == expected
    inner, _ = camera.unproject(pixels * 0.999 + 0.001 * torch.tensor([320.0, 240.0]).double())
    assert camera.project(inner)[1].tolist() == [True, True, True, True, True]
    far, _ = camera.unproject(torch.tensor([[-20.0, 100.0], [100.0, 500.0]]).double())
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
    with pytest.raises(ValueError, match="KANNALA is not supported; expected one of SIMPLE_PINHOLE"):
        Camera.from_colmap("KANNALA", 10, 10, [1.0])
    with pytest.raises(ValueError, match="PINHOLE has 4 parameters, found 3"):
        Camera.from_colmap("PINHOLE", 10, 10, [1.0, 2.0, 3.0])
