"""An `Inspection` as tables for 80 columns, and as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gnnet.evaluation.inspect.inspection import Distribution, ImageGroup, Inspection
from gnnet.evaluation.inspect.pairs import MOST_CORRESPONDENCES
from gnnet.files import write_json
from gnnet.models.images import IMAGENET_DEVIATION, IMAGENET_MEAN

FORMAT = "gnnet inspection 1"
_SHOWN_PROBLEMS = 10
_SHOWN_PAIRS = 30  # condition pairs
_BAR = 40  # characters


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Print everything; the last line is the verdict, whole on one line."""
    console = console or Console(highlight=False)
    counts = {
        "images": sum(g.images for g in inspection.images),
        "places": inspection.places,
        "pairs": sum(g.pairs for g in inspection.pairs),
        "3D points": inspection.points,
    }
    title = f"{inspection.scene}   " + "   ".join(f"{name}: {count:,}" for name, count in counts.items())
    console.print(Text(title, style="bold"))
    console.print()
    console.print(_images_table(inspection))
    if inspection.pairs:
        console.print()
        console.print(_pairs_table(inspection))
        console.print()
        _print_distributions(inspection, console)
    console.print()
    _print_agreement(inspection, console)
    console.print()
    _print_colours(inspection, console)
    console.print()
    _print_problems(inspection, console)
    console.print()
    for question, answer in (
        ("localization can be validated", inspection.localization),
        ("can be split by place", inspection.split),
        ("can be trained on", inspection.training),
    ):
        line = Text(f"{question}: ")
        line.append("yes" if answer.yes else "no", style="bold green" if answer.yes else "bold red")
        line.append(f", because {answer.reason}")
        console.print(line, soft_wrap=True)


def write_inspection(inspection: Inspection, path: str | Path, *, dataset: str, root: str, settings: dict) -> None:
    """Write strict JSON: the fields of `Inspection`; null is not known, the string "inf" is infinite.

    Args:
        path: of the file; its folder is made.
        dataset, root, settings: what was read, as given on the command line; set first in the file.
    """
    content = {"format": FORMAT, "dataset": dataset, "root": root, "settings": settings, **asdict(inspection)}
    write_json(path, _plain(content))


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _table(name: str, *columns: str, between: int = 2) -> Table:
    """A first column of words, others of numbers, with so many spaces between (the box has one)."""
    table = Table(box=SIMPLE_HEAD, padding=(0, between - 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(name, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _images_table(inspection: Inspection) -> Table:
    columns = ("pixels", "focal", "cameras", "images", "refs.", "posed", "depth", "points")
    table = _table("images", *columns, between=1)
    for g in inspection.images:
        size = "unknown" if g.size == (0, 0) else f"{g.size[0]}×{g.size[1]}"
        numbers = (g.cameras, g.images, g.references, g.posed, g.with_depth, g.with_points)
        table.add_row(g.condition, size, _focal(g), *(f"{n:,}" if n else "–" for n in numbers))
    return table


def _focal(group: ImageGroup) -> str:
    if group.focal is None:
        return "–"
    low, high = (f"{value:.0f}" for value in group.focal)
    return low if low == high else f"{low}–{high}"


def _pairs_table(inspection: Inspection) -> Table:
    table = _table("pairs", "number", "read", "matches", "spread\n%", "overlap\n%", "error\npx", between=1)
    for g in inspection.pairs[:_SHOWN_PAIRS]:
        shares = (_percent(g.spread), _percent(g.overlap), _number(g.error_px))
        table.add_row(" ↔ ".join(g.conditions), f"{g.pairs:,}", f"{g.measured:,}", _count(g.correspondences), *shares)
    rest = inspection.pairs[_SHOWN_PAIRS:]
    if rest:
        table.add_row(f"{len(rest)} more", f"{sum(g.pairs for g in rest):,}", *[""] * 5)
    return table


def _print_distributions(inspection: Inspection, console: Console) -> None:
    table = _table("a pair", "minimum", "25 %", "median", "75 %", "maximum")
    for name, values, show in (
        ("correspondences", inspection.correspondences, _count),
        ("spread %", inspection.spread, _percent),
        ("overlap %", inspection.overlap, _percent),
    ):
        if values is not None:
            table.add_row(name, *(show(v) for v in (values.minimum, *values.quartiles, values.maximum)))
    console.print(table)
    meaning = (
        "spread: of an 8×8 grid, cells that hold a correspondence. overlap: area within the hull of the "
        "correspondences. Both of the image of the pair where it is less; medians above. "
        f"Depth and still cameras give as many correspondences as asked for; here it is {MOST_CORRESPONDENCES:,}."
    )
    console.print(Text(meaning, style="dim"))
    for name, values, show in (
        ("correspondences a pair", inspection.correspondences, _count),
        ("overlap % of a pair", inspection.overlap, _percent),
    ):
        if values is not None:
            console.print()
            console.print(name)
            for line in bars(values, show):
                console.print(Text(line), no_wrap=True)


def bars(values: Distribution, show=str) -> list[str]:
    """A histogram as lines of text, one a bin."""
    most = max(values.counts)
    edges = [show(edge) for edge in values.edges]
    width, digits = max(len(e) for e in edges), len(f"{most:,}")
    lines = []
    for low, high, count in zip(edges, edges[1:], values.counts, strict=False):
        eighths = math.ceil(8 * _BAR * count / most)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        lines.append(f"  {low:>{width}} – {high:>{width}}  {count:>{digits},}  {bar}".rstrip())
    return lines


def _print_agreement(inspection: Inspection, console: Console) -> None:
    if not inspection.agreement:
        posed = any(g.posed for g in inspection.images)
        reason = "no pair of which both images have poses" if posed else "no poses"
        console.print(f"error of the correspondences: not known ({reason})")
        return
    table = _table("error of the correspondences, pixels", "pairs", "median", "within\n3 px %")
    for errors in inspection.agreement:
        table.add_row(errors.how, f"{errors.pairs:,}", _number(errors.median_px), _percent(errors.within_3_px))
    console.print(table)


def _print_colours(inspection: Inspection, console: Console) -> None:
    colours = inspection.colours
    if colours is None:
        console.print("colours: not known (no image could be decoded)")
        return
    table = _table("red, green, blue", "mean", "", "", "deviation", "", "")
    table.add_row(f"{colours.images:,} images", *_three(colours.mean), *_three(colours.deviation))
    table.add_row("ImageNet", *_three(IMAGENET_MEAN), *_three(IMAGENET_DEVIATION))
    console.print(table)


def _three(values: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _print_problems(inspection: Inspection, console: Console) -> None:
    read = f"{inspection.pairs_read:,} pairs and {inspection.images_read:,} images read"
    problems = inspection.problems
    if not problems:
        console.print(f"problems: none ({read})")
        return
    first = f", the first {_SHOWN_PROBLEMS}" if len(problems) > _SHOWN_PROBLEMS else ""
    console.print(f"problems: {len(problems):,} ({read}){first}")
    for problem in problems[:_SHOWN_PROBLEMS]:
        console.print(Text(f"• {problem}"), soft_wrap=True)


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def _count(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f}"
