"""Pictures of images: matches, feature maps, and 3D points projected before and after refinement.

Every picture is returned as a figure and, given a `path`, written there (`style.save`). Images are (3, H, W), uint8 or
float in [0, 1]; points are COLMAP pixels (the centre of the first pixel is (0.5, 0.5)); tensors may be on any device.
An array of another shape than is said here is a ValueError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from gnnet.evaluation.report import style
from gnnet.evaluation.units import Unit, show
from gnnet.models.pyramid import FeaturePyramid
from gnnet.sampling import evenly

Array = Tensor | np.ndarray | Sequence

_LINES, _ERROR_LIMIT = 100, 10.0  # lines of `matches`; pixels at which the colours of their errors end
_SAMPLED_CELLS = 20_000  # cells of each map from which `pca_colours` finds its components
# Marks of projected points. Their edges have the opposite brightness, so that they stand out of any image.
_TRUE: dict[str, Any] = {
    "marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "white", "markeredgewidth": 1.6,
    "path_effects": [withStroke(linewidth=3, foreground="black")], "label": "at the true pose",
}  # fmt: skip
_INITIAL: dict[str, Any] = {
    "marker": "X", "markersize": 8, "markerfacecolor": style.VERMILLION, "markeredgecolor": "white",
    "label": "at the initial pose",
}  # fmt: skip
_REFINED: dict[str, Any] = {
    "marker": "o", "markersize": 5, "markerfacecolor": style.SKY, "markeredgecolor": "black",
    "label": "at the refined pose",
}  # fmt: skip


@dataclass(frozen=True)
class OverviewRow:
    """One query of `overview`: an image, its features, and where 3D points project in it.

    Args:
        condition: the row's name: `night`, `snow`, …
        image: (3, H, W).
        features: (C, h, w), the map of one level; C is the same in all rows.
        stride: pixels a cell.
        xy_truth, xy_before, xy_after: (N, 2) projections at the true, the initial and the refined pose.
        before, after: errors of the initial and the refined pose, such as `4 mm, 0.05°`.
    """

    condition: str
    image: Array
    features: Array
    stride: int
    xy_truth: Array
    xy_before: Array
    xy_after: Array
    before: str = ""
    after: str = ""


def matches(
    image_a: Array, image_b: Array, keypoints_a: Array, keypoints_b: Array, *, errors: Array,
    path: str | Path | None = None,
) -> Figure:  # fmt: skip
    """Two images side by side with lines between keypoints (N, 2) of a and b, some of them, evenly spread.

    Args:
        errors: (N,) pixels, which colour the lines; from `_ERROR_LIMIT` on (inf, nan) they have one colour.
    """
    images = as_image(image_a, "image_a"), as_image(image_b, "image_b")
    xy_a = as_numbers(keypoints_a, "keypoints_a", "N", 2)
    xy_b = as_numbers(keypoints_b, "keypoints_b", len(xy_a), 2)
    distance = as_numbers(errors, "errors", len(xy_a))
    drawn = evenly(len(xy_a), _LINES)
    shown = np.nan_to_num(distance[drawn], nan=_ERROR_LIMIT, posinf=_ERROR_LIMIT)
    best_last = np.argsort(-shown)
    drawn, scale = drawn[best_last], ScalarMappable(Normalize(0, _ERROR_LIMIT), style.ERROR)
    figure, ((axes,),) = style.new_figure(1000, 40 + 500 * images[0].shape[0] / images[0].shape[1])
    figure.colorbar(scale, ax=axes, extend="max", shrink=0.8, pad=0.01, aspect=25, label="error [px]")
    draw_matches(axes, images, (xy_a[drawn], xy_b[drawn]), scale.to_rgba(shown[best_last]))
    title = f"{len(xy_a)} matches"
    if len(distance):
        title += f", median error {show(np.median(distance), Unit.NUMBER)} px, {np.mean(distance <= 3):.0%} within 3 px"
    axes.set_title(title + (f" ({len(drawn)} drawn)" if len(drawn) < len(xy_a) else ""))
    style.save(figure, path)
    return figure


def draw_matches(
    axes: Axes,
    images: tuple[np.ndarray, np.ndarray],
    keypoints: tuple[np.ndarray, np.ndarray | None],
    colours: Any,
    *,
    below: bool = False,
) -> None:
    """Draw image b beside image a, as high as a, with a line for each match.

    Args:
        images: a and b, (H, W, 3) or grey (H, W), uint8.
        keypoints: (N, 2) pixels of each; None for b shows the points of a alone.
        colours: one colour, or one for each match (N, 4).
        below: b stands below a, as wide as a.
    """
    (height, width), (height_b, width_b) = (image.shape[:2] for image in images)
    scale = width / width_b if below else height / height_b
    corner = np.array([0, 1.05 * height] if below else [1.02 * width, 0])
    right, bottom = corner + scale * np.array([width_b, height_b])
    show_image(axes, images[0], (0, width, height, 0))
    show_image(axes, images[1], (corner[0], right, bottom, corner[1]))
    axes.set(xlim=(0, right), ylim=(bottom, 0))
    ends = [keypoints[0]]
    if keypoints[1] is not None:
        ends.append(keypoints[1] * scale + corner)
        halo = [withStroke(linewidth=1.8, foreground="black", alpha=0.3)]
        axes.add_collection(LineCollection(list(np.stack(ends, 1)), colors=colours, linewidths=0.9, path_effects=halo))
    for xy in ends:
        axes.scatter(xy[:, 0], xy[:, 1], s=18, c=colours, edgecolors="black", linewidths=0.6, zorder=3)


class Projections(NamedTuple):
    """One panel of `projections`: points of an image with a mark each.

    Args:
        title: may have two lines.
        xy: (N, 2) points, with a mark each; None draws the rings alone. A point with nan is left out.
        truth: (N, 2) points at the true pose, with a ring each and a line from the mark; None where it is not known.
        ends: (N, 2) points to which lines lead where `truth` is None.
        refined: whether `xy` are at the refined pose, or at the initial one.
    """

    title: str
    xy: np.ndarray | None = None
    truth: np.ndarray | None = None
    ends: np.ndarray | None = None
    refined: bool = False


def projections(image: np.ndarray, panels: Sequence[Projections], *, columns: int, width: float) -> Figure:
    """An image (H, W, 3) several times, each with other points."""
    rows = math.ceil(len(panels) / columns)
    figure, grid = picture_grid(
        [image.shape[0] / image.shape[1]] * rows, columns=columns, width=width, count=len(panels)
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_projections(axes, image, panel)
        axes.set_title(panel.title)
    style.shared_legend(figure)
    return figure


def before_after(
    query_image: Array,
    *,
    xy_truth: Array,
    xy_before: Array,
    xy_after: Array,
    before: str = "",
    after: str = "",
    path: str | Path | None = None,
) -> Figure:
    """A query image with its 3D points projected at the initial pose (left) and at the refined pose (right).

    White rings are the projections at the true pose. The titles give the median distance to them.

    Args:
        xy_truth, xy_before, xy_after: (N, 2); a point with nan does not project and is left out.
        before, after: pose errors to add to the titles, such as `0.52 m, 4.1°`.
    """
    truth, panels = as_numbers(xy_truth, "xy_truth", "N", 2), []
    both = ("initial", "xy_before", xy_before, before), ("refined", "xy_after", xy_after, after)
    for pose, name, points, error in both:
        xy = as_numbers(points, name, len(truth), 2)
        median = median_distance(xy, truth, "no point")
        title = f"{pose} pose: {error} ({median})" if error else f"{pose} pose: {median}"
        panels.append(Projections(title, xy, truth, refined=pose == "refined"))
    figure = projections(as_image(query_image, "query_image"), panels, columns=2, width=1000)
    style.save(figure, path)
    return figure


def median_distance(xy: np.ndarray, truth: np.ndarray, none: str) -> str:
    """Median distance between points (N, 2) that are finite, in words; `none` where there are no such points."""
    distance = np.linalg.norm(xy - truth, axis=-1)
    distance = distance[np.isfinite(distance)]
    return f"median {show(np.median(distance), Unit.NUMBER)} px" if len(distance) else none


def feature_maps(image: Array, pyramid: FeaturePyramid, *, path: str | Path | None = None) -> Figure:
    """An image beside its feature maps, coarse to fine, the three main components of each as red, green and blue.

    Args:
        image: (3, H, W), the image that the network saw.
        pyramid: maps (B, C, h, w) of a batch, whose first element is shown; `pyramid.select` picks levels.
    """
    shown = as_image(image, "image")
    height, width = shown.shape[:2]
    panels = 1 + len(pyramid.maps)
    columns = panels if panels <= 3 else math.ceil(panels / 2)
    aspects = [height / width] * math.ceil(panels / columns)
    figure, grid = picture_grid(aspects, columns=columns, width=min(1200, 450 * columns), count=panels)
    first, *others = grid.flat
    show_image(first, shown)
    first.set_title(f"image, {width} × {height}")
    for axes, features, stride in zip(others, pyramid.maps, pyramid.strides, strict=False):
        show_features(axes, pca_colours([features[0]])[0], stride, shown)
        axes.set_title(f"features at 1/{stride}, {features.shape[1]} channels")
    style.save(figure, path)
    return figure


def overview(rows: Sequence[OverviewRow], *, path: str | Path | None = None) -> Figure:
    """Conditions as rows; image, features, initial pose and refined pose as columns.

    Features have comparable colours in all rows: their components are found jointly.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("overview has no rows; expected one OverviewRow or more")
    images = [as_image(row.image, f"image of {row.condition}") for row in rows]
    colours = pca_colours([row.features for row in rows])
    figure, grid = picture_grid([image.shape[0] / image.shape[1] for image in images], columns=4, width=1000, heading=4)
    for axes, title in zip(grid[0], ("image", "features", "initial pose", "refined pose"), strict=True):
        axes.set_title(title)
    for line, row, image, colour in zip(grid, rows, images, colours, strict=True):
        truth = as_numbers(row.xy_truth, f"xy_truth of {row.condition}", "N", 2)
        show_image(line[0], image)
        line[0].set_ylabel(style.plain_text(row.condition), fontsize=12)
        show_features(line[1], colour, row.stride, image)
        for axes, points, error in ((line[2], row.xy_before, row.before), (line[3], row.xy_after, row.after)):
            xy = as_numbers(points, f"projections of {row.condition}", len(truth), 2)
            panel = Projections("", xy, truth, refined=axes is line[3])
            draw_projections(axes, image, panel, max_points=30, size=0.7)
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
            axes.text(0.02, 0.03, error, transform=axes.transAxes, fontsize=9, bbox=box)
    style.shared_legend(figure)
    style.save(figure, path)
    return figure


