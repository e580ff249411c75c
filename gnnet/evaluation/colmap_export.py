"""A map and the queries localized in it as a COLMAP model: to look at, or to hand to other tools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.result import Localization
from gnnet.scenes.scene import Scene, SceneImage

if TYPE_CHECKING:
    import pycolmap

_BESIDE = "localized/"  # before the name of a query that is a reference too


def write_colmap_model(
    folder: str | Path,
    scene: Scene,
    localizations: Iterable[Localization],
    *,
    cameras: Mapping[str, Camera] | None = None,
) -> None:
    """Write `cameras`, `images`, `points3D`, `rigs` and `frames` as `.bin`, COLMAP's binary model.

    It holds the references that have a camera and a pose, the points that they observe, and the
    localized queries with their estimated poses, which observe nothing. Names are the scene's. A query
    that is a reference itself stands beside it as `localized/<name>`. Row i of `scene.points` has the
    id i + 1. Images of equal cameras share one: PINHOLE without distortion, else the model that holds all of
    its kind (OPENCV, FULL_OPENCV, THIN_PRISM_FISHEYE, …).

    Args:
        folder: is made; a model that is there is replaced.
        scene: in which the queries were localized.
        localizations: results of the queries; those without a pose are left out.
        cameras: cameras of queries, by name; for a query that is not in it, the scene's camera is taken.

    Raises:
        ValueError: a query without camera, one that stands there twice, or nothing to write.
    """
    references = {
        image.name: (image.camera, image.cam_from_world)
        for image in scene.images.values()
        if image.is_reference and image.camera is not None and image.cam_from_world is not None
    }
    queries = _posed_queries(scene, localizations, cameras or {}, references)
    if not references and not queries:
        raise ValueError(
            f"{scene.name} has no reference with camera and pose, and no query was localized: there is no model to "
            "write; give a scene with a map (dataset.root)"
        )
    points = scene.points.numpy()
    observed = {name: _observed(scene.images[name], points) for name in references}
    model = _model_of({**references, **queries}, points, observed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.write_binary(str(folder))


def _posed_queries(
    scene: Scene, localizations: Iterable[Localization], cameras: Mapping[str, Camera], references: Collection[str]
) -> dict[str, tuple[Camera, Pose]]:
    """Camera and estimated pose of the localized queries, by their name in the model."""
    queries: dict[str, tuple[Camera, Pose]] = {}
    for localization in localizations:
        if localization.cam_from_world is None:
            continue
        name, camera = localization.name, cameras.get(localization.name)
        if camera is None and name in scene.images:
            camera = scene.images[name].camera
        if camera is None:
            raise ValueError(f"query {name} has no camera, neither in {scene.name} nor in `cameras`; give it there")
        name = f"{_BESIDE}{name}" if name in references else name
        if name in queries or name in references:
            raise ValueError(f"query {localization.name} stands twice in the model; expected one localization a query")
        queries[name] = (camera, localization.cam_from_world)
    return queries


def _observed(image: SceneImage, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (K,) of finite points and the pixels (K, 2) where an image sees them."""
    if image.point_ids is None or image.keypoints is None:
        return np.zeros(0, np.int64), np.zeros((0, 2))
    finite = np.isfinite(points[image.point_ids]).all(1)
    return image.point_ids[finite].astype(np.int64), image.keypoints[finite].astype(np.float64)


def _model_of(
    images: Mapping[str, tuple[Camera, Pose]],
    points: np.ndarray,
    observed: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> pycolmap.Reconstruction:
    """A COLMAP model.

    Args:
        images: camera and `cam_from_world` by name; the first gets the id 1.
        points: (P, 3) in the world.
        observed: by name, rows (K,) of the points that an image sees, and the pixels (K, 2) where.
    """
    from gnnet.colmap import pycolmap  # slow to import

    model = pycolmap.Reconstruction()
    camera_ids: dict[tuple[object, ...], int] = {}
    tracks: defaultdict[int, pycolmap.Track] = defaultdict(pycolmap.Track)  # by the point's row
    for image_id, (name, (camera, cam_from_world)) in enumerate(images.items(), start=1):
        kind, width, height, parameters = camera.to_colmap()
        key = (kind, width, height, *parameters)
        if key not in camera_ids:
            camera_ids[key] = len(camera_ids) + 1
            model.add_camera_with_trivial_rig(
                pycolmap.Camera(model=kind, width=width, height=height, params=parameters, camera_id=camera_ids[key])
            )
        pose = cam_from_world.to(device="cpu", dtype=torch.float64)
        rows, keypoints = observed.get(name, (np.zeros(0, np.int64), np.zeros((0, 2))))
        model.add_image_with_trivial_frame(
            pycolmap.Image(name=name, keypoints=keypoints, camera_id=camera_ids[key], image_id=image_id),
            pycolmap.Rigid3d(pose.matrix()[:3].numpy()),
        )
        for index, row in enumerate(rows.tolist()):
            tracks[row].add_element(image_id, index)
    for row, track in sorted(tracks.items()):
        model.add_point3D_with_id(row + 1, pycolmap.Point3D(xyz=points[row], track=track))
    model.update_point_3d_errors()
    return model
