"""Readers of datasets, by the name of their layout."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from gnnet.scenes.scene import Scene

# Where each reader stands; imported when it is asked for.
_READERS = {
    "robotcar": "gnnet.scenes.layouts.robotcar.load_robotcar",
    "cmu": "gnnet.scenes.layouts.cmu.load_cmu",
    "sevenscenes": "gnnet.scenes.layouts.sevenscenes.load_sevenscenes",
    "rgbd": "gnnet.scenes.layouts.rgbd.load_rgbd",
    "colmap": "gnnet.scenes.layouts.colmap.load_colmap",
    "timelapse": "gnnet.scenes.layouts.timelapse.load_timelapse",
    "homography": "gnnet.scenes.layouts.homography.load_homography",
    "toy": "gnnet.toy.town.load_toy",
}
DATASETS = tuple(_READERS)


def reader_of(dataset: str) -> Callable[..., Scene]:
    """The reader of a layout, by one of the names in `DATASETS`."""
    module, _, name = _READERS[dataset].rpartition(".")
    return getattr(import_module(module), name)
