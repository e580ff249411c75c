"""A localization run as one HTML file for people: table, charts, pictures of the worst queries, a list of all.

The file holds its pictures, needs no network and runs no script. `page.html.j2` is its template.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from gnnet.evaluation.metrics import CONVERGED
from gnnet.evaluation.report import style
from gnnet.evaluation.report.cameras import positions_from_above
from gnnet.evaluation.report.charts import Quantity, error_curve, localization_errors, seconds_by_stage
from gnnet.evaluation.report.queries import draw_query
from gnnet.evaluation.report.style import format_seconds
from gnnet.evaluation.tables import Table, rich_table
from gnnet.evaluation.units import format_length
from gnnet.files import write_at_once
from gnnet.localization.map import Map
from gnnet.localization.result import Localization, Status
from gnnet.scenes.scene import Scene, SceneImage

_MOST_REASONS = 15
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def write_html_report(
    folder: Path,
    *,
    report: Table,
    localizations: Sequence[Localization],
    queries: Mapping[str, SceneImage],
    map: Map,
    scene: Scene,
    worst: int = 12,
    command: str = "",
) -> Path:
    """Write `folder/report.html` atomically, and its pictures as `folder/figures/*.png` too.

    Args:
        report: the table, of the queries whose true pose is known.
        localizations: one for each query.
        queries: by name, one for each localization.
        map: the map on which the queries were localized.
        scene: knows the references' image files.
        worst: number of queries shown with pictures, about a megabyte each: failed ones first, then those with the
            largest position error, then, where the truth is not known, those with the fewest inliers.
        command: the command line of the run.

    Returns:
        The HTML file.
    """
    folder = Path(folder)
    errors = localization_errors(localizations, queries)
    ranks = {i: rank for rank, i in enumerate(_worst_first(localizations, errors)[: max(0, worst)], start=1)}
    by_name = sorted(range(len(localizations)), key=lambda i: localizations[i].name)
    columns = rich_table(report).columns if report.rows else []
    template = Environment(
        loader=PackageLoader("gnnet.evaluation.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html.j2")
    page = template.render(
        report=report,
        date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        command=command,
        tiles=_tiles(localizations, errors),
        columns=columns,
        lines=list(zip(*(column.cells for column in columns), strict=True)),
        converged=CONVERGED,
        outcomes=_outcomes(localizations),
        reasons=_reasons(localizations),
        charts=_charts(folder, report, localizations, queries, errors, map),
        worst=[
            _worst_query(folder, rank, localizations[i], errors[i], queries[localizations[i].name], map, scene)
            for i, rank in ranks.items()
        ],
        queries=[(localizations[i].name, ranks.get(i), _cells(localizations[i], errors[i])) for i in by_name],
    )
    # A file's name may be no text; what cannot be written then stands as \udc80.
    return write_at_once(folder / "report.html", page.encode("utf-8", "backslashreplace"))


def _worst_first(localizations: Sequence[Localization], errors: np.ndarray) -> list[int]:
    """Rows, sorted: failed, then by falling error, then by rising inliers and falling cost; then by name."""

    def key(i: int) -> tuple:
        result, error = localizations[i], errors[i, 1, 0]
        if result.cam_from_world is None:
            return 0, 0.0, 0.0, result.name
        if not math.isnan(error):
            return 1, -float(error), 0.0, result.name
        return 2, result.inliers, -(result.final_cost or 0.0), result.name

    return sorted(range(len(localizations)), key=key)


def _tiles(localizations: Sequence[Localization], errors: np.ndarray) -> list[tuple[str, str]]:
    """The run in a few large figures: (value, name)."""
    tiles = [(f"{_localized(localizations):,} of {len(localizations):,}", "queries localized")]
    kept, lost = (sum(_refinement(r) == kind for r in localizations) for kind in ("kept", "lost"))
    counts = f"{kept:,} kept, {lost:,} lost"
    if limit := sum(r.at_limit for r in localizations):
        counts += f", {limit:,} at a limit"
    tiles.append((counts, "refinements") if kept + lost else ("none", "refinements tried"))
    known = errors[~np.isnan(errors[:, 1, 0])]
    if len(known):
        medians = np.median(known, axis=0)[0 if kept + lost else 1 :]
        tiles.append((" → ".join(format_length(e[0]) for e in medians), f"median position error of {len(known):,}"))
        tiles.append((" → ".join(_degrees(e[1]) for e in medians), "median rotation error"))
    seconds = [sum(r.seconds.values()) for r in localizations if r.seconds]
    if seconds:
        tiles.append((format_seconds(float(np.median(seconds))), "median time of a query"))
    return tiles


def _localized(localizations: Sequence[Localization]) -> int:
    return sum(r.cam_from_world is not None for r in localizations)


def _refinement(result: Localization) -> str:
    """`kept`, `lost` (or failed: the pose before it stands), or empty where none was tried."""
    if result.refined:
        return "kept"
    return "lost" if result.initial_cost is not None else ""


def _outcomes(localizations: Sequence[Localization]) -> list[tuple[str, ...]]:
    """Condition and number of queries, localized, refined, lost, not tried ones, and those at a limit; all first."""
    names = sorted({r.condition for r in localizations})
    groups = [("all", list(localizations))]
    if len(names) > 1:
        groups += [(name, [r for r in localizations if r.condition == name]) for name in names]
    rows = []
    for name, members in groups:
        kinds = Counter(_refinement(r) for r in members)
        limit = sum(r.at_limit for r in members)
        counts = len(members), _localized(members), kinds["kept"], kinds["lost"], kinds[""], limit
        rows.append((name or "–", *(f"{count:,}" for count in counts)))
    return rows


def _reasons(localizations: Sequence[Localization]) -> list[tuple[str, str, str]]:
    """Number of queries, status and reason, the most frequent first."""
    reasons = Counter((str(r.status), _NUMBER.sub("…", r.reason)) for r in localizations).most_common()
    rows = [(f"{count:,}", *words) for words, count in reasons]
    if others := reasons[_MOST_REASONS:]:
        rest = sum(count for _, count in others)
        rows[_MOST_REASONS:] = [(f"{rest:,}", "", f"{len(others):,} other reasons")]
    return rows


def _charts(
    folder: Path, report: Table, localizations: Sequence[Localization], queries: Mapping[str, SceneImage],
    errors: np.ndarray, map: Map,
) -> list[dict[str, Any]]:  # fmt: skip
    charts = []
    refined = any(_refinement(r) for r in localizations)
    for k, quantity in enumerate(get_args(Quantity) if not np.isnan(errors[:, 1, 0]).all() else ()):
        limits = [column.limits[k] for column in report.columns if column.limits]
        figure = error_curve(errors, [r.condition for r in localizations], quantity, refined=refined, limits=limits)
        caption = (
            f"Share of queries within a {quantity} error. Queries without a pose keep a curve below 100 %; "
            "dotted lines are the table's thresholds."
        )
        charts.append(_picture(folder, f"errors_{quantity}", figure, caption))
    seconds = seconds_by_stage([r.seconds for r in localizations])
    if seconds is not None:
        caption = "Time of a query by stage: median, the middle half (bar), 5 to 95 % (line)."
        charts.append(_picture(folder, "seconds", seconds, caption))
    far = max((column.limits[0] for column in report.columns if column.limits), default=None)
    figure = positions_from_above(map, localizations, queries, far=far)
    caption = "The map's references and the queries' poses from above; a line leads to the true pose where it is known."
    lost = sum(r.cam_from_world is None and queries[r.name].cam_from_world is None for r in localizations)
    if lost:
        caption += f" Not shown: {lost:,} that were not localized, their true pose not known."
    return [*charts, _picture(folder, "positions", figure, caption)]


def _picture(folder: Path, name: str, figure: Figure, caption: str) -> dict[str, Any]:
    """Write a figure as PNG and give what the page needs to hold it."""
    path = folder / "figures" / f"{name}.png"
    style.save(figure, path)
    content = path.read_bytes()
    width, height = Image.open(BytesIO(content)).size
    return {"width": width, "height": height, "caption": caption, "content": b64encode(content).decode()}


def _worst_query(
    folder: Path, rank: int, result: Localization, errors: np.ndarray, query: SceneImage, map: Map, scene: Scene
) -> dict[str, Any]:
    drawn = draw_query(result, query, map=map, scene=scene)
    pictures = [
        _picture(folder, f"query_{rank:02d}_{kind}", figure, f"{kind} of {result.name}")
        for kind, figure in (("poses", drawn.poses), ("places", drawn.places))
        if figure is not None
    ]
    return {"result": result, "facts": _facts(result, errors), "pictures": pictures, "problems": drawn.problems}


def _facts(result: Localization, errors: np.ndarray) -> list[tuple[str, str]]:
    """What is known of one query: (name, value)."""
    facts = [("condition", result.condition)]
    if not np.isnan(errors[1, 0]):
        facts += [("error before refinement", _error(errors[0])), ("error", _error(errors[1]))]
    if result.matches:
        facts.append(("inliers of matches", f"{result.inliers:,} of {result.matches:,}"))
    if result.initial_cost is not None:
        outcome = "kept" if result.refined else "lost or failed, the pose before it stands"
        facts.append(("refinement", f"{outcome}; cost {_costs(result)}"))
    facts.append(("std, by the covariance", _std(result)))
    facts.append(("references, the nearest first", ", ".join(result.references)))
    if result.seconds:
        stages = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in result.seconds.items())
        facts.append(("time", f"{format_seconds(sum(result.seconds.values()))}: {stages}"))
    return [(name, value) for name, value in facts if value]


def _std(result: Localization) -> str:
    """Standard deviation of camera centre and rotation: the root of the trace of each half of the covariance."""
    if result.covariance is None:
        return ""
    variances = result.covariance.diagonal().double().reshape(2, 3).sum(-1)
    if not (variances.isfinite() & (variances >= 0)).all():
        return ""
    metres, radians = variances.sqrt().tolist()
    return f"{1000 * metres:.3g} mm, {math.degrees(radians):.2g}°"


def _cells(result: Localization, errors: np.ndarray) -> tuple[str, ...]:
    """One query's line in the list of all, its name left out."""
    known = not np.isnan(errors[1, 0])
    return (
        result.condition,
        _error(errors[0]) if known else "–",
        _error(errors[1]) if known else "–",
        _refinement(result) or "–",
        f"{result.inliers} of {result.matches}" if result.matches else "–",
        _costs(result) if result.initial_cost is not None else "–",
        format_seconds(sum(result.seconds.values())) if result.seconds else "–",
        str(result.status) if result.status == Status.LOCALIZED else f"{result.status}: {result.reason}",
    )


def _error(error: np.ndarray) -> str:
    return "no pose" if math.isinf(error[0]) else f"{format_length(error[0])}, {_degrees(error[1])}"


def _degrees(degrees: float) -> str:
    return f"{degrees:.2g}°" if degrees < 10 else "∞" if math.isinf(degrees) else f"{degrees:.0f}°"


def _costs(result: Localization) -> str:
    return f"{result.initial_cost:.4g} → {'–' if result.final_cost is None else f'{result.final_cost:.4g}'}"
