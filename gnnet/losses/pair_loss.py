"""The training loss of image pairs: a weighted sum of terms over pyramid levels and both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from gnnet.data.batches import PairBatch
from gnnet.losses.term import LevelPair, Term
from gnnet.models.pyramid import FeaturePyramid


class PairLoss(nn.Module):
    """Σ over terms of weight × mean over the term's levels and both directions.

    Args:
        terms: by the name under which each is logged, such as {"dmc": Contrastive(), "gn": GaussNewton()}.
        levels: positions of the pyramid levels that count, 0 the coarsest; None: all. A term may count
            on some of these alone (`Term.levels`).

    Raises:
        ValueError: if no term counts from the first step on, as there would be nothing to train.
    """

    def __init__(self, *, terms: Mapping[str, Term], levels: Sequence[int] | None = None):
        super().__init__()
        self.terms = nn.ModuleDict(dict(terms))
        self.levels = None if levels is None else list(levels)
        if not any(term.weight_at(0) > 0 for term in self.terms.values()):
            raise ValueError(
                f"loss.terms ({', '.join(self.terms) or 'empty'}) has no term with a weight at step 0; "
                "expected at least one with weight > 0 and start_step 0"
            )

    def forward(
        self,
        pyramid_a: FeaturePyramid,
        pyramid_b: FeaturePyramid,
        batch: PairBatch,
        *,
        step: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of pairs (scalar), and its parts, detached, for logging.

        Computed in float32 at least, whether or not autocast is on. A term that is off at `step` is
        neither computed nor among the parts.

        Args:
            pyramid_a, pyramid_b: maps of `batch.image_a` and `batch.image_b`.
            batch: keypoints in image pixels; each level is sampled at xy / stride.
            step: global step, for the schedules.
            generator: source of all random draws.

        Returns:
            The total, and parts: `gn` (mean over levels and directions, unweighted), `gn/stride8` (one
            level), `gn/converged` and `gn/stride8/converged` (what the term reports). Of levels with
            one stride, the second is called `stride8_2`.

        Raises:
            ValueError: if the two pyramids' strides differ, or a term counts on a level that they do not have.
        """
        if tuple(pyramid_a.strides) != tuple(pyramid_b.strides):
            raise ValueError(
                f"pyramids of a pair have strides {tuple(pyramid_a.strides)} and {tuple(pyramid_b.strides)}; "
                "expected one network's maps of both images"
            )
        if self.levels is not None:
            pyramid_a, pyramid_b = pyramid_a.select(self.levels), pyramid_b.select(self.levels)
        weights = {name: term.weight_at(step) for name, term in self.terms.items()}
        active = [name for name, weight in weights.items() if weight > 0]
        positions = {name: _positions(name, term.levels, pyramid_a.strides) for name, term in self.terms.items()}
        losses: dict[str, list[Tensor]] = defaultdict(list)
        logged: dict[str, list[Tensor]] = defaultdict(list)
        with torch.autocast(pyramid_a.maps[0].device.type, enabled=False):
            for position, (level, forth) in enumerate(_level_pairs(pyramid_a, pyramid_b, batch)):
                here = [name for name in active if position in positions[name]]
                for name, pair in product(here, (forth, forth.swap())):
                    loss, parts = self.terms[name](pair, step=step, generator=generator)
                    losses[name].append(loss)
                    for key, value in {"": loss.detach(), **{f"/{k}": v for k, v in parts.items()}}.items():
                        logged[f"{name}{key}"].append(value)
                        logged[f"{name}/{level}{key}"].append(value)
            total = sum(weights[name] * torch.stack(losses[name]).mean() for name in active)
        return total, {name: torch.stack(values).mean() for name, values in logged.items()}


def _positions(name: str, levels: Sequence[int] | None, strides: Sequence[int]) -> set[int]:
    """A term's levels, counted from the coarsest."""
    count = len(strides)
    if levels is None:
        return set(range(count))
    if not levels or not all(-count <= i < count for i in levels):
        raise ValueError(
            f"loss.terms.{name}.levels is {list(levels)}, of a pyramid with strides {list(strides)}; "
            f"expected some of 0 to {count - 1}, or null for all"
        )
    return {i % count for i in levels}


def _level_pairs(
    pyramid_a: FeaturePyramid, pyramid_b: FeaturePyramid, batch: PairBatch
) -> Iterator[tuple[str, LevelPair]]:
    """Each level's name and its correspondences at xy / stride."""
    levels = zip(pyramid_a.strides, pyramid_a.maps, pyramid_b.maps, strict=True)
    for name, (stride, map_a, map_b) in zip(_level_names(pyramid_a.strides), levels, strict=True):
        yield (
            name,
            LevelPair.from_maps(
                map_a,
                map_b,
                xy_a=batch.keypoints_a / stride,
                xy_b=batch.keypoints_b / stride,
                weight=batch.weight,
                valid=batch.valid,
            ),
        )


def _level_names(strides: Sequence[int]) -> list[str]:
    """`stride8` of each level; a second level of the same stride is `stride8_2`."""
    names = []
    for i, stride in enumerate(strides):
        same = list(strides[: i + 1]).count(stride)
        names.append(f"stride{stride}" if same == 1 else f"stride{stride}_{same}")
    return names
