"""Figures of training and localization, as matplotlib `Figure`s that leave pyplot's global state alone.

Every function returns its figure and, given a `path`, writes it there as a PNG of at most
`drawing.MAX_BYTES`. Images are (3, H, W), uint8 or float in [0, 1]; points are COLMAP pixels (the centre of
the first pixel is (0.5, 0.5)); tensors may be on any device. Colours are Okabe and Ito's, which
colour-blind readers can tell apart, and shapes differ wherever colours do.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from gnnet.evaluation.report import pictures as drawing
from gnnet.evaluation.report.pictures import Array, as_image, as_points, as_vector
from gnnet.models.pyramid import FeaturePyramid

Series = Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True)
class OverviewRow:
    """One query of `overview`: an image, its features, and where 3D points project in it.

    Args:
        condition: the row's name: `night`, `snow`, …
        image: (3, H, W).
        features: (C, h, w), one level's map; every row's has the same C.
        stride: pixels a cell.
        xy_truth: (N, 2) projections at the true pose.
        xy_before: (N, 2) at the pose refinement started from; None for a reference image.
        xy_after: (N, 2) at the refined pose; None for a reference image.
        before, after: pose errors to write into the pictures, such as `4 mm, 0.05°`.
    """

    condition: str
    image: Array
    features: Array
    stride: int
    xy_truth: Array
    xy_before: Array | None = None
    xy_after: Array | None = None
    before: str = ""
    after: str = ""


def loss_curves(
    source: str | Path | Series, *, select: str = "loss", title: str = "Losses", path: str | Path | None = None
) -> Figure:
    """Training and validation series against the training step, one panel a quantity.

    `train/loss`, `train/loss_step` and `validation/loss` are one quantity in one panel. Training
    series are drawn pale with their running mean on top; an axis that spans a factor of 20 and
    more is logarithmic.

    Args:
        source: Lightning's `metrics.csv` (its empty cells and rows that hold one half of the columns
            only are expected), or series by name: (steps, values), each (N,).
        select: draw the series whose name contains this.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no `step` column, or no finite value in a series that is asked for.
    """
    series = _series_of_csv(Path(source)) if isinstance(source, str | Path) else _checked_series(source)
    chosen = {name: _finite(*pair) for name, pair in series.items() if select in name}
    chosen = {name: pair for name, pair in chosen.items() if len(pair[0])}
    if not chosen:
        found = ", ".join(series) or "none"
        raise ValueError(f"no series with a finite value has {select!r} in its name; found {found}")
    panels: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(chosen):
        stage, quantity = _stage_and_quantity(name)
        panels.setdefault(quantity, []).append((stage, name))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = drawing.new_figure(max(640, 420 * columns), 40 + 340 * rows, layout="constrained")
    figure.suptitle(title, fontsize=13)
    for i, (quantity, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        drawing.chart(axes, xlabel="training step", ylabel=quantity)
        for k, (stage, name) in enumerate(members):
            style = _STAGES.index(stage) if stage in _STAGES else len(_STAGES) + k
            _draw_series(axes, *chosen[name], label=stage, style=style)
        values = np.concatenate([chosen[name][1] for _, name in members])
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9)
    return _finish(figure, path)


def matches(
    image_a: Array,
    image_b: Array,
    keypoints_a: Array,
    keypoints_b: Array,
    *,
    errors: Array | None = None,
    error_limit: float = 10.0,
    max_lines: int = 100,
    title: str | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Two images side by side with lines between keypoints (N, 2) of a and b.

    Args:
        errors: (N,) pixels, which colour the lines; inf and nan are drawn as `error_limit`.
        error_limit: pixels at which the colour scale ends.
        max_lines: draw so many, evenly spread over the list.

    Raises:
        ValueError: if a shape is not as said.
    """
    image_a, image_b = as_image(image_a, "image_a"), as_image(image_b, "image_b")
    xy_a = as_points(keypoints_a, "keypoints_a")
    xy_b = as_points(keypoints_b, "keypoints_b", count=len(xy_a))
    (height_a, width_a), (height_b, width_b) = image_a.shape[:2], image_b.shape[:2]
    scale = height_a / height_b  # b is drawn as high as a
    offset = 1.02 * width_a
    total = offset + scale * width_b
    width = 1000 if errors is None else 920  # beside the colour bar
    figure = drawing.new_figure(1000, round(width * height_a / total) + 36, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image_a, extent=(0, width_a, height_a, 0))
    axes.imshow(image_b, extent=(offset, total, height_a, 0))
    axes.set(xlim=(0, total), ylim=(height_a, 0))
    axes.axis("off")
    text = f"{len(xy_a)} matches"
    colours = None
    if errors is not None:
        errors = as_vector(errors, "errors", count=len(xy_a))
        colours = np.nan_to_num(errors, nan=error_limit, posinf=error_limit)
        if len(errors):
            text += f", median error {drawing.format_pixels(np.median(errors))}, {np.mean(errors <= 3):.0%} within 3 px"
    drawn = drawing.spread(len(xy_a), max_lines)
    start, end = xy_a[drawn], xy_b[drawn] * scale + [offset, 0]
    if len(drawn) < len(xy_a):
        text += f" ({len(drawn)} drawn)"
    _draw_matches(axes, start, end, None if colours is None else colours[drawn], error_limit)
    axes.set_title(title or text, fontsize=12)
    return _finish(figure, path)


