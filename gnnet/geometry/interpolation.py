"""Feature maps at sub-pixel points, with their gradients, touching only the cells that the points need.

Every value and gradient here is a linear functional of a small patch of cells around the point,
so one weighted gather gives both. Maps are (B, C, H, W); they are
read fastest in `torch.channels_last`, which is how this project's networks emit them. Points are
in level pixels, first cell centre at (0.5, 0.5).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gradient = Literal["central", "exact", "sobel", "bicubic"]


def sample(features: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear samples of maps (B, C, H, W) at points (B, N, 2): (B, N, C) and validity (B, N).

    Valid where all four cells of the interpolant are in the map: 0.5 <= x <= W - 0.5, and y alike
    (`grid_sample` with `align_corners=False` gives the same values there). Invalid samples are
    finite but mean nothing; they carry no gradient to the points.
    """
    cells, weights, valid = _stencil(features, xy, None)
    return _weighted_cells(features, cells, weights).squeeze(-2), valid


def sample_with_gradient(features: Tensor, xy: Tensor, gradient: Gradient = "central") -> tuple[Tensor, Tensor, Tensor]:
    """Samples (B, N, C), their gradients ∂F/∂xy (B, N, C, 2) per level pixel, and validity (B, N).

    Args:
        features: (B, C, H, W).
        xy: (B, N, 2) in level pixels.
        gradient: `central`: bilinear interpolation of central differences (default); `exact`: the
            derivative of the bilinear interpolant; `sobel`: central differences smoothed across by
            1-2-1; `bicubic`: value and derivative of the Catmull-Rom interpolant.

    Valid where every cell of the stencil is in the map.
    """
    stacked, valid = sample_stacked(features, xy, gradient)
    return stacked[..., 0, :], stacked[..., 1:, :].transpose(-1, -2), valid


def sample_stacked(features: Tensor, xy: Tensor, gradient: Gradient = "central") -> tuple[Tensor, Tensor]:
    """As `sample_with_gradient`, in one tensor (B, N, 3, C) of value, ∂F/∂x, ∂F/∂y; and validity (B, N)."""
    cells, weights, valid = _stencil(features, xy, gradient)
    return _weighted_cells(features, cells, weights), valid


def _weighted_cells(features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Sums (B, N, R, C) of the map's cells at flat indices (B, N, K), weighted by (B, N, R, K)."""
    batch, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1)
    if rows.is_contiguous() and features.dtype in (torch.float32, torch.float64):
        # Sums while it gathers: the patches themselves are never in memory.
        first = torch.arange(batch, device=cells.device)[:, None, None] * (height * width)
        index = (cells + first)[..., None, :].expand_as(weights)
        sums = F.embedding_bag(
            index.flatten(0, 2), rows.view(-1, channels), per_sample_weights=weights.flatten(0, 2), mode="sum"
        )
        return sums.view(*weights.shape[:-1], channels)
    # Another layout or type: still only the cells asked for are touched.
    index = cells.flatten(1)[:, None].expand(-1, channels, -1)
    patches = features.flatten(2).gather(2, index).unflatten(2, cells.shape[1:]).permute(0, 2, 3, 1)
    return weights @ patches


def _stencil(features: Tensor, xy: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor, Tensor]:
    """Flat cell indices (B, N, K), weights (B, N, 1 or 3, K) and validity (B, N) of the points."""
    if gradient not in _SUPPORT:
        raise ValueError(f"gradient {gradient!r} is not known; expected central, exact, sobel or bicubic")
    height, width = features.shape[-2:]
    size = xy.new_tensor([width, height])
    low, high = _SUPPORT[gradient]
    # The last cell's centre is interpolated from the cell before it with fraction one.
    first = (xy.detach() - 0.5).floor()
    first = torch.where(xy.detach() == size - 0.5 - (high - 1), first - 1, first)
    valid = ((first + low >= 0) & (first + high <= size - 1)).all(-1)
    first = torch.where(valid[..., None], first, torch.zeros_like(first))
    fraction = torch.where(valid[..., None], xy - 0.5 - first, torch.zeros_like(xy))
    taps, offsets = _taps(fraction, gradient)
    taps = taps.to(features.dtype) if features.is_floating_point() else taps
    cells = (first.long()[..., None, :] + offsets).minimum(size.long() - 1).clamp(min=0)
    return cells[..., 1] * width + cells[..., 0], taps, valid


# First and last cell of each stencil, relative to the cell at or before the point.
_SUPPORT = {None: (0, 1), "exact": (0, 1), "central": (-1, 2), "sobel": (-1, 2), "bicubic": (-1, 2)}


def _taps(fraction: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor]:
    """Weights (..., 1 or 3, K) of the stencil's cells and their offsets (K, 2), x then y."""
    value, slope, across = _one_dimensional(fraction, gradient)  # each (..., 2, taps): x, y
    x, y = 0, 1
    products = [value[..., y, :, None] * value[..., x, None, :]]
    if gradient is not None:
        products.append(across[..., y, :, None] * slope[..., x, None, :])
        products.append(slope[..., y, :, None] * across[..., x, None, :])
    weights = torch.stack(products, -3).flatten(-2)
    low, high = _SUPPORT[gradient]
    steps = torch.arange(low, high + 1, device=fraction.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
    if gradient == "central":  # the four corners of the 4×4 patch have weight zero
        keep = torch.tensor([1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14], device=fraction.device)
        weights, offsets = weights.index_select(-1, keep), offsets.index_select(0, keep)
    return weights, offsets


def _one_dimensional(a: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tap weights along one axis at fraction `a`: of the value, the derivative, and the value across it."""
    zero = torch.zeros_like(a)
    if gradient is None or gradient == "exact":
        value = torch.stack([1 - a, a], -1)
        return value, torch.stack([zero - 1, zero + 1], -1), value
    linear = torch.stack([zero, 1 - a, a, zero], -1)
    central = torch.stack([a - 1, -a, 1 - a, a], -1) / 2
    if gradient == "central":
        return linear, central, linear
    if gradient == "sobel":
        return linear, central, torch.stack([1 - a, 2 - a, 1 + a, a], -1) / 4
    # Catmull-Rom.
    value = torch.stack(
        [
            ((2 - a) * a - 1) * a / 2,
            ((3 * a - 5) * a * a + 2) / 2,
            ((4 - 3 * a) * a + 1) * a / 2,
            (a - 1) * a * a / 2,
        ],
        -1,
    )
    slope = torch.stack(
        [
            ((4 - 3 * a) * a - 1) / 2,
            (9 * a - 10) * a / 2,
            ((8 - 9 * a) * a + 1) / 2,
            (3 * a - 2) * a / 2,
        ],
        -1,
    )
    return value, slope, value
