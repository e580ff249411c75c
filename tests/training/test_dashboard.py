"""What a run sends to wandb and TensorBoard, read back from their files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from gnnet.data.images import read_image
from gnnet.training.callbacks import Speed
from gnnet.training.dashboard import wandb_logger
from gnnet.training.sweep import job_status
from tests.training.test_entry_points import ROOT, on_toy
from tests.training.wandb_file import read_wandb_run


def train_offline(toy_root: Path, output: Path, *overrides: str) -> None:
    small = ["dataset.validation_queries=2", "logger=wandb", "logger.wandb.offline=true"]
    cfg = on_toy(toy_root, output, *small, *overrides)
    with open_dict(cfg):
        cfg.logger.tensorboard = OmegaConf.load(ROOT / "conf/logger/tensorboard.yaml").tensorboard
    train.run(cfg)


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_run_with_settings_figures_and_pictures(toy_root, tmp_path):
    import wandb  # slow

    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    train_offline(toy_root, first, "+trainer.max_epochs=1")
    train_offline(toy_root, second, f"checkpoint={first}/checkpoints/last.ckpt")
    assert wandb.run is None
    runs = [read_wandb_run(folder / "wandb") for folder in (first, second)]
    assert runs[0].id == runs[1].id == (second / "wandb_id.txt").read_text().strip()
    assert [run.name for run in runs] == ["runs/first", "runs/second"]
    pictures = {"before_after_night", "features_night", "matches_night", "overview", "convergence_basin"}
    for folder, run in zip((first, second), runs, strict=True):
        assert run.config["model"]["channels"] == 8 and run.config["optimizer"]["lr"] == 1e-3
        figures = {"train/loss", "train/dmc/stride8", "train/gradient_norm", "lr-AdamW", "speed/pairs_per_s"}
        figures |= {"speed/waiting_for_data", "memory/host_gib", "val/night/recall_0.25m_2deg", "val/score"}
        assert figures <= set(run.history)
        assert run.summary["best_checkpoint"] == str(folder / "checkpoints" / "best.ckpt")
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
        assert figures <= set(events.Tags()["scalars"])
        assert {"config/text_summary", "best_checkpoint/text_summary"} <= set(events.Tags()["tensors"])
        for name in pictures:
            [[picture]] = run.history[f"pictures/{name}/filenames"]
            [file] = folder.glob(f"wandb/offline-run-*/files/{picture}")
            [event] = events.Images(f"pictures/{name}")
            image = read_image(file)
            assert (event.height, event.width) == image.shape[1:] and image.float().std() > 10
    assert [max(run.history["trainer/global_step"]) for run in runs] == [1, 3]  # counted from 0


def test_each_folder_is_a_run_of_wandb_and_the_jobs_of_a_sweep_are_a_group(tmp_path):
    for name in ("0_loss-dmc", "1_loss-gn"):
        with job_status(tmp_path / "sweep" / "time" / name):
            pass
    jobs = [wandb_logger(output_dir=folder, project="p") for folder in sorted((tmp_path / "sweep" / "time").iterdir())]
    assert [job._wandb_init["name"] for job in jobs] == ["time/0_loss-dmc", "time/1_loss-gn"]
    assert {job._wandb_init["group"] for job in jobs} == {"sweep/time"}
    assert len({job.version for job in jobs}) == 2
    again = wandb_logger(output_dir=tmp_path / "sweep" / "time" / "0_loss-dmc", name="mine", group=None)
    assert (again.version, again._wandb_init["name"]) == (jobs[0].version, "mine")
    alone = wandb_logger(output_dir=tmp_path / "alone", checkpoint=tmp_path / "older" / "checkpoints" / "last.ckpt")
    assert alone.version not in {job.version for job in jobs} and alone._wandb_init["group"] is None


def test_speed_counts_the_pairs_of_all_processes_and_the_time_without_a_batch(monkeypatch):
    clock, logged = iter([0.0, 3.0, 4.0, 4.5, 5.0, 5.0, 6.0, 8.0]), []
    monkeypatch.setattr("gnnet.training.callbacks.time.monotonic", lambda: next(clock))
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((step, values)))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=2, loggers=[logger])
    module, batch = SimpleNamespace(device=torch.device("cpu")), [SimpleNamespace(index=range(3))]
    speed = Speed()
    speed.on_train_epoch_start(trainer, module)
    for step in (1, 2):  # waits 3 s, works 1 s; waits 0.5 s, works 0.5 s
        speed.on_train_batch_start(trainer, module, batch, step)
        trainer.global_step = step
        speed.on_train_batch_end(trainer, module, None, batch, step)
    [(step, values)] = logged
    assert step == 1 and values["speed/pairs_per_s"] == 12 / 5 and values["speed/waiting_for_data"] == 3.5 / 5
    assert 0.01 < values["memory/host_gib"] < 1000 and "memory/gpu_gib" not in values
    speed.on_train_batch_start(trainer, module, batch, 3)  # a further batch of the same step
    speed.on_train_batch_end(trainer, module, None, batch, 3)
    assert len(logged) == 1
