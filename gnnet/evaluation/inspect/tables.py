"""An `Inspection` as tables for 80 columns, and as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gnnet.evaluation.inspect.inspection import Distribution, ImageGroup, Inspection
from gnnet.evaluation.inspect.pairs import MOST_CORRESPONDENCES
from gnnet.evaluation.tables import Column, Row, Table, json_value, print_table
from gnnet.evaluation.units import Unit, show
from gnnet.files import write_json
from gnnet.models.images import IMAGENET_MEAN, IMAGENET_STD
from gnnet.scenes.problems import kinds_of_problems

FORMAT = "gnnet inspection 2"
_SHOWN_PROBLEMS = 10
_SHOWN_PAIRS = 30  # condition pairs
_BAR = 40  # characters

# The columns stand in the order of the fields of `ImageGroup`, `PairGroup` and `Agreement`, behind the row's name.
_IMAGES = (
    Column("size", "pixels", Unit.TEXT),
    Column("focal", "focal", Unit.TEXT),
    Column("cameras", "cameras", Unit.COUNT),
    Column("images", "images", Unit.COUNT),
    Column("references", "refs.", Unit.COUNT),
    Column("posed", "posed", Unit.COUNT),
    Column("with_depth", "depth", Unit.COUNT),
    Column("with_points", "points", Unit.COUNT),
)
_SHARES = (Column("spread", "spread\n%", Unit.SHARE), Column("overlap", "overlap\n%", Unit.SHARE))
_PAIRS = (
    Column("pairs", "number", Unit.COUNT),
    Column("measured", "read", Unit.COUNT),
    Column("correspondences", "matches", Unit.COUNT),
    *_SHARES,
    Column("error_px", "error\npx", Unit.NUMBER),
)
_DISTRIBUTIONS = (Column("correspondences", "correspondences", Unit.COUNT), *_SHARES)
_AGREEMENT = (
    Column("pairs", "pairs", Unit.COUNT),
    Column("median_px", "median", Unit.NUMBER),
    Column("within_3_px", "within\n3 px %", Unit.SHARE),
)
_COLOURS = tuple(
    Column(f"{figure}_{colour}", f"{figure}\n{colour}", Unit.TEXT)
    for figure in ("mean", "std")
    for colour in ("red", "green", "blue")
)


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
    for table in _tables(inspection):
        print_table(table, console)
        console.print()
    _print_bars(inspection, console)
    if not inspection.agreement:
        posed = any(g.posed for g in inspection.images)
        reason = "no pair of which both images have poses" if posed else "no poses"
        console.print(f"error of the correspondences: not known ({reason})\n")
    if inspection.colours is None:
        console.print("colours: not known (no image could be decoded)\n")
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
        dataset, root, settings: what was read, as given on the command line; they come first in the file.
    """
    content = {"format": FORMAT, "dataset": dataset, "root": root, "settings": settings, **asdict(inspection)}
    write_json(path, json_value(content))


def _tables(inspection: Inspection) -> Iterable[Table]:
    yield _table("images", _IMAGES, map(_image_row, inspection.images))
    if inspection.pairs:
        shown, rest = inspection.pairs[:_SHOWN_PAIRS], inspection.pairs[_SHOWN_PAIRS:]
        rows = [(" ↔ ".join(group.conditions), *astuple(group)[1:]) for group in shown]
        if rest:
            rows.append((f"{len(rest)} more", sum(group.pairs for group in rest), *[""] * 5))
        yield _table("pairs", _PAIRS, rows)
    distributions = (inspection.correspondences, inspection.spread, inspection.overlap)
    if any(values is not None for values in distributions):
        names = ("minimum", "25 %", "median", "75 %", "maximum")
        figures = [(v.minimum, *v.quartiles, v.maximum) if v else (math.nan,) * 5 for v in distributions]
        meaning = (
            "spread: of an 8×8 grid, cells that hold a correspondence. overlap: area within the hull of the "
            "correspondences. Both of the image of the pair where it is less; medians above. "
            f"Depth and fixed cameras give as many correspondences as asked for; here it is {MOST_CORRESPONDENCES:,}."
        )
        yield _table("a pair", _DISTRIBUTIONS, zip(names, *figures, strict=True), meaning)
    if inspection.agreement:
        yield _table("error of the correspondences, pixels", _AGREEMENT, map(astuple, inspection.agreement))
    colours = inspection.colours
    if colours is not None:
        found = (f"{colours.images:,} images", *colours.mean, *colours.std)
        usual = ("ImageNet", *IMAGENET_MEAN, *IMAGENET_STD)
        texts = [(name, *(f"{value:.3f}" for value in values)) for name, *values in (found, usual)]
        yield _table("colours", _COLOURS, texts)


def _table(header: str, columns: tuple[Column, ...], rows: Iterable[tuple], meaning: str = "") -> Table:
    """A table of rows (name, value, …) without title and conditions."""
    made = tuple(Row.of(columns, name, "", *values) for name, *values in rows)
    return Table("", columns, made, meaning=meaning, row_header=header)


def _image_row(group: ImageGroup) -> tuple:
    condition, size, focal, *counts = astuple(group)
    pixels = "unknown" if size == (0, 0) else f"{size[0]}×{size[1]}"
    lengths = "–" if focal is None else "–".join(dict.fromkeys(f"{value:.0f}" for value in focal))
    return condition, pixels, lengths, *(count or math.nan for count in counts)


def _print_bars(inspection: Inspection, console: Console) -> None:
    for name, values, unit in (
        ("correspondences a pair", inspection.correspondences, Unit.COUNT),
        ("overlap % of a pair", inspection.overlap, Unit.SHARE),
    ):
        if values is not None:
            console.print(name)
            for line in bars(values, unit):
                console.print(Text(line), no_wrap=True)
            console.print()


def bars(values: Distribution, unit: Unit) -> list[str]:
    """A histogram as lines of text, one a bin, with the edges in the unit."""
    most = max(values.counts)
    edges = [show(edge, unit) for edge in values.edges]
    width, digits = max(len(e) for e in edges), len(f"{most:,}")
    lines = []
    for low, high, count in zip(edges, edges[1:], values.counts, strict=False):
        eighths = math.ceil(8 * _BAR * count / most)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        lines.append(f"  {low:>{width}} – {high:>{width}}  {count:>{digits},}  {bar}".rstrip())
    return lines


def _print_problems(inspection: Inspection, console: Console) -> None:
    read = f"{inspection.pairs_read:,} pairs and {inspection.images_read:,} images read"
    problems = inspection.problems
    if not problems:
        console.print(f"problems: none ({read})")
        return
    kinds = kinds_of_problems(problems)
    most = max(1, _SHOWN_PROBLEMS // len(kinds))  # of each kind
    shown = [problem for alike in kinds[:_SHOWN_PROBLEMS] for problem in alike[:most]]
    counts = f", of {len(kinds)} kinds ({', '.join(str(len(alike)) for alike in kinds)})" if len(kinds) > 1 else ""
    first = f", the first {len(shown)}" if len(problems) > len(shown) else ""
    console.print(f"problems: {len(problems):,} ({read}){counts}{first}")
    for problem in shown:
        console.print(Text(f"• {problem}"), soft_wrap=True)
