"""Sparse-to-dense matching: where in a query's maps do descriptors of a reference fit best."""

from __future__ import annotations

import torch
from torch import Tensor

from gnnet.models.pyramid import FeaturePyramid


@torch.no_grad()
def match_coarse_to_fine(
    descriptors: tuple[Tensor, ...], pyramid: FeaturePyramid, *, values_at_once: int = 1 << 26
) -> Tensor:
    """Nearest cell of the coarsest map, then at each finer level the nearest cell of a window around it.

    Args:
        descriptors: (B, N, C_l) of each level, coarse to fine.
        pyramid: of the images to search, batch B.
        values_at_once: similarities held in memory together; points are searched in chunks of so many.

    Returns:
        (B, N, 2) image pixels, the centre of the finest level's cell.
    """
    matched = []
    cells = pyramid.maps[0].shape[-1] * pyramid.maps[0].shape[-2]
    chunk = max(1, values_at_once // cells)
    for i, (features, level_descriptors) in enumerate(zip(pyramid.maps, descriptors, strict=True)):
        if i == 0:
            flat = features.flatten(2)
            square = flat.square().sum(1)[:, None] / 2
            best = [
                (part @ flat - square).argmax(-1) for part in level_descriptors.split(chunk, 1)
            ]  # nearest in Euclidean distance
            cell = torch.cat(best, 1)
            width = features.shape[-1]
            matched = torch.stack([cell % width, cell // width], -1) + 0.5
            continue
        ratio = pyramid.strides[i - 1] / pyramid.strides[i]
        matched = _best_in_window(level_descriptors, features, matched * ratio, radius=max(1, round(ratio)))
    return matched * pyramid.strides[-1]


def _best_in_window(descriptors: Tensor, features: Tensor, center: Tensor, radius: int) -> Tensor:
    """Centre (B, N, 2) of the cell nearest to each descriptor within `radius` cells of `center`, level pixels."""
    batch, _, height, width = features.shape
    steps = torch.arange(-radius, radius + 1, device=features.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
    cells = center.floor().long()[:, :, None] + offsets  # [B, N, K, 2]
    inside = ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(-1)
    cells = cells.clamp(min=0).minimum(cells.new_tensor([width - 1, height - 1]))
    image = torch.arange(batch, device=cells.device)[:, None, None]
    rows = features.permute(0, 2, 3, 1)[image, cells[..., 1], cells[..., 0]]  # [B, N, K, C]
    distance = (rows - descriptors[:, :, None]).square().sum(-1).masked_fill(~inside, torch.inf)
    best = distance.argmin(-1)[..., None, None].expand(-1, -1, 1, 2)
    return cells.gather(2, best).squeeze(2) + 0.5
