"""Robust costs ρ(s) of a squared residual norm s, with their derivatives.

Minimising Σ ρ(‖r‖²) by Gauss-Newton weighs each residual by ρ′(‖r‖²) (first order of Triggs et al.,
"Bundle adjustment: a modern synthesis", 1999). Every cost is scaled so that ρ(s) ≈ s at small s: a
perfect residual weighs one whatever the cost and its scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

RobustKind = Literal["squared", "huber", "cauchy", "geman_mcclure", "barron"]


@dataclass(frozen=True)
class Robust:
    """A robust cost and the scale at which it sets in.

    Args:
        kind: `squared` ρ = s; `huber`, linear in ‖r‖ beyond the scale; `cauchy` c² log(1 + s/c²);
            `geman_mcclure` s / (1 + s/c²); `barron`, the general cost of shape `alpha` (Barron, "A
            general and adaptive robust loss function", CVPR 2019, eq. 1 times 2c²).
        scale: c, the residual norm beyond which a residual loses weight, in the features' unit;
            `squared` has none.
        alpha: Barron's shape, read by `barron` only: 2 is squared, 1 Charbonnier, 0 Cauchy of scale
            √2·c, -2 Geman-McClure of scale 2c, -inf Welsch.

    Raises:
        ValueError: if the kind is not known, the scale is not positive, or alpha is above 2.
    """

    kind: RobustKind = "squared"
    scale: float = 1.0
    alpha: float = 1.0

    def __post_init__(self):
        kinds = get_args(RobustKind)
        if self.kind not in kinds:
            raise ValueError(f"robust cost {self.kind!r} is not known; expected one of {', '.join(kinds)}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"the scale of a robust cost is a positive residual norm, found {self.scale}")
        if not self.alpha <= 2:
            raise ValueError(f"Barron's alpha is at most 2 (the squared cost), found {self.alpha}")

    def cost_and_weight(self, squared: Tensor) -> tuple[Tensor, Tensor]:
        """ρ(s) and its derivative ρ′(s) at squared residual norms s >= 0 of any shape; ρ(0) = 0, ρ′(0) = 1."""
        c2 = self.scale**2
        match self.kind:
            case "squared":
                return squared, torch.ones_like(squared)
            case "huber":
                # Clamped, so that the root has a finite gradient at s = 0 too, where its value is not taken.
                norm = squared.clamp(min=c2).sqrt()
                return torch.where(squared <= c2, squared, 2 * self.scale * norm - c2), self.scale / norm
            case "cauchy":
                return _barron(squared, scale_squared=c2 / 2, alpha=0.0)
            case "geman_mcclure":
                return _barron(squared, scale_squared=c2 / 4, alpha=-2.0)
            case "barron":
                return _barron(squared, scale_squared=c2, alpha=self.alpha)


def _barron(squared: Tensor, *, scale_squared: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Barron's cost times 2c², with its limits at alpha = 2, 0 and -inf; and its derivative."""
    if alpha == -math.inf:
        exponent = squared / (-2 * scale_squared)
        return -2 * scale_squared * torch.expm1(exponent), torch.exp(exponent)
    if abs(alpha - 2) < 1e-4:
        return squared, torch.ones_like(squared)
    bend = (2 - alpha) * scale_squared
    ratio = squared / bend  # log1p and expm1: no digit is lost where s is small
    if abs(alpha) < 1e-4:
        return bend * ratio.log1p(), 1 / (1 + ratio)
    log = ratio.log1p()
    return (2 * bend / alpha) * torch.expm1(alpha / 2 * log), torch.exp((alpha / 2 - 1) * log)
