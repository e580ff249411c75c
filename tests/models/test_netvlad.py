import os

import numpy as np
import pytest
import torch

from gnnet.models.netvlad import NetVLAD, load_netvlad


@pytest.fixture(scope="module")
def reference(vgg16_layers):
    """torchvision's layers without the last ReLU and max pool, with random weights for which images differ."""
    return vgg16_layers[:-2]


@pytest.fixture(scope="module")
def network(reference):
    network = NetVLAD(clusters=5, bias=True).eval()
    network.features.load_state_dict(reference.state_dict())
    with torch.no_grad():
        network.pool.conv.weight *= 100  # cells differ in their clusters
    return network


def netvlad_by_loops(maps, network):
    """NetVLAD in float64, from each residual of each cell to each centre."""
    maps, descriptors = maps.double().numpy(), []
    weight, bias, centroids = (
        p.detach().double().numpy() for p in (network.pool.conv.weight, network.pool.conv.bias, network.pool.centroids)
    )
    for features in maps:
        cells = features.reshape(features.shape[0], -1).T
        cells = cells / np.linalg.norm(cells, axis=1, keepdims=True)
        logits = cells @ weight[:, :, 0, 0].T + bias
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        blocks = []
        for k, centre in enumerate(centroids):
            block = sum(share[i, k] * (cell - centre) for i, cell in enumerate(cells))
            blocks.append(block / np.linalg.norm(block))
        descriptor = np.concatenate(blocks)
        descriptors.append(descriptor / np.linalg.norm(descriptor))
    return torch.from_numpy(np.stack(descriptors))


# 51 × 70 is no multiple of the stride; the networks from which the checkpoints come do not pad.
@pytest.mark.parametrize("size", [(48, 64), (51, 70), (16, 16)])
@pytest.mark.slow
def test_against_torchvision_and_loops(network, reference, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    images[1, :2] = 0  # an image of another colour
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        maps = reference((images - mean[:, None, None]) / std[:, None, None])
        descriptors = network(images)
    assert maps.shape[-2:] == (size[0] // 16, size[1] // 16)
    assert (maps < 0).any()
    assert descriptors[0] @ descriptors[1] < 0.99  # so that the comparison can fail
    assert descriptors.shape == (2, 5 * 512)
    torch.testing.assert_close(descriptors.double(), netvlad_by_loops(maps, network), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(descriptors.norm(dim=1), torch.ones(2))


def test_default_is_that_of_the_checkpoints(reference):
    network = NetVLAD()
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    expected = {f"features.{k}": tuple(v.shape) for k, v in reference.state_dict().items()}
    assert shapes == {**expected, "pool.conv.weight": (64, 512, 1, 1), "pool.centroids": (64, 512)}


def test_bytes_and_autocast(network):
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(images.float() / 255)
        torch.testing.assert_close(network(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(images)
    assert rough.dtype == torch.float32
    assert (rough * expected).sum() > 0.99


def test_residuals_of_cells_are_never_held(network, largest_tensor):
    maps = torch.randn(2, 512, 9, 11)
    with torch.no_grad(), largest_tensor:
        network.pool(maps)
    assert largest_tensor.elements == maps.numel()


def test_constant_maps_are_finite(network):
    with torch.no_grad():
        descriptor = network.pool(torch.zeros(1, 512, 2, 2))
    assert descriptor.isfinite().all()


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 15, 40), torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32)])
def test_images_of_other_shapes(network, images):
    with pytest.raises(ValueError, match="images of shape"):
        network(images)


def test_no_clusters():
    with pytest.raises(ValueError, match="clusters=0"):
        NetVLAD(clusters=0)


# Names of convolutions in VGG-16, and their shapes.
WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}


def checkpoint(encoder="encoder.module.", pool="pool.module.", *, clusters=3, bias=False):
    """Tensors with the shapes of real files; each repeats one number, so that the files are small."""
    inputs = [3, *WIDTHS.values()]
    shapes = {f"{encoder}{i}.weight": (c, b, 3, 3) for (i, c), b in zip(WIDTHS.items(), inputs, strict=False)}
    shapes |= {f"{encoder}{i}.bias": (c,) for i, c in WIDTHS.items()}
    shapes |= {f"{pool}conv.weight": (clusters, 512, 1, 1), f"{pool}centroids": (clusters, 512)}
    if bias:
        shapes[f"{pool}conv.bias"] = (clusters,)
    return {k: torch.full((1,), float(i)).expand(shape) for i, (k, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(
    ("encoder", "pool", "bias", "bare"),
    [
        ("encoder.module.", "pool.module.", False, False),  # S2DHM's
        ("encoder.", "pool.", True, False),
        ("module.encoder.", "module.pool.", False, True),
        ("features.", "pool.", True, True),
    ],
)
def test_load(tmp_path, encoder, pool, bias, bare):
    tensors = checkpoint(encoder, pool, bias=bias)
    others = {"WPCA.0.weight": torch.zeros(2, 2)}
    content = {**tensors, **others} if bare else {
        "epoch": 1, "best_score": np.float64(0.8), "parallel": True, "state_dict": {**tensors, **others},
    }  # fmt: skip
    torch.save(content, tmp_path / "netvlad.pth.tar")
    network = load_netvlad(str(tmp_path / "netvlad.pth.tar"))
    assert not network.training
    assert (network.pool.conv.bias is not None) == bias
    state = network.state_dict()
    assert len(state) == len(tensors)
    for name, value in tensors.items():
        own = name.replace(encoder, "features.").replace(pool, "pool.")
        torch.testing.assert_close(state[own], value.contiguous())


def test_loaded_is_what_was_saved(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "own.pth")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_netvlad(tmp_path / "own.pth")(images), network(images))


def test_missing_file(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a file.*S2DHM"):
            load_netvlad(path)


@pytest.mark.parametrize("centroids", [None, torch.zeros(3), torch.zeros(0, 512)])
def test_without_a_pooling(tmp_path, centroids):
    tensors = checkpoint()
    del tensors["pool.module.centroids"]
    if centroids is not None:
        tensors["pool.module.centroids"] = centroids
    torch.save(tensors, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"vgg\.pth has no cluster centres of NetVLAD"):
        load_netvlad(tmp_path / "vgg.pth")


def test_what_does_not_fit_is_named(tmp_path):
    tensors = checkpoint()
    del tensors["encoder.module.5.weight"]
    tensors["encoder.module.0.weight"] = torch.zeros(64, 1, 3, 3)
    tensors["pool.module.centroids"] = torch.zeros(3, 256)
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="does not fit NetVLAD") as caught:
        load_netvlad(tmp_path / "bad.pth")
    for part in ("missing (features.5.weight)", "features.0.weight (64, 1, 3, 3) instead of (64, 3, 3, 3)",
                 "pool.centroids (3, 256) instead of (3, 512)"):  # fmt: skip
        assert part in str(caught.value)


def test_resnet_checkpoint(tmp_path):
    tensors = {"encoder.conv1.weight": torch.zeros(2), "pool.centroids": torch.zeros(64, 512)}
    torch.save({"state_dict": tensors}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"does not fit NetVLAD: .*unexpected \(features\.conv1\.weight\)"):
        load_netvlad(tmp_path / "resnet.pth")


class _RunsWhenUnpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_does_not_run(tmp_path):
    torch.save({"state_dict": checkpoint(), "extra": _RunsWhenUnpickled(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="would need to execute code"):
        load_netvlad(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", bytes(range(256))])
def test_other_files(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_netvlad(tmp_path / "other")
