"""The training loss of image pairs: a weighted sum of terms over pyramid levels and both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn

from gnnet.losses.term import LevelPair, Loss, PyramidPair, PyramidTerm, Scheduled, Term


class PairLoss(nn.Module):
    """Σ over terms of the term's weight × its mean over levels and both directions, or its value if a `PyramidTerm`.

    Args:
        terms: the terms by the name under which each is logged, such as {"dmc": Contrastive(), "gn": GaussNewton()}.
        levels: positions of the pyramid levels to use, 0 is the coarsest; None takes all. `Term.levels` counts
            positions among these.

    Raises:
        ValueError: if no term has a weight at step 0, as there would be nothing to train.
    """

    def __init__(self, *, terms: Mapping[str, Term | PyramidTerm], levels: Sequence[int] | None = None):
        super().__init__()
        # A ModuleDict, which its type does not say, so that a term may have parameters.
        self.terms = cast(Mapping[str, Scheduled], nn.ModuleDict(dict(terms)))
        self.levels = None if levels is None else list(levels)
        if not any(term.weight_at(0) > 0 for term in self.terms.values()):
            raise ValueError(
                f"loss.terms ({', '.join(self.terms) or 'empty'}) has no term with a weight at step 0; "
                "expected at least one with weight > 0 and start_step 0"
            )

    @property
    def refines_poses(self) -> bool:
        """Whether a term does, see `Scheduled`."""
        return any(term.refines_poses for term in self.terms.values())

    def forward(self, pair: PyramidPair, *, step: int, generator: torch.Generator | None = None) -> Loss:
        """Loss of a batch of pairs (a scalar), and its parts, detached, to log.

        Computed in float32 at least, whether or not autocast is on. A term whose weight at `step` is zero is
        not computed and has no parts.

        Args:
            pair: its batch's keypoints are in image pixels; a level is sampled at xy / stride.
            step: global step, for the schedules.
            generator: source of all random draws; None is torch's global one.

        Returns:
            The total, and parts: `gn` (mean over levels and directions, unweighted), `gn/stride8` (one level),
            `gn/converged` and `gn/stride8/converged` (what the term reports). Where two levels have the same
            stride, the second is called `stride8_2`.

        Raises:
            ValueError: if the strides of the two pyramids differ, or a term counts on a level that they lack.
        """
        if tuple(pair.a.strides) != tuple(pair.b.strides):
            raise ValueError(
                f"pyramids of a pair have strides {tuple(pair.a.strides)} and {tuple(pair.b.strides)}; "
                "expected one network's maps of both images"
            )
        if self.levels is not None:
            pair = pair.select(self.levels)
        batch, strides = pair.batch, pair.a.strides
        weights = {name: term.weight_at(step) for name, term in self.terms.items()}
        active = [name for name, weight in weights.items() if weight > 0]
        positions = {name: _positions(name, term.levels, strides) for name, term in self.terms.items()}
        losses: dict[str, list[Tensor]] = defaultdict(list)
        logged: dict[str, list[Tensor]] = defaultdict(list)
        with torch.autocast(pair.a.maps[0].device.type, enabled=False):
            levels = zip(level_names(strides), strides, pair.a.maps, pair.b.maps, strict=True)
            summands: list[tuple[str, str, Term, LevelPair]] = []  # of one level and direction, in order
            for position, (level, stride, map_a, map_b) in enumerate(levels):
                xy_a, xy_b = batch.keypoints_a / stride, batch.keypoints_b / stride
                forth = LevelPair.from_maps(map_a, map_b, xy_a=xy_a, xy_b=xy_b, weight=batch.weight, valid=batch.valid)
                here = {name: self.terms[name] for name in active if position in positions[name]}
                terms = [(name, term) for name, term in here.items() if isinstance(term, Term)]
                ways = product(terms, (forth, forth.swap()))
                summands += [(name, level, term, one_way) for (name, term), one_way in ways]
            drawn = _draw([(term, one_way) for _, _, term, one_way in summands], generator)
            for (name, level, term, one_way), numbers in zip(summands, drawn, strict=True):
                loss, parts = term(one_way, *numbers, step=step)
                losses[name].append(loss)
                for key, value in {"": loss.detach(), **{f"/{k}": v for k, v in parts.items()}}.items():
                    logged[f"{name}{key}"].append(value)
                    logged[f"{name}/{level}{key}"].append(value)
            for name in active:
                whole = self.terms[name]
                if isinstance(whole, PyramidTerm):
                    loss, parts = whole(pair.select(sorted(positions[name])), step=step, generator=generator)
                    losses[name].append(loss)
                    for key, value in {"": loss.detach(), **{f"/{k}": v for k, v in parts.items()}}.items():
                        logged[f"{name}{key}"].append(value)
            total = torch.stack([weights[name] * torch.stack(losses[name]).mean() for name in active]).sum()
        return total, {name: torch.stack(values).mean() for name, values in logged.items()}


@torch.compiler.disable  # all draws are here, so that a compiled step is two graphs and not many
def _draw(summands: Sequence[tuple[Term, LevelPair]], generator: torch.Generator | None) -> list[tuple[Tensor, ...]]:
    """The random numbers of all summands."""
    return [term.draw(pair, generator) for term, pair in summands]


def _positions(name: str, levels: Sequence[int] | None, strides: Sequence[int]) -> set[int]:
    """Positions, 0 or more, of the levels on which a term counts."""
    count = len(strides)
    if levels is None:
        return set(range(count))
    if not levels or not all(-count <= i < count for i in levels):
        raise ValueError(
            f"loss.terms.{name}.levels is {list(levels)}, of a pyramid with strides {list(strides)}; "
            f"expected some of 0 to {count - 1}, or null for all"
        )
    return {i % count for i in levels}


def level_names(strides: Sequence[int]) -> list[str]:
    """`stride8` for each level; a second level with the same stride is `stride8_2`."""
    names = []
    for i, stride in enumerate(strides):
        same = list(strides[: i + 1]).count(stride)
        names.append(f"stride{stride}" if same == 1 else f"stride{stride}_{same}")
    return names
