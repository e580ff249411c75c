"""Files that were made to harm: what they name is refused, and nothing of it runs."""

from __future__ import annotations

import copy
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import kornia.feature
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

import evaluate
import gnnet
import train
from gnnet.localization.local_features import LocalFeatures, _load_network
from gnnet.localization.localizer import Localizer
from gnnet.models import checkpoint as loader
from gnnet.models.checkpoint import build, read_checkpoint
from gnnet.models.unet import UNet
from gnnet.models.weights import load_weights
from gnnet.scenes.layouts.registry import DATASETS
from gnnet.training.checkpoints import check_resume
from tests.training.test_entry_points import on_toy

CONF = Path(__file__).parents[1] / "conf"
UNET = {"_target_": "gnnet.models.unet.UNet", "widths": [8, 16], "channels": 4, "strides": [2, 1]}
TOUCH = "pathlib.Path.touch"


def data(root: Path | str) -> dict:
    return {
        "_target_": "gnnet.data.datamodule.CorrespondenceData",
        "scene": {"_target_": "gnnet.scenes.layouts.robotcar.load_robotcar", "_partial_": True},
        "root": str(root), "validation_fraction": 0.34, "correspondences": 64, "num_workers": 0, "index_dir": None,
    }  # fmt: skip


def write(path: Path, config: dict, **more) -> Path:
    torch.manual_seed(0)
    network = UNet(**{key: value for key, value in UNET.items() if key != "_target_"})
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": tensors, "config": config, "global_step": 3, "epoch": 0, **more}, path)
    return path


def evaluating(path: Path, output: Path, *overrides: str) -> DictConfig:
    cfg = copy.deepcopy(composed(*overrides))
    cfg.checkpoint = str(path)
    for name in ("output", "index", "map"):
        cfg.paths[f"{name}_dir"] = str(output / name)
    return cfg


@cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("evaluate", overrides=[*overrides])


