"""Pictures of a dataset: pairs with their correspondences, how many these are, and where the cameras stood.

In a contact sheet the photographs are grey, and a correspondence has one colour in both, which follows its place
in the left image from left (blue) to right (red). A wrong one is a line across its neighbours, and a dot of
another colour than theirs in the right image. The patches beside show some correspondences close up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import track
from scipy.ndimage import uniform_filter
from torchvision.transforms.v2.functional import rgb_to_grayscale

from gnnet.data.images import even_subset, limit_size, read_image
from gnnet.evaluation.inspect.inspection import Distribution, Inspection, condition_pairs
from gnnet.evaluation.inspect.pairs import PairReader
from gnnet.evaluation.report import pictures as drawing
from gnnet.sampling import evenly
from gnnet.scenes.scene import Pair, Scene, SceneImage

PAIRS = 12  # drawn
PAIRS_A_SHEET = 4
LINES = 60  # a pair
_POSITION = LinearSegmentedColormap.from_list(
    "position", [drawing.BLUE, drawing.SKY, drawing.YELLOW, drawing.ORANGE, drawing.VERMILLION]
)
_LARGEST_SIDE = 1600  # pixels of the images that are cut up
# Pixels of the PNG: an image's box, a patch, what lies between, and a row's heading.
_BOX, _PATCH, _GAP, _HEADING = (350, 300), 68, 4, 36
_LEAST_WIDTH = 180  # of an image's column, for the heading
_PATCH_COLUMNS = 2  # of pairs of patches
_PATCH_SIDE = 1 / 16  # of an image's longer side
_LONGEST_LEGEND = 30


class Row(NamedTuple):
    """One pair of a contact sheet.

    Args:
        title, names: two lines above it.
        images: a and b, (H, W) uint8 each.
        keypoints: (N, 2) in each, COLMAP pixels.
        weight: (N,).
    """

    title: str
    names: str
    images: tuple[np.ndarray, np.ndarray]
    keypoints: tuple[np.ndarray, np.ndarray]
    weight: np.ndarray


def draw_dataset(
    scene: Scene, inspection: Inspection, folder: str | Path, *, pairs: int = PAIRS, progress: bool = True
) -> list[Path]:
    """Write `pairs-1.png`, … (contact sheets), `correspondences.png` and, where poses are known, `cameras.png`.

    Pairs that cannot be read are left out; the inspection of all pairs says which they are.

    Returns:
        What was written.
    """
    folder, written, rows = Path(folder), [], []
    for pair in track(choose_pairs(scene, pairs), "Drawing pairs", disable=not progress, transient=True):
        try:
            rows.append(_read_row(scene, pair))
        except (OSError, ValueError):
            continue
    for first in range(0, len(rows), PAIRS_A_SHEET):
        written.append(folder / f"pairs-{first // PAIRS_A_SHEET + 1}.png")
        drawing.save(contact_sheet(rows[first : first + PAIRS_A_SHEET]), written[-1])
    if inspection.correspondences is not None:
        written.append(folder / "correspondences.png")
        drawing.save(distributions(inspection), written[-1])
    if any(image.cam_from_world is not None for image in scene.images.values()):
        written.append(folder / "cameras.png")
        drawing.save(top_view(scene), written[-1])
    return written


def choose_pairs(scene: Scene, count: int) -> list[Pair]:
    """At most `count` pairs, as many of each pair of conditions, evenly spread over these."""
    groups = condition_pairs(scene)
    shares = dict.fromkeys(groups, 0)
    for _ in range(min(count, len(scene.pairs))):
        unfinished = [key for key in groups if shares[key] < len(groups[key])]
        shares[min(unfinished, key=shares.__getitem__)] += 1
    return [scene.pairs[group[k]] for key, group in groups.items() for k in evenly(len(group), shares[key])]


def _read_row(scene: Scene, pair: Pair) -> Row:
    images, factors, sizes = [], [], {}
    for name in (pair.image_a, pair.image_b):
        whole = read_image(scene.images[name].path)
        sizes[name] = whole.shape[-1], whole.shape[-2]
        image, factor = limit_size(whole, _LARGEST_SIDE)
        images.append(rgb_to_grayscale(image)[0].numpy())
        factors.append(factor)
    matches = PairReader(scene, sizes)(pair)
    # Unweighted: a light line is better than none.
    drawn = even_subset(matches.keypoints_a, sizes[pair.image_a], LINES, np.random.default_rng(0))
    conditions = " ↔ ".join(scene.images[name].condition for name in (pair.image_a, pair.image_b))
    count = max(pair.count, len(matches.weight))
    return Row(
        title=f"{conditions}   {count:,} correspondences, {len(drawn)} drawn",
        names=f"{_ending(pair.image_a)}   ↔   {_ending(pair.image_b)}",
        images=tuple(images),
        keypoints=(matches.keypoints_a[drawn] * factors[0], matches.keypoints_b[drawn] * factors[1]),
        weight=matches.weight[drawn],
    )


def _ending(name: str, longest: int = 64) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def contact_sheet(rows: Sequence[Row]) -> Figure:
    """One row a pair: both images with lines between corresponding points, and patches around some of these.

    Lines are the fainter the smaller their weight against the pair's largest.
    """
    sizes = [[_shown_size(image) for image in row.images] for row in rows]
    heights = [max(_PATCH, *(round(height) for _, height in pair)) for pair in sizes]
    columns = [_GAP]  # left edges of a, b and the patches
    for side in (0, 1):
        columns.append(columns[-1] + _GAP + max(_LEAST_WIDTH, *(round(pair[side][0]) for pair in sizes)))
    width = columns[-1] + _PATCH_COLUMNS * (2 * _PATCH + 3 * _GAP)
    height = sum(heights) + len(rows) * (_HEADING + 2 * _GAP)
    figure = drawing.new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    top = 0
    for row, row_height in zip(rows, heights, strict=True):
        axes.text(_GAP, top + 13, row.title, fontsize=9, fontweight="bold", va="center")
        axes.text(_GAP, top + 28, row.names, fontsize=7, color=drawing.GREY, va="center")
        _draw_row(axes, row, columns, top + _HEADING, row_height)
        top += _HEADING + row_height + 2 * _GAP
    return figure


def _shown_size(image: np.ndarray) -> tuple[float, float]:
    """Width and height in pixels of the PNG."""
    height, width = image.shape
    factor = min(_BOX[0] / width, _BOX[1] / height)
    return width * factor, height * factor


def _draw_row(axes: Axes, row: Row, columns: list[int], top: int, height: int) -> None:
    ends = []
    for side, (image, xy) in enumerate(zip(row.images, row.keypoints, strict=True)):
        size, left = _shown_size(image), columns[side]
        _paste(axes, Image.fromarray(image).resize([max(1, round(s)) for s in size], Image.Resampling.BOX), left, top)
        ends.append(xy * (size[0] / image.shape[1], size[1] / image.shape[0]) + (left, top))
    x = row.keypoints[0][:, 0]
    colours = _POSITION((x - x.min()) / max(1.0, np.ptp(x)))
    colours[:, 3] = 0.25 + 0.75 * np.clip(row.weight / max(1e-9, row.weight.max()), 0, 1)
    segments = np.stack(ends, 1)
    axes.add_collection(LineCollection(segments, colors="black", linewidths=1.5, alpha=0.3, zorder=3))
    axes.add_collection(LineCollection(segments, colors=colours, linewidths=0.8, zorder=4))
    for points in ends:
        axes.scatter(points[:, 0], points[:, 1], s=18, c=colours, edgecolors="black", linewidths=0.6, zorder=5)
    patch_rows = max(1, (height + _GAP) // (_PATCH + _GAP))
    close_up = even_subset(
        row.keypoints[0], row.images[0].shape[::-1], _PATCH_COLUMNS * patch_rows, np.random.default_rng(1),
        preference=_texture(row.images[0], row.keypoints[0]),
    )  # fmt: skip
    for place, index in enumerate(close_up[row.keypoints[0][close_up, 1].argsort()]):
        left = columns[2] + _GAP + (place % _PATCH_COLUMNS) * (2 * _PATCH + 3 * _GAP)
        _draw_patches(axes, row, index, left, top + (place // _PATCH_COLUMNS) * (_PATCH + _GAP), colours[index, :3])


def _texture(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Variance of the grey values around points (N, 2), (N,): where there is none, a patch shows nothing."""
    values, side = image.astype(np.float32), max(3, round(max(image.shape) * _PATCH_SIDE / 2))
    variance = uniform_filter(values**2, side) - uniform_filter(values, side) ** 2
    column, row = np.clip(xy.astype(int), 0, np.array(image.shape[::-1]) - 1).T
    return np.maximum(variance[row, column], 0)


