"""Pictures of a dataset: pairs with their correspondences, how many these are, and where the cameras stood.

In a contact sheet the photographs are grey. A correspondence has the same colour in both, which tells its place
in the left image, from left (blue) to right (red). A wrong one is a line across its neighbours, and a dot of
another colour than theirs in the right image. The patches beside show some correspondences close up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import uniform_filter
from torchvision.transforms.v2.functional import rgb_to_grayscale

from gnnet.data.images import even_subset, read_view
from gnnet.evaluation.inspect.inspection import Inspection, condition_pairs
from gnnet.evaluation.inspect.pairs import PairReader
from gnnet.evaluation.report import style
from gnnet.evaluation.report.cameras import top_view
from gnnet.evaluation.report.pictures import draw_matches, show_image
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.scene import Pair, Scene

PAIRS = 12  # number of pairs drawn
PAIRS_A_SHEET = 4
LINES = 60  # lines drawn in a pair
_LARGEST_SIDE = 1600  # pixels; larger images are scaled down before they are drawn
_PATCHES = (4, 2)  # pairs of patches below each other and beside each other
_PATCH = 68  # side of a patch in the picture, pixels
_PATCH_SIDE = 1 / 16  # side of a patch in its image, as a share of the longer side


class Row(NamedTuple):
    """One pair of a contact sheet.

    Args:
        title, names: two lines of text above the pictures.
        images: a and b, (H, W) uint8 each.
        keypoints: corresponding points (N, 2) in a and b, COLMAP pixels.
        weight: (N,) weights of the correspondences.
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
        The files written.
    """
    figures, rows = {}, []
    for pair in track(choose_pairs(scene, pairs), "Drawing pairs", show=progress):
        try:
            rows.append(_read_row(scene, pair))
        except (OSError, ValueError):
            continue
    for first in range(0, len(rows), PAIRS_A_SHEET):
        figures[f"pairs-{first // PAIRS_A_SHEET + 1}.png"] = contact_sheet(rows[first : first + PAIRS_A_SHEET])
    if inspection.correspondences is not None:
        figures["correspondences.png"] = distributions(inspection)
    if any(image.cam_from_world is not None for image in scene.images.values()):
        figures["cameras.png"] = top_view(scene)
    for name, figure in figures.items():
        style.save(figure, Path(folder) / name)
    return [Path(folder) / name for name in figures]


def choose_pairs(scene: Scene, count: int) -> list[Pair]:
    """At most `count` pairs, equally many for each combination of conditions as far as there are enough."""
    groups = condition_pairs(scene)
    shares = dict.fromkeys(groups, 0)
    for _ in range(min(count, len(scene.pairs))):
        unfinished = [key for key in groups if shares[key] < len(groups[key])]
        shares[min(unfinished, key=shares.__getitem__)] += 1
    generator = np.random.default_rng(0)
    return [scene.pairs[group[k]] for key, group in groups.items() for k in evenly(len(group), shares[key], generator)]


def _read_row(scene: Scene, pair: Pair) -> Row:
    names = (pair.image_a, pair.image_b)
    views = [read_view(scene.images[name], _LARGEST_SIDE) for name in names]
    sizes = {name: view.file_size for name, view in zip(names, views, strict=True)}
    (a, _, factor_a), (b, _, factor_b) = views
    matches = PairReader(scene, sizes)(pair)
    # Weights are not used here: a faint line is better than none.
    drawn = even_subset(matches.keypoints_a, sizes[pair.image_a], LINES, np.random.default_rng(0))
    conditions = " ↔ ".join(scene.images[name].condition for name in names)
    count = max(pair.count, len(matches.weight))
    return Row(
        title=f"{style.plain_text(conditions, 60)}   {count:,} correspondences, {len(drawn)} drawn",
        names=f"{style.plain_text(pair.image_a, 64)}   ↔   {style.plain_text(pair.image_b, 64)}",
        images=(rgb_to_grayscale(a)[0].numpy(), rgb_to_grayscale(b)[0].numpy()),
        keypoints=(matches.keypoints_a[drawn] * factor_a, matches.keypoints_b[drawn] * factor_b),
        weight=matches.weight[drawn],
    )


def contact_sheet(rows: Sequence[Row]) -> Figure:
    """One row a pair: both images with lines between corresponding points, and patches around some of these.

    A line's opacity follows its weight, relative to the largest weight of the pair.
    """
    shapes = [[image.shape[0] / image.shape[1] for image in row.images] for row in rows]
    heights = [min(360.0, 700 / (1 / a + 1 / b)) for a, b in shapes]
    figure, grid = style.new_figure(
        1000, sum(heights) + 45 * len(rows), len(rows), 2, height_ratios=heights, width_ratios=(7, 3)
    )
    for row, (left, right) in zip(rows, grid, strict=True):
        x = row.keypoints[0][:, 0]
        colours = style.POSITION((x - x.min()) / max(1.0, np.ptp(x)))
        colours[:, 3] = 0.25 + 0.75 * np.clip(row.weight / max(1e-9, row.weight.max()), 0, 1)
        draw_matches(left, row.images, row.keypoints, colours)
        left.set_title(f"{row.title}\n{row.names}", loc="left", fontsize=9)
        _draw_patches(right, row, colours[:, :3])
    return figure


def _draw_patches(axes: Axes, row: Row, colours: np.ndarray) -> None:
    """Show the neighbourhoods of some correspondences in a and b, with rings at the points."""
    image, xy = row.images[0], row.keypoints[0]
    count = _PATCHES[0] * _PATCHES[1]
    chosen = even_subset(xy, image.shape[::-1], count, np.random.default_rng(1), preference=_texture(image, xy))
    centers = []
    for place, index in enumerate(chosen[xy[chosen, 1].argsort()]):
        top, left = place // _PATCHES[1] * 1.1, place % _PATCHES[1] * 2.2
        for side, (image, points) in enumerate(zip(row.images, row.keypoints, strict=True)):
            half = max(8.0, max(image.shape) * _PATCH_SIDE / 2)
            box = (*(points[index] - half), *(points[index] + half))
            patch = Image.fromarray(image).transform(
                (_PATCH, _PATCH), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
            )
            show_image(axes, np.asarray(patch), (left + side, left + side + 1, top + 1, top))
            centers.append((left + side + 0.5, top + 0.5))
        axes.plot([left, left + 2], [top + 1] * 2, color=colours[index], linewidth=3, solid_capstyle="butt")
    for width, ring in ((2.4, "black"), (1.0, "white")):
        x, y = np.transpose(centers)
        axes.scatter(x, y, s=49, facecolors="none", edgecolors=ring, linewidths=width, zorder=3)
    axes.set(xlim=(0, 2.2 * _PATCHES[1]), ylim=(1.1 * _PATCHES[0], 0))


def _texture(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Variance (N,) of the grey values around points (N, 2); patches of low variance show nothing."""
    values, side = image.astype(np.float32), max(3, round(max(image.shape) * _PATCH_SIDE / 2))
    variance = uniform_filter(values**2, side) - uniform_filter(values, side) ** 2
    column, row = np.clip(xy.astype(int), 0, np.array(image.shape[::-1]) - 1).T
    return np.maximum(variance[row, column], 0)


def distributions(inspection: Inspection) -> Figure:
    """Histograms of correspondences, spread and overlap over the pairs that were read."""
    figure, (panels,) = style.new_figure(960, 320, columns=3)
    kinds = (
        ("correspondences a pair", inspection.correspondences, 1),
        ("spread, % of an image's cells", inspection.spread, 100),
        ("overlap, % of an image's area", inspection.overlap, 100),
    )
    for axes, (label, values, factor) in zip(panels, kinds, strict=True):
        style.chart(axes, xlabel=label, ylabel="pairs" if axes is panels[0] else "")
        if values is not None:
            axes.stairs(values.counts, np.array(values.edges) * factor, fill=True, color=style.SKY)
            median = values.quartiles[1] * factor
            axes.axvline(median, color=style.VERMILLION, linewidth=1.6)
            axes.set_title(f"median {median:,.0f}", fontsize=10, color=style.VERMILLION)
    return figure
