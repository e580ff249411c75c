import pytest
import torch

from gnnet.losses.gauss_newton import gauss_newton_loss
from gnnet.losses.levenberg_marquardt import LevenbergMarquardt, descent_loss

from .conftest import at, every_point, make_pair, mean_of
from .test_gauss_newton import linear_pair, offsets


def literal_descent(pair, offset, *, damping, margin):
    """The damped step of one point after the other, with torch's own solver."""
    cost, keep = {}, {}
    height, width = pair.map_b.shape[-2:]
    for b, n in every_point(pair):
        features, u_b = pair.map_b[b], pair.xy_b[b, n]
        x, y = (u_b + offset[b, n]).tolist()
        keep[b, n] = 1.5 <= x <= width - 1.5 and 1.5 <= y <= height - 1.5
        if not (pair.valid[b, n] and keep[b, n]):
            cost[b, n] = 0.0
            continue
        residual = at(features, x, y) - at(pair.map_a[b], *pair.xy_a[b, n])
        along_x = (at(features, x + 1, y) - at(features, x - 1, y)) / 2
        along_y = (at(features, x, y + 1) - at(features, x, y - 1)) / 2
        jacobian = torch.stack([along_x, along_y], -1)
        system = jacobian.T @ jacobian + damping * torch.eye(2, dtype=features.dtype)
        start = u_b + offset[b, n]
        end = start - torch.linalg.solve(system, jacobian.T @ residual)
        cost[b, n] = ((end - u_b).square().sum() - (start - u_b).square().sum() + margin).clamp(min=0)
    return mean_of(cost, pair, keep)


@pytest.mark.parametrize("damping", [1e-3, 2.0, 50.0])
def test_descent_and_its_gradient_are_those_of_the_formulas(damping):
    results = []
    for function in (
        literal_descent,
        lambda pair, offset, **settings: descent_loss(pair, offset=offset, **settings)[0],
    ):
        pair = make_pair(requires_grad=True)
        loss = function(pair, offsets(pair, vicinity=3.0), damping=damping, margin=0.1)
        results.append((loss, *torch.autograd.grad(loss, [pair.map_a, pair.map_b])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert results[0][0] > 0


def test_on_a_linear_map_the_damped_step_goes_a_known_share_of_the_way():
    pair = linear_pair(0.2, 0.3)
    offset = torch.tensor([[[3.0, -4.0], [1.0, 2.0]]], dtype=torch.float64)
    # Along an axis with slope s a step goes the share s² / (s² + λ) of the way, here 2/3 and 9/11.
    loss, parts = descent_loss(pair, offset=offset, damping=0.02, margin=30.0)
    left = (9 + 1) / 2 / 9 + (16 + 4) / 2 * (2 / 11) ** 2
    assert loss.item() == pytest.approx(30 - (25 + 5) / 2 + left)
    assert parts["nearer"].item() == 1
    assert descent_loss(pair, offset=offset, damping=0.02, margin=0.1)[0] == 0
    assert descent_loss(pair, offset=offset, damping=1e4, margin=0.1)[0] == pytest.approx(0.1, abs=1e-3)


def test_the_four_cases_add_up():
    pair, term = make_pair(points=40), LevenbergMarquardt(exclusion=0.2, descent_weight=0.7, newton_weight=0.3)
    total, parts = term(pair, *term.draw(pair, torch.Generator().manual_seed(3)), step=0)
    generator = torch.Generator().manual_seed(3)

    def draw(reach):
        return (2 * torch.rand(pair.xy_b.shape, generator=generator, dtype=torch.float64) - 1) * reach

    far, near = draw(5.0), draw(1.0)
    wrong = torch.rand(*pair.valid.shape, 2, generator=generator, dtype=torch.float64)
    cells = (wrong * torch.tensor([15, 12])).floor()
    away = (cells + 0.5 - pair.xy_b).norm(dim=-1) > 0.2 * 15
    assert away.any() and not away.all()
    true, negative = {}, {}
    for b, n in every_point(pair):
        described = at(pair.map_a[b], *pair.xy_a[b, n])
        true[b, n] = (at(pair.map_b[b], *pair.xy_b[b, n]) - described).square().sum()
        x, y = cells[b, n].long().tolist()
        negative[b, n] = (1 - (pair.map_b[b, :, y, x] - described).square().sum()).clamp(min=0)
    expected = (
        mean_of(true, pair)
        + mean_of(negative, pair, away)
        + 0.7 * descent_loss(pair, offset=far)[0]
        + 0.3 * gauss_newton_loss(pair, offset=near)[0]
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts["positive"], mean_of(true, pair))
    assert parts.keys() == {"positive", "negative", "descent", "newton", "nearer", "converged"}


def test_without_a_valid_point_loss_and_gradient_are_zero():
    pair = make_pair(requires_grad=True)
    pair = pair._replace(valid=torch.zeros_like(pair.valid))
    loss, _ = (term := LevenbergMarquardt())(pair, *term.draw(pair), step=0)
    loss.backward()
    assert loss == 0 and not pair.map_b.grad.any()


def test_float32_survives_flat_maps():
    pair = linear_pair(0.0, 1e-6, dtype=torch.float32)
    loss, _ = (term := LevenbergMarquardt())(pair, *term.draw(pair), step=0)
    assert loss.isfinite()


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="damping"):
        LevenbergMarquardt(damping=0.0)
    with pytest.raises(ValueError, match="epsilon"):
        LevenbergMarquardt(epsilon=0.0)
