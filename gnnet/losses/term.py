"""What a loss term is given, one pyramid level in one direction, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnet.geometry.interpolation import sample


class LevelPair(NamedTuple):
    """Correspondences a → b at one pyramid level: a's points are sought among b's cells.

    Shapes: maps (B, C, H, W) (a and b may differ in H and W); xy_a, xy_b (B, N, 2) level pixels,
    first cell centre at (0.5, 0.5); descriptors_a, descriptors_b (B, N, C) the maps' samples there;
    weight (B, N) confidence; valid (B, N) bool, not padding and inside both maps.
    """

    map_a: Tensor
    map_b: Tensor
    xy_a: Tensor
    xy_b: Tensor
    descriptors_a: Tensor
    descriptors_b: Tensor
    weight: Tensor
    valid: Tensor

    @classmethod
    def from_maps(
        cls, map_a: Tensor, map_b: Tensor, *, xy_a: Tensor, xy_b: Tensor, weight: Tensor, valid: Tensor
    ) -> LevelPair:
        """Sample both maps at their points; points that leave their map become invalid.

        Half-precision maps are taken to float32 here, so that no loss is computed in fewer bits.
        Points that are not valid may hold anything, infinities included.
        """
        map_a, map_b = _at_least_float32(map_a), _at_least_float32(map_b)
        xy_a, xy_b = (torch.where(valid[..., None], xy, torch.zeros_like(xy)) for xy in (xy_a, xy_b))
        descriptors_a, inside_a = sample(map_a, xy_a)
        descriptors_b, inside_b = sample(map_b, xy_b)
        valid = valid & inside_a & inside_b
        return cls(map_a, map_b, xy_a, xy_b, descriptors_a, descriptors_b, weight, valid)

    def swap(self) -> LevelPair:
        """The same correspondences from b to a."""
        return LevelPair(
            self.map_b, self.map_a, self.xy_b, self.xy_a, self.descriptors_b, self.descriptors_a,
            self.weight, self.valid,
        )  # fmt: skip


class Term(nn.Module):
    """One summand of the loss: its weight, where and from when it counts, and its value for a `LevelPair`.

    Args:
        weight: factor in the total.
        start_step: the term is off (and not computed) before this global step.
        ramp_steps: from `start_step` on, the weight rises linearly over so many steps.
        levels: positions of the pyramid levels on which it counts, 0 the coarsest, −1 the finest; None: all.

    Raises:
        ValueError: if one of them is negative.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        levels: Sequence[int] | None = None,
    ):
        super().__init__()
        for key, value in {"weight": weight, "start_step": start_step, "ramp_steps": ramp_steps}.items():
            if value < 0:
                raise ValueError(f"{type(self).__name__}.{key} is {value}; expected zero or more")
        self.weight = weight
        self.start_step = start_step
        self.ramp_steps = ramp_steps
        self.levels = None if levels is None else list(levels)

    def weight_at(self, step: int) -> float:
        """Weight at a global step: 0 before `start_step`, then rising to `weight`."""
        if step < self.start_step:
            return 0.0
        return self.weight * min(1.0, (step - self.start_step + 1) / (self.ramp_steps + 1))

    def forward(
        self, pair: LevelPair, *, step: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, unweighted) of one direction, and detached scalars worth logging."""
        raise NotImplementedError


def weighted_mean(values: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """Σ w·l / Σ w over the valid points, all tensors (B, N); 0, with its graph, where there are none."""
    weight = torch.where(valid, weight, torch.zeros_like(weight)).to(values.dtype)
    # Not values · weight alone: an invalid value may be infinite, and ∞ · 0 is NaN.
    values = torch.where(valid, values, torch.zeros_like(values))
    return (values * weight).sum() / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def uniform(shape: tuple[int, ...], *, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1) on the device and of the dtype of `like`.

    Drawn where the generator lives: one on the CPU gives every device the same numbers, one on the
    maps' own device saves the transfer.
    """
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def rows_at(features: Tensor, cells: Tensor) -> Tensor:
    """Cells of maps (B, C, H, W) at flat indices (B, ...) = y·W + x: (B, ..., C); no copy of a channels_last map."""
    batch, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
    first = torch.arange(batch, device=cells.device).view(-1, *[1] * (cells.ndim - 1)) * (height * width)
    return rows.index_select(0, (cells + first).flatten()).view(*cells.shape, channels)


def _at_least_float32(features: Tensor) -> Tensor:
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
