import math

import pytest
import torch

from gnnet.losses.gauss_newton import GaussNewton, gauss_newton_loss
from gnnet.losses.term import LevelPair

from .conftest import at, every_point, make_pair, mean_of


def offsets(pair, seed=1, vicinity=1.0):
    draw = torch.rand(pair.xy_b.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * draw - 1) * vicinity


def literal_loss(pair, offset, *, epsilon, second_weight, distance_scale=None):
    """The formulas of the paper for one point after the other, with torch's own inverse and determinant."""
    first, second, keep = {}, {}, {}
    height, width = pair.map_b.shape[-2:]
    for b, n in every_point(pair):
        features, u_b = pair.map_b[b], pair.xy_b[b, n]
        x, y = (u_b + offset[b, n]).tolist()
        keep[b, n] = 1.5 <= x <= width - 1.5 and 1.5 <= y <= height - 1.5
        if not (pair.valid[b, n] and keep[b, n]):
            first[b, n] = second[b, n] = 0.0
            continue
        residual = at(features, x, y) - at(pair.map_a[b], *pair.xy_a[b, n])
        along_x = (at(features, x + 1, y) - at(features, x - 1, y)) / 2
        along_y = (at(features, x, y + 1) - at(features, x, y - 1)) / 2
        jacobian = torch.stack([along_x, along_y], -1)
        hessian = jacobian.T @ jacobian + epsilon * torch.eye(2, dtype=features.dtype)
        mu = torch.tensor([x, y], dtype=features.dtype) - torch.linalg.inv(hessian) @ (jacobian.T @ residual)
        if distance_scale is None:
            first[b, n] = (u_b - mu) @ hessian @ (u_b - mu) / 2
        else:
            first[b, n] = torch.log(1 + (u_b - mu) @ (u_b - mu) / (2 * distance_scale**2))
        second[b, n] = second_weight * (math.log(2 * math.pi) - torch.logdet(hessian) / 2)
    total = mean_of({k: first[k] + second[k] for k in first}, pair, keep)
    return total, mean_of(first, pair, keep), mean_of(second, pair, keep)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("second_weight", [1.0, 2 / 7])
