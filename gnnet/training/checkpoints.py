"""Checkpoints: kept while training, checked before resuming, read without executing code in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from pytorch_lightning.callbacks import ModelCheckpoint


class EpochCheckpoint(ModelCheckpoint):
    """One file at the end of epochs: of every epoch, or of the best one by a monitored value.

    Lightning's own `save_last` writes only when the best improved. Unlike Lightning's, the best
    score also survives a resumption into another folder, so a worse network does not become the
    best one there.
    """

    def __init__(self, *, dirpath: str | Path, filename: str, monitor: str | None = None, mode: str = "max") -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({**state_dict, "dirpath": self.dirpath})


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint's content, tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint that `train.py` wrote, or one that would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path.absolute()} does not exist (checkpoint=…); train.py writes "
            "<run's folder>/checkpoints/last.ckpt and best.ckpt"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged or holds more than tensors and plain values ({str(error).splitlines()[0]}); "
            "take the other one of best.ckpt and last.ckpt"
        ) from error
    missing = [key for key in ("state_dict", "config", "global_step") if key not in checkpoint]
    if missing:
        raise ValueError(
            f"checkpoint {path} has no {', '.join(missing)}: it was not written by train.py; "
            "to start from the weights of another program use weights=PATH"
        )
    return checkpoint


def check_resume(path: str | Path, config: dict) -> str:
    """Whether a run of `config` can go on from a checkpoint; returns a line that says where it goes on.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`, or if the run would have nothing left to
            do, or the checkpoint's settings that must be the same are not: which, and both values.
    """
    checkpoint = read_checkpoint(path)
    found = checkpoint["config"]
    changed = [
        f"  {name}: {_short(found.get(name))} in the checkpoint, {_short(config.get(name))} now"
        for name in ("model", "loss", "optimizer")
        if found.get(name) != config.get(name)
    ]
    if changed:
        raise ValueError(
            f"training cannot go on from {path}, whose settings were others:\n" + "\n".join(changed) + "\n"
            "give the same as that run (its .hydra/overrides.yaml), or start anew with weights=PATH"
        )
    step = checkpoint["global_step"]
    if step >= config["steps"]:
        raise ValueError(f"{path} has done {step} steps already; ask for more than that: steps={2 * step}")
    return f"Going on from {path}: step {step} of {config['steps']}, {checkpoint['epoch'] + 1} epochs done"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"
