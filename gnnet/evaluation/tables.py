"""One `Table` for everything that is measured: printed with rich, kept as JSON, joined, and compared between runs.

The JSON is strict (RFC 8259 has no Infinity and no NaN): an infinite number is the string "inf" (a median
is infinite when half the queries or more failed), and a number that is not known is null.

`python -m gnnet.evaluation.report FILES` prints the tables of several runs as one.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from rich import table as rich_tables
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

from gnnet.evaluation.matching import MatchingSummary
from gnnet.evaluation.metrics import CONVERGED, ErrorSummary, Thresholds
from gnnet.files import read_text, write_at_once, write_json

FORMAT = "gnnet table 1"
INITIAL_POSES = "initial poses"  # the method whose rows tell the errors before refinement
_RESULTS = ("results.json", "localization.json", "matching.json")  # of a run
_AGAIN = "run the evaluation again to write it anew"

Setting = str | int | float | bool | None
Value = str | int | float


class Unit(StrEnum):
    """What a column holds, and so how it is printed."""

    COUNT = "count"  # a whole number
    NUMBER = "number"  # three digits
    METRES = "metres"  # three digits, in the unit that suits the smallest of the column
    SHARE = "share"  # 0 to 1, printed as percent
    TEXT = "text"  # as it is


@dataclass(frozen=True)
class Column:
    """One figure that all rows of a table have.

    Args:
        name: key of the figure in a row, and in the JSON.
        header: printed above the column, in one line or two; the unit of lengths is added.
        unit: what the figures are.
        better: whether a lower or a higher figure is better; the best of a condition is printed in bold.
        printed: False leaves the column to the JSON.
        limits: of a share, the errors within which it counts: (metres, degrees) or (pixels,).
    """

    name: str
    header: str
    unit: Unit
    better: Literal["lower", "higher"] | None = None
    printed: bool = True
    limits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """The figures of one method on one condition.

    Args:
        method: `trained`, `untrained`, `grey values`, `initial poses`, `SIFT`, …
        condition: `all`, `night`, …; empty where a table has no conditions.
        values: figures by the name of their column; inf is infinite, nan is not known.
    """

    method: str
    condition: str
    values: Mapping[str, Value]

    @classmethod
    def of(cls, columns: Sequence[Column], method: str, condition: str, *values: Value) -> Row:
        """A row of the values of some columns, in their order."""
        return cls(method, condition, dict(zip([column.name for column in columns], values, strict=True)))

    def __getitem__(self, column: str) -> Value:
        return self.values[column]


@dataclass(frozen=True)
class Table:
    """Figures by condition and method, with what is needed to understand and repeat them.

    Args:
        title: one line.
        rows: in the order in which conditions, and methods within a condition, are to be read.
        settings: plain values: dataset, model, loss, seed, steps, seconds, checkpoint, …
        meaning: sentences that say what the columns are; printed below the table.
        notes: sentences about this run; printed below the table, one a line.
        row_header: printed above the names of the rows.

    Raises:
        ValueError: if a row has not one value a column, or a setting is not a plain value.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    meaning: str = ""
    notes: tuple[str, ...] = ()
    row_header: str = "condition\n  method"

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        for row in self.rows:
            if sorted(row.values) != sorted(names):
                raise ValueError(
                    f"row {row.method!r} on {row.condition!r} has the values {', '.join(row.values)}; "
                    f"expected one for each of the columns {', '.join(names)}"
                )
        for key, value in self.settings.items():
            plain = value is None or isinstance(value, str | int | float)
            if not plain or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(
                    f"settings[{key!r}] is {value!r} ({type(value).__name__}); "
                    "expected a string, a finite number, a bool or None (turn paths and lists into strings)"
                )


