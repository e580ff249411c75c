"""The first hour on a GPU: the tests that need one, the figures of speed, then training for the rest of the time.

    python -m benchmarks.gpu --minutes 60 [--data DIR] [--out DIR]

It ends after the given minutes whatever happens. Each part is a process of its own, which is stopped at its time; a
part that fails or is cut off says so, and the next begins. Figures are printed beside their limits as they come, and
written to OUT/gpu.json each time. OUT/gnnet.ckpt is the trained network, weights only, at most 15 MB. Nothing is
fetched. DIR holds what `experiment=photos` trains on; without it the toy town is rendered. `--device cpu --tiny` tries
the script.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

import train
from benchmarks.localize import POSES_LIMIT, QUERY_LIMIT, poses_a_second, stages
from gnnet.data.batches import PairBatch
from gnnet.localization.initial_pose import HybridPose
from gnnet.localization.localizer import Localizer
from gnnet.losses.contrastive import Contrastive
from gnnet.losses.gauss_newton import GaussNewton
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import PyramidPair
from gnnet.models.pyramid import pair_features
from gnnet.models.unet import UNet
from gnnet.toy.town import TownSettings, ensure_toy_town

ROOT = Path(__file__).parents[1]
SHARES = {"tests": 0.25, "training_step": 0.2, "poses": 0.05, "queries": 0.1}  # of the minutes; the rest trains
CONVOLUTIONS_AIM, CHECKPOINT_MB = 0.85, 15.0
TINY_TOWN = {"places": 3, "frames": 3, "query_frames": 2, "image_size": 96}

Figure = tuple[str, float, str]  # its name with the unit, the value, and the limit in words, or ""


def training_step(device: torch.device, *, tiny: bool, **_) -> Iterator[Figure]:
    """Pairs a second of whole training steps of `unet`, DMC + GN with 1024 points, and the convolutions' share."""
    for size in (64,) if tiny else (512, 1024):
        for mode in ("fp32", "bf16") if tiny else ("fp32", "bf16", "bf16 compiled"):
            torch.manual_seed(0)
            network = UNet(widths=(8, 16), strides=(2, 1)) if tiny else UNet(checkpointing=size > 512)
            step = _step(network.to(device), size, device, mode)
            for _ in range(1 if tiny else 3):
                step()
            seconds = statistics.median(_seconds(step, device) for _ in range(2 if tiny else 10))
            yield f"unet {size}² {mode}, pairs a second", 1 / seconds, ""
            share = _convolution_seconds(step, device) / seconds
            yield f"unet {size}² {mode}, share of the convolutions", share, f"aim {CONVOLUTIONS_AIM}"


def _step(network: UNet, size: int, device: torch.device, mode: str) -> Callable[[], None]:
    """A training step on one pair of random images."""
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, device=device)
    xy = (size / 8 + torch.rand(1, 1024, 2) * (0.75 * size)).to(device)
    ones = torch.ones(1, 1024, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    batch = PairBatch(images[:1], images[1:], xy, xy, ones, ones > 0, index, index)
    loss = PairLoss(terms={"dmc": Contrastive(), "gn": GaussNewton(weight=0.5)})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-7, fused=device.type == "cuda")
    features = torch.compile(network.forward) if "compiled" in mode else network

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in mode):
            pair = PyramidPair(*pair_features(features, batch.image_a, batch.image_b), batch)
            total, _ = loss(pair, step=1000, generator=torch.Generator(device).manual_seed(0))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begin


