"""Dense search of 1000 descriptors in a 256×256 map, compared with the matrix product alone: time and memory.

    python benchmarks/matching.py [--json] [--threads N] [--device cuda]

`c128_ratio` and `c2048_ratio` are the time of the search, with the ratio test, divided by that of the product,
at 128 and 2048 channels. `extra_mb` is the peak memory of the search, which does not depend on the map's size:
similarities are held in chunks of as many numbers as suit the device, and the ratio test
adds half of that.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from gnnet.localization.dense_search import best_cells, values_for

LIMIT = 1.3  # times that of the product alone
DESCRIPTORS, SIDE = 1000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    say = (lambda _: None) if arguments.json else print
    device = torch.device(arguments.device)
    results = {}
    for channels in (128, 2048):
        generator = torch.Generator().manual_seed(0)
        descriptors = F.normalize(torch.randn(DESCRIPTORS, channels, generator=generator), dim=1).to(device)
        cells = F.normalize(torch.randn(channels, SIDE * SIDE, generator=generator), dim=0).to(device)
        best_cells(descriptors[:64], cells[:, :1024], ratio=0.9)  # allocates what the libraries need once
        before = _peak_mb(device)
        best_cells(descriptors, cells, ratio=0.9)
        extra = _peak_mb(device) - before
        results["extra_mb"] = max(results.get("extra_mb", 0.0), extra)
        product, search = [], []
        for _ in range(arguments.repeats):  # in turn, so that other work on the machine slows both alike
            product.append(_seconds(lambda d=descriptors, c=cells: d @ c, device))
            search.append(_seconds(lambda d=descriptors, c=cells: best_cells(d, c, ratio=0.9), device))
        results[f"c{channels}_product_s"], results[f"c{channels}_search_s"] = min(product), min(search)
        results[f"c{channels}_ratio"] = min(search) / min(product)
        say(
            f"{channels} channels: product {min(product):.3f} s, search {min(search):.3f} s, "
            f"ratio {min(search) / min(product):.2f} (limit {LIMIT})"
        )
    say(f"memory of the search: {results['extra_mb']:.0f} MB (limit {1.5 * values_for(device) * 4 / 1e6:.0f} MB)")
    if arguments.json:
        print(json.dumps(results))


def _seconds(function, device: torch.device) -> float:
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
