"""Gauss-Newton loss: one step from a nearby start must end at the true point.

From von Stumberg et al., "GN-Net: The Gauss-Newton Loss for Multi-Weather Relocalization" (RA-L 2020),
and the report's section 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from gnnet.geometry.interpolation import Gradient, sample_stacked
from gnnet.losses.term import LevelPair, Loss, Term, uniform, weighted_mean


def gauss_newton_loss(
    pair: LevelPair,
    *,
    offset: Tensor,
    epsilon: float = 1e-5,
    second_weight: float = 2 / 7,
    distance_scale: float | None = None,
    gradient: Gradient = "central",
) -> Loss:
    """Negative log-likelihood of the true point u_b under the Gauss-Newton step that starts at u_b + δ.

    With the residual r = F_b(u_b + δ) − F_a(u_a), the jacobian J = ∂F_b/∂x at u_b + δ, H = JᵀJ + εI and the
    end of the step μ = u_b + δ − H⁻¹Jᵀr, a point costs ½(u_b − μ)ᵀH(u_b − μ) + w₂(log 2π − ½ log det H).

    H is factored as LDLᵀ from the columns of J, never from its own entries. Both pivots are then sums of
    squares plus ε, so det H cannot round to zero or below, whatever the scale of the map.

    Where features have unit norm, H is bounded. Where H is small, this likelihood hardly depends on where
    the step ends: an error of most of a cell costs little compared with the gain from steeper features.
    With a `distance_scale` σ the first term is log(1 + |u_b − μ|² / 2σ²) instead. It depends on the error
    alone, and it is robust, because on an edge the step may end anywhere along the edge.

    Args:
        pair: the correspondences; residual and jacobian both come from `map_b`, without another normalization.
        offset: δ (B, N, 2) in level pixels.
        epsilon: ε, added to JᵀJ, whose entries are about 1e-3 to 0.3 for features of unit norm.
        second_weight: w₂; 1 in GN-Net, 2/7 in the report.
        distance_scale: σ in level pixels; None is GN-Net's likelihood.
        gradient: how ∂F_b/∂x is computed, see `sample_with_gradient`.

    Returns:
        The weighted mean over points that are valid and whose start has its whole stencil in the map, and its
        parts: `step` (first term), `determinant` (second term, w₂ included), and `converged` (share of points
        whose step ends within half a level pixel of the true point).
    """
    with torch.autocast(pair.map_b.device.type, enabled=False):
        end = step_from(pair, offset, epsilon, gradient)
        step = end.likelihood if distance_scale is None else torch.log1p(end.square / (2 * distance_scale**2))
        determinant = second_weight * (math.log(2 * math.pi) - end.log_determinant / 2)
        valid = pair.valid & end.inside
        loss = weighted_mean(step + determinant, pair.weight, valid)
    with torch.no_grad():
        parts = {
            "step": weighted_mean(step, pair.weight, valid),
            "determinant": weighted_mean(determinant, pair.weight, valid),
            "converged": weighted_mean((end.square < 0.5**2).to(step.dtype), torch.ones_like(step), valid),
        }
    return loss, parts


class StepEnd(NamedTuple):
    """Where the step of each point (B, N) ends, from u_b + δ to μ, see `gauss_newton_loss`.

    `square` |u_b − μ|², `likelihood` ½(u_b − μ)ᵀH(u_b − μ), `log_determinant` log det H, and `inside`, whether the
    start has its whole stencil in the map.
    """

    square: Tensor
    likelihood: Tensor
    log_determinant: Tensor
    inside: Tensor


def step_from(pair: LevelPair, offset: Tensor, damping: float, gradient: Gradient) -> StepEnd:
    """The step −H⁻¹Jᵀr with H = JᵀJ + damping · I of each point from `offset` (B, N, 2) level pixels off u_b."""
    stacked, inside = sample_stacked(pair.map_b, pair.xy_b + offset, gradient)
    value, jacobian_x, jacobian_y = stacked.unbind(-2)  # each [B, N, C]
    residual = value - pair.descriptors_a
    pivot_x = vecdot(jacobian_x, jacobian_x) + damping
    ratio = vecdot(jacobian_x, jacobian_y) / pivot_x
    rest = jacobian_y - ratio[..., None] * jacobian_x  # the part of ∂F/∂y that ∂F/∂x does not explain
    pivot_y = vecdot(rest, rest) + damping * (1 + ratio.square())
    # u_b − μ = H⁻¹Jᵀr − δ, in the coordinates (x + ratio·y, y) where H is diagonal.
    delta_x, delta_y = offset.unbind(-1)
    error_y = vecdot(rest, residual) / pivot_y - delta_y
    error_x = vecdot(jacobian_x, residual) / pivot_x - delta_x - ratio * delta_y
    square = (error_x - ratio * error_y).square() + error_y.square()
    likelihood = (pivot_x * error_x.square() + pivot_y * error_y.square()) / 2
    return StepEnd(square, likelihood, pivot_x.log() + pivot_y.log(), inside)


@dataclass(eq=False, kw_only=True)
class GaussNewton(Term):
    """`gauss_newton_loss` with δ drawn uniformly from [−vicinity, vicinity]² level pixels.

    Args:
        vicinity: largest offset of a start along x and along y, in level pixels.
        second_weight, distance_scale, epsilon, gradient: see `gauss_newton_loss`.
        weight, start_step, ramp_steps, levels: see `Term`.

    Raises:
        ValueError: if `epsilon` or `distance_scale` is zero or negative.
    """

    second_weight: float = 2 / 7
    vicinity: float = 1.0
    distance_scale: float | None = None
    epsilon: float = 1e-5
    gradient: Gradient = "central"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon <= 0:
            raise ValueError(
                f"GaussNewton.epsilon is {self.epsilon}; expected more than zero, for log det H to be finite"
            )
        if self.distance_scale is not None and self.distance_scale <= 0:
            raise ValueError(
                f"GaussNewton.distance_scale is {self.distance_scale}; expected more than zero level pixels"
            )

    def draw(self, pair: LevelPair, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return (uniform(pair.xy_b.shape, like=pair.map_b, generator=generator),)

    def forward(self, pair: LevelPair, *drawn: Tensor, step: int) -> Loss:
        """See `Term.forward`."""
        return gauss_newton_loss(
            pair,
            offset=(2 * drawn[0] - 1) * self.vicinity,
            epsilon=self.epsilon,
            second_weight=self.second_weight,
            distance_scale=self.distance_scale,
            gradient=self.gradient,
        )
