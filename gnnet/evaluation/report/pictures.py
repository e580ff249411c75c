"""What `figures` draws with: checked inputs, images, feature colours, projections, charts, and the PNG itself."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

DPI = 100
MAX_BYTES = 500_000
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "#000000")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
YELLOW, GREY = "#F0E442", "#595959"

Array = Tensor | np.ndarray | Sequence

_SAMPLED_CELLS = 20_000  # of each map, from which `pca_colours` finds its components


def new_figure(width: int, height: int, layout: str | None = None) -> Figure:
    """A figure of so many pixels at `DPI`."""
    # matplotlib rounds down, and 1.13 inches times 100 are a hair less than 113.
    return Figure(figsize=((width + 1e-6) / DPI, (height + 1e-6) / DPI), dpi=DPI, layout=layout)


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG of the figure's size, with colours rounded as coarsely as it takes to stay under `MAX_BYTES`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    # From 85 levels a channel down, photographs begin to show it; black and white are kept in any case.
    for levels in (255, 127, 85, 63, 51, 36, 25, 17, 15, 5, 3, 1):
        content = _png(np.rint(np.rint(pixels * (levels / 255)) * (255 / levels)))
        if len(content) <= MAX_BYTES:
            break
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def as_array(values: Array) -> np.ndarray:
    """A float64 array of a tensor on any device, an array or a list."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def as_image(image: Array, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image (3, H, W), uint8 or float in [0, 1].

    Raises:
        ValueError: if it is neither.
    """
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


def as_points(xy: Array, name: str, count: int | None = None) -> np.ndarray:
    """(N, 2) float64 of points (N, 2), where N is `count` if that is given; raises ValueError otherwise."""
    values = as_array(xy)
    if values.ndim != 2 or values.shape[1] != 2 or count not in (None, len(values)):
        raise ValueError(f"{name} has shape {values.shape}; expected ({'N' if count is None else count}, 2) pixels")
    return values


def as_vector(values: Array, name: str, count: int | None = None) -> np.ndarray:
    """(N,) float64 of values (N,), where N is `count` if that is given; raises ValueError otherwise."""
    values = as_array(values)
    if values.ndim != 1 or count not in (None, len(values)):
        raise ValueError(f"{name} has shape {values.shape}; expected ({'N' if count is None else count},)")
    return values


def spread(count: int, limit: int) -> np.ndarray:
    """At most `limit` indices evenly spread over `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)) if count else np.zeros(0, int)


def pca_colours(maps: Sequence[Array]) -> list[np.ndarray]:
    """Colours (h, w, 3) in [0, 1] of maps (C, h, w): their three main components, common to all maps.

    Each component is stretched between its 1st and 99th percentile. Maps of one channel turn out
    grey; a missing third component is constant.

    Raises:
        ValueError: if a map is not (C, h, w) with the C of the first, or holds values that are not finite.
    """
    arrays = [as_array(features) for features in maps]
    for array in arrays:
        if array.ndim != 3 or array.shape[0] != arrays[0].shape[0]:
            raise ValueError(f"a feature map has shape {array.shape}; expected (C, h, w), with one C for all maps")
        if not np.isfinite(array).all():
            raise ValueError("a feature map holds values that are not finite; the network may have diverged")
    cells = [array.reshape(array.shape[0], -1).T for array in arrays]  # each (h·w, C)
    sample = np.concatenate([rows[spread(len(rows), _SAMPLED_CELLS)] for rows in cells])
    mean = sample.mean(0)
    _, vectors = np.linalg.eigh((sample - mean).T @ (sample - mean))
    axes = vectors[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary; this choice makes pictures repeatable.
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    low, high = np.quantile((sample - mean) @ axes, [0.01, 0.99], axis=0)
    colours = []
    for rows, array in zip(cells, arrays, strict=True):
        values = (((rows - mean) @ axes - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        if values.shape[1] < 3:
            filler = values[:, :1].repeat(2, 1) if values.shape[1] == 1 else np.full((len(values), 1), 0.5)
            values = np.concatenate([values, filler], 1)
        colours.append(values.reshape(*array.shape[1:], 3))
    return colours


def picture_grid(
    *, width: int, heights: Sequence[int], columns: int, left: int = 4, top: int = 28, between: int = 4, bottom: int = 4
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of axes for pictures, and these axes by row; all sizes are pixels of the PNG.

    Axes at whole pixels show one image by the same pixels in every column, which PNG stores once.

    Args:
        width: of every picture.
        heights: of each row's pictures.
        left, top, bottom: margins, for labels.
        between: from row to row.
    """
    gap = 4
    total_width = left + columns * width + (columns - 1) * gap + 4
    total_height = top + sum(heights) + between * (len(heights) - 1) + bottom
    figure = new_figure(total_width, total_height)
    grid = []
    y = total_height - top
    for height in heights:
        y -= height
        corners = [left + column * (width + gap) for column in range(columns)]
        boxes = [(x / total_width, y / total_height, width / total_width, height / total_height) for x in corners]
        grid.append([figure.add_axes(box) for box in boxes])
        y -= between
    return figure, grid


def show_image(axes: Axes, image: np.ndarray) -> None:
    """An image (H, W, 3) in COLMAP pixels, without ticks, filling `axes`."""
    height, width = image.shape[:2]
    size = max(1, round(axes.bbox.width)), max(1, round(axes.bbox.height))
    shown = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    axes.imshow(shown, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    _frame(axes, width, height)


def show_features(axes: Axes, colours: np.ndarray, stride: int, image: np.ndarray, block: int = 1) -> None:
    """Feature colours (h, w, 3) of a map of `stride`, in the pixels of its image (H, W, 3), filling `axes`.

    Cells smaller than `block` pixels of the PNG are averaged to that size.
    """
    (rows, columns), (height, width) = colours.shape[:2], image.shape[:2]
    # The last cells of a map may reach beyond the image.
    extent = (0, columns * stride, rows * stride, 0)
    size = round(axes.bbox.width / width * extent[1] / block), round(axes.bbox.height / height * extent[2] / block)
    shown = Image.fromarray((colours * 255).round().astype(np.uint8))
    if 0 < size[0] < columns and 0 < size[1] < rows:
        shown = shown.resize(size, Image.Resampling.BOX)
    axes.imshow(np.asarray(shown), extent=extent, interpolation="nearest", aspect="auto")
    _frame(axes, width, height)


def _frame(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


# Markers of the projections: at the true pose, the start and the refined pose. All have an edge of
# the opposite brightness, so that they stand out of dark and bright images.
_RING = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgecolor": "white", "markeredgewidth": 1.6}
_HALO = {**_RING, "markeredgecolor": "black", "markeredgewidth": 3.0}
_START = {**_RING, "marker": "X", "markersize": 8, "markerfacecolor": VERMILLION, "markeredgewidth": 1.0}
_REFINED = {**_HALO, "markersize": 5, "markerfacecolor": SKY, "markeredgewidth": 1.0}


def draw_projections(
    axes: Axes, truth: np.ndarray, xy: np.ndarray | None, *, refined: bool, max_points: int, size: float = 1.0
) -> None:
    """Rings at `truth` (N, 2) and, where `xy` (N, 2) is given, marks there and lines between.

    At most `max_points`, evenly spread over the list; left out are points whose truth is not in the
    image, or whose mark is not finite. The axes are those of `show_image`.
    """
    marked = truth if xy is None else xy
    size_xy = axes.get_xlim()[1], axes.get_ylim()[0]
    rows = np.flatnonzero(((truth >= 0) & (truth <= size_xy)).all(-1) & np.isfinite(marked).all(-1))
    rows = rows[spread(len(rows), max_points)]
    truth, marked = truth[rows], marked[rows]
    styles = [(_HALO, truth), (_RING, truth)]
    if xy is not None:
        styles.append((_REFINED if refined else _START, marked))
        segments = np.stack([marked, truth], 1)
        axes.add_collection(LineCollection(segments, colors="black", linewidths=2.4 * size, alpha=0.6, zorder=2))
        colour = SKY if refined else VERMILLION
        axes.add_collection(LineCollection(segments, colors=colour, linewidths=1.3 * size, zorder=3))
    for style, points in styles:
        scaled = {k: v * size if k.endswith(("size", "width")) else v for k, v in style.items()}
        axes.plot(points[:, 0], points[:, 1], linestyle="none", zorder=4, **scaled)


def projection_legend(figure: Figure) -> None:
    """Says below the figure what the marks of `draw_projections` are."""
    ring = {**_RING, "markeredgecolor": "black"}
    named = ((ring, "at the true pose"), (_START, "at the start pose"), (_REFINED, "at the refined pose"))
    handles = [Line2D([], [], linestyle="none", label=label, **style) for style, label in named]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=10)


def chart(axes: Axes, *, xlabel: str, ylabel: str) -> None:
    """Axes of a chart: labels, a light grid, no box."""
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.tick_params(labelsize=9)
    axes.grid(color="#E0E0E0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def wilson_interval(shares: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % confidence interval of shares (K,) found in `counts` (K,) trials (Wilson, 1927)."""
    z = 1.96
    denominator = 1 + z**2 / counts
    centre = (shares + z**2 / (2 * counts)) / denominator
    half = z / denominator * np.sqrt(shares * (1 - shares) / counts + (z / (2 * counts)) ** 2)
    return centre - half, centre + half


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` values around each (N,); fewer at the ends."""
    window = max(1, min(window, len(values)))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def format_pixels(distance: float) -> str:
    """`0.41 px`, `12.3 px`, `120 px`."""
    if not math.isfinite(distance):
        return "∞ px"
    digits = 2 if distance < 9.995 else 1 if distance < 99.95 else 0
    return f"{distance:.{digits}f} px"
