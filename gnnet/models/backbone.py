"""Torchvision's classification networks as encoders, with the decoder and heads of the U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from gnnet.models.images import NormalizedImages
from gnnet.models.pyramid import FeaturePyramid
from gnnet.models.unet import Decoder, Upsampling

_SIDE = 128  # of the image with which stages are found: at stride 32, the coarsest known, four cells


class Backbone(Decoder):
    """A network that torchvision has for classification, whose stages are joined by a decoder with skip connections.

    The stages are found by a trace of the network. The cells of a stage need not lie where xy / stride says: those
    of a ResNet are off by half a cell less half a pixel. The position of each stage is computed from its
    layers, and a fixed filter moves the stage to the grid before the decoder joins it, so that pixel xy of the
    image is at xy / stride in each map. Where the network has no map of a stride (ConvNeXt at 2, most at 1),
    the decoder is given the image itself.

    Args:
        name: torchvision's name: resnet18, convnext_tiny, efficientnet_b0, mobilenet_v3_small, vgg16, ….
        width: channels of the decoder's stages.
        channels: features of a cell: one number for all levels, or one for each, coarse to fine.
        strides: strides of the maps in pixels, coarse to fine.
        deepest: stride of the deepest stage in use; None uses all. Deeper layers are not built.
        upsampling, smooth, normalize, confidence: as in `UNet`.
        frozen_batch_norm: keep the statistics of batch normalisation in training: for pretrained weights, as
            training batches are small. From random weights it leaves the maps without normalisation.

    Raises:
        ValueError: if torchvision has no such network for classification, it has no stages whose resolution
            halves from one to the next, or the strides are not some of theirs or finer ones.
    """

    def __init__(
        self,
        *,
        name: str,
        width: int = 64,
        channels: int | Sequence[int] = 32,
        strides: Sequence[int] = (8, 2),
        deepest: int | None = None,
        upsampling: Upsampling = "bilinear",
        smooth: bool = False,
        normalize: bool = True,
        confidence: bool = False,
        frozen_batch_norm: bool = False,
    ):
        super().__init__()
        network = _classifier(name)
        graph = fx.Tracer().trace(network)
        stages = {stage.stride: stage for stage in _stages(network, graph, name)}
        deepest = max(stages) if deepest is None else deepest
        if deepest not in stages:
            raise ValueError(f"deepest={deepest}; expected a stride of {name}: {', '.join(map(str, stages))}")
        known = [1 << i for i in range(deepest.bit_length())]
        self.name, self.frozen_batch_norm = name, frozen_batch_norm
        self.set_levels(
            strides, channels, known, upsampling, smooth=smooth, normalize=normalize, confidence=confidence
        )
        used = [stride for stride in known if stride >= self.strides[-1]]
        absent = [stride for stride in used if stride not in stages]
        if any(stride > min(stages) for stride in absent):
            raise ValueError(f"{name} has stages of strides {list(stages)} only; each must halve the resolution once")

        self.images = NormalizedImages(multiple=deepest)
        self.encoder = _encoder(network, graph, [stages[stride].node for stride in used if stride in stages])
        self._not_built = frozenset(network.state_dict()) - frozenset(self.encoder.state_dict())
        self._absent = absent
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(stages[s].channels, width, 1), _Shift(stages[s].shift)) if s in stages
            else nn.Conv2d(3, width, 1)
            for s in used
        )  # fmt: skip
        self.add_decoder([width] * len(used), [used.index(s) for s in self.strides], upsampling)
        self.to(memory_format=torch.channels_last)
        self.train()

    def forward(self, images: Tensor) -> FeaturePyramid:
        """Images (B, 3, H, W), uint8 or floating in [0, 1] RGB of any size, to maps (B, C_l, H_l, W_l)."""
        x = self.images(images)
        stages = [*(F.avg_pool2d(x, stride) for stride in self._absent), *self.encoder(x)]
        return self.decode([lateral(stage) for lateral, stage in zip(self.lateral, stages, strict=True)], images)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation; frozen batch normalisation stays in evaluation."""
        super().train(mode)
        for module in self.encoder.modules():
            if self.frozen_batch_norm and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def with_classifier_tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The network's state dict with the encoder's tensors from torchvision's state dict of the whole classifier.

        Tensors of layers that are not built are left out. Files of old torchvision versions have no
        `num_batches_tracked`.
        """
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("encoder.") or k.endswith("_tracked")}
        return kept | {f"encoder.{name}": value for name, value in state.items() if name not in self._not_built}


class _Stage(NamedTuple):
    """A map of the network: the last of its stride through which all passes that comes after."""

    node: fx.Node
    stride: int
    channels: int
    shift: float
    """Cells from a cell's centre to where xy / stride says that it lies; negative to the left and up."""


