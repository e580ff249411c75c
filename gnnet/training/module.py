"""The LightningModule: a siamese feature network and its loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gnnet.data.batches import PairBatch
from gnnet.data.datamodule import DataModule
from gnnet.data.photometric import Photometric
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import PyramidPair
from gnnet.models.pyramid import FeaturePyramid, pair_features
from gnnet.models.weights import unwrapped

_log = logging.getLogger(__name__)


class FeatureLearning(pl.LightningModule):
    """Learns features from pixel correspondences.

    Args:
        network: maps images (B, 3, H, W) uint8 to a `FeaturePyramid`.
        loss: compares two pyramids at their correspondences.
        optimizer: makes the optimizer from the parameters that require gradients.
        scheduler: makes the learning-rate schedule, stepped every training step; None keeps the rate.
        photometric: augments each image on its own, on the device that trains; None does not.
        seed: with step, process and batch, seeds mining, initial points of the loss, and augmentation.
        compile: run the network of the training step through `torch.compile`; validation stays as it is, as its images
            have many sizes.
        max_skipped_steps: training ends at the next step after so many whose loss or gradient is not finite.
        config: plain values that rebuild this module, kept in its checkpoints; None keeps none.

    Raises:
        ValueError: if the network gives confidences, and no term of the loss trains them.
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
        compile: bool = False,
        max_skipped_steps: int = 10,
        config: dict | None = None,
    ) -> None:
        super().__init__()
        if getattr(unwrapped(network), "confidence", False) and not loss.refines_poses:
            raise ValueError(
                f"model.confidence=true, and no term of the loss ({', '.join(loss.terms)}) trains the confidence; "
                "take loss=nce_pose or loss=pose, or model.confidence=false"
            )
        self.network = network
        # Not the compiled module, whose parameters would be in the checkpoint a second time.
        self._compiled = torch.compile(network.forward) if compile else None
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.photometric = photometric
        self.seed = seed
        self.config = config
        self.max_skipped_steps = max_skipped_steps
        self.skipped_steps = 0
        self.asked_to_end = False  # this process; told by a callback
        self.all_end = False  # some process was, as of the last step; all of them know
        self._asked = torch.zeros(())  # the share of processes that were, as of the last batch
        # Of each batch since the last step: loss, its mean over the processes first, and index of the pairs.
        self._since_step: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> FeaturePyramid:
        return self.network(images)

    def training_step(self, batches: Sequence[PairBatch], batch_index: int) -> Tensor:
        """Mean loss of the pairs; `batches` are those of one step, one for each size of images."""
        generator = self._generator(batch_index % self.trainer.accumulate_grad_batches)
        index = torch.cat([batch.index for batch in batches])
        means: dict[str, Tensor] = {}
        for batch in batches:
            pair = PyramidPair(*self.pair_features(batch, generator), batch)
            loss, parts = self.loss(pair, step=self.global_step, generator=generator)
            for name, value in {"loss": loss, **parts}.items():
                means[name] = means.get(name, 0) + value * (len(batch.index) / len(index))
        total = means["loss"]
        asked = total.new_full((), float(self.asked_to_end))  # goes with the losses, as no process can end alone
        means_here = torch.stack([*(mean.detach() for mean in means.values()), asked])
        *logged, self._asked = self.trainer.strategy.reduce(means_here, reduce_op="mean")
        for name, value in zip(means, logged, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(index))
        self._since_step.append((logged[0], total.detach(), index))
        broken = torch.cat([batch.skipped for batch in batches]).sum().float()
        self.log("train/broken_pairs", broken, reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave out the step if its loss or gradient is not finite.

        All processes leave it out together, as they have the same gradients and mean losses. The host waits for the
        GPU here, because only the host can leave a step out.

        Raises:
            FloatingPointError: if `max_skipped_steps` were left out before.
        """
        batches, self._since_step = self._since_step, []
        norm = get_total_norm([p.grad for p in self.parameters() if p.grad is not None]).to(self.device)
        means_finite = torch.stack([mean for mean, _, _ in batches]).isfinite().all()
        self.log("train/gradient_norm", norm)
        finite, self.all_end = torch.stack([means_finite & norm.isfinite(), self._asked > 0]).tolist()
        self.log("train/skipped_steps", float(not finite), reduce_fx="sum", on_step=False, on_epoch=True)
        if finite:
            return
        optimizer.zero_grad()  # without gradients the optimizer changes nothing
        self.skipped_steps += 1
        what = "gradient" if means_finite else "loss"
        pairs = [i for _, loss, index in batches if means_finite or not loss.isfinite() for i in index.tolist()]
        names = ", ".join(map(self.trainer.datamodule.pair_name, pairs))  # type: ignore[attr-defined]
        message = f"step {self.global_step} is left out: its {what} is not finite; {names or 'by another process'}"
        if self.skipped_steps > self.max_skipped_steps:
            raise FloatingPointError(
                f"{message}. Training ends, as {self.max_skipped_steps} steps were left out before "
                "(max_skipped_steps); lower optimizer.lr, or look at these pairs"
            )
        _log.warning("%s", message)

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
            with torch.autocast(batch.image_a.device.type, enabled=False):  # bf16 has fewer values than an image
                images = [self.photometric(image, generator) for image in images]
        return pair_features(self._compiled or self.network, *images)

    def _generator(self, number: int) -> torch.Generator:
        """Random numbers of this step, process and batch, so that a resumed run draws what it would have drawn.

        Args:
            number: of the batch among those whose gradients are accumulated in the step.
        """
        part = self.global_rank + number * self.trainer.world_size
        seed = (self.seed * 1_000_003 + self.global_step) * 4099 + part
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

    def setup(self, stage: str) -> None:
        """Tell the data whether the loss needs what only known poses tell, before workers begin to load."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DataModule):
            data.geometry = self.loss.refines_poses

    def on_train_start(self) -> None:
        """Let a run that was saved at the end of an epoch go on with the next epoch.

        Lightning would go on at that end: it would count a step that was not done, or, without validation sets, draw
        another batch for the epoch.
        """
        epochs = self.trainer.fit_loop
        if epochs.epoch_loop.restarting and epochs.epoch_loop.batch_progress.is_last_batch:
            epochs.epoch_loop.restarting = False
            for count in (epochs.epoch_progress.total, epochs.epoch_progress.current):
                count.completed = count.processed  # type: ignore[attr-defined]  # both count it; the type says less

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
