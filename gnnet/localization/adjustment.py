"""Keypoint adjustment: the keypoints of each 3D point are moved until the references' features agree there.

A detector places the observations of a point some tenths of a pixel apart; the network's finest map tells which pixels
look alike (Lindenberger et al., "Pixel-Perfect Structure-from-Motion with Featuremetric Refinement", ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gnnet.data.images import read_view
from gnnet.geometry.interpolation import sample
from gnnet.localization.matching import align
from gnnet.models.pyramid import FeatureNetwork
from gnnet.processes import Devices, share_out
from gnnet.progress import track
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import SceneImage

STEPS = 4  # of Gauss-Newton; further ones move less than the matching's noise


def adjusted(
    references: Sequence[SceneImage], count: int, network: FeatureNetwork, *, cells: float, scratch: Path,
    largest_side: int | None, devices: Devices, on_bad: OnBad, progress: bool = True,
) -> list[SceneImage]:  # fmt: skip
    """References with keypoints that are moved to where each looks most like the mean of its point.

    The network sees each image twice: first to sum up the descriptors of each point, then to align each keypoint with
    their mean. Points that one reference alone observes keep their keypoint, and so do all in an image
    that cannot be read, where `on_bad` is `skip`.

    Args:
        references: with point ids and keypoints.
        count: number of 3D points.
        network: in evaluation mode; the finest of its maps is used.
        cells: of that map, which a keypoint may move on each axis.
        scratch: file that holds the sums meanwhile, 8 bytes a channel of each point; one that is there is replaced.
        largest_side, devices, on_bad, progress: as for `gnnet.localization.compile.compile_map`.
    """
    try:
        sums = np.lib.format.open_memmap(scratch, "w+", np.float64, (count, network.channels[-1] + 1))
        shared = share_out(partial(_describing, network, largest_side, on_bad), references, devices)
        for row, described in track(shared, description="Describing keypoints", total=len(references), show=progress):
            # Of halves, a sum in float64 is exact: in whatever order processes end, it is the same.
            np.add.at(sums, np.asarray(references[row].point_ids), described)
        sums.flush()
        moved = list(references)
        shared = share_out(partial(_moving, network, largest_side, on_bad, scratch, cells), references, devices)
        for row, keypoints in track(shared, description="Adjusting keypoints", total=len(references), show=progress):
            moved[row] = replace(moved[row], keypoints=keypoints)
    finally:
        scratch.unlink(missing_ok=True)
    return moved


class _Finest:
    """The finest map of a reference, and what its keypoints are in it."""

    @torch.no_grad()
    def __init__(
        self, image: SceneImage, network: FeatureNetwork, largest_side: int | None, device: torch.device
    ) -> None:
        pixels, _, factors = read_view(image, largest_side)
        pyramid = network(pixels[None].to(device)).select([-1])
        self.features, self.per_cell = pyramid.maps[0].float(), pyramid.strides[0] / factors  # pixels on disk
        self.xy = torch.from_numpy(np.asarray(image.keypoints) / self.per_cell)[None].float().to(device)
        descriptors, self.valid = sample(self.features, self.xy)
        self.descriptors = descriptors.half() * self.valid[..., None]  # [1, N, C]


def _describing(
    network: FeatureNetwork, largest_side: int | None, on_bad: OnBad, device: torch.device
) -> Callable[[SceneImage], np.ndarray]:
    """What gives the descriptors of a reference's keypoints, with a one behind each; zeros where there is none."""
    network = network.to(device)

    def describe(image: SceneImage) -> np.ndarray:
        assert image.keypoints is not None
        rows = np.zeros((len(image.keypoints), network.channels[-1] + 1), np.float16)
        with BadInput(on_bad).skipping():
            found = _Finest(image, network, largest_side, device)
            rows = torch.cat([found.descriptors, found.valid[..., None]], -1)[0].cpu().numpy()
        return rows

    return describe


def _moving(
    network: FeatureNetwork, largest_side: int | None, on_bad: OnBad, sums: Path, cells: float, device: torch.device
) -> Callable[[SceneImage], np.ndarray]:
    """What gives the moved keypoints of a reference, in pixels of its image on disk."""
    network, totals = network.to(device), np.load(sums, mmap_mode="r")

    def move(image: SceneImage) -> np.ndarray:
        assert image.keypoints is not None
        keypoints = np.asarray(image.keypoints, np.float64)
        with BadInput(on_bad).skipping():
            found = _Finest(image, network, largest_side, device)
            total = torch.from_numpy(totals[image.point_ids]).to(device)[None]
            # Towards the mean of all: were it of the others, the two of a pair would change places.
            target = F.normalize(total[..., :-1], dim=-1).float() * found.descriptors.float().norm(dim=-1, keepdim=True)
            moved = align(target, found.features, found.xy, reach=cells, steps=STEPS)
            step = torch.where((found.valid & (total[..., -1] > 1))[..., None], moved - found.xy, 0)[0]
            keypoints = keypoints + step.double().cpu().numpy() * found.per_cell
        return keypoints

    return move
