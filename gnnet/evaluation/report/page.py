"""A localization run as one HTML file for people: table, charts, pictures of the worst queries, a list of all.

The file holds its pictures, needs no network and runs no script.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.text import Text

from gnnet.evaluation.metrics import CONVERGED
from gnnet.evaluation.report import pictures as drawing
from gnnet.evaluation.report.cameras import (
    error_curve,
    format_seconds,
    localization_errors,
    positions_from_above,
    seconds_by_stage,
)
from gnnet.evaluation.report.queries import draw_query
from gnnet.evaluation.tables import Table, format_length, rich_table
from gnnet.files import write_at_once
from gnnet.localization.map import Map
from gnnet.localization.result import Localization, Status
from gnnet.scenes.scene import Scene, SceneImage

_MOST_REASONS = 15
_OPEN_LIST = 100  # a list of more queries is folded
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --faint: #5c5c5c; --line: #d9d9d9; --back: #fff; --card: #f5f6f7;
  --good: #007a57; --bad: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --faint: #a3a3a3; --line: #3c3f42; --back: #17191b; --card: #212427; --good: #3fc79a;
    --bad: #f08a4b; }
  .chart img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { margin: .4rem 0; } .faint, figcaption { color: var(--faint); font-size: .9rem; }
pre { background: var(--card); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap; font-size: .85rem; }
.tiles, .grid, dl { display: grid; gap: .8rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1rem 0; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.25; }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); align-items: start; }
figure { margin: 0; } figure img { display: block; width: 100%; max-width: 40rem; height: auto; border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--faint); } td:first-child, th:first-child, .words td, .words th { text-align: left; }
table:not(.words) thead th { white-space: nowrap; }
tr.condition th { color: var(--text); padding-top: .7rem; }
article { border-top: 1px solid var(--line); padding: 1.1rem 0; }
dl { grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); gap: .4rem 1.2rem; margin: 0 0 .8rem;
  font-size: .9rem; }
dt { color: var(--faint); font-size: .8rem; } dd { margin: 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
a { color: inherit; } summary { cursor: pointer; }
"""


def write_html_report(
    folder: Path,
    *,
    report: Table,
    localizations: Sequence[Localization],
    queries: Mapping[str, SceneImage],
    map: Map,
    scene: Scene | None,
    settings: Mapping[str, object],
    worst: int = 12,
    command: str = "",
) -> Path:
    """Write `folder/report.html` at once, and its pictures as `folder/figures/*.png` too.

    Args:
        report: the table, of the queries whose pose is known.
        localizations: of all queries.
        queries: by name, one for each localization.
        map: that they were localized on.
        scene: where the references' image files are; without it no reference is shown.
        settings: plain values to show.
        worst: so many queries are shown with pictures, failed ones first, then those with the largest position
            error, then, where the truth is not known, those with the fewest inliers; about a megabyte each.
        command: that made the run.

    Returns:
        The HTML file.
    """
    folder = Path(folder)
    errors = localization_errors(localizations, queries)
    shown = _worst_first(localizations, errors)[: max(0, worst)]
    parts = [
        *_head(report, command),
        *_tiles(localizations, errors),
        *_table(report),
        *_outcomes(localizations),
        *_charts(folder, report, localizations, queries, errors, map),
        *_worst_queries(folder, [(localizations[i], errors[i]) for i in shown], queries, map, scene),
        *_all_queries(localizations, errors, {i: rank for rank, i in enumerate(shown, start=1)}),
        *_settings({**report.settings, **settings}),
        "</main></body></html>\n",
    ]
    # A file's name may be no text; what cannot be written then stands as \udc80.
    return write_at_once(folder / "report.html", "\n".join(parts).encode("utf-8", "backslashreplace"))


def _worst_first(localizations: Sequence[Localization], errors: np.ndarray) -> list[int]:
    def key(i: int) -> tuple:
        result, error = localizations[i], errors[i, 1, 0]
        if result.cam_from_world is None:
            return 0, 0.0, 0.0, result.name
        if not math.isnan(error):
            return 1, -float(error), 0.0, result.name
        return 2, result.inliers, -(result.final_cost or 0.0), result.name

    return sorted(range(len(localizations)), key=key)


