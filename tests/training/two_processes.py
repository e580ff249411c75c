"""Lightning's processes in tests: two on the CPU, with the settings of `trainer=ddp`."""

from __future__ import annotations

import atexit
from pathlib import Path

import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.strategies import DDPStrategy

SETTINGS = Path(__file__).parents[2] / "conf" / "trainer" / "ddp.yaml"


class Spawned(DDPStrategy):
    """Processes that end their group, as `train.py` does: else gloo's threads may abort an interpreter that ends."""

    def setup_environment(self) -> None:
        super().setup_environment()
        atexit.register(dist.destroy_process_group)


def two_processes() -> Spawned:
    return instantiate(OmegaConf.load(SETTINGS).strategy, _target_=f"{__name__}.Spawned", start_method="spawn")
