"""Hard negatives: for each point of image a, cells of image b with a similar descriptor, far from the true point.

The progressive mining of the report's section 3.3.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gnnet.losses.term import LevelPair, cell_centers, uniform


def hardest_count(step: int, *, start: int = 300, minimum: int = 5, decay: float = 0.6) -> int:
    """M(k) = max(minimum, start·exp(−decay·k/10000)) at global step k: as M falls, negatives become harder."""
    return max(minimum, round(start * math.exp(-decay * step / 10_000)))


def exclusion_penalty(
    xy: Tensor, *, x: Tensor, y: Tensor, radius: float, near: float, out: Tensor | None = None
) -> Tensor:
    """Penalty (..., R, K) to add to the scores of cells: `near` within `radius` of a point, 0 beyond.

    Two vectorized passes; a boolean mask costs five times as much on a CPU.

    Args:
        xy: points (..., 2) in level pixels.
        x, y: centres of the cells in level pixels; they broadcast to (R, K), or to (..., R, K). Shapes (1, W)
            and (H, 1) make the whole map, (1, K) and (1, K) make K cells.
        radius: in level pixels.
        near: 0 or less, finite.
        out: memory (..., R, K) to write into.
    """
    square_x, square_y = (x - xy[..., 0, None, None]).square(), (y - xy[..., 1, None, None]).square()
    if out is None:
        out = xy.new_empty(torch.broadcast_shapes(square_x.shape, square_y.shape))
    return torch.le(square_x, radius**2 - square_y, out=out).mul_(near)


def draw_candidates(
    pair: LevelPair, candidates: int | Literal["all"] = "all", generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """The random numbers of `mine_hardest`: what chooses for each point, (B, N), and a subset of the cells, if any.

    Args:
        pair: the correspondences.
        candidates: `all` takes every cell, the paper's rule. A number takes a random subset of that many cells.
        generator: source of the draws; None is torch's global one.
    """
    cells, like = pair.map_b.shape[-2] * pair.map_b.shape[-1], pair.map_b
    if candidates == "all" or candidates >= cells:
        return (uniform(pair.valid.shape, like=like, generator=generator),)
    subset = uniform((cells,), like=like, generator=generator).topk(candidates, sorted=False).indices
    return uniform(pair.valid.shape, like=like, generator=generator), subset


@torch.no_grad()
def mine_hardest(
    pair: LevelPair,
    draw: Tensor,
    subset: Tensor | None = None,
    *,
    hardest: int,
    exclusion: float = 0.2,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """For each point of a, draw one of the `hardest` cells of b, all with the same probability.

    Candidates are the cells of `map_b` whose centre is farther from u_b than `exclusion` times the
    map's larger side. The hardest candidates are those nearest to F_a(u_a) in feature space.

    Args:
        pair: the correspondences.
        draw, subset: of `draw_candidates`. With a subset of the cells, M shrinks by its share, so that negatives are
            as hard as those among all cells.
        hardest: M; a point with fewer candidates draws among all of its own.
        exclusion: fraction of the larger side of the map.
        chunk_elements: number of distances held in memory at once; None takes what suits the device.

    Returns:
        Flat indices y·W + x of the cells, (B, N), and whether the point has any candidate, (B, N) bool.
    """
    features = pair.map_b.detach()
    height, width = features.shape[-2:]
    x, y = cell_centers(features)
    columns = features.flatten(2)  # [B, C, cells]
    if subset is not None:
        hardest = max(1, round(hardest * len(subset) / (height * width)))
        columns = columns.index_select(2, subset)
        x, y = x[:, subset % width], y[subset // width].mT
    half_square = torch.linalg.vector_norm(columns, dim=1).square_().div_(2)  # [B, cells]
    cells = torch.zeros_like(pair.valid, dtype=torch.long)
    found = torch.zeros_like(pair.valid)
    memory = features.new_empty(0)  # reused by all chunks: allocating costs as much as computing
    batch, points = pair.valid.shape
    # On a CPU what its caches hold, elsewhere 512 MB.
    chunk_elements = chunk_elements or (1 << 22 if features.device.type == "cpu" else 1 << 27)
    for part in _chunks(batch, points, columns.shape[-1], chunk_elements):
        xy = pair.xy_b[part].to(features.dtype)
        shape = torch.broadcast_shapes((*xy.shape[:-1], 1, 1), x.shape, y.shape)
        memory = memory if memory.numel() >= math.prod(shape) else features.new_empty(math.prod(shape))
        closeness = exclusion_penalty(
            xy, x=x, y=y, radius=exclusion * max(height, width), near=torch.finfo(features.dtype).min,
            out=memory[: math.prod(shape)].view(shape),
        ).flatten(-2)  # fmt: skip
        # ⟨f, g⟩ − ½|g|² falls as |f − g| grows.
        closeness.sub_(half_square[part[0], None])
        closeness.baddbmm_(pair.descriptors_a[part].detach(), columns[part[0]])
        cells[part], found[part] = _draw_among_largest(closeness, hardest, draw[part])
    return (cells if subset is None else subset[cells]), found


def _chunks(batch: int, points: int, cells: int, elements: int) -> list[tuple[slice, slice]]:
    """Slices of batch and points; points × cells of a chunk are at most `elements`, unless it is one point."""
    n = min(max(points, 1), max(1, elements // cells))
    b = max(1, elements // (n * cells))
    return [(slice(i, i + b), slice(j, j + n)) for i in range(0, batch, b) for j in range(0, points, n)]


def _draw_among_largest(values: Tensor, count: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Index (B, N) of one of the `count` largest values (B, N, K), chosen by `draw` (B, N) in [0, 1).

    The lowest finite number and −∞ are never chosen. Also returns whether the row has any other value, (B, N).
    An exact `topk` in two stages: each of the `count` largest values lies in one of the `count` blocks with the
    largest maxima, so that the slow selection sees about 2·√(K·count) values, not K.
    """
    rows, total = values.flatten(0, 1), values.shape[-1]
    count = min(count, total)
    size = 2 ** round(math.log2(total / count) / 2)  # near the best, √(total / count); a power of two divides most maps
    if size < 4:  # two stages would cost as much as they save
        largest, candidates = _largest(rows, count)
        index, found = _pick(largest, draw.reshape(-1, 1))
        return candidates.gather(1, index).view(draw.shape), found.view(draw.shape)
    blocks = total // size  # block i holds cells i, i + blocks, …; the last cells, fewer than `size`, are left over
    table = rows[:, : blocks * size].unflatten(1, (size, blocks))
    _, best = _largest(table.amax(1), count)  # [R, count]
    members = table.gather(2, best[:, None].expand(-1, size, -1)).flatten(1)
    if blocks * size < total:
        members = torch.cat([members, rows[:, blocks * size :]], 1)
    largest, candidates = _largest(members, count)
    index, found = _pick(largest, draw.reshape(-1, 1))
    member = candidates.gather(1, index)
    in_block = (member // count) * blocks + best.gather(1, member % count)
    left_over = member - size * count + blocks * size
    index = torch.where(member < size * count, in_block, left_over)
    return index.view(draw.shape), found.view(draw.shape)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row (R, K) and their positions, (R, count), in any order.

    As integers in the same order, of which a CPU selects in two thirds of the time, as none is NaN.
    """
    integers = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    largest, positions = _in_order(integers).topk(count, sorted=False)
    return _in_order(largest).view(values.dtype), positions


def _in_order(bits: Tensor) -> Tensor:
    """Floating-point numbers, as integers of the same bits, to integers in the order of the numbers; and back."""
    return (bits >> (8 * bits.element_size() - 1)).bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def _pick(values: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Position (R, 1) of the value of (R, K) that `draw` (R, 1) in [0, 1) chooses, and whether there is one."""
    # A CPU adds floating-point numbers faster than integers.
    place = (values > torch.finfo(values.dtype).min).cumsum(1, dtype=values.dtype)
    available = place[:, -1:].contiguous()
    chosen = (draw * available).floor().minimum(available - 1) + 1
    return torch.searchsorted(place, chosen), available > 0
