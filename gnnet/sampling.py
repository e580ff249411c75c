"""Some of many, spread evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np


def evenly(count: int, limit: int | None, generator: np.random.Generator | None = None) -> np.ndarray:
    """At most `limit` of the rows 0 … count − 1, in order and evenly spread.

    Args:
        count: number of rows.
        limit: None takes all.
        generator: draws one row from each of `limit` equal stretches. None takes rows at equal steps, the first and
            the last among them; of a list that repeats itself, such as pairs by rank, that can be one kind only.

    Returns:
        (min(count, limit),) int64.

    Raises:
        ValueError: if a number is negative.
    """
    if count < 0 or (limit is not None and limit < 0):
        raise ValueError(f"count {count}, limit {limit}; expected 0 or more")
    if limit is None or count <= limit:
        return np.arange(count)
    if generator is None:
        return np.linspace(0, count - 1, limit).round().astype(np.int64)
    edges = np.arange(limit + 1) * count // max(1, limit)
    return generator.integers(edges[:-1], edges[1:])


def turns(keys: Iterable[Hashable]) -> list[int]:
    """How many equal keys come before each key: sorted by this number, things of all kinds come in turn."""
    seen: Counter[Hashable] = Counter()
    found = []
    for key in keys:
        found.append(seen[key])
        seen[key] += 1
    return found
