"""The readers by the name of their layout."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gnnet.scenes.scene import Scene

DATASETS = ("robotcar", "cmu", "sevenscenes", "rgbd", "colmap", "timelapse", "homography", "toy")


def reader_of(dataset: str) -> Callable[..., Scene]:
    """`load_<name>` of `gnnet.scenes.<name>`, imported when it is asked for."""
    return getattr(import_module(f"gnnet.scenes.{dataset}"), f"load_{dataset}")
