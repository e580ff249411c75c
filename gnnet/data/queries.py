"""Queries of known pose with their references: what localization is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gnnet.data.batches import LocalizationBatch, View, collate
from gnnet.data.images import read_view
from gnnet.data.observed_points import observed_points, observes
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.sampling import turns
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene, SceneImage

PER_RADIAN = 10.0  # metres of a pose distance: an angle counts as the motion of what lies so far away


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
        seed: decides which points are drawn.
        on_bad: what the dataset does with broken input; maps of it do the same.
        name: the source's name in a mixture; empty where there is no mixture.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        points: int,
        largest_side: int | None,
        max_queries: int | None,
        seed: int,
        on_bad: OnBad = "raise",
        name: str = "",
    ) -> None:
        self.scene = scene
        self.on_bad: OnBad = on_bad
        self.points = points
        self.largest_side = largest_side
        self.seed = seed
        self.name = name
        self._max_queries = max_queries

    @cached_property
    def samples(self) -> list[LocalizationSample]:
        """What is validated, see `localization_samples`; a map needs none of it."""
        return _evenly(localization_samples(self.scene), self.scene, self._max_queries)

    def one_of_each_condition(self) -> list[LocalizationBatch]:
        """Batches of one query, the first of each condition."""
        conditions = [self.scene.images[sample.query].condition for sample in self.samples]
        return [collate([self[0, conditions.index(condition)]]) for condition in self.conditions]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of the queries, sorted."""
        return tuple(sorted({self.scene.images[sample.query].condition for sample in self.samples}))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> LocalizationBatch:
        """A sample: the query against its nearest reference; tensors without batch axis, lists of one."""
        index = key[1]
        query, reference = (self.scene.images[name] for name in self.samples[index])
        try:
            query_view, reference_view = (self._read(image) for image in (query, reference))
            origin = reference_view.cam_from_world.center()
            generator = np.random.default_rng((self.seed, index))
            observed = observed_points(
                self.scene, reference, reference_view.camera, count=self.points, generator=generator
            )
            return LocalizationBatch(
                query=_near(query_view, origin),
                reference=_near(reference_view, origin),
                points=(observed.points - origin).float(),
                keypoints=observed.keypoints.float(),
                valid=observed.valid,
                origin=origin,
                index=torch.tensor(index),
                condition=[query.condition],
                name=[query.name],
            )
        except Exception as error:
            raise RuntimeError(
                f"query {query.name} with reference {reference.name} of {self.scene.name} cannot be used: {error}"
            ) from error

    def take(self, rows: Sequence[int]) -> None:
        """Keep these samples only."""
        self.samples = [self.samples[row] for row in rows]

    def _read(self, image: SceneImage) -> View:
        view = read_view(image, self.largest_side)
        assert view.camera is not None
        return View(view.pixels, view.camera, _pose(image))


def _pose(image: SceneImage) -> Pose:
    assert image.cam_from_world is not None
    return image.cam_from_world


def _near(view: View, origin: Tensor) -> View:
    """A view in a world moved by `origin`, in float32."""
    pose = view.cam_from_world.shifted(origin)
    return View(view.image, view.camera.to(torch.float32), pose.to(torch.float32))


def nearest_by_pose(pose: Pose, others: Pose, count: int, *, per_radian: float = PER_RADIAN) -> Tensor:
    """Rows (min(count, R),) of the poses `others` (R,) nearest to a pose (), the nearest first.

    The distance is that of the camera centres plus the angle in radians · `per_radian`; of equal ones the lower row
    comes first.
    """
    distance, degrees = pose_errors(others, pose)
    return (distance + per_radian * degrees.deg2rad()).sort(stable=True).indices[:count]


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
    stacked = {place: Pose.stack([_pose(image) for image in images]) for place, images in by_place.items()}
    samples = []
    for query in sorted(queries, key=lambda image: image.name):
        candidates = by_place.get(query.place, [])
        rows: list[int] = []  # two, as the nearest may be the query itself
        if query.point_ids is not None:
            ids = [() if c.point_ids is None else c.point_ids for c in candidates]
            shared = [np.intersect1d(query.point_ids, i).size for i in ids]
            rows = np.argsort(-np.array(shared, np.int64), kind="stable")[:2].tolist()
        elif candidates:
            rows = nearest_by_pose(_pose(query), stacked[query.place], 2).tolist()
        nearest = next((candidates[n].name for n in rows if candidates[n].name != query.name), None)
        if nearest is not None:
            samples.append(LocalizationSample(query.name, nearest))
    if not samples:
        raise ValueError(
            f"{scene.name} holds no query with a pose and a reference image of the same place "
            f"({len(queries)} posed queries, {len(observing)} posed references with points or depth); "
            "localization needs a reconstruction and the poses of some queries"
        )
    return samples


def _evenly(samples: list[LocalizationSample], scene: Scene, count: int | None) -> list[LocalizationSample]:
    """At most `count` samples, in turn from each condition, and within it in turn from each place."""
    if count is None or len(samples) <= count:
        return samples
    kinds = [(scene.images[s.query].place, scene.images[s.query].condition) for s in samples]
    by_place = sorted(zip(turns(kinds), kinds, samples, strict=True))
    conditions = [condition for _, (_, condition), _ in by_place]
    order = sorted(zip(turns(conditions), conditions, range(len(by_place)), strict=True))
    return [by_place[row][2] for _, _, row in order[:count]]
