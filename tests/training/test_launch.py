"""The command line, and the loss curves of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from pytorch_lightning.loggers import CSVLogger

from gnnet.training.launch import draw_loss_curves, quote_paths, refuse_several_processes


def values_of(argument: str) -> list:
    """What Hydra makes of one argument: its value, or all of a sweep."""
    [override] = OverridesParser.create().parse_overrides([argument])
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return [getattr(value, "text", value) for value in values]


@pytest.mark.cases
@pytest.mark.parametrize(
    "path",
    ["runs/0_loss=gn/checkpoints/best.ckpt", "data/Halle (Süd), 2024", "data/it's here", "data/[x]{y}", "data/a,b=c"],
)
def test_a_path_of_any_letters_is_taken(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for place in (path, str(tmp_path / path)):  # not there: then the program says so, not the parser of settings
        [argument] = quote_paths([f"checkpoint={place}"])
        assert values_of(argument) == [place]
    Path(path).mkdir(parents=True)
    for place in (path, str(tmp_path / path)):
        [flag, argument] = quote_paths(["-m", f"dataset.root={place}"])
        assert flag == "-m" and values_of(argument) == [place]
    monkeypatch.chdir(tmp_path / Path(path).parent)
    if not path.endswith("[x]{y}"):  # without a slash that is a list
        assert values_of(*quote_paths([f"dataset.root={Path(path).name}"])) == [Path(path).name]


@pytest.mark.cases
def test_each_path_of_a_sweep_is_quoted():
    [_, argument, plain] = quote_paths(["-m", "checkpoint=a/0_loss=gn/best.ckpt,b/x.ckpt", "loss=gn,nce"])
    assert values_of(argument) == ["a/0_loss=gn/best.ckpt", "b/x.ckpt"] and plain == "loss=gn,nce"


@pytest.mark.parametrize(
    "argument",
    ["loss=gn,nce", "dataset.conditions=[night,sun]", "checkpoint='a/b=c'", "a=choice(/x,/y)", "+s@d.s.a=colmap",
     "paths.output_dir=${paths.data_dir}/x=y", "--config-dir=a,b/c", "-m", "a/b=c", "m.widths=[8, 16]", "a={b: c/d}"],
)  # fmt: skip
def test_what_is_no_path_stays(argument):
    assert quote_paths([argument]) == [argument]


@pytest.mark.parametrize(
    ("log", "drawn"),
    [("step,train/loss\n10,1.5\n20,1.25\n", True), ("step,train/broken_pairs\n402,0\n", False), (None, False)],
)
def test_loss_curves_are_drawn_if_a_loss_was_logged(tmp_path, log, drawn):
    logger = CSVLogger(tmp_path, name="logs", version="")
    (tmp_path / "logs").mkdir()
    if log is not None:
        (tmp_path / "logs" / "metrics.csv").write_text(log)
    draw_loss_curves(SimpleNamespace(loggers=[logger]), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").exists() == drawn


def test_a_script_of_one_process_is_not_run_by_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_several_processes("evaluate.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"evaluate\.py runs on one process, and torchrun .* started 2"):
        refuse_several_processes("evaluate.py")
