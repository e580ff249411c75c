"""A tiny toy town with exact ground truth, rendered once for all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vgg import cfgs, make_layers

from gnnet.toy.town import TownSettings, ensure_toy_town

TOY_SETTINGS = {"places": 3, "frames": 3, "query_frames": 2, "image_size": 96, "seed": 0}


def pytest_collection_finish() -> None:
    """Take what the imports made, a million objects, out of what the garbage collector goes through again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A town of three places, each with three 96×96 references and two images of each other condition; read only."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # where the processes of pytest-xdist meet: one renders for all
    return ensure_toy_town(folder / "toy" / "town", TownSettings(**TOY_SETTINGS, write_depth=True), progress=False)


@pytest.fixture(scope="session")
def vgg16_layers() -> torch.nn.Sequential:
    """torchvision's layers of VGG-16 with its random weights, without the classifier, which takes a second to draw."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"])
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
    return layers.eval()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation within it returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class NoHostNumbers(TorchDispatchMode):
    """Raises AssertionError where the host would wait for a GPU to copy something there.

    So it is where a tensor is made of Python numbers, and where one is copied to another device (in tests `meta`)
    without `non_blocking`.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made of Python numbers"
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            assert kwargs.get("non_blocking"), "a tensor is copied to another device, and the host waits"
        return func(*args, **kwargs)


@pytest.fixture
def no_host_numbers() -> NoHostNumbers:
    """A context to compute in."""
    return NoHostNumbers()


@pytest.fixture
def largest_tensor() -> LargestTensor:
    """A context to compute in; afterwards `elements` holds the largest number of elements."""
    return LargestTensor()
