"""Figures of a localization run: error curves, seconds, a top view, and pictures of single queries.

Charts are narrow with large letters, so that they can be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from scipy.spatial import cKDTree

from gnnet.evaluation.inspect.contact_sheet import ground_axes, place_panels
from gnnet.evaluation.report import pictures as drawing
from gnnet.geometry.pose import Pose, pose_errors
from gnnet.localization.map import Map
from gnnet.localization.result import Localization
from gnnet.scenes.scene import SceneImage

MOST_CONDITIONS = 6  # that have curves of their own
CHART_WIDTH = 600
_CHART_DPI = 150  # so that letters are sharp on dense screens
_LETTERS = 12
_AXES_OF_GROUND = 1000  # references that tell where up is, at most
_DIRECTIONS = 300  # cameras of a panel, at most, whose viewing direction is drawn
_BEFORE, _AFTER = {"linestyle": (0, (4, 2)), "linewidth": 1.8}, {"linestyle": "-", "linewidth": 2.2}


def localization_errors(localizations: Sequence[Localization], queries: Mapping[str, SceneImage]) -> np.ndarray:
    """Errors (N, 2, 2) of queries: before and after refinement, in metres and degrees.

    Infinite where there is no pose (or none that is finite), nan where the true pose is not known.
    """
    errors = np.full((len(localizations), 2, 2), np.nan)
    truths = [queries[result.name].cam_from_world for result in localizations]
    errors[[i for i, truth in enumerate(truths) if truth is not None]] = np.inf
    for k, poses in enumerate(([r.start for r in localizations], [r.cam_from_world for r in localizations])):
        rows = [i for i, (p, truth) in enumerate(zip(poses, truths, strict=True)) if None not in (p, truth)]
        if rows:
            found = pose_errors(Pose.stack([poses[i] for i in rows]), Pose.stack([truths[i] for i in rows]))
            values = np.stack([error.numpy() for error in found], -1)
            errors[rows, k] = np.where(np.isfinite(values), values, np.inf)
    return errors


def error_curve(
    errors: np.ndarray,
    conditions: Sequence[str],
    quantity: Literal["position", "rotation"],
    *,
    refined: bool = True,
    limits: Sequence[float] = (),
    path: Path | None = None,
) -> Figure:
    """Share of queries within an error, against the error on a logarithmic axis.

    Failed queries count, so a curve may end below 100 %. With few conditions each has a colour of its own.

    Args:
        errors: (N, 2, 2), see `localization_errors`; queries whose pose is not known are left out.
        conditions: N.
        refined: draw before and after refinement; otherwise the final poses alone.
        limits: metres or degrees of the table's recalls, marked.
    """
    known = ~np.isnan(errors[:, 1, 0])
    values, conditions = errors[known, :, 0 if quantity == "position" else 1], np.array(conditions)[known]
    names = np.unique(conditions)
    by_condition = 1 < len(names) <= MOST_CONDITIONS
    height = 380 + (26 * -(-len(names) // 3) if by_condition else 0)
    figure = drawing.new_figure(CHART_WIDTH, height, layout="constrained")
    axes = figure.add_subplot()
    _chart(axes, xlabel=f"{quantity} error", ylabel="queries within it [%]")
    low, high = _decades(values, *((1e-5, 1e3) if quantity == "position" else (1e-4, 180.0)))
    for limit in limits:
        axes.axvline(limit, color="#A0A0A0", linewidth=1, linestyle=":")
    of_conditions = []
    for k, name in enumerate(names if by_condition else ["all"]):
        chosen = values[conditions == name] if by_condition else values
        colours = (drawing.COLOURS[k],) * 2 if by_condition else (drawing.VERMILLION, drawing.BLUE)
        if refined:
            _cumulative(axes, chosen[:, 0], (low, high), color=colours[0], **_BEFORE)
        _cumulative(axes, chosen[:, 1], (low, high), color=colours[1], **_AFTER)
        if by_condition:
            of_conditions.append(Line2D([], [], color=colours[1], linewidth=4, label=plain_text(name, 24)))
    if refined:
        colours = ("#404040", "#404040") if by_condition else (drawing.VERMILLION, drawing.BLUE)
        names = zip(("before refinement", "after refinement"), colours, (_BEFORE, _AFTER), strict=True)
        styles = [Line2D([], [], color=colour, label=label, **style) for label, colour, style in names]
        axes.legend(handles=styles, loc="upper left", fontsize=_LETTERS - 1, framealpha=0.85, edgecolor="none")
    if of_conditions:
        figure.legend(handles=of_conditions, loc="outside lower center", ncols=3, frameon=False, fontsize=_LETTERS - 1)
    axes.set(xscale="log", xlim=(low, high), ylim=(-2, 103), yticks=range(0, 101, 20))
    axes.xaxis.set_major_formatter(FuncFormatter(_length if quantity == "position" else _degrees))
    return _finish(figure, path)


def _cumulative(axes: Axes, errors: np.ndarray, view: tuple[float, float], **style) -> None:
    within = np.sort(errors[np.isfinite(errors)])
    shares = 100 * np.arange(len(within) + 1) / max(1, len(errors))
    x = np.concatenate([view[:1], np.maximum(within, view[0]), view[1:]])
    axes.plot(x, np.append(shares, shares[-1]), drawstyle="steps-post", **style)


def _decades(values: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """Powers of ten around the finite values, between `least` and `most`: an axis with two labels or more."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.01, 1.0)
    low = 10.0 ** math.floor(math.log10(min(max(low, least), most / 10)))
    return low, max(10.0 ** math.ceil(math.log10(min(max(high, least), most))), 10 * low)


