"""SIFT, the classical baseline: keypoints with RootSIFT descriptors (by COLMAP's extractor), and their matches."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gnnet.data.batches import Matches
from gnnet.sampling import turns

LEVELS_PER_OCTAVE = 3  # of the extractor's scale space
MAX_FEATURES = 8192  # of an image; those of the largest scale are kept
_SQUARE = 32.0  # pixels, side of the squares from which `strongest_spread` takes keypoints in turn


class SiftFeatures(NamedTuple):
    """What SIFT finds in one image, float32 on the CPU.

    `keypoints` (N, 2) COLMAP pixels; `descriptors` (N, 128) RootSIFT of length 1; `scale` (N,) pixels,
    the std of the Gaussian at which the keypoint stands out; `strength` (N,) its contrast there,
    of grey values from 0 to 1. A keypoint with two orientations stands in two rows.
    """

    keypoints: Tensor
    descriptors: Tensor
    scale: Tensor
    strength: Tensor


def detect_sift(image: Tensor, *, upright: bool = False) -> SiftFeatures:
    """SIFT of an image (3, H, W) uint8 RGB, with COLMAP's settings.

    Args:
        image: on any device.
        upright: descriptors are not turned into the gradient's direction. Better between images that
            are upright alike, as a fixed camera's; useless if one is turned.

    Raises:
        ValueError: if the image has another shape or type.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image of shape {tuple(image.shape)}, {image.dtype}; expected (3, H, W) uint8 RGB")
    from gnnet.colmap import pycolmap  # slow to import, and only baselines need it

    # ITU-R BT.601, as image libraries turn RGB to grey.
    grey = (image.cpu().float() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(3, 1, 1)).sum(0) / 255
    found, descriptors = _extractor(upright).extract_from_float32_array(grey.numpy())
    columns = torch.from_numpy(np.array(pycolmap.keypoints_to_matrix(found), dtype=np.float32))
    xy, scale = columns[:, :2], columns[:, 2]
    values = torch.from_numpy(np.array(descriptors.data, dtype=np.float32)).view(-1, 128)
    return SiftFeatures(xy, F.normalize(values, dim=1), scale, _strength(grey, xy, scale))


def strongest_spread(features: SiftFeatures, count: int) -> Tensor:
    """Keypoints (K, 2), K <= `count`: strong ones from everywhere in the image, none twice.

    From each square of the image its strongest keypoint is taken, then from each its second, and so
    on, the stronger first within a round; so one tree does not take all.
    """
    order = features.strength.argsort(descending=True, stable=True)
    xy = features.keypoints[order]
    # The first row of each position, which np.unique tells; back in order of strength.
    xy = xy[np.sort(np.unique(xy.numpy(), axis=0, return_index=True)[1])]
    turn = torch.tensor(turns(map(tuple, (xy / _SQUARE).floor().tolist())))
    return xy[turn.argsort(stable=True)[:count]]


def match_sift(
    descriptors_a: Tensor,
    descriptors_b: Tensor,
    keypoints_b: Tensor,
    *,
    ratio: float = 0.8,
    mutual: bool = True,
    values_at_once: int = 1 << 26,
) -> Matches:
    """The nearest of descriptors b (M, D) for each of descriptors a (N, D), all of length 1.

    The similarity of a match is the descriptors' inner product. If b is empty, no match is kept, and keypoints
    and similarities are infinite.

    Args:
        descriptors_a: (N, D), by SIFT or any other detector.
        descriptors_b: (M, D), by the same detector.
        keypoints_b: (M, 2) pixels at which b was detected.
        ratio: a match is kept if its distance is less than `ratio` times that to the second nearest
            (Lowe's test); 1 keeps all.
        mutual: a match is kept if it is the nearest from b to a as well.
        values_at_once: similarities held in memory together.
    """
    count_a, count_b = len(descriptors_a), len(descriptors_b)
    if count_a == 0 or count_b == 0:
        nowhere = keypoints_b.new_full((count_a, 2), torch.inf)
        return Matches(nowhere, -nowhere[:, 0], torch.zeros_like(nowhere[:, 0], dtype=torch.bool))
    similarity, rows = _two_nearest(descriptors_a, descriptors_b, values_at_once)
    nearest = rows[:, 0]
    kept = torch.ones_like(nearest, dtype=torch.bool)
    if ratio < 1 and count_b > 1:
        distance = (2 - 2 * similarity).clamp(min=0).sqrt()
        kept &= distance[:, 0] < ratio * distance[:, 1]
    if mutual:
        _, back = _two_nearest(descriptors_b, descriptors_a, values_at_once)
        kept &= back[nearest, 0] == torch.arange(count_a, device=kept.device)
    return Matches(keypoints_b[nearest], similarity[:, 0], kept)


def _two_nearest(a: Tensor, b: Tensor, values_at_once: int) -> tuple[Tensor, Tensor]:
    """Similarities and rows of b, (N, 2), of the two most similar to each of a; (N, 1) if b has but one."""
    parts = [(part @ b.T).topk(min(2, len(b)), dim=1) for part in a.split(max(1, values_at_once // len(b)))]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


@lru_cache
def _extractor(upright: bool):
    from gnnet.colmap import pycolmap  # slow to import

    options = pycolmap.FeatureExtractionOptions()
    options.num_threads = 1
    options.sift.max_num_features = MAX_FEATURES
    options.sift.upright = upright
    level = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = int(pycolmap.logging.WARNING)  # it announces itself otherwise
    try:
        return pycolmap.FeatureExtractor.create(options, device=pycolmap.Device.cpu)
    finally:
        pycolmap.logging.minloglevel = level


def _strength(grey: Tensor, xy: Tensor, scale: Tensor) -> Tensor:
    """|Difference of Gaussians| (N,) at keypoints (N, 2) and their scales (N,): the extractor does not tell it."""
    level = (LEVELS_PER_OCTAVE * scale.clamp(min=0.5).log2()).round()
    strength = torch.zeros_like(scale)
    height, width = grey.shape
    grid = 2 * xy / torch.tensor([width, height]) - 1
    for value in level.unique().tolist():  # some fifteen
        sigma = 2 ** (value / LEVELS_PER_OCTAVE)
        difference = _blur(grey, sigma) - _blur(grey, sigma * 2 ** (1 / LEVELS_PER_OCTAVE))
        at = level == value
        strength[at] = F.grid_sample(difference, grid[None, None, at], align_corners=False)[0, 0, 0].abs()
    return strength


def _blur(grey: Tensor, sigma: float) -> Tensor:
    """A grey image (H, W) under a Gaussian of `sigma` pixels, (1, 1, H, W); the camera gave it half a pixel of that."""
    sigma = math.sqrt(max(sigma**2 - 0.5**2, 0.01))
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1, dtype=grey.dtype) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(grey[None, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
