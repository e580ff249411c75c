"""Several networks, and SIFT, match the same pairs: a table to read, and a `matching.json` to keep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import nn

from gnnet.data.batches import MatchingPair
from gnnet.evaluation.matching import (
    THRESHOLDS,
    MatchingMetrics,
    MatchingSummary,
    match_pair,
    match_pair_with_sift,
)
from gnnet.evaluation.tables import Setting
from gnnet.files import write_json
from gnnet.localization.matching import Matcher

FORMAT = "gnnet matching 1"


@dataclass(frozen=True)
class MatchingReport:
    """What each method reached, with what is needed to understand and repeat it.

    Args:
        title: one line.
        thresholds: pixels.
        lines: summaries by method, in the order of the table: `all` first, then the conditions.
        settings: plain values: dataset, model, checkpoint, seed, …
        notes: sentences to print below the table.
    """

    title: str
    thresholds: tuple[float, ...]
    lines: dict[str, tuple[MatchingSummary, ...]]
    settings: dict[str, Setting] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare_matching(
    networks: Mapping[str, nn.Module],
    pairs: Iterable[MatchingPair],
    *,
    conditions: Iterable[str],
    title: str,
    device: torch.device | str,
    matcher: Matcher = Matcher(),  # noqa: B008, a frozen value
    sift: bool = True,
    upright: bool = False,
    thresholds: tuple[float, ...] = THRESHOLDS,
    settings: Mapping[str, Setting] | None = None,
) -> MatchingReport:
    """Match every pair with every network, and with SIFT.

    Networks are put into evaluation mode for it, and back.

    Args:
        networks: by the name that stands in the table.
        pairs: read once.
        conditions: all conditions of the pairs.
        title: of the report.
        device: where to run.
        matcher: settings of matching with networks.
        sift: add lines of SIFT.
        upright: and of SIFT that is not turned, which is the stronger between images of a fixed camera.
        thresholds: pixels.
        settings: to stand in the report.
    """
    conditions = tuple(conditions)
    turned = {"SIFT": False, **({"SIFT, upright": True} if upright else {})} if sift else {}
    # Only one process compares, so nothing is gathered.
    metrics = {
        name: MatchingMetrics(conditions=conditions, thresholds=thresholds, sync_on_compute=False)
        for name in (*networks, *turned)
    }
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval().to(device)
    for index, pair in enumerate(track(pairs, description="Matching pairs", transient=True)):
        for name, network in networks.items():
            metrics[name].update(match_pair(network, pair, matcher), condition=pair.condition, index=index)
        for name, is_upright in turned.items():
            matches = match_pair_with_sift(pair, upright=is_upright)
            metrics[name].update(matches, condition=pair.condition, index=index)
    for name, network in networks.items():
        network.train(was_training[name])
    lines = {name: metric.compute() for name, metric in metrics.items()}
    return MatchingReport(title=title, thresholds=thresholds, lines=lines, settings=dict(settings or {}))


def matching_table(report: MatchingReport) -> Table:
    """A rich table for 80 columns: methods under their condition, the best of a condition in bold."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("condition\n  method", overflow="fold")
    table.add_column("pairs", justify="right", no_wrap=True)
    shown = range(min(3, len(report.thresholds)))  # what fits; the file has all
    for i in shown:
        table.add_column(f"all\n{report.thresholds[i]:g} px", justify="right", no_wrap=True)
    table.add_column("kept\na pair", justify="right", no_wrap=True)
    for i in shown:
        table.add_column(f"kept\n{report.thresholds[i]:g} px", justify="right", no_wrap=True)
    groups: dict[str, list[tuple[str, MatchingSummary]]] = {}
    for method, summaries in report.lines.items():
        for summary in summaries:
            groups.setdefault(summary.condition, []).append((method, summary))
    for condition, group in groups.items():
        table.add_row(Text(condition, style="cyan"))
        of_all = [_percents([s.within[i] for _, s in group]) for i in shown]
        of_kept = [_percents([s.kept_within[i] for _, s in group]) for i in shown]
        for row, (method, summary) in enumerate(group):
            kept = "–" if math.isnan(summary.kept) else f"{summary.kept:.0f}"
            cells = [*(c[row] for c in of_all), kept, *(c[row] for c in of_kept)]
            table.add_row(f"  {method}", str(summary.pairs), *cells, end_section=row == len(group) - 1)
    return table


