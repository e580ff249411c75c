"""Cameras seen from above: those of a dataset, and the poses of localized queries beside the true ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.spatial import cKDTree

from gnnet.evaluation.report import style
from gnnet.evaluation.report.charts import LETTERS, SHARP, WIDTH, format_round
from gnnet.geometry.pose import Pose
from gnnet.localization.map import Map
from gnnet.localization.result import Localization
from gnnet.sampling import evenly
from gnnet.scenes.scene import Scene, SceneImage

_AXES_OF_GROUND = 1000  # largest number of references from which the ground plane is estimated
_DIRECTIONS = 300  # a panel with more cameras shows no viewing directions
_NEAR = 5.0  # metres from a reference within which an estimate is drawn, whatever the extent of the references
_MOST_PANELS = 6
_LONGEST_LEGEND = 30  # entries; a longer legend is left out
_REFERENCE: dict[str, Any] = {"marker": "o", "markersize": 6, "color": "#A0A0A0"}
_TRUE: dict[str, Any] = {**_REFERENCE, "markersize": 10, "color": style.ORANGE, "markerfacecolor": "none"}
_QUERY: dict[str, Any] = {"marker": "D", "markersize": 4, "color": style.BLUE}
_FAR: dict[str, Any] = {"marker": "s", "markersize": 6, "color": style.PURPLE}
_LOST: dict[str, Any] = {"marker": "X", "markersize": 9, "color": style.VERMILLION}


class Cameras(NamedTuple):
    """Cameras of one label in a view from above.

    Args:
        label: text of the legend.
        xy: (N, 2) metres on the ground; nan is not drawn.
        places: (N,) name of each camera's place, which decides on its panel.
        look: arguments of `Axes.plot`.
        forward: (N, 2) unit viewing directions projected to the ground; None draws none.
        framed: (N,) whether the view is fitted to each; others may lie outside. None: to all.
    """

    label: str
    xy: np.ndarray
    places: np.ndarray
    look: dict[str, Any]
    forward: np.ndarray | None = None
    framed: np.ndarray | None = None

    def at(self, places: Iterable[str]) -> Cameras:
        """The cameras at some places."""
        here = np.isin(self.places, list(places))
        forward, framed = (None if values is None else values[here] for values in (self.forward, self.framed))
        return self._replace(xy=self.xy[here], places=self.places[here], forward=forward, framed=framed)


def draw_from_above(axes: Axes, groups: Sequence[Cameras], *, letters: int = 11) -> np.ndarray:
    """Draw cameras and their viewing directions; the view is fitted to those that are `framed`.

    Returns:
        (2,) position of the axes' origin on the ground, in whole metres.
    """
    framed = np.concatenate([g.xy if g.framed is None else g.xy[g.framed] for g in groups])
    framed = framed[np.isfinite(framed).all(-1)]
    low, high = framed.min(0), framed.max(0)
    origin, margin = np.floor(low), max(0.5, 0.1 * (high - low).max())
    style.chart(axes, xlabel="m", ylabel="m", letters=letters)
    size = float(np.interp(sum(len(group.xy) for group in groups), [50, 1000], [1.0, 0.5]))
    for group in groups:
        xy, look = group.xy - origin, group.look | {"markersize": size * group.look["markersize"]}
        if not np.isfinite(xy).any():
            continue
        axes.plot(*xy.T, linestyle="none", label=group.label, **look)
        if group.forward is not None:
            axes.quiver(
                *xy.T, *group.forward.T, color=look["color"], alpha=0.7, zorder=1, scale=16, width=0.004, headwidth=1,
                headlength=0, headaxislength=0,
            )  # fmt: skip
    view = np.stack([low - margin, high + margin]) - origin
    axes.set_xlim(view[:, 0], auto=True)  # equal aspect adds to one side
    axes.set_ylim(view[:, 1], auto=True)
    axes.dataLim.set_points(view)
    axes.set_aspect("equal", adjustable="datalim")
    return origin


def top_view(scene: Scene) -> Figure:
    """Camera positions and viewing directions of a dataset from above.

    Each condition has a colour; references are grey. With one condition only, queries and references differ in
    colour, and where there is one kind only, places do.
    Places that lie far apart have a panel each, six at most, evenly spread.
    "Above" is where the images' upper edges point, on average.
    """
    images = [image for image in scene.images.values() if image.cam_from_world is not None]
    centers, rotations = _centers_and_rotations(image.cam_from_world for image in images)
    ground = ground_axes(rotations, centers).T
    places = np.array([image.place for image in images])
    labels, looks = _looks(images)
    groups = []
    for label, look in looks.items():
        mine = labels == label
        positions, forward = centers[mine] @ ground, rotations[mine, 2] @ ground
        groups.append(Cameras(style.plain_text(label), positions, places[mine], {"markersize": 5} | look, forward))
    panels = place_panels(centers @ ground, places)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = style.new_figure(
        max(640, 330 * columns), 70 + (560 if columns == 1 else 330 * rows), rows, columns, count=len(panels)
    )
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        draw_from_above(axes, [here for group in groups if len((here := group.at(names)).xy)])
        axes.set_title(style.plain_text(title))
    if len(looks) <= _LONGEST_LEGEND:
        style.shared_legend(figure, columns=5)
    return figure


def _looks(images: Sequence[SceneImage]) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
    """The label of each image (N,), and the colour and marker of each label, whose combination is used once."""
    references = np.array([image.is_reference for image in images])
    labels, plain = np.array([image.condition for image in images]), references
    if len(set(labels.tolist())) == 1:
        if references.any() and not references.all():
            labels = np.where(references, "references", "queries")
        else:
            labels, plain = np.array([f"place {image.place}" for image in images]), np.zeros_like(references)
    grey = set(labels[plain].tolist())
    looks = {label: {"color": style.GREY, "marker": "."} for label in sorted(grey)}
    for number, label in enumerate(sorted(set(labels.tolist()) - grey)):
        marker = style.MARKERS[(number + number // len(style.COLOURS)) % len(style.MARKERS)]
        looks[label] = {"color": style.COLOURS[number % len(style.COLOURS)], "marker": marker}
    return labels, looks


def positions_from_above(
    map: Map,
    localizations: Sequence[Localization],
    queries: Mapping[str, SceneImage],
    *,
    far: float | None = None,
) -> Figure:
    """References, the queries' poses, and lines from these to the true ones, from above.

    The view holds references, true poses, and estimates whose truth is not known unless they are as far off the
    references as these are spread (or 5 m); the title says how many estimates lie outside. Places that lie
    far apart have a panel each, six at most. "Above" is where the references' upper edges point.

    Args:
        far: metres; estimates that are further off than this have a colour of their own.
    """
    centers, rotations = map.poses.center().numpy(), map.poses.rotation.numpy()
    some = evenly(len(centers), _AXES_OF_GROUND)
    ground = ground_axes(rotations[some], centers[some]).T
    found, attitudes = _centers_and_rotations(result.cam_from_world for result in localizations)
    true, _ = _centers_and_rotations(queries[result.name].cam_from_world for result in localizations)
    map_places = np.array(map.places)
    places = np.array([queries[result.name].place or "" for result in localizations], dtype=object)
    positions = np.where(np.isnan(true), found, true)
    # A query whose place is not known gets that of the nearest reference.
    unknown = ~np.isin(places, map_places) & np.isfinite(positions).all(-1)
    if unknown.any():
        places[unknown] = map_places[cKDTree(centers).query(positions[unknown])[1]]
    places = places.astype(str)

    references, estimates, truths = centers @ ground, found @ ground, true @ ground
    is_far = np.linalg.norm(estimates - truths, axis=-1) > (math.inf if far is None else far)
    failed = np.isnan(estimates).any(-1) & np.isfinite(truths).all(-1)
    with_queries = np.isin(map_places, places)
    shown = with_queries if with_queries.any() else ~with_queries
    panels = place_panels(references[shown], map_places[shown])
    far_label = "" if far is None else f"query, over {format_round(far)} off"
    forward = attitudes[:, 2] @ ground
    framed = np.zeros(len(found), bool)
    for names in panels.values():
        mine = np.isin(places, list(names)) & np.isfinite(estimates).all(-1) & np.isnan(truths).any(-1)
        near = references[np.isin(map_places, list(names))]
        framed[mine] = cKDTree(near).query(estimates[mine])[0] <= max(_NEAR, np.ptp(near, axis=0).max())
    groups = (
        Cameras("reference", references, map_places, _REFERENCE, rotations[:, 2] @ ground),
        Cameras("true pose", truths, places, _TRUE),
        Cameras("query", estimates[~is_far], places[~is_far], _QUERY, forward[~is_far], framed[~is_far]),
        Cameras(far_label, estimates[is_far], places[is_far], _FAR, forward[is_far], framed[is_far]),
        Cameras("not localized", truths[failed], places[failed], _LOST),
    )
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = style.new_figure(
        WIDTH, 100 + rows * (450 if columns == 1 else 250), rows, columns, count=len(panels), dpi=SHARP
    )
    drawn = []
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        here = [one.at(names) for one in groups]
        if sum(len(one.xy) for one in here if one.forward is not None) > _DIRECTIONS:
            here = [one._replace(forward=None) for one in here]
        origin = draw_from_above(axes, here, letters=LETTERS)
        mine = np.isin(places, list(names))
        ends = np.stack([estimates[mine], truths[mine]], 1) - origin
        axes.add_collection(LineCollection(list(ends), colors=style.VERMILLION, linewidths=1.2), autolim=False)
        axes.set_title(style.plain_text(title) if len(panels) > 1 else " ")
        drawn.append((axes, ends[:, 0]))
    style.shared_legend(figure, columns=2)
    figure.draw_without_rendering()  # only now it is known what the views hold
    for axes, xy in drawn:
        low, high = axes.viewLim.get_points()
        outside = int((np.isfinite(xy).all(-1) & ((xy < low) | (xy > high)).any(-1)).sum())
        note = f"{outside:,} estimates outside" if outside else ""
        axes.set_title("   ".join(filter(None, [axes.get_title().strip(), note])))
    return figure


def _centers_and_rotations(poses: Iterable[Pose | None]) -> tuple[np.ndarray, np.ndarray]:
    """Centres (N, 3) in the world and rotations (N, 3, 3) from it; nan where there is no pose."""
    poses = list(poses)
    centers, rotations = np.full((len(poses), 3), np.nan), np.full((len(poses), 3, 3), np.nan)
    for row, pose in enumerate(poses):
        if pose is not None:
            centers[row], rotations[row] = pose.center().numpy(), pose.rotation.numpy()
    return centers, rotations


def ground_axes(rotations: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Two unit axes (2, 3) of the ground, x along the main direction in which the cameras are spread.

    Cameras have rotations (N, 3, 3) from the world, and centres (N, 3) in it.
    """
    up = -rotations[:, 1].mean(0)
    offsets = centers - centers.mean(0)
    if np.linalg.norm(up) < 0.1:  # cameras in every attitude: the ground is the plane in which they are spread
        return np.linalg.svd(offsets, full_matrices=False)[2][:2]
    up = up / np.linalg.norm(up)
    flat = np.eye(3) - np.outer(up, up)
    # The small axes give a direction where all cameras are in one spot.
    x = flat @ np.linalg.svd(np.concatenate([offsets @ flat, 1e-9 * flat]), full_matrices=False)[2][0]
    x = x / np.linalg.norm(x)
    return np.stack([x, np.cross(up, x)])


def place_panels(positions: np.ndarray, places: np.ndarray) -> dict[str, tuple[str, ...]]:
    """The places in each panel, by its title: all in one panel, or one each, six at most, if they lie far apart."""
    names = np.unique(places)
    extents = [np.ptp(positions[places == name], axis=0).max() for name in names]
    if len(names) == 1 or 10 * np.median(extents) > np.ptp(positions, axis=0).max():
        return {f"{len(places):,} images, places: {len(names)}": tuple(names)}
    return {f"place {name}": (name,) for name in names[evenly(len(names), _MOST_PANELS)]}
