"""Runs that are interrupted anywhere and go on: their weights are those of a run that was not, bit by bit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.multiprocessing import ProcessExitedException

from gnnet.data.datamodule import CorrespondenceData, DataModule
from gnnet.data.mixture import MixtureData
from gnnet.losses.gauss_newton import GaussNewton
from gnnet.losses.pair_loss import PairLoss
from gnnet.models.unet import UNet
from gnnet.scenes.layouts.homography import load_homography
from gnnet.training.checkpoints import EpochCheckpoint, WholeFiles, find_checkpoint
from gnnet.training.module import FeatureLearning, warmup_cosine
from gnnet.training.sigterm import EndOnSigterm, Terminated
from tests.training.two_processes import two_processes

STEPS = 9


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(7):
        image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((40, 40))
        image.save(folder / f"{i}.png")
    return folder


def make_data(photographs: Path, *, mixed: bool = False, **settings) -> DataModule:
    """Epochs of five batches of two pairs, in passes over seven photographs."""
    settings = {"batch_size": 2, "pairs_per_epoch": 10, "num_workers": 0, "seed": 3, **settings}
    own = {"correspondences": 16, "crop": 32, "warp": 0.5, "validation_fraction": 0}
    source = CorrespondenceData(scene=load_homography, root=photographs, **own, **settings)
    data = MixtureData(sources={"a": source, "b": source}, **settings) if mixed else source
    data.setup()
    return data


class Watch(pl.Callback):
    """Notes the pairs of each batch, and does something before one batch of the run."""

    def __init__(self, before: int | None = None, act: Callable[[], object] = int) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.before, self.act = before, act

    def on_train_batch_start(self, trainer, module, batches, index):
        if trainer.fit_loop.total_batch_idx == self.before:
            self.act()
        self.seen.append((index, [i for batch in batches for i in batch.index.tolist()]))


class Killed(BaseException):
    """Ends a run where it stands."""


def kill() -> None:
    raise Killed


def fit(data: DataModule, folder: Path, watch: Watch, *, resume: Path | None = None, **settings) -> FeatureLearning:
    torch.manual_seed(0)
    module = FeatureLearning(
        network=UNet(widths=(4, 4), strides=(2, 1), channels=2), loss=PairLoss(terms={"gn": GaussNewton()}),
        optimizer=partial(torch.optim.AdamW, lr=1e-2), seed=1,
        scheduler=partial(warmup_cosine, warmup_steps=2, total_steps=STEPS),
    )  # fmt: skip
    last = EpochCheckpoint(dirpath=folder / "checkpoints", filename="last", every_n_train_steps=2)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=STEPS, gradient_clip_val=1.0, default_root_dir=folder,
        callbacks=[watch, EndOnSigterm(last.path), last], plugins=[WholeFiles()], use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, **{"devices": 1, **settings},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


CASES = [
    pytest.param({}, {}, id="one dataset"),
    pytest.param({"mixed": True}, {}, id="mixture"),
    pytest.param({}, {"accumulate_grad_batches": 2}, id="accumulated"),
    pytest.param({"num_workers": 2}, {}, id="workers", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("of_data", "of_trainer"), CASES)
@pytest.mark.parametrize("before", [4, 8])
def test_a_run_that_was_killed_goes_on_with_the_next_batch_of_the_epoch(
    photographs, tmp_path, of_data, of_trainer, before
):
    data = partial(make_data, photographs, **of_data)
    seen = [Watch(), Watch(before, kill), Watch()]
    whole = fit(data(), tmp_path / "whole", seen[0], **of_trainer)
    with pytest.raises(Killed):
        fit(data(), tmp_path / "run", seen[1], **of_trainer)
    saved = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = fit(data(), tmp_path / "again", seen[2], resume=saved, **of_trainer)
    assert_same(whole, resumed)
    went_on = len(seen[0].seen) - len(seen[2].seen)
    assert seen[0].seen[went_on:] == seen[2].seen
    assert went_on % 5 and before - 3 <= went_on <= before  # in mid-epoch, and little is lost


@pytest.fixture(scope="module")
def whole_of_two(photographs, tmp_path_factory) -> tuple[FeatureLearning, Path]:
    """What two processes learn without an interruption, and a copy of their checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("two")
    saved, copy = folder / "run" / "checkpoints" / "last.ckpt", folder / "copy.ckpt"
    data = make_data(photographs, pairs_per_epoch=20)
    return fit_two(data, folder / "run", Watch(3, partial(shutil.copy, saved, copy))), copy


