"""What happens to a training that is asked to end by SIGTERM, as schedulers do before they take a machine away."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from gnnet.training.checkpoints import between_steps


class Terminated(SystemExit):
    """The program ends because of SIGTERM; its exit status is what shells give for that signal."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class EndOnSigterm(pl.Callback):
    """On SIGTERM, ends the training after the step that is being done, and leaves a checkpoint to go on from.

    If that step ends an epoch, its validation and checkpoint come first. Several processes end at the same step,
    whichever of them is told. Signals for requeueing on SLURM (SIGUSR1) stay Lightning's.

    Args:
        path: file of the checkpoint, `last.ckpt` of the run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.asked = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():  # only there Python lets handlers be set
            # Lightning's handler ends within validation, where no run can go on. Lightning puts back what was before.
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if between_steps(trainer) and self._all_end(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)
            self._end(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._all_end(trainer):  # at the end of an epoch; its checkpoint is written
            self._end(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._all_end(trainer):
            self._end(trainer)

    def _all_end(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.asked, all=False)

    def _end(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            raise SystemExit(0)  # Lightning would kill the first process for a failure of another
        done = trainer.global_step == trainer.max_steps
        how = "all are done: python evaluate.py" if done else "to go on, give the same command line and"
        print(f"\nEnded by SIGTERM after step {trainer.global_step}; {how} checkpoint={self.path}", flush=True)
        raise Terminated
