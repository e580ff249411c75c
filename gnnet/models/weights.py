"""Every way to load weights, and a network's fingerprint. No code in a file of weights is ever executed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gnnet.models.backbone import Backbone
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.vgg import VGG16

StateDict = dict[str, Tensor]

PACKAGED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "weights").glob("*.safetensors"))}
"""The weights in the package by name."""


def load_weights(model: nn.Module, source: str | Path | None) -> str:
    """Load weights into a network and say in a few words what was loaded.

    Args:
        model: the network; the source must have all its tensors and no others.
        source: None keeps the random weights; `"imagenet"` takes torchvision's (VGG16 and Backbone only); one of
            `PACKAGED` is the package's own; a path is a checkpoint that `train.py` wrote (names begin with `network.`),
            a file that `gnnet.models.export` wrote (`.safetensors`), or a bare state dict of the network. For VGG16
            it may also be torchvision's state dict of vgg16, or a checkpoint of S2DHM or NetVLAD (`encoder.<i>` or
            `encoder.module.<i>`; its pooling is ignored). For Backbone it may also be torchvision's state dict of its
            encoder's network; decoder and heads then stay random.

    Raises:
        FileNotFoundError: if the path is no file.
        ValueError: if the file is no checkpoint, does not fit the network (names and shapes are listed), or
            could be read only by executing code in it.
        ConnectionError: if ImageNet weights are not in torch hub's cache and cannot be downloaded.
    """
    if source is None:
        return "random weights"
    model = unwrapped(model)
    if source == "imagenet":
        if not isinstance(model, VGG16 | Backbone):
            raise ValueError(
                f"weights=imagenet exist for VGG16 and Backbone only, and the network is {type(model).__name__}; "
                "take weights=null (random), or the path of a checkpoint"
            )
        state = _imagenet_state_dict("vgg16" if isinstance(model, VGG16) else model.name)
    else:
        state = read_state_dict(weights_file(source))
    kind = load_tensors(model, state, source=str(source))
    return f"{len(model.state_dict())} tensors of {type(model).__name__} from {source} ({kind})"


def weights_file(source: str | Path) -> Path:
    """The file of weights that a name of `PACKAGED` or a path stands for."""
    return PACKAGED.get(str(source)) or Path(source).expanduser()


def unwrapped(network: Any) -> Any:
    """The network itself inside what `torch.compile` or DataParallel put around it; its tensors are the same."""
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif (inner := getattr(network, "_orig_mod", None)) is not None:
            network = inner
        else:
            return network


def load_tensors(model: nn.Module, state: StateDict, *, source: str) -> str:
    """Load a checkpoint's tensors, under any of the names that `load_weights` lists, and say what kind it is.

    Raises:
        ValueError: if they do not fit the network (names and shapes are listed).
    """
    model = unwrapped(model)
    state, kind = _for_network(state, model)
    load_strictly(model, state, source=source, kind=kind)
    return kind


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors by name from a file that `torch.save` or safetensors wrote, bare or under `state_dict`.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    return state_dict_of(read_plain(path), path)


def state_dict_of(checkpoint: object, path: Path) -> StateDict:
    """The tensors by name in a file's content; `module.` and `_orig_mod.`, which wrappers add, are left out.

    Args:
        checkpoint: what `read_plain` returned.
        path: the file, for messages.

    Raises:
        ValueError: if the content is anything else than tensors by name, bare or under `state_dict`.
    """
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"the keys {_some(map(str, checkpoint))}" if isinstance(checkpoint, Mapping) else type(checkpoint)
        raise ValueError(f"{path} holds {found}; expected tensors by name, or such a mapping under 'state_dict'")
    return {_bare(str(name)): value for name, value in state.items()}


def read_plain(path: Path) -> object:
    """Read a file that `torch.save` wrote, of tensors and plain values only, or a `.safetensors` file.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file (weights); expected a checkpoint (.ckpt, .pth, .safetensors), weights in the "
            f"package ({', '.join(PACKAGED)}), weights=imagenet, or weights=null for random weights"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a file that was cut off
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:  # torch's own message is not passed on, as it advises to switch the protection off
            raise ValueError(
                f"{path} holds more than plain tensors: reading it would need to execute code ({refused[1]}), which "
                "is refused; where it was made, save its tensors alone: torch.save(model.state_dict(), file)"
            ) from None
        raise ValueError(
            f"{path} is not a checkpoint that torch.load can read, or is damaged ({type(error).__name__}); "
            "expected a file that torch.save wrote"
        ) from None


