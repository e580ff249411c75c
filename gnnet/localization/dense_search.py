"""The search of descriptors in every cell of a map, at hardly more than the cost of the matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from gnnet.geometry.interpolation import sample
from gnnet.models.pyramid import FeaturePyramid


def values_for(device: torch.device) -> int:
    """Similarities held together: 64 MB on a CPU, where of fewer rows the product itself is slow; 1 GB elsewhere."""
    return 1 << 24 if device.type == "cpu" else 1 << 28



def best_cells(
    descriptors: Tensor, cells: Tensor, *, ratio: float = 1.0, rank: float = 0.006, values_at_once: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The most similar of P cells (C, P) for each descriptor (N, C): index, similarity, whether distinct, all (N,).

    The ratio test needs no sorting: the value at a rank is at most `ratio` times the best if fewer cells
    than that rank are above it. `values_at_once` limits the similarities held in memory together; None takes what
    suits the device.
    """
    values_at_once = values_at_once or values_for(cells.device)
    limit = max(2, round(rank * cells.shape[1]))  # the best itself is at rank one
    parts = []
    rows_at_once = min(len(descriptors), max(1, values_at_once // cells.shape[1]))
    # One buffer for all chunks: fresh pages cost as much as the search itself.
    buffer = cells.new_empty(rows_at_once, cells.shape[1])
    for rows in descriptors.split(max(1, rows_at_once)):
        similarity = torch.mm(rows, cells, out=buffer[: len(rows)])
        best, index = _row_max(similarity)
        distinct = torch.ones_like(best, dtype=torch.bool)
        if ratio < 1:
            distinct = (_count_above(similarity, ratio * best[:, None]) < limit) & (best > 0)
        parts.append((index, best, distinct))
    indices, similarities, distinct = (torch.cat(column) for column in zip(*parts, strict=True))
    return indices, similarities, distinct


_BLOCK = 256  # cells


def _row_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row (N, P), and where it stands first; P's maxima by blocks, as only these are vectorised."""
    whole = values.shape[1] // _BLOCK * _BLOCK
    if whole == 0 or values.device.type != "cpu":
        return values.max(-1)
    blocks = values[:, :whole].unflatten(1, (-1, _BLOCK))
    best, block = blocks.amax(-1).max(-1)
    within = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK)).squeeze(1).argmax(-1)
    index = block * _BLOCK + within
    if whole < values.shape[1]:
        rest, at = values[:, whole:].max(-1)
        index = torch.where(rest > best, whole + at, index)
        best = torch.maximum(rest, best)
    return best, index


def _count_above(values: Tensor, thresholds: Tensor) -> Tensor:
    """How many of each row (N, P) are above its threshold (N, 1)."""
    if values.device.type != "cpu":
        return (values > thresholds).sum(-1)
    # Sums of booleans are slow: eight of them are added as the bytes of one integer, 128 times at most.
    rows, count = values.shape
    flags = torch.zeros(rows, -(-count // 1024) * 1024, dtype=torch.bool)
    torch.gt(values, thresholds, out=flags[:, :count])
    sums = flags.view(torch.int64).unflatten(1, (-1, 128)).sum(-1)
    return sums.view(torch.uint8).sum(-1, dtype=torch.int64)


def levels_at_stride(pyramid: FeaturePyramid, stride: int) -> tuple[list[Tensor], int]:
    """Every level at the centres of cells of one stride, as columns (B, C_l, H·W), and W."""
    finest, fine_stride = pyramid.maps[-1], pyramid.strides[-1]
    height, width = (max(1, side * fine_stride // stride) for side in finest.shape[-2:])
    x = torch.arange(width, device=finest.device) + 0.5
    y = torch.arange(height, device=finest.device) + 0.5
    centers = stride * torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    levels = []
    for features, own in zip(pyramid.maps, pyramid.strides, strict=True):
        if own == stride and features.shape[-2:] == (height, width):
            levels.append(features.flatten(2))
            continue
        # Beyond the outer centres a coarse map goes on as it is there.
        axes = zip((centers / own).unbind(-1), features.shape[:-3:-1], strict=True)  # x and width, y and height
        xy = torch.stack([a.clamp(0.5, side - 0.5) for a, side in axes], -1).expand(len(features), -1, -1)
        levels.append(sample(features, xy)[0].mT)
    return levels, width