def _length(metres: float, _=None) -> str:
    unit, factor = ("m", 1) if metres >= 0.999 else ("cm", 100) if metres >= 0.00999 else ("mm", 1000)
    return f"{metres * factor:g} {unit}"


def _degrees(degrees: float, _=None) -> str:
    return f"{degrees:g}°"


def seconds_by_stage(seconds: Sequence[Mapping[str, float]], *, path: Path | None = None) -> Figure | None:
    """Seconds of each stage and in all: the middle half of the queries as a bar, 5 to 95 % as a line, the median.

    Args:
        seconds: of each query, by stage; empty ones are left out.

    Returns:
        None if no query has any.
    """
    seconds = [by_stage for by_stage in seconds if by_stage]
    if not seconds:
        return None
    stages = list(dict.fromkeys(stage for by_stage in seconds for stage in by_stage))
    values = {stage: np.array([s[stage] for s in seconds if stage in s]) for stage in stages}
    values["in all"] = np.array([sum(s.values()) for s in seconds])
    figure = drawing.new_figure(CHART_WIDTH, 110 + 42 * len(values), layout="constrained")
    axes = figure.add_subplot()
    _chart(axes, xlabel="seconds a query", ylabel="")
    axes.grid(visible=False, axis="y")
    reach = max(float(np.quantile(v, 0.95)) for v in values.values()) or 1.0
    for place, (stage, each) in enumerate(values.items()):
        low, first, middle, third, high = np.quantile(each, [0.05, 0.25, 0.5, 0.75, 0.95])
        colour = drawing.GREY if stage == "in all" else drawing.SKY
        axes.hlines(place, low, high, color=colour, linewidth=1.6)
        axes.barh(place, third - first, left=first, height=0.5, color=colour)
        axes.plot([middle, middle], [place - 0.32, place + 0.32], color=drawing.VERMILLION, linewidth=2.4)
        axes.text(high + 0.02 * reach, place, format_seconds(middle), fontsize=_LETTERS - 1, va="center")
    axes.set_yticks(range(len(values)), [plain_text(stage) for stage in values])
    axes.set(xlim=(0, 1.2 * reach), ylim=(len(values) - 0.5, -0.5))
    return _finish(figure, path)


def format_seconds(seconds: float) -> str:
    """`72 ms`, `2.12 s`, `35 s`."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def positions_from_above(
    map: Map,
    localizations: Sequence[Localization],
    queries: Mapping[str, SceneImage],
    *,
    far: float | None = None,
    path: Path | None = None,
) -> Figure:
    """References, the queries' poses, and lines from these to the true ones, from above.

    The view holds references and true poses; how many estimates lie outside is written above it. Places
    that lie far apart have a panel each, six at most. "Above" is where the references' upper edges point.

    Args:
        far: metres; estimates that are further off than this have a colour of their own.
    """
    references = map.poses.center().numpy()
    some = drawing.spread(len(references), _AXES_OF_GROUND)
    ground = ground_axes(map.poses.rotation.numpy()[some], references[some]).T
    estimates, looks = _cameras(r.cam_from_world for r in localizations)
    truths, _ = _cameras(queries[r.name].cam_from_world for r in localizations)
    places = _places(map, references, localizations, queries, np.where(np.isnan(truths), estimates, truths))
    all_places = np.array(map.places)
    with_queries = np.flatnonzero(np.isin(all_places, places))
    shown = with_queries if len(with_queries) else np.arange(len(references))
    panels = place_panels(references[shown] @ ground, all_places[shown], 6)
    columns, forward = min(2, len(panels)), map.poses.rotation.numpy()[:, 2]
    lines = -(-len(panels) // columns)
    figure = drawing.new_figure(CHART_WIDTH, 600, layout="constrained")
    shapes = []
    for number, (title, members) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        rows = shown[members]
        mine = np.isin(places, all_places[rows])
        shape = _draw_positions(
            axes, references[rows] @ ground, forward[rows] @ ground, estimates[mine] @ ground, looks[mine] @ ground,
            truths[mine] @ ground, far=far, title=plain_text(title) if len(panels) > 1 else "",
        )  # fmt: skip
        shapes.append(shape)
    panel_height = 50 + min(1.3, max(shapes)) * (CHART_WIDTH / columns - 80)
    figure.set_figheight((100 + lines * panel_height) / drawing.DPI)
    entries = {}
    for axes in figure.axes:
        entries |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2, frameon=False, fontsize=_LETTERS - 1)
    return _finish(figure, path)


def _cameras(poses: Iterable[Pose | None]) -> tuple[np.ndarray, np.ndarray]:
    """Centres and viewing directions (N, 3) each in the world; nan where there is no pose."""
    poses = list(poses)
    values = np.full((2, len(poses), 3), np.nan)
    rows = [i for i, pose in enumerate(poses) if pose is not None]
    if rows:
        known = Pose.stack([poses[i] for i in rows])
        values[:, rows] = np.stack([known.center().numpy(), known.rotation[:, 2].numpy()])
    return values[0], values[1]


def _places(
    map: Map, references: np.ndarray, localizations: Sequence[Localization], queries: Mapping[str, SceneImage],
    positions: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Of each query, (N,): as the dataset says, or of the nearest reference; empty where nothing is known."""
    places = np.array([queries[r.name].place or "" for r in localizations], dtype=object)
    unknown = ~np.isin(places, map.places) & np.isfinite(positions).all(-1)
    if unknown.any():
        places[unknown] = np.array(map.places, dtype=object)[cKDTree(references).query(positions[unknown])[1]]
    return places.astype(str)


