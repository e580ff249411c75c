import pytest
import torch
import torch.nn.functional as F
from torch.func import jacrev, vmap

from gnnet.geometry.interpolation import sample, sample_stacked, sample_with_gradient

GRADIENTS = ["central", "exact", "sobel", "bicubic"]
# Cells that each stencil reaches before and after the cell at the point.
BEFORE = {"exact": 0, "central": 1, "sobel": 1, "bicubic": 1}
HEIGHT, WIDTH = 9, 12


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def features(request):
    values = torch.randn(2, 5, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.contiguous(memory_format=request.param)


def inner_points(count=40, margin=2.0, seed=1):
    unit = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return margin + unit * (torch.tensor([WIDTH, HEIGHT]) - 2 * margin)


def grid_sample(features, xy):
    grid = 2 * xy / torch.tensor([WIDTH, HEIGHT]) - 1
    return F.grid_sample(features, grid[:, None], align_corners=False)[:, :, 0].transpose(1, 2)


def test_samples_against_grid_sample(features):
    xy = inner_points(margin=0.5)
    values, valid = sample(features, xy)
    assert valid.all()
    torch.testing.assert_close(values, grid_sample(features, xy))


def test_asymmetric_fractions(features):
    """The corner weights are not swapped: (2.25, 3.75) is not (2.75, 3.25)."""
    xy = torch.tensor([[[2.25, 3.75]], [[2.75, 3.25]]], dtype=torch.float64)
    torch.testing.assert_close(sample(features, xy)[0], grid_sample(features, xy))


def test_cell_centres_are_the_cells(features):
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    centres = torch.stack([x, y], -1).reshape(1, -1, 2).expand(2, -1, -1) + 0.5
    values, valid = sample(features, centres.double())
    assert valid.all()  # the first and the last row and column included
    torch.testing.assert_close(values, features.flatten(2).transpose(1, 2))


def test_integer_coordinates_are_between_cells(features):
    xy = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(sample(features, xy)[0][:, 0], features[..., 3:5, 2:4].mean((-1, -2)))


def test_validity(features):
    inside = [(0.5, 0.5), (WIDTH - 0.5, HEIGHT - 0.5), (0.5, HEIGHT - 0.5), (5.2, 0.5)]
    outside = [(0.49, 3.0), (3.0, 0.49), (WIDTH - 0.49, 3.0), (3.0, HEIGHT - 0.49), (-1e9, 3.0), (3.0, 1e30)]
    xy = torch.tensor(inside + outside, dtype=torch.float64).expand(2, -1, -1)
    values, valid = sample(features, xy)
    assert valid[0].tolist() == valid[1].tolist() == [True] * len(inside) + [False] * len(outside)
    assert values.isfinite().all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_validity_with_gradient(features, gradient):
    """Valid from the first to the last point whose whole stencil is in the map."""
    low = 0.5 + BEFORE[gradient]
    x_high, y_high = WIDTH - low, HEIGHT - low
    inside = [(low, low), (x_high, y_high), (4.3, low), (x_high, 4.3)]
    outside = [(low - 0.01, 4.0), (4.0, low - 0.01), (x_high + 0.01, 4.0), (4.0, y_high + 0.01)]
    xy = torch.tensor(inside + outside, dtype=torch.float64).expand(2, -1, -1)
    values, slopes, valid = sample_with_gradient(features, xy, gradient)
    assert valid[0].tolist() == [True] * len(inside) + [False] * len(outside)
    assert values.isfinite().all()
    assert slopes.isfinite().all()
    if gradient != "bicubic":
        torch.testing.assert_close(values[:, : len(inside)], grid_sample(features, xy[:, : len(inside)]))


@pytest.mark.parametrize("gradient", ["exact", "bicubic"])
def test_gradient_is_the_derivative_of_the_value(features, gradient):
    xy = inner_points()
    _, slopes, _ = sample_with_gradient(features, xy, gradient)

    def value(feature_map, point):
        return sample_with_gradient(feature_map[None], point[None, None], gradient)[0][0, 0]

    of_points = vmap(jacrev(value, argnums=1), in_dims=(None, 0))
    expected = torch.stack([of_points(m, p) for m, p in zip(features, xy, strict=True)])
    torch.testing.assert_close(slopes, expected)


def _smoothed_differences(features, across):
    """Central differences of the whole map along x and y, smoothed by `across` along the other axis."""
    kernel = torch.outer(torch.tensor(across), torch.tensor([-0.5, 0.0, 0.5])).double()
    channels = features.shape[1]
    kernels = (k.expand(channels, 1, 3, 3) for k in (kernel, kernel.T))
    return [F.conv2d(features, k, padding=1, groups=channels) for k in kernels]


@pytest.mark.parametrize(("gradient", "across"), [("central", [0.0, 1.0, 0.0]), ("sobel", [0.25, 0.5, 0.25])])
def test_gradient_is_the_interpolated_difference(features, gradient, across):
    xy = inner_points()
    _, slopes, valid = sample_with_gradient(features, xy, gradient)
    assert valid.all()
    expected = torch.stack([grid_sample(m, xy) for m in _smoothed_differences(features, across)], -1)
    torch.testing.assert_close(slopes, expected)


def test_bicubic_weights_are_catmull_rom(features):
    """The bicubic kernel of grid_sample is a different one, so that it cannot be the reference here."""
    a = 0.3
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64) - a

    def kernel(t):  # Keys (1981), a = -1/2
        t = t.abs()
        near = 1.5 * t**3 - 2.5 * t**2 + 1
        far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        return torch.where(t <= 1, near, far)

    weights = kernel(x)
    xy = torch.tensor([[[4.5 + a, 5.5]]], dtype=torch.float64).expand(2, -1, -1)
    values, _, _ = sample_with_gradient(features, xy, "bicubic")
    torch.testing.assert_close(values[:, 0], features[..., 5, 3:7] @ weights)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_linear_map_has_its_slope_everywhere(gradient):
    y, x = torch.meshgrid(torch.arange(HEIGHT).double() + 0.5, torch.arange(WIDTH).double() + 0.5, indexing="ij")
    plane = torch.stack([3 * x - 2 * y, 0.5 * y])[None].expand(2, -1, -1, -1)
    xy = inner_points()
    values, slopes, _ = sample_with_gradient(plane, xy, gradient)
    expected = torch.stack([3 * xy[..., 0] - 2 * xy[..., 1], 0.5 * xy[..., 1]], -1)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(slopes, torch.tensor([[3.0, -2.0], [0.0, 0.5]]).double().expand_as(slopes))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_stacked_is_the_same(features, gradient):
    xy = inner_points()
    values, slopes, valid = sample_with_gradient(features, xy, gradient)
    stacked, stacked_valid = sample_stacked(features, xy, gradient)
    torch.testing.assert_close(stacked[..., 0, :], values)
    torch.testing.assert_close(stacked[..., 1, :], slopes[..., 0])
    torch.testing.assert_close(stacked[..., 2, :], slopes[..., 1])
    assert torch.equal(valid, stacked_valid)


