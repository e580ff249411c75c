"""Samples from a Scene: correspondence pairs for training, queries with references for localization."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gnnet.data.batches import LocalizationBatch, PairBatch, View
from gnnet.data.correspondences import load_correspondences
from gnnet.data.transforms import crop_around, limit_size, read_image
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, rotation_angle
from gnnet.scenes.scene import Scene, SceneImage


class PairDataset(Dataset):
    """Image pairs with correspondences, drawn anew from (seed, epoch, index).

    Items are asked for by (epoch, index) and come as a `PairBatch` without batch axis and padding.

    Args:
        scene: with pairs.
        correspondences: at most so many of a pair's correspondences are drawn, without replacement.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        crop: both sides are cut to random squares of so many pixels; None keeps them whole.
        seed: of the draws.
    """

    def __init__(
        self, scene: Scene, *, correspondences: int, largest_side: int | None, crop: int | None, seed: int
    ) -> None:
        self.scene = scene
        self.correspondences = correspondences
        self.largest_side = largest_side
        self.crop = crop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.scene.pairs)

    def __getitem__(self, key: tuple[int, int]) -> PairBatch:
        epoch, index = key
        pair = self.scene.pairs[index]
        try:
            return self._draw(pair, index, np.random.default_rng((self.seed, epoch, index)))
        except Exception as error:
            source = f", {pair.correspondences}" if pair.correspondences else ""
            raise RuntimeError(
                f"pair {index} of {self.scene.name} ({pair.image_a} ↔ {pair.image_b}{source}) "
                f"cannot be used: {error}"
            ) from error

    def _draw(self, pair, index: int, generator: np.random.Generator) -> PairBatch:
        matches = load_correspondences(self.scene, pair)
        weight = np.asarray(matches.weight)
        anchor = int(generator.integers(len(weight)))
        images, keypoints = [], []
        for name, xy in ((pair.image_a, matches.keypoints_a), (pair.image_b, matches.keypoints_b)):
            image, factors = limit_size(read_image(self.scene.images[name].path), self.largest_side)
            xy = np.asarray(xy, dtype=np.float64) * factors
            if self.crop is not None:
                image, xy = crop_around(image, xy, anchor, self.crop, generator)
            images.append(image)
            keypoints.append(xy)
        inside = np.ones(len(weight), dtype=bool)
        for image, xy in zip(images, keypoints, strict=True):
            height, width = image.shape[-2:]
            inside &= ((xy >= 0) & (xy <= (width, height))).all(1)
        if not inside.any():
            raise ValueError("no correspondence lies inside both images")
        chosen = np.flatnonzero(inside)
        if len(chosen) > self.correspondences:
            chosen = generator.choice(chosen, self.correspondences, replace=False)
        return PairBatch(
            image_a=images[0],
            image_b=images[1],
            keypoints_a=torch.from_numpy(keypoints[0][chosen]).float(),
            keypoints_b=torch.from_numpy(keypoints[1][chosen]).float(),
            weight=torch.from_numpy(weight[chosen]).float(),
            valid=torch.ones(len(chosen), dtype=torch.bool),
            index=torch.tensor(index),
        )


class LocalizationSample(NamedTuple):
    """Names of a query and of the reference image that it is localized against."""

    query: str
    reference: str


class LocalizationDataset(Dataset):
    """Queries of known pose with the nearest reference image and the points that it observes.

    Items are asked for by (epoch, index); the points of a sample follow from its index alone, so
    every validation sees the same.

    Args:
        scene: with references, poses and cameras.
        points: at most so many 3D points a sample.
        largest_side: images (and cameras) are shrunk to it, in pixels; None keeps them.
        max_queries: at most so many queries, spread evenly over conditions and places; None takes all.
        seed: of the points drawn.
    """

    def __init__(
        self, scene: Scene, *, points: int, largest_side: int | None, max_queries: int | None, seed: int
    ) -> None:
        self.scene = scene
        self.points = points
        self.largest_side = largest_side
        self.seed = seed
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
        index = key[1]
        sample = self.samples[index]
        query, reference = self.scene.images[sample.query], self.scene.images[sample.reference]
        try:
            ids = reference.point_ids
            if len(ids) > self.points:
                ids = np.random.default_rng((self.seed, index)).choice(ids, self.points, replace=False)
            origin = reference.cam_from_world.center()
            return LocalizationBatch(
                query=self._view(query, origin),
                reference=self._view(reference, origin),
                points=(self.scene.points[ids] - origin).float(),
                valid=torch.ones(len(ids), dtype=torch.bool),
                origin=origin,
                index=torch.tensor(index),
                condition=query.condition,
                name=query.name,
            )
        except Exception as error:
            raise RuntimeError(
                f"query {sample.query} with reference {sample.reference} of {self.scene.name} cannot be used: {error}"
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


def localization_samples(scene: Scene) -> list[LocalizationSample]:
    """Each query of known pose with its nearest reference of the same place.

    Queries are the images that are no references; where all are references (a COLMAP model), each
    is localized against another. The nearest sees most of the query's points, or, where the query
    has none, minimizes camera distance (m) + angle (rad) · 10 m.

    Raises:
        ValueError: if no query has both a pose and a reference.
    """
    posed = [i for i in scene.images.values() if i.cam_from_world is not None and i.camera is not None]
    references = [i for i in posed if i.is_reference and i.point_ids is not None and len(i.point_ids)]
    queries = [i for i in posed if not i.is_reference] or references
    by_place: dict[str, list[SceneImage]] = {}
    for reference in references:
        by_place.setdefault(reference.place, []).append(reference)
    stacked = {place: Pose.stack([i.cam_from_world for i in images]) for place, images in by_place.items()}
    samples = []
    for query in sorted(queries, key=lambda image: image.name):
        candidates = by_place.get(query.place, [])
        others = [n for n, candidate in enumerate(candidates) if candidate.name != query.name]
        if not others:
            continue
        pose = stacked[query.place]
        if query.point_ids is not None:
            score = [-np.intersect1d(query.point_ids, candidates[n].point_ids).size for n in others]
        else:
            relative = pose.rotation @ query.cam_from_world.rotation.T
            distance = (pose.center() - query.cam_from_world.center()).norm(dim=-1)
            score = (distance + 10 * rotation_angle(relative))[others].tolist()
        samples.append(LocalizationSample(query.name, candidates[others[int(np.argmin(score))]].name))
    if not samples:
        raise ValueError(
            f"{scene.name} holds no query with a pose and a reference image of the same place "
            f"({len(queries)} posed queries, {len(references)} references with points); "
            "localization needs a reconstruction and the poses of some queries"
        )
    return samples


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


def collate_pairs(items: list[PairBatch]) -> PairBatch:
    """Stack pairs; shorter keypoint lists and smaller images are padded (bottom, right) with zeros."""
    count = max(len(item.weight) for item in items)
    keypoints_a, keypoints_b, weight, valid = (
        torch.stack([_pad_rows(getattr(item, field), count) for item in items])
        for field in ("keypoints_a", "keypoints_b", "weight", "valid")
    )
    return PairBatch(
        image_a=_stack_images([item.image_a for item in items]),
        image_b=_stack_images([item.image_b for item in items]),
        keypoints_a=keypoints_a,
        keypoints_b=keypoints_b,
        weight=weight,
        valid=valid,
        index=torch.stack([item.index for item in items]),
    )


def collate_localization(items: list[LocalizationBatch]) -> LocalizationBatch:
    """Stack localization samples; shorter point lists and smaller images are padded with zeros."""
    count = max(len(item.points) for item in items)

    def views(views: list[View]) -> View:
        return View(
            image=_stack_images([v.image for v in views]),
            camera=Camera.stack([v.camera for v in views]),
            cam_from_world=Pose.stack([v.cam_from_world for v in views]),
        )

    return LocalizationBatch(
        query=views([item.query for item in items]),
        reference=views([item.reference for item in items]),
        points=torch.stack([_pad_rows(item.points, count) for item in items]),
        valid=torch.stack([_pad_rows(item.valid, count) for item in items]),
        origin=torch.stack([item.origin for item in items]),
        index=torch.stack([item.index for item in items]),
        condition=[item.condition for item in items],
        name=[item.name for item in items],
    )


def _pad_rows(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _stack_images(images: list[Tensor]) -> Tensor:
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return torch.stack([F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images])