def localization_table(
    title: str,
    thresholds: Thresholds,
    rows: Iterable[tuple[str, str, int, ErrorSummary]],
    *,
    settings: Mapping[str, Setting] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Errors of poses as a table.

    Args:
        thresholds: (metres, degrees) of each recall.
        rows: method, condition, number of poses (failed ones are counted), and their errors.
        title, settings, notes: see `Table`.

    Raises:
        ValueError: if a row has not one recall a threshold.
    """
    metres, degrees = CONVERGED
    meaning = f"converged: % of poses that end within {metres:g} m and {degrees:g}°, failed ones counted."
    if thresholds:
        listed = "; ".join(f"{m:g} m, {d:g}°" for m, d in thresholds)
        meaning += f" {listed}: recall, % that ends within both."
    columns = [
        Column("count", "count", Unit.COUNT),
        Column("median_position_m", "median", Unit.METRES, "lower"),
        Column("median_rotation_deg", "median\n°", Unit.NUMBER, "lower"),
        Column("converged", "converged\n%", Unit.SHARE, "higher"),
        *(
            Column(f"recall_{m:g}m_{d:g}deg", f"{m:g} m\n{d:g}°", Unit.SHARE, "higher", limits=(m, d))
            for m, d in thresholds
        ),
    ]
    made = []
    for method, condition, count, errors in rows:
        if len(errors.recall) != len(thresholds):
            raise ValueError(
                f"row {method!r} on {condition!r} has {len(errors.recall)} recall values, "
                f"expected {len(thresholds)}, one for each of the thresholds {thresholds}"
            )
        values = (count, errors.median_position, errors.median_rotation, errors.converged, *errors.recall)
        made.append(Row.of(columns, method, condition, *values))
    return Table(title, tuple(columns), tuple(made), settings or {}, meaning, tuple(notes))


def matching_table(
    title: str,
    thresholds: Sequence[float],
    summaries: Mapping[str, Sequence[MatchingSummary]],
    *,
    settings: Mapping[str, Setting] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """Shares of right matches as a table; the first three thresholds are printed, all are in the JSON.

    Args:
        thresholds: pixels.
        summaries: by method, each of the same conditions: `all` first.
        title, settings, notes: see `Table`.
    """

    def shares(name: str, header: str) -> Iterator[Column]:
        for number, px in enumerate(thresholds):
            yield Column(
                f"{name}_{px:g}px", f"{header}\n{px:g} px", Unit.SHARE, "higher", printed=number < 3, limits=(px,)
            )

    columns = (
        Column("pairs", "pairs", Unit.COUNT),
        Column("keypoints", "keypoints\na pair", Unit.COUNT, printed=False),
        *shares("matched", "all"),
        Column("kept", "kept\na pair", Unit.COUNT),
        *shares("kept", "kept"),
    )
    rows = tuple(
        Row.of(columns, method, s.condition, s.pairs, s.keypoints, *s.within, s.kept, *s.kept_within)
        for group in zip(*summaries.values(), strict=True)
        for method, s in zip(summaries, group, strict=True)
    )
    keypoints = f"{rows[0]['keypoints']:.0f} " if rows else ""
    meaning = (
        f"all: % of the {keypoints}keypoints a pair whose best match is within so many pixels of the truth. "
        "kept: matches that lead back when matched back (SIFT: ratio test, mutual nearest), and % of those."
    )
    return Table(title, columns, rows, settings or {}, meaning, tuple(notes))


def print_table(table: Table, console: Console | None = None) -> None:
    """Print title, settings, table, meaning and notes; easy to read from 80 columns on."""
    console = console or Console()
    if table.title:
        console.print(Text(table.title, style="bold"))
    if table.settings:
        settings = " · ".join(f"{key} {value}" for key, value in table.settings.items())
        console.print(Text(settings, style="dim"))
    grid = rich_table(table)
    if console.measure(grid, options=console.options.update_width(1000)).maximum > console.width:
        grid.padding = (0, 0)  # closer together
    console.print(grid)
    meaning = [table.meaning] if table.meaning else []
    lengths = [column.name for column in table.columns if column.unit is Unit.METRES]
    if any(row[name] == math.inf for row in table.rows for name in lengths):
        meaning.append("∞: half of them or more failed.")
    if meaning:
        console.print(Text(" ".join(meaning), style="dim"))
    for note in table.notes:
        console.print(Text(f"• {note}"))


def rich_table(table: Table) -> rich_tables.Table:
    """The rows for the terminal: methods under their condition, the best of a condition in bold.

    All lengths of a column have one unit, so that they can be compared at a glance.
    """
    columns = [column for column in table.columns if column.printed]
    grid = rich_tables.Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    grid.add_column(table.row_header, overflow="fold")
    factors = []
    for column in columns:
        unit, factor = "", 1.0
        if column.unit is Unit.METRES:
            unit, factor = _length_unit([float(row[column.name]) for row in table.rows])
        grid.add_column(f"{column.header}\n{unit}".strip(), justify="right", no_wrap=True)
        factors.append(factor)
    for condition in dict.fromkeys(row.condition for row in table.rows):
        group = [row for row in table.rows if row.condition == condition]
        if condition:
            grid.add_row(Text(condition, style="cyan"))
        cells = [
            _cells(column, [row[column.name] for row in group], factor)
            for column, factor in zip(columns, factors, strict=True)
        ]
        for row, *of_row in zip(group, *cells, strict=True):
            name = f"  {row.method}" if condition else row.method
            grid.add_row(Text(name), *of_row, end_section=row is group[-1])
    return grid


def _cells(column: Column, values: Sequence[Value], factor: float) -> list[Text]:
    """Cells of one column in one condition; those that read as the best value are bold, unless all read the same."""
    texts = [show(value, column.unit, factor) for value in values]
    known = [value for value in values if not isinstance(value, str) and not math.isnan(value)]
    best = None
    if column.better is not None and known and len(set(texts)) > 1:
        best = show(min(known) if column.better == "lower" else max(known), column.unit, factor)
    return [Text(text, style="bold" if text == best and best != "∞" else "") for text in texts]


def show(value: Value, unit: Unit, factor: float = 1.0) -> str:
    """A value as it is printed: ∞ for infinite, – for not known."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    if unit is Unit.SHARE:
        return f"{100 * value:.1f}"
    if unit is Unit.COUNT:
        return f"{value:,.0f}"
    value *= factor
    # Three digits, and whole numbers from 100 on.
    size = abs(value)
    digits = 3 if 0 < size < 0.0995 else 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{digits}f}"


