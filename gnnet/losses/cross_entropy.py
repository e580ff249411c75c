"""Cross-entropy of the true match against other places, which trains a network from scratch.

The loss of S2DNet (Germain et al., ECCV 2020), known as InfoNCE elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gnnet.losses.mining import exclusion_penalty
from gnnet.losses.term import LevelPair, Loss, Term, cell_centers, rows_at, uniform, weighted_mean


def correspondence_cross_entropy(
    pair: LevelPair,
    *,
    window: Tensor | None = None,
    other_points: bool = True,
    temperature: float = 0.07,
    exclusion: float = 1.5,
) -> Loss:
    """−log softmax of the true point among candidates in image b, with logits ⟨F_a(u_a), F_b(u)⟩ / τ.

    The true point's own logit uses F_b sampled at the sub-pixel point u_b. Candidates nearer to u_b than
    `exclusion` are left out, because they may be just as right.

    Args:
        pair: the correspondences; features should have unit norm.
        window: (B, N, K, 2) integer cells (x, y), the candidates of each point; cells outside the map are
            left out. None takes every cell of the map, which makes B·N·H·W logits.
        other_points: whether the points in b of the other correspondences are candidates too; without a
            window it has no effect.
        temperature: τ.
        exclusion: in level pixels.

    Returns:
        The weighted mean over valid points, and the part `accuracy`: the share of points whose true logit is
        larger than that of every candidate. A point without a candidate has loss zero.
    """
    anchors = pair.descriptors_a / temperature
    positive = (anchors * pair.descriptors_b).sum(-1)
    if window is None:
        negatives = _every_cell(pair, anchors, exclusion)
    else:
        negatives = _window_cells(pair, anchors, window, exclusion)
        if other_points:
            negatives = torch.cat([negatives, _other_points(pair, anchors, exclusion)], -1)
    # log(e^p + Σe^n) − p; the true logit stays outside the sum, so that no row is copied to append it.
    loss = weighted_mean(F.softplus(negatives.logsumexp(-1) - positive), pair.weight, pair.valid)
    with torch.no_grad():
        right = (positive > negatives.amax(-1)).to(positive.dtype)
        accuracy = weighted_mean(right, torch.ones_like(right), pair.valid)
    return loss, {"accuracy": accuracy}


def _every_cell(pair: LevelPair, anchors: Tensor, exclusion: float) -> Tensor:
    """Logits (B, N, H·W); excluded cells have the lowest finite number."""
    return torch.baddbmm(_penalty(pair, *cell_centers(pair.map_b), exclusion), anchors, pair.map_b.flatten(2))


def _window_cells(pair: LevelPair, anchors: Tensor, window: Tensor, exclusion: float) -> Tensor:
    """Logits (B, N, K) of the given cells."""
    height, width = pair.map_b.shape[-2:]
    x, y = window.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cells = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    far = (window + 0.5 - pair.xy_b[..., None, :]).square().sum(-1) > exclusion**2
    logits = (rows_at(pair.map_b, cells) @ anchors[..., None]).squeeze(-1)
    return logits.masked_fill(~(inside & far), _lowest(logits))


def _other_points(pair: LevelPair, anchors: Tensor, exclusion: float) -> Tensor:
    """Logits (B, N, N) of the points in b of all correspondences of the pair."""
    x, y = (pair.xy_b[:, None, None, :, i] for i in (0, 1))  # each [B, 1, 1, N]
    logits = torch.baddbmm(_penalty(pair, x, y, exclusion), anchors, pair.descriptors_b.mT)
    return logits.masked_fill(~pair.valid[:, None], _lowest(logits))


def _penalty(pair: LevelPair, x: Tensor, y: Tensor, exclusion: float) -> Tensor:
    xy = pair.xy_b.to(pair.map_b.dtype)
    return exclusion_penalty(xy, x=x, y=y, radius=exclusion, near=_lowest(pair.map_b)).flatten(-2)


def _lowest(features: Tensor) -> float:
    # Not −∞: the gradient of a row without any candidate would be NaN.
    return torch.finfo(features.dtype).min


@dataclass(eq=False, kw_only=True)
class CrossEntropy(Term):
    """`correspondence_cross_entropy` against every cell of a coarse level, and against a window at a fine level.

    Args:
        temperature: τ.
        exclusion: in level pixels.
        dense_cells: largest number of cells of a map at which every cell is a candidate.
        window: half side, in cells, of the square around the true point from which the candidates at a fine
            level are drawn; about the largest error that the coarser levels may leave.
        window_candidates: number of candidates drawn for each point, with replacement.
        other_points: whether at fine levels the other correspondences are candidates too.
        weight, start_step, ramp_steps, levels: see `Term`.

    Raises:
        ValueError: if `temperature` is not positive, or `window` is not larger than `exclusion`.
    """

    temperature: float = 0.07
    exclusion: float = 1.5
    dense_cells: int = 4096
    window: int = 8
    window_candidates: int = 32
    other_points: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"CrossEntropy.temperature is {self.temperature}; expected more than zero (0.07 is usual)")
        if self.window <= self.exclusion:
            raise ValueError(
                f"CrossEntropy.window is {self.window} cells and exclusion {self.exclusion}: no candidate would be "
                "left; expected a larger window"
            )

    def draw(self, pair: LevelPair, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        height, width = pair.map_b.shape[-2:]
        if height * width <= self.dense_cells:
            return ()
        return (uniform((*pair.valid.shape, self.window_candidates, 2), like=pair.map_b, generator=generator),)

    def forward(self, pair: LevelPair, *drawn: Tensor, step: int) -> Loss:
        """See `Term.forward`."""
        return correspondence_cross_entropy(
            pair,
            window=self._window(pair, *drawn) if drawn else None,
            other_points=self.other_points,
            temperature=self.temperature,
            exclusion=self.exclusion,
        )

    def _window(self, pair: LevelPair, drawn: Tensor) -> Tensor:
        offset = (drawn * (2 * self.window + 1)).floor().long() - self.window
        return pair.xy_b.floor().long()[..., None, :] + offset
