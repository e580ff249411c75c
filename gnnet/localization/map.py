"""The reference map: what localization needs of every reference image, computed once and kept in one file.

Of each reference it holds the 3D points that it observes with their descriptors at every level, a
global descriptor, pose and camera, and which other references see the same points. So localizing a
query runs the network on the query alone, and reads what it needs of the map from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gnnet.arrays import ArrayFile
from gnnet.data.tracks import Tracks
from gnnet.geometry.camera import PARAMETER_COUNTS, Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.global_descriptors import Whitening
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import fingerprint
from gnnet.sampling import evenly

_FOR_DEPTH = 16  # references whose points tell the map's depth
NEIGHBOURS = 32  # covisible references that are kept for each reference


class Observations(NamedTuple):
    """What some references observe, M observations of a point by a reference.

    `points` (M, 3) float64 metres in the world, each on the ray of its keypoint; `ids` (M,) rows of the scene's
    points, -1 where they come from depth; `keypoints` (M, 2) pixels of the reference at which they are described;
    `descriptors` (M, C_l) of each level; `valid` (M, levels) whether the descriptor is known; `reference` (M,) row
    of the map; `confidence` (M, levels) in the descriptors, None of a network that gives none.
    """

    points: Tensor
    ids: Tensor
    keypoints: Tensor
    descriptors: tuple[Tensor, ...]
    valid: Tensor
    reference: Tensor
    confidence: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Observations]) -> Observations:
        """Those of several sets, one after another."""

        def whole(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        descriptors = tuple(map(torch.cat, zip(*(part.descriptors for part in parts), strict=True)))
        return cls(
            whole("points"), whole("ids"), whole("keypoints"), descriptors, whole("valid"), whole("reference"),
            None if parts[0].confidence is None else whole("confidence"),
        )  # fmt: skip

    def select(self, rows: Tensor) -> Observations:
        """Some of them, by rows (K,) or a mask (M,)."""
        return Observations(
            points=self.points[rows],
            ids=self.ids[rows],
            keypoints=self.keypoints[rows],
            descriptors=tuple(level[rows] for level in self.descriptors),
            valid=self.valid[rows],
            reference=self.reference[rows],
            confidence=None if self.confidence is None else self.confidence[rows],
        )

    def by_point(self) -> tuple[Observations, Tensor]:
        """One observation of each point, and the row (M,) there of each of these.

        Its point is the mean of theirs, its descriptor has the mean direction and the mean length of those that are
        known, its confidence is the mean of theirs; keypoint and reference are of the first one. Observations of points
        that have no id stay apart.
        """
        order = torch.arange(len(self.ids), device=self.ids.device)
        found, row = torch.where(self.ids < 0, -1 - order, self.ids).unique(return_inverse=True)
        first = row.new_full((len(found),), len(order)).scatter_reduce(0, row, order, "amin")
        descriptors = []
        for level, known in zip(self.descriptors, self.valid.unbind(-1), strict=True):
            vectors = torch.where(known[:, None], level.float(), 0)
            total = vectors.new_zeros(len(found), level.shape[1]).index_add(0, row, vectors)
            lengths = vectors.new_zeros(len(found)).index_add(0, row, vectors.norm(dim=-1))
            count = vectors.new_zeros(len(found)).index_add(0, row, known.float()).clamp(min=1)
            descriptors.append(torch.nn.functional.normalize(total, dim=-1) * (lengths / count)[:, None])
        valid = self.valid.new_zeros(len(found), self.valid.shape[1]).index_put((row,), self.valid, accumulate=True)
        points = self.points.new_zeros(len(found), 3).index_add(0, row, self.points) / row.bincount()[:, None]
        merged = self.select(first)._replace(points=points, descriptors=tuple(descriptors), valid=valid)
        if self.confidence is None:
            return merged, row
        known, zeros = self.valid.float(), self.confidence.new_zeros(valid.shape)
        total, count = (zeros.index_add(0, row, each) for each in (self.confidence * known, known))
        return merged._replace(confidence=total / count.clamp(min=1)), row


@dataclass(frozen=True, eq=False)
class Map:
    """A compiled map, read from its file as it is needed, see `gnnet.localization.compile`.

    Args:
        file: the open file.
    """

    file: ArrayFile

    @classmethod
    def open(cls, path: str | Path) -> Map:
        """A map that was compiled before.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no map, is damaged, or was not compiled to its end.
        """
        file = ArrayFile(path)
        check_layout(file)
        if not file["finished"][0]:
            raise ValueError(f"map {path} was not compiled to its end; run the same command again, and it goes on")
        return cls(file)

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def about(self) -> dict:
        """What the map was made of: fingerprints of network and scene, and settings."""
        return self.file.about["made of"]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the references (R,)."""
        return tuple(self.file.about["names"])

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Places of the references (R,)."""
        return tuple(self.file.about["places"])

    @property
    def retrieve_within(self) -> tuple[str, ...]:
        """What a query has in common with the references worth searching, see `Scene.retrieve_within`."""
        return tuple(self.file.about.get("retrieve within", ()))

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each reference by its name."""
        return {name: row for row, name in enumerate(self.names)}

    @property
    def largest_side(self) -> int | None:
        """Pixels that images are shrunk to, queries too; None keeps them."""
        return self.about["largest_side"]

    @cached_property
    def poses(self) -> Pose:
        """`cam_from_world` (R,) of the references, float64."""
        return Pose(*(torch.from_numpy(np.array(self.file[name])) for name in ("rotation", "translation")))

    @cached_property
    def cameras(self) -> Camera:
        """Cameras (R,) of the references' images as they are on disk, float64."""
        values = torch.from_numpy(np.array(self.file["camera"]))
        return Camera(values[:, :2], values[:, 2:])

    @cached_property
    def depth(self) -> float:
        """Median distance of some references to the points that they observe, in the world's unit; 1 without any."""
        offsets, counts, centers = self.file["offsets"], self.file["count"], self.poses.center().numpy()
        distances = [
            np.linalg.norm(self.file["points"][offsets[row] : offsets[row] + counts[row]] - centers[row], axis=1)
            for row in evenly(len(self.names), _FOR_DEPTH)
        ]
        found = np.concatenate(distances)
        return float(np.median(found)) if len(found) else 1.0

    @property
    def image_sizes(self) -> Tensor:
        """(R, 2) width and height of the references' images in the pixels of their keypoints."""
        sizes = self.cameras.size
        if self.largest_side is None:
            return sizes
        return sizes * (self.largest_side / sizes.amax(-1, keepdim=True)).clamp(max=1)

    @property
    def global_descriptors(self) -> np.ndarray:
        """(R, d) float32 of length 1, mapped from the file."""
        return self.file["global"]

    @cached_property
    def whitening(self) -> Whitening:
        """What turns a network's global descriptor into one of the map's."""
        parts = (self.file[f"whitening/{part}"] for part in ("mean", "projection"))
        return Whitening(*(torch.from_numpy(np.array(part)) for part in parts))

    @property
    def levels(self) -> int:
        """Number of levels of the descriptors."""
        return len(self.about["channels"])

    def shared(self, rows: Tensor) -> Tensor:
        """How many points references (K,) observe in common, (K, K); each knows its best `NEIGHBOURS` only."""
        neighbours, counts = (np.asarray(self.file[name][rows.numpy()]) for name in ("neighbours", "shared"))
        same = torch.from_numpy(neighbours)[:, :, None] == rows[None, None]  # [K, N, K]
        shared = (same * torch.from_numpy(counts)[:, :, None]).sum(1)
        return torch.maximum(shared, shared.T)

    @property
    def tracks(self) -> Tracks:
        """Where the references observe the scene's points; empty where the points come from depth."""
        return Tracks(*(self.file[f"tracks/{part}"] for part in Tracks._fields))

    def observations(self, rows: Tensor, *, excluded: int | None = None) -> Observations:
        """The observations of some references, rows (K,), one reference after another.

        Args:
            rows: of the map.
            excluded: row of a reference that is itself being localized. Points that it saw are triangulated anew
                from the others' observations, and left out where these do not fix them, see `triangulate`: one alone,
                or all from one direction. Points from depth do not depend on another image, and stay.
        """
        offsets = self.file["offsets"]
        counts = self.file["count"]
        each = [np.arange(offsets[row], offsets[row] + counts[row]) for row in rows.tolist()]
        index = np.concatenate([*each, np.zeros(0, np.int64)])

        def take(name: str) -> Tensor:
            return torch.from_numpy(np.asarray(self.file[name][index]))

        found = Observations(
            points=take("points"),
            ids=take("ids"),
            keypoints=take("keypoints"),
            descriptors=tuple(take(f"descriptors/{level}").float() for level in range(self.levels)),
            valid=take("valid").bool(),
            reference=torch.repeat_interleave(rows, torch.tensor([len(i) for i in each], dtype=torch.int64)),
            confidence=take("confidence").float() if "confidence" in self.file.arrays else None,
        )
        return found if excluded is None else self._without(found, excluded)

    def _without(self, observations: Observations, excluded: int) -> Observations:
        points, saw, fixed = self.tracks.without(excluded, observations.ids, self.poses, self.cameras)
        poses = self.poses[observations.reference]  # each stays on the ray of its keypoint, and takes the new depth
        before, depth = (poses.transform(p[:, None]) for p in (observations.points, points))
        ratio = depth[..., 2:] / before[..., 2:]
        points, fixed = poses.inverse().transform(before * ratio).squeeze(1), fixed & (ratio[:, 0, 0] > 0)
        points = torch.where(saw[:, None], points, observations.points)
        return observations._replace(points=points).select(~saw | fixed)


