"""How a map grows with its references: compiling, file, memory, opening, and finding the references of a query.

    python benchmarks/scaling.py [--counts 1000 10000 100000] [--retrieval-only] [--json]

References are synthetic: cameras along a line that see 100 points each, 64×48 pixels, raw grey values for features.
So times are what every reference costs besides its network and its real image. They are of the CPU, which other
programs disturb little. Each count runs in a process of its own, as peak memory is a process'. Retrieval is over
descriptors of 256 dimensions, which is what a map keeps at most; with faiss also by the index.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.compile import compile_map
from gnnet.localization.map import Map
from gnnet.localization.retrieval import DescriptorRetrieval, IndexedRetrieval
from gnnet.models.grey import GreyValues
from gnnet.scenes.scene import Scene, SceneImage

POINTS, SIZE, DIMENSIONS, FOUND = 100, (64, 48), 256, 10
LIMITS = {
    "ms to compile a reference": 12.0,
    "kB of the map's file a reference": 8.0,
    "kB of peak memory a reference": 6.0,
    "s to open the map": 2.0,
    "ms to search all": 100.0,
    "s to make the index": 60.0,
    "ms to search by the index": 5.0,
    "% of the best found by the index": 90.0,
}


@dataclass(eq=False)
class Described:
    """What retrieval by descriptors reads of a map."""

    path: Path
    about: dict
    global_descriptors: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--retrieval-only", action="store_true", help="leave out compiling, which takes minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.counts[0], arguments.retrieval_only)))
        return
    results = {}
    for count in arguments.counts:
        command = [sys.executable, __file__, "--one", "--counts", str(count)]
        command += ["--retrieval-only"] * arguments.retrieval_only
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[str(count)] = figures = json.loads(output.splitlines()[-1])
        for what, value in figures.items():
            if not arguments.json:
                print(f"{count:8,} references: {value:8.3f} {what} ({side(what)} {LIMITS[what]:g})", flush=True)
    if arguments.json:
        print(json.dumps(results))


def side(what: str) -> str:
    return "at least" if what.startswith("%") else "at most"


def measure(count: int, retrieval_only: bool) -> dict[str, float]:
    """All figures of one count; those of memory are of this whole process."""
    with tempfile.TemporaryDirectory() as folder:
        figures = {} if retrieval_only else measure_map(Path(folder), count)
        return figures | measure_search(Path(folder), count)


def measure_map(folder: Path, count: int) -> dict[str, float]:
    compile_map(folder / "warm", street(folder, 10), GreyValues(strides=[8, 2]).eval(), progress=False)
    before = peak_bytes()
    scene = street(folder, count)
    seconds = timed(
        lambda: compile_map(folder / "map", scene, GreyValues(strides=[8, 2]).eval(), points=POINTS, progress=False)
    )
    return {
        "ms to compile a reference": 1e3 * seconds / count,
        "kB of the map's file a reference": (folder / "map").stat().st_size / 1e3 / count,
        "kB of peak memory a reference": (peak_bytes() - before) / 1e3 / count,
        "s to open the map": timed(lambda: (opened := Map.open(folder / "map")).rows and opened.poses),
    }


def street(folder: Path, count: int) -> Scene:
    """References along a line, each of which sees `POINTS` points, 3/4 of them its neighbour's too."""
    path, step = folder / "picture.png", POINTS // 4
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), np.uint8)).save(path)
    camera = Camera.from_colmap("PINHOLE", *SIZE, (40, 40, 32, 24), dtype=torch.float64)
    points = np.random.default_rng(1).uniform((0, -4, 8), (1, 4, 12), (step * (count + 3), 3))
    points[:, 0] += np.arange(len(points)) // step
    rotation, images = torch.eye(3, dtype=torch.float64), {}
    for number in range(count):
        pose = Pose(rotation, torch.tensor([-number - 2.0, 0, 0], dtype=torch.float64))
        ids = np.arange(POINTS) + step * number
        images[f"{number:08d}.png"] = SceneImage(
            f"{number:08d}.png", path, "reference", str(number // 100), camera, pose, True, ids
        )
    return Scene("street", images, [], torch.from_numpy(points))


def measure_search(folder: Path, count: int) -> dict[str, float]:
    """Finding the best references of a query among descriptors on disk, read before: all compared, and by an index.

    The descriptors change slowly along a drive, with noise; queries are of places in it, with noise of their own.
    """
    rng, file = np.random.default_rng(0), np.memmap(folder / "x", np.float32, "w+", shape=(count, DIMENSIONS))
    turns, spread = np.sin(np.cumsum(0.3 * rng.standard_normal((count, 32)), 0)), rng.standard_normal((32, DIMENSIONS))

    def described(rows: np.ndarray) -> np.ndarray:
        noisy = turns[rows] @ spread + 0.7 * rng.standard_normal((len(rows), DIMENSIONS))
        return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)

    for start in range(0, count, 4096):
        file[start : start + 4096] = described(np.arange(start, min(start + 4096, count)))
    queries = torch.from_numpy(described(rng.integers(0, count, 22))).float()
    described_map, everything = Described(folder / "x.gnmap", {}, file), torch.ones(count, dtype=torch.bool)

    def search(retrieval: DescriptorRetrieval) -> tuple[float, list[set[int]]]:
        found = [
            retrieval._nearest(query, described_map, FOUND, everything) for query in queries[:2]
        ]  # makes the index
        times = [
            timed(lambda q=q: found.append(retrieval._nearest(q, described_map, FOUND, everything))) for q in queries
        ]
        return 1e3 * sorted(times)[11], [set(rows.tolist()) for rows in found[2:]]

    milliseconds, exact = search(DescriptorRetrieval())
    figures = {"ms to search all": milliseconds}
    if find_spec("faiss"):
        making = timed(lambda: IndexedRetrieval(few=0)._nearest(queries[0], described_map, FOUND, everything))
        milliseconds, found = search(IndexedRetrieval(few=0))
        shares = [len(a & b) / FOUND for a, b in zip(exact, found, strict=True)]
        figures |= {
            "s to make the index": making, "ms to search by the index": milliseconds,
            "% of the best found by the index": 100 * sum(shares) / len(shares),
        }  # fmt: skip
    return figures


def timed(act: Callable[[], object]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