def _head(report: Table, command: str) -> Iterator[str]:
    # No address is allowed to be loaded, so that the page cannot reach out, whatever names hold.
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body><main>"
    )
    yield f"<h1>{escape(report.title)}</h1>"
    yield f'<p class="faint">{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}</p>'
    if command:
        yield f"<pre>{escape(command)}</pre>"


def _tiles(localizations: Sequence[Localization], errors: np.ndarray) -> Iterator[str]:
    """The run in a few large figures."""
    tiles = [(f"{_localized(localizations):,} of {len(localizations):,}", "queries localized")]
    kept, lost = (sum(_refinement(r) == kind for r in localizations) for kind in ("kept", "lost"))
    tiles.append((f"{kept:,} kept, {lost:,} lost", "refinements") if kept + lost else ("none", "refinements tried"))
    known = errors[~np.isnan(errors[:, 1, 0])]
    if len(known):
        before, after = np.median(known, axis=0)
        arrow = [after] if not kept + lost else [before, after]
        tiles.append((" → ".join(format_length(e[0]) for e in arrow), f"median position error of {len(known):,}"))
        tiles.append((" → ".join(_degrees(e[1]) for e in arrow), "median rotation error"))
    seconds = [sum(r.seconds.values()) for r in localizations if r.seconds]
    if seconds:
        tiles.append((format_seconds(float(np.median(seconds))), "median time of a query"))
    yield '<div class="tiles">'
    yield from (f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for value, name in tiles)
    yield "</div>"


def _localized(localizations: Sequence[Localization]) -> int:
    return sum(r.cam_from_world is not None for r in localizations)


def _refinement(result: Localization) -> str:
    """`kept`, `lost` (or failed: the pose before it stands), or empty where none was tried."""
    if result.refined:
        return "kept"
    return "lost" if result.initial_cost is not None else ""


def _table(report: Table) -> Iterator[str]:
    """The report's table, the best of a condition in bold as on the terminal."""
    yield "<h2>Accuracy</h2>"
    if report.rows:
        columns = rich_table(report).columns
        heads = "".join(f"<th>{escape(str(c.header)).replace(chr(10), '<br>')}</th>" for c in columns)
        yield f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>'
        for first, *cells in zip(*(column.cells for column in columns), strict=True):
            if not any(str(cell) for cell in cells):
                yield f'<tr class="condition"><th colspan="{len(columns)}">{escape(str(first))}</th></tr>'
                continue
            row = "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
            yield f"<tr><td>{escape(str(first).strip())}</td>{row}</tr>"
        yield "</tbody></table></div>"
        yield (
            f'<p class="faint">Converged: within {CONVERGED[0]:g} m and {CONVERGED[1]:g}°. The last columns: '
            "% within both metres and degrees. Queries without a pose count, with infinite errors; those whose true "
            "pose is not known do not. The best of a condition is bold.</p>"
        )
    else:
        yield "<p>No query has a known pose, so there are no errors to tell.</p>"
    if report.notes:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in report.notes)}</ul>"


def _cell(cell: Text | str) -> str:
    text = escape(str(cell))
    return f"<b>{text}</b>" if isinstance(cell, Text) and cell.style == "bold" else text


def _outcomes(localizations: Sequence[Localization]) -> Iterator[str]:
    """How many queries ended how, by condition and by reason."""
    yield "<h2>What became of the queries</h2>"
    groups: dict[str, list[Localization]] = {"all": list(localizations)}
    for result in sorted(localizations, key=lambda r: r.condition):
        groups.setdefault(f"{result.condition} ", []).append(result)  # a condition may be named `all`
    if len(groups) == 2:
        groups = {"all": groups["all"]}
    heads = ("condition", "queries", "localized", "refined", "lost", "not tried")
    rows = []
    for name, members in groups.items():
        kinds = Counter(_refinement(r) for r in members)
        counts = (len(members), _localized(members), kinds["kept"], kinds["lost"], kinds[""])
        rows.append((name.strip() or "–", *(f"{count:,}" for count in counts)))
    yield from _rows(heads, rows)
    reasons = Counter((str(r.status), _NUMBER.sub("…", r.reason)) for r in localizations)
    rows = [(f"{count:,}", *words) for words, count in reasons.most_common()]
    if len(rows) > _MOST_REASONS:
        rest = sum(count for _, count in reasons.most_common()[_MOST_REASONS:])
        rows[_MOST_REASONS:] = [(f"{rest:,}", "", f"{len(rows) - _MOST_REASONS:,} other reasons")]
    yield (
        '<p class="faint">Refined: the refined pose stands. Lost: refinement failed or made it worse, so the pose '
        "before it stands.</p>"
    )
    yield from _rows(("queries", "status", "reason, numbers left out"), rows, words=True)


