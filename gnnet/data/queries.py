"""Queries of known pose with their references: what localization is validated on."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gnnet.data.batches import LocalizationBatch, View, pad_rows, stack_images
from gnnet.data.depth import depth_points, lift_keypoints
from gnnet.data.images import limit_size, read_image
from gnnet.data.sift import detect_sift, strongest_spread
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, rotation_angle
from gnnet.scenes.scene import Scene, SceneImage

METRES_PER_RADIAN = 10.0  # of a pose distance: an angle counts as the motion of what lies so far away


class LocalizationSample(NamedTuple):
    """Names of a query and of the reference image that it is localized against."""

    query: str
    reference: str


class LocalizationDataset(Dataset):
    """Queries of known pose with the nearest reference image and the points that it observes.

    Items are asked for by (epoch, index); the points of a sample follow from its index alone, so
    every validation sees the same. Where the scene has no 3D points, they come from the reference's depth.

    Args:
        scene: with references, poses and cameras.
        points: at most so many 3D points a sample.
        largest_side: images (and cameras) are shrunk to it, in pixels; None keeps them.
        max_queries: at most so many queries, spread evenly over conditions and places; None takes all.
        seed: of the points drawn.
        name: of the source, where there are several.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        points: int,
        largest_side: int | None,
        max_queries: int | None,
        seed: int,
        name: str = "",
    ) -> None:
        self.scene = scene
        self.points = points
        self.largest_side = largest_side
        self.seed = seed
        self.name = name
        self.samples = _evenly(localization_samples(scene), scene, max_queries)

    def one_of_each_condition(self) -> list[LocalizationBatch]:
        """Batches of one query, the first of each condition."""
        first: dict[str, int] = {}
        for index, sample in enumerate(self.samples):
            first.setdefault(self.scene.images[sample.query].condition, index)
        return [collate_localization([self[0, index]]) for _, index in sorted(first.items())]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of the queries, sorted."""
        return tuple(sorted({self.scene.images[sample.query].condition for sample in self.samples}))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> LocalizationBatch:
        """A sample: the query against its nearest reference, without batch axis."""
        index = key[1]
        query, reference = (self.scene.images[name] for name in self.samples[index])
        try:
            origin = reference.cam_from_world.center()
            points, _, _ = observed_points(
                self.scene, reference, self.points, np.random.default_rng((self.seed, index))
            )
            return LocalizationBatch(
                query=self._view(query, origin),
                reference=self._view(reference, origin),
                points=(points - origin).float(),
                valid=torch.ones(len(points), dtype=torch.bool),
                origin=origin,
                index=torch.tensor(index),
                condition=query.condition,
                name=query.name,
            )
        except Exception as error:
            raise RuntimeError(
                f"query {query.name} with reference {reference.name} of {self.scene.name} cannot be used: {error}"
            ) from error

    def _view(self, image: SceneImage, origin: Tensor) -> View:
        pixels, factors = limit_size(read_image(image.path), self.largest_side)
        camera = image.camera.scale(torch.from_numpy(factors))
        expected = tuple(camera.size.round().int().tolist())
        if expected != (pixels.shape[-1], pixels.shape[-2]):
            raise ValueError(
                f"{image.path} is {pixels.shape[-1]}×{pixels.shape[-2]} pixels, "
                f"its camera says {expected[0]}×{expected[1]}"
            )
        pose = image.cam_from_world
        moved = Pose(pose.rotation, pose.translation + pose.rotation @ origin)
        return View(image=pixels, camera=camera.to(torch.float32), cam_from_world=moved.to(torch.float32))


def observed_points(
    scene: Scene, reference: SceneImage, count: int, generator: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray | None]:
    """At most `count` 3D points (N, 3) that a reference observes, float64, their rows in `scene.points` (N,), and
    where it observes them, keypoints (N, 2) in pixels of the file.

    Where the scene has none, they come from the reference's depth, and their rows are -1: where SIFT finds
    something to see, then anywhere, evenly spread; they are where the pose projects them, so no keypoints come.

    Raises:
        FileNotFoundError, ValueError: if image or depth map are missing or broken.
    """
    ids = reference.point_ids
    if ids is not None:
        ids = np.asarray(ids, np.int64)
        rows = generator.choice(len(ids), count, replace=False) if len(ids) > count else np.arange(len(ids))
        keypoints = None if reference.keypoints is None else np.asarray(reference.keypoints, np.float64)[rows]
        return scene.points[torch.from_numpy(ids[rows])], ids[rows], keypoints
    keypoints = strongest_spread(detect_sift(read_image(reference.path)), count)
    points, valid = lift_keypoints(reference, keypoints.double().numpy())
    found = points[valid]
    if len(found) < count:
        others = depth_points(reference, count=count - len(found), generator=generator)[0]
        found = np.concatenate([found, others])
    return torch.from_numpy(found), np.full(len(found), -1), None


def localization_samples(scene: Scene) -> list[LocalizationSample]:
    """Each query of known pose with the nearest reference of the same place.

    Queries are the images that are no references; where all are references (a COLMAP model), each
    is localized against another. The nearest sees most of the query's points, or, where the query
    has none, has the smallest camera distance (m) + angle (rad) · 10 m.

    Args:
        scene: with posed images; references observe 3D points or have depth.

    Raises:
        ValueError: if no query has both a pose and a reference.
    """
    posed = [i for i in scene.images.values() if i.cam_from_world is not None and i.camera is not None]
    observing = [i for i in posed if i.is_reference and observes(i)]
    queries = [i for i in posed if not i.is_reference] or observing
    by_place: dict[str, list[SceneImage]] = {}
    for reference in observing:
        by_place.setdefault(reference.place, []).append(reference)
    stacked = {place: Pose.stack([i.cam_from_world for i in images]) for place, images in by_place.items()}
    samples = []
    for query in sorted(queries, key=lambda image: image.name):
        candidates = by_place.get(query.place, [])
        if query.point_ids is not None:
            score = np.array([-np.intersect1d(query.point_ids, c.point_ids).size for c in candidates], np.float64)
        elif candidates:
            pose = stacked[query.place]
            relative = pose.rotation @ query.cam_from_world.rotation.T
            distance = (pose.center() - query.cam_from_world.center()).norm(dim=-1)
            score = (distance + METRES_PER_RADIAN * rotation_angle(relative)).numpy()
        ranked = [candidates[n].name for n in (np.argsort(score, kind="stable")[:2] if candidates else [])]
        nearest = next((name for name in ranked if name != query.name), None)
        if nearest is not None:
            samples.append(LocalizationSample(query.name, nearest))
    if not samples:
        raise ValueError(
            f"{scene.name} holds no query with a pose and a reference image of the same place "
            f"({len(queries)} posed queries, {len(observing)} posed references with points or depth); "
            "localization needs a reconstruction and the poses of some queries"
        )
    return samples


def observes(image: SceneImage) -> bool:
    """Whether an image has depth, or observes 3D points."""
    return image.depth is not None or (image.point_ids is not None and len(image.point_ids) > 0)


def _evenly(samples: list[LocalizationSample], scene: Scene, count: int | None) -> list[LocalizationSample]:
    """At most `count` samples, in turn from each condition, and within it in turn from each place."""
    if count is None or len(samples) <= count:
        return samples
    seen: Counter = Counter()  # so many of a (condition, place), and then of a condition, came before
    turns = []
    for sample in samples:
        image = scene.images[sample.query]
        turns.append((seen[image.condition, image.place], image.place, image.condition, sample))
        seen[image.condition, image.place] += 1
    rounds = []
    for _, _, condition, sample in sorted(turns):
        rounds.append((seen[condition], condition, sample))
        seen[condition] += 1
    return [sample for _, _, sample in sorted(rounds)[:count]]


def collate_localization(items: list[LocalizationBatch]) -> LocalizationBatch:
    """Stack localization samples; shorter point lists and smaller images are padded with zeros."""
    count = max(len(item.points) for item in items)

    def views(views: list[View]) -> View:
        return View(
            image=stack_images([v.image for v in views]),
            camera=Camera.stack([v.camera for v in views]),
            cam_from_world=Pose.stack([v.cam_from_world for v in views]),
        )

    return LocalizationBatch(
        query=views([item.query for item in items]),
        reference=views([item.reference for item in items]),
        points=torch.stack([pad_rows(item.points, count) for item in items]),
        valid=torch.stack([pad_rows(item.valid, count) for item in items]),
        origin=torch.stack([item.origin for item in items]),
        index=torch.stack([item.index for item in items]),
        condition=[item.condition for item in items],
        name=[item.name for item in items],
    )
