"""What surrounds a training run: the processes of one job, loggers that must be closed, and its loss curves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch

from gnnet.evaluation.report.charts import loss_curves


@contextmanager
def one_job(arguments: Sequence[str]) -> Iterator[None]:
    """Let several processes train one job of a sweep.

    Lightning starts its other processes by running this program's command line again. In a sweep that
    would be the whole sweep, so the command line becomes that of this job. Afterwards the traces that
    would make Lightning take the next job for such a child process are removed.

    Args:
        arguments: the command line of this job alone, without the program.
    """
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def close_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Finish every logger's run, also when training fails: wandb would go on with it in the next job of a sweep."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for logger in trainer.loggers:
            logger.finalize(status)
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=0 if status == "success" else 1)


def draw_loss_curves(trainer: pl.Trainer, path: Path) -> None:
    """Draw the losses of the CSV log into a file, if such a log was kept and the run was long enough to log a step.

    A run that goes on from a checkpoint counts its own steps only, so the log itself tells.
    """
    for logger in trainer.loggers:
        log = Path(logger.log_dir or "") / "metrics.csv"
        if isinstance(logger, pl.loggers.CSVLogger) and log.is_file() and "loss" in log.read_text().partition("\n")[0]:
            loss_curves(log, path=path)
