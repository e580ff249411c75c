"""Localization results as a table to read and a `results.json` to keep.

The JSON is strict (RFC 8259 has no Infinity and no NaN): an infinite number is the string "inf"
(a median is infinite when half the queries or more failed), and a number that is not known is null.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gnnet.evaluation.metrics import CONVERGED, ErrorSummary
from gnnet.files import write_json

FORMAT = "gnnet results 1"

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class Line:
    """What one method reached on one condition.

    Args:
        method: `trained`, `untrained`, `grey values`, `start`, …
        condition: `all`, `night`, …
        count: number of starts; failed ones are counted, with infinite errors.
        median_position_m: metres between camera centres; inf if half or more failed, nan if unknown.
        median_rotation_deg: degrees, likewise.
        recall: share, 0 to 1, of starts that end within each of the report's thresholds.
        converged: share of starts that end within `metrics.CONVERGED`.
    """

    method: str
    condition: str
    count: int
    median_position_m: float
    median_rotation_deg: float
    recall: tuple[float, ...]
    converged: float

    @classmethod
    def of(cls, method: str, condition: str, count: int, errors: ErrorSummary) -> Line:
        """The line of a summary."""
        return cls(method, condition, count, *errors)


@dataclass(frozen=True)
class Report:
    """Lines under one set of thresholds, with what is needed to understand and repeat them.

    Args:
        title: one line.
        thresholds: (metres, degrees) of each recall.
        lines: in the order in which conditions, and methods within a condition, are to be read.
        settings: plain values: dataset, model, loss, seed, steps, seconds, checkpoint, …
        notes: sentences to print below the table.

    Raises:
        ValueError: if a line has not one recall a threshold, or a setting is not a plain value.
    """

    title: str
    thresholds: tuple[tuple[float, float], ...]
    lines: tuple[Line, ...]
    settings: dict[str, Setting] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for line in self.lines:
            if len(line.recall) != len(self.thresholds):
                raise ValueError(
                    f"line {line.method!r} on {line.condition!r} has {len(line.recall)} recall values, "
                    f"expected {len(self.thresholds)}, one for each of the thresholds {self.thresholds}"
                )
        for key, value in self.settings.items():
            plain = value is None or isinstance(value, str | int | float)
            if not plain or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(
                    f"settings[{key!r}] is {value!r} ({type(value).__name__}); "
                    "expected a string, a finite number, a bool or None (turn paths and lists into strings)"
                )


def format_length(metres: float) -> str:
    """A length with three digits in the unit that suits it: `4.21 mm`, `51.3 cm`, `3.10 m`."""
    if not math.isfinite(metres):
        return _number(metres)
    unit, factor = _length_unit([metres])
    return f"{_number(metres * factor)} {unit}"


def report_table(report: Report) -> Table:
    """A rich table for 80 columns: methods under their condition, the best of a condition in bold.

    All positions have one unit, chosen for the smallest, so that a column can be compared at a glance.
    """
    unit, factor = _length_unit([line.median_position_m for line in report.lines])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("condition\n  method", overflow="fold")
    for header in ("count", f"median\n{unit}", "median\n°", "converged\n%"):
        table.add_column(header, justify="right", no_wrap=True)
    for metres, degrees in report.thresholds:
        table.add_column(f"{metres:g} m\n{degrees:g}°", justify="right", no_wrap=True)
    for condition, group in _by_condition(report.lines).items():
        columns = [
            _column([line.median_position_m * factor for line in group], _number, smallest=True),
            _column([line.median_rotation_deg for line in group], _number, smallest=True),
            _column([line.converged for line in group], _percent, smallest=False),
            *(
                _column([line.recall[i] for line in group], _percent, smallest=False)
                for i in range(len(report.thresholds))
            ),
        ]
        table.add_row(Text(condition, style="cyan"))
        for i, line in enumerate(group):
            cells = [column[i] for column in columns]
            table.add_row(Text(f"  {line.method}"), str(line.count), *cells, end_section=line is group[-1])
    return table


def print_report(report: Report, console: Console | None = None) -> None:
    """Print title, settings, table and notes; easy to read from 80 columns on."""
    console = console or Console()
    console.print(Text(report.title, style="bold"))
    if report.settings:
        settings = " · ".join(f"{key} {value}" for key, value in report.settings.items())
        console.print(Text(settings, style="dim"))
    console.print(report_table(report))
    metres, degrees = CONVERGED
    meaning = [f"converged: % of starts that end within {metres:g} m and {degrees:g}°, failed ones counted."]
    if report.thresholds:
        listed = "; ".join(f"{m:g} m, {d:g}°" for m, d in report.thresholds)
        meaning.append(f"{listed}: recall, % that ends within both.")
    if any(math.isinf(line.median_position_m) for line in report.lines):
        meaning.append("∞: half of the starts or more failed.")
    console.print(Text(" ".join(meaning), style="dim"))
    for note in report.notes:
        console.print(Text(f"• {note}"))


def write_results(report: Report, path: str | Path) -> None:
    """Write `results.json` at once: a reader finds the old file or the whole new one."""
    content = {
        "format": FORMAT,
        "title": report.title,
        "settings": report.settings,
        "thresholds": [{"metres": float(m), "degrees": float(d)} for m, d in report.thresholds],
        "lines": [_line_to_json(line) for line in report.lines],
        "notes": list(report.notes),
    }
    write_json(path, content)


def read_results(path: str | Path) -> Report:
    """The report that `write_results` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a results.json as evaluate.py writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
        raise ValueError(f"{path} is not JSON ({error}); run the evaluation again to write it anew") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format is {found!r}, expected {FORMAT!r}; run the evaluation again to write it anew")
    try:
        return Report(
            title=content["title"],
            thresholds=tuple((t["metres"], t["degrees"]) for t in content["thresholds"]),
            lines=tuple(_line_from_json(line) for line in content["lines"]),
            settings=content["settings"],
            notes=tuple(content["notes"]),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no key {error}; run the evaluation again to write it anew") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; run the evaluation again to write it anew") from error


