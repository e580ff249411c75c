"""Some of many, spread evenly."""

from __future__ import annotations

import numpy as np


def evenly(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of the rows 0 … count − 1, in order and evenly spread, first and last among them.

    Args:
        count: number of rows.
        limit: None takes all; 1 takes the first.

    Returns:
        (min(count, limit),) int64.

    Raises:
        ValueError: if a number is negative.
    """
    if count < 0 or (limit is not None and limit < 0):
        raise ValueError(f"count {count}, limit {limit}; expected 0 or more")
    if limit is None or count <= limit:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(np.int64)
