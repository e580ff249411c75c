"""Values and gradients of feature maps at sub-pixel points; only the cells around the points are read.

Value and gradient are weighted sums over a small patch of cells around the point, so one weighted gather gives
both. Maps are (B, C, H, W). They are read fastest in `torch.channels_last`, the layout in which the networks of this
project return them. Points are in level pixels: the centre of the first cell is (0.5, 0.5).

No tensor is made of Python numbers here, because its copy to a GPU would make the host wait.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Gradient = Literal["central", "exact", "sobel", "bicubic"]


def sample(features: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear samples of maps (B, C, H, W) at points (B, N, 2): (B, N, C) and validity (B, N).

    A sample is valid where its four cells are in the map: 0.5 <= x <= W − 0.5 and 0.5 <= y <= H − 0.5. There
    `grid_sample` with `align_corners=False` gives the same values. Invalid samples are finite, but their values
    mean nothing and have no gradient to the points.
    """
    cells, weights, valid = _stencil(features, xy, None)
    return _weighted_cells(features, cells, weights).squeeze(-2), valid


def sample_with_gradient(features: Tensor, xy: Tensor, gradient: Gradient = "central") -> tuple[Tensor, Tensor, Tensor]:
    """Samples (B, N, C), their gradients ∂F/∂xy (B, N, C, 2) per level pixel, and validity (B, N).

    Args:
        features: (B, C, H, W).
        xy: (B, N, 2) in level pixels.
        gradient: `central` interpolates central differences bilinearly; `exact` is the derivative of the bilinear
            interpolant; `sobel` is as `central`, smoothed by 1-2-1 across the direction of the derivative; `bicubic`
            is the derivative of the Catmull-Rom interpolant, whose value is then returned too.

    A sample is valid where all cells that it sums over are in the map.
    """
    stacked, valid = sample_stacked(features, xy, gradient)
    return stacked[..., 0, :], stacked[..., 1:, :].transpose(-1, -2), valid


def sample_stacked(features: Tensor, xy: Tensor, gradient: Gradient = "central") -> tuple[Tensor, Tensor]:
    """The same as `sample_with_gradient` in one tensor (B, N, 3, C) of value, ∂F/∂x, ∂F/∂y; and validity (B, N)."""
    cells, weights, valid = _stencil(features, xy, gradient)
    return _weighted_cells(features, cells, weights), valid


def _weighted_cells(features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Sums (B, N, R, C) of the map's cells at flat indices (B, N, K), weighted by (B, N, R, K)."""
    batch, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1)
    if rows.is_contiguous() and features.dtype in (torch.float32, torch.float64):
        # It sums while it gathers, so the patches are never in memory.
        first = torch.arange(batch, device=cells.device)[:, None, None] * (height * width)
        index = (cells + first)[..., None, :].expand_as(weights)
        sums = F.embedding_bag(
            index.flatten(0, 2), rows.view(-1, channels), per_sample_weights=weights.flatten(0, 2), mode="sum"
        )
        return sums.view(*weights.shape[:-1], channels)
    # A map of another layout or type. Here too only the needed cells are read.
    index = cells.flatten(1)[:, None].expand(-1, channels, -1)
    patches = features.flatten(2).gather(2, index).unflatten(2, cells.shape[1:]).permute(0, 2, 3, 1)
    return weights @ patches


def _stencil(features: Tensor, xy: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor, Tensor]:
    """Flat cell indices (B, N, K), weights (B, N, 1 or 3, K) and validity (B, N) of the points."""
    if gradient not in _SUPPORT:
        raise ValueError(f"gradient {gradient!r} is not known; expected central, exact, sobel or bicubic")
    height, width = features.shape[-2:]
    size = torch.arange(2, device=xy.device) * (height - width) + width
    low, high = _SUPPORT[gradient]
    # At the centre of the last cell, the first cell is the one before it, and the fraction is one.
    first = (xy.detach() - 0.5).floor()
    first = torch.where(xy.detach() == size - 0.5 - (high - 1), first - 1, first)
    valid = ((first + low >= 0) & (first + high <= size - 1)).all(-1)
    first = torch.where(valid[..., None], first, torch.zeros_like(first))
    fraction = torch.where(valid[..., None], xy - 0.5 - first, torch.zeros_like(xy))
    taps, offsets = _taps(fraction, gradient)
    taps = taps.to(features.dtype) if features.is_floating_point() else taps
    cells = (first.long()[..., None, :] + offsets).minimum(size - 1).clamp(min=0)
    return cells[..., 1] * width + cells[..., 0], taps, valid


# First and last cell of each stencil, counted from the cell whose centre is at or before the point.
_SUPPORT = {None: (0, 1), "exact": (0, 1), "central": (-1, 2), "sobel": (-1, 2), "bicubic": (-1, 2)}


def _taps(fraction: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor]:
    """Weights (..., 1 or 3, K) of the stencil's cells, and their offsets (K, 2) in x and y."""
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
        weights, offsets = (
            torch.cat([cells.narrow(axis, *span) for span in ((1, 2), (4, 8), (13, 2))], axis)
            for cells, axis in ((weights, -1), (offsets, 0))
        )
    return weights, offsets


def _one_dimensional(a: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (..., taps) along one axis at fraction `a` (...): of the value, of the derivative along this axis,
    and of the value where the derivative is along the other axis."""
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