def _rows(heads: Iterable[str], rows: Iterable[Iterable[str]], *, words: bool = False) -> Iterator[str]:
    """A table of plain text."""
    yield f'<div class="scroll"><table{" class=words" if words else ""}><thead><tr>'
    yield "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody></table></div>"


def _charts(
    folder: Path, report: Table, localizations: Sequence[Localization], queries: Mapping[str, SceneImage],
    errors: np.ndarray, map: Map,
) -> Iterator[str]:  # fmt: skip
    yield '<h2>Charts</h2><div class="grid">'
    refined = any(_refinement(r) for r in localizations)
    if not np.isnan(errors[:, 1, 0]).all():
        conditions = [r.condition for r in localizations]
        for k, quantity in enumerate(("position", "rotation")):
            limits = [column.limits[k] for column in report.columns if column.limits]
            figure = error_curve(errors, conditions, quantity, refined=refined, limits=limits)
            caption = (
                f"Share of queries within a {quantity} error. Queries without a pose keep a curve below 100 %; "
                "dotted lines are the table's thresholds."
            )
            yield _figure(folder / f"figures/errors_{quantity}.png", figure, caption, chart=True)
    if (figure := seconds_by_stage([r.seconds for r in localizations])) is not None:
        caption = "Time of a query by stage: median, the middle half (bar), 5 to 95 % (line)."
        yield _figure(folder / "figures/seconds.png", figure, caption, chart=True)
    far = max((column.limits[0] for column in report.columns if column.limits), default=None)
    figure = positions_from_above(map, localizations, queries, far=far)
    caption = "The map's references and the queries' poses from above; a line leads to the true pose where it is known."
    lost = sum(r.cam_from_world is None and queries[r.name].cam_from_world is None for r in localizations)
    if lost:
        caption += f" Not shown: {lost:,} that were not localized, their true pose not known."
    yield _figure(folder / "figures/positions.png", figure, caption, chart=True)
    yield "</div>"


def _figure(path: Path, figure: Figure, caption: str, *, chart: bool = False) -> str:
    drawing.save(figure, path)
    content = path.read_bytes()
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))  # of the PNG's header
    return (
        f'<figure{" class=chart" if chart else ""}><img width="{width}" height="{height}" alt="{escape(caption)}" '
        f'src="data:image/png;base64,{b64encode(content).decode()}">'
        f"{f'<figcaption>{escape(caption)}</figcaption>' if chart else ''}</figure>"
    )


def _worst_queries(
    folder: Path, shown: Sequence[tuple[Localization, np.ndarray]], queries: Mapping[str, SceneImage], map: Map,
    scene: Scene | None,
) -> Iterator[str]:  # fmt: skip
    if not shown:
        return
    yield f"<h2>Queries, the worst first ({len(shown):,})</h2>"
    yield (
        '<p class="faint">3D points of the nearest reference that sees what the query sees, projected into the query: '
        "orange crosses at the start pose, blue dots at the refined pose, white rings at the true pose where it is "
        "known. The grey pictures show where these points lie in the reference, and where the pose puts them in the "
        "query; a right pose puts them on the same things. These are no matches.</p>"
    )
    for rank, (result, errors) in enumerate(shown, start=1):
        yield f'<article id="q{rank}"><h3>{rank}. {escape(result.name)}</h3>'
        kind = "bad" if result.cam_from_world is None else "good"
        yield f'<p><span class="{kind}">{escape(str(result.status))}</span> {escape(result.reason)}</p><dl>'
        for name, value in _facts(result, errors):
            yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        yield '</dl><div class="grid">'
        pictures = draw_query(result, queries[result.name], map=map, scene=scene)
        for kind, figure in (("poses", pictures.poses), ("places", pictures.places)):
            if figure is not None:
                yield _figure(folder / f"figures/query_{rank:02d}_{kind}.png", figure, f"{kind} of {result.name}")
        yield "</div>"
        yield from (f'<p class="bad">No picture of it: {escape(problem)}</p>' for problem in pictures.problems)
        yield "</article>"


