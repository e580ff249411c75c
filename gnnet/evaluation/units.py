"""Figures as they are printed: counts, shares, lengths in the unit that suits them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

Value = str | int | float


class Unit(StrEnum):
    """What a column holds, and so how it is printed."""

    COUNT = "count"  # a whole number
    NUMBER = "number"  # three digits
    METRES = "metres"  # three digits, in the unit that suits the smallest of the column
    SHARE = "share"  # 0 to 1, printed as percent
    TEXT = "text"  # as it is


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
    unit, factor = length_unit([metres])
    return show(metres, Unit.METRES, factor) + (f" {unit}" if math.isfinite(metres) else "")


def length_unit(metres: Iterable[float]) -> tuple[str, float]:
    """The unit that suits the smallest positive length, and how many of it are a metre."""
    smallest = min((m for m in metres if math.isfinite(m) and m > 0), default=1.0)
    if smallest < 0.01:
        return "mm", 1000.0
    return ("cm", 100.0) if smallest < 1 else ("m", 1.0)