def _draw_positions(
    axes: Axes, references: np.ndarray, forward: np.ndarray, estimates: np.ndarray, looks: np.ndarray,
    truths: np.ndarray, *, far: float | None, title: str,
) -> float:  # fmt: skip
    """One panel of `positions_from_above`, and its height over its width; all (·, 2) on the ground, nan: not known."""
    there = np.concatenate([references, truths[np.isfinite(truths).all(-1)]])
    origin, extent = np.floor(there.min(0)), max(1.0, float(np.ptp(there, axis=0).max()))
    references, estimates, truths, there = (xy - origin for xy in (references, estimates, truths, there))
    middle = (there.max(0) + there.min(0)) / 2
    half = np.maximum(np.ptp(there, axis=0) / 2 + 0.1 * extent, 0.25 * extent)
    low, high = middle - half, middle + half
    _chart(axes, xlabel="m", ylabel="m")
    axes.set_aspect("equal")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    outside = (np.isfinite(estimates).all(-1) & ((estimates < low) | (estimates > high)).any(-1)).sum()
    axes.set_title("   ".join(filter(None, [title, f"{outside:,} estimates outside" if outside else ""])), fontsize=11)
    error = np.linalg.norm(estimates - truths, axis=-1)
    is_far = error > (math.inf if far is None else far)
    failed = np.isnan(estimates).any(-1) & np.isfinite(truths).all(-1)
    if len(references) + len(estimates) <= _DIRECTIONS:
        for xy, direction, colour in ((references, forward, drawing.GREY), (estimates, looks, drawing.BLUE)):
            ends = np.stack([xy, xy + 0.06 * extent * direction], 1)
            axes.add_collection(LineCollection(ends, colors=colour, linewidths=0.9, alpha=0.7), autolim=False)
    lines = LineCollection(np.stack([estimates, truths], 1), colors=drawing.VERMILLION, linewidths=1.2)
    axes.add_collection(lines, autolim=False)
    size = float(np.interp(len(references) + len(estimates), [50, 1000], [1.0, 0.5]))
    far_label = "" if far is None else f"query, over {_length(far)} off"
    ring = {"markerfacecolor": "none", "markeredgecolor": drawing.ORANGE}
    for xy, label, style in (
        (references, "reference", {"marker": "o", "markersize": 6, "color": "#A0A0A0"}),
        (truths, "true pose", {"marker": "o", "markersize": 10, "markeredgewidth": 1.3, **ring}),
        (estimates[~is_far], "query", {"marker": "D", "markersize": 4, "color": drawing.BLUE}),
        (estimates[is_far], far_label, {"marker": "s", "markersize": 6, "color": drawing.PURPLE}),
        (truths[failed], "not localized", {"marker": "X", "markersize": 9, "color": drawing.VERMILLION}),
    ):
        if np.isfinite(xy).any():
            style = style | {"markersize": size * style["markersize"]}
            axes.plot(*xy.T, linestyle="none", label=label, scalex=False, scaley=False, **style)
    return float(half[1] / half[0])


def _chart(axes: Axes, *, xlabel: str, ylabel: str) -> None:
    drawing.chart(axes, xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.label.set_size(_LETTERS)
    axes.yaxis.label.set_size(_LETTERS)
    axes.tick_params(labelsize=_LETTERS - 1)


def plain_text(text: str, longest: int = 40) -> str:
    """The end of a name as matplotlib shows it as it is: no mathematics, no lone surrogates, in legends too."""
    text = text.encode("utf-8", "backslashreplace").decode()
    text = (text if len(text) <= longest else f"…{text[1 - longest :]}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves those out of legends


def _finish(figure: Figure, path: Path | None) -> Figure:
    figure.set_dpi(_CHART_DPI)
    if path is not None:
        drawing.save(figure, path)
    return figure
