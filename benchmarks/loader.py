"""How fast training pairs are loaded, compared with decoding their images alone, by number of workers.

The loader of each dataset (reading, correspondences, cropping, collating) is compared with a loader that only
decodes the JPEGs of the same pairs, with the same workers. Points are not triangulated, which
only the pose loss needs. The limit is at least 80 % of its speed.
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
from gnnet.data.images import read_image
from gnnet.data.pairs import PairDataset
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.layouts.rgbd import load_rgbd
from gnnet.scenes.layouts.sevenscenes import load_sevenscenes
from gnnet.scenes.layouts.timelapse import load_timelapse
from gnnet.scenes.scene import Scene
from gnnet.toy.town import load_toy

LIMIT = 0.8
CROP, POINTS, BATCH = 256, 256, 4


class Decoding(Dataset):
    """Decodes the images of a pair, and does nothing else."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def __getitem__(self, key: tuple[int, int]) -> int:
        pair = self.scene.pairs[key[1]]
        return sum(read_image(self.scene.images[name].path).shape[-1] for name in (pair.image_a, pair.image_b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=200, help="timed of each dataset")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, scene, settings in datasets(Path(folder)):
            pairs = PairDataset(scene, correspondences=POINTS, crop=CROP, seed=0, geometry=False, **settings)
            for workers in arguments.workers:
                # In turns, because the speed of the machine drifts; the first round fills caches.
                rounds = [
                    (rate(pairs, arguments.pairs, workers, collate),
                     rate(Decoding(scene), arguments.pairs, workers, list))
                    for _ in range(3)
                ][1:]  # fmt: skip
                whole, decoding = (max(column) for column in zip(*rounds, strict=True))
                rows.append((name, workers, whole, decoding))
    if arguments.json:
        keys = ("pairs_s", "decoding_s", "share")
        print(json.dumps({
            f"{name}_w{workers}_{key}": value
            for name, workers, whole, decoding in rows
            for key, value in zip(keys, (whole, decoding, whole / decoding), strict=True)
        }))  # fmt: skip
        return
    table = Table("dataset", "workers", "pairs/s", "decoding alone [pairs/s]", "share [%]", "limit [%]")
    for name, workers, whole, decoding in rows:
        share = f"{100 * whole / decoding:.0f}"
        table.add_row(name, str(workers), f"{whole:.1f}", f"{decoding:.1f}", share, f"at least {100 * LIMIT:.0f}")
    Console().print(table)


def datasets(folder: Path) -> Iterator[tuple[str, Scene, dict]]:
    """Yield the name of each dataset, its scene, and the settings of its pairs."""
    if "GNNET_DATA" not in os.environ:
        scene = load_toy(folder / "toy", places=2, frames=4, query_frames=2, image_size=1024, progress=False)
        yield "toy 1024 px, .mat", scene, {"largest_side": None}
        return
    data = Path(os.environ["GNNET_DATA"])
    yield "timelapse", load_timelapse(data / "timelapse", progress=False), {"largest_side": None, "warp": 0.5}
    strecha = load_colmap(data / "strecha" / "herz-jesus-p25", progress=False)
    yield "colmap", strecha, {"largest_side": None}
    yield "colmap, warped", strecha, {"largest_side": None, "warp": 0.5}
    yield "rgbd", load_rgbd(data / "hololens", progress=False), {"largest_side": None}
    yield "sevenscenes", load_sevenscenes(data / "7scenes" / "redkitchen", progress=False), {"largest_side": None}


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
