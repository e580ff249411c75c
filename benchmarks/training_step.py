"""What a training step costs beyond the network: data, augmentation, loss and optimizer.

A whole step (next batch of the loader, forward, loss, backward, optimizer) is compared with the forward and
backward pass of the network alone on images of the same size. Both are timed in turns, as other work on the machine
slows both alike, and the overhead is the median over such pairs. On a CPU, times are those of this process, so that
neither the loader's workers nor other programs count. `unet_small` has the settings of the toy run, `vgg16` the
paper's DMC + GN on one pair of 512×512 images with 1024 correspondences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning_fabric.utilities.apply_func import move_data_to_device
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from gnnet.losses.term import PyramidPair
from gnnet.toy.town import TownSettings, ensure_toy_town
from gnnet.training.module import FeatureLearning

LIMITS = {"unet_small": 0.20, "vgg16": 0.08}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of unet_small; vgg16 does a quarter")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        town = ensure_toy_town(Path(folder) / "toy", TownSettings(places=2), progress=False)
        settings = TownSettings(places=2, frames=4, query_frames=2, image_size=512)
        large = ensure_toy_town(Path(folder) / "large", settings, progress=False)
        rows = {
            "unet_small": measure([], town, arguments.steps, device),
            "vgg16": measure(
                [
                    "model=vgg16", "loss=gn", "dataset.batch_size=1", "dataset.correspondences=1024",
                    "dataset.crop=null", "candidates=all",
                ],
                large, max(2, arguments.steps // 4), device,
            ),
        }  # fmt: skip
    figures = {}
    for name, (whole, alone, overhead) in rows.items():
        figures |= {f"{name}_overhead": overhead, f"{name}_step_s": whole, f"{name}_network_s": alone}
    if arguments.json:
        print(json.dumps(figures))
        return
    table = Table("network", "whole step [s]", "network alone [s]", "overhead [%]", "limit [%]")
    for name, (whole, alone, overhead) in rows.items():
        table.add_row(name, f"{whole:.3f}", f"{alone:.3f}", f"{100 * overhead:.1f}", f"{100 * LIMITS[name]:.0f}")
    Console().print(table)


def measure(overrides: list[str], root: Path, steps: int, device: torch.device) -> list[float]:
    """Medians of the seconds of a whole step, of those of the network alone, and of the overhead, a share."""
    # The settings of the toy run. The town is rendered already, so it is read like RobotCar Seasons.
    reader = "dataset.scene._target_=gnnet.scenes.layouts.robotcar.load_robotcar"
    cfg = compose_config([*overrides, reader, f"dataset.root={root}"])
    data = instantiate(cfg.dataset, _convert_="all")
    data.setup()
    data.trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    module = FeatureLearning(
        network=instantiate(cfg.model, _convert_="all"),
        loss=instantiate(cfg.loss, _convert_="all"),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        photometric=instantiate(cfg.photometric, _convert_="all"),
    ).to(device)
    optimizer = module.make_optimizer(module.parameters())
    batches = endless(data)
    images = torch.cat(next(batches)[:2]).to(device)
    gradients = [torch.randn_like(m) for m in module.network(images).maps]

    def whole_step() -> None:
        batch = move_data_to_device(next(batches), device)
        generator = torch.Generator(device).manual_seed(0)
        pair = PyramidPair(*module.pair_features(batch, generator), batch)
        loss, _ = module.loss(pair, step=1000, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def network_alone() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(module.network(images).maps, gradients)

    times = [(seconds(whole_step, device), seconds(network_alone, device)) for _ in range(steps + 2)][2:]
    rows = [(whole, alone, whole / alone - 1) for whole, alone in times]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def compose_config(overrides: list[str]):
    """Compose the training configuration as train.py does."""
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        return compose("train", overrides=[*overrides, "paths.output_dir=unused"])


def endless(data):
    """Yield batches, epoch after epoch."""
    loader = data.train_dataloader()
    while True:
        yield from chain.from_iterable(loader)


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call: CPU time of this process, or wall time with the work on the device."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


if __name__ == "__main__":
    main()
