"""One term of the training loss, its schedule, and what it is given: one pyramid level in one direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gnnet.data.batches import PairBatch
from gnnet.geometry.interpolation import GatheredSums, sample
from gnnet.models.pyramid import FeaturePyramid

Loss = tuple[Tensor, dict[str, Tensor]]  # a scalar with its graph, and its parts by name: detached scalars to log


class LevelPair(NamedTuple):
    """Correspondences from image a to image b at one pyramid level; each point of a is sought among the cells of b.

    Fields:
        map_a, map_b: feature maps (B, C, H, W); H and W of the two may differ.
        xy_a, xy_b: (B, N, 2) in level pixels; the centre of the first cell is (0.5, 0.5).
        descriptors_a, descriptors_b: (B, N, C), the maps sampled at these points.
        weight: (B, N) confidence of each correspondence, 0 or more.
        valid: (B, N) bool; False for padding and for points outside either map.
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
        """Sample both maps at their points; points outside their map become invalid.

        Maps in half precision are converted to float32, so that no loss is computed with fewer bits.
        Coordinates of invalid points may hold any value, NaN and infinity included.
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


class PyramidPair(NamedTuple):
    """A batch of image pairs with the feature pyramids of `batch.image_a` and `batch.image_b`."""

    a: FeaturePyramid
    b: FeaturePyramid
    batch: PairBatch

    def select(self, levels: list[int]) -> PyramidPair:
        """The same with some levels of both pyramids, see `FeaturePyramid.select`."""
        return self._replace(a=self.a.select(levels), b=self.b.select(levels))


@dataclass(eq=False, kw_only=True)
class Scheduled(nn.Module):
    """One summand of the training loss: how much it weighs, when and where. What it compares is a subclass's matter.

    A subclass is a dataclass too: `@dataclass(eq=False, kw_only=True)`, its settings being fields.

    Args:
        weight: factor of the term in the total.
        start_step: global step from which the term counts; before it the term is not computed.
        ramp_steps: number of steps from `start_step` on over which the weight rises linearly.
        levels: positions of the pyramid levels on which the term counts; 0 is the coarsest, −1 the finest,
            None takes all.

    Raises:
        ValueError: if `weight`, `start_step` or `ramp_steps` is negative.
    """

    weight: float = 1.0
    start_step: int = 0
    ramp_steps: int = 0
    levels: Sequence[int] | None = None
    refines_poses: ClassVar[bool] = False
    """Whether the term needs `PairBatch.geometry`, and trains what only refinement uses: the confidence of features."""

    def __post_init__(self) -> None:
        super().__init__()
        for key in ("weight", "start_step", "ramp_steps"):
            if getattr(self, key) < 0:
                raise ValueError(f"{type(self).__name__}.{key} is {getattr(self, key)}; expected zero or more")

    def weight_at(self, step: int) -> float:
        """Weight at a global step: 0 before `start_step`, then rising to `weight`."""
        if step < self.start_step:
            return 0.0
        return self.weight * min(1.0, (step - self.start_step + 1) / (self.ramp_steps + 1))


class Term(Scheduled):
    """A summand that compares maps of one level at corresponding points: most kinds of loss are subclasses."""

    def draw(self, pair: LevelPair, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The random numbers of one call of `forward`, by `uniform`; none unless a subclass says which.

        They are drawn apart because a generator ends a graph of `torch.compile`.
        """
        return ()

    def forward(self, pair: LevelPair, *drawn: Tensor, step: int) -> Loss:
        """Unweighted loss in one direction.

        Args:
            pair: the correspondences.
            drawn: what `draw` gave for this pair.
            step: global step, for settings that change while training.
        """
        raise NotImplementedError


class PyramidTerm(Scheduled):
    """A summand that takes the pyramids of both images at once."""

    def forward(self, pair: PyramidPair, *, step: int, generator: torch.Generator | None = None) -> Loss:
        """Unweighted loss of a batch; always with the same parts, which processes average.

        Args:
            pair: of the levels on which the term counts.
            step: global step, for settings that change while training.
            generator: source of all random draws; None is torch's global one.
        """
        raise NotImplementedError


def weighted_mean(values: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """Σ w·l / Σ w over the valid points; all arguments (B, N). Without a valid point 0, with a zero gradient."""
    weight = torch.where(valid, weight, torch.zeros_like(weight)).to(values.dtype)
    # Not values · weight alone: an invalid value may be infinite, and ∞ · 0 is NaN.
    values = torch.where(valid, values, torch.zeros_like(values))
    return (values * weight).sum() / weight.sum().clamp(min=torch.finfo(values.dtype).tiny)


def uniform(shape: Sequence[int], *, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform random numbers in [0, 1), with the device and dtype of `like`.

    They are drawn on the generator's device: a generator on the CPU gives the same numbers for every
    device, one on the device of the maps saves the transfer.
    """
    device = like.device if generator is None else generator.device
    drawn = torch.rand(*shape, generator=generator, device=device, dtype=like.dtype)
    return drawn.to(like.device, non_blocking=device.type == "cpu")  # the host need not wait; the other way it must


def rows_at(features: Tensor, cells: Tensor) -> Tensor:
    """Descriptors (B, ..., C) of the cells of maps (B, C, H, W) at flat indices y·W + x (B, ...)."""
    batch, channels, height, width = features.shape
    first = torch.arange(batch, device=cells.device).view(-1, *[1] * (cells.ndim - 1)) * (height * width)
    index = (cells + first).flatten()
    rows = GatheredSums.apply(features, index, torch.ones_like(index, dtype=features.dtype), (1,))
    return rows.view(*cells.shape, channels)


def cell_centers(features: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the cells of maps (B, C, H, W) in level pixels: x (1, W) and y (H, 1)."""
    height, width = features.shape[-2:]
    x, y = (torch.arange(n, device=features.device, dtype=features.dtype) + 0.5 for n in (width, height))
    return x[None], y[:, None]


def _at_least_float32(features: Tensor) -> Tensor:
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
