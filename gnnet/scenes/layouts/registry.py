"""Readers of datasets, by the name of their layout."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from gnnet.scenes.scene import Scene

DATASETS = ("robotcar", "cmu", "sevenscenes", "rgbd", "colmap", "timelapse", "homography", "toy")


def reader_of(dataset: str) -> Callable[..., Scene]:
    """The reader of a layout, by one of the names in `DATASETS`; its module is imported when it is asked for."""
    module = "gnnet.toy.town" if dataset == "toy" else f"gnnet.scenes.layouts.{dataset}"
    return getattr(import_module(module), f"load_{dataset}")
