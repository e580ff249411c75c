"""What every network does with its images first and with its maps last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnet.models.pyramid import FeaturePyramid

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


def to_unit_range(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or floating in [0, 1], as floating in [0, 1].

    Raises:
        ValueError: for images of another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} given; expected (B, 3, H, W) RGB")
    if images.dtype == torch.uint8:
        return images.to(torch.get_default_dtype()) / 255
    if not images.is_floating_point():
        raise ValueError(f"images of type {images.dtype} given; expected uint8, or floating in [0, 1]")
    return images


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B, C, H, W) until H and W are multiples of `multiple`.

    Bottom and right only, so that a pixel keeps its coordinates.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


class NormalizedImages(nn.Module):
    """Images as networks read them: standardised by ImageNet's mean and std, padded, `channels_last`.

    Training and evaluation use the same statistics. They are constants, so the state dict does not hold them.

    Args:
        multiple: height and width are padded, at the bottom and on the right, to multiples of this.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, multiple: int):
        super().__init__()
        self.multiple = multiple
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or floating in [0, 1], to (B, 3, H', W') in the statistics' type."""
        images = (to_unit_range(images).to(self.mean.dtype) - self.mean) / self.std
        return pad_to_multiple(images, self.multiple).contiguous(memory_format=torch.channels_last)


def feature_pyramid(
    maps: list[Tensor],
    images: Tensor,
    *,
    strides: tuple[int, ...],
    normalize: bool,
    confidences: list[Tensor] | None = None,
) -> FeaturePyramid:
    """Make a pyramid of maps of padded images: each is cropped to ceil(H / stride) × ceil(W / stride) cells.

    The result is in float32 or better, under autocast too: bf16 would resolve a sub-pixel position to 1/256 at best.

    Args:
        maps: (B, C_l, H_l', W_l') each, coarse to fine.
        images: (B, 3, H, W) before padding.
        strides: stride of each map, in pixels.
        normalize: divide the vector of each cell by its Euclidean length.
        confidences: (B, 1, H_l', W_l') each, before the sigmoid.
    """
    height, width = images.shape[-2:]

    def cropped(levels: list[Tensor]) -> list[Tensor]:
        sized = (m[..., : -(-height // s), : -(-width // s)] for m, s in zip(levels, strides, strict=True))
        return [m.to(torch.promote_types(m.dtype, torch.float32)) for m in sized]

    done = [_unit_length(features) if normalize else features for features in cropped(maps)]
    return FeaturePyramid(
        tuple(features.contiguous(memory_format=torch.channels_last) for features in done),
        strides,
        None if confidences is None else tuple(logits.sigmoid() for logits in cropped(confidences)),
    )


def _unit_length(features: Tensor) -> Tensor:
    # Not F.normalize, which divides: on full maps the backward pass of a quotient takes twice the time.
    return features * torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12).reciprocal()