@pytest.mark.parametrize("gradient", [None, *GRADIENTS])
def test_gradients_to_features_and_points(features, gradient):
    features = features[:, :2, :6, :6].clone(memory_format=torch.preserve_format).requires_grad_()
    xy = (2 + 2 * torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).requires_grad_()

    def function(maps, points):
        return sample(maps, points)[0] if gradient is None else sample_stacked(maps, points, gradient)[0]

    torch.autograd.gradcheck(function, (features, xy))


@pytest.mark.parametrize("gradient", [None, *GRADIENTS])
def test_gradients_to_features_alone(features, gradient):
    """Without a gradient to the points it is computed another way; that of a second sum is added to it."""
    features = features[:, :2, :6, :6].clone(memory_format=torch.preserve_format).requires_grad_()
    xy = 2 + 2 * torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def function(maps):
        return sample(maps, xy)[0] if gradient is None else sample_stacked(maps, xy, gradient)[0]

    torch.autograd.gradcheck(function, (features,))
    torch.autograd.gradcheck(lambda maps: function(maps).sin() + 3 * function(maps), (features,))


@pytest.mark.parametrize("gradient", [None, *GRADIENTS])
def test_not_a_number_is_invalid_and_harmless(features, gradient):
    features = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    bad = [(torch.nan, 3.0), (torch.inf, 3.0), (3.0, -torch.inf), (torch.nan, torch.nan)]
    xy = torch.tensor([*bad, (4.2, 4.7)], dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    values, valid = sample(features, xy) if gradient is None else sample_stacked(features, xy, gradient)
    assert valid[0].tolist() == [False] * len(bad) + [True]
    assert values.isfinite().all()
    values.sum().backward()
    assert features.grad.isfinite().all()
    assert xy.grad.isfinite().all()
    assert (xy.grad[:, : len(bad)] == 0).all()


def test_elements_of_a_batch_do_not_mix(features):
    xy = inner_points()
    together = sample(features, xy)[0]
    for i in range(2):
        torch.testing.assert_close(sample(features[i : i + 1], xy[i : i + 1])[0][0], together[i])


def test_no_points_are_no_samples(features):
    features = features.clone(memory_format=torch.preserve_format).requires_grad_()
    values, valid = sample_stacked(features, torch.empty(2, 0, 2, dtype=torch.float64))
    assert values.shape == (2, 0, 3, 5) and valid.shape == (2, 0)
    values.sum().backward()
    assert (features.grad == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_maps_smaller_than_the_stencil_have_no_valid_point(size):
    tiny = torch.ones(1, 2, size, size)
    xy = torch.tensor([[[size / 2, size / 2], [0.5, 0.5]]])
    values, valid = sample_stacked(tiny, xy, "central")
    assert not valid.any()
    assert values.isfinite().all()


def test_unknown_gradient():
    with pytest.raises(ValueError, match="'scharr' is not known; expected central"):
        sample_with_gradient(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 2), "scharr")


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_host_does_not_wait_for_a_device(features, gradient, no_host_numbers):
    xy = inner_points()
    with no_host_numbers:
        sample(features, xy)
        sample_with_gradient(features, xy, gradient)
