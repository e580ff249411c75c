"""Columns of numbers and text that hold a scene's images and pairs, and the values made of their rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.values import Depth, Pair, SceneImage

# Flags of an image; a depth map has those of camera and pose.
REFERENCE, CAMERA, POSE, POINT_IDS, KEYPOINTS = 1, 2, 4, 8, 16
STATIC, FILE = 1, 2  # flags of a pair


@dataclass(frozen=True, eq=False)
class Strings:
    """Strings of any length: their bytes one after another, and where each begins (N+1,)."""

    text: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        encoded = [os.fsencode(string) for string in strings]  # file names may be no UTF-8
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self.take(np.array([row]))[0]

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
        begins, ends = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        return [os.fsdecode(self.text[begin:end].tobytes()) for begin, end in zip(begins, ends, strict=True)]


@dataclass(frozen=True, eq=False)
class ImageColumns:
    """Columns of N images, D depth maps and M observations; what is not known is zero and has no flag.

    Cameras (…, 10) are size and parameters, poses (…, 12) rotation (row by row) and translation.
    `observations` (N+1,) tells where each image's `point_ids` (M,) and `keypoints` (M, 2) begin;
    `depth_row` (N,) is -1 without depth.
    """

    names: Strings
    paths: Strings
    conditions: Strings
    condition: np.ndarray
    places: Strings
    place: np.ndarray
    flags: np.ndarray
    camera: np.ndarray
    pose: np.ndarray
    observations: np.ndarray
    point_ids: np.ndarray
    keypoints: np.ndarray
    depth_row: np.ndarray
    depth_paths: Strings
    depth_flags: np.ndarray
    depth_camera: np.ndarray
    depth_pose: np.ndarray


@dataclass(frozen=True, eq=False)
class PairColumns:
    """Columns of pairs; `image_a` and `image_b` are rows of `names`, which are the images' own where possible."""

    names: Strings
    image_a: np.ndarray
    image_b: np.ndarray
    places: Strings
    place: np.ndarray
    paths: Strings
    flags: np.ndarray
    count: np.ndarray


def _coded(values: list[str]) -> tuple[Strings, np.ndarray]:
    """The different values, and for each value its row (N,) among them."""
    codes: dict[str, int] = {}
    rows = np.array([codes.setdefault(value, len(codes)) for value in values], dtype=np.int32)
    return Strings.of(codes), rows


def pack_images(images: Mapping[str, SceneImage]) -> ImageColumns:
    """Columns of images.

    Raises:
        ValueError: if one stands under another name, or has not as many keypoints as points.
    """
    values = list(images.values())
    for name, image in images.items():
        ids, keypoints = image.point_ids, image.keypoints
        if image.name != name:
            raise ValueError(f"image {image.name} stands under the name {name}")
        if ids is not None and keypoints is not None and len(ids) != len(keypoints):
            raise ValueError(f"image {name} observes {len(ids)} points at {len(keypoints)} keypoints; expected as many")
    conditions, condition = _coded([image.condition for image in values])
    places, place = _coded([image.place for image in values])
    depths = [image.depth for image in values if image.depth is not None]
    depth_row = np.full(len(values), -1, np.int32)
    depth_row[[image.depth is not None for image in values]] = np.arange(len(depths))
    return ImageColumns(
        names=Strings.of(images),
        paths=Strings.of(str(image.path) for image in values),
        conditions=conditions,
        condition=condition,
        places=places,
        place=place,
        flags=np.array([_image_flags(image) for image in values], dtype=np.uint8),
        camera=_pack_cameras([image.camera for image in values]),
        pose=_pack_poses([image.cam_from_world for image in values]),
        **_pack_observations(values),
        depth_row=depth_row,
        depth_paths=Strings.of(str(depth.path) for depth in depths),
        depth_flags=np.array(
            [CAMERA * (d.camera is not None) | POSE * (d.image_from_depth is not None) for d in depths],
            dtype=np.uint8,
        ),
        depth_camera=_pack_cameras([depth.camera for depth in depths]),
        depth_pose=_pack_poses([depth.image_from_depth for depth in depths]),
    )


def _image_flags(image: SceneImage) -> int:
    known = (image.is_reference or None, image.camera, image.cam_from_world, image.point_ids, image.keypoints)
    return sum(1 << bit for bit, value in enumerate(known) if value is not None)