@dataclass(frozen=True, eq=False)
class References:
    """Some references of a map, which a query is compared with; what they observe is read when it is asked for.

    Args:
        map: the map.
        rows: (K,) of the map, the best first.
        companion: the same references in the map of local features; None without one.
        excluded: row of the reference that the query itself is, see `Map.observations`.
    """

    map: Map
    rows: Tensor
    companion: References | None = None
    excluded: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.map.names[row] for row in self.rows.tolist())

    @cached_property
    def observations(self) -> Observations:
        """All that they observe, (M,)."""
        return self.map.observations(self.rows, excluded=self.excluded)

    def observed_by(self, rows: Tensor) -> Observations:
        """What some of them, rows (K,) of the map, observe."""
        return self.observations.select(torch.isin(self.observations.reference, rows))


def made_with(
    network: FeatureNetwork, local_features: str | None, retrieval_network: nn.Module | None
) -> dict[str, str | None]:
    """What a map and a localizer on it must have in common.

    `local_features` is the identity of those that describe the points, None if the network's maps do;
    `retrieval_network` gives the global descriptors, None if they are the GeM of the network's maps.
    """
    return {
        "network": fingerprint(network),
        "local features": local_features,
        "retrieval": "gem" if retrieval_network is None else fingerprint(retrieval_network),
    }


