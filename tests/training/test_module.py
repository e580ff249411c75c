"""What a training step does: logged means, random numbers, images of several sizes, and steps that are left out."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from gnnet.data.batches import PairBatch, collate_by_size
from gnnet.data.datamodule import CorrespondenceData, DataModule
from gnnet.data.mixture import MixtureData
from gnnet.data.photometric import Photometric
from gnnet.localization.pose_loss import PoseLoss
from gnnet.losses.cross_entropy import CrossEntropy
from gnnet.losses.gauss_newton import GaussNewton
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import PyramidPair
from gnnet.models.pyramid import FeaturePyramid
from gnnet.models.unet import UNet
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.training.checkpoints import EpochCheckpoint
from gnnet.training.module import FeatureLearning
from tests.training.two_processes import two_processes


def pair(index: int, side: int = 32) -> PairBatch:
    """A sample of random pixels, matched with itself."""
    generator = torch.Generator().manual_seed(index)
    image = torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)
    points = torch.rand(20, 2, generator=generator) * (side - 8) + 4
    ones = torch.ones(20)
    return PairBatch(image, image, points, points, ones, ones > 0, torch.tensor(index), torch.tensor(0))


class Pairs(pl.LightningDataModule):
    """Batches of two pairs, in order; processes take turns."""

    def __init__(self, samples: list[PairBatch]) -> None:
        super().__init__()
        self.samples = samples

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        share = self.samples[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(share, batch_size=2, collate_fn=collate_by_size)  # type: ignore[arg-type]

    def pair_name(self, index: int) -> str:
        return f"pair number {index}"


def make(*, levels: list[int] | None = None, **settings) -> FeatureLearning:
    torch.manual_seed(0)
    network = UNet(widths=(8, 8), strides=(2, 1), channels=4)
    loss = PairLoss(terms={"gn": GaussNewton()}, levels=levels)
    return FeatureLearning(network=network, loss=loss, optimizer=partial(torch.optim.AdamW, lr=1e-3), **settings)


def fit(module: FeatureLearning, data: pl.LightningDataModule, folder: Path, *, resume=None, **settings) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=pl.loggers.CSVLogger(folder, name="", version=""), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
        **({"devices": 1, "enable_checkpointing": False, "gradient_clip_val": 1.0} | settings),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


class Recording(PairLoss):
    """Keeps the geometry of the batches that it is given."""

    found: list

    def forward(self, pair, **settings):
        self.found.append(pair.batch.geometry)
        return super().forward(pair, **settings)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("term", [CrossEntropy(), PoseLoss(iterations=1)], ids=["nce", "pose"])
def test_points_are_triangulated_only_for_a_loss_that_refines_poses(toy_root, tmp_path, term, mixed):
    data: DataModule = CorrespondenceData(
        scene=partial(load_robotcar, progress=False), root=toy_root, batch_size=2, num_workers=0, validation_fraction=0
    )
    if mixed:
        data = MixtureData(sources={"toy": data}, batch_size=2, pairs_per_epoch=2, num_workers=0)
    module = make()
    module.loss, wanted = Recording(terms={"term": term}), isinstance(term, PoseLoss)
    module.loss.found = []
    data.setup()
    fit(module, data, tmp_path, max_steps=1)
    assert len(module.loss.found) == 1 and (module.loss.found[0] is not None) == wanted


def test_confidence_without_a_loss_that_trains_it_is_refused():
    network = UNet(widths=(8, 8), strides=(2, 1), channels=4, confidence=True)
    terms = {"nce": CrossEntropy(), "pose": PoseLoss(start_step=10)}
    FeatureLearning(network=network, loss=PairLoss(terms=terms), optimizer=torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"no term of the loss \(nce\) trains.*loss=nce_pose"):
        FeatureLearning(network=network, loss=PairLoss(terms={"nce": CrossEntropy()}), optimizer=torch.optim.AdamW)


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of each line of a log that has a value."""
    with (folder / "metrics.csv").open() as file:
        return [(int(line["step"]), float(line[name])) for line in csv.DictReader(file) if line.get(name)]


