"""Values and gradients of feature maps at sub-pixel points; only the cells around the points are read.

Value and gradient are weighted sums over cells around the point, so one weighted gather gives both. Maps are
(B, C, H, W). They are read fastest in `torch.channels_last`, the layout in which the networks of this project return
them. Points are in level pixels: the centre of the first cell is (0.5, 0.5).

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
    sums, valid = _weighted_sums(features, xy, None)
    return sums.squeeze(-2), valid


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
    return _weighted_sums(features, xy, gradient)


class GatheredSums(torch.autograd.Function):
    """Weighted sums (S, C) of the cells of maps (B, C, H, W), without a gradient to the weights.

    The gradient of a cell is in turn a sum, over those of the sums that it is in. So it is gathered too, which writes
    each cell once and needs no zeros to add to. A map in channels_last is not copied.

    Args:
        features: (B, C, H, W).
        index: (K,) cells b·H·W + y·W + x, those of one sum after the other.
        weights: (K,).
        counts: the number of cells of each sum; after the last, they begin again with the first.
    """

    @staticmethod
    def forward(ctx, features: Tensor, index: Tensor, weights: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.shape, ctx.counts = features.shape, counts
        return _bags(features, index, weights, counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        index, weights = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        # The sum to which each cell belongs, and the first entry of each cell of the map among the sorted ones.
        sums = torch.cat([index.new_full((n,), i) for i, n in enumerate(ctx.counts)])
        sums = torch.arange(0, len(gradient), len(ctx.counts), device=index.device)[:, None] + sums
        order = index.argsort()
        number = index.new_zeros(batch * height * width).index_add_(0, index, torch.ones_like(index))
        rows = F.embedding_bag(
            sums.flatten()[order], gradient, number.cumsum(0) - number, per_sample_weights=weights[order], mode="sum"
        )
        # Not as a view of `rows`: to a view autograd adds no other gradient in place, but copies it.
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2).data, None, None, None


def _bags(features: Tensor, index: Tensor, weights: Tensor, counts: tuple[int, ...]) -> Tensor:
    """What `GatheredSums` gives, by operations that have every gradient."""
    rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    starts = torch.arange(0, len(index), sum(counts), device=index.device)
    if len(counts) > 1:
        starts = torch.stack([starts + sum(counts[:i]) for i in range(len(counts))], -1).flatten()
    return F.embedding_bag(index, rows, starts, per_sample_weights=weights, mode="sum")


def _weighted_sums(features: Tensor, xy: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor]:
    """Value, or value, ∂F/∂x and ∂F/∂y, (B, N, 1 or 3, C), and validity (B, N) at the points."""
    if gradient not in _SUPPORT:
        raise ValueError(f"gradient {gradient!r} is not known; expected central, exact, sobel or bicubic")
    batch, channels, height, width = features.shape
    size = torch.arange(2, device=xy.device) * (height - width) + width
    low, high = _SUPPORT[gradient]
    # At the centre of the last cell, the first cell is the one before it, and the fraction is one.
    first = (xy.detach() - 0.5).floor()
    first = torch.where(xy.detach() == size - 0.5 - (high - 1), first - 1, first)
    valid = ((first + low >= 0) & (first + high <= size - 1)).all(-1)
    first = torch.where(valid[..., None], first, torch.zeros_like(first))
    fraction = torch.where(valid[..., None], xy - 0.5 - first, torch.zeros_like(xy))
    taps = _taps(fraction, gradient)
    counts = tuple(len(offsets) for _, offsets in taps)
    weights = torch.cat([weight for weight, _ in taps], -1)  # [B, N, K], those of all sums
    weights = weights.to(features.dtype) if features.is_floating_point() else weights
    cells = (first.long()[..., None, :] + torch.cat([offsets for _, offsets in taps])).minimum(size - 1).clamp(min=0)
    index = cells[..., 1] * width + cells[..., 0]
    if features.is_contiguous(memory_format=torch.channels_last) and features.dtype in (torch.float32, torch.float64):
        # It sums while it gathers, so the cells of the points are never in memory.
        index = (index + torch.arange(batch, device=xy.device)[:, None, None] * (height * width)).flatten()
        sums = _bags if weights.requires_grad else GatheredSums.apply
        values = sums(features, index, weights.flatten(), counts)
        return values.view(*xy.shape[:2], len(counts), channels), valid
    # A map of another layout or type. Here too only the needed cells are read.
    index = index.flatten(1)[:, None].expand(-1, channels, -1)
    values = features.flatten(2).gather(2, index).unflatten(2, weights.shape[1:]).permute(0, 2, 3, 1)  # [B, N, K, C]
    parts = zip(weights[..., None, :].split(counts, -1), values.split(counts, -2), strict=True)
    return torch.cat([weight @ value for weight, value in parts], -2), valid


# First and last cell of each stencil, counted from the cell whose centre is at or before the point.
_SUPPORT = {None: (0, 1), "exact": (0, 1), "central": (-1, 2), "sobel": (-1, 2), "bicubic": (-1, 2)}


def _taps(fraction: Tensor, gradient: Gradient | None) -> list[tuple[Tensor, Tensor]]:
    """For value, ∂F/∂x and ∂F/∂y the weights (..., K) of the cells summed over, and their offsets (K, 2) in x and y."""
    value, slope, across = _one_dimensional(fraction, gradient)  # each (..., 2, taps): x, y
    products = [(value, value)] if gradient is None else [(value, value), (slope, across), (across, slope)]
    taps = []
    for x, y in products:
        weights = y[..., 1, :, None] * x[..., 0, None, :]
        # Two taps lie at the cell and the next, four begin one before.
        steps = (torch.arange(n, device=fraction.device) - (n // 2 - 1) for n in (x.shape[-1], y.shape[-1]))
        taps.append((weights.flatten(-2), torch.stack(torch.meshgrid(*steps, indexing="xy"), -1).flatten(0, 1)))
    return taps


def _one_dimensional(a: Tensor, gradient: Gradient | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (..., taps) along one axis at fraction `a` (...): of the value, of the derivative along this axis,
    and of the value where the derivative is along the other axis."""
    linear = torch.stack([1 - a, a], -1)
    if gradient is None or gradient == "exact":
        one = torch.ones_like(a)
        return linear, torch.stack([-one, one], -1), linear
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
