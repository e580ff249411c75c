"""Time and memory of the contrastive and Gauss-Newton losses, compared with the distance products alone.

One pair of 512×512 images: five VGG-16 levels, 1024 correspondences, 300 hardest negatives among all cells;
forward and backward down to the feature maps. Every implementation of the paper's mining needs the matrix
products of all descriptors with all cells. They are timed in turn with the loss. The limits for the loss are
twice their time, and 400 MB of memory in addition to its inputs.

    python benchmarks/loss.py [--device cuda] [--threads 1] [--repeats 9] [--json]

On a machine that is busy with other work, use `--threads 1`: the loss consists of many short operations, and
with more threads each operation waits for the slowest thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table

from gnnet.data.batches import PairBatch
from gnnet.losses.contrastive import Contrastive
from gnnet.losses.gauss_newton import GaussNewton
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import LevelPair, PyramidPair
from gnnet.models.pyramid import FeaturePyramid

LEVELS = ((512, 16), (512, 16), (512, 8), (256, 8), (256, 4))  # channels, stride
IMAGE, POINTS, STEP = 512, 1024, 0
RATIO_LIMIT, EXTRA_MB_LIMIT = 2.0, 400.0


def make_inputs(device: str) -> tuple[FeaturePyramid, FeaturePyramid, PairBatch]:
    """Two pyramids of random unit-norm maps in channels_last, and random points, in the second image shifted."""
    generator = torch.Generator().manual_seed(0)
    strides = tuple(stride for _, stride in LEVELS)

    def pyramid() -> FeaturePyramid:
        maps = []
        for channels, stride in LEVELS:
            size = (1, channels, IMAGE // stride, IMAGE // stride)
            features = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=1)
            features = features.to(device, memory_format=torch.channels_last)
            maps.append(features.requires_grad_())
        return FeaturePyramid(tuple(maps), strides)

    xy = 48 + torch.rand(1, POINTS, 2, generator=generator) * (IMAGE - 96)
    ones = torch.ones(1, POINTS, device=device)
    empty = torch.empty(1, 3, 0, 0, dtype=torch.uint8, device=device)
    index = ones[:, 0].long()
    batch = PairBatch(empty, empty, xy.to(device), xy.to(device) + 3.3, ones, ones.bool(), index, 0 * index)
    return pyramid(), pyramid(), batch


def both_directions(pyramid_a: FeaturePyramid, pyramid_b: FeaturePyramid, batch: PairBatch) -> None:
    """The loss as it is computed in training."""
    _forget_gradients(pyramid_a, pyramid_b)
    loss = PairLoss(terms={"dmc": Contrastive(), "gn": GaussNewton(weight=0.5)})
    loss(PyramidPair(pyramid_a, pyramid_b, batch), step=STEP)[0].backward()


def one_direction(pyramid_a: FeaturePyramid, pyramid_b: FeaturePyramid, batch: PairBatch) -> None:
    """The same terms, from a to b only."""
    _forget_gradients(pyramid_a, pyramid_b)
    terms = (Contrastive(), GaussNewton(weight=0.5))
    total = 0.0
    for map_a, map_b, stride in zip(pyramid_a.maps, pyramid_b.maps, pyramid_a.strides, strict=True):
        pair = LevelPair.from_maps(
            map_a, map_b, xy_a=batch.keypoints_a / stride, xy_b=batch.keypoints_b / stride,
            weight=batch.weight, valid=batch.valid,
        )  # fmt: skip
        total = total + sum(term.weight * term(pair, *term.draw(pair), step=STEP)[0] for term in terms) / len(LEVELS)
    total.backward()


def distance_products(pyramid_a: FeaturePyramid, pyramid_b: FeaturePyramid, directions: int) -> None:
    """The matrix products (POINTS, C) by (C, H·W) of all levels in float32, and nothing else."""
    for map_a, map_b in zip(pyramid_a.maps, pyramid_b.maps, strict=True):
        for features in (map_a, map_b)[:directions]:
            columns = features.detach()[0].flatten(1)
            queries = columns[:, :POINTS].T.contiguous()
            torch.mm(queries, columns)


def _forget_gradients(*pyramids: FeaturePyramid) -> None:
    for pyramid in pyramids:
        for features in pyramid.maps:
            features.grad = None


def _seconds(function, *arguments, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*arguments)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(device: str, repeats: int) -> dict[str, float]:
    """Medians in seconds; the runs alternate, so that other work on the machine slows both sides alike."""
    inputs = make_inputs(device)
    runs: dict[str, list[float]] = {"seconds": [], "limit_seconds": [], "seconds_one_direction": [],
                                    "limit_seconds_one_direction": []}  # fmt: skip
    for _ in range(repeats + 1):
        runs["seconds"].append(_seconds(both_directions, *inputs, device=device))
        runs["limit_seconds"].append(_seconds(distance_products, *inputs[:2], 2, device=device))
        runs["seconds_one_direction"].append(_seconds(one_direction, *inputs, device=device))
        runs["limit_seconds_one_direction"].append(_seconds(distance_products, *inputs[:2], 1, device=device))
    figures = {name: statistics.median(values[1:]) for name, values in runs.items()}  # the first run warms up
    figures["ratio"] = figures["seconds"] / figures["limit_seconds"]
    figures["ratio_one_direction"] = figures["seconds_one_direction"] / figures["limit_seconds_one_direction"]
    return figures


def _memory_of_process(connection, device: str) -> None:
    inputs = make_inputs(device)
    small = tuple(torch.randn(64, 64, requires_grad=True) for _ in range(2))
    (small[0] @ small[1]).sum().backward()  # starts threads and loads libraries before the baseline is read
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both_directions(*inputs)
        connection.send((torch.cuda.max_memory_allocated() - before) / 1e6)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
    before = _status_kilobytes("VmHWM")
    both_directions(*inputs)
    connection.send((_status_kilobytes("VmHWM") - before) * 1024 / 1e6)


def _status_kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


def measure_memory(device: str) -> float:
    """Peak memory (MB) of the loss in addition to its inputs, in a first step of a new process; NaN if unknown."""
    if device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        return float("nan")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory_of_process, args=(sender, device))
    process.start()
    sender.close()
    extra = receiver.recv()
    process.join()
    return extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = measure_time(arguments.device, arguments.repeats)
    figures["extra_mb"] = measure_memory(arguments.device)
    if arguments.json:
        print(json.dumps(figures))
        return
    table = Table("figure", "measured", "limit", title="DMC + GN, five VGG levels, 512×512, 1024 points, M = 300")
    for label, end in (("both directions", ""), ("one direction", "_one_direction")):
        table.add_row(f"{label}, forward and backward (s)", f"{figures['seconds' + end]:.3f}", "")
        table.add_row(f"{label}, distance products (s)", f"{figures['limit_seconds' + end]:.3f}", "")
        table.add_row(f"{label}, ratio", f"{figures['ratio' + end]:.2f}", f"{RATIO_LIMIT:.0f}")
    table.add_row("memory in addition to the inputs (MB)", f"{figures['extra_mb']:.0f}", f"{EXTRA_MB_LIMIT:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
