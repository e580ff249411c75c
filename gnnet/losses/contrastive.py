"""Double-margin contrastive loss with progressive hard-negative mining (the report's section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from gnnet.losses.mining import draw_candidates, hardest_count, mine_hardest
from gnnet.losses.term import LevelPair, Loss, Term, rows_at, weighted_mean


def double_margin_contrastive_loss(
    pair: LevelPair,
    *,
    negatives: Tensor,
    has_negative: Tensor,
    positive_margin: float = 0.1,
    negative_margin: float = 1.0,
) -> Loss:
    """Double-margin contrastive loss, L₊ + L₋ with L₊ = mean max(0, D − M₊)² and L₋ = mean max(0, M₋ − D₋)².

    D = ‖F_a(u_a) − F_b(u_b)‖ is the feature distance of a correspondence, D₋ = ‖F_a(u_a) − F_b(u₋)‖ that of
    the point of a to its negative, a cell u₋ of b. With M₊ = 0 this is GN-Net's contrastive loss.

    Args:
        pair: the correspondences.
        negatives: (B, N) flat indices y·W + x of cells of `map_b`, one for each point.
        has_negative: (B, N) bool; a point for which it is False counts in L₊ only.
        positive_margin: M₊; correspondences that are nearer cost nothing.
        negative_margin: M₋; negatives that are farther cost nothing.

    Returns:
        The sum of both weighted means over valid points, and its parts `positive` (L₊) and `negative` (L₋).
    """
    # At distance zero the gradient of vector_norm is zero; that of a plain sqrt would be NaN.
    distance = vector_norm(pair.descriptors_a - pair.descriptors_b, dim=-1)
    negative_distance = vector_norm(pair.descriptors_a - rows_at(pair.map_b, negatives), dim=-1)
    attraction = (distance - positive_margin).relu().square()
    repulsion = (negative_margin - negative_distance).relu().square()
    positive = weighted_mean(attraction, pair.weight, pair.valid)
    negative = weighted_mean(repulsion, pair.weight, pair.valid & has_negative)
    return positive + negative, {"positive": positive.detach(), "negative": negative.detach()}


@dataclass(eq=False, kw_only=True)
class Contrastive(Term):
    """`double_margin_contrastive_loss`; each negative is drawn from the M(step) hardest cells of the other image.

    Args:
        positive_margin, negative_margin: M₊ and M₋, feature distances.
        exclusion: a negative is at least this far from the true point, as a fraction of the map's larger side.
        hardest_start, hardest_min, hardest_decay: M(k), see `hardest_count`.
        candidates: number of cells, drawn at random, among which negatives are sought; `all` is the paper's rule.
        weight, start_step, ramp_steps, levels: see `Term`.

    Raises:
        ValueError: if `candidates`, `hardest_min` or `hardest_start` is out of range.
    """

    positive_margin: float = 0.1
    negative_margin: float = 1.0
    exclusion: float = 0.2
    hardest_start: int = 300
    hardest_min: int = 5
    hardest_decay: float = 0.6
    candidates: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates != "all" and not (isinstance(self.candidates, int) and self.candidates > 0):
            raise ValueError(
                f'Contrastive.candidates is {self.candidates!r}; expected "all" or a positive number of cells'
            )
        if not 0 < self.hardest_min <= self.hardest_start:
            raise ValueError(
                f"Contrastive.hardest_min is {self.hardest_min} and hardest_start {self.hardest_start}; "
                "expected 0 < hardest_min <= hardest_start"
            )

    def draw(self, pair: LevelPair, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return draw_candidates(pair, self.candidates, generator)

    def forward(self, pair: LevelPair, *drawn: Tensor, step: int) -> Loss:
        """See `Term.forward`."""
        negatives, found = mine_hardest(
            pair,
            *drawn,
            hardest=hardest_count(step, start=self.hardest_start, minimum=self.hardest_min, decay=self.hardest_decay),
            exclusion=self.exclusion,
        )
        return double_margin_contrastive_loss(
            pair,
            negatives=negatives,
            has_negative=found,
            positive_margin=self.positive_margin,
            negative_margin=self.negative_margin,
        )
