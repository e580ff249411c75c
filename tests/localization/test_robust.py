"""Robust costs: weights against autograd, limits, and the closed forms that the docstring gives."""

import math

import pytest
import torch

from gnnet.localization.robust import Robust

SQUARED = torch.tensor([1e-12, 1e-6, 0.01, 0.2, 0.24, 0.26, 1.0, 7.0, 400.0], dtype=torch.float64)
COSTS = [
    Robust("squared"),
    Robust("huber", scale=0.5),
    Robust("cauchy", scale=0.5),
    Robust("geman_mcclure", scale=0.5),
    *(Robust("barron", scale=0.5, alpha=a) for a in (2.0, 1.5, 1.0, 0.3, 0.0, -1.0, -2.0, -8.0, -math.inf)),
]


@pytest.mark.parametrize("robust", COSTS, ids=str)
def test_weight_is_the_derivative_of_the_cost(robust):
    squared = SQUARED.clone().requires_grad_()
    cost, weight = robust.cost_and_weight(squared)
    (derivative,) = torch.autograd.grad(cost.sum(), squared)
    torch.testing.assert_close(weight, derivative, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("robust", COSTS, ids=str)
def test_zero_costs_nothing_and_weighs_one_with_a_finite_gradient(robust):
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    cost, weight = robust.cost_and_weight(zero)
    assert cost.shape == weight.shape == (2, 3)
    torch.testing.assert_close(cost, torch.zeros_like(cost), rtol=0, atol=0)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    (gradient,) = torch.autograd.grad(cost.sum() + weight.sum(), zero)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("robust", COSTS, ids=str)
def test_cost_increases_and_weight_never_does(robust):
    cost, weight = robust.cost_and_weight(SQUARED)
    assert (cost.diff() >= 0).all() and (weight.diff() <= 1e-15).all()


def test_closed_forms():
    c, s = 0.5, SQUARED
    expected = {
        "squared": s,
        "huber": torch.where(s <= c * c, s, 2 * c * s.sqrt() - c * c),
        "cauchy": c * c * torch.log(1 + s / (c * c)),
        "geman_mcclure": s / (1 + s / (c * c)),
    }
    for kind, cost in expected.items():
        torch.testing.assert_close(Robust(kind, scale=c).cost_and_weight(s)[0], cost, rtol=1e-9, atol=1e-16)
    charbonnier = 2 * c * c * (torch.sqrt(s / (c * c) + 1) - 1)
    torch.testing.assert_close(
        Robust("barron", scale=c, alpha=1.0).cost_and_weight(s)[0], charbonnier, rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("limit", [2.0, 0.0])
def test_barron_is_continuous_in_alpha_where_its_formula_is_singular(limit):
    at, near = (Robust("barron", scale=0.5, alpha=a).cost_and_weight(SQUARED) for a in (limit, limit - 2e-4))
    for a, b in zip(at, near, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-3, atol=0)


def test_small_residuals_keep_their_digits_in_float32():
    squared = torch.tensor([1e-9, 1e-8])
    for robust in COSTS:
        torch.testing.assert_close(robust.cost_and_weight(squared)[0], squared, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tukey"}, "expected one of squared, huber"),
        ({"kind": "huber", "scale": 0.0}, "positive residual norm, found 0.0"),
        ({"kind": "huber", "scale": math.nan}, "positive residual norm"),
        ({"kind": "barron", "alpha": 3.0}, "at most 2"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Robust(**arguments)
