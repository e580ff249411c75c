"""The U-Net of GN-Net (von Stumberg et al., RA-L 2020): feature maps at several strides from one decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gnnet.models.images import NormalizedImages, feature_pyramid
from gnnet.models.pyramid import FeaturePyramid

Upsampling = Literal["nearest", "bilinear", "transposed"]
Pooling = Literal["max", "blur"]


class Decoder(nn.Module):
    """The half that `UNet` and `Backbone` share: skip connections, and a 1×1 convolution to the features at each level.

    A stage is named by its place among all stages, fine to coarse. Stages finer than the finest map are not built.
    """

    smoothing: Tensor
    # Not attributes of every object, as these are part of the fingerprint, which is kept in compiled maps.
    smooth = False
    confidence = False
    _checkpointing = False

    def set_levels(
        self,
        strides: Sequence[int],
        channels: int | Sequence[int],
        stage_strides: list[int],
        upsampling: str,
        *,
        smooth: bool,
        normalize: bool,
        confidence: bool,
    ) -> None:
        """Keep and check the settings of the maps; arguments and errors as in `UNet`."""
        self.strides, self.normalize = tuple(strides), normalize
        if smooth:
            self.smooth = True
        if confidence:
            self.confidence = True
        self.channels = (channels,) * len(self.strides) if isinstance(channels, int) else tuple(channels)
        if upsampling not in get_args(Upsampling):
            raise ValueError(f"upsampling={upsampling!r}; expected nearest, bilinear or transposed")
        ordered = self.strides and list(self.strides) == sorted(set(self.strides))[::-1]
        if not ordered or any(s not in stage_strides for s in self.strides):
            raise ValueError(f"strides={self.strides}; expected some of {stage_strides[::-1]}, coarse to fine")
        if len(self.channels) != len(self.strides):
            raise ValueError(f"channels={self.channels} for strides={self.strides}; expected a number for each stride")

    def add_decoder(self, widths: Sequence[int], stages: Sequence[int], upsampling: Upsampling) -> None:
        """Make the layers.

        Args:
            widths: channels of all stages, fine to coarse.
            stages: of the maps, coarse to fine.
            upsampling: how the resolution is doubled.
        """
        # decoder[i] makes the decoder's stage of depth len(widths) - 2 - i.
        depths = range(len(widths) - 2, stages[-1] - 1, -1)
        self.upsample = nn.ModuleList(_Upsample(widths[d + 1], widths[d], upsampling) for d in depths)
        self.decoder = nn.ModuleList(_double_convolution(2 * widths[d], widths[d]) for d in depths)
        self.heads = nn.ModuleList(nn.Conv2d(widths[s], c, 1) for s, c in zip(stages, self.channels, strict=True))
        self._from_deepest = [len(widths) - 1 - s for s in stages]
        if self.confidence:  # made last, so that the other layers begin with the weights that they have without it
            self.confidence_heads = nn.ModuleList(nn.Conv2d(widths[s], 1, 1) for s in stages)
            for head in self.confidence_heads.parameters():
                nn.init.zeros_(head)
        self.register_buffer("smoothing", _binomial([1.0, 2.0, 1.0]), persistent=False)

    def decode(self, skips: list[Tensor], images: Tensor) -> FeaturePyramid:
        """The pyramid of the encoder's maps of all stages, fine to coarse; `images` as before padding."""
        deepest, *others = skips[::-1]
        decoded = [deepest]
        for upsample, stage, skip in zip(self.upsample, self.decoder, others, strict=False):
            decoded.append(self._run(stage, torch.cat([skip, upsample(decoded[-1])], 1)))
        decoded = [decoded[i] for i in self._from_deepest]
        maps = [head(x) for head, x in zip(self.heads, decoded, strict=True)]
        if self.smooth:
            maps = [_filter(m, self.smoothing) for m in maps]
        confidences = None
        if self.confidence:
            confidences = [head(x) for head, x in zip(self.confidence_heads, decoded, strict=True)]
        return feature_pyramid(
            maps, images, strides=self.strides, normalize=self.normalize, confidences=confidences
        )

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not (self._checkpointing and torch.is_grad_enabled()):
            return stage(x)
        return checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)  # a stage draws no random numbers