def compare_runs(paths: Iterable[str | Path], *, setting: str = "loss", method: str = "trained") -> Report:
    """One report of several runs' `results.json`, as a Hydra multirun leaves them; print it with `print_report`.

    The lines of `method` are named after each run's `setting`; runs of one name are numbered in the
    order given. A line of another method (`start`, `untrained`, …) that is the same in every run that
    has it stands once. Settings that all runs share are the comparison's; the others are in the notes.

    Raises:
        ValueError: if there is no path, a run lacks the setting, or the runs' thresholds differ.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise ValueError("no results.json to compare; expected paths such as multirun/<date>/<time>/*/results.json")
    reports = [read_results(path) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        if setting not in report.settings:
            found = ", ".join(report.settings) or "none"
            raise ValueError(f"{path} has no setting {setting!r} to name the run by; its settings are {found}")
        if report.thresholds != reports[0].thresholds:
            raise ValueError(
                f"{path} has the thresholds {report.thresholds}, but {paths[0]} has {reports[0].thresholds}; "
                "evaluate both with the same thresholds"
            )
    names = _distinct(_what_differs([str(report.settings[setting]) for report in reports]))
    shared = {k: v for k, v in reports[0].settings.items() if all(r.settings.get(k, _ABSENT) == v for r in reports)}
    notes = []
    for name, report, path in zip(names, reports, paths, strict=True):
        own = [f"{k} {v}" for k, v in report.settings.items() if k not in shared and k != setting]
        notes.append(f"{name}: {', '.join([*own, str(path)])}")
    return Report(
        title=f"{len(reports)} runs by {setting}",
        thresholds=reports[0].thresholds,
        lines=tuple(_merge_lines([report.lines for report in reports], names, method)),
        settings={k: v for k, v in shared.items() if k != setting},
        notes=tuple(notes),
    )


def join_reports(reports: Mapping[str, Report]) -> Report | None:
    """Reports of several data sets as one, whose conditions are `NAME/all` and `NAME/CONDITION`.

    Args:
        reports: by the data set's name, of one set of thresholds; a single one is returned as it is.

    Returns:
        None for no report.
    """
    if len(reports) < 2:
        return next(iter(reports.values()), None)
    first = next(iter(reports.values()))
    return Report(
        title="; ".join(report.title for report in reports.values()),
        thresholds=first.thresholds,
        lines=tuple(
            replace(line, condition=f"{name}/{line.condition}")
            for name, report in reports.items()
            for line in report.lines
        ),
        settings=first.settings,
        notes=tuple(f"{name}: {note}" for name, report in reports.items() for note in report.notes),
    )


_ABSENT = object()


def _merge_lines(runs: list[tuple[Line, ...]], names: list[str], method: str) -> list[Line]:
    """Lines of `method` named after their run, equal lines of other methods once, unequal ones with the run's name."""
    merged: dict[tuple[str, str], Line] = {}
    for name, lines in zip(names, runs, strict=True):
        for line in lines:
            if line.method == method:
                label = name
            else:
                # repr compares nan as equal to nan
                versions = {repr(o) for other in runs for o in other if _key(o) == _key(line)}
                label = line.method if len(versions) == 1 else f"{line.method} ({name})"
            renamed = replace(line, method=label)
            merged.setdefault(_key(renamed), renamed)
    return list(merged.values())


