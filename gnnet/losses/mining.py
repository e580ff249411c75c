"""Hard negatives: for each point of one image, cells of the other image that look alike but lie far away."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gnnet.losses.term import LevelPair, uniform


def hardest_count(step: int, *, start: int = 300, minimum: int = 5, decay: float = 0.6) -> int:
    """M(k) = max(minimum, start·exp(−decay·k/10000)) at global step k: negatives get harder as M falls."""
    return max(minimum, round(start * math.exp(-decay * step / 10_000)))


def exclusion_penalty(
    xy: Tensor, *, x: Tensor, y: Tensor, radius: float, near: float, out: Tensor | None = None
) -> Tensor:
    """0 for cells farther than `radius` from points (..., 2), `near` for the others: (..., R, K) for centres x, y.

    The centres broadcast together to (R, K): (1, W) and (H, 1) are the whole map, (1, K) and (1, K)
    are K cells; a batch may precede. All in level pixels. `out` may be given to write into. To be
    added to what ranks the cells: three vectorised passes, where a boolean mask and its use cost
    five times as much on a CPU.
    """
    square = torch.add((x - xy[..., 0, None, None]).square(), (y - xy[..., 1, None, None]).square(), out=out)
    return F.threshold_(square, radius**2, near).clamp_(max=0)


@torch.no_grad()
def mine_hardest(
    pair: LevelPair,
    *,
    hardest: int,
    exclusion: float = 0.2,
    candidates: int | Literal["all"] = "all",
    generator: torch.Generator | None = None,
    chunk_elements: int = 2**22,
) -> tuple[Tensor, Tensor]:
    """Draw for each point of a one of the `hardest` cells of b, all of them equally likely.

    Candidates are the cells of `map_b` whose centre is farther from u_b than `exclusion` times the
    map's larger side; the hardest are those nearest to F_a(u_a) in feature space.

    Args:
        pair: the correspondences.
        hardest: M; where fewer candidates are left, among those.
        exclusion: fraction of the larger side of the map.
        candidates: `all` is the paper's rule. A number: a random subset of so many cells, drawn once
            for the call; M shrinks by the same share, so that the draws stay as hard as over all cells.
        generator: source of all draws.
        chunk_elements: how many distances are held at once.

    Returns:
        Flat cell indices (B, N) = y·W + x, and whether a point has a candidate at all, bool (B, N).
    """
    features = pair.map_b.detach()
    height, width = features.shape[-2:]
    x = torch.arange(width, device=features.device, dtype=features.dtype)[None] + 0.5
    y = torch.arange(height, device=features.device, dtype=features.dtype)[:, None] + 0.5
    columns, subset = features.flatten(2), None  # [B, C, cells]
    if candidates != "all" and candidates < height * width:
        order = uniform((height * width,), like=features, generator=generator)
        subset = order.topk(candidates, sorted=False).indices
        hardest = max(1, round(hardest * candidates / (height * width)))
        columns = columns.index_select(2, subset)
        x, y = x[:, subset % width], y[subset // width].mT
    draw = uniform(pair.valid.shape, like=features, generator=generator)
    half_square = torch.linalg.vector_norm(columns, dim=1).square_().div_(2)  # [B, cells]
    cells = torch.zeros_like(pair.valid, dtype=torch.long)
    found = torch.zeros_like(pair.valid)
    memory = features.new_empty(0)  # of one chunk, used again: fresh memory costs as much as the sums in it
    for part in _chunks(*pair.valid.shape, columns.shape[-1], chunk_elements):
        xy = pair.xy_b[part].to(features.dtype)
        shape = torch.broadcast_shapes((*xy.shape[:-1], 1, 1), x.shape, y.shape)
        memory = memory if memory.numel() >= math.prod(shape) else features.new_empty(math.prod(shape))
        closeness = exclusion_penalty(
            xy, x=x, y=y, radius=exclusion * max(height, width), near=-torch.inf,
            out=memory[: math.prod(shape)].view(shape),
        ).flatten(-2)  # fmt: skip
        # ⟨f, g⟩ − ½|g|² falls as |f − g| grows.
        closeness.sub_(half_square[part[0], None])
        closeness.baddbmm_(pair.descriptors_a[part].detach(), columns[part[0]])
        cells[part], found[part] = _draw_among_largest(closeness, hardest, draw[part])
    return (cells if subset is None else subset[cells]), found


def _chunks(batch: int, points: int, cells: int, elements: int) -> list[tuple[slice, slice]]:
    """Slices of batch and points, so that no chunk's points times cells pass `elements` (one point at least)."""
    n = min(max(points, 1), max(1, elements // cells))
    b = max(1, elements // (n * cells))
    return [(slice(i, i + b), slice(j, j + n)) for i in range(0, batch, b) for j in range(0, points, n)]


def _draw_among_largest(values: Tensor, count: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Index (B, N) of one of the `count` largest finite values (B, N, K), by `draw` in [0, 1); and if there is one.

    An exact `topk` in two stages: each of the largest values lies in one of the `count` blocks with
    the largest maxima, so that about 2·√(K·count) values pass through the slow selection, not K.
    """
    rows, total = values.flatten(0, 1), values.shape[-1]
    count = min(count, total)
    size = 2 ** round(math.log2(total / count) / 2)  # the best is √(total / count); powers of two leave no cells over
    if size < 4:  # two stages would cost what they save
        largest, candidates = rows.topk(count, sorted=False)
        index, found = _pick_finite(largest, draw.reshape(-1, 1))
        return candidates.gather(1, index).view(draw.shape), found.view(draw.shape)
    blocks = total // size  # block i holds cells i, i + blocks, i + 2·blocks, …; fewer than `size` are left over
    table = rows[:, : blocks * size].unflatten(1, (size, blocks))
    best = table.amax(1).topk(count, sorted=False).indices  # [R, count]
    members = table.gather(2, best[:, None].expand(-1, size, -1)).flatten(1)
    if blocks * size < total:
        members = torch.cat([members, rows[:, blocks * size :]], 1)
    largest, candidates = members.topk(count, sorted=False)
    index, found = _pick_finite(largest, draw.reshape(-1, 1))
    member = candidates.gather(1, index)
    in_block = (member // count) * blocks + best.gather(1, member % count)
    left_over = member - size * count + blocks * size
    index = torch.where(member < size * count, in_block, left_over)
    return index.view(draw.shape), found.view(draw.shape)


def _pick_finite(values: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Position (R, 1) of one of the finite values (R, K), all equally likely, by `draw` (R, 1); and if there is one."""
    place = (values > -torch.inf).cumsum(1)
    available = place[:, -1:]
    chosen = (draw * available).long().minimum(available - 1) + 1
    return (place == chosen).int().argmax(1, keepdim=True), available > 0
