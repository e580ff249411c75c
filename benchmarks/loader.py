"""How fast training pairs are loaded, compared with decoding their files alone, by number of workers.

The loader of each dataset (reading, correspondences, cropping, collating) is compared with two that only decode files
of the same pairs, with the same workers: the images, and the images and depth maps. Without depth maps these are one.
Points are not triangulated, which only the pose loss needs. The limit holds for both shares: at least 80 % where
nothing but decoding and cropping is done, 60 % elsewhere.
Without GNNET_DATA (a folder with timelapse/, strecha/, hololens/, 7scenes/), a toy town of 1024-pixel images is
rendered and timed.

    python benchmarks/loader.py [--json] [--workers 0 1 2] [--pairs 200]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from gnnet.data.batches import collate
from gnnet.data.depth import read_depth_view
from gnnet.data.images import read_image
from gnnet.data.pairs import PairDataset
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.layouts.rgbd import load_rgbd
from gnnet.scenes.layouts.sevenscenes import load_sevenscenes
from gnnet.scenes.layouts.timelapse import load_timelapse
from gnnet.scenes.scene import Scene
from gnnet.toy.town import load_toy

LIMIT, LIMIT_OF_CROPPING = 60, 80
CROP, POINTS, BATCH = 256, 256, 4


class Decoding(Dataset):
    """Decodes the images of a pair, and their depth maps if asked to, and does nothing else."""

    def __init__(self, scene: Scene, *, depth: bool = False) -> None:
        self.scene, self.depth = scene, depth

    def __getitem__(self, key: tuple[int, int]) -> int:
        pair, decoded = self.scene.pairs[key[1]], 0
        for image in (self.scene.images[name] for name in (pair.image_a, pair.image_b)):
            decoded += read_image(image.path).numel()
            if self.depth and image.depth is not None:
                decoded += read_depth_view(image).units.size
        return decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=200, help="timed of each dataset")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, scene, settings, limit in datasets(Path(folder)):
            pairs = PairDataset(scene, correspondences=POINTS, crop=CROP, seed=0, geometry=False, **settings)
            for workers in arguments.workers:
                # In turns, because the speed of the machine drifts; the first round fills caches.
                loaders = [(pairs, collate), (Decoding(scene), list), (Decoding(scene, depth=True), list)]
                rounds = [
                    [rate(data, arguments.pairs, workers, joined) for data, joined in loaders] for _ in range(3)
                ][1:]
                rows.append((name, workers, limit, *(max(column) for column in zip(*rounds, strict=True))))
    if arguments.json:
        keys = ("pairs_s", "images_s", "images_and_depth_s", "share_of_images", "share_of_both")
        print(json.dumps({
            f"{name}_w{workers}_{key}": value
            for name, workers, _, whole, images, both in rows
            for key, value in zip(keys, (whole, images, both, whole / images, whole / both), strict=True)
        }))  # fmt: skip
        return
    rates = "pairs/s", "images alone [pairs/s]", "images and depth [pairs/s]"
    table = Table("dataset", "workers", *rates, "of images [%]", "of both [%]", "limit [%]")
    for name, workers, limit, whole, *decoding in rows:
        shares = (f"{100 * whole / each:.0f}" for each in decoding)
        numbers = (f"{each:.1f}" for each in (whole, *decoding))
        table.add_row(name, str(workers), *numbers, *shares, f"at least {limit}")
    Console().print(table)


def datasets(folder: Path) -> Iterator[tuple[str, Scene, dict, int]]:
    """Yield the name of each dataset, its scene, the settings of its pairs, and its limit in %."""
    whole = {"largest_side": None}
    if "GNNET_DATA" not in os.environ:
        scene = load_toy(folder / "toy", places=2, frames=4, query_frames=2, image_size=1024, progress=False)
        yield "toy 1024 px, .mat", scene, whole, LIMIT_OF_CROPPING
        return
    data = Path(os.environ["GNNET_DATA"])
    yield "timelapse", load_timelapse(data / "timelapse", progress=False), {**whole, "warp": 0.5}, LIMIT
    strecha = load_colmap(data / "strecha" / "herz-jesus-p25", progress=False)
    yield "colmap", strecha, whole, LIMIT_OF_CROPPING
    yield "colmap, warped", strecha, {**whole, "warp": 0.5}, LIMIT
    yield "rgbd", load_rgbd(data / "hololens", progress=False), whole, LIMIT
    yield "sevenscenes", load_sevenscenes(data / "7scenes" / "redkitchen", progress=False), whole, LIMIT


def rate(dataset: Dataset, count: int, workers: int, collate) -> float:
    """Pairs per second of a running loader; the start of its workers is not timed."""
    length = len(dataset.scene.pairs)
    warm_up = 2 * BATCH * max(1, workers)
    order = [(0, (7919 * i) % length) for i in range(count + warm_up)]
    batches = iter(DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=workers, collate_fn=collate))
    for _ in range(warm_up // BATCH):
        next(batches)
    start, done = time.perf_counter(), 0
    for _ in batches:
        done += BATCH
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
