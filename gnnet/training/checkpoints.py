"""Checkpoints: kept while training, checked before resuming."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.callbacks import ModelCheckpoint

from gnnet.models.checkpoint import read_checkpoint


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
