"""What only a GPU can show: the same numbers there as on the CPU, and no step that makes the host wait.

    python -m pytest -m cuda tests/test_cuda.py

They are skipped without a GPU; `GNNET_TEST_DEVICE=cpu` runs them on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager

import pytest
import torch

from gnnet.data.batches import PairBatch
from gnnet.data.photometric import Photometric
from gnnet.geometry.pose import perturb
from gnnet.localization.dense_search import best_cells
from gnnet.localization.matching import Matcher
from gnnet.localization.refinement import refine_pose, sample_descriptors
from gnnet.losses.contrastive import Contrastive
from gnnet.losses.cross_entropy import CrossEntropy
from gnnet.losses.gauss_newton import GaussNewton
from gnnet.losses.mining import draw_candidates, mine_hardest
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import LevelPair, PyramidPair
from gnnet.models.grey import GreyValues
from gnnet.models.pyramid import FeaturePyramid, pair_features
from gnnet.models.unet import UNet
from gnnet.models.vgg import VGG16

from .localization.test_refinement import problem
from .losses.conftest import make_pair

DEVICE = torch.device(os.environ.get("GNNET_TEST_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]

NETWORKS = {
    "unet": lambda: UNet(widths=(8, 16, 32), strides=(4, 2, 1)),
    "unet_small": lambda: UNet(widths=(24, 48, 96, 128), channels=32, strides=(8, 2), upsampling="bilinear",
                               stem_stride=2),
    "blurred": lambda: UNet(widths=(8, 16, 32), strides=(4, 2), pooling="blur", smooth=True, checkpointing=True),
    "vgg16": lambda: VGG16(taps=(28, 17)),
    "grey": lambda: GreyValues(strides=(4, 2)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_products():
    """Full float32: TF32 has ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waiting():
    """Raises where the host waits for the GPU."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def images(count: int = 2, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def to_device(batch: PairBatch, device: torch.device = DEVICE) -> PairBatch:
    """The batch, which has no geometry, on a device."""
    return PairBatch(*(x if x is None else x.to(device) for x in batch))


def pairs(side: int = 64, points: int = 40) -> PairBatch:
    generator = torch.Generator().manual_seed(1)
    a, b = images(4, side).chunk(2)
    xy = 8 + torch.rand(2, points, 2, generator=generator) * (side - 16)
    ones = torch.ones(2, points)
    index = torch.arange(2)
    return PairBatch(a, b, xy, xy + 1.3, ones, ones > 0, index, 0 * index)


def the_loss() -> PairLoss:
    return PairLoss(terms={"dmc": Contrastive(), "gn": GaussNewton(weight=0.5), "nce": CrossEntropy(dense_cells=64)})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_same_features(name):
    network = make(name)
    with torch.no_grad():
        expected, found = network(images()), copy.deepcopy(network).to(DEVICE)(images().to(DEVICE))
    assert found.strides == expected.strides
    for a, b in zip(found.maps, expected.maps, strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["unet", "vgg16"])
def test_weights_are_channels_last(name):
    for parameter in make(name).to(DEVICE).parameters():
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last)


def test_loss_and_gradients_are_the_same():
    network, batch, found = make("unet"), pairs(), []
    for device in (torch.device("cpu"), DEVICE):
        mine = copy.deepcopy(network).to(device)
        here = to_device(batch, device)
        pyramids = pair_features(mine, here.image_a, here.image_b)
        total, _ = the_loss()(PyramidPair(*pyramids, here), step=20_000, generator=torch.Generator().manual_seed(0))
        total.backward()
        found.append([total.detach().cpu(), *(p.grad.cpu() for p in mine.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("candidates", ["all", 200])
def test_mining_finds_the_same_cells(candidates):
    pair = make_pair(points=30, height=24, width=32)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        here = LevelPair(*(x.to(device) for x in pair))
        drawn = draw_candidates(here, candidates, torch.Generator().manual_seed(0))
        found.append(mine_hardest(here, *drawn, hardest=5))
    assert torch.equal(found[0][1], found[1][1].cpu())
    # Cells of almost the same distance may change places among the hardest.
    assert (found[0][0] == found[1][0].cpu()).float().mean() > 0.9


@pytest.mark.parametrize("batch", [1, 8])
def test_refined_poses_are_the_same(batch):
    arguments, truth = problem(batch=batch, strides=(8, 4), dtype=torch.float32)
    arguments["initial"] = perturb(truth, 0.05, 0.5, torch.Generator().manual_seed(2))
    on_device = {key: _moved(value) for key, value in arguments.items()}
    with torch.no_grad():
        expected, found = refine_pose(**arguments), refine_pose(**on_device)
    assert found.converged.all() and expected.converged.all()
    for name in ("rotation", "translation"):
        a, b = (getattr(r.cam_from_world, name).cpu() for r in (found, expected))
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)
    torch.testing.assert_close(found.covariance.cpu(), expected.covariance, rtol=0.05, atol=1e-9)


def _moved(value):
    if isinstance(value, FeaturePyramid):
        return FeaturePyramid(tuple(m.to(DEVICE) for m in value.maps), value.strides)
    return tuple(x.to(DEVICE) for x in value) if isinstance(value, tuple) else value.to(DEVICE)


@pytest.mark.parametrize("dense", [True, False])
def test_matches_are_the_same(dense):
    pyramid = make("unet")(images(1)).cpu()
    pyramid = FeaturePyramid(tuple(m.detach() for m in pyramid.maps), pyramid.strides)
    keypoints = 8 + torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(0)) * 48
    expected = Matcher(dense=dense).match(pyramid, keypoints, pyramid)
    on_device = _moved(pyramid)
    with no_waiting():
        found = Matcher(dense=dense).match(on_device, keypoints.to(DEVICE, non_blocking=True), on_device)
    kept = expected.kept & found.kept.cpu()
    assert (expected.kept == found.kept.cpu()).float().mean() > 0.95
    near = (found.keypoints.cpu() - expected.keypoints).norm(dim=-1)[kept] < 0.05
    assert near.float().mean() > 0.95


def test_dense_search_finds_the_same_cells():
    generator = torch.Generator().manual_seed(0)
    cells = torch.nn.functional.normalize(torch.randn(32, 2000, generator=generator), dim=0)
    descriptors = cells[:, ::10].T + 0.05 * torch.randn(200, 32, generator=generator)
    index, similarity, distinct = best_cells(descriptors.to(DEVICE), cells.to(DEVICE), ratio=0.9)
    expected = best_cells(descriptors, cells, ratio=0.9)
    assert torch.equal(index.cpu(), expected[0]) and torch.equal(distinct.cpu(), expected[2])
    torch.testing.assert_close(similarity.cpu(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_host_does_not_wait_within_a_training_step(precision):
    network, batch, loss = make("unet").to(DEVICE).train(), to_device(pairs()), the_loss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    photometric, generator = Photometric.conditions(), torch.Generator(DEVICE).manual_seed(0)
    for attempt in range(2):  # the first compiles kernels and plans convolutions
        with no_waiting() if attempt else torch.enable_grad():
            augmented = [photometric(image, generator) for image in (batch.image_a, batch.image_b)]
            with torch.autocast(DEVICE.type, precision, enabled=precision is torch.bfloat16):
                pyramids = pair_features(network, *augmented)
                total, _ = loss(PyramidPair(*pyramids, batch), step=1000, generator=generator)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    assert total.isfinite()


def test_a_step_in_bf16_is_near_that_in_float32():
    network, batch, totals = make("unet").to(DEVICE), to_device(pairs()), []
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            pyramids = pair_features(network, batch.image_a, batch.image_b)
            generator = torch.Generator(DEVICE).manual_seed(0)
            total, _ = the_loss()(PyramidPair(*pyramids, batch), step=1000, generator=generator)
        total.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        totals.append(total.detach())
    torch.testing.assert_close(totals[1], totals[0], rtol=0.05, atol=0)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_features_and_gradients():
    network, here, found = make("unet").to(DEVICE), images().to(DEVICE), []
    for function in (network.forward, torch.compile(network.forward)):
        network.zero_grad()
        maps = function(here).maps
        sum(m.square().square().sum() for m in maps).backward()
        found.append([*(m.detach() for m in maps), *(p.grad.clone() for p in network.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-2)


def test_descriptors_are_the_same():
    pyramid = make("unet")(images(1)).cpu()
    keypoints = torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(0)) * 64
    expected, found = sample_descriptors(pyramid, keypoints), sample_descriptors(_moved(pyramid), keypoints.to(DEVICE))
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found[1], expected[1], strict=True))
