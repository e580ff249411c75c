"""Cross-entropy of the true match against other places (S2DNet, ECCV 2020; InfoNCE): trains from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gnnet.losses.mining import exclusion_penalty
from gnnet.losses.term import LevelPair, Term, rows_at, uniform, weighted_mean


def correspondence_cross_entropy(
    pair: LevelPair,
    *,
    window: Tensor | None = None,
    other_points: bool = True,
    temperature: float = 0.07,
    exclusion: float = 1.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """−log softmax of the true point among candidates of image b, logits ⟨F_a(u_a), F_b(u)⟩ / temperature.

    The true point's own logit uses F_b at the sub-pixel u_b. A candidate nearer to u_b than
    `exclusion` is left out, as it may be just as right.

    Args:
        pair: the correspondences; features are meant to be of unit norm.
        window: (B, N, K, 2) cells (x, y), integers, that stand as candidates for each point; cells
            outside the map are left out. None: every cell of the map, B·N·H·W logits.
        other_points: with a window, let the other correspondences' points in b be candidates too.
        temperature: τ.
        exclusion: in level cells.

    Returns:
        The weighted mean over valid points, and the part `accuracy`: the share of points whose true
        logit is larger than every candidate's. A point without any candidate has loss zero.
    """
    anchors = pair.descriptors_a / temperature
    positive = (anchors * pair.descriptors_b).sum(-1)
    if window is None:
        negatives = _every_cell(pair, anchors, exclusion)
    else:
        negatives = _window_cells(pair, anchors, window, exclusion)
        if other_points:
            negatives = torch.cat([negatives, _other_points(pair, anchors, exclusion)], -1)
    # log(e^p + Σe^n) − p, with the true point outside the sum so that no row is copied for it.
    loss = weighted_mean(F.softplus(negatives.logsumexp(-1) - positive), pair.weight, pair.valid)
    with torch.no_grad():
        right = (positive > negatives.amax(-1)).to(positive.dtype)
        accuracy = weighted_mean(right, torch.ones_like(right), pair.valid)
    return loss, {"accuracy": accuracy}


def _every_cell(pair: LevelPair, anchors: Tensor, exclusion: float) -> Tensor:
    """Logits (B, N, H·W), those of excluded cells at the lowest finite number."""
    height, width = pair.map_b.shape[-2:]
    x = torch.arange(width, device=anchors.device)[None] + 0.5
    y = torch.arange(height, device=anchors.device)[:, None] + 0.5
    return torch.baddbmm(_penalty(pair, x, y, exclusion), anchors, pair.map_b.flatten(2))


def _window_cells(pair: LevelPair, anchors: Tensor, window: Tensor, exclusion: float) -> Tensor:
    """Logits (B, N, K) of given cells."""
    height, width = pair.map_b.shape[-2:]
    x, y = window.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cells = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    far = (window + 0.5 - pair.xy_b[..., None, :]).square().sum(-1) > exclusion**2
    logits = (rows_at(pair.map_b, cells) @ anchors[..., None]).squeeze(-1)
    return logits.masked_fill(~(inside & far), _lowest(logits))


def _other_points(pair: LevelPair, anchors: Tensor, exclusion: float) -> Tensor:
    """Logits (B, N, N) of the image's other correspondences."""
    x, y = (pair.xy_b[:, None, None, :, i] for i in (0, 1))  # each [B, 1, 1, N]
    logits = torch.baddbmm(_penalty(pair, x, y, exclusion), anchors, pair.descriptors_b.mT)
    return logits.masked_fill(~pair.valid[:, None], _lowest(logits))


def _penalty(pair: LevelPair, x: Tensor, y: Tensor, exclusion: float) -> Tensor:
    features = pair.map_b
    xy = pair.xy_b.to(features.dtype)
    return exclusion_penalty(xy, x=x, y=y, radius=exclusion, near=_lowest(features)).flatten(-2)


def _lowest(features: Tensor) -> float:
    # Not −∞: a row without any candidate would have NaN for its gradient.
    return torch.finfo(features.dtype).min


class CrossEntropy(Term):
    """`correspondence_cross_entropy` against every cell at coarse levels, and a window's at fine ones.

    Args:
        weight, start_step, ramp_steps, levels: see `Term`.
        temperature: τ.
        exclusion: in level cells.
        dense_cells: a map of at most so many cells is coarse: each cell is a candidate.
        window: half side, in level cells, of the square around the truth from which a fine level's
            candidates are drawn: about as far as the coarser levels may leave a point off.
        window_candidates: how many are drawn for each point (with replacement).
        other_points: at fine levels, the other correspondences are candidates too.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 0.07,
        exclusion: float = 1.5,
        dense_cells: int = 4096,
        window: int = 8,
        window_candidates: int = 32,
        other_points: bool = True,
        start_step: int = 0,
        ramp_steps: int = 0,
        levels: Sequence[int] | None = None,
    ):
        super().__init__(weight=weight, start_step=start_step, ramp_steps=ramp_steps, levels=levels)
        if temperature <= 0:
            raise ValueError(f"CrossEntropy.temperature is {temperature}; expected more than zero (0.07 is usual)")
        if window <= exclusion:
            raise ValueError(
                f"CrossEntropy.window is {window} cells and exclusion {exclusion}: no candidate would be left; "
                "expected a larger window"
            )
        self.temperature = temperature
        self.exclusion = exclusion
        self.dense_cells = dense_cells
        self.window = window
        self.window_candidates = window_candidates
        self.other_points = other_points

    def forward(
        self, pair: LevelPair, *, step: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        height, width = pair.map_b.shape[-2:]
        dense = height * width <= self.dense_cells
        return correspondence_cross_entropy(
            pair,
            window=None if dense else self._draw_window(pair, generator),
            other_points=self.other_points,
            temperature=self.temperature,
            exclusion=self.exclusion,
        )

    def _draw_window(self, pair: LevelPair, generator: torch.Generator | None) -> Tensor:
        shape = (*pair.valid.shape, self.window_candidates, 2)
        draw = uniform(shape, like=pair.map_b, generator=generator)
        offset = (draw * (2 * self.window + 1)).floor().long() - self.window
        return pair.xy_b.floor().long()[..., None, :] + offset
