"""Training pairs drawn from a Scene: images, cut or warped each on its own, with their correspondences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gnnet.data.batches import PairBatch, pad_rows, stack_images
from gnnet.data.correspondences import PairPoints
from gnnet.data.images import (
    cut_image,
    even_subset,
    limit_size,
    map_points,
    random_crop,
    random_homography,
    read_image,
)
from gnnet.data.timelapse import PlaceStructure
from gnnet.scenes.formats.correspondences import Correspondences
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Pair, Scene

_TRIES = 4  # of cutting a pair, until it keeps a quarter of the correspondences wanted
_SPARE = 3  # points drawn for each wanted: not every point is seen by both, or lies in both squares
_CORNERS = np.array([[0.0, 0.0], [1, 0], [0, 1], [1, 1]])
_OTHERS = 20  # pairs tried in place of broken ones


class NothingInCommon(Exception):
    """Images have no visible point in common as drawn: no damage, another pair is drawn."""


class PairDataset(Dataset):
    """Image pairs with correspondences, drawn anew from (seed, epoch, index).

    Items are asked for by (epoch, index) and come as a `PairBatch` without batch axis and padding.

    Args:
        scene: with pairs.
        correspondences: at most so many of a pair's correspondences are drawn, evenly over the image and
            without replacement.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        crop: both sides are cut to random squares of so many pixels; None keeps them whole.
        warp: strength of the random homography under which each side's square is cut, see
            `random_homography`; 0 cuts upright squares of the image's own scale.
        seed: of the draws.
        on_bad: a broken pair ends the training, or another is drawn in its place.

    Raises:
        ValueError: for a warp without a crop.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        correspondences: int,
        largest_side: int | None,
        crop: int | None,
        warp: float = 0.0,
        seed: int,
        on_bad: OnBad = "raise",
    ) -> None:
        if warp > 0 and crop is None:
            raise ValueError(f"dataset.warp={warp:g} wants dataset.crop, the side of the squares in pixels")
        self.scene = scene
        self.correspondences = correspondences
        self.largest_side = largest_side
        self.crop = crop
        self.warp = warp
        self.seed = seed
        self.on_bad = on_bad
        self._structure = PlaceStructure(scene)

    def __len__(self) -> int:
        return len(self.scene.pairs)

    def __getitem__(self, key: tuple[int, int]) -> PairBatch:
        epoch, index = key
        generator = np.random.default_rng((self.seed, epoch, index))
        for skipped in range(_OTHERS):
            pair = self.scene.pairs[index]
            try:
                return self._draw(pair, index, generator)._replace(skipped=torch.tensor(skipped))
            except NothingInCommon as error:
                last = self._message(index, error)
            except Exception as error:
                last = self._message(index, error)
                if self.on_bad == "raise" or not isinstance(error, OSError | ValueError):
                    raise RuntimeError(last) from error
            index = int(generator.integers(len(self)))
        raise RuntimeError(f"{_OTHERS} pairs in a row cannot be used; the last: {last}")

    def _message(self, index: int, error: Exception) -> str:
        pair = self.scene.pairs[index]
        source = f", {pair.correspondences}" if pair.correspondences else ""
        return f"pair {index} of {self.scene.name} ({pair.image_a} ↔ {pair.image_b}{source}) cannot be used: {error}"

    def _draw(self, pair: Pair, index: int, generator: np.random.Generator) -> PairBatch:
        whole = [read_image(self.scene.images[name].path) for name in dict.fromkeys((pair.image_a, pair.image_b))]
        size = whole[0].shape[-1], whole[0].shape[-2]
        images, factors = zip(*(limit_size(image, self.largest_side) for image in whole), strict=True)
        images, factors = (images[0], images[-1]), (factors[0], factors[-1])
        points = PairPoints(self.scene, pair, size=size, structure=self._structure)
        spare = _SPARE * self.correspondences
        matches = points.draw(spare if self.crop is None else self.correspondences, generator)
        if len(matches.weight) == 0:
            raise NothingInCommon("its images see nothing in common by their depth maps")
        matches = _in_both(matches, images, factors)
        if len(matches.weight) == 0:
            raise ValueError(
                "no correspondence with a weight lies inside both images; are its pixels those of these images?"
            )
        if self.crop is not None:
            cuts = self._cuts(images, matches, points.endless, generator)
            if points.endless:  # those drawn have told where the images look alike: more of them there
                window = map_points(cuts[0], self.crop * _CORNERS) / factors[0]
                window = (*window.min(0), *window.max(0))
                matches = _in_both(points.draw(spare, generator, window), images, factors)
            matches = _in_cuts(matches, cuts, self.crop)
            images = [cut_image(image, cut, self.crop) for image, cut in zip(images, cuts, strict=True)]
            if len(matches.weight) == 0:
                raise NothingInCommon("its images, cut at random, see nothing in common")
        extent = images[0].shape[-1], images[0].shape[-2]
        chosen = even_subset(matches.keypoints_a, extent, self.correspondences, generator)
        return PairBatch(
            image_a=images[0],
            image_b=images[1],
            keypoints_a=torch.from_numpy(matches.keypoints_a[chosen]).float(),
            keypoints_b=torch.from_numpy(matches.keypoints_b[chosen]).float(),
            weight=torch.from_numpy(np.asarray(matches.weight)[chosen]).float(),
            valid=torch.ones(len(chosen), dtype=torch.bool),
            index=torch.tensor(index),
            skipped=torch.tensor(0),
        )

    def _cuts(
        self, images: tuple[Tensor, Tensor], matches: Correspondences, endless: bool, generator: np.random.Generator
    ) -> list[np.ndarray]:
        """How each side is cut, as `image_from_square`: the best of a few tries.

        Each side is cut on its own, so that position in the image tells nothing.

        Args:
            images: of the pair.
            matches: that both images see.
            endless: they are a sample of what there is, not all.
            generator: of the cuts.
        """
        extents = [(image.shape[-1], image.shape[-2]) for image in images]
        share = min(1.0, self.crop**2 / np.prod(extents[0])) if endless else 1.0
        wanted = max(1, min(self.correspondences, int(share * len(matches.weight))) // 4)
        likely = matches.weight.cumsum(dtype=np.float64)  # float32 rounds a draw up to the end, and beyond
        best, most = [], -1
        for _ in range(_TRIES):
            anchor = int(np.searchsorted(likely, generator.random() * likely[-1], side="right"))
            cuts = [
                random_homography(extent, xy[anchor], self.crop, self.warp, generator)
                if self.warp > 0
                else random_crop(extent, xy[anchor], self.crop, generator)
                for xy, extent in zip(matches[:2], extents, strict=True)
            ]
            inside = len(_in_cuts(matches, cuts, self.crop).weight)
            if inside > most:
                best, most = cuts, inside
            if inside >= wanted:
                break
        return best


def _in_both(
    matches: Correspondences, images: tuple[Tensor, Tensor], factors: tuple[np.ndarray, ...]
) -> Correspondences:
    """Matches with a weight inside both images (3, H, W), which were shrunk by `factors`; in their pixels, float64."""
    both = [np.float64(xy) * f for xy, f in zip(matches[:2], factors, strict=True)]
    weight = np.asarray(matches.weight)
    seen = weight > 0  # exp(−d) of a large d is 0
    for xy, image in zip(both, images, strict=True):
        seen &= _within(xy, (image.shape[-1], image.shape[-2]))
    return Correspondences(both[0][seen], both[1][seen], weight[seen])


def _in_cuts(matches: Correspondences, cuts: list[np.ndarray], size: int) -> Correspondences:
    """Matches inside the squares of `size` pixels that are cut from both images, in the squares' pixels."""
    both = [map_points(np.linalg.inv(cut), xy) for cut, xy in zip(cuts, matches[:2], strict=True)]
    inside = _within(both[0], (size, size)) & _within(both[1], (size, size))
    return Correspondences(both[0][inside], both[1][inside], matches.weight[inside])


def _within(xy: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    """Which points (N, 2) lie in an area of `extent` (width, height), borders included."""
    return ((xy >= 0) & (xy <= extent)).all(1)


def collate_pairs(items: list[PairBatch]) -> PairBatch:
    """Stack pairs; shorter keypoint lists and smaller images are padded (bottom, right) with zeros."""
    count = max(len(item.weight) for item in items)
    keypoints_a, keypoints_b, weight, valid = (
        torch.stack([pad_rows(getattr(item, field), count) for item in items])
        for field in ("keypoints_a", "keypoints_b", "weight", "valid")
    )
    return PairBatch(
        image_a=stack_images([item.image_a for item in items]),
        image_b=stack_images([item.image_b for item in items]),
        keypoints_a=keypoints_a,
        keypoints_b=keypoints_b,
        weight=weight,
        valid=valid,
        index=torch.stack([item.index for item in items]),
        skipped=torch.stack([item.skipped for item in items]),
    )
