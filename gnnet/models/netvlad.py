"""NetVLAD (Arandjelović et al., CVPR 2016) on VGG-16: global descriptors, by which images are retrieved."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnet.models.images import NormalizedImages
from gnnet.models.vgg import VGG16
from gnnet.models.weights import StateDict, load_strictly, read_state_dict

_CONV5_3 = 28  # index of the layer in torchvision's vgg16.features
_CHANNELS, _STRIDE = 512, 16  # of the maps that it gives


class NetVLAD(nn.Module):
    """Maps images to global descriptors: VGG-16 to conv5_3 without its ReLU, pooled as residuals to cluster centres.

    It is the network of S2DHM's and pytorch-NetVlad's checkpoints, which do not pad images either.
    Parameters are `features.<i>.*` (torchvision's), `pool.conv.*` and `pool.centroids`.

    Args:
        clusters: number of cluster centres.
        bias: whether the soft assignment to clusters has a bias (`vladv2` in pytorch-NetVlad).

    Raises:
        ValueError: if there is no cluster.
    """

    def __init__(self, *, clusters: int = 64, bias: bool = False):
        super().__init__()
        if clusters < 1:
            raise ValueError(f"clusters={clusters}; expected 1 or more")
        self.images = NormalizedImages(multiple=1)
        self.features = VGG16(taps=(_CONV5_3 + 1,)).features
        self.pool = _NetVLADPooling(_CHANNELS, clusters, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB, to descriptors (B, clusters · 512) of length 1.

        Raises:
            ValueError: if the images are of another shape or type, or have fewer than 16 × 16 pixels.
        """
        if images.ndim == 4 and min(images.shape[-2:]) < _STRIDE:
            raise ValueError(f"images of shape {tuple(images.shape)} given; NetVLAD needs {_STRIDE} × {_STRIDE} pixels")
        return self.pool(self.features(self.images(images)))


class _NetVLADPooling(nn.Module):
    """Pools maps (B, C, H, W) to (B, K · C): for each of K clusters, the sum of residuals by soft assignment."""

    def __init__(self, channels: int, clusters: int, *, bias: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, clusters, 1, bias=bias)
        self.centroids = nn.Parameter(F.normalize(torch.randn(clusters, channels), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        # Sums over thousands of cells: not under autocast.
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.to(self.centroids.dtype), dim=1)
            assignment = self.conv(features).flatten(2).softmax(1)  # [B, K, H·W]
            # Σ a (x − c) over cells as Σ a x − c Σ a, so that no residuals (B, K, C, H·W) are held in memory.
            residuals = assignment @ features.flatten(2).mT - assignment.sum(-1, keepdim=True) * self.centroids
            return F.normalize(F.normalize(residuals, dim=2).flatten(1), dim=1)


def load_netvlad(path: str | Path) -> NetVLAD:
    """Load NetVLAD from a checkpoint of S2DHM or pytorch-NetVlad, in evaluation mode.

    Tensors `encoder.<i>.*` (or `features.<i>.*`, this class's own names) and `pool.*` are read, bare or under
    `state_dict`, with or without `module.`; others, such as Patch-NetVLAD's WPCA, are ignored. The file tells
    the number of clusters and whether the assignment has a bias.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, has no cluster centres, does not fit (names and shapes are
            listed), or could be read only by executing code in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file (NetVLAD's checkpoint); expected that of S2DHM or pytorch-NetVlad (.pth.tar)"
        )
    state = _own_names(read_state_dict(path))
    centroids = state.get("pool.centroids")
    if centroids is None or centroids.ndim != 2 or len(centroids) == 0:
        found = "none" if centroids is None else tuple(centroids.shape)
        raise ValueError(
            f"{path} has no cluster centres of NetVLAD (pool.centroids: {found}); expected (clusters, {_CHANNELS}): "
            "weights of VGG-16 alone, or of another pooling, do not give NetVLAD's descriptors"
        )
    network = NetVLAD(clusters=len(centroids), bias="pool.conv.bias" in state)
    load_strictly(network, state, source=str(path), kind="NetVLAD checkpoint")
    return network.eval()


def _own_names(state: StateDict) -> StateDict:
    renamed = {f"features.{k.removeprefix('encoder.')}" if k.startswith("encoder.") else k: v for k, v in state.items()}
    return {k: v for k, v in renamed.items() if k.startswith(("features.", "pool."))}
