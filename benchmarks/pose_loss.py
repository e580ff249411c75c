"""What the unrolled pose loss costs against the iterations of refinement: time and memory of loss and gradient.

Two pairs of 256×256 images with maps of 32 channels at strides 8 and 2, 512 points each, the sizes of `unet_small`.
Memory is what autograd keeps for the backward pass. On a CPU the time is CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from gnnet.data.batches import PairBatch, PairGeometry
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.pose_loss import PoseLoss
from gnnet.losses.term import PyramidPair
from gnnet.models.pyramid import FeaturePyramid

BATCH, SIZE, POINTS, CHANNELS, STRIDES = 2, 256, 512, 32, (8, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    table = Table("iterations a level", "loss and gradient [ms]", "kept for backward [MB]")
    for iterations in arguments.iterations:
        milliseconds, megabytes = measure(iterations, arguments.repeats, device)
        table.add_row(str(iterations), f"{milliseconds:.0f}", f"{megabytes:.1f}")
    Console().print(table)


def measure(iterations: int, repeats: int, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a loss with its gradient, and megabytes that autograd keeps in between."""
    pyramid, batch = problem(device)
    pair = PyramidPair(pyramid, pyramid, batch)
    term = PoseLoss(iterations=iterations).to(device)
    times, kept = [], {}
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(repeats):
        kept.clear()
        start = clock()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = term(pair, step=0, generator=torch.Generator(device).manual_seed(0))
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (clock() - start))
    maps = {m.untyped_storage().data_ptr() for m in pyramid.maps}
    return statistics.median(times), sum(n for address, n in kept.items() if address not in maps) / 1e6


def problem(device: torch.device) -> tuple[FeaturePyramid, PairBatch]:
    """Smooth random maps that both images have, and points in front of one camera."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for stride in STRIDES:
        cells = SIZE // stride
        coarse = torch.randn(BATCH, CHANNELS, cells // 4, cells // 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(cells, cells), mode="bicubic")
        smooth = torch.nn.functional.normalize(smooth, dim=1).to(device, memory_format=torch.channels_last)
        maps.append(smooth.requires_grad_())
    camera = Camera.stack([Camera.from_colmap("SIMPLE_PINHOLE", SIZE, SIZE, [200, SIZE / 2, SIZE / 2])] * BATCH)
    xy = 32 + torch.rand(BATCH, POINTS, 2, generator=generator) * (SIZE - 64)
    points = camera.unproject(xy)[0] * (4 + 8 * torch.rand(BATCH, POINTS, 1, generator=generator))
    valid = torch.ones(BATCH, POINTS, dtype=torch.bool, device=device)
    geometry = PairGeometry(points.to(device), valid, camera.to(device), Pose.identity(BATCH, device=device))
    image, index = torch.zeros(BATCH, 3, 1, 1, dtype=torch.uint8), torch.arange(BATCH)
    batch = PairBatch(image, image, xy.to(device), xy.to(device), valid.float(), valid, index, 0 * index, geometry)
    return FeaturePyramid(tuple(maps), STRIDES), batch


if __name__ == "__main__":
    main()
