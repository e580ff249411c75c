"""Checkpoints that `train.py` wrote, read without executing code in them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from torch import nn

from gnnet.models.weights import load_weights, read_plain


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
        checkpoint = read_plain(path)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} is damaged, or holds more than tensors and plain values ({error}); "
            "take the other one of best.ckpt and last.ckpt"
        ) from error
    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    missing = [key for key in ("state_dict", "config", "global_step") if key not in found]
    if missing:
        raise ValueError(
            f"checkpoint {path} has no {', '.join(missing)}: it was not written by train.py; "
            "to start from the weights of another program use weights=PATH"
        )
    return checkpoint


def network_of_checkpoint(path: str | Path) -> nn.Module:
    """The network that a checkpoint holds, built as its settings say, with its weights.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`, or if the settings name no network of gnnet's.
    """
    config = read_checkpoint(path)["config"]
    settings = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(settings, Mapping):
        raise ValueError(f"checkpoint {path} has no settings of a network (config.model); it cannot be built")
    settings = dict(settings)
    target = str(settings.pop("_target_", ""))
    module, _, name = target.rpartition(".")
    # Only the project's own classes: a name in a file must not choose what runs.
    try:
        kind = getattr(import_module(module), name, None) if module.startswith("gnnet.models.") else None
    except ImportError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("gnnet.models.")):
        raise ValueError(f"checkpoint {path} names the network {target!r}; expected one of gnnet.models")
    try:
        network = kind(**settings)
    except TypeError as error:
        raise ValueError(f"checkpoint {path} has settings that {target} does not take: {error}") from error
    load_weights(network, path)
    return network
