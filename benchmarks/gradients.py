"""Which gradient of a sampled map is best for pose refinement: convergence basin and final error.

Reference and query are two views of one plane with a smooth random texture. Each has its own grid of cells;
the texture is evaluated exactly at the centre of every cell, and white noise is added. Descriptors are bilinear
samples of the reference map, so that both views have interpolation errors, at different phases. An initial pose
moves the points by a number of cells, half by its position and half by its rotation. It has converged if the
points end within a quarter of a cell (root mean square) of their true pixels. The final error, in cells, is the
median over initial poses that are one cell off.

    python benchmarks/gradients.py [--json] [--scenes 16] [--starts 2] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from refinement import DEPTH, STRIDE, on_plane
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.refinement import RefinementStatus, refine_pose, sample_descriptors
from gnnet.models.pyramid import FeaturePyramid

GRADIENTS = ("central", "exact", "sobel", "bicubic")
CELLS, FOCAL, POINTS, CHANNELS = 96, 150.0, 200, 32
OFFSETS = (1.0, 4.0, 6.0, 8.0, 12.0)  # cells
WORLDS = ((2.0, 0.0), (2.0, 0.3), (4.0, 0.0), (4.0, 0.3))  # length in cells on which the texture varies; noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--starts", type=int, default=2, help="random initial poses for each scene and offset")
    arguments = parser.parse_args()
    figures = {}
    table = Table("texture", "noise", "gradient", "error (cells)", "steps", "stopped converged")
    for offset in OFFSETS:
        table.add_column(f"{offset:g} off")
    for smoothness, noise in WORLDS:
        world = views(smoothness=smoothness, noise=noise, scenes=arguments.scenes, device=arguments.device)
        for gradient in GRADIENTS:
            found = measure(*world, gradient=gradient, starts=arguments.starts)
            figures[f"{gradient}_smooth{smoothness:g}_noise{noise:g}"] = found
            table.add_row(
                f"{smoothness:g}", f"{noise:g}", gradient, f"{found['error_cells']:.4f}", f"{found['steps']:.1f}",
                f"{found['stopped_converged']:.0%}", *(f"{share:.0%}" for share in found["basin"]),
            )  # fmt: skip
        table.add_section()
    if arguments.json:
        print(json.dumps(figures))
    else:
        Console().print(table)


def views(
    *, smoothness: float, noise: float, scenes: int, device: str
) -> tuple[Camera, Pose, Tensor, Tensor, Tensor, Tensor]:
    """Cameras and true poses of the queries, 3D points, query maps, the points' descriptors and their validity.

    Args:
        smoothness: length, in cells, on which the texture varies.
        noise: std of the noise of a whole feature vector, which has norm 1 without it.
        scenes: number of scenes, B.
        device: where the tensors are.

    Returns:
        Camera (B,), `cam_from_world` (B,), points (B, N, 3) in metres, maps (B, C, H, W), descriptors (B, N, C)
        sampled in the reference maps, validity (B, N).
    """
    generator = torch.Generator().manual_seed(0)
    size = STRIDE * CELLS
    camera = Camera.stack([Camera.from_colmap("PINHOLE", size, size, [FOCAL, FOCAL, size / 2, size / 2])] * scenes)
    reference, query = (perturb(Pose.identity(scenes), 0.5, 3.0, generator) for _ in range(2))
    pixels = size * (0.15 + 0.7 * torch.rand(scenes, POINTS, 2, generator=generator))
    points = on_plane(camera, query, pixels)
    axis = STRIDE * (torch.arange(CELLS) + 0.5)
    centers = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2).expand(scenes, -1, 2)
    frequency = torch.randn(scenes, 2, 256, generator=generator) / (smoothness * cell_metres())
    phase = 2 * torch.pi * torch.rand(scenes, 1, 256, generator=generator)
    mixing = torch.randn(scenes, 256, CHANNELS, generator=generator)

    def see(cam_from_world: Pose) -> Tensor:
        seen = on_plane(camera, cam_from_world, centers)[..., :2]
        features = (seen @ frequency + phase).cos() @ mixing
        features = features / features.norm(dim=-1, keepdim=True)
        features = features + noise / math.sqrt(CHANNELS) * torch.randn(features.shape, generator=generator)
        return features.unflatten(1, (CELLS, CELLS)).permute(0, 3, 1, 2).to(device)

    keypoints, _ = camera.project(reference.transform(points))
    (descriptors,), (valid,) = sample_descriptors(FeaturePyramid((see(reference),), (STRIDE,)), keypoints.to(device))
    return camera.to(device), query.to(device), points.to(device), see(query), descriptors, valid


def cell_metres() -> float:
    """Approximate side, in metres, of the part of the plane that one cell covers."""
    return STRIDE * DEPTH / FOCAL


@torch.inference_mode()
def measure(
    camera: Camera, truth: Pose, points: Tensor, features: Tensor, descriptors: Tensor, valid: Tensor,
    *, gradient: str, starts: int,
) -> dict:  # fmt: skip
    """Refine from many initial poses.

    Returns:
        `basin`, the share that converges for each of OFFSETS; and for initial poses one cell off: `error_cells`
        (median), `steps` (mean), and the shares that stop as converged (`stopped_converged`) and with the
        largest damping (`stuck`).
    """
    generator = torch.Generator().manual_seed(1)
    target, _ = camera.project(truth.transform(points))
    basin, near = [], []
    for offset in OFFSETS:
        errors = []
        for _ in range(starts):
            half = offset * cell_metres() / 2
            initial = perturb(truth, half, math.degrees(half / DEPTH), generator)
            result = refine_pose(
                pyramid=FeaturePyramid((features,), (STRIDE,)), descriptors=(descriptors,), descriptor_valid=(valid,),
                points=points, valid=valid, camera=camera, initial=initial, gradient=gradient, iterations=30,
            )  # fmt: skip
            xy, _ = camera.project(result.cam_from_world.transform(points))
            errors.append((xy - target).square().sum(-1).mean(-1).sqrt() / STRIDE)
            if offset == OFFSETS[0]:
                near.append(result)
        errors = torch.cat(errors)
        basin.append(float((errors < 0.25).float().mean()))
        if offset == OFFSETS[0]:
            error = float(errors.median())
    return {
        "error_cells": error,
        "steps": float(torch.cat([r.iterations for r in near]).float().mean()),
        "stopped_converged": float(torch.cat([r.converged for r in near]).float().mean()),
        "stuck": float(torch.cat([r.status == RefinementStatus.DAMPING_AT_MAXIMUM for r in near]).float().mean()),
        "basin": basin,
    }


if __name__ == "__main__":
    main()
