"""Double-margin contrastive loss with progressive hard negative mining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from gnnet.losses.mining import hardest_count, mine_hardest
from gnnet.losses.term import LevelPair, Term, rows_at, weighted_mean


def double_margin_contrastive_loss(
    pair: LevelPair,
    *,
    negatives: Tensor,
    has_negative: Tensor,
    positive_margin: float = 0.1,
    negative_margin: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L₊ + L₋ with L₊ = mean max(0, D − M₊)², L₋ = mean max(0, M₋ − D₋)².

    D = ‖F_a(u_a) − F_b(u_b)‖ is the distance of a correspondence, D₋ that of F_a(u_a) to a cell of b.

    Args:
        pair: the correspondences.
        negatives: (B, N) flat cell indices y·W + x in `map_b`.
        has_negative: (B, N) bool; a point without one counts in L₊ only.
        positive_margin: M₊; nearer correspondences cost nothing.
        negative_margin: M₋; negatives farther off cost nothing.

    Returns:
        The sum of both weighted means over valid points, and the parts `positive` and `negative`.
    """
    # vector_norm's gradient at distance zero is zero; that of a plain sqrt would be NaN.
    distance = vector_norm(pair.descriptors_a - pair.descriptors_b, dim=-1)
    negative_distance = vector_norm(pair.descriptors_a - rows_at(pair.map_b, negatives), dim=-1)
    attraction = (distance - positive_margin).relu().square()
    repulsion = (negative_margin - negative_distance).relu().square()
    positive = weighted_mean(attraction, pair.weight, pair.valid)
    negative = weighted_mean(repulsion, pair.weight, pair.valid & has_negative)
    return positive + negative, {"positive": positive.detach(), "negative": negative.detach()}


class Contrastive(Term):
    """`double_margin_contrastive_loss` with negatives mined among the hardest M(step) cells of the other image.

    Args:
        weight, start_step, ramp_steps, levels: see `Term`.
        positive_margin, negative_margin: M₊ and M₋, feature distances.
        exclusion: no negative lies nearer to the truth than this fraction of the map's larger side.
        hardest_start, hardest_min, hardest_decay: M(k), see `hardest_count`.
        candidates: `all` cells (the paper's rule) or the size of a random subset, see `mine_hardest`.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        positive_margin: float = 0.1,
        negative_margin: float = 1.0,
        exclusion: float = 0.2,
        hardest_start: int = 300,
        hardest_min: int = 5,
        hardest_decay: float = 0.6,
        candidates: int | Literal["all"] = "all",
        start_step: int = 0,
        ramp_steps: int = 0,
        levels: Sequence[int] | None = None,
    ):
        super().__init__(weight=weight, start_step=start_step, ramp_steps=ramp_steps, levels=levels)
        if candidates != "all" and not (isinstance(candidates, int) and candidates > 0):
            raise ValueError(f'Contrastive.candidates is {candidates!r}; expected "all" or a positive number of cells')
        if not 0 < hardest_min <= hardest_start:
            raise ValueError(
                f"Contrastive.hardest_min is {hardest_min} and hardest_start {hardest_start}; "
                "expected 0 < hardest_min <= hardest_start"
            )
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        self.exclusion = exclusion
        self.hardest_start = hardest_start
        self.hardest_min = hardest_min
        self.hardest_decay = hardest_decay
        self.candidates = candidates

    def forward(
        self, pair: LevelPair, *, step: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        negatives, found = mine_hardest(
            pair,
            hardest=hardest_count(step, start=self.hardest_start, minimum=self.hardest_min, decay=self.hardest_decay),
            exclusion=self.exclusion,
            candidates=self.candidates,
            generator=generator,
        )
        return double_margin_contrastive_loss(
            pair,
            negatives=negatives,
            has_negative=found,
            positive_margin=self.positive_margin,
            negative_margin=self.negative_margin,
        )
