"""Levenberg-Marquardt loss: features on which damped steps converge from far, and undamped ones stay near.

From von Stumberg et al., "LM-Reloc: Levenberg-Marquardt based direct visual relocalization" (3DV 2020), whose loss
tells four cases apart: a point at the true place, at a wrong place, far from the true place, and near to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnnet.geometry.interpolation import Gradient
from gnnet.losses.gauss_newton import gauss_newton_loss, step_from
from gnnet.losses.term import LevelPair, Loss, Term, rows_at, uniform, weighted_mean


def descent_loss(
    pair: LevelPair,
    *,
    offset: Tensor,
    damping: float = 2.0,
    margin: float = 0.1,
    gradient: Gradient = "central",
) -> Loss:
    """max(0, ‖x′ − u_b‖² − ‖x − u_b‖² + δ): a strongly damped step from x = u_b + offset must lead towards u_b.

    x′ = x − (H + λI)⁻¹ Jᵀr with r = F_b(x) − F_a(u_a), J = ∂F_b/∂x and H = JᵀJ.

    Args:
        pair: the correspondences.
        offset: (B, N, 2) in level pixels.
        damping: λ; with a large one the step follows the gradient.
        margin: δ in squared level pixels.
        gradient: how ∂F_b/∂x is computed, see `sample_with_gradient`.

    Returns:
        The weighted mean over points that are valid and whose start has its whole stencil in the map, and the part
        `nearer`: the share of these whose step ends nearer to u_b.
    """
    end = step_from(pair, offset, damping, gradient)
    change = end.square - offset.square().sum(-1)
    valid = pair.valid & end.inside
    loss = weighted_mean((change + margin).relu(), pair.weight, valid)
    with torch.no_grad():
        nearer = weighted_mean((change < 0).to(change.dtype), torch.ones_like(change), valid)
    return loss, {"nearer": nearer}


@dataclass(eq=False, kw_only=True)
class LevenbergMarquardt(Term):
    """The four cases of LM-Reloc, E_pos + E_neg + w_GD E_GD + w_GN E_GN.

    - at the true place: E_pos = ‖F_b(u_b) − F_a(u_a)‖²;
    - at a wrong place u₋, a cell of b drawn at random: E_neg = max(0, M − ‖F_b(u₋) − F_a(u_a)‖²);
    - far from the true place: E_GD = `descent_loss`, from up to `far` level pixels on each axis;
    - near to it: E_GN = `gauss_newton_loss`, from up to `near` level pixels.

    λ, δ, M and both distances are LM-Reloc's. Our own are w_GD and w_GN, the weight of the determinant's term (there
    one), and that no wrong place is drawn near the true one.

    Args:
        margin: M, a squared feature distance.
        exclusion: a fraction of the map's larger side; a cell drawn nearer to the true place counts for nothing.
        far: level pixels.
        damping: λ of the steps from far.
        descent_margin: δ, squared level pixels by which such a step must come nearer.
        descent_weight: w_GD.
        near: level pixels.
        newton_weight: w_GN.
        second_weight: of the determinant's term in E_GN.
        epsilon, gradient: see `gauss_newton_loss`.
        weight, start_step, ramp_steps, levels: see `Scheduled`.

    Raises:
        ValueError: if `damping` or `epsilon` is not positive.
    """

    margin: float = 1.0
    exclusion: float = 0.1
    far: float = 5.0
    damping: float = 2.0
    descent_margin: float = 0.1
    descent_weight: float = 1.0
    near: float = 1.0
    newton_weight: float = 0.5
    second_weight: float = 2 / 7
    epsilon: float = 1e-5
    gradient: Gradient = "central"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("damping", "epsilon"):
            if getattr(self, key) <= 0:
                raise ValueError(f"LevenbergMarquardt.{key} is {getattr(self, key)}; expected more than zero")

    def draw(self, pair: LevelPair, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return tuple(uniform(pair.xy_b.shape, like=pair.map_b, generator=generator) for _ in range(3))

    def forward(self, pair: LevelPair, *drawn: Tensor, step: int) -> Loss:
        """See `Term.forward`."""
        far, near = (2 * drawn[0] - 1) * self.far, (2 * drawn[1] - 1) * self.near
        height, width = pair.map_b.shape[-2:]
        x, y = drawn[2].unbind(-1)
        x, y = ((v * side).floor().clamp(max=side - 1) for v, side in ((x, width), (y, height)))
        cells = (y * width + x).long()
        away = (torch.stack([x, y], -1) + 0.5 - pair.xy_b).norm(dim=-1) > self.exclusion * max(height, width)
        true, wrong = (
            (described - pair.descriptors_a).square().sum(-1)
            for described in (pair.descriptors_b, rows_at(pair.map_b, cells))
        )
        positive = weighted_mean(true, pair.weight, pair.valid)
        negative = weighted_mean((self.margin - wrong).relu(), pair.weight, pair.valid & away)
        descent, descent_parts = descent_loss(
            pair, offset=far, damping=self.damping, margin=self.descent_margin, gradient=self.gradient
        )
        newton, newton_parts = gauss_newton_loss(
            pair, offset=near, epsilon=self.epsilon, second_weight=self.second_weight, gradient=self.gradient
        )
        total = positive + negative + self.descent_weight * descent + self.newton_weight * newton
        parts = {"positive": positive, "negative": negative, "descent": descent, "newton": newton}
        parts = {name: part.detach() for name, part in parts.items()}
        return total, {**parts, **descent_parts, "converged": newton_parts["converged"]}
