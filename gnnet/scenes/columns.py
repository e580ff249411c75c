"""Columns of numbers and text that hold a scene's images and pairs; a value is made of a row when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.values import Depth, Pair, SceneImage

CAMERA, POSE = 1, 2  # flags of a view
REFERENCE, POINT_IDS, KEYPOINTS = 1, 2, 4  # flags of an image
STATIC, FILE = 1, 2  # flags of a pair
_NO_CAMERA = Camera.from_colmap("PINHOLE", 1, 1, (1, 1, 0, 0), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings of any length: their bytes one after another, and where each begins (N+1,)."""

    text: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        encoded = [os.fsencode(string) for string in strings]  # file names may be no UTF-8
        return cls(np.frombuffer(b"".join(encoded), np.uint8), _starts(encoded))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.text[self.offsets[row] : self.offsets[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self.take(np.arange(len(self))))

    @cached_property
    def rows(self) -> dict[str, int]:
        """The row of each string."""
        return {string: row for row, string in enumerate(self)}

    def __getstate__(self) -> dict[str, np.ndarray]:
        return {"text": self.text, "offsets": self.offsets}  # without `rows`, which are made where they are needed

    def take(self, rows: np.ndarray) -> list[str]:
        """The strings of some rows (K,), 0 or above."""
        return [self[row] for row in rows.tolist()]


@dataclass(frozen=True, eq=False)
class Labels:
    """A string for each of N rows, of which few differ: the different ones, and each row's place (N,) among them."""

    strings: Strings
    codes: np.ndarray

    @classmethod
    def of(cls, labels: Iterable[str]) -> Labels:
        found: dict[str, int] = {}
        codes = np.array([found.setdefault(label, len(found)) for label in labels], dtype=np.int32)
        return cls(Strings.of(found), codes)

    def __getitem__(self, row: int) -> str:
        return self.strings[self.codes[row]]

    def present(self, rows: np.ndarray) -> tuple[str, ...]:
        """The different labels of some rows (K,), sorted."""
        return tuple(sorted(self.strings.take(np.unique(self.codes[rows]))))

    def among(self, wanted: Iterable[str]) -> np.ndarray:
        """Whether each row's label is one of `wanted`, (N,)."""
        wanted = set(wanted)
        return np.array([string in wanted for string in self.strings], dtype=bool)[self.codes]


@dataclass(frozen=True, eq=False)
class Views:
    """Files that cameras took; what is not known is zero and has no flag.

    Cameras (N, 10 or more) are size and parameters, poses (N, 12) rotation (row by row) and translation.
    """

    paths: Strings
    flags: np.ndarray
    camera: np.ndarray
    pose: np.ndarray

    @classmethod
    def of(cls, views: Sequence[tuple[Path, Camera | None, Pose | None]]) -> Views:
        flags, poses = np.zeros(len(views), np.uint8), np.zeros((len(views), 12))
        known = [row for row, (_, camera, _) in enumerate(views) if camera is not None]
        flags[known] |= CAMERA
        stacked = Camera.stack([camera for _, camera, _ in views if camera is not None] or [_NO_CAMERA])
        cameras = np.zeros((len(views), 2 + stacked.parameters.shape[-1]))
        if known:
            cameras[known, :2], cameras[known, 2:] = stacked.size.numpy(), stacked.parameters.numpy()
        for row, (_, _, pose) in enumerate(views):
            if pose is not None:
                flags[row] |= POSE
                poses[row, :9], poses[row, 9:] = pose.rotation.numpy().reshape(-1), pose.translation.numpy()
        return cls(Strings.of(str(path) for path, _, _ in views), flags, cameras, poses)

    def __getitem__(self, row: int) -> tuple[Path, Camera | None, Pose | None]:
        # Copies, as a view, when pickled, would take the whole column with it.
        camera, pose = torch.from_numpy(self.camera[row].copy()), torch.from_numpy(self.pose[row].copy())
        return (
            Path(self.paths[row]),
            Camera(camera[:2], camera[2:]) if self.flags[row] & CAMERA else None,
            Pose(pose[:9].view(3, 3), pose[9:]) if self.flags[row] & POSE else None,
        )


@dataclass(frozen=True, eq=False)
class ImageColumns:
    """Columns of N images, D depth maps and M observations.

    `observations` (N+1,) tells where each image's `point_ids` (M,) and `keypoints` (M, 2) begin, which are zeros
    where an image has the other alone; `depth_row` (N,) is -1 without depth; `depth_scale` (D,) is `Depth.scale`.
    """

    names: Strings
    views: Views
    conditions: Labels
    places: Labels
    flags: np.ndarray
    observations: np.ndarray
    point_ids: np.ndarray
    keypoints: np.ndarray
    depth_row: np.ndarray
    depth_scale: np.ndarray
    depths: Views

    @classmethod
    def of(cls, images: Mapping[str, SceneImage]) -> ImageColumns:
        """Pack images.

        Raises:
            ValueError: if one stands under another name, or has not as many keypoints as points.
        """
        for name, image in images.items():
            ids, xy = image.point_ids, image.keypoints
            if image.name != name:
                raise ValueError(f"image {image.name} stands under the name {name}")
            if ids is not None and xy is not None and len(ids) != len(xy):
                raise ValueError(f"image {name} observes {len(ids)} points at {len(xy)} keypoints; expected as many")
        values = list(images.values())
        observations = _starts([next((o for o in (i.point_ids, i.keypoints) if o is not None), ()) for i in values])
        point_ids, keypoints = np.zeros(observations[-1], np.int64), np.zeros((observations[-1], 2))
        flags = np.array([REFERENCE * image.is_reference for image in values], dtype=np.uint8)
        for row, image in enumerate(values):
            seen = slice(observations[row], observations[row + 1])
            if image.point_ids is not None:
                flags[row] |= POINT_IDS
                point_ids[seen] = image.point_ids
            if image.keypoints is not None:
                flags[row] |= KEYPOINTS
                keypoints[seen] = np.reshape(image.keypoints, (-1, 2))
        depths = [image.depth for image in values if image.depth is not None]
        depth_row = np.full(len(values), -1, np.int32)
        depth_row[[image.depth is not None for image in values]] = np.arange(len(depths))
        return cls(
            names=Strings.of(images),
            views=Views.of([(image.path, image.camera, image.cam_from_world) for image in values]),
            conditions=Labels.of(image.condition for image in values),
            places=Labels.of(image.place for image in values),
            flags=flags,
            observations=observations,
            point_ids=point_ids,
            keypoints=keypoints,
            depth_row=depth_row,
            depth_scale=np.array([depth.scale for depth in depths], dtype=np.float64),
            depths=Views.of([(depth.path, depth.camera, depth.image_from_depth) for depth in depths]),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> SceneImage:
        """The image of a row; its observations are views of the columns."""
        flags, seen = self.flags[row], slice(self.observations[row], self.observations[row + 1])
        path, camera, cam_from_world = self.views[row]
        deep = self.depth_row[row]
        return SceneImage(
            name=self.names[row],
            path=path,
            condition=self.conditions[row],
            place=self.places[row],
            camera=camera,
            cam_from_world=cam_from_world,
            is_reference=bool(flags & REFERENCE),
            point_ids=self.point_ids[seen] if flags & POINT_IDS else None,
            keypoints=self.keypoints[seen] if flags & KEYPOINTS else None,
            depth=Depth(*self.depths[deep], scale=float(self.depth_scale[deep])) if deep >= 0 else None,
        )


@dataclass(frozen=True, eq=False)
class PairColumns:
    """Columns of pairs; `image_a` and `image_b` are rows of `names`, which are the images' own where possible."""

    names: Strings
    image_a: np.ndarray
    image_b: np.ndarray
    places: Labels
    paths: Strings
    flags: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pair], names: Strings) -> PairColumns:
        """Pack pairs; they share the images' `names`, unless a pair names an image that is not there."""
        rows = dict(names.rows)
        image_a, image_b = (
            np.array([rows.setdefault(name, len(rows)) for name in side], dtype=np.int32)
            for side in ([pair.image_a for pair in pairs], [pair.image_b for pair in pairs])
        )
        return cls(
            names=names if len(rows) == len(names) else Strings.of(rows),
            image_a=image_a,
            image_b=image_b,
            places=Labels.of(pair.place for pair in pairs),
            paths=Strings.of("" if pair.correspondences is None else str(pair.correspondences) for pair in pairs),
            flags=np.array([STATIC * p.static | FILE * (p.correspondences is not None) for p in pairs], dtype=np.uint8),
            count=np.array([pair.count for pair in pairs], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, row: int) -> Pair:
        return Pair(
            image_a=self.names[self.image_a[row]],
            image_b=self.names[self.image_b[row]],
            place=self.places[row],
            correspondences=Path(self.paths[row]) if self.flags[row] & FILE else None,
            static=bool(self.flags[row] & STATIC),
            count=int(self.count[row]),
        )


def _starts(parts: Iterable[Sized]) -> np.ndarray:
    """Where each of N parts begins when they stand one after another, and the end of the last, (N+1,) int64."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
