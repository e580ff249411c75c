"""Start of a large dataset: seconds and memory with and without its index.

A dataset in the layout of RobotCar Seasons is made in a temporary folder: images that are links to one
small JPEG, query poses, one model with points for each place, and a .mat file for each pair. Each start runs in
a process of its own: the first reads, checks and writes the index, the second loads it. Memory is counted in
addition to that after the imports (torch and Lightning): resident memory (RSS), and memory that no other process
shares (USS). For a worker, forked after the start, the figures are its USS after it has gone through all pairs
in random order, and the growth of its share of common memory (PSS).

    python benchmarks/index.py [--json] [--pairs 50000] [--images 20000] [--points 100] [--folder KEEP]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

LIMITS = {"second_start_s": 5.0, "second_rss_mb": 500.0, "second_uss_mb": 500.0, "worker_uss_mb": 100.0}
_PLACE = 140  # references of each place, about as many as in RobotCar
_CONDITIONS = ("dawn", "dusk", "night", "night-rain", "overcast-summer", "overcast-winter", "rain", "snow", "sun")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=20_000, help="a third are references")
    parser.add_argument("--points", type=int, default=100, help="3D points that a reference observes")
    parser.add_argument("--folder", type=Path, help="keep the dataset here, for another run; default: a temporary one")
    parser.add_argument("--start", choices=["reader", "datamodule"], help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(measure(arguments.folder, arguments.start)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        begin = time.perf_counter()
        if not (folder / "data").exists():
            write_dataset(folder / "data", arguments.pairs, arguments.images, arguments.points)
        figures = {"writing_the_dataset_s": time.perf_counter() - begin}
        for name, start in (("first", "reader"), ("second", "reader"), ("datamodule", "datamodule")):
            command = [sys.executable, __file__, "--start", start, "--folder", str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures |= {f"{name}_{key}": value for key, value in json.loads(output.splitlines()[-1]).items()}
    figures["worker_uss_mb"] = figures.pop("second_worker_uss_mb")
    figures["worker_pss_growth_mb"] = figures.pop("second_worker_pss_growth_mb")
    for key in [key for key in figures if "_worker_" in key]:
        del figures[key]
    if arguments.json:
        print(json.dumps({key: round(value, 3) for key, value in figures.items()}))
        return
    table = Table("figure", "found", "limit", title=f"start of {arguments.pairs:,} pairs, {arguments.images:,} images")
    for key, value in figures.items():
        limit = LIMITS.get(key)
        style = None if limit is None else ("green" if value <= limit else "red")
        table.add_row(key, f"{value:.4g}", "–" if limit is None else f"{limit:.4g}", style=style)
    Console().print(table)


def measure(folder: Path, start: str) -> dict[str, float]:
    """Seconds and megabytes of one start in this process, and of a worker forked from it."""
    import pytorch_lightning  # noqa: F401  its memory is not the dataset's
    import torch  # noqa: F401

    from gnnet.data.datamodule import CorrespondenceData
    from gnnet.scenes.index import open_scene
    from gnnet.scenes.layouts.robotcar import load_robotcar

    before = memory()
    begin = time.perf_counter()
    if start == "reader":
        scene = open_scene(load_robotcar, folder / "data", index_dir=folder / "index", progress=False)
        kept = scene.split(0.25, 0)
    else:
        data = CorrespondenceData(scene=load_robotcar, root=folder / "data", index_dir=folder / "index", num_workers=0)
        data.setup()
        scene, kept = data.train_pairs.scene, data
    figures = {"start_s": time.perf_counter() - begin}
    after = memory()
    figures |= {"bare_rss_mb": before["rss"]} | {f"{key}_mb": after[key] - before[key] for key in ("rss", "uss")}
    begin = time.perf_counter()
    count = sum(1 for pair in scene.pairs if pair.image_a in scene.images)
    figures["all_pairs_s"] = time.perf_counter() - begin
    if count != len(scene.pairs) or kept is None:
        raise SystemExit("a pair's image is missing")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_touch, args=(scene, sender))
    worker.start()
    figures |= receiver.recv()
    worker.join()
    return figures


def _touch(scene, sender) -> None:
    """Do what a worker does in an epoch: read each pair and both its images."""
    before = memory()
    for index in np.random.default_rng(0).permutation(len(scene.pairs)).tolist():
        pair = scene.pairs[index]
        if scene.images[pair.image_a].path == scene.images[pair.image_b].path:
            raise SystemExit("two images are one")
    after = memory()
    sender.send({"worker_uss_mb": after["uss"], "worker_pss_growth_mb": after["pss"] - before["pss"]})


def memory() -> dict[str, float]:
    """Memory of this process in megabytes: resident (RSS), with its share of common memory (PSS), its own (USS)."""
    content = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {key: int(value.split()[0]) for key, value in content.items()}
    own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {"rss": kilobytes["Rss"] / 1024, "pss": kilobytes["Pss"] / 1024, "uss": own / 1024}


def write_dataset(root: Path, pairs: int, images: int, points: int) -> None:
    """Write the dataset; each reference is paired with queries of its place."""
    references = images // 3
    places = np.array_split(np.arange(references), max(2, references // _PLACE))
    names = [_name("overcast-reference", i) for i in range(references)]
    queries = [_name(_CONDITIONS[i % len(_CONDITIONS)], i) for i in range(images - references)]
    partner = np.arange(len(queries)) * references // len(queries)  # in the order of the drive
    _write_images(root, [*names, *queries])
    (root / "intrinsics").mkdir()
    (root / "intrinsics/rear_intrinsics.txt").write_text("fx 400\nfy 400\ncx 32\ncy 24\n")
    with open(root / "robotcar_v2_train.txt", "w") as file:
        for name, reference in zip(queries, partner.tolist(), strict=True):
            file.write(f"{name} 1 0 0 {reference}.1 0 1 0 0 0 0 1 0 0 0 0 1\n")
    for number, place in enumerate(places):
        model = root / f"3D-models/individual/colmap_reconstructions/{number + 1:03d}_aligned"
        _write_model(model, place, names, points)
    (root / "correspondence").mkdir()
    listed = [(i, i % len(queries), (i // len(queries)) % 3) for i in range(pairs)]
    place_of = np.concatenate([np.full(len(place), number) for number, place in enumerate(places)])
    work = []
    for i, query, step in listed:
        reference = min(int(partner[query]) + step, references - 1)
        reference = reference if place_of[reference] == place_of[partner[query]] else int(partner[query])
        work.append((i, names[reference], queries[query]))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        pool.map(partial(_write_pair, root), work, chunksize=500)


def _name(condition: str, number: int) -> str:
    return f"{condition}/rear/{1417176458000000 + number * 250_000}.jpg"


def _write_images(root: Path, names: list[str]) -> None:
    from PIL import Image

    root.mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(picture).save(root / "picture.jpg")
    for folder in {Path(name).parent for name in names}:
        (root / "images" / folder).mkdir(parents=True)
    for number, name in enumerate(names):
        if number % 20_000 == 0 and number:  # file systems limit the links to one file
            (root / f"picture{number}.jpg").write_bytes((root / "picture.jpg").read_bytes())
        source = root / ("picture.jpg" if number < 20_000 else f"picture{number // 20_000 * 20_000}.jpg")
        os.link(source, root / "images" / name)


def _write_model(folder: Path, place: np.ndarray, names: list[str], points: int) -> None:
    """Write a COLMAP text model of cameras along a line; each sees `points` points, 3/4 of its neighbour's too."""
    folder.mkdir(parents=True)
    step, rng = max(1, points // 4), np.random.default_rng(int(place[0]))
    (folder / "cameras.txt").write_text("2 PINHOLE 64 48 400 400 32 24\n")
    count = step * (len(place) - 1) + points
    tracks: list[list[str]] = [[] for _ in range(count)]
    with open(folder / "images.txt", "w") as file:
        for number, image in enumerate(place.tolist()):
            file.write(f"{number + 1} 1 0 0 0 {-image} 0 0 2 {names[image].replace('.jpg', '.png')}\n")
            xy = rng.uniform(1, 47, (points, 2))
            ids = range(step * number, step * number + points)
            file.write(" ".join(f"{x:.2f} {y:.2f} {i + 1}" for (x, y), i in zip(xy.tolist(), ids, strict=True)) + "\n")
            for position, i in enumerate(ids):
                tracks[i].append(f"{number + 1} {position}")
    with open(folder / "points3D.txt", "w") as file:
        for i, track in enumerate(tracks):
            file.write(f"{i + 1} {place[0] + i / step:.3f} 0 9 128 128 128 0 {' '.join(track)}\n")


def _write_pair(root: Path, work: tuple[int, str, str]) -> None:
    from gnnet.toy.layout import correspondence_path, write_correspondences

    number, reference, query = work
    xy = np.random.default_rng(number).uniform(1, 47, (20, 2))
    condition = query.split("/")[0]
    write_correspondences(correspondence_path(root, condition, number), reference, query, xy, xy, np.ones(20))


if __name__ == "__main__":
    main()
