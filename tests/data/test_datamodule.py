"""The data module of one dataset."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl

from gnnet.data.datamodule import CorrespondenceData
from gnnet.scenes.robotcar import load_robotcar


def test_toy_and_robotcar_train_and_validate_on_different_places(toy_root):
    data = CorrespondenceData(scene=load_robotcar, root=toy_root, num_workers=0, validation_fraction=0.34)
    data.setup()
    train, validation = set(data.train_pairs.scene.places), set(data.queries.scene.places)
    assert len(train) == 2 and len(validation) == 1 and not train & validation


def test_conditions_are_chosen(toy_root):
    data = CorrespondenceData(
        scene=load_robotcar, root=toy_root, num_workers=0, conditions=["night", "sun"], validation_fraction=0.34
    )
    data.setup()
    assert data.queries.conditions == ("night", "sun")
    scene = data.train_pairs.scene
    assert {scene.images[pair.image_b].condition for pair in scene.pairs} == {"night", "sun"}


def test_an_epoch_without_a_batch_is_said(toy_root):
    data = CorrespondenceData(scene=load_robotcar, root=toy_root, batch_size=1000, validation_fraction=0.34)
    data.setup()
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"holds no batch of 1000 .* lower dataset\.batch_size"):
        data.train_dataloader()
