"""Pairs with known correspondences on which matching is measured, for scenes without poses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gnnet.data.batches import MatchingPair
from gnnet.data.images import read_view
from gnnet.data.photometric import Photometric
from gnnet.data.sift import detect_sift, strongest_spread
from gnnet.data.warps import cut_image, map_points, random_homography
from gnnet.sampling import turns
from gnnet.scenes.scene import Pair, Scene


class MatchingDataset(Dataset):
    """Pairs of a fixed camera's images with SIFT keypoints of the first, which are at the same pixels in the second.

    A photograph paired with itself is seen under a homography and another light instead.

    Args:
        scene: holds static pairs.
        keypoints: at most so many a pair, strong ones from everywhere in the image.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        max_pairs: so many are taken, evenly over conditions; None takes all.
        seed: decides which pairs are taken.
        name: the source's name in a mixture; empty where there is no mixture.

    Raises:
        ValueError: if the scene has no static pair.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        keypoints: int = 1000,
        largest_side: int | None,
        max_pairs: int | None,
        seed: int,
        name: str = "",
    ) -> None:
        self.scene = scene
        self.keypoints = keypoints
        self.largest_side = largest_side
        self.name = name
        self.seed = seed
        self.pairs = _evenly([pair for pair in scene.pairs if pair.static], scene, max_pairs, seed)
        if not self.pairs:
            raise ValueError(f"{scene.name} holds no pair of a fixed camera on which matching could be measured")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of the pairs, sorted."""
        return tuple(sorted({self._condition(pair) for pair in self.pairs}))

    def one_of_each_condition(self) -> dict[str, int]:
        """For each condition the index of its first pair."""
        conditions = [self._condition(pair) for pair in self.pairs]
        return {condition: conditions.index(condition) for condition in self.conditions}

    def _condition(self, pair: Pair) -> str:
        return "-".join(_conditions(pair, self.scene))

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: Sequence[int]) -> None:
        """Keep these pairs only."""
        self.pairs = [self.pairs[row] for row in rows]

    def __getitem__(self, key: tuple[int, int]) -> MatchingPair:
        index = key[1]
        pair = self.pairs[index]
        try:
            a, b = (
                read_view(self.scene.images[name], self.largest_side).pixels for name in (pair.image_a, pair.image_b)
            )
            keypoints_a = keypoints_b = strongest_spread(detect_sift(a, upright=True), self.keypoints)
            if pair.image_a == pair.image_b:
                b, keypoints_a, keypoints_b = self._seen_otherwise(a, keypoints_a, index)
        except Exception as error:
            raise RuntimeError(
                f"pair {pair.image_a} ↔ {pair.image_b} of {self.scene.name} cannot be used: {error}"
            ) from error
        name = f"{pair.image_a} {pair.image_b}"
        return MatchingPair(a, b, keypoints_a, keypoints_b, self._condition(pair), name, index)

    def _seen_otherwise(self, image: Tensor, keypoints: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """A square of the image under a homography and another light, and the keypoints that are in it."""
        generator = np.random.default_rng((self.seed, index))
        extent = image.shape[-1], image.shape[-2]
        size = min(extent)
        homography = random_homography(extent, np.array(extent) / 2, size, 0.7, generator)
        lit = Photometric.conditions()(cut_image(image, homography, size)[None], torch.Generator().manual_seed(index))
        xy = map_points(np.linalg.inv(homography), keypoints.double().numpy())
        inside = torch.from_numpy(((xy >= 0) & (xy <= size)).all(1))
        return (lit[0] * 255).round().to(torch.uint8), keypoints[inside], torch.from_numpy(xy)[inside].float()


def _conditions(pair: Pair, scene: Scene) -> tuple[str, ...]:
    return tuple(sorted(scene.images[name].condition for name in (pair.image_a, pair.image_b)))


def _evenly(pairs: list[Pair], scene: Scene, count: int | None, seed: int) -> list[Pair]:
    """At most `count` pairs, in turn from each pair of conditions; which ones follows from a hash of (seed, names)."""
    if count is None or len(pairs) <= count:
        return pairs
    order = sorted(pairs, key=lambda p: hashlib.sha256(f"{seed}/{p.image_a}/{p.image_b}".encode()).digest())
    turn = turns(_conditions(pair, scene) for pair in order)
    return [order[row] for row in sorted(range(len(order)), key=lambda row: turn[row])[:count]]
