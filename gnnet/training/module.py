"""The LightningModule: a siamese feature network and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gnnet.data.batches import PairBatch
from gnnet.data.photometric import Photometric
from gnnet.losses.pair_loss import PairLoss
from gnnet.models.pyramid import FeaturePyramid, pair_features


class FeatureLearning(pl.LightningModule):
    """Learns features from pixel correspondences.

    Args:
        network: maps images (B, 3, H, W) uint8 to a `FeaturePyramid`.
        loss: compares two pyramids at their correspondences.
        optimizer: makes the optimizer from the parameters that require gradients.
        scheduler: makes the learning-rate schedule, stepped every training step; None keeps the rate.
        photometric: augments each image on its own, on the device that trains; None does not.
        seed: with the step and the process, seeds mining, initial points of the loss, and augmentation.
        config: plain values that rebuild this module, kept in its checkpoints; None keeps none.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        loss: PairLoss,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        photometric: Photometric | None = None,
        seed: int = 0,
        config: dict | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.photometric = photometric
        self.seed = seed
        self.config = config

    def forward(self, images: Tensor) -> FeaturePyramid:
        return self.network(images)

    def training_step(self, batch: PairBatch, batch_index: int) -> Tensor:
        generator = self._generator()
        pyramid_a, pyramid_b = self.pair_features(batch, generator)
        total, parts = self.loss(pyramid_a, pyramid_b, batch, step=self.global_step, generator=generator)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch.index))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(batch.index))
        self.log("train/broken_pairs", batch.skipped.sum().float(), reduce_fx="sum", on_step=False, on_epoch=True)
        return total

    def pair_features(
        self, batch: PairBatch, generator: torch.Generator | None
    ) -> tuple[FeaturePyramid, FeaturePyramid]:
        """Pyramids of images a and b.

        Args:
            batch: the image pairs.
            generator: draws the augmentation; None leaves the images as they are.
        """
        images = [batch.image_a, batch.image_b]
        if self.photometric is not None and generator is not None:
            images = [self.photometric(image, generator) for image in images]
        return pair_features(self.network, *images)

    def _generator(self) -> torch.Generator:
        """Random numbers of this step and process, so that a resumed run draws what it would have drawn."""
        seed = (self.seed * 1_000_003 + self.global_step) * 4099 + self.global_rank
        return torch.Generator(device=self.device).manual_seed(seed % 2**63)

    def validation_step(self, batch: object, batch_index: int, dataloader_idx: int = 0) -> None:
        """Nothing: the callback `LocalizationValidation` localizes queries and matches pairs."""

    def configure_optimizers(self):
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.config is not None:
            checkpoint["config"] = self.config


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final: float = 0.01) -> LambdaLR:
    """Learning rate that rises linearly for `warmup_steps`, then falls as a cosine to `final` of its peak."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
