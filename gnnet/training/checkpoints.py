"""Checkpoints: kept while training, checked before resuming, opened to evaluate their network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from gnnet.models.checkpoint import Checkpoint, read_checkpoint, with_current_names
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import load_weights


class EpochCheckpoint(ModelCheckpoint):
    """Writes one file at the end of epochs: of every epoch, or of the best one by a monitored value.

    Two things differ from Lightning's callback. Every epoch can be kept, where Lightning's `save_last` writes
    only if the best improved. The best score survives a resumption into another folder, so that a worse
    network does not become the best one there.

    Args:
        dirpath: folder of the file.
        filename: name of the file, without `.ckpt`.
        monitor: the logged value that tells the best epoch; None keeps the last one.
        mode: `max` if a higher value is better, else `min`.
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning deletes the file that a state names as replaced, wherever it is. A path out of a checkpoint
        # must not choose that, so this callback's own file stands for it, which is overwritten and not deleted.
        own = str(Path(str(self.dirpath)) / f"{self.filename}{self.FILE_EXTENSION}")
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        super().load_state_dict(
            {
                **state_dict,
                **{name: own if state_dict.get(name) else "" for name in paths},
                "best_k_models": dict(zip((own,), state_dict["best_k_models"].values(), strict=False)),  # one or none
                "dirpath": self.dirpath,
            }
        )


def check_resume(path: str | Path, config: dict[str, Any]) -> str:
    """Check that a run can go on from a checkpoint, and return a line that says where it goes on.

    Args:
        path: the checkpoint.
        config: settings of the run, as plain values.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
        ValueError: if no step is left to do, or settings that must be those of the checkpoint are not; the
            message has both values.
    """
    checkpoint = read_checkpoint(path)
    found = with_current_names(checkpoint.config)
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
    step = checkpoint.step
    if step >= config["steps"]:
        raise ValueError(f"{path} has done {step} steps already; ask for more than that: steps={2 * step}")
    return f"Going on from {path}: step {step} of {config['steps']}, {checkpoint.epochs} epochs done"


def networks_of(
    checkpoint: Checkpoint, *, untrained: bool, allow: str | Sequence[str] = ()
) -> dict[str, FeatureNetwork]:
    """The network of a checkpoint as `trained`, and if asked for as `untrained` as its training began.

    Args:
        checkpoint: read.
        untrained: whether the second is wanted.
        allow: packages of your own whose classes the checkpoint may name.

    Raises:
        FileNotFoundError, ValueError: see `Checkpoint.network`, `load_weights`.
    """
    pl.seed_everything(checkpoint.seed, workers=True, verbose=False)
    networks = {"trained": checkpoint.network(allow=allow)}
    if untrained:
        pl.seed_everything(checkpoint.seed, workers=True, verbose=False)
        networks["untrained"] = network = checkpoint.network(trained=False, allow=allow)
        assert isinstance(network, nn.Module)  # as of every checkpoint
        load_weights(network, checkpoint.config.get("weights"))
    return networks


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"
