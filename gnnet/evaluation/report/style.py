"""Colours, figures and text that all charts and pictures share.

A figure is a matplotlib `Figure` that leaves pyplot's global state alone. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; shapes differ wherever colours do.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from gnnet.files import write_at_once

MAX_BYTES = 500_000
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
YELLOW, GREY = "#F0E442", "#595959"
POSITION = LinearSegmentedColormap.from_list("position", [BLUE, SKY, YELLOW, ORANGE, VERMILLION])
# Bright at both ends, as a bad match must be seen on a dark image too.
ERROR = LinearSegmentedColormap.from_list("error", [SKY, YELLOW, VERMILLION])


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, count: int | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with constrained layout and its axes (rows, columns).

    Args:
        width, height: size in hundredths of an inch, which are pixels at 100 dpi.
        count: number of axes to keep, in reading order; None keeps all.
        options: `dpi`, 100 by default, and arguments of `Figure.subplots`.
    """
    figure = Figure(figsize=(width / 100, height / 100), dpi=options.pop("dpi", 100), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for empty in axes.flat[rows * columns if count is None else count :]:
        empty.remove()
    return figure, axes


def chart(axes: Axes, *, xlabel: str, ylabel: str, letters: int = 11) -> None:
    """Give the axes of a chart labels of `letters` points, a light grid and no box."""
    axes.set_xlabel(xlabel, fontsize=letters)
    axes.set_ylabel(ylabel, fontsize=letters)
    axes.tick_params(labelsize=letters - 1)
    axes.grid(color="#E0E0E0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shared_legend(figure: Figure, *, columns: int = 3) -> None:
    """Add one legend below all axes of a figure; a label that several axes have stands in it once."""
    found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in found}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, path: str | Path | None) -> None:
    """Write a PNG without empty margins; it has fewer colours where it would be larger than `MAX_BYTES`.

    Args:
        path: file to write; None writes nothing.
    """
    if path is None:
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.05)
    content, pixels = buffer.getvalue(), Image.open(buffer).convert("RGB")
    for colours in (256, 128, 64, 16, 4):
        if len(content) <= MAX_BYTES:
            break
        buffer = io.BytesIO()
        pixels.quantize(colours, Image.Quantize.FASTOCTREE).save(buffer, format="PNG")
        content = buffer.getvalue()
    write_at_once(path, content)


def plain_text(text: str, longest: int = 40) -> str:
    """A name, or its last `longest` characters, which matplotlib shows literally.

    `$` starts no mathematics, bytes that are no text stand as `\\udc80`, a leading `_` hides nothing from legends.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    text = (text if len(text) <= longest else f"…{text[1 - longest :]}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves those out of legends


def format_seconds(seconds: float) -> str:
    """A duration as text: `72 ms`, `2.12 s`, `35 s`."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
