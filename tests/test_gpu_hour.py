"""The script of the first hour on a GPU, on a CPU with small settings."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import gpu
from gnnet.models.checkpoint import read_checkpoint

CPU = torch.device("cpu")


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_says_so_and_the_next_begins(tmp_path):
    report = gpu.Report(tmp_path / "gpu.json", {})
    figure = "print('FIGURE ' + '[\"pairs a second\", 3.5, \"aim 4\"]', flush=True)"
    for part, seconds, code in (
        ("good", 60, figure), ("bad", 60, f"{figure}; raise ValueError('no such map')"),
        ("slow", 3, f"{figure}; import time; time.sleep(600)"), ("late", 0, figure),
    ):  # fmt: skip
        gpu.run_part(report, part, [sys.executable, "-S", "-c", code], seconds)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["parts"]["good"].startswith("done")
    assert "status 1" in found["parts"]["bad"] and "ValueError: no such map" in found["parts"]["bad"]
    assert found["parts"]["slow"].startswith("cut off after 3 s")
    assert found["parts"]["late"].startswith("skipped")
    assert [f["part"] for f in found["figures"]] == ["good", "bad", "slow"] and found["figures"][0]["value"] == 3.5


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training_step", "poses", "queries"])
def test_every_figure_is_found(tmp_path, part):
    found = list(gpu.PARTS[part](CPU, tiny=True, out=tmp_path, data=None, seconds=5))
    assert found and all(value > 0 for _, value, _ in found)
    shares = [value for name, value, _ in found if "share" in name]
    assert all(value < 1 for value in shares) and len(shares) == (2 if part == "training_step" else 0)


@pytest.mark.slow
def test_training_leaves_a_small_checkpoint(tmp_path):
    found = gpu.training(CPU, tiny=True, out=tmp_path, data=None, seconds=60)
    figures = {name: value for name, value, _ in found}
    assert 0 < figures["checkpoint, MB"] <= gpu.CHECKPOINT_MB
    checkpoint = read_checkpoint(tmp_path / "gnnet.ckpt")
    assert checkpoint.step == 2
    assert all(p.isfinite().all() for p in checkpoint.network().parameters())


def test_a_large_network_is_written_in_half_precision(tmp_path):
    module = torch.nn.Linear(2000, 2500)
    module.config = {}
    assert gpu.save(module, 1, tmp_path / "gnnet.ckpt") <= gpu.CHECKPOINT_MB
    assert read_checkpoint(tmp_path / "gnnet.ckpt").state_dict["weight"].dtype == torch.float16
