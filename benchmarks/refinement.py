"""Time and accuracy of feature-metric pose refinement.

600 points on a plane at 10 m, one map of 256×256 cells (stride 4, f = 400 px, image 1024×1024), initial poses
0.09 m and 0.27° off. The map shows a smooth random texture on the plane. Descriptors are sampled from the
query's own map, so that the true pose is known exactly. A time is that of one query until convergence: the mean
over random initial poses, and the smallest of some repeats.

    python benchmarks/refinement.py [--json] [--device cuda] [--channels 128 2048] [--starts 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb, pose_errors
from gnnet.localization.refinement import Refinement, refine_pose, sample_descriptors
from gnnet.models.pyramid import FeaturePyramid

DEPTH, STRIDE, CELLS, POINTS = 10.0, 4, 256, 600
LIMITS = {
    "c128_b1_ms": 30.0,
    "c128_b16_ms": None,  # 1.25 times that of one query
    "c2048_b1_ms": 400.0,
    "position_error_mm": 1.0,
    "rotation_error_deg": 0.005,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--starts", type=int, default=8, help="random starts a map")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--median", action="store_true", help="time by the median of the repeats, not the quickest")
    arguments = parser.parse_args()

    figures: dict[str, float] = {}
    worst_position = worst_rotation = 0.0
    for channels in arguments.channels:
        for batch in (1, 16) if channels <= 256 else (1,):
            milliseconds, position, rotation = measure(
                channels=channels, batch=batch, starts=arguments.starts,
                repeats=arguments.repeats, device=arguments.device, over=median if arguments.median else min,
            )  # fmt: skip
            figures[f"c{channels}_b{batch}_ms"] = milliseconds
            worst_position, worst_rotation = max(worst_position, position), max(worst_rotation, rotation)
    figures |= {"position_error_mm": worst_position * 1e3, "rotation_error_deg": worst_rotation}
    if arguments.json:
        print(json.dumps({key: round(value, 5) for key, value in figures.items()}))
        return
    limits = LIMITS | {"c128_b16_ms": 1.25 * figures.get("c128_b1_ms", float("nan"))}
    table = Table("figure", "found", "limit", title=f"pose refinement, {POINTS} points, {arguments.device}")
    for key, value in figures.items():
        limit = limits.get(key)
        style = None if limit is None else ("green" if value <= limit else "red")
        table.add_row(key, f"{value:.4g}", "–" if limit is None else f"{limit:.4g}", style=style)
    Console().print(table)


def measure(*, channels: int, batch: int, starts: int, repeats: int, device: str, over) -> tuple[float, float, float]:
    """Milliseconds per query, largest position error in metres, and largest rotation error in degrees."""
    generator = torch.Generator().manual_seed(channels)
    camera, truth, points, features = scene(channels=channels, batch=batch, generator=generator)
    camera, truth, points, features = camera.to(device), truth.to(device), points.to(device), features.to(device)
    pyramid = FeaturePyramid((features,), (STRIDE,))
    keypoints, _ = camera.project(truth.transform(points))
    descriptors, descriptor_valid = sample_descriptors(pyramid, keypoints)
    initial = [perturb(truth, 0.09, 0.27, generator) for _ in range(starts)]

    def refine(start: Pose) -> Refinement:
        return refine_pose(
            pyramid=pyramid, descriptors=descriptors, descriptor_valid=descriptor_valid, points=points,
            valid=torch.ones_like(descriptor_valid[0]), camera=camera, initial=start,
        )  # fmt: skip

    with torch.inference_mode():
        results = [refine(start) for start in initial]  # also the warm-up
        failed = [r.reason(i) for r in results for i in range(batch) if not r.converged[i]]
        if failed:
            raise SystemExit(f"{channels} channels: {len(failed)} of {batch * starts} did not converge: {failed[0]}")
        errors = [pose_errors(r.cam_from_world, truth) for r in results]
        seconds = median(over([_seconds(refine, start, device) for _ in range(repeats)]) for start in initial)
    position, rotation = (max(float(e[k].max()) for e in errors) for k in (0, 1))
    return seconds * 1e3 / batch, position, rotation


def _seconds(refine, start: Pose, device: str) -> float:
    begin = time.perf_counter()
    refine(start)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def scene(*, channels: int, batch: int, generator: torch.Generator) -> tuple[Camera, Pose, Tensor, Tensor]:
    """Cameras and true `cam_from_world` (B,), points (B, 600, 3) on the plane z = 10 m, and maps (B, C, 256, 256)."""
    size = STRIDE * CELLS
    camera = Camera.stack([Camera.from_colmap("PINHOLE", size, size, [400, 400, size / 2, size / 2])] * batch)
    truth = perturb(Pose.identity(batch), 0.5, 3.0, generator)
    pixels = 40 + (size - 80) * torch.rand(batch, POINTS, 2, generator=generator)
    # The texture varies over about four cells, 0.4 m on the plane. All queries see one texture, from different poses.
    frequency = torch.randn(2, 2 * 128, generator=generator) / (4 * STRIDE * DEPTH / 400)
    phase = 2 * torch.pi * torch.rand(256, generator=generator)
    mixing = torch.randn(256, channels, generator=generator)
    axis = STRIDE * (torch.arange(CELLS) + 0.5)
    centers = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    features = torch.empty(batch, CELLS, CELLS, channels)
    for b in range(batch):
        seen = on_plane(camera[b], truth[b], centers)[:, :2]
        values = (seen @ frequency + phase).cos() @ mixing
        features[b] = (values / values.norm(dim=-1, keepdim=True)).view(CELLS, CELLS, channels)
    return camera, truth, on_plane(camera, truth, pixels), features.permute(0, 3, 1, 2)


def on_plane(camera: Camera, cam_from_world: Pose, pixels: Tensor) -> Tensor:
    """World points (..., N, 3) on the plane z = 10 m that are seen at pixels (..., N, 2)."""
    rays = camera.unproject(pixels)[0] @ cam_from_world.rotation
    center = cam_from_world.center()[..., None, :]
    return center + rays * ((DEPTH - center[..., 2:]) / rays[..., 2:])


if __name__ == "__main__":
    main()