class _Shift(nn.Module):
    """Moves maps (B, C, H, W) by a part of a cell: cell i of the result is at i + `cells` in the map.

    Cubic interpolation of Lagrange, which keeps positions better than a linear one: it mixes four cells each way.
    """

    kernel: Tensor

    def __init__(self, cells: float):
        super().__init__()
        self.cells = float(cells)
        self.first = math.floor(cells) - 1  # of the four cells, counted from i
        at = cells - self.first
        line = torch.tensor([math.prod((at - b) / (a - b) for b in range(4) if b != a) for a in range(4)])
        self.register_buffer("kernel", torch.outer(line, line), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.cells == 0:
            return x
        x = F.pad(x, (-self.first, self.first + 3) * 2, mode="replicate")
        return F.conv2d(x, self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4), groups=x.shape[1])


class _WithoutLargeMatrices(TorchFunctionMode):
    """Draws no random numbers for large matrices: VGG's classifier, which is not used, has 120 million."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_) and args[0].ndim == 2 and args[0].numel() >= 1 << 24:
            return args[0]
        return func(*args, **(kwargs or {}))


def _classifier(name: str) -> nn.Module:
    """Torchvision's network of that name with random weights, in evaluation mode."""
    import torchvision  # slow to import, and the other networks do not need it

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(f"torchvision has no network {name!r} for classification; expected one of {', '.join(names)}")
    with _WithoutLargeMatrices():
        return torchvision.models.get_model(name, weights=None).eval()


def _stages(network: nn.Module, graph: fx.Graph, name: str) -> list[_Stage]:
    """The stages of a traced network, fine to coarse.

    Raises:
        ValueError: if there are none.
    """
    finder = _StageFinder(network, graph)
    with torch.no_grad():
        finder.run(torch.zeros(1, 3, _SIDE, _SIDE))
    if not finder.found:
        raise ValueError(
            f"name={name}: no map of this network has a half, a quarter, … of the image's resolution; expected a "
            "ResNet, ConvNeXt, EfficientNet, MobileNet, VGG, or the like"
        )
    return sorted(finder.found.values(), key=lambda stage: stage.stride)


class _StageFinder(fx.Interpreter):
    """Runs a traced network and follows where its cells look.

    A convolution or pooling moves the first cell by (kernel − 1) / 2 − padding cells of its input; other layers keep
    the position. `found` has the last map of each stride that no later layer goes around.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph):
        module = fx.GraphModule(network, graph)
        super().__init__(module)
        self.found: dict[int, _Stage] = {}
        self._order = {node: i for i, node in enumerate(module.graph.nodes)}
        self._cells: dict[fx.Node, tuple[float, int]] = {}  # centre of the first cell, and stride, in pixels
        self._last_use = 0  # of what was computed before

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        inputs = [self._cells[n] for n in node.all_input_nodes if n in self._cells]
        if node.op == "placeholder":
            self._cells[node] = 0.5, 1
        elif inputs:
            first, stride = inputs[0]
            layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                kernel, step, padding = (_one(v) for v in (layer.kernel_size, layer.stride, layer.padding))
                reach = (kernel - 1) * _one(getattr(layer, "dilation", 1))
                first, stride = first + stride * (reach / 2 - padding), stride * step
            self._cells[node] = first, stride
            alone = self._last_use <= self._order[node]
            if alone and isinstance(value, Tensor) and value.shape[2:] == (_SIDE // stride,) * 2 and stride <= 32:
                self.found[stride] = _Stage(node, stride, value.shape[1], 0.5 - first / stride)
        self._last_use = max([self._last_use, *(self._order[user] for user in node.users)])
        return value


def _one(value: Any) -> int:
    """A layer's setting that is one number, or the same for rows and columns."""
    return value if isinstance(value, int) else value[0]


def _encoder(network: nn.Module, graph: fx.Graph, nodes: list[fx.Node]) -> fx.GraphModule:
    """The part of a traced network that computes the values of some nodes, which it returns as a tuple."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (tuple(nodes),)
    graph.eliminate_dead_code()
    return fx.GraphModule(network, graph)
