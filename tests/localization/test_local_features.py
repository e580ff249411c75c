"""Detections of local features."""

from __future__ import annotations

import re
from types import SimpleNamespace

import kornia.feature
import numpy as np
import pytest
import torch

from gnnet.localization import local_features
from gnnet.localization.local_features import Detections, LocalFeatures
from gnnet.localization.map import Observations
from gnnet.localization.query import Query
from gnnet.models.pyramid import FeaturePyramid


def test_sift_comes_strongest_first_and_not_more_than_asked():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 120, 160), dtype=np.uint8))
    many, few = LocalFeatures("sift", 200).detect(image), LocalFeatures("sift", 20).detect(image)
    assert len(few.keypoints) == 20 and torch.equal(few.keypoints, many.keypoints[:20])
    torch.testing.assert_close(many.descriptors.norm(dim=-1), torch.ones(len(many.descriptors)))


def test_disk_gives_colmap_pixels_strongest_first(monkeypatch):
    torch.manual_seed(0)
    network = kornia.feature.DISK().eval()  # random: its weights are not at hand everywhere
    monkeypatch.setattr(local_features, "_load_network", lambda *_: network)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 96, 130), dtype=np.uint8))  # not of 16
    found = LocalFeatures("disk", 50).detect(image)
    assert found.descriptors.shape == (len(found.keypoints), LocalFeatures("disk").channels)
    assert 0 < len(found.keypoints) <= 50
    # Whole cells of kornia's, whose first centre is (0, 0): here halves.
    assert (found.keypoints % 1 == 0.5).all()
    assert (found.keypoints > 0).all() and (found.keypoints < torch.tensor([130.0, 96.0])).all()
    with torch.no_grad():
        raw = network(image[None].float() / 255, n=50, pad_if_not_divisible=True)[0]
    best = raw.keypoints[raw.detection_scores.argmax()] + 0.5
    assert torch.equal(found.keypoints[0], best)


def test_aliked_gives_colmap_pixels_strongest_first(monkeypatch):
    torch.manual_seed(0)
    network = kornia.feature.ALIKED(detection_threshold=0.0, max_num_keypoints=80).eval()
    monkeypatch.setattr(local_features, "_load_network", lambda *_: network)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 96, 130), dtype=np.uint8))
    found = LocalFeatures("aliked", 50).detect(image)
    assert found.descriptors.shape == (50, LocalFeatures("aliked").channels)
    torch.testing.assert_close(found.descriptors.norm(dim=-1), torch.ones(50))
    with torch.no_grad():
        raw = network(image[None].float() / 255)[0]
    best = raw.keypoint_scores.argsort(descending=True, stable=True)[:50]
    torch.testing.assert_close(found.keypoints, raw.keypoints[best] + 0.5)


def seen(*detections) -> Observations:
    """What references, of any number of detections each, observe."""
    counts = torch.tensor([len(d.keypoints) for d in detections])
    points = torch.zeros(int(counts.sum()), 3, dtype=torch.float64)
    keypoints, descriptors = (torch.cat(column) for column in zip(*detections, strict=True))
    return Observations(
        points, torch.zeros(len(points), dtype=torch.int64), keypoints, (descriptors,),
        torch.ones(len(points), 1, dtype=torch.bool), torch.arange(len(detections)).repeat_interleave(counts),
    )  # fmt: skip


def query_of(image: torch.Tensor) -> Query:
    """A query of which nothing but its image is known."""
    return Query("q", image, FeaturePyramid((torch.zeros(1, 1, 1, 1),), (8,)), None, None)


def test_lightglue_matches_reference_by_reference_in_its_own_pixels(monkeypatch):
    torch.manual_seed(0)
    glue = kornia.feature.LightGlue(None, input_dim=128, filter_threshold=0.0, n_layers=2).eval()  # random, so 0
    monkeypatch.setattr(local_features, "_load_network", lambda *_: glue)
    generator = torch.Generator().manual_seed(1)

    def detections(count, width, height):
        at = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
        described = torch.randn(count, 128, generator=generator)
        return local_features.Detections(at, torch.nn.functional.normalize(described, dim=-1))

    references, query = [detections(30, 120, 80), detections(20, 60, 90)], detections(40, 130, 96)
    sizes = torch.tensor([[120.0, 80.0], [60.0, 90.0]])
    monkeypatch.setattr(LocalFeatures, "detect", lambda self, image: query)
    features, image = LocalFeatures("disk", lightglue=True), torch.zeros(3, 96, 130, dtype=torch.uint8)
    found = features.match_query(seen(*references), query_of(image), sizes)
    expected, kept = [], []
    for reference, size in zip(references, sizes, strict=True):
        sides = [
            {"keypoints": d.keypoints[None] - 0.5, "descriptors": d.descriptors[None], "image_size": s[None]}
            for d, s in ((reference, size), (query, torch.tensor([130.0, 96.0])))
        ]
        with torch.no_grad():
            nearest = glue({"image0": sides[0], "image1": sides[1]})["matches0"][0]
        kept.append(nearest >= 0)
        expected.append(query.keypoints[nearest])
    kept, expected = torch.cat(kept), torch.cat(expected).double()
    assert 5 < kept.sum() < 50 and torch.equal(found.kept, kept)
    torch.testing.assert_close(found.keypoints[kept], expected[kept])