def print_matching(report: MatchingReport, console: Console | None = None) -> None:
    """Print title, settings, table and notes; easy to read from 80 columns on."""
    console = console or Console()
    console.print(Text(report.title, style="bold"))
    if report.settings:
        settings = " · ".join(f"{key} {value}" for key, value in report.settings.items())
        console.print(Text(settings, style="dim"))
    console.print(matching_table(report))
    keypoints = next((s[0].keypoints for s in report.lines.values() if s), math.nan)
    meaning = (
        f"all: % of the {keypoints:.0f} keypoints a pair whose best match is within so many pixels of the truth. "
        "kept: matches that lead back when matched back (SIFT: ratio test, mutual nearest), and % of those."
    )
    console.print(Text(meaning, style="dim"))
    for note in report.notes:
        console.print(Text(f"• {note}"))


def write_matching(report: MatchingReport, path: str | Path) -> None:
    """Write `matching.json` at once: a reader finds the old file or the whole new one."""
    content = {
        "format": FORMAT,
        "title": report.title,
        "settings": report.settings,
        "thresholds_px": list(report.thresholds),
        "methods": {
            method: [_summary_to_json(summary) for summary in summaries] for method, summaries in report.lines.items()
        },
        "notes": list(report.notes),
    }
    write_json(path, content)


def read_matching(path: str | Path) -> MatchingReport:
    """The report that `write_matching` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a matching.json as evaluate.py writes it")
    again = "run the evaluation again to write it anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
        raise ValueError(f"{path} is not JSON ({error}); {again}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format is {found!r}, expected {FORMAT!r}; {again}")
    try:
        return MatchingReport(
            title=content["title"],
            thresholds=tuple(content["thresholds_px"]),
            lines={
                method: tuple(_summary_from_json(summary) for summary in summaries)
                for method, summaries in content["methods"].items()
            },
            settings=content["settings"],
            notes=tuple(content["notes"]),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no key {error}; {again}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; {again}") from error


def join_matching(reports: Mapping[str, MatchingReport]) -> MatchingReport | None:
    """Reports of several data sets as one, whose conditions are `NAME/all` and `NAME/CONDITION`.

    Args:
        reports: by the data set's name, of the same methods and thresholds; a single one is returned as it is.

    Returns:
        None for no report.
    """
    if len(reports) < 2:
        return next(iter(reports.values()), None)
    first = next(iter(reports.values()))
    lines = {
        method: tuple(
            summary._replace(condition=f"{name}/{summary.condition}")
            for name, report in reports.items()
            for summary in report.lines[method]
        )
        for method in first.lines
    }
    return MatchingReport(
        title="; ".join(report.title for report in reports.values()),
        thresholds=first.thresholds,
        lines=lines,
        settings=first.settings,
    )


def _percents(shares: list[float]) -> list[Text]:
    """Cells, with the largest in bold, and what reads the same as it; none if all read the same."""
    texts = ["–" if math.isnan(share) else f"{100 * share:.1f}" for share in shares]
    known = [share for share in shares if not math.isnan(share)]
    best = f"{100 * max(known):.1f}" if known and len(set(texts)) > 1 else None
    return [Text(text, style="bold" if text == best else "") for text in texts]


def _summary_to_json(summary: MatchingSummary) -> dict:
    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "condition": summary.condition,
        "pairs": summary.pairs,
        "keypoints": known(summary.keypoints),
        "within": [known(share) for share in summary.within],
        "kept": known(summary.kept),
        "kept_within": [known(share) for share in summary.kept_within],
    }


def _summary_from_json(content: dict) -> MatchingSummary:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return MatchingSummary(
        condition=content["condition"],
        pairs=int(content["pairs"]),
        keypoints=number(content["keypoints"]),
        within=tuple(number(share) for share in content["within"]),
        kept=number(content["kept"]),
        kept_within=tuple(number(share) for share in content["kept_within"]),
    )
