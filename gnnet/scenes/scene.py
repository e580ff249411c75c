"""What every dataset layout becomes: images with cameras and poses, 3D points, and training pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gnnet.scenes.table import ImageTable, PairTable
from gnnet.scenes.values import Correspondences, Depth, Pair, SceneImage

__all__ = ["Correspondences", "Depth", "Pair", "Scene", "SceneImage"]


@dataclass(frozen=True, eq=False, init=False)
class Scene:
    """Images by name, 3D points, and training pairs of one dataset.

    Images and pairs are packed into tables, so `images[name]` and `pairs[i]` make a new value each time.

    Args:
        name: of the scene, for messages and titles.
        images: by their names.
        pairs: of these images.
        points: (P, 3) in metres, float64; None: no points.
        groups: names of sets of conditions (`night-all`).
        problems: messages about broken input that was left out.
        retrieve_within: what a query has in common with every reference worth comparing it with: its `camera`
            where a rig looks to several sides, its `place` where the dataset tells it.
        dataset: the layout's name in `layouts.registry` (`robotcar`, `toy`, …); empty for a reader that is not there.

    Raises:
        ValueError: if an image stands under another name, or has not as many keypoints as points.
    """

    name: str
    images: ImageTable
    pairs: PairTable
    points: Tensor
    groups: dict[str, tuple[str, ...]]
    problems: tuple[str, ...]
    retrieve_within: tuple[Literal["camera", "place"], ...]
    dataset: str

    def __init__(
        self,
        name: str,
        images: Mapping[str, SceneImage],
        pairs: Sequence[Pair],
        points: Tensor | None = None,
        groups: dict[str, tuple[str, ...]] | None = None,
        problems: tuple[str, ...] = (),
        retrieve_within: tuple[Literal["camera", "place"], ...] = (),
        dataset: str = "",
    ) -> None:
        table = ImageTable.of(images)
        vars(self).update(
            name=name,
            images=table,
            pairs=PairTable.of(pairs, table),
            points=torch.zeros(0, 3, dtype=torch.float64) if points is None else points,
            groups=groups or {},
            problems=problems,
            retrieve_within=retrieve_within,
            dataset=dataset,
        )

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions present, sorted."""
        return self.images.conditions

    @property
    def places(self) -> tuple[str, ...]:
        """Places present, sorted."""
        return self.images.places

    def with_conditions(self, conditions: Iterable[str]) -> Scene:
        """The scene with references and images of `conditions` only; a pair stays if both images do.

        Args:
            conditions: names of conditions, or of `groups` of them.

        Raises:
            ValueError: if a condition is not in the scene.
        """
        conditions, present = set(conditions), set(self.conditions)
        unknown = sorted(conditions - present - set(self.groups))
        if unknown:
            groups = "; ".join(f"{name} ({', '.join(members)})" for name, members in sorted(self.groups.items()))
            raise ValueError(
                f"dataset.conditions names {', '.join(unknown)}, which {self.name} does not have; "
                f"it has {', '.join(self.conditions)}" + (f", and the groups {groups}" if groups else "")
            )
        wanted = {member for name in conditions for member in (name, *self.groups.get(name, ()))}
        return self._restricted(self.images.with_conditions(wanted))

    def with_places(self, places: Iterable[str]) -> Scene:
        """The scene restricted to some places (points are kept, as images refer to them by row)."""
        return self._restricted(self.images.with_places(places))

    def _restricted(self, images: ImageTable) -> Scene:
        return replace(self, images=images, pairs=self.pairs.between(images))

    def split(self, validation_fraction: float, seed: int) -> tuple[Scene, Scene]:
        """Train and validation scenes that share no place; the same on every machine.

        Places are ordered by a hash of (seed, place), so the split depends neither on the order in
        which files are listed nor on Python's hash seed.

        Raises:
            ValueError: if there is one place only, which cannot be split.
        """
        places = self.places
        if len(places) < 2:
            raise ValueError(
                f"{self.name} holds {len(places)} place, so it cannot be split by place; "
                "give another dataset for validation (dataset.validation_root), or a smaller dataset.place_size"
            )
        order = sorted(places, key=lambda place: hashlib.sha256(f"{seed}/{place}".encode()).hexdigest())
        count = min(max(1, round(validation_fraction * len(order))), len(order) - 1)
        return self.with_places(order[count:]), self.with_places(order[:count])