@pytest.mark.parametrize("features", [LocalFeatures("sift"), LocalFeatures("disk", lightglue=True)])
def test_a_query_without_detections_matches_nothing(monkeypatch, features):
    nothing = local_features.Detections(torch.zeros(0, 2), torch.zeros(0, 128))
    monkeypatch.setattr(LocalFeatures, "detect", lambda self, image: nothing)
    observations = seen(local_features.Detections(torch.zeros(3, 2), torch.ones(3, 128)))
    image = torch.zeros(3, 96, 130, dtype=torch.uint8)
    found = features.match_query(observations, query_of(image), torch.tensor([[120.0, 80.0]]))
    assert found.keypoints.shape == (3, 2) and not found.kept.any()


@pytest.mark.parametrize("name", ["DISK", "ALIKED"])
def test_weights_that_cannot_be_fetched_are_said(monkeypatch, name):
    def fail(*_):
        raise OSError("no network")

    monkeypatch.setattr(getattr(kornia.feature, name), "from_pretrained", fail)
    local_features._load_network.cache_clear()
    with pytest.raises(ConnectionError, match=f"{name.lower()} could not be fetched"):
        LocalFeatures(name.lower()).load()
    with pytest.raises(ConnectionError, match=f"{name.lower()} could not be fetched"):
        LocalFeatures(name.lower()).detect(torch.zeros(3, 64, 64, dtype=torch.uint8))


def test_weights_of_lightglue_are_asked_for_before_the_first_query(monkeypatch):
    asked = []
    monkeypatch.setattr(local_features, "_load_network", lambda name, *_: asked.append(name))
    LocalFeatures("sift").load()
    LocalFeatures("aliked", lightglue=True).load()
    assert asked == ["aliked", "lightglue-aliked"]


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """Torch hub's folder of files, empty; nothing can be fetched."""

    def fail(*_, **__):
        raise OSError("no network")

    for kind in (kornia.feature.DISK, kornia.feature.ALIKED):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    local_features._load_network.cache_clear()
    yield tmp_path / "home" / "hub" / "checkpoints"
    local_features._load_network.cache_clear()


def published(name: str, seed: int = 0) -> dict:
    """Random weights as ALIKED's and DISK's files hold them."""
    torch.manual_seed(seed)
    network = kornia.feature.DISK() if name == "disk" else kornia.feature.ALIKED(name)
    state = {key: value for key, value in network.state_dict().items() if "hw_grid" not in key}
    return {"extractor": state} if name == "disk" else state


@pytest.mark.cases
@pytest.mark.parametrize(("name", "file"), [("aliked", "aliked-n16"), ("disk", "disk")])
def test_weights_are_read_from_a_file_or_the_cache(no_cache, tmp_path, name, file):
    content, image = published(file), torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8)
    torch.save(content, tmp_path / "mine.pth")
    given = LocalFeatures(name, 64, weights=tmp_path / "mine.pth")
    given.load()
    network = local_features._load_network(name, given.weights)
    assert not network.training
    for key, value in content.get("extractor", content).items():
        assert torch.equal(network.state_dict()[key], value)
    with pytest.raises(ConnectionError, match=rf"weights=PATH/[\w-]+\.pth, or place it at {no_cache}/[\w-]+\.pth"):
        LocalFeatures(name).load()
    no_cache.mkdir(parents=True)
    torch.save(content, no_cache / ("depth-save.pth" if name == "disk" else "aliked-n16.pth"))
    found, cached = given.detect(image), LocalFeatures(name, 64).detect(image)
    assert torch.equal(found.descriptors, cached.descriptors) and torch.equal(found.keypoints, cached.keypoints)
    torch.save(published(file, seed=1), tmp_path / "other.pth")
    others = {LocalFeatures(name, weights=w).identity for w in (None, given.weights, tmp_path / "other.pth")}
    assert len(others) == 3  # so that a map is never used with the weights of another


