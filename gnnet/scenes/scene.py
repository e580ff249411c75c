"""What every dataset layout becomes: images with cameras and poses, 3D points, and training pairs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose


@dataclass(frozen=True)
class Depth:
    """A depth map along the optical axis, and the camera that took it.

    Args:
        path: a 16-bit PNG in millimetres; 0 and 65535 are unknown.
        camera: of the depth map, unbatched, float64; None: the image's own (registered depth).
        image_from_depth: maps points of the depth camera to the image's camera; None: they are one.
    """

    path: Path
    camera: Camera | None = None
    image_from_depth: Pose | None = None


@dataclass(frozen=True)
class SceneImage:
    """One image of a scene; what a layout does not know is None.

    Args:
        name: unique in the scene, as the dataset's own files name it (posix path).
        path: the file on disk.
        condition: `night`, `snow`, …; `reference` where a dataset has one condition only.
        place: unit of the train/validation split: images of two places see nothing in common.
        camera: intrinsics, unbatched, float64.
        cam_from_world: pose, unbatched, float64, metres.
        is_reference: part of the map, so a localization sample may start from it.
        point_ids: (K,) rows of `Scene.points` that the image observes.
        keypoints: (K, 2) where it observes them, COLMAP pixels.
        depth: what is known of its depth map.
    """

    name: str
    path: Path
    condition: str
    place: str
    camera: Camera | None = None
    cam_from_world: Pose | None = None
    is_reference: bool = False
    point_ids: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    depth: Depth | None = None


@dataclass(frozen=True)
class Pair:
    """Two images of one place with known correspondences.

    These are listed in a file, or follow from what the scene knows: a camera that stands still, the
    images' depth maps and poses, or the 3D points that both observe.

    Args:
        image_a, image_b: names; they may be the same for a `static` pair.
        place: of both.
        correspondences: the `.mat` file that lists them.
        static: the camera stands still, so each pixel corresponds to itself.
        count: number of correspondences, 0 where it is not known.
    """

    image_a: str
    image_b: str
    place: str
    correspondences: Path | None = None
    static: bool = False
    count: int = 0


@dataclass(frozen=True)
class Scene:
    """Images by name, 3D points (P, 3) in metres (float64), and training pairs.

    `groups` names sets of conditions (`night-all`); `problems` are messages about broken input that
    was left out.
    """

    name: str
    images: dict[str, SceneImage]
    pairs: tuple[Pair, ...]
    points: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.float64))
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions present, sorted."""
        return tuple(sorted({image.condition for image in self.images.values()}))

    @property
    def places(self) -> tuple[str, ...]:
        """Places present, sorted."""
        return tuple(sorted({image.place for image in self.images.values()}))

    def with_conditions(self, conditions: list[str]) -> Scene:
        """The scene with references and images of `conditions` only; a pair stays if both images do.

        Raises:
            ValueError: if a condition is not in the scene.
        """
        unknown = sorted(set(conditions) - set(self.conditions))
        if unknown:
            raise ValueError(
                f"dataset.conditions names {', '.join(unknown)}, which {self.name} does not have; "
                f"it has {', '.join(self.conditions)}"
            )
        return self._restricted(
            {n: i for n, i in self.images.items() if i.is_reference or i.condition in conditions}
        )

    def with_places(self, places: set[str]) -> Scene:
        """The scene restricted to some places (points are kept, as images refer to them by row)."""
        return self._restricted({n: i for n, i in self.images.items() if i.place in places})

    def _restricted(self, images: dict[str, SceneImage]) -> Scene:
        pairs = tuple(p for p in self.pairs if p.image_a in images and p.image_b in images)
        return replace(self, images=images, pairs=pairs)

    def split(self, validation_fraction: float, seed: int) -> tuple[Scene, Scene]:
        """Train and validation scenes that share no place; the same on every machine.

        Places are ordered by a hash of (seed, place), so the split depends neither on the order in
        which files are listed nor on Python's hash seed.

        Raises:
            ValueError: if there is one place only, which cannot be split.
        """
        if len(self.places) < 2:
            raise ValueError(
                f"{self.name} holds {len(self.places)} place, so it cannot be split by place; "
                "give another dataset for validation (dataset.validation_root), or a smaller dataset.place_size"
            )
        order = sorted(self.places, key=lambda place: hashlib.sha256(f"{seed}/{place}".encode()).hexdigest())
        count = min(max(1, round(validation_fraction * len(order))), len(order) - 1)
        return self.with_places(set(order[count:])), self.with_places(set(order[:count]))
