"""VGG-16 (Simonyan & Zisserman, ICLR 2015), whose intermediate layers give the maps, as in S2DHM's hypercolumn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gnnet.models.images import NormalizedImages, feature_pyramid
from gnnet.models.pyramid import FeaturePyramid

# torchvision's vgg16.features: the output channels of each 3×3 convolution with its ReLU; 0 is a max pool.
_BLOCKS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG16(nn.Module):
    """Maps images to the inputs of some layers of torchvision's `vgg16().features`; later layers are not built.

    Taps 28, 24, 21, 17, 14 have strides 16, 16, 8, 8, 4 and 512, 512, 512, 256, 256 channels.
    Parameters have torchvision's names (`features.<i>.weight`).

    Args:
        taps: indices of the layers whose inputs are the maps, coarse to fine: from high to low.
        frozen_layers: number of layers at the start of `features` that are not trained; 5, 10, 17 and 24
            are the first one, two, three and four blocks.
        normalize: divide the vector of each cell by its Euclidean length.

    Raises:
        ValueError: if the taps do not decrease, or one is not in 1..30.
    """

    def __init__(
        self,
        *,
        taps: Sequence[int] = (28, 24, 21, 17, 14),
        frozen_layers: int = 0,
        normalize: bool = True,
    ):
        super().__init__()
        self.taps, self.normalize = tuple(taps), normalize
        decrease = self.taps and list(self.taps) == sorted(set(self.taps))[::-1]
        if not decrease or not 1 <= self.taps[-1] <= self.taps[0] <= 30:
            raise ValueError(f"taps={self.taps}; expected layers of vgg16.features from 30 down to 1, coarse to fine")
        layers, strides, channels = _layers(self.taps)
        self.strides = tuple(strides[tap] for tap in self.taps)
        self.channels = tuple(channels[tap] for tap in self.taps)
        self.images = NormalizedImages(multiple=self.strides[0])
        self.features = nn.Sequential(*layers)
        self.features[:frozen_layers].requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB of any size, to maps (B, C_l, H_l, W_l)."""
        x = self.images(images)
        maps = []
        for index, layer in enumerate(self.features):
            if index in self.taps:
                maps.append(x)
            x = layer(x)
        return feature_pyramid([x, *maps[::-1]], images, strides=self.strides, normalize=self.normalize)


def _layers(taps: tuple[int, ...]) -> tuple[list[nn.Module], list[int], list[int]]:
    """Layers 0 to max(taps) - 1, and the stride and number of channels at the input of each layer, by index."""
    layers: list[nn.Module] = []
    strides, channels = [1], [3]
    for block in _BLOCKS:
        if block:
            # In place, unless a tap needs the value before it.
            relu = nn.ReLU(inplace=len(layers) + 1 not in taps)
            layers += [nn.Conv2d(channels[-1], block, 3, padding=1), relu]
            strides, channels = [*strides, strides[-1], strides[-1]], [*channels, block, block]
        else:
            layers.append(nn.MaxPool2d(2))
            strides.append(2 * strides[-1])
            channels.append(channels[-1])
    return layers[: taps[0]], strides, channels