def _key(line: Line) -> tuple[str, str]:
    return line.condition, line.method


def _what_differs(names: list[str]) -> list[str]:
    """Names without the words that all have; a name of nothing else stays."""
    words = [name.split() for name in names]
    common = set.intersection(*map(set, words)) if len(names) > 1 else set()
    return [" ".join(w for w in own if w not in common) or name for own, name in zip(words, names, strict=True)]


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _by_condition(lines: Sequence[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.condition, []).append(line)
    return groups


def _length_unit(metres: Iterable[float]) -> tuple[str, float]:
    """Unit, and units a metre, that suit the smallest positive length."""
    smallest = min((m for m in metres if math.isfinite(m) and m > 0), default=1.0)
    if smallest < 0.01:
        return "mm", 1000.0
    return ("cm", 100.0) if smallest < 1 else ("m", 1.0)


def _column(values: list[float], show, smallest: bool) -> list[Text]:
    """Cells, with the best value in bold, and what reads the same as it; none if all read the same."""
    texts = [show(value) for value in values]
    known = [value for value in values if not math.isnan(value)]
    best = show(min(known) if smallest else max(known)) if known else None
    bold = len(set(texts)) > 1 and best not in ("∞", None)
    return [Text(text, style="bold" if bold and text == best else "") for text in texts]


def _number(value: float) -> str:
    """Three digits, and whole numbers from 100 on; ∞, or – for what is not known."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    if 0 < abs(value) < 0.0995:
        digits = 3
    return f"{value:.{digits}f}"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def _line_to_json(line: Line) -> dict:
    return {
        "method": line.method,
        "condition": line.condition,
        "count": int(line.count),
        "median_position_m": _encode(line.median_position_m),
        "median_rotation_deg": _encode(line.median_rotation_deg),
        "recall": [_encode(share) for share in line.recall],
        "converged": _encode(line.converged),
    }


def _line_from_json(content: dict) -> Line:
    values = {f.name: content[f.name] for f in fields(Line)}
    return Line(
        method=values["method"],
        condition=values["condition"],
        count=int(values["count"]),
        median_position_m=_decode(values["median_position_m"]),
        median_rotation_deg=_decode(values["median_rotation_deg"]),
        recall=tuple(_decode(share) for share in values["recall"]),
        converged=_decode(values["converged"]),
    )


def _encode(value: float) -> float | str | None:
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _decode(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def main() -> None:
    """`python -m gnnet.evaluation.report FILES`: tables of several runs as one."""
    parser = argparse.ArgumentParser(
        prog="python -m gnnet.evaluation.report", description="Tables of several runs side by side."
    )
    parser.add_argument("files", nargs="+", type=Path, help="results.json or localization.json of runs")
    parser.add_argument("--setting", default=None, help="that names the runs: by default run, or else loss")
    parser.add_argument("--method", default=None, help="that is compared: by default refined, or else trained")
    arguments = parser.parse_args()
    try:
        reports = [read_results(path) for path in arguments.files]
        setting = arguments.setting or ("run" if "run" in reports[0].settings else "loss")
        methods = {line.method for report in reports for line in report.lines}
        method = arguments.method or next((m for m in ("refined", "PnP", "nearest") if m in methods), "trained")
        print_report(compare_runs(arguments.files, setting=setting, method=method))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