class Nan(torch.autograd.Function):
    """The same values; their gradient is not a number."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * torch.nan


class BrokenNetwork(nn.Module):
    """Gives NaN, or a gradient of NaN, for batches that hold a black image."""

    def __init__(self, network: nn.Module, broken: str) -> None:
        super().__init__()
        self.network, self.broken = network, broken

    def forward(self, images: torch.Tensor) -> FeaturePyramid:
        maps, strides, _ = self.network(images)
        if (images == 0).flatten(1).all(1).any():
            maps = tuple(m * torch.nan if self.broken == "loss" else Nan.apply(m) for m in maps)
        return FeaturePyramid(maps, strides)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_its_pairs_are_named(tmp_path, caplog, broken):
    samples = [pair(i) for i in range(8)]
    black = torch.zeros_like(samples[3].image_a)
    samples[3] = samples[3]._replace(image_a=black, image_b=black)
    module = make()
    module.network = BrokenNetwork(module.network, broken)
    weights: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            weights.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))

    fit(module, Pairs(samples), tmp_path, callbacks=[Watch()], max_epochs=1)
    assert torch.equal(weights[0], weights[1])  # the second step has the bad pair
    assert weights[3].isfinite().all() and not torch.equal(weights[1], weights[2])
    assert f"step 1 is left out: its {broken} is not finite; pair number 2, pair number 3" in caplog.text
    assert "number 4" not in caplog.text
    assert [value for _, value in logged(tmp_path, "train/skipped_steps")] == [1.0]


def test_too_many_steps_that_are_not_finite_end_the_training(tmp_path):
    module = make(max_skipped_steps=1)
    module.network = BrokenNetwork(module.network, "loss")
    black = pair(0)._replace(image_a=torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(FloatingPointError, match=r"step 1 is left out.*Training ends, as 1 steps were left out"):
        fit(module, Pairs([black] * 8), tmp_path, max_epochs=1)


def test_images_of_several_sizes_are_run_apart(tmp_path, monkeypatch):
    """GroupNorm sees the whole image, so that black padding would change the features."""
    monkeypatch.setattr("gnnet.losses.gauss_newton.uniform", lambda shape, **_: torch.full(shape, 0.7))
    losses = []
    for samples in ([pair(0, 32)], [pair(1, 48)], [pair(0, 32), pair(1, 48)]):
        fit(make(), Pairs(samples), tmp_path / str(len(losses)), max_epochs=1)
        losses += [value for _, value in logged(tmp_path / str(len(losses)), "train/loss")]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-6)


def test_the_batches_of_an_accumulated_step_draw_different_numbers(tmp_path, monkeypatch):
    drawn: list[float] = []
    original = GaussNewton.forward

    def forward(self, pair, numbers, *, step):
        drawn.append(numbers.mean().item())
        return original(self, pair, numbers, step=step)

    monkeypatch.setattr(GaussNewton, "forward", forward)
    fit(make(), Pairs([pair(i) for i in range(8)]), tmp_path, max_epochs=1, accumulate_grad_batches=2)
    assert len(drawn) == len(set(drawn)) == 16  # four batches, two levels, both directions


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_network_and_leaves_no_trace_in_the_weights(monkeypatch):
    plain, batch = make(), collate_by_size([pair(i) for i in range(2)])[0]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled = make(compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    gradients = []
    for module in (plain, compiled):
        inputs = PyramidPair(*module.pair_features(batch, None), batch)
        module.loss(inputs, step=0, generator=torch.Generator().manual_seed(0))[0].backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients)


def test_augmentation_is_exact_under_autocast():
    module = make(photometric=Photometric.of_strength(1))
    seen: list[torch.Tensor] = []
    module.network.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    (batch,) = collate_by_size([pair(0), pair(1)])
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            module.pair_features(batch, torch.Generator().manual_seed(0))
    assert torch.equal(*seen)


@pytest.mark.parametrize("validates", [False, True])
def test_a_resumed_run_sees_the_batches_and_counts_the_steps_of_a_whole_one(tmp_path, validates):
    data, seen = Pairs([pair(i) for i in range(4)]), []
    if validates:
        data.val_dataloader = lambda: DataLoader([0])  # type: ignore[method-assign]

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batches, index):
            seen.append((trainer.current_epoch, index, [i for batch in batches for i in batch.index.tolist()]))

    saved = tmp_path / "first" / "last.ckpt"
    for name, steps, resume in (("whole", 6, None), ("first", 2, None), ("second", 6, saved)):
        last = EpochCheckpoint(dirpath=tmp_path / name, filename="last")
        fit(
            make(), data, tmp_path / name, max_steps=steps, resume=resume, enable_checkpointing=True,
            callbacks=[Watch(), last, pl.callbacks.LearningRateMonitor("step")], num_sanity_val_steps=0,
        )  # fmt: skip
    assert seen[:6] == seen[6:]
    for name in ("train/loss", "lr-AdamW"):
        both = logged(tmp_path / "first", name) + logged(tmp_path / "second", name)
        assert [step for step, _ in both] == [step for step, _ in logged(tmp_path / "whole", name)] == list(range(6))


@pytest.mark.slow
def test_two_processes_log_what_all_see_and_a_loss_may_leave_out_a_level(tmp_path):
    samples = [pair(i)._replace(skipped=torch.tensor(i)) for i in range(4)]
    fit(make(levels=[0]), Pairs(samples), tmp_path, max_epochs=1, devices=2, strategy=two_processes())
    module, losses = make(levels=[0]), []
    for rank in range(2):
        (batch,) = collate_by_size(samples[rank::2])
        generator = torch.Generator().manual_seed(rank)  # step 0 of seed 0
        loss, _ = module.loss(PyramidPair(*module.pair_features(batch, None), batch), step=0, generator=generator)
        losses.append(loss.item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert [value for _, value in logged(tmp_path, "train/loss")] == [pytest.approx(sum(losses) / 2, rel=1e-5)]
    assert [value for _, value in logged(tmp_path, "train/broken_pairs")] == [sum(range(4))]