def contents(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A folder in which nothing may appear, and on `sys.path` a module that makes a file there when imported."""
    folder, modules = tmp_path / "trap", tmp_path / "modules"
    folder.mkdir()
    modules.mkdir()
    code = f"from pathlib import Path\nPath({str(folder / 'imported')!r}).touch()\ndef call(*_, **__): ...\n"
    (modules / "harm_on_import.py").write_text(code)
    monkeypatch.syspath_prepend(str(modules))
    OmegaConf.register_new_resolver("touch", lambda name: (folder / name).touch() or 8, replace=True)
    yield folder
    OmegaConf.clear_resolver("touch")
    assert contents(folder) == set()
    assert "harm_on_import" not in sys.modules and "antigravity" not in sys.modules


def touch(folder: Path) -> dict:
    """What creates a file when Hydra instantiates it."""
    return {"_target_": TOUCH, "_args_": [{"_target_": "pathlib.Path", "_args_": [str(folder / "touched")]}]}


# Each: where in the configuration, what stands there, and what the error names.
HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "network": ("model", touch, TOUCH),
    "shell": ("model", lambda f: {"_target_": "os.system", "command": f"touch {f}/shell"}, "os.system"),
    "subprocess": ("model", lambda f: {"_target_": "subprocess.check_call", "args": ["touch", f"{f}/x"]}, "subprocess"),
    "eval": ("model", lambda f: {"_target_": "builtins.eval", "source": f"open('{f}/e', 'w')"}, "builtins.eval"),
    "nested": ("model.widths", touch, TOUCH),
    "nested in a list": ("model.widths", lambda f: [8, touch(f)], TOUCH),
    "nested deeply": ("model.widths", lambda f: [{"a": [{"b": touch(f)}]}], TOUCH),
    "partial": ("model", lambda f: {**touch(f), "_partial_": True}, TOUCH),
    "partial as reader": (
        "dataset.scene", lambda f: {"_target_": TOUCH, "_partial_": True, "mode": 0o700}, TOUCH,
    ),
    "partial shell as reader": (
        "dataset.scene", lambda f: {"_target_": "os.system", "_partial_": True}, "os.system",
    ),
    "positional arguments": ("model._args_", lambda f: [touch(f)], "_args_"),
    "positional arguments alone": ("model.widths", lambda f: {"_args_": [touch(f)]}, "_args_"),
    "not recursive": ("dataset._recursive_", lambda f: False, "_recursive_"),
    "partial of text": ("model._partial_", lambda f: "true", "_partial_"),
    "hydra._target_": ("model.hydra._target_", lambda f: "os.system", "hydra._target_"),
    "hydra.instantiate": (
        "model", lambda f: {"_target_": "hydra.utils.instantiate", "config": touch(f)}, "hydra.utils.instantiate",
    ),
    "hydra.call": ("model", lambda f: {"_target_": "hydra.utils.call", "config": touch(f)}, "hydra.utils.call"),
    "hydra.get_method": (
        "dataset.scene", lambda f: {"_target_": "hydra.utils.get_method", "path": "os.system"}, "hydra.utils.get_meth",
    ),
    "hydra.get_class": (
        "model", lambda f: {"_target_": "hydra.utils.get_class", "path": "harm_on_import.call"}, "hydra.utils.get_cl",
    ),
    "environment": ("model.channels", lambda f: "${oc.env:HOME}", r"\$\{oc\.env:HOME\}"),
    "resolver": ("model.channels", lambda f: "${touch:resolved}", r"\$\{touch:resolved\}"),
    "resolver in the dataset": ("dataset.root", lambda f: "${touch:resolved}", r"\$\{touch:resolved\}"),
    "resolver as seed": ("seed", lambda f: "${touch:resolved}", r"config\.seed is '\$\{touch:resolved\}'"),
    "resolver as name": ("model._target_", lambda f: "${touch:resolved}", r"\$\{touch:resolved\}"),
    "import": ("model", lambda f: {"_target_": "harm_on_import.call"}, r"harm_on_import\.call"),
    "import of the reader": ("dataset.scene._target_", lambda f: "harm_on_import.load_it", r"harm_on_import\.load_it"),
    "import by an old name": ("dataset.scene._target_", lambda f: "harm_on_import.load_toy", "harm_on_import"),
    "import only": ("model", lambda f: {"_target_": "antigravity.webbrowser"}, "antigravity"),
    "through an import": (
        "model", lambda f: {"_target_": "gnnet.files.os.system", "command": f"touch {f}/x"}, "gnnet.files.os.system",
    ),
    "through a network's import": (
        "model", lambda f: {"_target_": "gnnet.models.weights.torch.load", "f": "x"}, "gnnet.models.weights.torch.load",
    ),
    "what a network's module imports": (
        "model", lambda f: {"_target_": "gnnet.models.vgg.Tensor"}, "gnnet.models.vgg.Tensor",
    ),
    "dunder": (
        "model", lambda f: {"_target_": "gnnet.models.unet.UNet.__init__.__globals__"}, "__globals__",
    ),
    "dunder module": ("model._target_", lambda f: "gnnet.models.unet.__loader__.load_module", "__loader__"),
    "command": ("dataset.scene._target_", lambda f: "gnnet.scenes.__main__.main", "__main__"),
    "method of a network": ("model._target_", lambda f: "gnnet.models.unet.UNet.load_state_dict", "load_state_dict"),
    "our writer": (
        "model", lambda f: {"_target_": "gnnet.toy.town.render_toy_town", "root": f"{f}/town"}, "render_toy_town",
    ),
    "our renderer": (
        "dataset.scene", lambda f: {"_target_": "gnnet.toy.town.ensure_toy_town", "_partial_": True}, "ensure_toy_town",
    ),
    "our file": (
        "model", lambda f: {"_target_": "gnnet.scenes.formats.poses.write_pose_file", "path": f"{f}/x", "poses": {}},
        "write_pose_file",
    ),
    "our array file": (
        "model", lambda f: {"_target_": "gnnet.arrays.ArrayFile.create", "path": f"{f}/x", "arrays": {}, "about": {}},
        "ArrayFile",
    ),
    "torch's": ("model", lambda f: {"_target_": "torch.save", "obj": 1, "f": f"{f}/saved"}, "torch.save"),
    "beside the optimizers": ("model", lambda f: {"_target_": "torch.optim.sys.exit"}, "torch.optim.sys"),
    "Lightning's": ("model", lambda f: {"_target_": "pytorch_lightning.Trainer"}, "pytorch_lightning"),
    "another name with the same beginning": ("model._target_", lambda f: "gnnet_evil.models.unet.UNet", "gnnet_evil"),
    "a newline": ("model._target_", lambda f: "gnnet.models.unet.UNet\nos.system", "os.system"),
    "no name": ("model._target_", lambda f: 3, "names 3"),
}  # fmt: skip


def hostile_config(name: str, toy_root: Path, trap: Path) -> dict:
    where, make, _ = HOSTILE[name]
    config = {"seed": 0, "weights": None, "steps": 4, "model": copy.deepcopy(UNET), "dataset": data(toy_root)}
    config |= {"loss": None, "optimizer": None, "allow": ["harm_on_import", "os", "pathlib"]}  # the file's own: ignored
    group, _, rest = where.partition(".")
    if not rest:
        config[group] = make(trap)
        return config
    key = "hydra._target_" if rest == "hydra._target_" else rest
    node, *parts = config[group], *(key.split(".") if key == rest and "hydra" not in key else [key])
    for part in parts[:-1]:
        node = node[part]
    node[parts[-1]] = make(trap)
    return config


def test_the_configuration_that_they_start_from_is_good(toy_root, tmp_path):
    config = {"seed": 0, "weights": None, "model": UNET, "dataset": data(toy_root)}
    networks, found, steps, *_ = evaluate.prepare(evaluating(write(tmp_path / "a.ckpt", config), tmp_path))
    assert isinstance(networks["trained"], UNet) and len(found.validations[0]) > 0 and steps == 3


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_settings_are_refused_by_name_and_nothing_runs(name, toy_root, tmp_path, trap, monkeypatch):
    monkeypatch.setattr(evaluate, "instantiate", lambda *_, **__: pytest.fail("Hydra was asked to build"))
    config = hostile_config(name, toy_root, trap)
    path = write(tmp_path / "hostile.ckpt", config)
    cfg = evaluating(path, tmp_path)
    modules = set(sys.modules)
    expected = pytest.raises(ValueError, match=rf"hostile\.ckpt[\s\S]*{HOSTILE[name][2]}")
    for call in (evaluate.prepare, evaluate.run):
        with expected:
            call(cfg)
    if HOSTILE[name][0].startswith("model"):
        with expected:
            read_checkpoint(path).network()
        with expected:
            Localizer.from_checkpoint(path, tmp_path / "no.gnmap")
        now = {**config, "model": UNET}
        with pytest.raises(ValueError, match="settings were others"):
            check_resume(path, now)
    assert check_resume(path, config).startswith("Going on from")  # reads, and builds nothing
    assert "gnnet training checkpoint" in load_weights(UNet(widths=(8, 16), channels=4, strides=(2, 1)), path)
    assert {m for m in set(sys.modules) - modules if not m.startswith("gnnet.")} == set()


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["tensor", "config", "beside"])
def test_a_pickle_in_the_place_of_a_tensor_is_not_read(where, toy_root, tmp_path, trap):
    config = {"seed": 0, "weights": None, "steps": 4, "model": UNET, "dataset": data(toy_root), "loss": None}
    harm = Runs(trap / "unpickled")
    more = {"tensor": {"state_dict": {"network.stem.0.weight": harm}}, "beside": {"hyper_parameters": harm}}
    if where == "config":
        config["model"] = {**UNET, "widths": harm}
    path = write(tmp_path / "hostile.ckpt", config, **more.get(where, {}))
    network = UNet(widths=(8, 16), channels=4, strides=(2, 1))
    for call in (
        lambda: evaluate.run(evaluating(path, tmp_path)),
        lambda: read_checkpoint(path).network(),
        lambda: Localizer.from_checkpoint(path, tmp_path / "no.gnmap"),
        lambda: check_resume(path, config),
        lambda: load_weights(network, path),
    ):
        with pytest.raises(ValueError, match=r"hostile\.ckpt .*execute code \(posix\.mkdir\)"):
            call()


def test_training_goes_through_the_same_door(toy_root, tmp_path, trap):
    config = hostile_config("network", toy_root, trap)
    path = write(tmp_path / "hostile.ckpt", config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"checkpoint={path}", f"paths.output_dir={tmp_path}", "steps=8"])
        with pytest.raises(ValueError, match="settings were others"):
            train.prepare(cfg)


@pytest.mark.parametrize("prefix", ["local://", "{run}/checkpoints/../../"])
@pytest.mark.slow
def test_resuming_removes_no_file_that_a_checkpoint_names(prefix, toy_root, tmp_path):
    """Lightning deletes the checkpoint that a better one replaces, by the path that stands in the file."""
    small = ("steps=2", "dataset.validation_queries=2")
    train.run(on_toy(toy_root, tmp_path / "first", *small))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work.txt").touch()
    content = torch.load(tmp_path / "first" / "checkpoints" / "last.ckpt", weights_only=True)
    named = prefix.format(run=tmp_path / "second") + (str(precious) if prefix.endswith("//") else "precious")
    states = [state for name, state in content["callbacks"].items() if name.startswith("EpochCheckpoint")]
    assert len(states) == 2
    for state in states:
        worst = torch.tensor(-1.0)
        state.update(best_model_path=named, kth_best_model_path=named, last_model_path=named)
        state.update(best_k_models={named: worst}, best_model_score=worst, kth_value=worst)
    torch.save(content, tmp_path / "hostile.ckpt")
    train.run(on_toy(toy_root, tmp_path / "second", *small, "steps=4", f"checkpoint={tmp_path / 'hostile.ckpt'}"))
    assert (precious / "work.txt").exists()
    assert {path.name for path in (tmp_path / "second" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_weights_of_other_libraries_are_read_without_code(monkeypatch, tmp_path, trap):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    load = partial(torch.load, tmp_path / "x", weights_only=False)
    monkeypatch.setattr(kornia.feature.DISK, "from_pretrained", lambda name: load())
    torch.save({"extractor": Runs(trap / "unpickled")}, tmp_path / "x")
    before = dict(os.environ)
    _load_network.cache_clear()
    with pytest.raises(ValueError, match=r"would need to execute code \(posix\.mkdir\)"):
        LocalFeatures("disk").load()
    assert dict(os.environ) == before
    torch.save(Runs(tmp_path / "allowed"), tmp_path / "y")
    torch.load(tmp_path / "y", weights_only=False)  # outside, what another program asks for is its own affair
    assert (tmp_path / "allowed").exists()


def test_settings_that_never_end_are_refused(tmp_path):
    endless = copy.deepcopy(UNET)
    endless["widths"] = endless
    with pytest.raises(ValueError, match="nested more than"):
        read_checkpoint(write(tmp_path / "hostile.ckpt", {"model": endless})).network()


def test_a_file_does_not_choose_where_indices_are_written(toy_root, tmp_path, trap):
    config = {"seed": 0, "weights": None, "model": UNET}
    one = {**data(toy_root), "index_dir": str(trap / "index")}
    mixture = {"_target_": "gnnet.data.mixture.MixtureData", "sources": {"a": one}, "num_workers": 0}
    for name, dataset in (("one", one), ("mixture", mixture)):
        path = write(tmp_path / f"{name}.ckpt", {**config, "dataset": dataset})
        evaluate.prepare(evaluating(path, tmp_path / name))
        assert contents(tmp_path / name / "index")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", "", "a\\b", "a\0"])
def test_a_file_does_not_choose_folders_by_the_names_of_sources(name, toy_root, tmp_path):
    """Results of each source are written into a folder of its name."""
    dataset = {"_target_": "gnnet.data.mixture.MixtureData", "sources": {name: data(toy_root)}}
    path = write(tmp_path / "hostile.ckpt", {"seed": 0, "weights": None, "model": UNET, "dataset": dataset})
    with pytest.raises(ValueError, match=r"hostile\.ckpt: config\.dataset\.sources has .*not supported"):
        evaluate.prepare(evaluating(path, tmp_path))


@pytest.mark.parametrize("target", ["gnnet.scenes.toy.load_toy", "gnnet.toy.town.load_toy", "gnnet.toy.town.read_toy"])
def test_a_file_has_no_town_rendered_and_none_replaced(target, toy_root, tmp_path, trap):
    scene = {"_target_": target, "_partial_": True}
    config = {"seed": 0, "weights": None, "model": UNET, "dataset": {**data(trap / "town"), "scene": scene}}
    path = write(tmp_path / "a.ckpt", config)
    with pytest.raises(FileNotFoundError, match=r"no toy town of the checkpoint's settings.*dataset=toy"):
        evaluate.prepare(evaluating(path, tmp_path))
    other = tmp_path / "another"
    other.mkdir()
    (other / "toy.json").write_text("{}")
    (other / "precious.txt").write_text("kept")
    before = contents(other)
    config["dataset"]["root"] = str(other)
    with pytest.raises(FileNotFoundError, match="no toy town"):
        evaluate.prepare(evaluating(write(path, config), tmp_path))
    assert contents(other) == before


PACKAGE = """
import os
from pathlib import Path
from torch import nn
from gnnet.models.unet import UNet
from gnnet.scenes.layouts.robotcar import load_robotcar

class Narrow(UNet):
    def __init__(self, width):
        super().__init__(widths=(width, 16), channels=4, strides=(2, 1))

def load_mine(root, *, on_bad="raise"):
    return load_robotcar(root, on_bad=on_bad)
"""


def test_a_package_of_the_users_own_is_allowed_by_the_user_alone(toy_root, tmp_path, monkeypatch):
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text("from mypackage.nets import Narrow\n")
    (tmp_path / "mypackage" / "nets.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    scene = {"_target_": "mypackage.nets.load_mine", "_partial_": True}
    model = {"_target_": "mypackage.Narrow", "width": 8}
    config = {"seed": 0, "weights": None, "model": model, "dataset": {**data(toy_root), "scene": scene}}
    config["allow"] = ["mypackage"]  # a file cannot allow it
    path = write(tmp_path / "a.ckpt", config)
    with pytest.raises(ValueError, match=r"names 'mypackage\.Narrow'.*allow=PACKAGE"):
        evaluate.prepare(evaluating(path, tmp_path))
    assert "mypackage" not in sys.modules
    try:
        for given in ("allow=mypackage", "allow=[other,mypackage]"):
            networks, found, *_ = evaluate.prepare(evaluating(path, tmp_path, given))
            assert type(networks["trained"]).__name__ == type(networks["untrained"]).__name__ == "Narrow"
            assert len(found.validations) == 1
        assert type(read_checkpoint(path).network(allow=("mypackage",))).__name__ == "Narrow"
        other = write(tmp_path / "b.ckpt", {"model": {"_target_": "elsewhere.Net"}})
        with pytest.raises(ValueError, match="importing elsewhere fails: No module named 'elsewhere'"):
            read_checkpoint(other).network(allow="elsewhere")
        with pytest.raises(FileNotFoundError, match=r"no\.gnmap"):
            Localizer.from_checkpoint(path, tmp_path / "no.gnmap", allow="mypackage")
        # What that package has imported is not its own, and other packages are as before.
        for name in ("mypackage.nets.os.system", "mypackage.nets.Path", "mypackage.nets.missing", "mypackages.Narrow"):
            with pytest.raises(ValueError, match=re.escape(name)):
                read_checkpoint(write(path, {"model": {"_target_": name}})).network(allow=("mypackage",))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
            del sys.modules[name]


@pytest.mark.slow
def test_what_may_be_named_is_networks_losses_readers_and_little_else():
    """Every name in every module of the package is tried: one that is allowed and is of another kind shows here."""
    others = set()
    for module in pkgutil.walk_packages(gnnet.__path__, "gnnet."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            members = [name, *(f"{name}.{member}" for member in dir(value))]
            for target in (f"{module.name}.{member}" for member in members):
                if loader._home(target, ()) is None:
                    continue
                try:
                    found = loader._find(target, "file", ())
                except ValueError:
                    continue
                if not (isinstance(found, type) and issubclass(found, nn.Module)):
                    others.add(target.rpartition(".")[2])
    readers = {f"load_{name}" for name in DATASETS if name != "toy"} | {"read_toy"}
    expected = {"CorrespondenceData", "MixtureData", "Photometric", "of_strength", "conditions", "warmup_cosine"}
    assert others == readers | expected


@pytest.mark.slow
def test_optimizers_of_torch_may_be_named():
    made = build({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5, "_convert_": "all"}, source="x")
    assert isinstance(made([nn.Parameter(torch.zeros(1))]), torch.optim.AdamW)
    for group in ("loss", "photometric", "optimizer", "scheduler", "model"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=["paths.output_dir=x"])
        build(OmegaConf.to_container(cfg[group], resolve=True), source="x")  # what train.py itself writes


def test_checkpoints_that_name_the_old_places_go_on(toy_root, tmp_path):
    """As the version before the rooms were set in order wrote them."""
    source = {**data(toy_root), "scene": {"_target_": "gnnet.scenes.robotcar.load_robotcar", "_partial_": True}}
    starts = {"_target_": "gnnet.localization.start_poses.StartPoses", "kind": "reference"}
    config = {
        "seed": 0, "weights": None, "steps": 4, "model": UNET, "starts": starts, "loss": None, "optimizer": None,
    }  # fmt: skip
    sources = {"a": source, "b": None}
    config["dataset"] = {"_target_": "gnnet.data.datamodule.MixtureData", "sources": sources, "num_workers": 0}
    path = write(tmp_path / "old.ckpt", config)
    cfg = evaluating(path, tmp_path)
    networks, found, *_ = evaluate.prepare(cfg)
    assert isinstance(networks["trained"], UNet)
    assert [(v.name, v.scene.name) for v in found.validations] == [("a", found.validations[0].scene.name)]
    assert found.validations[0].scene.dataset == "robotcar"
    assert check_resume(path, config).startswith("Going on from")
    for old, new in loader._MOVED.items():
        assert loader._find(new, "x", ()).__name__ == new.rpartition(".")[2]
        assert loader.with_current_names([{"a": {"_target_": old}}]) == [{"a": {"_target_": new}}]
    names = [loader._current(f"gnnet.scenes.{name}.load_{name}") for name in DATASETS]
    assert all(loader._home(name, ()) for name in names)


def test_resuming_knows_moved_names_for_the_same(monkeypatch, tmp_path):
    config = {"steps": 8, "model": UNET, "loss": {"_target_": "gnnet.losses.new.Loss", "weight": 1}, "optimizer": None}
    old = {**config, "loss": {"_target_": "gnnet.losses.old.Loss", "weight": 1}}
    path = write(tmp_path / "old.ckpt", old)
    with pytest.raises(ValueError, match=r"loss: .*gnnet\.losses\.old\.Loss"):
        check_resume(path, config)
    monkeypatch.setitem(loader._MOVED, "gnnet.losses.old.Loss", "gnnet.losses.new.Loss")
    assert "step 3 of 8" in check_resume(path, config)
    assert read_checkpoint(path).config["loss"] == old["loss"]


def test_a_setting_that_a_checkpoint_lacks_has_its_default_there(tmp_path):
    """So a run goes on after a version that added a setting."""
    config = {"steps": 8, "model": {**UNET, "confidence": False}, "loss": None, "optimizer": None}
    path = write(tmp_path / "old.ckpt", {**config, "model": UNET})
    assert "confidence" not in UNET and "step 3 of 8" in check_resume(path, config)
    with pytest.raises(ValueError, match=r"model: .*'confidence': True"):
        check_resume(path, {**config, "model": {**UNET, "confidence": True}})
    assert isinstance(read_checkpoint(path).network(trained=False), UNet)
