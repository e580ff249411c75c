"""Peak memory of a training step against the size of the images and the number of correspondences.

    python benchmarks/memory.py [--json] [--models unet_small unet] [--loss gn] [--device cpu]

A step is augmentation, forward, loss, backward and optimizer on one pair of random images with random correspondences.
Counted is what it takes above network and batch, gradients and the optimizer's state included. On a CPU each step runs
in a process of its own, since the peak of a process never falls; on a GPU the allocator's peak is set back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
from pathlib import Path

import torch
from hydra.utils import instantiate
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training_step import compose_config
from gnnet.data.batches import PairBatch
from gnnet.losses.term import PyramidPair
from gnnet.training.module import FeatureLearning

# Side of the images in pixels and number of correspondences: MB of unet_small with loss=gn on a CPU.
LIMITS = {
    (128, 1024): 110, (256, 1024): 190, (384, 1024): 350, (512, 1024): 580, (256, 256): 180, (256, 4096): 290,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--models", nargs="+", default=["unet_small"])
    parser.add_argument("--loss", default="gn")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    table = Table("network", "side [px]", "correspondences", "peak [MB]", "limit [MB]")
    figures = {}
    for model in arguments.models:
        for (side, count), limit in LIMITS.items():
            with multiprocessing.get_context("fork").Pool(1) as alone:
                found = alone.apply(step, (model, arguments.loss, side, count, arguments.device)) / 1e6
            held = (model, arguments.loss, arguments.device) == ("unet_small", "gn", "cpu")
            table.add_row(model, str(side), str(count), f"{found:.0f}", f"at most {limit}" if held else "")
            figures[f"{model}_{side}px_{count}_MB"] = found
    if arguments.json:
        print(json.dumps(figures))
        return
    Console().print(table)


def step(model: str, loss: str, side: int, count: int, device: str) -> float:
    """Bytes that a step takes at its peak."""
    cfg = compose_config([f"model={model}", f"loss={loss}"])
    parts = {name: instantiate(cfg[name], _convert_="all") for name in ("loss", "optimizer", "photometric")}
    module = FeatureLearning(network=instantiate(cfg.model, _convert_="all"), **parts).to(device)
    optimizer = module.make_optimizer(module.parameters())
    images, xy = torch.randint(0, 256, (2, 1, 3, side, side), dtype=torch.uint8), side * torch.rand(2, 1, count, 2)
    weight, index = torch.ones(1, count), torch.zeros(1, dtype=torch.long)
    batch = PairBatch(*images, *xy, weight, weight > 0, index, index)
    batch = PairBatch(*(None if part is None else part.to(device) for part in batch))
    before = peak(device)
    generator = torch.Generator(device).manual_seed(0)
    pair = PyramidPair(*module.pair_features(batch, generator), batch)
    value, _ = module.loss(pair, step=1000, generator=generator)
    value.backward()
    optimizer.step()
    return peak(device) - before


def peak(device: str) -> int:
    if device == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


if __name__ == "__main__":
    main()
