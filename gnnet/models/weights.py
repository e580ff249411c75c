"""Every way to load weights. Files are read as plain tensors only: no code in them is ever executed."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gnnet.models.vgg import VGG16

StateDict = dict[str, Tensor]


def load_weights(model: nn.Module, source: str | Path | None) -> str:
    """Load weights into `model` and say in a few words what was loaded.

    Args:
        model: a network of `gnnet.models`; all its parameters must be in the source.
        source: None keeps the random weights; `"imagenet"` takes torchvision's (VGG16 only); a path
            is a checkpoint: of our training (`state_dict` with `network.` before each key), a bare
            state dict of the network, and for VGG16 also torchvision's vgg16 state dict or an
            S2DHM / NetVLAD checkpoint (`encoder.<i>` or `encoder.module.<i>`; its pooling is ignored).

    Raises:
        FileNotFoundError: if the path is no file.
        ValueError: if the file is no checkpoint, or could be read only by executing code in it, or does
            not fit the network (names and shapes are listed).
        ConnectionError: if ImageNet weights are neither cached nor to be downloaded.
    """
    if source is None:
        return "random weights"
    if source == "imagenet":
        if not isinstance(model, VGG16):
            raise ValueError(
                f"weights=imagenet exist for VGG16 only, and the network is {type(model).__name__}; "
                "take weights=null (random), or the path of a checkpoint"
            )
        state = _imagenet_state_dict()
    else:
        state = read_state_dict(Path(source).expanduser())
    state, kind = _for_network(state, vgg=isinstance(model, VGG16))
    if isinstance(model, VGG16):
        state = _without_unused_vgg_layers(model, state)
    load_strictly(model, state, source=str(source), kind=kind)
    return f"{len(state)} tensors of {type(model).__name__} from {source} ({kind})"


def read_state_dict(path: Path) -> StateDict:
    """The tensors by name in a file written by `torch.save`, bare or under `state_dict`.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    checkpoint = read_plain(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"the keys {_some(map(str, checkpoint))}" if isinstance(checkpoint, Mapping) else type(checkpoint)
        raise ValueError(f"{path} holds {found}; expected tensors by name, or such a mapping under 'state_dict'")
    return {".".join(p for p in str(k).split(".") if p not in ("module", "_orig_mod")): v for k, v in state.items()}


def read_plain(path: Path) -> object:
    """What `torch.save` wrote into a file, if that is tensors and plain values only.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file (weights); expected a checkpoint (.ckpt, .pth), weights=imagenet, "
            "or weights=null for random weights"
        )
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is anybody's guess
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is of a file cut off, too
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:  # torch's own message advises to switch the protection off, so it is not passed on
            raise ValueError(
                f"{path} holds more than plain tensors: reading it would need to execute code ({refused[1]}), which "
                "is refused; where it was made, save its tensors alone: torch.save(model.state_dict(), file)"
            ) from None
        raise ValueError(
            f"{path} is not a checkpoint that torch.load can read, or is damaged ({type(error).__name__}); "
            "expected a file that torch.save wrote"
        ) from None


def _numpy_scalars() -> list:
    """What a numpy number in a checkpoint (NetVLAD's best_score) is pickled with; none of it runs code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)]
    return [np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def _for_network(state: StateDict, *, vgg: bool) -> tuple[StateDict, str]:
    """The network's part of a checkpoint under the network's own names, and what kind of checkpoint it is."""
    network = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
    if network:
        return network, "gnnet training checkpoint"
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    if vgg and encoder:
        return {f"features.{k}": v for k, v in encoder.items()}, "S2DHM / NetVLAD checkpoint"
    if vgg:
        state = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    return state, "state dict"


def _without_unused_vgg_layers(model: VGG16, state: StateDict) -> StateDict:
    """VGG's layers beyond the last tap are not built, so their weights are left out."""
    unused = {f"features.{i}." for i in range(len(model.features), 31)}
    return {k: v for k, v in state.items() if not any(k.startswith(u) for u in unused)}


def load_strictly(model: nn.Module, state: StateDict, *, source: str, kind: str) -> None:
    """Load a state dict that has all of the model's tensors and no other.

    Raises:
        ValueError: if it has not; names and shapes are listed.
    """
    own = model.state_dict()
    problems = [
        ("missing", [k for k in own if k not in state]),
        ("unexpected", [k for k in state if k not in own]),
        (
            "of another shape",
            [
                f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
                for k in own
                if k in state and state[k].shape != own[k].shape
            ],
        ),
    ]
    found = [f"{len(names)} {what} ({_some(names)})" for what, names in problems if names]
    if found:
        raise ValueError(
            f"{source} ({kind}, {len(state)} tensors) does not fit {type(model).__name__}: {'; '.join(found)}; "
            "build the network with the settings it was trained with (its run's saved config), or take other weights"
        )
    model.load_state_dict(state)


def _imagenet_state_dict() -> StateDict:
    # torchvision takes a second to import, and only this needs it.
    from torchvision.models import VGG16_Weights

    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"weights=imagenet: {weights.url} could not be downloaded ({error}); fetch it where there is a network "
            f"and place it in {folder}, or give its path as weights=<path>/{Path(weights.url).name}"
        ) from error


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
