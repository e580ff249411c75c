"""Time of the photometric augmentation.

8 images of 256×256, as in one training step of 4 pairs on the CPU. A figure is milliseconds per batch: the
quickest of some repeats, averaged over seeds, because the changes to each image are random. Besides the presets,
each single stage is timed, applied to every image, and all stages together.

    python benchmarks/augmentation.py [--json] [--device cuda] [--threads 2] [--batch 8] [--size 256]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gnnet.data.photometric import Photometric

CASES = {
    "mild_ms": Photometric.of_strength(0.3),
    "strong_ms": Photometric.of_strength(1.0),
    "conditions_ms": Photometric.conditions(),
    "tone_ms": Photometric(exposure=0.4, gamma=0.5, contrast=0.3),
    "colour_ms": Photometric(colour=0.15),
    "noise_ms": Photometric(noise=0.03),
    "shade_ms": Photometric(shade=1),
    "night_ms": Photometric(night=1),
    "blur_ms": Photometric(blur=1),
    "jpeg_ms": Photometric(jpeg=1),
    "grey_ms": Photometric(grey=1),
    "everything_ms": replace(Photometric.conditions(), shade=1, night=1, blur=1, jpeg=1, grey=1),
}
LIMITS = {"mild_ms": 25.0, "strong_ms": 60.0, "conditions_ms": 60.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(arguments.device)
    figures = {
        name: measure(photometric, images, seeds=arguments.seeds, repeats=arguments.repeats)
        for name, photometric in CASES.items()
    }
    if arguments.json:
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
        return
    title = f"augmentation of {arguments.batch} images {arguments.size}×{arguments.size}, {arguments.device}"
    table = Table("figure", "found", "limit", title=title)
    for name, value in figures.items():
        limit = LIMITS.get(name)
        style = None if limit is None else ("green" if value <= limit else "red")
        table.add_row(name, f"{value:.3g}", "–" if limit is None else f"{limit:.3g}", style=style)
    Console().print(table)


def measure(photometric: Photometric, images: Tensor, *, seeds: int, repeats: int) -> float:
    """Milliseconds per batch."""
    _seconds(photometric, images, 0)  # the warm-up
    return 1e3 * mean(min(_seconds(photometric, images, seed) for _ in range(repeats)) for seed in range(seeds))


def _seconds(photometric: Photometric, images: Tensor, seed: int) -> float:
    generator = torch.Generator(images.device).manual_seed(seed)
    if images.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    photometric(images, generator)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