@pytest.mark.parametrize("distance_scale", [None, 0.25])
def test_value_and_gradient_are_those_of_the_formulas(normalize, second_weight, distance_scale):
    results = []
    for literal in (True, False):
        pair = make_pair(normalize=normalize, requires_grad=True)
        offset = offsets(pair, vicinity=1.7)  # some starts leave the map
        settings = {"epsilon": 1e-4, "second_weight": second_weight, "distance_scale": distance_scale}
        if literal:
            loss, first, second = literal_loss(pair, offset, **settings)
        else:
            loss, parts = gauss_newton_loss(pair, offset=offset, **settings)
            first, second = parts["step"], parts["determinant"]
        results.append((loss, first, second, *torch.autograd.grad(loss, [pair.map_a, pair.map_b])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def linear_pair(slope_x, slope_y, dtype=torch.float64):
    """Maps that are linear in x and y, so that one step from anywhere ends at the true point."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    features = torch.stack([slope_x * x, slope_y * y, 0 * x])[None].to(dtype)
    xy = torch.tensor([[[9.3, 8.1], [10.0, 11.7]]], dtype=dtype)
    ones = torch.ones(1, 2, dtype=dtype)
    return LevelPair.from_maps(features, features.clone(), xy_a=xy, xy_b=xy, weight=ones, valid=ones.bool())


def test_first_term_is_zero_where_the_step_is_exact_and_every_point_converges():
    pair = linear_pair(0.2, 0.3)
    _, parts = gauss_newton_loss(pair, offset=offsets(pair), epsilon=1e-12)
    assert parts["step"].item() < 1e-12
    assert parts["converged"].item() == 1
    moved = pair._replace(descriptors_a=pair.descriptors_a + torch.tensor([0.2 * 0.8, 0.0, 0.0]))
    _, parts = gauss_newton_loss(moved, offset=offsets(pair), epsilon=1e-12)
    assert parts["step"].item() == pytest.approx((0.2 * 0.8) ** 2 / 2, rel=1e-6)
    assert parts["converged"].item() == 0


def test_with_a_distance_scale_only_the_end_of_the_step_counts_and_not_the_slope_of_the_map():
    values = []
    for slope in (0.02, 0.2, 2.0):
        pair = linear_pair(slope, slope)
        off = pair._replace(descriptors_a=pair.descriptors_a + torch.tensor([slope * 0.3, slope * 0.4, 0.0]))
        likelihood, distance = (
            gauss_newton_loss(off, offset=offsets(off), epsilon=1e-12, distance_scale=scale)[1]["step"].item()
            for scale in (None, 0.5)
        )
        assert distance == pytest.approx(math.log(1 + 0.5**2 / (2 * 0.5**2)), rel=1e-6)
        values.append(likelihood)
    assert values[2] == pytest.approx(1e4 * values[0], rel=1e-6)  # the same error, by the likelihood


def test_determinant_term_is_lower_for_steeper_maps():
    values = []
    for slope in (0.05, 0.1, 0.2):
        pair = linear_pair(slope, slope)
        values.append(gauss_newton_loss(pair, offset=offsets(pair), second_weight=1.0)[1]["determinant"].item())
    assert values[0] - values[1] == pytest.approx(math.log(4), rel=1e-2)
    assert values[1] - values[2] == pytest.approx(math.log(4), rel=1e-2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_float32_survives_flat_maps_and_maps_that_vary_along_one_direction(scale):
    # ∂F/∂x = ∂F/∂y: JᵀJ has rank one, and det H from its entries would round below zero at large scales.
    pair = linear_pair(1.0, 1.0)
    features = (pair.map_b.sum(1, keepdim=True) * scale).expand(-1, 3, -1, -1).float()
    features = features.clone().requires_grad_()
    pair = LevelPair.from_maps(
        features, features, xy_a=pair.xy_a.float(), xy_b=pair.xy_b.float(), weight=pair.weight.float(), valid=pair.valid
    )
    offset = offsets(pair).float()
    loss, parts = gauss_newton_loss(pair, offset=offset, epsilon=1e-5, second_weight=1.0)
    loss.backward()
    # The eigenvalues of H are 6·scale² + ε and ε, apart from the rounding of the map itself.
    expected = math.log(2 * math.pi) - (math.log(6 * scale**2 + 1e-5) + math.log(1e-5)) / 2
    assert parts["determinant"].item() == pytest.approx(expected, rel=3e-2)
    assert loss.isfinite() and features.grad.isfinite().all()


def test_bf16_autocast_changes_nothing_for_float32_maps_and_little_for_bf16_maps():
    pair64 = make_pair(points=40, height=24, width=24)

    def pair_of(dtype):
        return LevelPair.from_maps(
            pair64.map_a.to(dtype), pair64.map_b.to(dtype), xy_a=pair64.xy_a.float(), xy_b=pair64.xy_b.float(),
            weight=pair64.weight.float(), valid=pair64.valid,
        )  # fmt: skip

    offset = offsets(pair64).float()
    exact = gauss_newton_loss(pair64, offset=offset.double())[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert gauss_newton_loss(pair64, offset=offset.double())[0].item() == exact
        rounded = gauss_newton_loss(pair_of(torch.bfloat16), offset=offset)[0].item()
    assert gauss_newton_loss(pair_of(torch.float32), offset=offset)[0].item() == pytest.approx(exact, rel=1e-4)
    assert rounded == pytest.approx(exact, rel=2e-2)


def test_starts_are_drawn_within_the_vicinity(monkeypatch):
    pair = make_pair(points=200)
    seen = {}
    monkeypatch.setattr(
        "gnnet.losses.gauss_newton.gauss_newton_loss", lambda pair, *, offset, **_: seen.update(offset=offset)
    )
    term = GaussNewton(vicinity=1.5)
    term(pair, *term.draw(pair, torch.Generator().manual_seed(0)), step=0)
    offset = seen["offset"]
    assert offset.shape == pair.xy_b.shape
    assert offset.abs().max() <= 1.5
    assert offset.min() < -1.4 and offset.max() > 1.4
    with pytest.raises(ValueError, match="epsilon"):
        GaussNewton(epsilon=0)
    with pytest.raises(ValueError, match="distance_scale"):
        GaussNewton(distance_scale=0.0)
