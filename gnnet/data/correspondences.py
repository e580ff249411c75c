"""Correspondences of training pairs: from a file, a still camera, depth maps, or common 3D points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from gnnet.data.depth import Window, depth_correspondences, read_depth_view
from gnnet.data.timelapse import lasting_structure, still_correspondences
from gnnet.scenes.formats.correspondences import Correspondences, read_correspondence_file
from gnnet.scenes.formats.images import image_size
from gnnet.scenes.scene import Pair, Scene, SceneImage


class PairPoints:
    """Correspondences of a pair, drawn as often as one likes; what they come from is read once.

    A pair's own file has the first word; without one, a still camera's pixels correspond to
    themselves; images with depth give points that both see; else it is the 3D points that both observe.

    Args:
        scene, pair: what is known of the images.
        size: width and height of a still camera's images; None reads them from the file.
        structure: of a place's name, see `lasting_structure`; None weighs all pixels of a still camera alike.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or malformed, or nothing tells the correspondences.
    """

    def __init__(
        self,
        scene: Scene,
        pair: Pair,
        *,
        size: tuple[int, int] | None = None,
        structure: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        a, b = scene.images[pair.image_a], scene.images[pair.image_b]
        self._draw: Callable[..., Correspondences] | None = None
        if pair.correspondences is not None:
            self._all = read_correspondence_file(pair.correspondences)
        elif pair.static:
            size = image_size(a.path) if size is None else size
            self._draw = partial(still_correspondences, size, _structure_of(pair, a, structure))
        elif a.depth is not None and b.depth is not None:
            self._draw = partial(depth_correspondences, read_depth_view(a), read_depth_view(b))
        else:
            self._all = _common_points(scene.name, a, b)

    @property
    def endless(self) -> bool:
        """Whether each draw finds other points; otherwise there are so many and no more."""
        return self._draw is not None

    def draw(self, count: int, generator: np.random.Generator, window: Window | None = None) -> Correspondences:
        """Matching points in pixels of the files; weight 1 where nothing better is known.

        Args:
            count: about so many points of a still camera or depth; of files and 3D points, all there are.
            generator: of the points drawn.
            window: of image a, to which endless points are confined, but for some near its border.
        """
        return self._all if self._draw is None else self._draw(count=count, generator=generator, window=window)


def _structure_of(pair: Pair, a: SceneImage, structure: Callable[[str], np.ndarray] | None) -> np.ndarray:
    if structure is None:
        return np.ones((1, 1), np.float32)
    if pair.image_a == pair.image_b:  # a photograph with itself: others of its folder show something else
        return lasting_structure([a.path])
    return structure(pair.place)


def _common_points(scene: str, a: SceneImage, b: SceneImage) -> Correspondences:
    for image in (a, b):
        if image.point_ids is None or image.keypoints is None:
            raise ValueError(
                f"{scene}: {image.name} observes no 3D points and has no depth, and the pair {a.name}, {b.name} has no "
                "file of correspondences; expected one of them"
            )
    shared, in_a, in_b = np.intersect1d(a.point_ids, b.point_ids, return_indices=True)
    if len(shared) == 0:
        raise ValueError(f"{scene}: {a.name} and {b.name} observe no 3D point in common; leave out this pair")
    keypoints_a, keypoints_b = np.asarray(a.keypoints)[in_a], np.asarray(b.keypoints)[in_b]
    return Correspondences(
        keypoints_a.astype(np.float32), keypoints_b.astype(np.float32), np.ones(len(shared), np.float32)
    )