class UNet(Decoder):
    """An encoder that pools, a decoder with skip connections, and a 1×1 convolution to the features at each level.

    Decoder stages finer than the finest map are not built, so coarse pyramids are cheap. Every layer is
    centred (a layer with an even stride has an even kernel), so that pixel xy of the image is at
    xy / stride in each map.

    Args:
        widths: channels of the encoder's stages, fine to coarse; each stage has half the resolution of the
            one before.
        channels: features of a cell: one number for all levels, or one for each, coarse to fine.
        strides: strides of the maps in pixels, coarse to fine.
        upsampling: how the decoder doubles the resolution.
        pooling: how the encoder halves the resolution: `max` as in the paper, or `blur`, a binomial filter of
            four pixels (Zhang, "Making convolutional networks shift-invariant again", ICML 2019). With `max`
            the position of a feature depends on where it lies in the grid, by a tenth of a cell of the finest map.
        stem_stride: stride of the first convolution, 1 as in the paper, or 2 or 4; no map has a smaller
            stride. With 2 no other layer runs at full resolution, and a pass takes a third of the time on a CPU.
        smooth: filter each map with a binomial of three cells. It removes the frequency of the grid itself, a
            checkerboard that losses by central differences do not see.
        normalize: divide the vector of each cell by its Euclidean length.
        confidence: give each cell of each level a weight from 0 to 1 too, by which refinement trusts its features
            (Sarlin et al., "Back to the feature", CVPR 2021). Only `PoseLoss` trains it; before, it is 0.5 everywhere.
        checkpointing: keep only what the stages hand to each other for the backward pass, which computes each stage
            again: more time for less memory, for images of 1024×1024 and more.

    Raises:
        ValueError: if the strides are not some of those of the stages, coarse to fine, or there is not one
            number of channels for each stride.
    """

    halving: Tensor

    def __init__(
        self,
        *,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        channels: int | Sequence[int] = 16,
        strides: Sequence[int] = (8, 4, 2, 1),
        upsampling: Upsampling = "nearest",
        pooling: Pooling = "max",
        stem_stride: Literal[1, 2, 4] = 1,
        smooth: bool = False,
        normalize: bool = True,
        confidence: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        widths, self.pooling, self._checkpointing = tuple(widths), pooling, checkpointing
        stage_strides = [stem_stride << i for i in range(len(widths))]
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={stem_stride}; expected 1, 2 or 4")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r}; expected {' or '.join(get_args(Pooling))}")
        self.set_levels(
            strides, channels, stage_strides, upsampling, smooth=smooth, normalize=normalize, confidence=confidence
        )

        self.images = NormalizedImages(multiple=stage_strides[-1])
        self.stem = _convolution(3, widths[0], stride=stem_stride)
        self.encoder = nn.ModuleList([_convolution(widths[0], widths[0])])
        self.encoder.extend(_double_convolution(a, b) for a, b in itertools.pairwise(widths))
        self.add_decoder(widths, [stage_strides.index(s) for s in self.strides], upsampling)
        self.register_buffer("halving", _binomial([1.0, 3.0, 3.0, 1.0]), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB of any size, to maps (B, C_l, H_l, W_l)."""
        x = self.stem(self.images(images))
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = self._run(stage, self._halve(x) if skips else x)
            skips.append(x)
        return self.decode(skips, images)

    def _halve(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if self.pooling == "max" else _filter(x, self.halving, stride=2)


def _binomial(taps: list[float]) -> Tensor:
    line = torch.tensor(taps) / sum(taps)
    return torch.outer(line, line)


def _filter(x: Tensor, kernel: Tensor, *, stride: int = 1) -> Tensor:
    """Maps (B, C, H, W), each filtered by a kernel (K, K); the border's cells are repeated outside."""
    padding = ((len(kernel) - stride + 1) // 2,) * 4
    weights = kernel.to(x.dtype).expand(x.shape[1], 1, *kernel.shape)
    return F.conv2d(F.pad(x, padding, mode="replicate"), weights, stride=stride, groups=x.shape[1])


class _Upsample(nn.Module):
    """Doubles the resolution of maps (B, width_in, H, W) and gives them `width_out` channels."""

    def __init__(self, width_in: int, width_out: int, kind: Upsampling):
        super().__init__()
        self.kind = kind
        self.convolution: nn.Module
        if kind == "transposed":
            self.convolution = nn.ConvTranspose2d(width_in, width_out, 2, stride=2)
        else:
            self.convolution = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A 1×1 convolution and interpolation may change places; the convolution first costs a quarter.
        x = self.convolution(x)
        if self.kind == "nearest":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        if self.kind == "bilinear":
            return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x


def _convolution(width_in: int, width_out: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution, GroupNorm, CELU. The kernel is 3×3, or 2·stride wide with a stride above 1."""
    kernel = 3 if stride == 1 else 2 * stride
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=(kernel - stride + 1) // 2, bias=False),
        nn.GroupNorm(_groups(width_out), width_out),
        nn.CELU(inplace=True),
    )


def _double_convolution(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(_convolution(width_in, width_out), _convolution(width_out, width_out))


def _groups(width: int) -> int:
    """Number of groups for GroupNorm: at most 32, of at least eight channels each where the width allows it."""
    return math.gcd(width, min(32, max(1, width // 8)))
