"""Mixtures: how often each source is drawn, and that each is validated on its own."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pytorch_lightning.accelerators import CPUAccelerator

from gnnet.data import sampler as sampler_module
from gnnet.data.datamodule import CorrespondenceData
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.data.mixture import MixtureData
from gnnet.data.queries import LocalizationDataset
from gnnet.data.sampler import MixtureSampler
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.layouts.timelapse import load_timelapse


def sample(lengths=(10, 5), weights=(3, 1), *, batches=200, mixed=False, epoch=0, seed=0, done=0):
    batches = MixtureSampler(
        lengths, weights, batch_size=4, batches=batches, mixed=mixed, seed=seed, progress=lambda: (epoch, done)
    )
    assert len(list(batches)) == len(batches) - done
    return list(batches)


@pytest.mark.parametrize("mixed", [False, True])
def test_sources_are_drawn_by_weight_and_walked_through_evenly(mixed):
    batches = sample(mixed=mixed)
    drawn = [index for batch in batches for _, index in batch]
    share = np.mean([index < 10 for index in drawn])
    assert 0.68 < share < 0.82
    assert len({key for batch in batches for key in batch}) == 800  # never the same draw twice
    of_first = Counter(index for index in drawn if index < 10)
    assert max(of_first.values()) - min(of_first.values()) <= 1
    single = [len({index < 10 for _, index in batch}) == 1 for batch in batches]
    assert all(single) != mixed


def test_an_epoch_follows_from_seed_and_number():
    assert sample(epoch=3) == sample(epoch=3)
    assert sample(epoch=3, done=7) == sample(epoch=3)[7:]
    assert sample(epoch=3) != sample(epoch=4) and sample(epoch=3) != sample(epoch=3, seed=1)
    keys = [{key for batch in sample(epoch=e) for key in batch} for e in (0, 1)]
    assert not keys[0] & keys[1]


def test_processes_share_an_epoch(monkeypatch):
    parts = []
    for rank in range(2):
        monkeypatch.setattr(sampler_module, "_rank_and_world_size", lambda rank=rank: (rank, 2))
        parts.append(sample(batches=30))
    assert len(parts[0]) == len(parts[1]) == 30
    assert not {k for b in parts[0] for k in b} & {k for b in parts[1] for k in b}


def test_a_source_of_weight_zero_is_not_drawn():
    assert all(index >= 10 for batch in sample(weights=(0, 1)) for _, index in batch)


@pytest.fixture(scope="module")
def webcam(tmp_path_factory):
    root = tmp_path_factory.mktemp("webcam")
    generator = np.random.default_rng(0)
    for place in ("a", "b"):
        (root / place).mkdir()
        blocks = np.kron(generator.uniform(40, 220, (12, 16, 3)), np.ones((8, 8, 1)))
        for number in range(4):
            picture = (blocks * (0.4 if number == 3 else 1)).astype(np.uint8)
            Image.fromarray(picture).save(root / place / f"{number}.png")
    return root


def make(toy_root, webcam, **settings) -> MixtureData:
    town = CorrespondenceData(
        scene=load_robotcar, root=toy_root, validation_fraction=0.34, crop=64, correspondences=40, num_workers=0
    )
    cam = CorrespondenceData(
        scene=load_timelapse, root=webcam, validation_places=["b"], crop=64, warp=0.3, correspondences=40
    )
    return MixtureData(**({"sources": {"town": town, "cam": cam, "gone": None}, "num_workers": 0} | settings))


@pytest.mark.slow
def test_batches_of_all_sources_and_validation_of_each(toy_root, webcam):
    data = make(toy_root, webcam, weights={"cam": 2}, pairs_per_epoch=40, batch_size=4)
    data.setup()
    begun = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0)))
    data.trainer = SimpleNamespace(
        world_size=1, global_step=0, limit_train_batches=1.0, accumulate_grad_batches=1, accelerator=CPUAccelerator(),
        fit_loop=SimpleNamespace(epoch_loop=begun),
    )
    batches = list(data.train_dataloader())
    assert len(batches) == 10 and all(batch.image_a.shape == (4, 3, 64, 64) for (batch,) in batches)
    town, cam = (data.sources[name].train_pairs for name in ("town", "cam"))
    drawn = {index for (batch,) in batches for index in batch.index.tolist()}
    assert max(drawn) >= len(town)  # counted over all sources
    assert data.pair_name(0) == town.pair_name(0) and data.pair_name(len(town)) == cam.pair_name(0)
    assert [v.name for v in data.validations] == ["town", "cam"]
    assert isinstance(data.validations[0], LocalizationDataset) and isinstance(data.validations[1], MatchingDataset)
    assert data.validations[1].conditions == ("day-day", "day-dusk")
    assert set(data.sources["cam"].train_pairs.scene.places) == {"a"}
    pair = data.validations[1][0, 0]
    assert pair.image_a.shape == pair.image_b.shape and len(pair.keypoints_a) == len(pair.keypoints_b)


def test_wrong_settings_are_said(toy_root, webcam, tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.weights names moon; the sources are town, cam, gone"):
        make(toy_root, webcam, weights={"moon": 1})
    with pytest.raises(ValueError, match="zero or more"):
        make(toy_root, webcam, weights={"cam": -1})
    with pytest.raises(ValueError, match="no source of the mixture has both"):
        make(toy_root, webcam, weights={"cam": 0, "town": 0}).setup()
    broken = CorrespondenceData(scene=load_timelapse, root=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"source cam of.*nowhere[\s\S]*dataset\.sources\.cam=null"):
        MixtureData(sources={"cam": broken}).setup()
