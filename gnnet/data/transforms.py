"""Image reading, geometric transforms of images with their keypoints, and photometric augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize


def read_image(path: Path) -> Tensor:
    """RGB image (3, H, W) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no readable image; it names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        return decode_image(str(path), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ValueError(
            f"image {path} cannot be read ({str(error).splitlines()[0]}); "
            "it may be truncated: fetch it again, or remove it from the dataset"
        ) from error


def limit_size(image: Tensor, largest_side: int | None) -> tuple[Tensor, np.ndarray]:
    """Shrink an image (3, H, W) to `largest_side` pixels, and the factors (2,) for x and y of its pixels."""
    height, width = image.shape[-2:]
    if largest_side is None or max(height, width) <= largest_side:
        return image, np.ones(2)
    ratio = largest_side / max(height, width)
    new_height, new_width = round(height * ratio), round(width * ratio)
    factors = np.array([new_width / width, new_height / height])
    return resize(image, [new_height, new_width], antialias=True), factors


def crop_around(
    image: Tensor, keypoints: np.ndarray, anchor: int, size: int, generator: np.random.Generator
) -> tuple[Tensor, np.ndarray]:
    """Cut a random square (3, size, size) that holds keypoint `anchor`; keypoints (N, 2) move along.

    Each side of a pair is cut on its own, so that position in the image tells nothing. An image
    smaller than `size` keeps its size on that axis.
    """
    height, width = image.shape[-2:]
    corner = []
    for extent, center in ((width, keypoints[anchor, 0]), (height, keypoints[anchor, 1])):
        low = max(0, int(np.ceil(center)) - size)
        high = max(low, min(extent - size, int(np.floor(center))))
        corner.append(int(generator.integers(low, high + 1)) if extent > size else 0)
    x, y = corner
    return image[:, y : y + size, x : x + size], keypoints - np.array([x, y])


def photometric_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random exposure, gamma, contrast, colour cast and grey noise, each image on its own.

    Args:
        images: (B, 3, H, W) uint8.
        strength: 0 changes nothing, 1 is strong.
        generator: on the images' device.

    Returns:
        (B, 3, H, W) float32 in [0, 1].
    """

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator, device=images.device) * 2 - 1) * strength

    batch, _, height, width = images.shape
    gamma = torch.exp(0.5 * uniform(batch, 1, 1))
    gain = torch.exp(0.4 * uniform(batch, 1, 1) + 0.15 * uniform(batch, 3, 1))
    contrast = torch.exp(0.3 * uniform(batch, 1, 1))
    # What depends on the value alone is worked out for 256 values, not for every pixel.
    mean = images.float().mean((1, 2, 3))[:, None, None] / 255
    levels = torch.arange(256, device=images.device) / 255
    curve = ((levels - mean) * contrast + mean).clamp(1e-4, 1).pow(gamma) * gain  # [B, 3, 256]
    toned = curve.gather(2, images.flatten(2).long()).view(images.shape)
    deviation = 0.03 * strength * torch.rand(batch, 1, 1, 1, generator=generator, device=images.device)
    noise = torch.randn(batch, 1, height, width, generator=generator, device=images.device)
    return (toned + deviation * noise).clamp_(0, 1)
