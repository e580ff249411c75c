"""Correspondences of training pairs: from a file, a still camera, depth maps, or common 3D points."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gnnet.data.depth import depth_correspondences
from gnnet.data.still_camera import lasting_structure, still_correspondences
from gnnet.scenes.correspondence_file import Correspondences, read_correspondence_file
from gnnet.scenes.files import image_size
from gnnet.scenes.scene import Pair, Scene, SceneImage


def load_correspondences(
    scene: Scene,
    pair: Pair,
    *,
    generator: np.random.Generator,
    count: int,
    size: tuple[int, int] | None = None,
    structure: Callable[[str], np.ndarray] | None = None,
) -> Correspondences:
    """Matching points of a pair, in pixels of the files; weight 1 where nothing better is known.

    A pair's own file has the first word; without one, a still camera's pixels correspond to
    themselves; images with depth give points that both see; else it is the 3D points that both observe.

    Args:
        scene, pair: what is known of the images.
        generator: of the points drawn from a still camera or depth.
        count: about so many points are drawn from these; files and 3D points give all they have.
        size: width and height of a still camera's images; None reads them from the file.
        structure: of a place's name, see `lasting_structure`; None weighs all pixels of a still camera alike.

    Raises:
        ValueError: if a file is malformed, or nothing tells the correspondences.
    """
    if pair.correspondences is not None:
        return read_correspondence_file(pair.correspondences)
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    if pair.static:
        if structure is None:
            weights = np.ones((1, 1), np.float32)
        elif pair.image_a == pair.image_b:  # a photograph with itself: others of its folder show something else
            weights = lasting_structure([a.path])
        else:
            weights = structure(pair.place)
        size = image_size(a.path) if size is None else size
        return still_correspondences(size, weights, count=count, generator=generator)
    if a.depth is not None and b.depth is not None:
        return depth_correspondences(a, b, count=count, generator=generator)
    return _common_points(scene.name, a, b)


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