def _draw_patches(axes: Axes, row: Row, index: int, left: float, top: float, colour: np.ndarray) -> None:
    """What lies around one correspondence, in a and b, with a ring at the points."""
    for side, (image, xy) in enumerate(zip(row.images, row.keypoints, strict=True)):
        scale = max(16.0, max(image.shape) * _PATCH_SIDE) / _PATCH
        x, y = xy[index] - scale * _PATCH / 2
        patch = Image.fromarray(image).transform(
            (_PATCH, _PATCH), Image.Transform.AFFINE, (scale, 0, x, 0, scale, y), Image.Resampling.BICUBIC
        )
        corner = left + side * (_PATCH + 1)
        _paste(axes, patch, corner, top)
        middle = corner + _PATCH / 2, top + _PATCH / 2
        for width, ring in ((2.4, "black"), (1.0, "white")):
            axes.plot(*middle, "o", markersize=7, markerfacecolor="none", markeredgecolor=ring, markeredgewidth=width)
    axes.plot([left, left + 2 * _PATCH + 1], [top + _PATCH] * 2, color=colour, linewidth=3, solid_capstyle="butt")


def _paste(axes: Axes, image: Image.Image, left: float, top: float) -> None:
    """At whole pixels of the PNG."""
    extent = (left, left + image.width, top + image.height, top)
    axes.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest", aspect="auto")


