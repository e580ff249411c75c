"""Pictures of single queries: 3D points projected at their poses, and where those of a reference lie in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from gnnet.data.images import even_subset, limit_size, read_image
from gnnet.evaluation.report import pictures as drawing
from gnnet.evaluation.report.cameras import plain_text
from gnnet.evaluation.tables import format_length
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.map import Map, Observations
from gnnet.localization.result import Localization
from gnnet.scenes.scene import Scene, SceneImage

WIDTH = 640  # of the pictures, so that their letters can be read on a phone
POINTS = 60  # drawn, at most
LINES = 48
_ENOUGH = 20  # points that project into the query make a reference worth showing
_TALLEST = 720
_HEADING, _LETTERS = 30, 12
_POSITION = LinearSegmentedColormap.from_list(
    "position", [drawing.BLUE, drawing.SKY, drawing.YELLOW, drawing.ORANGE, drawing.VERMILLION]
)
# As `drawing.draw_projections` marks the start and the refined pose.
_START = {"marker": "X", "markersize": 8, "markerfacecolor": drawing.VERMILLION, "markeredgecolor": "white"}
_REFINED = {"marker": "o", "markersize": 5, "markerfacecolor": drawing.SKY, "markeredgecolor": "black"}

Projection = Callable[[Pose | None], np.ndarray | None]


class QueryPictures(NamedTuple):
    """Pictures of one query, None where they cannot be drawn; then `problems` says why.

    `poses` shows the query with points of the map at its poses, `places` the reference that these points are
    of above (or beside) the query, with lines between.
    """

    poses: Figure | None
    places: Figure | None
    problems: tuple[str, ...]


class _Panel(NamedTuple):
    """One picture of `poses`: marks at `xy` (N, 2); rings at `truth` (N, 2) or, without it, lines to `ends` (N, 2)."""

    title: str
    xy: np.ndarray | None = None
    truth: np.ndarray | None = None
    ends: np.ndarray | None = None
    refined: bool = False


def draw_query(localization: Localization, query: SceneImage, *, map: Map, scene: Scene | None) -> QueryPictures:
    """Pictures of a query with the points of the nearest reference that was used and sees what it sees.

    Args:
        localization: its poses may be None.
        query: its camera and true pose may be None.
        map: holds the references' points.
        scene: knows the references' image files; without it no reference is shown.
    """
    try:
        image = read_image(query.path)
    except (OSError, ValueError) as error:
        return QueryPictures(None, None, (str(error),))
    problems, camera = [], query.camera
    if camera is not None and tuple(camera.size.round().int().tolist()) != (image.shape[-1], image.shape[-2]):
        problems.append(f"the image has {image.shape[-1]}×{image.shape[-2]} pixels, which is not the camera's size")
        camera = None
    best = query.cam_from_world if localization.cam_from_world is None else localization.cam_from_world
    reference, observations = _reference_to_show(localization, map, camera, best)

    def project(pose: Pose | None) -> np.ndarray | None:
        if pose is None or camera is None or observations is None:
            return None
        return _project(observations.points, camera, pose)

    poses = _draw_poses(image, _panels(localization, query.cam_from_world, project))
    if reference is None:
        return QueryPictures(poses, None, (*problems, "no reference was used"))
    known = None if scene is None else scene.images.get(reference)
    if known is None:
        return QueryPictures(poses, None, (*problems, f"the image file of reference {reference} is not known"))
    try:
        other, _ = limit_size(read_image(known.path), map.largest_side)
    except (OSError, ValueError) as error:
        return QueryPictures(poses, None, (*problems, str(error)))
    pose_name = "true" if localization.cam_from_world is None else "final"
    keypoints = observations.keypoints.numpy().astype(np.float64)
    places = _draw_places(other, image, keypoints, project(best), reference=reference, pose_name=pose_name)
    return QueryPictures(poses, places, tuple(problems))


def _reference_to_show(
    localization: Localization, map: Map, camera: Camera | None, best: Pose | None
) -> tuple[str, Observations] | tuple[None, None]:
    """The first of the references used that has enough points in view of the pose, or else the first."""
    names = [name for name in localization.references if name in map.rows]
    if not names:
        return None, None
    first = map.observations(torch.tensor([map.rows[names[0]]]))
    if camera is None or best is None:
        return names[0], first
    for name in names:
        observations = map.observations(torch.tensor([map.rows[name]]))
        if np.isfinite(_project(observations.points, camera, best)).all(-1).sum() >= _ENOUGH:
            return name, observations
    return names[0], first


def _project(points: Tensor, camera: Camera, pose: Pose) -> np.ndarray:
    """Pixels (N, 2) of points (N, 3); nan where one is not in the image."""
    xy, valid = camera.to(torch.float64).project(pose.to(torch.float64).transform(points))
    return torch.where(valid[:, None], xy, torch.nan).numpy()


def _panels(localization: Localization, truth: Pose | None, project: Projection) -> list[_Panel]:
    final, start, xy_truth = localization.cam_from_world, localization.start, project(truth)
    if final is None:
        title = "query, no pose was found" if xy_truth is None else "no pose was found; points at the true pose"
        return [_Panel(title, truth=xy_truth)]
    xy_final = project(final)
    if xy_final is None:
        return [_Panel("query; no camera or no points to project")]

    def titled(name: str, pose: Pose, xy: np.ndarray) -> str:
        target = xy_truth if xy_truth is not None else xy_final
        distance = np.linalg.norm(xy - target, axis=-1)
        distance = distance[np.isfinite(distance)]
        median = drawing.format_pixels(np.median(distance)) if len(distance) else "no point in view"
        if truth is None:
            return name if pose is final else f"{name}\nmedian {median} from the refined one"
        position, rotation = pose_errors(pose, truth)
        return f"{name}: {format_length(position.item())}, {rotation.item():.2g}° off\nmedian {median}"

    if not localization.refined:
        return [_Panel(titled("pose, not refined", final, xy_final), xy_final, xy_truth)]
    xy_start = project(start)
    panels = [_Panel(titled("refined pose", final, xy_final), xy_final, xy_truth, refined=True)]
    if xy_start is not None:
        panels.insert(0, _Panel(titled("start pose", start, xy_start), xy_start, xy_truth, xy_final))
    return panels


def _draw_poses(image: Tensor, panels: list[_Panel]) -> Figure:
    """Panels below each other, or beside each other where the image is upright."""
    shown = drawing.as_image(image, "query image")
    height, width = shown.shape[:2]
    upright = height > width
    columns, rows = (max(2, len(panels)), 1) if upright else (1, len(panels))
    lines = 2 if upright else 1
    cell = (WIDTH - 4 * (columns - 1)) // columns
    cell_height = min(round(cell * height / width), _TALLEST)
    cell = round(cell_height * width / height)
    has_truth = any(panel.truth is not None for panel in panels)
    heading = _HEADING if lines == 1 else _HEADING + 20
    figure, grid = drawing.picture_grid(
        width=cell, heights=[cell_height] * rows, columns=columns, top=heading, between=heading,
        bottom=36 if has_truth else 4,
    )  # fmt: skip
    all_axes = [axes for line in grid for axes in line]
    for axes, panel in zip(all_axes, panels, strict=False):
        drawing.show_image(axes, shown)
        if panel.truth is not None:
            drawing.draw_projections(axes, panel.truth, panel.xy, refined=panel.refined, max_points=POINTS)
        elif panel.xy is not None:
            _draw_marks(axes, panel)
        title = panel.title if lines == 2 else panel.title.replace("\n", ", ")
        axes.set_title(title, fontsize=_LETTERS if lines == 1 else _LETTERS - 1)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    if has_truth:
        drawing.projection_legend(figure)
    return figure


def _draw_marks(axes: Axes, panel: _Panel) -> None:
    """Marks where the true pose is not known, and lines to where the refined pose has them."""
    rows = np.flatnonzero(np.isfinite(panel.xy).all(-1))
    rows = rows[drawing.spread(len(rows), POINTS)]
    if panel.ends is not None:
        segments = np.stack([panel.xy, panel.ends], 1)[rows]
        segments = segments[np.isfinite(segments).all((1, 2))]
        axes.add_collection(LineCollection(segments, colors="black", linewidths=2.4, alpha=0.6, zorder=2))
        axes.add_collection(LineCollection(segments, colors=drawing.VERMILLION, linewidths=1.3, zorder=3))
    style = _REFINED if panel.refined else _START
    axes.plot(*panel.xy[rows].T, linestyle="none", markeredgewidth=1.0, zorder=4, **style)


def _draw_places(
    reference_image: Tensor, query_image: Tensor, keypoints: np.ndarray, xy: np.ndarray | None, *, reference: str,
    pose_name: str,
) -> Figure:  # fmt: skip
    """The reference with its keypoints (N, 2), and below (or beside) it the query with these at `xy` (N, 2).

    A colour tells where in the reference a point lies.
    """
    images = [rgb_to_grayscale(image)[0].numpy() for image in (reference_image, query_image)]
    beside = images[1].shape[0] > images[1].shape[1]
    widest = (WIDTH - 12) // 2 if beside else WIDTH - 8
    factors = [min(widest / image.shape[1], _TALLEST / image.shape[0]) for image in images]
    sizes = [
        (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
        for image, factor in zip(images, factors, strict=True)
    ]
    first = (4, _HEADING)
    second = (8 + widest, _HEADING) if beside else (4, 2 * _HEADING + sizes[0][1])
    height = max(corner[1] + size[1] for corner, size in zip((first, second), sizes, strict=True)) + 4
    figure = drawing.new_figure(WIDTH, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    below = "query" if xy is None else f"query, the points at its {pose_name} pose"
    for image, size, corner, title in zip(
        images, sizes, (first, second), (f"reference {plain_text(reference, 44)}", below), strict=True
    ):
        pasted = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
        extent = (corner[0], corner[0] + size[0], corner[1] + size[1], corner[1])
        axes.imshow(pasted, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest", aspect="auto")
        letters = _LETTERS - 2 if beside else _LETTERS
        axes.text(corner[0], corner[1] - 9, title, fontsize=letters, clip_on=True)
    in_view = np.ones(len(keypoints), bool) if xy is None else np.isfinite(xy).all(-1)
    rows = np.flatnonzero(in_view & np.isfinite(keypoints).all(-1))
    size = (reference_image.shape[-1], reference_image.shape[-2])
    rows = rows[even_subset(keypoints[rows], size, LINES, np.random.default_rng(0))]
    # Along the other axis than the pictures follow each other, so that lines of a colour lie together.
    along = keypoints[rows, 1 if beside else 0]
    colours = _POSITION((along - along.min()) / max(1.0, np.ptp(along))) if len(rows) else None
    ends = [keypoints[rows] * factors[0] + first]
    if xy is not None:
        ends.append(xy[rows] * factors[1] + second)
        segments = np.stack(ends, 1)
        axes.add_collection(LineCollection(segments, colors="black", linewidths=1.8, alpha=0.3, zorder=3))
        axes.add_collection(LineCollection(segments, colors=colours, linewidths=0.9, alpha=0.9, zorder=4))
    for points in ends:
        axes.scatter(points[:, 0], points[:, 1], s=26, c=colours, edgecolors="black", linewidths=0.7, zorder=5)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    return figure
