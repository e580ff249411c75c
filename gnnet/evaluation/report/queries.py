"""Pictures of one query: 3D points projected at its poses, and where the points of a reference lie in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from gnnet.data.images import even_subset, read_image, read_view
from gnnet.evaluation.report import style
from gnnet.evaluation.report.pictures import Projections, as_image, draw_matches, median_distance, projections
from gnnet.evaluation.units import format_length
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.map import Map, Observations
from gnnet.localization.result import Localization
from gnnet.scenes.scene import Scene, SceneImage

WIDTH = 640  # of the pictures, so that their letters can be read on a phone
LINES = 48
_ENOUGH = 20  # points that project into the query make a reference worth showing

Project = Callable[[Pose | None], np.ndarray | None]


class QueryPictures(NamedTuple):
    """Pictures of one query, None where they cannot be drawn; then `problems` says why.

    Args:
        poses: the query with points of the map projected at its poses.
        places: the reference that observed these points above (or beside) the query, with lines between.
        problems: sentences.
    """

    poses: Figure | None
    places: Figure | None
    problems: tuple[str, ...]


def draw_query(localization: Localization, query: SceneImage, *, map: Map, scene: Scene) -> QueryPictures:
    """Pictures of a query with the points of the nearest reference that was used and sees what it sees.

    Args:
        localization: its poses may be None.
        query: its camera and true pose may be None.
        map: holds the references' points.
        scene: knows the references' image files.
    """
    try:
        image = read_image(query.path, query.camera)
    except (OSError, ValueError) as error:
        return QueryPictures(None, None, (str(error),))
    problems, camera = [], query.camera if localization.camera is None else localization.camera
    if camera is not None and tuple(camera.size.round().int().tolist()) != (image.shape[-1], image.shape[-2]):
        problems.append(f"the image has {image.shape[-1]}×{image.shape[-2]} pixels, which is not the camera's size")
        camera = None
    best = query.cam_from_world if localization.cam_from_world is None else localization.cam_from_world
    shown = _reference_to_show(localization, map, camera, best)

    def project(pose: Pose | None) -> np.ndarray | None:
        if pose is None or camera is None or shown is None:
            return None
        return _project(shown[1].points, camera, pose)

    pixels = as_image(image, "query image")
    upright = pixels.shape[0] > pixels.shape[1]
    panels = _panels(localization, query.cam_from_world, project)
    poses = projections(pixels, panels, columns=2 if upright else 1, width=WIDTH)
    places = None
    if shown is None:
        problems.append("no reference was used")
    elif shown[0] not in scene.images:
        problems.append(f"the image file of reference {shown[0]} is not known")
    else:
        try:
            other = read_view(scene.images[shown[0]], map.largest_side).pixels
        except (OSError, ValueError) as error:
            problems.append(str(error))
        else:
            pose_name = "true" if localization.cam_from_world is None else "final"
            keypoints = shown[1].keypoints.double().numpy()
            titles = f"reference {style.plain_text(shown[0], 44)}", f"query, the points at its {pose_name} pose"
            places = _draw_places(other, image, keypoints, project(best), titles, below=not upright)
    return QueryPictures(poses, places, tuple(problems))


def _reference_to_show(
    localization: Localization, map: Map, camera: Camera | None, best: Pose | None
) -> tuple[str, Observations] | None:
    """The first of the references used that has enough points in view of the pose, or else the first."""
    used = [name for name in localization.references if name in map.rows]
    candidates = ((name, map.observations(torch.tensor([map.rows[name]]))) for name in used)
    if camera is None or best is None:
        return next(candidates, None)
    for name, observations in candidates:
        if np.isfinite(_project(observations.points, camera, best)).all(-1).sum() >= _ENOUGH:
            return name, observations
    return (used[0], map.observations(torch.tensor([map.rows[used[0]]]))) if used else None


def _project(points: Tensor, camera: Camera, pose: Pose) -> np.ndarray:
    """Pixels (N, 2) of points (N, 3); nan where one is not in the image."""
    xy, valid = camera.to(torch.float64).project(pose.to(torch.float64).transform(points))
    return torch.where(valid[:, None], xy, torch.nan).numpy()


def _panels(localization: Localization, truth: Pose | None, project: Project) -> list[Projections]:
    final, initial, xy_truth = localization.cam_from_world, localization.initial, project(truth)
    if final is None:
        title = "query, no pose was found" if xy_truth is None else "no pose was found; points at the true pose"
        return [Projections(title, truth=xy_truth)]
    xy_final = project(final)
    if xy_final is None:
        return [Projections("query; no camera or no points to project")]

    def titled(name: str, pose: Pose, xy: np.ndarray) -> str:
        median = median_distance(xy, xy_final if xy_truth is None else xy_truth, "no point in view")
        if truth is None:
            return name if pose is final else f"{name}\n{median} from the refined one"
        position, rotation = pose_errors(pose, truth)
        return f"{name}: {format_length(position.item())}, {rotation.item():.2g}° off\n{median}"

    if not localization.refined:
        return [Projections(titled("pose, not refined", final, xy_final), xy_final, xy_truth)]
    panels = [Projections(titled("refined pose", final, xy_final), xy_final, xy_truth, refined=True)]
    xy_initial = project(initial)
    if initial is not None and xy_initial is not None:
        panels.insert(0, Projections(titled("initial pose", initial, xy_initial), xy_initial, xy_truth, xy_final))
    return panels


def _draw_places(
    reference: Tensor, query: Tensor, keypoints: np.ndarray, xy: np.ndarray | None, titles: tuple[str, str],
    *, below: bool,
) -> Figure:  # fmt: skip
    """The reference with its keypoints (N, 2), and below (or beside) it the query with these at `xy` (N, 2).

    A colour tells where in the reference a point lies.
    """
    grey = rgb_to_grayscale(reference)[0].numpy(), rgb_to_grayscale(query)[0].numpy()
    rows = np.flatnonzero(np.isfinite(keypoints if xy is None else np.concatenate([keypoints, xy], 1)).all(-1))
    size = reference.shape[-1], reference.shape[-2]
    rows = rows[even_subset(keypoints[rows], size, LINES, np.random.default_rng(0))]
    # Along the other axis than the pictures follow each other, so that lines of a colour lie together.
    along = keypoints[rows, 0 if below else 1] / size[0 if below else 1]
    aspects = [image.shape[0] / image.shape[1] for image in grey]
    height = WIDTH * (sum(aspects) if below else 1 / sum(1 / aspect for aspect in aspects))
    figure, ((axes,),) = style.new_figure(WIDTH, height + 60)
    draw_matches(axes, grey, (keypoints[rows], None if xy is None else xy[rows]), style.POSITION(along), below=below)
    axes.set_title(titles[0], loc="left", fontsize=11)
    if below:
        axes.set_xlabel("query" if xy is None else titles[1], loc="left", fontsize=11)
    else:
        axes.set_title("query" if xy is None else titles[1], loc="right", fontsize=11)
    return figure