@pytest.mark.slow
def test_two_processes_go_on_each_with_its_own_share(photographs, whole_of_two, tmp_path):
    whole, copy = whole_of_two
    assert torch.load(copy, weights_only=True)["global_step"] == 2
    resumed = fit_two(make_data(photographs, pairs_per_epoch=20), tmp_path / "again", Watch(), resume=copy)
    assert_same(whole, resumed)


def fit_two(data: DataModule, folder: Path, watch: Watch, **settings) -> FeatureLearning:
    """`fit` on two processes."""
    return fit(data, folder, watch, devices=2, strategy=two_processes(), **settings)


def ask_the_second() -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_two_processes_end_at_the_same_step_although_only_the_second_is_asked(photographs, whole_of_two, tmp_path):
    data = partial(make_data, photographs, pairs_per_epoch=20)
    with pytest.raises(ProcessExitedException) as ended:
        fit_two(data(), tmp_path / "run", Watch(3, ask_the_second))
    assert ended.value.exit_code == 143
    saved = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    assert_same(whole_of_two[0], fit_two(data(), tmp_path / "again", Watch(), resume=saved))


def test_no_step_asks_all_processes_whether_to_end(photographs, tmp_path, monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", lambda _, own, **__: asked.append(own))
    fit(make_data(photographs), tmp_path, Watch())
    assert asked == [False] * 3  # before both epochs, and at the end


@pytest.mark.slow
def test_sigterm_ends_a_run_after_its_step_and_it_goes_on_from_there(photographs, tmp_path, capsys):
    """Also where the step is the last of an epoch, after its checkpoint, or of the run."""
    ask = partial(os.kill, os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    whole = fit(make_data(photographs), tmp_path / "whole", Watch())
    saved, resume, seen = tmp_path / "run" / "checkpoints" / "last.ckpt", None, []
    for batch, step in ((2, 3), (4, 5), (7, 8)):
        watch = Watch(batch, ask)
        with pytest.raises(Terminated) as ended:
            fit(make_data(photographs), tmp_path / "run", watch, resume=resume)
        assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
        assert f"Ended by SIGTERM after step {step}; to go on, give the same command line and checkpoint={saved}" in (
            capsys.readouterr().out
        )
        seen, resume = seen + watch.seen, saved
        assert len(seen) == step
    assert_same(whole, fit(make_data(photographs), tmp_path / "end", Watch(), resume=saved))
    with pytest.raises(Terminated):
        fit(make_data(photographs), tmp_path / "end", Watch(8, ask), resume=saved)
    assert "after step 9; all are done: python evaluate.py checkpoint=" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)

    def full(content, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_run_is_found_by_last_and_a_run_by_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .* has left checkpoints/last\.ckpt \(checkpoint=last\)"):
        find_checkpoint("last", runs=tmp_path)
    for age, name in enumerate(("new/one", "old/two")):
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))
    (tmp_path / "newest").mkdir()  # wrote none
    assert find_checkpoint("last", runs=tmp_path) == tmp_path / "new/one/checkpoints/last.ckpt"
    assert find_checkpoint(str(tmp_path / "old/two"), runs="x") == tmp_path / "old/two/checkpoints/last.ckpt"
    assert find_checkpoint("some.ckpt", runs="x") == Path("some.ckpt")
    with pytest.raises(FileNotFoundError, match=r"newest/checkpoints/last\.ckpt does not exist; expected a \.ckpt"):
        find_checkpoint(tmp_path / "newest", runs="x")
