"""Feature maps of one image batch at several strides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeaturePyramid(NamedTuple):
    """Maps (B, C_l, H_l, W_l), coarse to fine, in `channels_last`; a pixel xy is at xy / stride in its map.

    Maps are what losses and refinement use as they are: a network that normalises its features
    normalises the *map*, so that samples and gradients belong to one function.
    """

    maps: tuple[Tensor, ...]
    strides: tuple[int, ...]

    def select(self, levels: list[int]) -> FeaturePyramid:
        """Some levels, by position (0 is the coarsest; negative counts from the finest)."""
        return FeaturePyramid(tuple(self.maps[i] for i in levels), tuple(self.strides[i] for i in levels))

    def cpu(self) -> FeaturePyramid:
        """The maps in float32 on the CPU."""
        return FeaturePyramid(tuple(m.float().cpu() for m in self.maps), self.strides)