def format_length(metres: float) -> str:
    """A length with three digits in the unit that suits it: `4.21 mm`, `51.3 cm`, `3.10 m`."""
    unit, factor = _length_unit([metres])
    return show(metres, Unit.METRES, factor) + (f" {unit}" if math.isfinite(metres) else "")


def _length_unit(metres: Iterable[float]) -> tuple[str, float]:
    """The unit that suits the smallest positive length, and how many of it are a metre."""
    smallest = min((m for m in metres if math.isfinite(m) and m > 0), default=1.0)
    if smallest < 0.01:
        return "mm", 1000.0
    return ("cm", 100.0) if smallest < 1 else ("m", 1.0)


def write_table(table: Table, path: str | Path) -> None:
    """Write a table as JSON at once: a reader finds the old file or the whole new one."""
    content = {
        "format": FORMAT,
        "title": table.title,
        "settings": table.settings,
        "columns": [asdict(column) for column in table.columns],
        "rows": [{"method": row.method, "condition": row.condition, **row.values} for row in table.rows],
        "meaning": table.meaning,
        "notes": table.notes,
        "row_header": table.row_header,
    }
    write_json(path, json_value(content))


def write_csv(table: Table, path: str | Path) -> Path:
    """Write the rows of a table as CSV, with the figures as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.name for column in table.columns]
    writer.writerow(["method", "condition", *names])
    writer.writerows([row.method, row.condition, *(row[name] for name in names)] for row in table.rows)
    return write_at_once(path, text.getvalue().encode("utf-8"))


def result_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files of results; for a folder those of all runs below it, one of each run, in the order of their numbers."""
    found: list[Path] = []
    for path in map(Path, paths):
        by_folder: dict[Path, Path] = {}
        for name in _RESULTS:
            for file in path.rglob(name):
                by_folder.setdefault(file.parent, file)
        numbered = sorted(by_folder.values(), key=lambda file: [int(n) for n in re.findall(r"\d+", str(file))])
        found += numbered if path.is_dir() else [path]
    return found


