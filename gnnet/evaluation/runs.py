"""Tables of several data sets as one, and of several runs: `python -m gnnet.evaluation.report A B`."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gnnet.evaluation.metrics import paired_difference
from gnnet.evaluation.tables import Row, Table, print_table, read_table
from gnnet.files import read_text

_RESULTS = ("results.json", "localization.json", "matching.json")  # of a run


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


def compare_runs(paths: Iterable[str | Path], *, setting: str | None = None, method: str | None = None) -> Table:
    """One table of several runs' files, as a Hydra multirun leaves them.

    The rows of `method` are named after each run's `setting`; runs of one name are numbered in the
    order given. A row of another method (`initial poses`, `untrained`, …) that is the same in every run that
    has it stands once. Settings that all runs share are the comparison's; the others are in the notes.
    So is how each run differs from the first on the same queries, where both have `localizations.jsonl` beside them.

    Args:
        paths: files of one kind, see `read_table`.
        setting: name of the setting that names the runs; None takes `run`, or `loss` where there is no `run`.
        method: name of the method that is compared; None takes the first of `refined`, `PnP` and `nearest`
            that there is, or `trained`.

    Raises:
        ValueError: if there is no path, a run lacks the setting, or the runs' columns differ.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("no results.json to compare; expected paths such as multirun/<date>/<time>/*/results.json")
    tables = [read_table(path) for path in files]
    if setting is None:
        setting = "run" if all("run" in table.settings for table in tables) else "loss"
    if method is None:
        present = {row.method for table in tables for row in table.rows}
        method = next((m for m in ("refined", "PnP", "nearest") if m in present), "trained")
    expected = ", ".join(column.name for column in tables[0].columns)
    for path, table in zip(files, tables, strict=True):
        if setting not in table.settings:
            found = ", ".join(table.settings) or "none"
            raise ValueError(f"{path} has no setting {setting!r} to name the run by; its settings are {found}")
        columns = ", ".join(column.name for column in table.columns)
        if columns != expected:
            raise ValueError(
                f"{path} has the columns {columns}, but {files[0]} has {expected}; "
                "compare files of one kind, evaluated with the same thresholds"
            )
    names = _distinct(_what_differs([str(table.settings[setting]) for table in tables]))
    shared = {k: v for k, v in tables[0].settings.items() if all((k, v) in t.settings.items() for t in tables)}
    notes = []
    for name, table, path in zip(names, tables, files, strict=True):
        own = [f"{k} {v}" for k, v in table.settings.items() if k not in shared and k != setting]
        notes.append(f"{name}: {', '.join([*own, str(path)])}")
    return replace(
        tables[0],
        title=f"{len(tables)} runs by {setting}",
        rows=_merge_rows([table.rows for table in tables], names, method),
        settings={k: v for k, v in shared.items() if k != setting},
        notes=(*notes, *_paired_differences(names, files)),
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


def _paired_differences(names: Sequence[str], paths: Sequence[Path]) -> Iterator[str]:
    """A sentence for each run after the first, by the runs' records of queries whose true pose is known."""
    records = [path.with_name("localizations.jsonl") for path in paths]
    first, *others = (_position_errors(file) if file.is_file() else {} for file in records)
    for name, other in zip(names[1:], others, strict=True):
        common = first.keys() & other.keys()
        if common:
            errors = (torch.tensor([run[query] for query in sorted(common)]).double() for run in (first, other))
            sentence = paired_difference(*errors).describe(names[0], name)
            alone = (names[0], len(first) - len(common)), (name, len(other) - len(common))
            yield "; ".join([sentence, *(f"queries of {run} only: {count}" for run, count in alone if count)])


def _position_errors(records: Path) -> dict[str, float]:
    """Position error in metres of each query whose true pose is known, by name; infinite without a pose."""
    errors = {}
    for number, line in enumerate(read_text(records, "localizations.jsonl, as evaluate.py writes it").splitlines(), 1):
        try:
            record = json.loads(line)
            if "error" in record:
                found = record["error"]["position_m"]
                errors[record["name"]] = math.inf if found is None else float(found)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{records}, line {number}: {error!r}; run the evaluation again") from error
    return errors


def main() -> None:
    """`python -m gnnet.evaluation.report RUNS`: tables of several runs as one, and their paired differences."""
    parser = argparse.ArgumentParser(
        prog="python -m gnnet.evaluation.report",
        description="Tables of several runs side by side; and, of localized queries, how each run differs from the "
        "first on the same queries.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of runs, or their results.json, localization.json or matching.json"
    )
    parser.add_argument("--setting", help="the setting that names the runs: by default run, or else loss")
    parser.add_argument("--method", help="the method that is compared: by default refined, or else trained")
    arguments = parser.parse_args()
    try:
        files = result_files(arguments.runs)
        print_table(best_first(compare_runs(files, setting=arguments.setting, method=arguments.method)))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