@pytest.mark.cases
def test_a_wrong_file_of_weights_is_said_by_name(no_cache, tmp_path, monkeypatch):
    whole = tmp_path / "aliked-n16.pth"
    torch.save(published("aliked-n16"), whole)
    wrong = {
        "cut.pth": (whole.read_bytes()[:100_000], "is damaged"),
        "empty.pth": (b"", "is damaged"),
        "page.pth": (b"<html>404</html>", "is damaged"),
        "code.pth": (b"cos\nsystem\n(S'false'\ntR.", "execute code|is damaged"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*({message})"):
            LocalFeatures("aliked", weights=tmp_path / name).load()
    for variant in ("aliked-t16", "aliked-n32"):
        torch.save(published(variant), tmp_path / "x.pth")
        with pytest.raises(ValueError, match=rf"x\.pth holds the weights of {variant}; expected those of aliked-n16"):
            LocalFeatures("aliked", weights=tmp_path / "x.pth").load()
    torch.save(published("disk"), tmp_path / "disk.pth")
    with pytest.raises(ValueError, match=r"disk\.pth.*(fit ALIKED|expected tensors by name)"):
        LocalFeatures("aliked", weights=tmp_path / "disk.pth").load()
    with pytest.raises(ValueError, match=r"aliked-n16\.pth.*does not fit DISK: 26 missing"):
        LocalFeatures("disk", weights=whole).load()
    with pytest.raises(FileNotFoundError, match=r"none\.pth is not a file .*weights.*expected aliked-n16\.pth"):
        LocalFeatures("aliked", weights=tmp_path / "none.pth").load()
    no_cache.mkdir(parents=True)
    (no_cache / "aliked-n16.pth").write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"checkpoints/aliked-n16\.pth.*is damaged"):
        LocalFeatures("aliked").load()
    with pytest.raises(ValueError, match="sift has none"):
        LocalFeatures("sift", weights=whole)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="superpoint"):
        LocalFeatures("superpoint")
    with pytest.raises(ValueError, match="not with sift"):
        LocalFeatures("sift", lightglue=True)


class DISK(torch.nn.Module):
    """Stands for kornia's: finds two keypoints, and remembers where its image was."""

    def forward(self, image, **_):
        self.device = image.device
        return [SimpleNamespace(keypoints=torch.zeros(2, 2), descriptors=torch.ones(2, 128),
                                detection_scores=torch.ones(2))]  # fmt: skip


def test_learned_features_run_on_the_localizers_device(monkeypatch):
    network = DISK()
    monkeypatch.setattr(local_features, "_load_network", lambda *_: network)
    pyramid = FeaturePyramid((torch.zeros(1, 1, 1, 1, device="meta"),), (8,))
    query = Query("q", torch.zeros(3, 32, 32, dtype=torch.uint8), pyramid, None, None)
    observations = seen(Detections(torch.zeros(3, 2), torch.ones(3, 128)))
    found = LocalFeatures("disk").match_query(observations, query, torch.tensor([[32.0, 32.0]]))
    assert network.device.type == "meta" and found.keypoints.device.type == "cpu"


@pytest.mark.cases
def test_weights_of_lightglue_are_read_from_a_file(no_cache, tmp_path):
    settings = kornia.feature.LightGlue.features["disk"] | {"weights": None}
    torch.manual_seed(0)
    made = kornia.feature.LightGlue(None, **settings).state_dict()
    names = {key: re.sub(r"^transformers\.(\d+)\.(self|cross)_attn", r"\2_attn.\1", key) for key in made}
    torch.save({names[key]: value for key, value in made.items() if "threshold" not in key}, tmp_path / "mine.pth")
    matcher = local_features._load_network("lightglue-disk", tmp_path / "mine.pth")
    assert not matcher.training and any(key.startswith("self_attn.") for key in names.values())
    assert all(torch.equal(value, made[key]) for key, value in matcher.state_dict().items())
    (tmp_path / "cut.pth").write_bytes((tmp_path / "mine.pth").read_bytes()[:10_000])
    torch.save(published("disk"), tmp_path / "detector.pth")
    for name, message in (("cut", "is damaged"), ("detector", "does not fit LightGlue|expected tensors by name")):
        with pytest.raises(ValueError, match=rf"{name}\.pth.*({message})"):
            local_features._load_network("lightglue-disk", tmp_path / f"{name}.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth is not a file \(.*\.matcher\.lightglue_weights\)"):
        local_features._load_network("lightglue-disk", tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"lightglue_weights=x\.pth go with lightglue=true"):
        LocalFeatures("disk", lightglue_weights="x.pth")
