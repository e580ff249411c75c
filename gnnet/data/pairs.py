"""Training pairs drawn from a Scene: two images, each cropped or warped on its own, with their correspondences."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gnnet.data.batches import PairBatch, PairGeometry
from gnnet.data.correspondences import PairPoints
from gnnet.data.images import ImageView, even_subset, read_view
from gnnet.data.timelapse import PlaceStructure
from gnnet.data.warps import cut_image, map_points, random_crop, random_homography
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Correspondences, Pair, Scene

_CUTS_TRIED = 4  # until a cut of a pair keeps a quarter of the correspondences wanted
_SPARE = 3  # points drawn for each point wanted: some are not seen by both images, or lie outside the squares
_PAIRS_TRIED = 20  # in place of broken ones
_CONTRADICTION = 2.0  # pixels between a keypoint of b and the point of a that shows the same, by the poses
_CORNERS = np.array([[0.0, 0.0], [1, 0], [0, 1], [1, 1]])


class NothingInCommon(Exception):
    """Two images as drawn show no common point. That is no damage: another pair is drawn instead."""


class PairDataset(Dataset):
    """Image pairs with correspondences, drawn anew from (seed, epoch, index).

    An item is asked for by (epoch, index) and is a `PairBatch` without batch axis and padding.

    Args:
        scene: holds the pairs.
        correspondences: the most points of a pair; they are drawn evenly over the image, without replacement.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        crop: side in pixels of the random squares that both images are cut to; None keeps them whole.
        warp: strength of the random homographies under which the squares are cut, see
            `random_homography`; 0 cuts upright squares at the image's own scale.
        seed: decides all draws.
        on_bad: `raise` ends the training at a broken pair; `skip` draws another in its place.
        geometry: triangulate the correspondences of pairs whose poses are known, for `PairBatch.geometry`; False
            leaves it None.

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
        geometry: bool = True,
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
        self.geometry = geometry
        self._structure = PlaceStructure(scene)

    def __len__(self) -> int:
        return len(self.scene.pairs)

    def __getitem__(self, key: tuple[int, int]) -> PairBatch:
        """A pair; raises RuntimeError, naming pair and files, if it cannot be used and no other may replace it."""
        epoch, index = key
        generator = np.random.default_rng((self.seed, epoch, index))
        for skipped in range(_PAIRS_TRIED):
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
        raise RuntimeError(f"{_PAIRS_TRIED} pairs in a row cannot be used; the last: {last}")

    def pair_name(self, index: int) -> str:
        """A pair's number, dataset, images and file of correspondences, for messages."""
        pair = self.scene.pairs[index]
        source = f", {pair.correspondences}" if pair.correspondences else ""
        return f"pair {index} of {self.scene.name} ({pair.image_a} ↔ {pair.image_b}{source})"

    def _message(self, index: int, error: Exception) -> str:
        return f"{self.pair_name(index)} cannot be used: {error}"

    def _draw(self, pair: Pair, index: int, generator: np.random.Generator) -> PairBatch:
        names = dict.fromkeys((pair.image_a, pair.image_b))  # a photograph paired with itself is read once
        images = [self.scene.images[name] for name in names]  # to look one up takes a tenth of the time to decode it
        read = [read_view(image, self.largest_side) for image in images]
        views, ends = (read[0], read[-1]), (images[0], images[-1])
        points = PairPoints(self.scene, pair, size=views[0].file_size, structure=self._structure, images=ends)
        spare = _SPARE * self.correspondences
        matches = points.draw(spare if self.crop is None else self.correspondences, generator)
        if len(matches.weight) == 0:
            raise NothingInCommon("its images see nothing in common by their depth maps")
        matches = _in_both(matches, views)
        if len(matches.weight) == 0:
            raise ValueError(
                "no correspondence with a weight lies inside both images; are its pixels those of these images?"
            )
        pixels, cuts = [view.pixels for view in views], [np.eye(3), np.eye(3)]
        if self.crop is not None:
            cuts = self._cuts(views, matches, self.crop, points.endless, generator)
            if points.endless:  # the first points found where the images look alike: draw more of them there
                corners = map_points(cuts[0], self.crop * _CORNERS) / views[0].factors
                window = (*corners.min(0), *corners.max(0))
                matches = _in_both(points.draw(spare, generator, window), views)
            matches = _in_cuts(matches, cuts, self.crop)
            pixels = [cut_image(image, cut, self.crop) for image, cut in zip(pixels, cuts, strict=True)]
            if len(matches.weight) == 0:
                raise NothingInCommon("its images, cut at random, see nothing in common")
        size = pixels[0].shape[-1], pixels[0].shape[-2]
        chosen = even_subset(matches.keypoints_a, size, self.correspondences, generator)
        keypoints = [torch.from_numpy(xy[chosen]) for xy in matches[:2]]
        geometry = None
        if self.geometry:
            parts = zip(views, cuts, pixels, strict=True)
            cameras = [_cut_camera(view.camera, cut, image) for view, cut, image in parts if view.camera is not None]
            poses = [image.cam_from_world for image in ends if image.cam_from_world is not None]
            if self.warp == 0 and len(cameras) == len(poses) == 2:
                geometry = _located(keypoints, cameras, poses[1] @ poses[0].inverse())
            else:  # under a homography no lens stays one of `Camera`
                geometry = _not_located(len(chosen))
        return PairBatch(
            image_a=pixels[0],
            image_b=pixels[1],
            keypoints_a=keypoints[0].float(),
            keypoints_b=keypoints[1].float(),
            weight=torch.from_numpy(matches.weight[chosen]).float(),
            valid=torch.ones(len(chosen), dtype=torch.bool),
            index=torch.tensor(index),
            skipped=torch.tensor(0),
            geometry=geometry,
        )

    def _cuts(
        self,
        views: tuple[ImageView, ImageView],
        matches: Correspondences,
        side: int,
        endless: bool,
        generator: np.random.Generator,
    ) -> list[np.ndarray]:
        """The homography `image_from_square` of each image: of a few tries, the one that keeps most matches."""
        # Each image is cut on its own, so that a feature's position in the image tells nothing. If matches are
        # `endless`, those given are a sample of them.
        share = min(1.0, side**2 / np.prod(views[0].size)) if endless else 1.0
        wanted = max(1, min(self.correspondences, int(share * len(matches.weight))) // 4)
        likely = matches.weight.cumsum(dtype=np.float64)  # float32 rounds a draw up to the end, and beyond
        best, most = [], -1
        for _ in range(_CUTS_TRIED):
            anchor = int(np.searchsorted(likely, generator.random() * likely[-1], side="right"))
            cuts = [
                random_homography(view.size, xy[anchor], side, self.warp, generator)
                if self.warp > 0
                else random_crop(view.size, xy[anchor], side, generator)
                for xy, view in zip(matches[:2], views, strict=True)
            ]
            inside = len(_in_cuts(matches, cuts, side).weight)
            if inside > most:
                best, most = cuts, inside
            if inside >= wanted:
                break
        return best


def _in_both(matches: Correspondences, views: tuple[ImageView, ImageView]) -> Correspondences:
    """Matches in pixels of the files that have a weight and lie inside both views; in pixels of the views, float64."""
    a, b = (np.float64(xy) * view.factors for xy, view in zip(matches[:2], views, strict=True))
    weight = np.asarray(matches.weight)
    # A weight of 0 is no match: exp(−d) of a large d.
    seen = (weight > 0) & _within(a, views[0].size) & _within(b, views[1].size)
    return Correspondences(a[seen], b[seen], weight[seen])


def _in_cuts(matches: Correspondences, cuts: list[np.ndarray], side: int) -> Correspondences:
    """Matches inside the squares of `side` pixels that are cut from both images, in pixels of the squares."""
    a, b = (map_points(np.linalg.inv(cut), xy) for cut, xy in zip(cuts, matches[:2], strict=True))
    inside = _within(a, (side, side)) & _within(b, (side, side))
    return Correspondences(a[inside], b[inside], matches.weight[inside])


def _within(xy: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points (N, 2) lie in an area of `size` (width, height), borders included, (N,)."""
    x, y = xy.T
    return (x >= 0) & (x <= size[0]) & (y >= 0) & (y <= size[1])


def _cut_camera(camera: Camera, cut: np.ndarray, pixels: Tensor) -> Camera:
    """The camera of an upright part of an image; `cut` is its `image_from_square`."""
    parameters = camera.parameters.clone()
    parameters[2:4] -= torch.from_numpy(cut[:2, 2])
    return Camera(camera.size.new_tensor([pixels.shape[-1], pixels.shape[-2]]), parameters)


def _located(keypoints: list[Tensor], cameras: list[Camera], b_from_a: Pose) -> PairGeometry:
    """The points on the rays of image a that come nearest to those of image b, all float64.

    So each point is seen exactly where image a is sampled. It is invalid where it lies behind a camera, or image b
    does not see it at its keypoint: then poses and correspondences contradict each other. Where the images are taken
    from one place the depth is noise, which moves no pixel of either image.
    """
    (ray_a, seen_a), (ray_b, seen_b) = (camera.unproject(xy) for camera, xy in zip(cameras, keypoints, strict=True))
    # The depth d for which the ray of b is parallel to d R ray_a + t.
    turned, moved = (torch.linalg.cross(ray_b, v) for v in (ray_a @ b_from_a.rotation.T, b_from_a.translation[None]))
    depth = -(turned * moved).sum(-1) / turned.square().sum(-1)
    points = ray_a * depth[:, None]
    xy, seen = cameras[1].project(b_from_a.transform(points))
    agree = (xy - keypoints[1]).norm(dim=-1) <= _CONTRADICTION  # False where the depth is not a number
    valid = seen_a & seen_b & seen & agree & (depth > 0)
    return PairGeometry(
        torch.where(valid[:, None], points, 0).float(), valid, cameras[1].to(torch.float32), b_from_a.to(torch.float32)
    )


@cache
def _not_located(count: int) -> PairGeometry:
    """No point is known; camera and pose mean nothing."""
    camera = Camera.from_colmap("PINHOLE", 1, 1, [1, 1, 0.5, 0.5])
    return PairGeometry(torch.zeros(count, 3), torch.zeros(count, dtype=torch.bool), camera, Pose.identity())
