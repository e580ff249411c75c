"""One `Table` for everything that is measured: printed with rich, and kept as JSON.

The JSON is strict (RFC 8259 has no Infinity and no NaN): an infinite number is the string "inf" (a median
is infinite when half the queries or more failed), and a number that is not known is null.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import table as rich_tables
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.text import Text

from gnnet.evaluation.matching import MatchingSummary
from gnnet.evaluation.metrics import CONVERGED, ErrorSummary, Thresholds
from gnnet.evaluation.units import Unit, Value, length_unit, show
from gnnet.files import read_text, write_at_once, write_json

FORMAT = "gnnet table 1"
INITIAL_POSES = "initial poses"  # the method whose rows tell the errors before refinement
_AGAIN = "run the evaluation again to write it anew"

Setting = str | int | float | bool | None


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
    if not made:
        meaning = "No query has a known pose, so there are no errors to tell."
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
    meaning = [table.meaning] if table.meaning else []
    if table.rows:
        grid = rich_table(table)
        if console.measure(grid, options=console.options.update_width(1000)).maximum > console.width:
            grid.padding = (0, 0)  # closer together
        console.print(grid)
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
            unit, factor = length_unit([float(row[column.name]) for row in table.rows])
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