def distributions(inspection: Inspection) -> Figure:
    """Histograms of correspondences, spread and overlap over the pairs that were read."""
    figure = drawing.new_figure(960, 320, layout="constrained")
    panels = (
        ("correspondences a pair", inspection.correspondences, 1.0),
        ("spread, % of an image's cells", inspection.spread, 100.0),
        ("overlap, % of an image's area", inspection.overlap, 100.0),
    )
    for number, (label, values, factor) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        drawing.chart(axes, xlabel=label, ylabel="pairs" if number == 1 else "")
        _histogram(axes, values, factor)
    return figure


def _histogram(axes: Axes, values: Distribution, factor: float) -> None:
    edges = np.array(values.edges) * factor
    axes.bar(edges[:-1], values.counts, width=np.diff(edges), align="edge", color=drawing.SKY, edgecolor="white")
    median = values.quartiles[1] * factor
    axes.axvline(median, color=drawing.VERMILLION, linewidth=1.6)
    axes.set_title(f"median {median:,.0f}", fontsize=10, color=drawing.VERMILLION)


def top_view(scene: Scene, *, most_places: int = 6) -> Figure:
    """Camera positions from above with the direction they look in.

    Colours tell conditions, with references in grey. Where all is of one condition, they tell queries from
    references, or else places.
    Places that lie far apart have a panel each, at most `most_places` of them, evenly spread.
    "Above" is where the images' upper edges point, on average.
    """
    images = [image for image in scene.images.values() if image.cam_from_world is not None]
    centers = np.stack([image.cam_from_world.center().numpy() for image in images])
    rotations = np.stack([image.cam_from_world.rotation.numpy() for image in images])
    axis = ground_axes(rotations, centers)
    positions, forward = centers @ axis.T, rotations[:, 2] @ axis.T
    places = np.array([image.place for image in images])
    panels = place_panels(positions, places, most_places)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = drawing.new_figure(max(640, 330 * columns), 70 + (560 if len(panels) == 1 else 330 * rows), "constrained")
    labels, styles = _styles(images)
    for number, (title, members) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        drawing.chart(axes, xlabel="m", ylabel="m" if number % columns == 1 or columns == 1 else "")
        axes.set_title(title, fontsize=10)
        axes.set_aspect("equal", adjustable="datalim")
        origin = np.floor(positions[members].min(0))
        extent = float(np.ptp(positions[members], axis=0).max()) or 1.0
        for label, style in styles.items():
            chosen = members[labels[members] == label]
            if len(chosen) == 0:
                continue
            xy = positions[chosen] - origin
            look = xy + 0.08 * extent * forward[chosen]
            axes.add_collection(LineCollection(np.stack([xy, look], 1), colors=style["color"], linewidths=0.8))
            axes.plot(*xy.T, linestyle="none", markersize=4, label=label, **style)
    _add_legend(figure)
    return figure


