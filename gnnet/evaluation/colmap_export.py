"""A map and the queries localized in it as a COLMAP model: to look at, or to hand to other tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.result import Localization
from gnnet.scenes.scene import Scene, SceneImage

_BESIDE = "localized/"  # before the name of a query that is a reference too


class ExportedModel(NamedTuple):
    """How many reference images, localized queries, 3D points and observations of them a model holds."""

    references: int
    queries: int
    points: int
    observations: int


def write_colmap_model(
    folder: str | Path,
    scene: Scene,
    localizations: Iterable[Localization],
    *,
    cameras: Mapping[str, Camera] | None = None,
) -> ExportedModel:
    """Write `cameras`, `images`, `points3D`, `rigs` and `frames` as `.bin`, COLMAP's binary model.

    It holds the references that have a camera and a pose, the points that they observe, and the
    localized queries with their estimated poses, which observe nothing. Names are the scene's. A query
    that is a reference itself stands beside it as `localized/<name>`. Row i of `scene.points` has the
    id i + 1. Images of equal cameras share one: OPENCV with distortion, PINHOLE without.

    Args:
        folder: to write to; it is made, and a model that is there is replaced.
        scene: that the queries were localized in.
        localizations: of the queries; those without a pose are left out.
        cameras: of queries by name; of one that is not there, the scene's is taken.

    Raises:
        ValueError: a query without camera, one that stands there twice, or nothing to write.
    """
    import pycolmap  # slow to import

    references = [
        image for image in scene.images.values()
        if image.is_reference and image.camera is not None and image.cam_from_world is not None
    ]  # fmt: skip
    queries = _posed_queries(scene, localizations, cameras or {}, {image.name for image in references})
    if not references and not queries:
        raise ValueError(
            f"{scene.name} has no reference with camera and pose, and no query was localized: there is no model to "
            "write; give a scene with a map (dataset.root)"
        )
    model, camera_ids = pycolmap.Reconstruction(), {}
    seen = [_observed(image, scene.points.numpy()) for image in references]
    for image_id, (image, (_, keypoints)) in enumerate(zip(references, seen, strict=True), start=1):
        camera_id = _camera_id(model, image.camera, camera_ids)
        _add_image(model, image_id, image.name, camera_id, image.cam_from_world, keypoints)
    for image_id, (name, (camera, pose)) in enumerate(queries.items(), start=len(references) + 1):
        _add_image(model, image_id, name, _camera_id(model, camera, camera_ids), pose, np.zeros((0, 2)))
    _add_points(model, scene.points.numpy(), [rows for rows, _ in seen])
    model.update_point_3d_errors()
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.write_binary(str(folder))
    return ExportedModel(len(references), len(queries), model.num_points3D(), sum(len(rows) for rows, _ in seen))


def _posed_queries(
    scene: Scene, localizations: Iterable[Localization], cameras: Mapping[str, Camera], references: set[str]
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


def _camera_id(model, camera: Camera, known: dict[tuple[float, ...], int]) -> int:
    """The id of a camera in the model, to which it is added when it is new; with a rig of its own."""
    import pycolmap

    size = camera.size.round().to(torch.int64).tolist()
    parameters = camera.parameters.to(device="cpu", dtype=torch.float64).tolist()
    key = (*size, *parameters)
    if key not in known:
        known[key] = len(known) + 1
        distorted = any(parameters[4:])
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(
                model="OPENCV" if distorted else "PINHOLE", width=size[0], height=size[1],
                params=parameters if distorted else parameters[:4], camera_id=known[key],
            )
        )  # fmt: skip
    return known[key]


def _add_image(model, image_id: int, name: str, camera_id: int, cam_from_world: Pose, keypoints: np.ndarray) -> None:
    import pycolmap

    pose = cam_from_world.to(device="cpu", dtype=torch.float64)
    model.add_image_with_trivial_frame(
        pycolmap.Image(name=name, keypoints=keypoints, camera_id=camera_id, image_id=image_id),
        pycolmap.Rigid3d(pose.matrix()[:3].numpy()),
    )


def _add_points(model, points: np.ndarray, rows: list[np.ndarray]) -> None:
    """Points (P, 3) with their tracks; `rows[i]` (K,) are those that image i + 1 sees at its keypoints in order."""
    import pycolmap

    point = np.concatenate([np.zeros(0, np.int64), *rows])
    image = np.repeat(np.arange(1, len(rows) + 1), [len(r) for r in rows])
    index = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(r)) for r in rows)])
    order = np.argsort(point, kind="stable")
    observed, first = np.unique(point[order], return_index=True)
    elements = list(map(pycolmap.TrackElement, image[order].tolist(), index[order].tolist()))
    bounds = pairwise([*first.tolist(), len(elements)])
    for row, (start, end) in zip(observed.tolist(), bounds, strict=True):  # pycolmap takes points one by one
        track = pycolmap.Track(elements[start:end])
        model.add_point3D_with_id(row + 1, pycolmap.Point3D(xyz=points[row], track=track))
