"""A finer map for any network: its finest map of the enlarged image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from gnnet.models.images import to_unit_range
from gnnet.models.pyramid import FeatureNetwork, FeaturePyramid


class Enlarged(nn.Module):
    """A network with one more map, finer than its finest: that of the image at a multiple of its size.

    Sub-pixel positions become more exact in sharp photographs. A pass takes five times as long with a factor of 2.
    The weights are the network's as they are.

    Args:
        network: a backbone.
        factor: by which the image's sides grow; the new map's stride is the finest stride by the factor.

    Raises:
        ValueError: if the finest stride is no multiple of the factor, or the factor is less than 2.
    """

    def __init__(self, network: FeatureNetwork, factor: int = 2):
        super().__init__()
        finest = network.strides[-1]
        if factor < 2 or finest % factor:
            raise ValueError(
                f"enlarge={factor} for a network whose finest map has stride {finest}; expected 1, or a factor of 2 or "
                "more that divides this stride"
            )
        self.network, self.factor = network, factor
        self.strides = (*network.strides, finest // factor)
        self.channels = (*network.channels, network.channels[-1])

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB of any size, to maps (B, C_l, H_l, W_l)."""
        pyramid = self.network(images)
        large = F.interpolate(to_unit_range(images), scale_factor=self.factor, mode="bicubic", align_corners=False)
        finer = self.network(large.clamp(0, 1)).select([-1])
        confidences = pyramid.confidences and finer.confidences and pyramid.confidences + finer.confidences
        return FeaturePyramid(pyramid.maps + finer.maps, self.strides, confidences)


def enlarged(network: FeatureNetwork, factor: int) -> FeatureNetwork:
    """The network with a finer map, see `Enlarged`; as it is if the factor is 1."""
    return network if factor == 1 else Enlarged(network, factor)
