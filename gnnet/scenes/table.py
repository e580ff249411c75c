"""Tables of images and pairs, which are small, quick to select from, and shared between processes.

A `SceneImage` or `Pair` is made when it is asked for. Tables of a part of a scene have the same
columns and other rows, so nothing is copied; columns may lie in memory-mapped files.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView

import numpy as np

from gnnet.scenes.columns import (
    REFERENCE,
    ImageColumns,
    PairColumns,
    Strings,
    make_images,
    make_pairs,
    pack_images,
    pack_pairs,
)
from gnnet.scenes.values import Pair, SceneImage

_CHUNK = 2048  # values made at once when a table is gone through


class ImageTable(Mapping[str, SceneImage]):
    """Images by name.

    Args:
        columns: what is known of all images.
        rows: (N,) rows of this table's images, ascending; None: all.
    """

    def __init__(self, columns: ImageColumns, rows: np.ndarray | None = None) -> None:
        self.columns = columns
        self.rows = np.arange(len(columns.names), dtype=np.int32) if rows is None else rows

    @classmethod
    def of(cls, images: Mapping[str, SceneImage]) -> ImageTable:
        """Pack images.

        Raises:
            ValueError: if one stands under another name, or has not as many keypoints as points.
        """
        return images if isinstance(images, ImageTable) else cls(pack_images(images))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names.take(self.rows))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._row(name) is not None

    def __getitem__(self, name: str) -> SceneImage:
        row = self._row(name)
        if row is None:
            raise KeyError(name)
        return make_images(self.columns, np.array([row]))[0]

    def values(self) -> ValuesView:
        return _Values(self)

    def items(self) -> ItemsView:
        return _Items(self)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions present, sorted."""
        return tuple(sorted(self.columns.conditions.take(np.unique(self.columns.condition[self.rows]))))

    @property
    def places(self) -> tuple[str, ...]:
        """Places present, sorted."""
        return tuple(sorted(self.columns.places.take(np.unique(self.columns.place[self.rows]))))

    def with_conditions(self, conditions: Iterable[str]) -> ImageTable:
        """The table with references, and with images of `conditions`, only."""
        columns = self.columns
        wanted = _among(columns.conditions, conditions)[columns.condition[self.rows]]
        return ImageTable(columns, self.rows[wanted | (columns.flags[self.rows] & REFERENCE > 0)])

    def with_places(self, places: Iterable[str]) -> ImageTable:
        """The table with images of `places` only."""
        return ImageTable(self.columns, self.rows[_among(self.columns.places, places)[self.columns.place[self.rows]]])

    def without(self, rows: Iterable[int]) -> ImageTable:
        """The table without some rows of the columns."""
        return ImageTable(self.columns, self.rows[~np.isin(self.rows, list(rows))])

    def holds(self, names: Strings) -> np.ndarray:
        """Whether each of `names` (K,) is an image of this table, (K,)."""
        if names is not self.columns.names:
            return np.array([name in self for name in names], dtype=bool)
        held = np.zeros(len(names), dtype=bool)
        held[self.rows] = True
        return held

    def in_turn(self) -> Iterator[SceneImage]:
        """The images one after another, made some thousands at once."""
        for start in range(0, len(self), _CHUNK):
            yield from make_images(self.columns, self.rows[start : start + _CHUNK])

    def _row(self, name: str) -> int | None:
        row = self.columns.names.rows.get(name)
        if row is None:
            return None
        here = int(np.searchsorted(self.rows, row))
        return row if here < len(self.rows) and self.rows[here] == row else None


class _Values(ValuesView[SceneImage]):
    _mapping: ImageTable  # as collections.abc keeps it

    def __iter__(self) -> Iterator[SceneImage]:
        return self._mapping.in_turn()


class _Items(ItemsView[str, SceneImage]):
    _mapping: ImageTable

    def __iter__(self) -> Iterator[tuple[str, SceneImage]]:
        return ((image.name, image) for image in self._mapping.in_turn())


class PairTable(Sequence[Pair]):
    """Pairs in order; a slice is a table again.

    Args:
        columns: what is known of all pairs.
        rows: (N,) rows of this table's pairs; None: all.
    """

    def __init__(self, columns: PairColumns, rows: np.ndarray | None = None) -> None:
        self.columns = columns
        self.rows = np.arange(len(columns.place), dtype=np.int32) if rows is None else rows

    @classmethod
    def of(cls, pairs: Sequence[Pair], images: ImageTable) -> PairTable:
        """Pack pairs of these images."""
        return pairs if isinstance(pairs, PairTable) else cls(pack_pairs(pairs, images.columns.names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return PairTable(self.columns, self.rows[index])
        return make_pairs(self.columns, self.rows[index, None])[0]

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self), _CHUNK):
            yield from make_pairs(self.columns, self.rows[start : start + _CHUNK])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # how Python says that a value has no hash

    def between(self, images: ImageTable) -> PairTable:
        """The table with the pairs of which both images are in `images` only."""
        held, columns = images.holds(self.columns.names), self.columns
        return PairTable(columns, self.rows[held[columns.image_a[self.rows]] & held[columns.image_b[self.rows]]])

    def without(self, rows: Iterable[int]) -> PairTable:
        """The table without some rows of the columns."""
        return PairTable(self.columns, self.rows[~np.isin(self.rows, list(rows))])


def _among(strings: Strings, wanted: Iterable[str]) -> np.ndarray:
    wanted = set(wanted)
    return np.array([string in wanted for string in strings], dtype=bool)