def _read_safetensors(path: Path) -> dict[str, object]:
    """Tensors by name under `state_dict`, beside what `gnnet.models.export` wrote into the file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("gnnet", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({str(error)[:200]})") from None
    return {**(about if isinstance(about, dict) else {}), "state_dict": tensors}


@contextmanager
def tensors_only() -> Iterator[None]:
    """Make every `torch.load` within this context read tensors and plain values only, also in other libraries.

    Raises:
        ValueError: if a file holds more than that.
    """
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"a file of weights would need to execute code{f' ({refused[1]})' if refused else ''}, which is refused, "
            f"or is damaged; delete it from {torch.hub.get_dir()}/checkpoints"
        ) from None
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _numpy_scalars() -> list:
    """What pickle needs to read a numpy number (NetVLAD's `best_score`); none of it executes code in the file."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)]
    return [np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]


def _for_network(state: StateDict, model: nn.Module) -> tuple[StateDict, str]:
    """A checkpoint's tensors of the network, under the network's own names, and the kind of checkpoint in words."""
    network, encoder = (
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for prefix in ("network.", "encoder.")
    )
    vgg, kind = isinstance(model, VGG16), "state dict"
    if network:
        state, kind = network, "gnnet training checkpoint"
    elif vgg and encoder:
        state, kind = {f"features.{k}": v for k, v in encoder.items()}, "S2DHM / NetVLAD checkpoint"
    elif vgg:
        state = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    elif isinstance(model, Backbone) and not encoder:
        state, kind = model.with_classifier_tensors(state), "torchvision's state dict; decoder and heads are random"
    if isinstance(model, VGG16):  # without the layers after the first tap, which the model does not have
        unused = tuple(f"features.{i}." for i in range(len(model.features), 31))
        state = {k: v for k, v in state.items() if not k.startswith(unused)}
    return state, kind


def load_strictly(model: nn.Module, state: StateDict, *, source: str, kind: str) -> None:
    """Load a state dict that has all of the model's tensors, in their shapes, and no others.

    Args:
        model: the network.
        state: tensors by the model's names.
        source, kind: where the tensors are from and what kind of file that is, for messages.

    Raises:
        ValueError: if the state dict does not fit; names and shapes are listed.
    """
    own = {_bare(name): value for name, value in model.state_dict().items()}  # a part of it may be compiled
    unlike = [k for k in own if k in state and state[k].shape != own[k].shape]
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in unlike],
    }
    found = [f"{len(names)} {what} ({_some(names)})" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{source} ({kind}, {len(state)} tensors) does not fit {type(model).__name__}: {'; '.join(found)}; "
            "build the network with the settings it was trained with (its run's saved config), or take other weights"
        )
    model.load_state_dict({name: state[_bare(name)] for name in model.state_dict()})


def fingerprint(network: nn.Module | FeatureNetwork) -> str:
    """Sixteen letters that tell a network's class, settings and weights: the same on every machine and device.

    Maps and descriptors are kept with the fingerprint of the network that made them.
    """
    network = unwrapped(network)
    digest = hashlib.sha256(type(network).__name__.encode())
    # Settings that leave no trace in the weights, as whether maps are normalised, are attributes of the modules.
    for name, module in network.named_modules():
        if not type(module).__module__.startswith("torch."):
            plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
            settings = {k: v for k, v in plain.items() if not k.startswith("_") and k != "training"}
            digest.update(f"{_bare(name)} {sorted(settings.items())}".encode())
    for name, value in network.state_dict().items():
        digest.update(_bare(name).encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _imagenet_state_dict(name: str) -> StateDict:
    from torchvision.models import get_model_weights  # slow to import, and only this needs it

    weights = get_model_weights(name).IMAGENET1K_V1
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConnectionError(
            f"weights=imagenet: {weights.url} could not be downloaded ({error}); fetch it where there is a network "
            f"and place it in {folder}, or give its path as weights=<path>/{Path(weights.url).name}"
        ) from error


def _bare(name: str) -> str:
    """A tensor's or module's name without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
