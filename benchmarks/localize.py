"""Seconds a query by stage and peak memory of localization on a compiled map; poses refined a second in batches.

    python benchmarks/localize.py [--json] [--threads N] [--device cuda] [--large]

The map is of rendered streets (a toy town, made in a temporary folder), the network the small U-Net with random
weights: times hardly depend on what it has learned. `--large` takes images of as many pixels as 640×480, ten
references of 1024 points and the network of `experiment=real_small`, for both localizers.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from gnnet.data.images import read_image
from gnnet.evaluation.given import queries_of_scene
from gnnet.evaluation.maps import MapSettings, prepare_localizer
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.initial_pose import HybridPose
from gnnet.localization.localizer import Localizer
from gnnet.localization.refinement import refine_pose, sample_descriptors
from gnnet.models.pyramid import FeaturePyramid
from gnnet.models.unet import UNet
from gnnet.toy.town import load_toy

QUERY_LIMIT = 1.5  # seconds a query with --large, on two cores
POSES_LIMIT = 5000  # refined a second on a GPU, 512 points, 128 channels, 3 levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="images, references and network of a real scene's size")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--batch", type=int, default=None, help="poses refined together (64, on a GPU 1024)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    say = (lambda _: None) if arguments.json else print
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    localizers = {"sparse_to_dense": Localizer()}
    if arguments.large:
        localizers["hybrid"] = Localizer(pose=HybridPose())
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, localizer in localizers.items():
            found = stages(Path(folder), localizer, device, arguments.queries, large=arguments.large)
            found["total"] = sum(found.values())
            limit = f" (at most {QUERY_LIMIT})" if arguments.large else ""
            for stage, seconds in found.items():
                say(f"{name:16s} {stage:12s} {seconds:.3f} s a query{limit if stage == 'total' else ''}")
            results |= {f"{name}_{stage}": seconds for stage, seconds in found.items()}
    batch = arguments.batch or (1024 if device.type == "cuda" else 64)
    results["poses_a_second"] = poses_a_second(device, batch)
    say(f"{results['poses_a_second']:.0f} poses refined a second in batches of {batch} (aim on a GPU {POSES_LIMIT})")
    results["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    say(f"peak memory of the process {results['peak_mb']:.0f} MB")
    if arguments.json:
        print(json.dumps(results))


def stages(
    folder: Path, settings: Localizer, device: torch.device, count: int, *, large: bool, town: dict | None = None
) -> dict[str, float]:
    """Mean seconds a query of each stage; the first query is left out. `town` are settings of the rendered streets."""
    if large:
        network = UNet(widths=[16, 32, 64, 128, 128], channels=[64, 128, 32], strides=[16, 8, 2], pooling="blur")
        streets = {"places": 2, "frames": 10, "query_frames": 4, "conditions": ("overcast-reference", "sun")}
        scene = load_toy(folder / "town", image_size=544, **streets)
    else:
        network = UNet(widths=[24, 48, 96, 128], channels=32, strides=[8, 2], upsampling="bilinear", stem_stride=2)
        scene = load_toy(folder / "town", **(town or {}))
    torch.manual_seed(0)
    localizer = prepare_localizer(settings, network, scene, MapSettings(folder / "maps"), device=device)
    queries = [q for q in queries_of_scene(scene) if q.camera is not None][: count + 1]
    sums: dict[str, float] = {}
    for number, query in enumerate(queries):
        itself = query.name if query.is_reference else None
        found = localizer.localize(read_image(query.path), query.camera, name=query.name, itself=itself)
        if number > 0:
            for stage, value in found.seconds.items():
                sums[stage] = sums.get(stage, 0.0) + value / (len(queries) - 1)
    return sums


def poses_a_second(device: torch.device, batch: int, points: int = 512, channels: int = 128) -> float:
    """Refinements on three levels of a smooth map shared by the batch, started 5 cm and 0.5° off."""
    generator = torch.Generator().manual_seed(0)
    maps = tuple(
        torch.nn.functional.normalize(
            torch.nn.functional.interpolate(
                torch.randn(1, channels, 24, 32, generator=generator), (side * 3 // 4, side), mode="bicubic"
            ),
            dim=1,
        )
        .contiguous(memory_format=torch.channels_last)
        .to(device)
        for side in (80, 160, 320)
    )
    pyramid = FeaturePyramid(maps, (8, 4, 2))
    camera = Camera(torch.tensor([640.0, 480.0]), torch.tensor([500.0, 500.0, 320.0, 240.0, 0, 0, 0, 0]))
    xy = torch.rand(points, 2, generator=generator) * torch.tensor([560.0, 400.0]) + 40
    depth = 5 + 10 * torch.rand(points, 1, generator=generator)
    world = (camera.unproject(xy)[0] * depth).to(device)
    descriptors, valid = sample_descriptors(pyramid, xy[None].to(device))
    starts = Pose.stack([perturb(Pose.identity(), 0.05, 0.5, generator) for _ in range(batch)]).to(device)
    cameras = Camera.stack([camera] * batch).to(device)

    def refine():
        return refine_pose(
            pyramid=pyramid,
            descriptors=tuple(d.expand(batch, -1, -1) for d in descriptors),
            descriptor_valid=tuple(v.expand(batch, -1) for v in valid),
            points=world.expand(batch, -1, -1),
            valid=torch.ones(batch, points, dtype=torch.bool, device=device),
            camera=cameras,
            initial=starts,
        )

    with torch.inference_mode():
        refine()
        best = float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            refined = refine()
            refined.final_cost.sum().item()  # waits for the device
            best = min(best, time.perf_counter() - begin)
    error = refined.cam_from_world.center().norm(dim=-1).median().item()
    if not error < 0.005:
        raise RuntimeError(f"median error {error:.4f} m after refinement, so its speed says nothing")
    return batch / best


if __name__ == "__main__":
    main()