def picture_grid(
    aspects: Sequence[float], *, columns: int, width: float, heading: float = 25, count: int | None = None
) -> tuple[Figure, np.ndarray]:
    """A figure with room for titles and a legend, and its axes (len(aspects), columns).

    Args:
        aspects: height over width of the pictures in each row.
        width, heading: width of the figure, and height left above each row; in hundredths of an inch.
        count: see `style.new_figure`.
    """
    height = 60 + sum(width / columns * aspect + heading for aspect in aspects)
    return style.new_figure(width, height, len(aspects), columns, count=count, height_ratios=aspects)


def show_image(axes: Axes, image: np.ndarray, extent: tuple[float, float, float, float] | None = None) -> None:
    """Show an image (H, W, 3) or (H, W) without ticks, in COLMAP pixels, or in left, right, bottom, top of `extent`."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=extent or (0, width, height, 0), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def show_features(axes: Axes, colours: np.ndarray, stride: int, image: np.ndarray) -> None:
    """Show the colours (h, w, 3) of a feature map of `stride` in the pixels of its image (H, W, 3)."""
    rows, columns = colours.shape[:2]
    show_image(axes, colours, (0, columns * stride, rows * stride, 0))
    axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))  # the last cells may reach beyond the image


def draw_projections(
    axes: Axes, image: np.ndarray, panel: Projections, *, max_points: int = 60, size: float = 1.0
) -> None:
    """Show an image (H, W, 3) with the points of a panel, whose title is left out.

    Args:
        max_points: number of points drawn, evenly spread over those that are finite and whose truth is in the image.
        size: factor of the marks.
    """
    show_image(axes, image)
    xy, truth, target = panel.xy, panel.truth, panel.ends if panel.truth is None else panel.truth
    marked = [points for points in (xy, truth) if points is not None]
    if not marked:
        return
    seen = np.isfinite(np.concatenate(marked, 1)).all(-1)
    if truth is not None:
        seen &= ((truth >= 0) & (truth <= (image.shape[1], image.shape[0]))).all(-1)
    rows = np.flatnonzero(seen)
    rows = rows[evenly(len(rows), max_points)]
    mark = _REFINED if panel.refined else _INITIAL
    if xy is not None and target is not None:
        lines = list(np.stack([xy, target], 1)[rows])
        halo = [withStroke(linewidth=2.6 * size, foreground="black", alpha=0.6)]
        colour = mark["markerfacecolor"]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=1.3 * size, path_effects=halo))
    for points, look in ((truth, _TRUE), (xy, mark)):
        if points is not None:
            axes.plot(*points[rows].T, linestyle="none", **look | {"markersize": size * look["markersize"]})


def pca_colours(maps: Sequence[Array]) -> list[np.ndarray]:
    """Colours (h, w, 3) in [0, 1] of maps (C, h, w): their three main components, common to all maps.

    Each component is stretched between its 1st and 99th percentile. Maps of one channel turn out
    grey; a missing third component is constant.

    Raises:
        ValueError: if a map has not the C of the first, or holds values that are not finite.
    """
    arrays = [as_numbers(features, "a feature map", "C", "h", "w") for features in maps]
    for array in arrays:
        as_numbers(array, "a feature map", len(arrays[0]), "h", "w")
        if not np.isfinite(array).all():
            raise ValueError("a feature map holds values that are not finite; the network may have diverged")
    cells = [array.reshape(array.shape[0], -1).T for array in arrays]  # each (h·w, C)
    sample = np.concatenate([rows[evenly(len(rows), _SAMPLED_CELLS)] for rows in cells])
    mean = sample.mean(0)
    _, vectors = np.linalg.eigh((sample - mean).T @ (sample - mean))
    axes = vectors[:, ::-1][:, [0, 0, 0] if vectors.shape[1] == 1 else slice(3)]
    # An eigenvector's sign is arbitrary; this choice makes pictures repeatable.
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
    low, high = np.quantile((sample - mean) @ axes, [0.01, 0.99], axis=0)
    colours = [(((rows - mean) @ axes - low) / np.maximum(high - low, 1e-12)).clip(0, 1) for rows in cells]
    return [values.reshape(*array.shape[1:], 3) for values, array in zip(colours, arrays, strict=True)]


def as_image(image: Array, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image (3, H, W), or a ValueError if it is neither uint8 nor float in [0, 1]."""
    values = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.asarray(image))
    if values.ndim != 3 or values.shape[0] != 3:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected one RGB image (3, H, W)")
    if values.dtype != torch.uint8:
        values = values.to(torch.float64)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"{name} has values from {values.min():g} to {values.max():g}; expected uint8, or float in [0, 1]"
            )
        values = (values * 255).round().to(torch.uint8)
    return values.permute(1, 2, 0).numpy()


def as_numbers(values: Array, name: str, *shape: int | str) -> np.ndarray:
    """A float64 array of a `shape`, where a letter stands for any length; `name` is the argument's, for the error."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    fits = [isinstance(n, str) or n == found for n, found in zip(shape, array.shape, strict=False)]
    if array.ndim != len(shape) or not all(fits):
        expected = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{name} has shape {array.shape}; expected {expected}")
    return array
