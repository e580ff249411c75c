"""The data module of one dataset."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl

from gnnet.data.datamodule import CorrespondenceData
from gnnet.data.pairs import PairDataset
from gnnet.scenes.layouts.robotcar import load_robotcar


def test_toy_and_robotcar_train_and_validate_on_different_places(toy_root):
    data = CorrespondenceData(scene=load_robotcar, root=toy_root, num_workers=0, validation_fraction=0.34)
    data.setup()
    train, validation = set(data.train_pairs.scene.places), set(data.validations[0].scene.places)
    assert len(train) == 2 and len(validation) == 1 and not train & validation


def test_conditions_are_chosen(toy_root):
    data = CorrespondenceData(
        scene=load_robotcar, root=toy_root, num_workers=0, conditions=["night", "sun"], validation_fraction=0.34
    )
    data.setup()
    assert data.validations[0].conditions == ("night", "sun")
    scene = data.train_pairs.scene
    assert {scene.images[pair.image_b].condition for pair in scene.pairs} == {"night", "sun"}


def test_an_epoch_without_a_batch_is_said(toy_root):
    data = CorrespondenceData(scene=load_robotcar, root=toy_root, batch_size=1000, validation_fraction=0.34)
    data.setup()
    data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"holds no batch of 1000 .* lower dataset\.batch_size"):
        data.train_dataloader()


def test_settings_of_the_reader_are_passed_on_and_others_refused(toy_root):
    data = CorrespondenceData(
        scene=load_robotcar, root=toy_root, num_workers=0, validation_fraction=0.34, cameras=["rear"]
    )
    data.setup()
    assert data.train_pairs is not None
    with pytest.raises(ValueError, match=r"dataset\.camras is not known; the dataset's settings are .*cameras"):
        CorrespondenceData(scene=load_robotcar, root=toy_root, camras=["rear"])


@pytest.mark.slow
def test_validation_places_are_chosen_by_name_or_none(toy_root):
    settings = {"scene": load_robotcar, "root": toy_root, "num_workers": 0}
    data = CorrespondenceData(**settings, validation_places=["002"])
    data.setup()
    assert data.validations[0].scene.places == ("002",) and data.train_pairs.scene.places == ("001", "003")
    with pytest.raises(ValueError, match=r"validation_places names 009, .*001, 002, 003"):
        CorrespondenceData(**settings, validation_places=["009"]).setup()
    whole = CorrespondenceData(**settings, validation_fraction=0)
    whole.setup()
    assert whole.validations == [] and len(whole.train_pairs.scene.places) == 3
    only = CorrespondenceData(**(settings | {"root": None}), validation_root=toy_root)
    only.setup()
    assert only.train_pairs is None and len(only.validations[0]) > 0


def test_a_truncated_image_ends_before_training_or_is_left_out(toy_root, tmp_path):
    root = Path(shutil.copytree(toy_root, tmp_path / "town"))
    broken = sorted((root / "robotcar/images/night/rear").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:500])
    settings = {"scene": load_robotcar, "root": root, "num_workers": 0, "validation_fraction": 0.34}
    with pytest.raises(ValueError, match=broken.name):
        CorrespondenceData(**settings).setup()
    data = CorrespondenceData(**settings, on_bad="skip")
    data.setup()
    names = set(data.train_pairs.scene.images) | set(data.validations[0].scene.images)
    assert f"night/rear/{broken.name}" not in names and len(names) > 20


def test_a_file_that_breaks_after_the_check_is_passed_over_and_counted(toy_root, tmp_path):
    root = Path(shutil.copytree(toy_root, tmp_path / "town"))
    scene = load_robotcar(root, progress=False)
    settings = {"correspondences": 20, "largest_side": None, "crop": None, "seed": 0}
    scene.pairs[0].correspondences.write_bytes(b"garbled")
    with pytest.raises(RuntimeError, match=rf"pair 0 .*{scene.pairs[0].correspondences.name}"):
        PairDataset(scene, **settings)[0, 0]
    other = PairDataset(scene, **settings, on_bad="skip")[0, 0]
    assert other.skipped == 1 and other.index != 0


@pytest.mark.slow
@pytest.mark.cases
def test_a_map_needs_no_training_pair_no_split_and_no_query_of_known_pose(toy_root):
    def few(root, **settings):
        """Three photographs of one place without pairs: nothing to train on, nothing to validate."""
        scene = load_robotcar(root, progress=False).with_places(["001"]).with_conditions(["overcast-reference"])
        return replace(scene, pairs=())

    data = CorrespondenceData(scene=few, root=toy_root, num_workers=0)
    data.setup("predict")
    assert len(data.validations[0].scene.images) == 3 and data.train_pairs is None
    with pytest.raises(ValueError, match="1 place, so it cannot be split"):
        data.setup("validate")
    with pytest.raises(ValueError, match="holds no training pair"):
        CorrespondenceData(scene=few, root=toy_root, validation_root=toy_root).setup("fit")
    only = CorrespondenceData(scene=few, root=toy_root, validation_root=toy_root, num_workers=0)
    only.setup("validate")
    assert only.train_pairs is None and len(only.validations[0]) == 3


@pytest.mark.slow
def test_the_map_for_listed_queries_is_of_the_whole_scene(toy_root):
    settings = {"scene": load_robotcar, "root": toy_root, "num_workers": 0, "validation_fraction": 0.34}
    held_back, whole = (CorrespondenceData(**settings) for _ in range(2))
    held_back.setup("predict")
    whole.setup("predict", whole=True)
    assert len(held_back.validations[0].scene.places) == 1 and len(whole.validations[0].scene.places) == 3
    held_back.setup()  # what was left out is prepared when it is needed
    assert len(held_back.train_pairs.scene.places) == 2


@pytest.mark.cases
@pytest.mark.slow
def test_a_query_whose_pixels_cannot_be_decoded_is_left_out_of_validation(toy_root, tmp_path, caplog):
    """Its header and its end are sound, so that only decoding it tells."""
    root = Path(shutil.copytree(toy_root, tmp_path / "town"))
    settings = {"scene": load_robotcar, "root": None, "validation_root": root, "num_workers": 0}
    whole = CorrespondenceData(**settings)
    whole.setup("validate")
    count, broken = len(whole.validations[0]), root / "robotcar/images" / whole.validations[0].samples[-1].query
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 : -2] = b"\xff\xc4\0\1" * ((len(content) - len(content) // 2 - 2) // 4)
    broken.write_bytes(content)
    data = CorrespondenceData(**settings, on_bad="skip")
    data.setup("validate")
    (validation,) = data.validations
    batches = [batch for several in data.all_of(validation) for batch in several]
    assert len(validation) == count - 1 == sum(len(batch.name) for batch in batches)
    assert f"leaves out 1 of {count} samples" in caplog.text and broken.name in caplog.text