def _convolution_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step that the device spends in convolutions, forward and backward."""
    kinds = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profile:
        _seconds(step, device)
    events = [event for event in profile.key_averages() if "conv" in event.key and event.key.startswith("aten::")]
    return sum(event.self_device_time_total if cuda else event.self_cpu_time_total for event in events) / 1e6


def poses(device: torch.device, *, tiny: bool, **_) -> Iterator[Figure]:
    """Poses refined a second, with 512 points, 128 channels and three levels, for growing batches."""
    for batch in (2,) if tiny else (64, 256, 1024, 4096):
        found = poses_a_second(device, batch, *((64, 8) if tiny else ()))
        yield f"poses refined a second, batches of {batch}", found, f"aim {POSES_LIMIT}"


def queries(device: torch.device, *, tiny: bool, out: Path, **_) -> Iterator[Figure]:
    """Queries a second by stage, of both localizers that start from an image."""
    localizers = {"sparse_to_dense": Localizer()} | ({} if tiny else {"hybrid": Localizer(pose=HybridPose())})
    for name, localizer in localizers.items():
        found = stages(out / name, localizer, device, 2 if tiny else 20, large=not tiny, town=TINY_TOWN if tiny else {})
        for stage, seconds in (found | {"all stages": sum(found.values())}).items():
            limit = f"at least {1 / QUERY_LIMIT:.2f} on 2 CPU cores" if stage == "all stages" and not tiny else ""
            yield f"{name}, {stage}, queries a second", 1 / max(seconds, 1e-9), limit


def training(device: torch.device, *, tiny: bool, out: Path, data: Path | None, seconds: float) -> Iterator[Figure]:
    """Train for about so many seconds, and leave the weights."""
    cfg = configuration(device, out, data, tiny=tiny, seconds=seconds)
    prepared, module, trainer = train.prepare(cfg)
    begin = time.monotonic()
    trainer.fit(module, datamodule=prepared)
    yield "training, steps a second", trainer.global_step / (time.monotonic() - begin), ""
    yield "checkpoint, MB", save(module, trainer.global_step, out / "gnnet.ckpt"), f"at most {CHECKPOINT_MB:g}"


def configuration(device: torch.device, out: Path, data: Path | None, *, tiny: bool, seconds: float) -> DictConfig:
    """Settings of train.py: those of `experiment=photos`, or without a folder of data its network on a toy town."""
    trainer = ["trainer=gpu"] if device.type == "cuda" else ["trainer=cpu"]
    quiet = ["~callbacks", "~logger", "trainer.enable_progress_bar=false"]
    choice = ["experiment=photos", f"data={data}"]
    if data is None:
        town = ensure_toy_town(out / "town", TownSettings(**(TINY_TOWN if tiny else {})), progress=False)
        small = ["model.widths=[16,32,64,128,128]", "model.strides=[16,8,2]", "model.channels=[64,128,32]",
                 "dataset.crop=224", "steps=6000"]  # fmt: skip
        choice = ["dataset=robotcar", "model=unet_small", "loss=nce_gn", f"dataset.root={town}",
                  "dataset.batch_size=2", "dataset.validation_fraction=0.34",
                  *(["dataset.crop=64", "dataset.num_workers=0", "steps=2"] if tiny else small)]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [*choice, *trainer, *quiet, f"paths.output_dir={out}", f"paths.index_dir={out / 'index'}"]
        cfg = compose("train", overrides=overrides)
    with open_dict(cfg):
        cfg.pop("hydra", None)
        cfg.callbacks, cfg.logger = {}, {}
        cfg.trainer.max_time = {"seconds": int(seconds)}
        cfg.trainer.limit_val_batches = 0
        cfg.trainer.enable_checkpointing = False
    return cfg


def save(module: torch.nn.Module, steps: int, path: Path) -> float:
    """Write a checkpoint of the weights, in half precision if it would be too large; returns its megabytes."""
    state = {name: value.cpu() for name, value in module.state_dict().items()}
    if sum(value.numel() * value.element_size() for value in state.values()) > 0.95e6 * CHECKPOINT_MB:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    torch.save({"state_dict": state, "config": module.config, "global_step": steps}, path)
    return path.stat().st_size / 1e6


PARTS: dict[str, Callable[..., Iterator[Figure]]] = {
    "training_step": training_step, "poses": poses, "queries": queries, "training": training,
}  # fmt: skip


class Report:
    """What was found, printed and written as it comes."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self.path, self.about = path, about
        self.figures: list[dict] = []
        self.parts: dict[str, str] = {}

    def line(self, part: str, text: str) -> None:
        """Take a line that a part printed; those that are figures are kept."""
        if not text.startswith("FIGURE "):
            return
        name, value, limit = json.loads(text.removeprefix("FIGURE "))
        self.figures.append({"part": part, "figure": name, "value": value, "limit": limit})
        print(f"{name:60s} {value:12.4g}  {limit}", flush=True)
        self._write()

    def end(self, part: str, what: str) -> None:
        self.parts[part] = what
        print(f"== {part}: {what}", flush=True)
        self._write()

    def _write(self) -> None:
        content = {"about": self.about, "parts": self.parts, "figures": self.figures}
        self.path.write_text(json.dumps(content, indent=1))


def run_part(report: Report, part: str, command: list[str], seconds: float) -> None:
    """Run a part in a process of its own, for so many seconds at most."""
    if seconds < 1:
        return report.end(part, "skipped: no time is left")
    begin, last = time.monotonic(), [""]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last[0] = line.strip()
            report.line(part, line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return report.end(part, f"cut off after {seconds:.0f} s; its last line: {last[0]}")
    reader.join(5)
    took = f"{time.monotonic() - begin:.0f} s"
    how = f"done in {took}" if process.returncode == 0 else f"failed with status {process.returncode} after {took}"
    report.end(part, how if process.returncode == 0 and part != "tests" else f"{how}; its last line: {last[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--data", type=Path, default=None, help="folder of experiment=photos; none: the toy town")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small settings, to try the script")
    parser.add_argument("--part", choices=PARTS, help="only this part, in this process")
    arguments = parser.parse_args()
    device, out = torch.device(arguments.device), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        settings = {"tiny": arguments.tiny, "out": out, "data": arguments.data, "seconds": 60 * arguments.minutes}
        for figure in PARTS[arguments.part](device, **settings):
            print("FIGURE " + json.dumps(figure), flush=True)
        return
    end = time.monotonic() + 60 * arguments.minutes
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU, so nothing is measured (--device cpu --tiny tries the script)")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report = Report(out / "gpu.json", {"device": name, "torch": torch.__version__, "minutes": str(arguments.minutes)})
    print(f"{name}, torch {torch.__version__}, {arguments.minutes:g} minutes; results in {report.path}", flush=True)
    for part, share in SHARES.items():
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, *_given(arguments, out)]
        if part == "tests":
            command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py"]
        run_part(report, part, command, min(share * 60 * arguments.minutes, end - time.monotonic()))
    # What is left, less the time to start and to write the weights.
    left = end - time.monotonic()
    given = _given(arguments, out, minutes=max(1.0, left - min(60.0, 0.4 * left)) / 60)
    run_part(report, "training", [sys.executable, "-m", "benchmarks.gpu", "--part", "training", *given], left)


def _given(arguments: argparse.Namespace, out: Path, minutes: float | None = None) -> list[str]:
    given = ["--out", str(out), "--device", arguments.device, "--minutes", str(minutes or arguments.minutes)]
    given += ["--data", str(arguments.data)] if arguments.data else []
    return [*given, "--tiny"] if arguments.tiny else given


if __name__ == "__main__":
    main()