def map_arrays(
    count: int, total: int, channels: Sequence[int], global_dimensions: int, small: int, tracks: tuple[int, int],
    *, camera: int, confidence: bool = False,
) -> dict[str, tuple[str, tuple[int, ...]]]:  # fmt: skip
    """Types and shapes of a map's arrays.

    Args:
        count, total: number of references, and of their observations.
        channels: of each level's descriptors.
        global_dimensions, small: of global descriptors before and after whitening.
        tracks: number of points, and of their observations.
        camera: numbers of each camera, its size included.
        confidence: whether the network gives any.
    """
    beside = {"confidence": ("f2", (total, len(channels)))} if confidence else {}
    return beside | {
        "finished": ("u1", (1,)), "done": ("u1", (count,)), "count": ("i8", (count,)), "offsets": ("i8", (count,)),
        "rotation": ("f8", (count, 3, 3)), "translation": ("f8", (count, 3)), "camera": ("f8", (count, camera)),
        "neighbours": ("i4", (count, NEIGHBOURS)), "shared": ("i4", (count, NEIGHBOURS)),
        "global": ("f4", (count, small)), "global/raw": ("f2", (count, global_dimensions)),
        "whitening/mean": ("f4", (global_dimensions,)), "whitening/projection": ("f4", (global_dimensions, small)),
        "points": ("f8", (total, 3)), "ids": ("i8", (total,)), "keypoints": ("f4", (total, 2)),
        "valid": ("u1", (total, len(channels))),
        "tracks/offsets": ("i8", (tracks[0] + 1,)), "tracks/images": ("i4", (tracks[1],)),
        "tracks/keypoints": ("f4", (tracks[1], 2)),
        **{f"descriptors/{level}": ("f2", (total, c)) for level, c in enumerate(channels)},
    }  # fmt: skip


def check_layout(file: ArrayFile) -> None:
    """Raise ValueError if a file holds other arrays than a map does."""
    try:
        count, channels = len(file.about["names"]), file.about["made of"]["channels"]
        tracks = file.shape("tracks/offsets")[0] - 1, file.shape("tracks/images")[0]
        numbers, raw, small = file.shape("camera")[1], *file.shape("whitening/projection")
        expected = map_arrays(
            count, file.shape("points")[0], channels, raw, small, tracks, camera=numbers,
            confidence="confidence" in file.arrays,
        )  # fmt: skip
        fits = file.arrays == expected and len(file.about["places"]) == count and numbers - 2 in PARAMETER_COUNTS
    except (KeyError, TypeError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{file.path} holds other arrays than a map; delete it, or name another file")
