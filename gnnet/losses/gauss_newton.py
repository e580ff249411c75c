"""Gauss-Newton loss (von Stumberg et al., GN-Net, RA-L 2020): one step from nearby must end at the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gnnet.geometry.interpolation import Gradient, sample_stacked
from gnnet.losses.term import LevelPair, Term, uniform, weighted_mean


def gauss_newton_loss(
    pair: LevelPair,
    *,
    offset: Tensor,
    epsilon: float = 1e-5,
    second_weight: float = 2 / 7,
    distance_scale: float | None = None,
    gradient: Gradient = "central",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the truth u_b under the Gauss-Newton step from u_b + offset.

    With r = F_b(u_b + δ) − F_a(u_a), J = ∂F_b/∂x there, H = JᵀJ + εI and μ = u_b + δ − H⁻¹Jᵀr,
    the loss of a point is ½(u_b − μ)ᵀH(u_b − μ) + w₂(log 2π − ½ log det H).

    H is factored as LDLᵀ from the columns of J, never from its own entries: both pivots are then
    sums of squares plus ε, so det H cannot round to zero or below, however large the map's scale.

    Of features of unit norm H is bounded, and where it is small the likelihood hardly asks where the step
    ends: errors of most of a cell cost little beside what steeper features earn. With a `distance_scale` σ
    the first term is log(1 + |u_b − μ|² / 2σ²) instead, which asks for nothing else; robust, as on an edge
    the step may end anywhere along it.

    Args:
        pair: the correspondences; residual and Jacobian both come from `map_b` as it is.
        offset: δ (B, N, 2) in level pixels.
        epsilon: ε, added to JᵀJ, whose entries are about 1e-3 to 0.3 for unit-norm features.
        second_weight: w₂; 1 in GN-Net.
        distance_scale: σ in level pixels; None is GN-Net's likelihood.
        gradient: how ∂F_b/∂x is taken, see `sample_with_gradient`.

    Returns:
        The weighted mean over points that are valid and whose start's stencil lies in the map, and
        the parts `step` (first term), `determinant` (second term, with w₂) and `converged` (share of
        points whose step ends within half a level pixel of the truth).
    """
    with torch.autocast(pair.map_b.device.type, enabled=False):
        stacked, inside = sample_stacked(pair.map_b, pair.xy_b + offset, gradient)
        value, jacobian_x, jacobian_y = stacked.unbind(-2)  # each [B, N, C]
        residual = value - pair.descriptors_a
        pivot_x = jacobian_x.square().sum(-1) + epsilon
        ratio = (jacobian_x * jacobian_y).sum(-1) / pivot_x
        rest = jacobian_y - ratio[..., None] * jacobian_x  # of ∂F/∂y, what ∂F/∂x does not explain
        pivot_y = rest.square().sum(-1) + epsilon * (1 + ratio.square())
        # u_b − μ = H⁻¹Jᵀr − δ, in the coordinates (x + ratio·y, y) where H is diagonal.
        delta_x, delta_y = offset.unbind(-1)
        error_y = (rest * residual).sum(-1) / pivot_y - delta_y
        error_x = (jacobian_x * residual).sum(-1) / pivot_x - delta_x - ratio * delta_y
        square = (error_x - ratio * error_y).square() + error_y.square()
        if distance_scale is None:
            step = (pivot_x * error_x.square() + pivot_y * error_y.square()) / 2
        else:
            step = torch.log1p(square / (2 * distance_scale**2))
        determinant = second_weight * (math.log(2 * math.pi) - (pivot_x.log() + pivot_y.log()) / 2)
        valid = pair.valid & inside
        loss = weighted_mean(step + determinant, pair.weight, valid)
    with torch.no_grad():
        parts = {
            "step": weighted_mean(step, pair.weight, valid),
            "determinant": weighted_mean(determinant, pair.weight, valid),
            "converged": weighted_mean((square < 0.5**2).to(step.dtype), torch.ones_like(step), valid),
        }
    return loss, parts


class GaussNewton(Term):
    """`gauss_newton_loss` from starts drawn uniformly in [−vicinity, vicinity]² level pixels.

    Args:
        weight, start_step, ramp_steps, levels: see `Term`.
        vicinity: in level pixels.
        second_weight, distance_scale, epsilon, gradient: see `gauss_newton_loss`.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        second_weight: float = 2 / 7,
        vicinity: float = 1.0,
        distance_scale: float | None = None,
        epsilon: float = 1e-5,
        gradient: Gradient = "central",
        start_step: int = 0,
        ramp_steps: int = 0,
        levels: Sequence[int] | None = None,
    ):
        super().__init__(weight=weight, start_step=start_step, ramp_steps=ramp_steps, levels=levels)
        if epsilon <= 0:
            raise ValueError(f"GaussNewton.epsilon is {epsilon}; expected more than zero, for log det H to be finite")
        if distance_scale is not None and distance_scale <= 0:
            raise ValueError(f"GaussNewton.distance_scale is {distance_scale}; expected more than zero level pixels")
        self.second_weight = second_weight
        self.distance_scale = distance_scale
        self.vicinity = vicinity
        self.epsilon = epsilon
        self.gradient = gradient

    def forward(
        self, pair: LevelPair, *, step: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        offset = (2 * uniform(pair.xy_b.shape, like=pair.map_b, generator=generator) - 1) * self.vicinity
        return gauss_newton_loss(
            pair,
            offset=offset,
            epsilon=self.epsilon,
            second_weight=self.second_weight,
            distance_scale=self.distance_scale,
            gradient=self.gradient,
        )
