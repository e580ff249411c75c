"""What happens to a training that is asked to end by SIGTERM, as schedulers do before they take a machine away."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from gnnet.training.checkpoints import between_steps
from gnnet.training.module import FeatureLearning


class Terminated(SystemExit):
    """The program ends because of SIGTERM; its exit status is what shells give for that signal."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class EndOnSigterm(pl.Callback):
    """On SIGTERM, ends the training after the step that is being done or the next, with a checkpoint to go on from.

    If that step ends an epoch, its validation and checkpoint come first. Several processes end at the same step,
    whichever of them is told: the module's steps carry the question, which so costs nothing of its own. Signals for
    requeueing on SLURM (SIGUSR1) stay Lightning's.

    Args:
        path: file of the checkpoint, `last.ckpt` of the run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: FeatureLearning) -> None:  # type: ignore[override]
        pl_module.asked_to_end = pl_module.all_end = False

        def note(*_: Any) -> None:
            pl_module.asked_to_end = True

        if threading.current_thread() is threading.main_thread():  # only there Python lets handlers be set
            # Lightning's handler ends within validation, where no run can go on. Lightning puts back what was before.
            signal.signal(signal.SIGTERM, note)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: FeatureLearning, *_: Any) -> None:  # type: ignore[override]
        if pl_module.all_end and between_steps(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)
            self._end(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: FeatureLearning) -> None:  # type: ignore[override]
        self._end_if_any_is_asked(trainer, pl_module)  # at the end of an epoch; its checkpoint is written

    def on_train_end(self, trainer: pl.Trainer, pl_module: FeatureLearning) -> None:  # type: ignore[override]
        self._end_if_any_is_asked(trainer, pl_module)

    def _end_if_any_is_asked(self, trainer: pl.Trainer, pl_module: FeatureLearning) -> None:
        if trainer.strategy.reduce_boolean_decision(pl_module.asked_to_end, all=False):
            self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            raise SystemExit(0)  # Lightning would kill the first process for a failure of another
        done = trainer.global_step == trainer.max_steps
        how = "all are done: python evaluate.py" if done else "to go on, give the same command line and"
        print(f"\nEnded by SIGTERM after step {trainer.global_step}; {how} checkpoint={self.path}", flush=True)
        raise Terminated
