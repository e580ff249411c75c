"""The loader of checkpoints that `train.py` wrote: no code in a file is executed, and no file chooses what runs.

A checkpoint holds tensors and plain values, among them the configuration of the run. The configuration names
classes and functions (`_target_`). `build` calls those that `_ALLOWED` lists, and those in packages that the
caller names (`allow`). It refuses every other name before it imports anything. What is allowed only reads:
no file is written, replaced or deleted at a place that a checkpoint names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import PACKAGED, StateDict, load_tensors, read_plain, state_dict_of, weights_file

# The names that a checkpoint may give: a package, and a pattern of what may follow. None of these writes on disk.
_ALLOWED = {
    "gnnet.models": r"[a-z]\w*\.[A-Z]\w*",  # networks and losses: subclasses of nn.Module
    "gnnet.losses": r"[a-z]\w*\.[A-Z]\w*",
    "gnnet.localization": r"pose_loss\.PoseLoss",
    "gnnet.scenes.layouts": r"[a-z]\w*\.load_\w+",  # readers of datasets
    "gnnet.toy": r"town\.read_toy",  # not load_toy, which renders and replaces folders
    "gnnet.data.datamodule": "CorrespondenceData",
    "gnnet.data.mixture": "MixtureData",
    "gnnet.data.photometric": r"Photometric(\.of_strength|\.conditions)?",
    "gnnet.training": r"module\.warmup_cosine",
    "torch.optim": r"Adam|AdamW|NAdam|RAdam|RMSprop|SGD",
    "torch.optim.lr_scheduler": r"ConstantLR|CosineAnnealingLR|ExponentialLR|LinearLR|MultiStepLR|OneCycleLR|StepLR",
}

# Names in older checkpoints, and what stands there today.
_MOVED = {
    **{
        f"gnnet.scenes.{layout}.load_{layout}": f"gnnet.scenes.layouts.{layout}.load_{layout}"
        for layout in ("robotcar", "cmu", "sevenscenes", "rgbd", "colmap", "timelapse", "homography")
    },
    "gnnet.data.datamodule.MixtureData": "gnnet.data.mixture.MixtureData",
    "gnnet.scenes.toy.load_toy": "gnnet.toy.town.read_toy",
    "gnnet.toy.town.load_toy": "gnnet.toy.town.read_toy",
}

_MAX_DEPTH = 20  # of settings within settings; those of a run have 5


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint that `train.py` wrote, or of a file that was made from one.

    Args:
        path: the file.
        config: settings of the run, by group (`model`, `dataset`, …).
        state_dict: tensors by name; those of the network begin with `network.`.
        step: training steps done.
    """

    path: Path
    config: dict[str, Any]
    state_dict: StateDict
    step: int

    def network(self, *, trained: bool = True, allow: str | Sequence[str] = ()) -> FeatureNetwork:
        """The network that the settings describe.

        Args:
            trained: with the checkpoint's weights; otherwise with random ones.
            allow: packages of your own whose classes the settings may name.

        Raises:
            ValueError: if the settings name no network, or the weights do not fit it.
        """
        network = self._build("model", allow=allow)
        if not isinstance(network, nn.Module):
            target = self.config["model"]["_target_"]
            raise ValueError(f"checkpoint {self.path} names the network {target!r}; expected one of gnnet.models")
        if trained:
            load_tensors(network, self.state_dict, source=str(self.path))
        return cast(FeatureNetwork, network)

    def dataset(self, *, index_dir: str | Path | None, allow: str | Sequence[str] = ()) -> Any:
        """The data module of the dataset that the network was trained on.

        Args:
            index_dir: folder of the datasets' indices, in place of the one in the settings; None keeps no index.
            allow: packages of your own whose classes and readers the settings may name.

        Raises:
            ValueError: if the settings name no dataset that may be read.
        """
        return self._build("dataset", allow=allow, index_dir=index_dir)

    @property
    def seed(self) -> int:
        """The run's seed.

        Raises:
            ValueError: if the settings have none.
        """
        seed = self.config.get("seed")
        if not isinstance(seed, int):
            raise ValueError(f"checkpoint {self.path}: config.seed is {seed!r}; expected a whole number")
        return seed

    def _build(self, group: str, **how: Any) -> Any:
        settings = self.config.get(group)
        if not isinstance(settings, Mapping) or "_target_" not in settings:
            raise ValueError(
                f"checkpoint {self.path} has no settings of a {'network' if group == 'model' else group} "
                f"(config.{group}._target_); it cannot be built"
            )
        return build(settings, source=f"checkpoint {self.path}: config.{group}", **how)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a checkpoint's content: tensors and plain values only.

    Args:
        source: a file that `train.py` or `gnnet.models.export` wrote, or a name of weights in the package.

    Raises:
        FileNotFoundError: if there is no such file, and no weights of that name.
        ValueError: if neither of the two wrote it, or reading it would execute code.
    """
    path = weights_file(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path.absolute()} does not exist (checkpoint=…, weights=…); train.py writes "
            f"<run's folder>/checkpoints/last.ckpt and best.ckpt, and in the package there are {', '.join(PACKAGED)}"
        )
    try:
        content = read_plain(path)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} is damaged, or holds more than tensors and plain values ({error}); "
            "take the other one of best.ckpt and last.ckpt"
        ) from error
    found = content if isinstance(content, Mapping) else {}
    kinds = {"state_dict": Mapping, "config": Mapping, "global_step": int}
    missing = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    if missing:
        raise ValueError(
            f"checkpoint {path} has no {', '.join(missing)}: it was not written by train.py; "
            "to start from the weights of another program use weights=PATH"
        )
    return Checkpoint(
        path=path,
        config=dict(found["config"]),
        state_dict=state_dict_of(found, path),
        step=found["global_step"],
    )


def build(
    settings: Mapping[str, Any],
    *,
    source: str,
    allow: str | Sequence[str] = (),
    index_dir: str | Path | None = None,
) -> Any:
    """Make the object that settings from a file describe: `_target_` called with the other entries as arguments.

    Arguments may be settings of objects themselves, at any depth; `_partial_: true` gives a
    `functools.partial` instead of the call. All names are checked before the first is imported.
    Values stay as they are: `${…}` is not resolved but refused.

    Args:
        settings: plain values: mappings, lists, text, numbers, truth values, None.
        source: where the settings were found, for messages.
        allow: packages whose classes and functions may be named, besides `_ALLOWED`.
        index_dir: takes the place of every argument `index_dir`, as a file must not choose where is written.

    Raises:
        ValueError: if the settings name what is not allowed, or the object does not take them.
    """
    packages = (allow,) if isinstance(allow, str) else tuple(allow or ())
    _check(settings, (), source, packages)
    return _make(settings, source, packages, index_dir)


def with_current_names(settings: Any) -> Any:
    """Settings of an older checkpoint with the names (`_target_`) that stand for the same things today."""
    if isinstance(settings, Mapping):
        return {
            key: _current(value) if key == "_target_" else with_current_names(value) for key, value in settings.items()
        }
    return [with_current_names(value) for value in settings] if isinstance(settings, list | tuple) else settings


def _current(target: Any) -> Any:
    return _MOVED.get(target, target) if isinstance(target, str) else target


def _check(value: Any, where: tuple[str, ...], source: str, allow: tuple[str, ...]) -> None:
    """Refuse what `_make` must not meet; nothing is imported here."""
    at = ".".join((source, *where))
    if len(where) > _MAX_DEPTH:
        raise ValueError(f"{source} has settings nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        has_target = "_target_" in value
        if has_target and _home(_current(value["_target_"]), allow) is None:
            raise ValueError(
                f"{at} names {value['_target_']!r}, and a file may name networks, losses and readers of gnnet's "
                "and optimizers of torch's only; if it is code of your own, give its package: allow=PACKAGE"
            )
        for key, part in value.items():
            if not isinstance(key, str) or not _fits(key, part, has_target=has_target):
                raise ValueError(f"{at} has {key}={part!r:.200}, which is not supported in the settings of a file")
            _check(part, (*where, key), source, allow)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            _check(part, (*where, str(index)), source, allow)
    elif isinstance(value, str) and "${" in value:
        raise ValueError(f"{at} is {value!r}; expected a plain value, as ${{…}} is not resolved in a file")
    elif not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"{at} is a {type(value).__name__}; expected plain values")


def _fits(key: str, value: Any, *, has_target: bool) -> bool:
    """Whether an entry of a mapping is an argument, or one of Hydra's keys that mean the same here."""
    match key:
        case "_target_":
            return True  # checked by itself
        case "_convert_":  # values are plain whatever it says
            return has_target and isinstance(value, str)
        case "_partial_":
            return has_target and isinstance(value, bool)
        case "_recursive_":
            return has_target and value is True
    if has_target:
        return key.isidentifier() and not re.fullmatch(r"_.*_", key)
    # The names of a mixture's sources become folders, so they may not lead out of one.
    return not re.search(r"_(target|partial|args|recursive|convert)_|[/\\\0]|^\.*$", key)


