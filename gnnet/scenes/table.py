"""Tables of images and pairs, which are small, quick to select from, and shared between processes.

A `SceneImage` or `Pair` is made when it is asked for. Tables of a part of a scene have the same
columns and other rows, so nothing is copied; columns may lie in memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, Self, TypeVar, overload

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.columns import CAMERA, POINT_IDS, POSE, REFERENCE, ImageColumns, PairColumns, Strings
from gnnet.scenes.values import Pair, SceneImage

_Columns = TypeVar("_Columns", ImageColumns, PairColumns)


class _Table(Generic[_Columns]):
    """Some rows of columns.

    Args:
        columns: what is known of all images, or pairs.
        rows: (N,) rows that are in this table, of an `ImageTable` ascending; None: all.
    """

    def __init__(self, columns: _Columns, rows: np.ndarray | None = None) -> None:
        self.columns: _Columns = columns
        self.rows = np.arange(len(columns), dtype=np.int32) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, rows: Iterable[int]) -> Self:
        """The table without some rows of the columns."""
        return self._where(~np.isin(self.rows, list(rows)))

    def _where(self, kept: np.ndarray | slice) -> Self:
        return type(self)(self.columns, self.rows[kept])


class ImageTable(_Table[ImageColumns], Mapping[str, SceneImage]):
    """Images by name."""

    @classmethod
    def of(cls, images: Mapping[str, SceneImage]) -> ImageTable:
        """Pack images, see `ImageColumns.of`."""
        return images if isinstance(images, ImageTable) else cls(ImageColumns.of(images))

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names.take(self.rows))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._row(name) is not None

    def __getitem__(self, name: str) -> SceneImage:
        row = self._row(name)
        if row is None:
            raise KeyError(name)
        return self.columns[row]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions present, sorted."""
        return self.columns.conditions.present(self.rows)

    @property
    def places(self) -> tuple[str, ...]:
        """Places present, sorted."""
        return self.columns.places.present(self.rows)

    def with_conditions(self, conditions: Iterable[str]) -> ImageTable:
        """The table with references, and with images of `conditions`, only."""
        wanted = self.columns.conditions.among(conditions) | (self.columns.flags & REFERENCE > 0)
        return self._where(wanted[self.rows])

    def with_places(self, places: Iterable[str]) -> ImageTable:
        """The table with images of `places` only."""
        return self._where(self.columns.places.among(places)[self.rows])

    def references(self) -> ImageList:
        """The references with camera, pose, and depth or 3D points, by name."""
        columns, rows = self.columns, self.rows
        known = (columns.flags[rows] & REFERENCE > 0) & (columns.views.flags[rows] & (CAMERA | POSE) == CAMERA | POSE)
        points = (columns.flags[rows] & POINT_IDS > 0) & (np.diff(columns.observations)[rows] > 0)
        rows = rows[known & (points | (columns.depth_row[rows] >= 0))]
        names = columns.names.take(rows)
        return ImageList(columns, rows[sorted(range(len(rows)), key=names.__getitem__)])

    def holds(self, names: Strings) -> np.ndarray:
        """Whether each of `names` (K,) is an image of this table, (K,)."""
        if names is not self.columns.names:
            return np.array([name in self for name in names], dtype=bool)
        held = np.zeros(len(names), dtype=bool)
        held[self.rows] = True
        return held

    def _row(self, name: str) -> int | None:
        row = self.columns.names.rows.get(name)
        if row is None:
            return None
        here = int(np.searchsorted(self.rows, row))
        return row if here < len(self.rows) and self.rows[here] == row else None


class ImageList(_Table[ImageColumns], Sequence[SceneImage]):
    """Images in some order."""

    @overload
    def __getitem__(self, index: int) -> SceneImage: ...
    @overload
    def __getitem__(self, index: slice) -> ImageList: ...
    def __getitem__(self, index: int | slice) -> SceneImage | ImageList:
        return self._where(index) if isinstance(index, slice) else self.columns[self.rows[index]]

    @property
    def names(self) -> list[str]:
        return self.columns.names.take(self.rows)

    @property
    def places(self) -> list[str]:
        return [self.columns.places[row] for row in self.rows.tolist()]

    @property
    def poses(self) -> Pose:
        """`cam_from_world` (N,) where all are known, float64."""
        values = torch.from_numpy(self.columns.views.pose[self.rows])
        return Pose(values[:, :9].reshape(-1, 3, 3), values[:, 9:].contiguous())

    @property
    def cameras(self) -> Camera:
        """(N,) where all are known, float64."""
        values = torch.from_numpy(self.columns.views.camera[self.rows])
        return Camera(values[:, :2].contiguous(), values[:, 2:].contiguous())


class PairTable(_Table[PairColumns], Sequence[Pair]):
    """Pairs in order; a slice is a table again."""

    @classmethod
    def of(cls, pairs: Sequence[Pair], images: ImageTable) -> PairTable:
        """Pack pairs of these images."""
        return pairs if isinstance(pairs, PairTable) else cls(PairColumns.of(pairs, images.columns.names))

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairTable: ...
    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        return self._where(index) if isinstance(index, slice) else self.columns[self.rows[index]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # how Python says that a value has no hash

    def between(self, images: ImageTable) -> PairTable:
        """The table with the pairs of which both images are in `images` only."""
        held, columns = images.holds(self.columns.names), self.columns
        return self._where((held[columns.image_a] & held[columns.image_b])[self.rows])