def before_after(
    query_image: Array,
    *,
    xy_truth: Array,
    xy_before: Array,
    xy_after: Array,
    before: str = "",
    after: str = "",
    max_points: int = 60,
    path: str | Path | None = None,
) -> Figure:
    """A query image with the projections of its 3D points at the start pose (left) and the refined pose (right).

    White rings are the projections at the true pose. The titles give the median distance to them.

    Args:
        xy_truth, xy_before, xy_after: (N, 2); nan where a point does not project, and it is left out.
        before, after: pose errors to add to the titles, such as `0.52 m, 4.1°`.
        max_points: draw so many, evenly spread over the list.

    Raises:
        ValueError: if a shape is not as said.
    """
    image = as_image(query_image, "query_image")
    truth = as_points(xy_truth, "xy_truth")
    height, width = image.shape[:2]
    figure, grid = drawing.picture_grid(width=494, heights=[round(494 * height / width)], columns=2, bottom=36)
    for k, (name, xy, error) in enumerate([("start", xy_before, before), ("refined", xy_after, after)]):
        xy = as_points(xy, "xy_before" if k == 0 else "xy_after", count=len(truth))
        axes = grid[0][k]
        drawing.show_image(axes, image)
        drawing.draw_projections(axes, truth, xy, refined=k == 1, max_points=max_points)
        distance = np.linalg.norm(xy - truth, axis=-1)
        distance = distance[np.isfinite(distance)]
        median = f"median {drawing.format_pixels(np.median(distance))}" if len(distance) else "no point"
        axes.set_title(f"{name} pose: {error} ({median})" if error else f"{name} pose: {median}", fontsize=12)
    drawing.projection_legend(figure)
    return _finish(figure, path)


