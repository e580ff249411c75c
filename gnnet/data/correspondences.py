"""Correspondences of a training pair: from a file, a fixed camera, depth maps, or common 3D points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from gnnet.data.depth import Window, depth_correspondences, read_depth_view
from gnnet.data.timelapse import fixed_camera_correspondences, lasting_structure
from gnnet.scenes.formats.correspondences import read_correspondence_file
from gnnet.scenes.formats.images import image_size
from gnnet.scenes.scene import Correspondences, Pair, Scene, SceneImage


class PairPoints:
    """The correspondences of a pair. Their source is read once; then they can be drawn many times.

    The source is the first of these that the pair has: a file that lists them; a fixed camera, whose pixels
    correspond to themselves; depth maps of both images; 3D points that both images observe.

    Args:
        scene: holds the pair's images.
        pair: the two images.
        size: width and height in pixels of a fixed camera's images; None reads them from the file.
        structure: gives the map of a place by its name, see `lasting_structure`; None weighs all pixels of
            a fixed camera alike.
        images: the pair's images a and b; None looks them up.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or malformed, or the pair has no source.
    """

    def __init__(
        self,
        scene: Scene,
        pair: Pair,
        *,
        size: tuple[int, int] | None = None,
        structure: Callable[[str], np.ndarray] | None = None,
        images: tuple[SceneImage, SceneImage] | None = None,
    ) -> None:
        a, b = images or (scene.images[pair.image_a], scene.images[pair.image_b])
        self._draw: Callable[..., Correspondences] | None = None
        if pair.correspondences is not None:
            self._all = read_correspondence_file(pair.correspondences)
        elif pair.static:
            size = image_size(a.path) if size is None else size
            self._draw = partial(fixed_camera_correspondences, size, _structure_of(pair, a, structure))
        elif a.depth is not None and b.depth is not None:
            self._draw = partial(depth_correspondences, read_depth_view(a), read_depth_view(b))
        else:
            self._all = _common_points(scene.name, a, b)

    @property
    def endless(self) -> bool:
        """Whether each draw finds other points; otherwise it gives all that there are."""
        return self._draw is not None

    def draw(self, count: int, generator: np.random.Generator, window: Window | None = None) -> Correspondences:
        """Matching points in pixels of the files; weight 1 where nothing better is known.

        Args:
            count: about so many points of a fixed camera or of depth maps; files and 3D points give all.
            generator: draws the points.
            window: part of image a in which points of a fixed camera or of depth maps lie, or near its border.
        """
        return self._all if self._draw is None else self._draw(count=count, generator=generator, window=window)


def _structure_of(pair: Pair, a: SceneImage, structure: Callable[[str], np.ndarray] | None) -> np.ndarray:
    if structure is None:
        return np.ones((1, 1), np.float32)
    if pair.image_a == pair.image_b:  # a photograph with itself: others of its folder show something else
        return lasting_structure([a.path])
    return structure(pair.place)


def _common_points(scene: str, a: SceneImage, b: SceneImage) -> Correspondences:
    ids, keypoints = [], []
    for image in (a, b):
        if image.point_ids is None or image.keypoints is None:
            raise ValueError(
                f"{scene}: {image.name} observes no 3D points and has no depth, and the pair {a.name}, {b.name} has no "
                "file of correspondences; expected one of them"
            )
        ids.append(image.point_ids)
        keypoints.append(np.asarray(image.keypoints, np.float32))
    shared, in_a, in_b = np.intersect1d(ids[0], ids[1], return_indices=True)
    if len(shared) == 0:
        raise ValueError(f"{scene}: {a.name} and {b.name} observe no 3D point in common; leave out this pair")
    return Correspondences(keypoints[0][in_a], keypoints[1][in_b], np.ones(len(shared), np.float32))
