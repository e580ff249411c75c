"""Charts: training losses, convergence basin, error curves, seconds.

Every function returns its figure and, given a `path`, writes it there (`style.save`). Charts of a localization run are
narrow with large letters, so that they can be read on a phone.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from scipy.ndimage import uniform_filter1d
from scipy.stats import binomtest

from gnnet.evaluation.metrics import errors_of
from gnnet.evaluation.report import style
from gnnet.evaluation.report.pictures import Array, as_numbers
from gnnet.files import read_text
from gnnet.localization.result import Localization
from gnnet.scenes.scene import SceneImage

Quantity = Literal["position", "rotation"]
MOST_CONDITIONS = 6  # more conditions share one curve
WIDTH, LETTERS, SHARP = 600, 12, 150  # of charts to be read on a phone; `SHARP` is their dpi

_STAGES = ("train", "validation", "test", "train (epoch)", "validation (epoch)")  # each has its own colour
_PREFIXES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
_BEFORE: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.8}
_AFTER: dict[str, Any] = {"linestyle": "-", "linewidth": 2.2}


def loss_curves(log: str | Path, *, path: str | Path | None = None) -> Figure:
    """Training and validation losses against the training step, one panel a quantity.

    `train/loss`, `train/loss_step` and `validation/loss` are one quantity in one panel. Long training
    series are drawn pale with their running mean on top; an axis that spans a factor of more than 20
    is logarithmic.

    Args:
        log: Lightning's `metrics.csv`; its columns whose name contains `loss` are drawn, empty cells left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no `step` column, no finite loss, or a cell that is not a number.
    """
    series = _series_of_csv(Path(log))
    panels: dict[str, list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for name in sorted(name for name in series if "loss" in name):
        steps, values = series[name][:, np.isfinite(series[name][1])]
        if len(values):
            stage, quantity = _stage_and_quantity(name)
            panels.setdefault(quantity, []).append((stage, steps, values))
    if not panels:
        raise ValueError(f"{log} has no finite value in a column with 'loss' in its name; found {', '.join(series)}")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = style.new_figure(max(640, 420 * columns), 40 + 340 * rows, rows, columns, count=len(panels))
    figure.suptitle("Losses", fontsize=13)
    for axes, (quantity, members) in zip(grid.flat, panels.items(), strict=False):
        style.chart(axes, xlabel="training step", ylabel=quantity)
        for k, (stage, steps, values) in enumerate(members):
            number = _STAGES.index(stage) if stage in _STAGES else len(_STAGES) + k
            look: dict[str, Any] = {"color": style.COLOURS[number % len(style.COLOURS)], "linewidth": 2, "label": stage}
            if len(values) <= 50:
                look |= {"marker": style.MARKERS[number % len(style.MARKERS)], "markersize": 5}
            elif stage.startswith("train"):
                axes.plot(steps, values, color=look["color"], alpha=0.3, linewidth=0.8)
                window = len(values) // 25
                values = uniform_filter1d(values, window, mode="nearest")
                look["label"] = f"{stage} (mean of {window})"
            axes.plot(steps, values, **look)
        everything = np.concatenate([values for _, _, values in members])
        if everything.min() > 0 and everything.max() > 20 * everything.min():
            axes.set_yscale("log")
        axes.legend(frameon=False)
    style.save(figure, path)
    return figure


def _stage_and_quantity(name: str) -> tuple[str, str]:
    """`train/loss_step` is `train`, `loss`; `val_loss` is `validation`, `loss`; another name is its own stage."""
    short = name.removesuffix("_step")
    name = short.removesuffix("_epoch")
    for prefix, stage in _PREFIXES.items():
        if name.startswith((f"{prefix}/", f"{prefix}_")):
            return stage + (" (epoch)" if name != short else ""), name[len(prefix) + 1 :]
    return name, name


def _series_of_csv(path: Path) -> dict[str, np.ndarray]:
    """Steps and values (2, N) of each column of Lightning's metrics.csv, empty cells left out."""
    text = read_text(path, "the metrics.csv of Lightning's CSVLogger")
    rows = list(csv.DictReader(text.splitlines()))
    names = list(rows[0]) if rows else []
    if "step" not in names:
        raise ValueError(f"{path} has the columns {', '.join(names) or 'none'}; expected step, as CSVLogger writes it")
    series = {}
    for name in [name for name in names if name not in ("step", "epoch")]:
        cells = [(row["step"], row[name]) for row in rows if row["step"] and row[name]]
        try:
            series[name] = np.array(cells, dtype=np.float64).reshape(-1, 2).T
        except ValueError as error:
            raise ValueError(f"{path}: column {name} holds a cell that is not a number ({error})") from error
    return series