def _home(target: Any, allow: tuple[str, ...]) -> str | None:
    """The package that a name must be defined in, if a file may give it; None if it may not."""
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d_]\w*(\.[^\W\d_]\w*)+", target):
        return None
    for package in allow:
        if target.startswith(f"{package}."):
            return package
    for package, names in _ALLOWED.items():
        if re.fullmatch(rf"{re.escape(package)}\.(?:{names})", target):
            return package
    return None


def _make(value: Any, source: str, allow: tuple[str, ...], index_dir: str | Path | None) -> Any:
    if isinstance(value, list | tuple):
        return [_make(part, source, allow, index_dir) for part in value]
    if not isinstance(value, Mapping):
        return value
    special = {"_target_", "_partial_", "_recursive_", "_convert_"}
    arguments = {key: _make(part, source, allow, index_dir) for key, part in value.items() if key not in special}
    if "_target_" not in value:
        return arguments
    if "index_dir" in arguments:
        arguments["index_dir"] = index_dir
    target = _current(value["_target_"])
    call = _find(target, source, allow)
    try:
        return partial(call, **arguments) if value.get("_partial_") else call(**arguments)
    except Exception as error:  # settings of a file may be anything
        raise ValueError(f"{source} has settings that {target} does not take: {error}") from error


def _find(target: str, source: str, allow: tuple[str, ...]) -> Callable[..., Any]:
    """The class or function of a name that `_home` knows.

    Raises:
        ValueError: if there is none of that name, or it is defined elsewhere and only imported there.
    """
    home, parts = _home(target, allow), target.split(".")
    found: Any = None
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if end > 1 and error.name is not None and f"{module}.".startswith(f"{error.name}."):
                continue  # not a module, but a class in one
            raise ValueError(f"{source} names {target}, and importing {module} fails: {error}") from error
        for part in parts[end:]:
            found = None if isinstance(found, ModuleType) and part not in vars(found) else getattr(found, part, None)
            if isinstance(found, ModuleType):
                found = None  # what a module has imported is not its own
        break
    defined = str(getattr(found, "__module__", ""))
    own = (inspect.isclass(found) or inspect.isroutine(found)) and f"{defined}.".startswith(f"{home}.")
    if home in ("gnnet.models", "gnnet.losses", "gnnet.localization"):
        own = own and inspect.isclass(found) and issubclass(found, nn.Module)
    if not own:
        raise ValueError(f"{source} names {target}, and {home} defines no class or function of that name")
    return found