def _facts(result: Localization, errors: np.ndarray) -> Iterator[tuple[str, str]]:
    if result.condition:
        yield "condition", result.condition
    if not np.isnan(errors[1, 0]):
        yield "error before refinement", _error(errors[0])
        yield "error", _error(errors[1])
    if result.matches:
        yield "inliers of matches", f"{result.inliers:,} of {result.matches:,}"
    if result.initial_cost is not None:
        outcome = "kept" if result.refined else "lost or failed, the pose before it stands"
        yield "refinement", f"{outcome}; cost {_costs(result)}"
    if (sigma := _sigma(result)) is not None:
        yield "standard deviation, from the residuals", sigma
    if result.references:
        yield "references, the nearest first", ", ".join(result.references)
    if result.seconds:
        stages = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in result.seconds.items())
        yield "time", f"{format_seconds(sum(result.seconds.values()))}: {stages}"


def _sigma(result: Localization) -> str | None:
    """Of camera centre and rotation: the root of the trace of each half of the covariance."""
    if result.covariance is None:
        return None
    variances = result.covariance.diagonal().double().reshape(2, 3).sum(-1)
    if not (variances.isfinite() & (variances >= 0)).all():
        return None
    metres, radians = variances.sqrt().tolist()
    return f"{1000 * metres:.3g} mm, {math.degrees(radians):.2g}°"


def _all_queries(localizations: Sequence[Localization], errors: np.ndarray, ranks: Mapping[int, int]) -> Iterator[str]:
    """Every query in a line; folded where there are many."""
    yield f"<h2>All queries</h2><details{' open' if len(localizations) <= _OPEN_LIST else ''}>"
    yield f"<summary>{len(localizations):,} queries by name</summary>"
    heads = ("query", "condition", "before refinement", "error", "refinement", "inliers", "cost", "time", "status")
    yield '<div class="scroll"><table class="words"><thead><tr>'
    yield "".join(f"<th>{head}</th>" for head in heads) + "</tr></thead><tbody>"
    for i in sorted(range(len(localizations)), key=lambda i: localizations[i].name):
        result, known = localizations[i], not np.isnan(errors[i, 1, 0])
        name = escape(result.name)
        cells = (
            f'<a href="#q{ranks[i]}">{name}</a>' if i in ranks else name,
            escape(result.condition),
            _error(errors[i, 0]) if known else "–",
            _error(errors[i, 1]) if known else "–",
            _refinement(result) or "–",
            f"{result.inliers} of {result.matches}" if result.matches else "–",
            _costs(result) if result.initial_cost is not None else "–",
            format_seconds(sum(result.seconds.values())) if result.seconds else "–",
            str(result.status) if result.status == Status.LOCALIZED else escape(f"{result.status}: {result.reason}"),
        )
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div></details>"


def _settings(settings: Mapping[str, object]) -> Iterator[str]:
    if settings:
        yield "<h2>Settings</h2>"
        yield from _rows(("setting", "value"), ((str(k), str(v)) for k, v in settings.items()), words=True)


def _error(error: np.ndarray) -> str:
    return "no pose" if math.isinf(error[0]) else f"{format_length(error[0])}, {_degrees(error[1])}"


def _degrees(degrees: float) -> str:
    return f"{degrees:.2g}°" if degrees < 10 else "∞" if math.isinf(degrees) else f"{degrees:.0f}°"


def _costs(result: Localization) -> str:
    return f"{result.initial_cost:.4g} → {'–' if result.final_cost is None else f'{result.final_cost:.4g}'}"
