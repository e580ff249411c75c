"""Checkpoints: kept while training, checked before resuming, opened to evaluate their network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from gnnet.files import new_file
from gnnet.models.checkpoint import Checkpoint, read_checkpoint, with_current_names
from gnnet.models.enlarged import enlarged
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import PACKAGED, load_weights


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when it is complete.

    So a run that is killed, or finds the disk full, leaves the file that was there before. Lightning moves it from
    the folder of temporary files, which may be on another disk, where moving is copying.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with new_file(path) as partial:
            torch.save(checkpoint, partial)


class EpochCheckpoint(ModelCheckpoint):
    """Writes one file at the end of epochs: of every epoch, or of the best one by a monitored value.

    Three things differ from Lightning's callback. Every epoch can be kept, where Lightning's `save_last` writes
    only if the best improved. The best score survives a resumption into another folder, so that a worse
    network does not become the best one there. The file can also be written every so many steps within an epoch;
    a run that goes on from there sees the rest of the epoch.

    Args:
        dirpath: folder of the file.
        filename: name of the file, without `.ckpt`.
        monitor: the logged value that tells the best epoch; None keeps the last one.
        mode: `max` if a higher value is better, else `min`.
        every_n_train_steps: steps after which the file is written within an epoch too; None writes at its end only.
    """

    def __init__(
        self,
        *,
        dirpath: str | Path,
        filename: str,
        monitor: str | None = None,
        mode: str = "max",
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.path = Path(dirpath) / f"{filename}{self.FILE_EXTENSION}"
        self.steps = every_n_train_steps  # not Lightning's, which leaves out the end of the epoch

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.steps and between_steps(trainer) and trainer.global_step % self.steps == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning deletes the file that a state names as replaced, wherever it is. A path out of a checkpoint
        # must not choose that, so this callback's own file stands for it, which is overwritten and not deleted.
        own = str(self.path)
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        super().load_state_dict(
            {
                **state_dict,
                **{name: own if state_dict.get(name) else "" for name in paths},
                "best_k_models": dict(zip((own,), state_dict["best_k_models"].values(), strict=False)),  # one or none
                "dirpath": self.dirpath,
            }
        )


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether, at the end of a batch, a step is complete and another one follows in this epoch.

    Elsewhere nothing is saved: within an accumulated step the gradients would be lost, and at the last step the
    validation, which comes before the epoch's checkpoint.
    """
    batch = trainer.fit_loop.batch_idx + 1
    whole = batch % trainer.accumulate_grad_batches == 0
    return whole and not trainer.is_last_batch and trainer.global_step != trainer.max_steps


def find_checkpoint(given: str | Path, *, runs: str | Path) -> Path:
    """The file that `checkpoint=` means.

    Args:
        given: a file, a name of weights in the package, the folder of a run, whose `last.ckpt` is meant, or `last`: the
            newest run's.
        runs: the folder that runs are below, for `last`.

    Raises:
        FileNotFoundError: if there is no last.ckpt in that folder.
    """
    if str(given) == "last":
        found = sorted(Path(runs).glob("**/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise FileNotFoundError(
                f"no run in {Path(runs).absolute()} has left checkpoints/last.ckpt (checkpoint=last); give a file, or "
                "the folder of a run elsewhere"
            )
        return found[-1]
    if str(given) in PACKAGED or not Path(given).is_dir():
        return Path(given)  # whether it is a checkpoint is said where it is read
    path = Path(given) / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} does not exist; expected a .ckpt or a run's folder (checkpoint=…)")
    return path


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
        if not _same(found.get(name), config.get(name))
    ]
    if changed:
        raise ValueError(
            f"training cannot go on from {path}, whose settings were others:\n" + "\n".join(changed) + "\n"
            "give the same as that run (its .hydra/overrides.yaml), or start anew with weights=PATH"
        )
    step = checkpoint.step
    if step >= config["steps"]:
        raise ValueError(f"{path} has done {step} steps already; ask for more than that: steps={2 * step}")
    return f"Going on from {path}: step {step} of {config['steps']}"


def _same(found: Any, now: Any) -> bool:
    """Whether two settings mean the same; what one of them lacks has its default, as before it became a setting."""
    if isinstance(found, Mapping) and isinstance(now, Mapping):
        if found.keys() != now.keys() and found.get("_target_") == now.get("_target_"):
            defaults = _defaults(now.get("_target_"))
            found, now = {**defaults, **found}, {**defaults, **now}
        return found.keys() == now.keys() and all(_same(found[key], now[key]) for key in now)
    if isinstance(found, list | tuple) and isinstance(now, list | tuple):
        return len(found) == len(now) and all(map(_same, found, now))
    return found == now


def _defaults(target: object) -> dict[str, Any]:
    """The defaults of the arguments that a class or function takes, by its name; none of an unknown one."""
    try:
        parameters = inspect.signature(resolve_name(str(target))).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):  # said where it is built
        return {}
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def networks_of(
    checkpoint: Checkpoint, *, untrained: bool, enlarge: int = 1, allow: str | Sequence[str] = ()
) -> dict[str, FeatureNetwork]:
    """The network of a checkpoint as `trained`, and if asked for as `untrained` as its training began.

    Args:
        checkpoint: read.
        untrained: whether the second is wanted.
        enlarge: see `enlarged`, for both.
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
    return {name: enlarged(network, enlarge) for name, network in networks.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"