def convergence_basin(
    ring_edges: Array,
    converged: Mapping[str, Array],
    counts: Array,
    *,
    unit: str = "m",
    quantity: str = "start offset",
    title: str = "Share of starts that converge",
    path: str | Path | None = None,
) -> Figure:
    """Share of starts that converge against how far off they start, one curve a method.

    Bands are 95 % Wilson intervals: how far a share could be off for the number of starts it rests on.

    Args:
        ring_edges: (K + 1,) rising offsets in `unit`; ring k holds the starts between edges k and k + 1.
        converged: by method, shares (K,) in 0 to 1; nan where unknown.
        counts: (K,) starts in each ring; written above the curves.

    Raises:
        ValueError: if a shape is not as said, edges do not rise, or a share is not in 0 to 1.
    """
    edges = as_vector(ring_edges, "ring_edges")
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"ring_edges are {edges.tolist()}; expected two or more rising offsets")
    counts = as_vector(counts, "counts", count=len(edges) - 1)
    centres = (edges[1:] + edges[:-1]) / 2
    figure = drawing.new_figure(720, 440, layout="constrained")
    axes = figure.add_subplot()
    drawing.chart(axes, xlabel=f"{quantity} [{unit}]", ylabel="converged [%]")
    for k, (method, shares) in enumerate(converged.items()):
        shares = as_vector(shares, f"converged[{method!r}]", count=len(counts))
        if ((shares < 0) | (shares > 1)).any():
            raise ValueError(f"converged[{method!r}] is {shares.tolist()}; expected shares in 0 to 1")
        shares = np.where(counts > 0, shares, np.nan)
        colour, marker = drawing.COLOURS[k % len(drawing.COLOURS)], drawing.MARKERS[k % len(drawing.MARKERS)]
        low, high = drawing.wilson_interval(shares, np.maximum(counts, 1))
        axes.fill_between(centres, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(centres, 100 * shares, color=colour, marker=marker, markersize=6, label=method)
    axes.set(ylim=(-3, 116), xlim=(edges[0], edges[-1]), yticks=range(0, 101, 20), xticks=edges)
    axes.set_xticks(edges, [f"{edge:g}" for edge in edges])
    if len(set(counts)) == 1:
        axes.set_xlabel(f"{quantity} [{unit}], {int(counts[0])} starts a ring", fontsize=11)
    else:
        rotation = 90 if np.diff(edges).min() < 0.08 * (edges[-1] - edges[0]) else 0
        for centre, count in zip(centres, counts, strict=True):
            text = {"ha": "center", "va": "bottom", "fontsize": 8, "rotation": rotation}
            axes.text(centre, 104, f"n={int(count)}", color=drawing.GREY, **text)
    axes.set_title(title, fontsize=13)
    if converged:
        axes.legend(frameon=False, fontsize=10, loc="best")
    return _finish(figure, path)


def feature_maps(image: Array, pyramid: FeaturePyramid, *, index: int = 0, path: str | Path | None = None) -> Figure:
    """An image beside its feature maps, coarse to fine, the three main components of each as red, green and blue.

    Args:
        image: (3, H, W), the image that the network saw.
        pyramid: maps (B, C, h, w); `pyramid.select` picks levels.
        index: which of the batch.
    """
    image = as_image(image, "image")
    height, width = image.shape[:2]
    panels = 1 + len(pyramid.maps)
    columns = panels if panels <= 3 else math.ceil(panels / 2)
    cell = min(450, 1200 // columns)
    heights = [round(cell * height / width)] * math.ceil(panels / columns)
    figure, grid = drawing.picture_grid(width=cell, heights=heights, columns=columns, between=28)
    first, *others = [axes for line in grid for axes in line]
    drawing.show_image(first, image)
    first.set_title(f"image, {width} × {height}", fontsize=11)
    for axes, features, stride in zip(others, pyramid.maps, pyramid.strides, strict=False):
        drawing.show_features(axes, drawing.pca_colours([features[index]])[0], stride, image)
        axes.set_title(f"features at 1/{stride}, {features.shape[1]} channels", fontsize=11)
    for axes in others[len(pyramid.maps) :]:
        axes.remove()
    return _finish(figure, path)


def overview(rows: Sequence[OverviewRow], *, max_points: int = 30, path: str | Path | None = None) -> Figure:
    """Conditions as rows; image, features, start pose and refined pose as columns.

    One colour of features means one feature in all rows: their components are found jointly.

    Raises:
        ValueError: if there is no row, or a shape is not as `OverviewRow` says.
    """
    if not rows:
        raise ValueError("overview has no rows; expected one OverviewRow or more")
    images = [as_image(row.image, f"image of {row.condition}") for row in rows]
    colours = drawing.pca_colours([row.features for row in rows])
    cell = 200
    heights = [round(cell * image.shape[0] / image.shape[1]) for image in images]
    figure, grid = drawing.picture_grid(width=cell, heights=heights, columns=4, left=30, bottom=36)
    for axes, title in zip(grid[0], ("image", "features", "start pose", "refined pose"), strict=True):
        axes.set_title(title, fontsize=12)
    for line, row, image, colour in zip(grid, rows, images, colours, strict=True):
        truth = as_points(row.xy_truth, f"xy_truth of {row.condition}")
        drawing.show_image(line[0], image)
        line[0].set_ylabel(row.condition, fontsize=12)
        drawing.show_features(line[1], colour, row.stride, image, block=2)
        for axes, xy, error, refined in (
            (line[2], row.xy_before, row.before, False),
            (line[3], row.xy_after, row.after, True),
        ):
            if xy is None and refined:  # a reference's points are shown once
                axes.axis("off")
                continue
            drawing.show_image(axes, image)
            xy = None if xy is None else as_points(xy, f"projections of {row.condition}", count=len(truth))
            drawing.draw_projections(axes, truth, xy, refined=refined, max_points=max_points, size=0.6)
            label = "3D points" if xy is None else error
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
            axes.text(0.02, 0.03, label, transform=axes.transAxes, fontsize=9, bbox=box, zorder=5)
    drawing.projection_legend(figure)
    return _finish(figure, path)


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        drawing.save(figure, path)
    return figure


def _draw_matches(axes: Axes, start: np.ndarray, end: np.ndarray, errors: np.ndarray | None, limit: float) -> None:
    """Lines from `start` to `end` (N, 2), coloured by errors (N,) where given; the best on top."""
    lines = {"linewidths": 1.0, "alpha": 0.85}
    if errors is None:
        axes.add_collection(LineCollection(np.stack([start, end], 1), colors=drawing.SKY, **lines))
        colours = drawing.SKY
    else:
        order = np.argsort(-errors)
        start, end = start[order], end[order]
        # Bright at both ends, as a bad match must be seen on a dark image too.
        colour_map = LinearSegmentedColormap.from_list("error", [drawing.SKY, drawing.YELLOW, drawing.VERMILLION])
        scale = ScalarMappable(Normalize(0, limit), colour_map)
        colours = scale.to_rgba(errors[order])
        axes.add_collection(LineCollection(np.stack([start, end], 1), colors=colours, **lines))
        bar = axes.figure.colorbar(scale, ax=axes, extend="max", shrink=0.8, pad=0.01, aspect=25)
        bar.set_label("error [px]", fontsize=11)
        bar.ax.tick_params(labelsize=9)
    for points in (start, end):
        axes.scatter(points[:, 0], points[:, 1], s=14, c=colours, edgecolors="black", linewidths=0.5, zorder=3)


def _draw_series(axes: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, style: int) -> None:
    """One curve; long training series pale with their running mean on top."""
    colour = drawing.COLOURS[style % len(drawing.COLOURS)]
    if label.startswith("train") and len(values) > 50:
        window = len(values) // 25
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        values, label = drawing.running_mean(values, window), f"{label} (mean of {window})"
        axes.plot(steps, values, color=colour, linewidth=2, label=label)
        return
    marker = drawing.MARKERS[style % len(drawing.MARKERS)] if len(values) <= 50 else None
    axes.plot(steps, values, color=colour, linewidth=2, marker=marker, markersize=5, label=label)


_STAGES = ("train", "validation", "test", "train (epoch)", "validation (epoch)")  # each has its own colour


def _stage_and_quantity(name: str) -> tuple[str, str]:
    """`train/loss_step` is `train`, `loss`; `val_loss` is `validation`, `loss`; another name is its own stage."""
    name = name.removesuffix("_step")
    epoch = name.endswith("_epoch")
    name = name.removesuffix("_epoch")
    for prefix, stage in (("train", "train"), ("validation", "validation"), ("valid", "validation"),
                          ("val", "validation"), ("test", "test")):  # fmt: skip
        for separator in "/_":
            if name.startswith(prefix + separator):
                return stage + (" (epoch)" if epoch else ""), name[len(prefix) + 1 :]
    return name, name


def _series_of_csv(path: Path) -> Series:
    """Columns of Lightning's metrics.csv against its `step` column, cells that are empty left out."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected the metrics.csv of Lightning's CSVLogger")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []
    if "step" not in names:
        raise ValueError(f"{path} has the columns {', '.join(names) or 'none'}; expected step, as CSVLogger writes it")
    series = {}
    for name in names:
        cells = [(row["step"], row[name]) for row in rows if row["step"] and row[name]]
        try:
            values = np.array(cells, dtype=np.float64).reshape(-1, 2)
        except ValueError as error:
            raise ValueError(f"{path}: column {name} holds a cell that is not a number ({error})") from error
        series[name] = (values[:, 0], values[:, 1])
    return {name: pair for name, pair in series.items() if name not in ("step", "epoch")}


def _checked_series(series: Series) -> Series:
    checked = {}
    for name, (steps, values) in series.items():
        steps = as_vector(steps, f"steps of {name!r}")
        checked[name] = (steps, as_vector(values, f"values of {name!r}", count=len(steps)))
    return checked


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(values)
    return steps[keep], values[keep]