def _add_legend(figure: Figure) -> None:
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(entries) <= _LONGEST_LEGEND:
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def ground_axes(rotations: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Two unit axes (2, 3) of the ground, x along the cameras' main direction of spread."""
    up = -rotations[:, 1].mean(0)
    offsets = centers - centers.mean(0)
    if np.linalg.norm(up) < 0.1:  # cameras in every attitude: the ground is where they spread
        return np.linalg.svd(offsets, full_matrices=False)[2][:2]
    up = up / np.linalg.norm(up)
    flat = offsets - (offsets @ up)[:, None] * up
    spanning = np.concatenate([flat, np.eye(3) * 1e-9 - 1e-9 * np.outer(up, up)])
    spread = np.linalg.svd(spanning, full_matrices=False)[2][0]
    x = spread - (spread @ up) * up
    x = x / np.linalg.norm(x)
    return np.stack([x, np.cross(up, x)])


def place_panels(positions: np.ndarray, places: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Rows of the images of each panel, by its title: all, or some places where these lie far apart."""
    names = np.unique(places)
    extents = [np.ptp(positions[places == name], axis=0).max() for name in names]
    if len(names) == 1 or 10 * np.median(extents) > np.ptp(positions, axis=0).max():
        return {f"{len(places):,} images, places: {len(names)}": np.arange(len(places))}
    chosen = names[drawing.spread(len(names), most)]
    return {f"place {name}": np.flatnonzero(places == name) for name in chosen}


def _styles(images: list[SceneImage]) -> tuple[np.ndarray, dict[str, dict[str, str]]]:
    """A label of each image (N,), and each label's colour and marker; more than 7 repeat colours, not both."""
    conditions = {image.condition for image in images}
    queries = [not image.is_reference for image in images]
    if len(conditions) > 1:
        labels = np.array([image.condition for image in images])
        plain = {image.condition for image in images if image.is_reference}
    elif any(queries) and not all(queries):
        labels = np.where(queries, "queries", "references")
        plain = {"references"}
    else:
        labels, plain = np.array([f"place {image.place}" for image in images]), set()
    styles = {label: {"color": drawing.GREY, "marker": "."} for label in sorted(plain)}
    for number, label in enumerate(sorted(set(labels.tolist()) - plain)):
        colour = drawing.COLOURS[number % len(drawing.COLOURS)]
        marker = drawing.MARKERS[(number + number // len(drawing.COLOURS)) % len(drawing.MARKERS)]
        styles[label] = {"color": colour, "marker": marker}
    return labels, styles
