"""Grey values as features: the baseline that any learned map has to beat (direct alignment)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnet.models.images import feature_pyramid, pad_to_multiple, to_unit_range
from gnnet.models.pyramid import FeaturePyramid


class GreyValues(nn.Module):
    """Maps images to a pyramid of grey values in [0, 1]: one channel, not normalised, no parameters.

    Each halving of the resolution first blurs with the weights 1-3-3-1 across and down. This filter
    is centred between two pixels, so that pixel xy of the image is at xy / stride, and it prevents aliasing.

    Args:
        strides: strides of the maps in pixels, coarse to fine.

    Raises:
        ValueError: if the strides are not powers of two, coarse to fine.
    """

    kernel: Tensor
    luma: Tensor

    def __init__(self, *, strides: Sequence[int] = (8, 4, 2, 1)):
        super().__init__()
        self.strides = tuple(strides)
        self.channels = (1,) * len(self.strides)
        powers = all(s >= 1 and s & (s - 1) == 0 for s in self.strides)
        if not self.strides or not powers or list(self.strides) != sorted(set(self.strides))[::-1]:
            raise ValueError(f"strides={self.strides}; expected powers of two, coarse to fine")
        binomial = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(binomial, binomial)[None, None], persistent=False)
        # ITU-R BT.601, with which image libraries turn RGB to grey.
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB of any size, to maps (B, 1, H_l, W_l)."""
        # Not under autocast: bf16 would leave 8 bits of grey.
        with torch.autocast(images.device.type, enabled=False):
            grey = (to_unit_range(images).to(self.luma.dtype) * self.luma).sum(1, keepdim=True)
            grey = pad_to_multiple(grey, self.strides[0])
            maps, stride = {1: grey}, 1
            while stride < self.strides[0]:
                grey = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), self.kernel, stride=2)
                stride *= 2
                maps[stride] = grey
        return feature_pyramid([maps[s] for s in self.strides], images, strides=self.strides, normalize=False)