def _pack_observations(images: list[SceneImage]) -> dict[str, np.ndarray]:
    """The three columns of observations; where an image has points alone or keypoints alone, the others are zeros."""
    counts = [max(len(o) if o is not None else 0 for o in (i.point_ids, i.keypoints)) for i in images]
    offsets = np.zeros(len(images) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    point_ids, keypoints = np.zeros(offsets[-1], np.int64), np.zeros((offsets[-1], 2))
    for image, begin, end in zip(images, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if image.point_ids is not None:
            point_ids[begin:end] = np.asarray(image.point_ids)
        if image.keypoints is not None:
            keypoints[begin:end] = np.asarray(image.keypoints).reshape(-1, 2)
    return {"observations": offsets, "point_ids": point_ids, "keypoints": keypoints}


def _pack_cameras(cameras: list[Camera | None]) -> np.ndarray:
    packed = np.zeros((len(cameras), 10))
    for row, camera in enumerate(cameras):
        if camera is not None:
            packed[row, :2], packed[row, 2:] = camera.size.numpy(), camera.parameters.numpy()
    return packed


def _pack_poses(poses: list[Pose | None]) -> np.ndarray:
    packed = np.zeros((len(poses), 12))
    for row, pose in enumerate(poses):
        if pose is not None:
            packed[row, :9], packed[row, 9:] = pose.rotation.numpy().reshape(-1), pose.translation.numpy()
    return packed


def pack_pairs(pairs: Sequence[Pair], names: Strings) -> PairColumns:
    """Columns of pairs; they share the images' `names`, unless a pair names an image that is not there."""
    pairs = list(pairs)
    rows = dict(names.rows)
    image_a, image_b = (
        np.array([rows.setdefault(name, len(rows)) for name in side], dtype=np.int32)
        for side in ([pair.image_a for pair in pairs], [pair.image_b for pair in pairs])
    )
    places, place = _coded([pair.place for pair in pairs])
    return PairColumns(
        names=names if len(rows) == len(names) else Strings.of(rows),
        image_a=image_a,
        image_b=image_b,
        places=places,
        place=place,
        paths=Strings.of("" if pair.correspondences is None else str(pair.correspondences) for pair in pairs),
        flags=np.array([STATIC * p.static | FILE * (p.correspondences is not None) for p in pairs], dtype=np.uint8),
        count=np.array([pair.count for pair in pairs], dtype=np.int64),
    )


def make_images(columns: ImageColumns, rows: np.ndarray) -> list[SceneImage]:
    """The images of some rows; observations are views of the columns."""
    begins, ends = columns.observations[rows].tolist(), columns.observations[rows + 1].tolist()
    flags, depth_rows = columns.flags[rows].tolist(), columns.depth_row[rows].tolist()
    cameras, poses = columns.camera[rows], columns.pose[rows]
    texts = zip(
        columns.names.take(rows),
        columns.paths.take(rows),
        columns.conditions.take(columns.condition[rows]),
        columns.places.take(columns.place[rows]),
        strict=True,
    )
    images = []
    for i, (name, path, condition, place) in enumerate(texts):
        flag, seen = flags[i], slice(begins[i], ends[i])
        images.append(
            SceneImage(
                name=name,
                path=Path(path),
                condition=condition,
                place=place,
                camera=_make_camera(cameras[i]) if flag & CAMERA else None,
                cam_from_world=_make_pose(poses[i]) if flag & POSE else None,
                is_reference=bool(flag & REFERENCE),
                point_ids=columns.point_ids[seen] if flag & POINT_IDS else None,
                keypoints=columns.keypoints[seen] if flag & KEYPOINTS else None,
                depth=_make_depth(columns, depth_rows[i]) if depth_rows[i] >= 0 else None,
            )
        )
    return images


def _make_depth(columns: ImageColumns, row: int) -> Depth:
    flag = int(columns.depth_flags[row])
    return Depth(
        path=Path(columns.depth_paths[row]),
        camera=_make_camera(columns.depth_camera[row]) if flag & CAMERA else None,
        image_from_depth=_make_pose(columns.depth_pose[row]) if flag & POSE else None,
    )


def _make_camera(row: np.ndarray) -> Camera:
    numbers = torch.from_numpy(row.copy())  # a view, when pickled, would take the whole column with it
    return Camera(numbers[:2], numbers[2:])


def _make_pose(row: np.ndarray) -> Pose:
    numbers = torch.from_numpy(row.copy())
    return Pose(numbers[:9].view(3, 3), numbers[9:])


def make_pairs(columns: PairColumns, rows: np.ndarray) -> list[Pair]:
    """The pairs of some rows."""
    flags, counts = columns.flags[rows].tolist(), columns.count[rows].tolist()
    texts = zip(
        columns.names.take(columns.image_a[rows]),
        columns.names.take(columns.image_b[rows]),
        columns.places.take(columns.place[rows]),
        columns.paths.take(rows),
        strict=True,
    )
    return [
        Pair(
            image_a=a, image_b=b, place=place, correspondences=Path(path) if flags[i] & FILE else None,
            static=bool(flags[i] & STATIC), count=counts[i],
        )
        for i, (a, b, place, path) in enumerate(texts)
    ]  # fmt: skip
