"""Files that are written at once: a reader finds the old file or the whole new one."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_at_once(path: str | Path, content: bytes) -> Path:
    """Write a file, whose folder is made; what stood there is replaced only when all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: dict) -> Path:
    """`write_at_once` of strict JSON.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not know.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_at_once(path, text.encode("utf-8"))