def best_first(table: Table) -> Table:
    """The same rows, in each condition sorted by the first figure of which more is better, then of which less is."""
    figures = [next((c.name for c in table.columns if c.better == better), None) for better in ("higher", "lower")]
    conditions = list(dict.fromkeys(row.condition for row in table.rows))

    def rank(row: Row) -> tuple:
        values = [0.0 if name is None else float(row[name]) for name in figures]
        signed = (-values[0], values[1])
        return conditions.index(row.condition), *((math.isnan(value), value) for value in signed)

    return replace(table, rows=tuple(sorted(table.rows, key=rank)))


def json_value(value: Any) -> Any:
    """A value for strict JSON: null for nan, the string "inf" for infinity, lists for tuples, text for the rest."""
    if isinstance(value, Mapping):
        return {str(key): json_value(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def read_table(path: str | Path) -> Table:
    """The table that `write_table` wrote, or the results that an earlier version wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or not of these formats.
    """
    text = read_text(Path(path), "a results.json, matching.json or localization.json as evaluate.py writes it")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    found = content.get("format") if isinstance(content, dict) else None
    reader = _READERS.get(found) if isinstance(found, str) else None
    if reader is None:
        raise ValueError(f"{path}: format is {found!r}, expected {FORMAT!r}; {_AGAIN}")
    try:
        return reader(content)
    except KeyError as error:
        raise ValueError(f"{path} has no key {error}; {_AGAIN}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; {_AGAIN}") from error


def _read_table_1(content: dict) -> Table:
    columns = tuple(
        Column(**{**column, "unit": Unit(column["unit"]), "limits": tuple(column["limits"])})
        for column in content["columns"]
    )
    rows = []
    for row in content["rows"]:
        values = {c.name: row[c.name] if c.unit is Unit.TEXT else _number(row[c.name]) for c in columns}
        rows.append(Row(row["method"], row["condition"], values))
    words = content["meaning"], tuple(content["notes"]), content["row_header"]
    return Table(content["title"], columns, tuple(rows), content["settings"], *words)


def _read_results_1(content: dict) -> Table:
    """What earlier versions wrote of localization."""
    rows = []
    for line in content["lines"]:
        keys = ("median_position_m", "median_rotation_deg", "recall", "converged")
        method = INITIAL_POSES if line["method"] == "start" else line["method"]
        rows.append((method, line["condition"], line["count"], ErrorSummary(*(_number(line[key]) for key in keys))))
    thresholds = tuple((t["metres"], t["degrees"]) for t in content["thresholds"])
    return localization_table(content["title"], thresholds, rows, settings=content["settings"], notes=content["notes"])


def _read_matching_1(content: dict) -> Table:
    """What earlier versions wrote of matching."""
    _, *figures = MatchingSummary._fields
    summaries = {
        method: [MatchingSummary(s["condition"], *(_number(s[key]) for key in figures)) for s in of_method]
        for method, of_method in content["methods"].items()
    }
    return matching_table(
        content["title"], content["thresholds_px"], summaries, settings=content["settings"], notes=content["notes"]
    )


_READERS = {FORMAT: _read_table_1, "gnnet results 1": _read_results_1, "gnnet matching 1": _read_matching_1}


def _number(value: Any) -> Any:
    """A number, or a tuple of numbers, as `json_value` writes it."""
    if isinstance(value, list):
        return tuple(map(_number, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return math.nan if value is None else float(value)


def join_tables(tables: Mapping[str, Table]) -> Table | None:
    """Tables of several data sets as one, whose conditions are `NAME/all` and `NAME/CONDITION`.

    Args:
        tables: by the data set's name, of the same columns; a single one is returned as it is.

    Returns:
        None for no table.
    """
    first = next(iter(tables.values()), None)
    if first is None or len(tables) == 1:
        return first
    rows = [replace(row, condition=f"{name}/{row.condition}") for name, table in tables.items() for row in table.rows]
    notes = [f"{name}: {note}" for name, table in tables.items() for note in table.notes]
    title = "; ".join(table.title for table in tables.values())
    return replace(first, title=title, rows=tuple(rows), notes=tuple(notes))


def compare_runs(paths: Iterable[str | Path], *, setting: str | None = None, method: str | None = None) -> Table:
    """One table of several runs' files, as a Hydra multirun leaves them.

    The rows of `method` are named after each run's `setting`; runs of one name are numbered in the
    order given. A row of another method (`initial poses`, `untrained`, …) that is the same in every run that
    has it stands once. Settings that all runs share are the comparison's; the others are in the notes.

    Args:
        paths: files of one kind, see `read_table`.
        setting: name of the setting that names the runs; None takes `run`, or `loss` where there is no `run`.
        method: name of the method that is compared; None takes the first of `refined`, `PnP` and `nearest`
            that there is, or `trained`.

    Raises:
        ValueError: if there is no path, a run lacks the setting, or the runs' columns differ.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise ValueError("no results.json to compare; expected paths such as multirun/<date>/<time>/*/results.json")
    tables = [read_table(path) for path in paths]
    if setting is None:
        setting = "run" if all("run" in table.settings for table in tables) else "loss"
    if method is None:
        present = {row.method for table in tables for row in table.rows}
        method = next((m for m in ("refined", "PnP", "nearest") if m in present), "trained")
    expected = ", ".join(column.name for column in tables[0].columns)
    for path, table in zip(paths, tables, strict=True):
        if setting not in table.settings:
            found = ", ".join(table.settings) or "none"
            raise ValueError(f"{path} has no setting {setting!r} to name the run by; its settings are {found}")
        columns = ", ".join(column.name for column in table.columns)
        if columns != expected:
            raise ValueError(
                f"{path} has the columns {columns}, but {paths[0]} has {expected}; "
                "compare files of one kind, evaluated with the same thresholds"
            )
    names = _distinct(_what_differs([str(table.settings[setting]) for table in tables]))
    shared = {k: v for k, v in tables[0].settings.items() if all((k, v) in t.settings.items() for t in tables)}
    notes = []
    for name, table, path in zip(names, tables, paths, strict=True):
        own = [f"{k} {v}" for k, v in table.settings.items() if k not in shared and k != setting]
        notes.append(f"{name}: {', '.join([*own, str(path)])}")
    return replace(
        tables[0],
        title=f"{len(tables)} runs by {setting}",
        rows=_merge_rows([table.rows for table in tables], names, method),
        settings={k: v for k, v in shared.items() if k != setting},
        notes=tuple(notes),
    )


def _merge_rows(runs: list[tuple[Row, ...]], names: list[str], method: str) -> tuple[Row, ...]:
    """Rows of `method` named after their run, equal rows of other methods once, unequal ones with the run's name."""
    # repr compares nan as equal to nan
    versions: dict[tuple[str, str], set[str]] = {}
    for row in (row for rows in runs for row in rows):
        versions.setdefault((row.condition, row.method), set()).add(repr(row))
    merged: dict[tuple[str, str], Row] = {}
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            label = row.method
            if label == method:
                label = name
            elif len(versions[row.condition, label]) > 1:
                label = f"{label} ({name})"
            merged.setdefault((row.condition, label), replace(row, method=label))
    return tuple(merged.values())


def _what_differs(names: list[str]) -> list[str]:
    """Names without the words that all have; a name of nothing else stays."""
    words = [name.split() for name in names]
    common = set.intersection(*map(set, words)) if len(names) > 1 else set()
    return [" ".join(w for w in own if w not in common) or name for own, name in zip(words, names, strict=True)]


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def main() -> None:
    """`python -m gnnet.evaluation.report FILES`: tables of several runs as one."""
    parser = argparse.ArgumentParser(
        prog="python -m gnnet.evaluation.report", description="Tables of several runs side by side."
    )
    parser.add_argument(
        "files", nargs="+", type=Path, help="results.json, localization.json or matching.json of runs, or their folders"
    )
    parser.add_argument("--setting", help="the setting that names the runs: by default run, or else loss")
    parser.add_argument("--method", help="the method that is compared: by default refined, or else trained")
    arguments = parser.parse_args()
    try:
        files = result_files(arguments.files)
        print_table(best_first(compare_runs(files, setting=arguments.setting, method=arguments.method)))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
