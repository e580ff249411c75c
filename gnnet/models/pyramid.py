"""What a network makes of an image batch: feature maps at several strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn


class FeaturePyramid(NamedTuple):
    """Feature maps (B, C_l, H_l, W_l), coarse to fine, in `channels_last`; image pixel xy is at xy / stride in a map.

    Losses and refinement use the maps as they are. A network that normalises its features normalises
    the *map*, so that samples of it and its gradients belong to one function.
    """

    maps: tuple[Tensor, ...]
    strides: tuple[int, ...]
    confidences: tuple[Tensor, ...] | None = None
    """For each level (B, 1, H_l, W_l) from 0 to 1, the weight of a cell in refinement; None weighs all alike."""

    def select(self, levels: list[int]) -> FeaturePyramid:
        """Some levels, by position: 0 is the coarsest, -1 the finest."""
        confidences = self.confidences and tuple(self.confidences[i] for i in levels)
        return FeaturePyramid(
            tuple(self.maps[i] for i in levels), tuple(self.strides[i] for i in levels), confidences
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> FeaturePyramid:
        """The same with every map changed, those of the confidence too."""
        confidences = self.confidences and tuple(map(change, self.confidences))
        return FeaturePyramid(tuple(map(change, self.maps)), self.strides, confidences)

    def cpu(self) -> FeaturePyramid:
        """The same maps in float32 on the CPU."""
        return self.each(lambda m: m.float().cpu())


def pair_features(
    network: Callable[[Tensor], FeaturePyramid], a: Tensor, b: Tensor
) -> tuple[FeaturePyramid, FeaturePyramid]:
    """Pyramids of two image batches of the same length, from one pass of the network if their images have one size."""
    if a.shape != b.shape:
        return network(a), network(b)
    both = network(torch.cat([a, b]))
    return both.each(lambda m: m.chunk(2)[0]), both.each(lambda m: m.chunk(2)[1])


class FeatureNetwork(Protocol):
    """A backbone: an `nn.Module` that maps images to a `FeaturePyramid`.

    An image (B, 3, H, W) of any size, uint8 or floating in [0, 1] RGB, gives maps of
    ceil(H / stride) × ceil(W / stride) cells in float32 or better, also under autocast. A network that
    needs other sizes pads at the bottom and on the right, so that every pixel keeps its coordinates
    (`gnnet.models.images` has both steps).
    """

    strides: tuple[int, ...]
    """Image pixels from one cell to the next, for each map, coarse to fine."""

    channels: tuple[int, ...]
    """Features of a cell, for each map, coarse to fine."""

    def __call__(self, images: Tensor) -> FeaturePyramid: ...

    # What the project calls of `nn.Module`, which every backbone is.
    training: bool

    def eval(self) -> Self: ...
    def train(self, mode: bool = ...) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