def convergence_basin(
    ring_edges: Array,
    converged: Mapping[str, Array],
    counts: Array,
    *,
    quantity: str = "initial offset",
    title: str = "Share of initial poses that converge",
    path: str | Path | None = None,
) -> Figure:
    """Share of initial poses that converge against how far off they are, one curve a method.

    Bands are 95 % Wilson intervals: how far off a share may be, for the number of poses it rests on.

    Args:
        ring_edges: (K + 1,) rising offsets in metres; ring k holds the initial poses between edges k and k + 1.
        converged: by method, shares (K,) in 0 to 1; nan where unknown.
        counts: (K,) number of initial poses in each ring; written above the curves.

    Raises:
        ValueError: if a shape is not as said, edges do not rise, or a share is not in 0 to 1.
    """
    edges = as_numbers(ring_edges, "ring_edges", "K")
    if len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"ring_edges are {edges.tolist()}; expected two or more rising offsets")
    trials = as_numbers(counts, "counts", len(edges) - 1).astype(int)
    centres = (edges[1:] + edges[:-1]) / 2
    figure, ((axes,),) = style.new_figure(720, 440)
    style.chart(axes, xlabel=f"{quantity} [m]", ylabel="converged [%]")
    for k, (method, values) in enumerate(converged.items()):
        shares = as_numbers(values, f"converged[{method!r}]", len(trials))
        if ((shares < 0) | (shares > 1)).any():
            raise ValueError(f"converged[{method!r}] is {shares.tolist()}; expected shares in 0 to 1")
        shares = np.where(trials > 0, shares, np.nan)
        bands = [
            binomtest(round(share * n), n).proportion_ci(0.95, "wilson") if np.isfinite(share) else (np.nan, np.nan)
            for share, n in zip(shares, trials.tolist(), strict=True)
        ]
        low, high = 100 * np.array(bands).T
        colour, marker = style.COLOURS[k % len(style.COLOURS)], style.MARKERS[k % len(style.MARKERS)]
        axes.fill_between(centres, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(centres, 100 * shares, color=colour, marker=marker, label=style.plain_text(method))
    axes.set(ylim=(-3, 116), xlim=(edges[0], edges[-1]), yticks=range(0, 101, 20))
    axes.set_xticks(edges, [f"{edge:g}" for edge in edges])
    if len(set(trials)) == 1:
        axes.set_xlabel(f"{quantity} [m], {trials[0]} initial poses a ring")
    else:
        rotation = 90 if np.diff(edges).min() < 0.08 * (edges[-1] - edges[0]) else 0
        for centre, count in zip(centres, trials, strict=True):
            axes.text(centre, 104, f"n={count}", color=style.GREY, ha="center", fontsize=8, rotation=rotation)
    axes.set_title(title, fontsize=13)
    if converged:
        axes.legend(frameon=False)
    style.save(figure, path)
    return figure


def localization_errors(localizations: Sequence[Localization], queries: Mapping[str, SceneImage]) -> np.ndarray:
    """Errors (N, 2, 2) of queries: before and after refinement, in metres and degrees.

    Infinite where there is no pose (or none that is finite), nan where the true pose is not known.
    """
    errors = np.full((len(localizations), 2, 2), np.nan)
    for result, error in zip(localizations, errors, strict=True):
        truth = queries[result.name].cam_from_world
        if truth is not None:
            error[:] = errors_of(result.initial, truth), errors_of(result.cam_from_world, truth)
    return errors


def error_curve(
    errors: np.ndarray,
    conditions: Sequence[str],
    quantity: Quantity,
    *,
    refined: bool = True,
    limits: Sequence[float] = (),
) -> Figure:
    """Share of queries within an error, against the error on a logarithmic axis.

    Failed queries count, so a curve may end below 100 %. With few conditions each has a colour of its own.

    Args:
        errors: (N, 2, 2), see `localization_errors`; queries whose true pose is not known are left out.
        conditions: (N,) names.
        refined: draw before and after refinement; otherwise the final poses alone.
        limits: metres or degrees of the table's recalls, marked by dotted lines.
    """
    known = ~np.isnan(errors[:, 1, 0])
    values, of_query = errors[known, :, 0 if quantity == "position" else 1], np.array(conditions)[known]
    names = np.unique(of_query)
    by_condition = 1 < len(names) <= MOST_CONDITIONS
    # The axis holds whole decades around the errors, within what can be measured.
    shown = values[np.isfinite(values) & (values > 0)]
    clipped = np.clip(shown, *((1e-5, 1e3) if quantity == "position" else (1e-4, 180.0)))
    low, high = np.log10([clipped.min(), clipped.max()]) if len(clipped) else (-2, 0)
    view = 10.0 ** np.floor(low), 10.0 ** max(np.ceil(high), np.floor(low) + 1)
    figure, ((axes,),) = style.new_figure(WIDTH, 480 if by_condition else 420, dpi=SHARP)
    style.chart(axes, xlabel=f"{quantity} error", ylabel="queries within it", letters=LETTERS)
    for limit in limits:
        axes.axvline(limit, color="#A0A0A0", linewidth=1, linestyle=":")
    for k, name in enumerate(names if by_condition else [None]):
        # What is beyond the axis, as failed queries are, keeps a curve below 100 %.
        before, after = np.clip(values if name is None else values[of_query == name], view[0], 10 * view[1]).T
        colours = (style.VERMILLION, style.BLUE) if name is None else (style.COLOURS[k],) * 2
        label = "after refinement" if name is None else style.plain_text(name, 24)
        if refined and len(before):
            axes.ecdf(before, label="before refinement" if name is None else "", color=colours[0], **_BEFORE)
        if len(after):
            axes.ecdf(after, label=label if refined or by_condition else "", color=colours[1], **_AFTER)
    if by_condition and refined:  # the legend tells colours and, apart from these, kinds of lines
        axes.plot([], [], color=style.GREY, label="before refinement", **_BEFORE)
        axes.plot([], [], color=style.GREY, label="after refinement", **_AFTER)
    style.shared_legend(figure)
    axes.set(xscale="log", xlim=view, ylim=(-0.02, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_formatter(FuncFormatter(format_round if quantity == "position" else "{:g}°".format))
    return figure


def format_round(metres: float, _: object = None) -> str:
    """A round length as text: `5 mm`, `20 cm`, `3 m`."""
    unit, factor = ("m", 1) if metres >= 0.999 else ("cm", 100) if metres >= 0.00999 else ("mm", 1000)
    return f"{metres * factor:g} {unit}"


def seconds_by_stage(seconds: Sequence[Mapping[str, float]]) -> Figure | None:
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
    figure, ((axes,),) = style.new_figure(WIDTH, 110 + 42 * len(values), dpi=SHARP)
    style.chart(axes, xlabel="seconds a query", ylabel="", letters=LETTERS)
    axes.grid(visible=False, axis="y")
    for place, (stage, each) in enumerate(values.items()):
        low, first, middle, third, high = np.quantile(each, [0.05, 0.25, 0.5, 0.75, 0.95])
        colour = style.GREY if stage == "in all" else style.SKY
        axes.hlines(place, low, high, color=colour, linewidth=1.6)
        axes.barh(place, third - first, left=first, height=0.5, color=colour)
        axes.vlines(middle, place - 0.32, place + 0.32, color=style.VERMILLION, linewidth=2.4)
        axes.annotate(style.format_seconds(middle), (high, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(values)), [style.plain_text(stage) for stage in values])
    axes.set_xlim(left=0)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    return figure
