"""train.py and evaluate.py as a user runs them, on a tiny toy town."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import evaluate
import train
from gnnet.data.images import read_image
from gnnet.evaluation.tables import read_table
from gnnet.localization.initial_pose import HybridPose, NearestPose
from gnnet.localization.localizer import Localizer
from gnnet.scenes.layouts.robotcar import load_robotcar

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.widths=[8,16,16]", "model.channels=8", "trainer=cpu", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "callbacks.progress=null", "loss=gn",
    "dataset.batch_size=2", "dataset.pairs_per_epoch=4", "dataset.correspondences=64", "dataset.crop=64",
    "dataset.validation_points=128", "dataset.validation_queries=6", "dataset.num_workers=0",
    "localizer.refiner.iterations=5", "starts.count=1", "steps=4",
]  # fmt: skip


def configure(output: Path, *overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(name, overrides=[*overrides, f"paths.output_dir={output}"])
    with open_dict(cfg):
        cfg.pop("hydra", None)
    return cfg


def on_toy(toy_root: Path, output: Path, *overrides: str) -> DictConfig:
    return configure(output, "dataset=robotcar", *SMALL_ROBOTCAR, f"dataset.root={toy_root}", *overrides)


# The tiny town is read as RobotCar Seasons: the toy loader would render another one of its own settings.
SMALL_ROBOTCAR = ["model=unet_small", *SMALL, "dataset.largest_side=null", "dataset.validation_fraction=0.34"]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("loss", options("loss"))
@pytest.mark.parametrize("model", options("model"))
@pytest.mark.slow
def test_every_model_composes_with_every_loss(tmp_path, model, loss):
    widths = ["model.widths=[4,8,8,8,8]"] if model == "unet" else []
    cfg = configure(tmp_path, f"model={model}", f"loss={loss}", *widths)
    network, term = instantiate(cfg.model, _convert_="all"), instantiate(cfg.loss, _convert_="all")
    pyramid = network(torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8))
    assert pyramid.strides == network.strides
    assert set(term.terms) == set(cfg.loss.terms)


GROUPS = ("optimizer", "scheduler", "localizer", "starts", "trainer", "logger", "callbacks")


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_option_composes_and_instantiates(tmp_path, group, option):
    cfg = configure(tmp_path, f"{group}={option}")
    if group in ("logger", "callbacks"):
        made = [instantiate(node, _convert_="all") for node in cfg[group].values() if "Wandb" not in node._target_]
        assert made
    elif group == "trainer":
        assert cfg.trainer.max_steps == cfg.steps
        if option in ("auto", "cpu"):
            assert instantiate(cfg.trainer, _convert_="all").max_steps == cfg.steps
    else:
        made = instantiate(cfg[group], _convert_="all")
        if group == "optimizer":
            optimizer = made([torch.nn.Parameter(torch.zeros(1))])
            assert isinstance(optimizer, torch.optim.Optimizer)
        if group == "scheduler":
            schedule = made(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
            assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)


@pytest.mark.parametrize("script", [train, evaluate])
def test_the_limit_on_megapixels_is_a_setting_of_both_scripts(tmp_path, script):
    with pytest.raises(ValueError, match="max_megapixels=0; expected a positive number"):
        script.prepare(configure(tmp_path, "max_megapixels=0", name=script.__name__))


@pytest.mark.parametrize("localizer", options("localizer"))
@pytest.mark.parametrize("retrieval", options("localizer/retrieval"))
@pytest.mark.slow
def test_every_localizer_takes_every_retrieval(tmp_path, monkeypatch, localizer, retrieval):
    (tmp_path / "pairs.txt").write_text("query.jpg reference.jpg\n")
    (tmp_path / "gps.txt").write_text("query.jpg 1 2 3\n")
    monkeypatch.setattr("gnnet.models.netvlad.load_netvlad", lambda path: torch.nn.Flatten())
    asked = {
        "netvlad": ["localizer.retrieval.network.path=x"],
        "pairs": [f"localizer.retrieval.file={tmp_path}/pairs.txt"],
        "prior": [f"localizer.retrieval.prior.file={tmp_path}/gps.txt", "localizer.retrieval.prior.radius=5"],
    }
    overrides = ["checkpoint=x", f"localizer={localizer}", f"localizer/retrieval={retrieval}"]
    cfg = configure(tmp_path, *overrides, *asked.get(retrieval, []), name="evaluate")
    made = instantiate(cfg.localizer, _convert_="all")
    assert made.retrieval.name and (made.retrieval.network is not None) == (retrieval == "netvlad")
    assert (made.refiner is not None) == (localizer in ("hybrid", "refine", "sparse_to_dense"))
    assert made.references == Localizer.references and made.distortion and not made.reference_camera


def test_the_localizer_of_python_is_that_of_the_configuration(tmp_path):
    cfg = configure(tmp_path, "checkpoint=x", "localizer=sparse_to_dense", name="evaluate")
    made, default = instantiate(cfg.localizer, _convert_="all"), Localizer()
    assert (made.pose, made.refiner) == (default.pose, default.refiner)
    assert type(made.retrieval) is type(default.retrieval)
    hybrid = configure(tmp_path, "checkpoint=x", "localizer=hybrid", name="evaluate")
    made = instantiate(hybrid.localizer, _convert_="all")
    assert (made.pose, made.refiner) == (HybridPose(), default.refiner)


def test_a_refiner_is_left_out_and_put_in(tmp_path):
    refined = configure(tmp_path, "checkpoint=x", "localizer=nearest", "localizer/refiner=default", name="evaluate")
    assert instantiate(refined.localizer, _convert_="all").refiner == Localizer().refiner
    plain = configure(tmp_path, "checkpoint=x", "localizer=sparse_to_dense", "localizer.refiner=null", name="evaluate")
    assert instantiate(plain.localizer, _convert_="all").refiner is None
    with pytest.raises(Exception, match="localizer=refine"):
        instantiate(configure(tmp_path, "localizer=nearest").callbacks.localization, _convert_="all")


@pytest.mark.parametrize("option", options("dataset"))
@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_every_dataset_composes(tmp_path, option, name):
    sources = ["+source@dataset.sources.a=colmap", "dataset.sources.a.root=x"]
    required = sources if option == "mixture" else ["dataset.root=x"]
    required = required + (["checkpoint=x"] if name == "evaluate" else [])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(name, overrides=[f"dataset={option}", *required, f"paths.output_dir={tmp_path}"])
    assert instantiate(cfg.dataset, _convert_="all").batch_size >= 1


@pytest.mark.parametrize("option", ["robotcar", "cmu"])
def test_the_large_datasets_mean_the_papers_network_and_schedule(tmp_path, option):
    cfg = configure(tmp_path, f"dataset={option}", "loss=gn")
    assert (cfg.model.widths, cfg.steps, cfg.candidates) == ([64, 128, 256, 512, 1024], 100_000, "all")
    assert cfg.trainer.max_steps == 100_000 and cfg.loss.terms.dmc.candidates == "all"
    assert (cfg.dataset.batch_size, cfg.dataset.crop, cfg.dataset.largest_side) == (1, None, 768)


def test_a_source_says_only_what_differs_from_all():
    common = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/source/base.yaml"))
    for option in set(options("source")) - {"base"}:
        own = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/source/{option}.yaml"))
        same = [key for key, value in own.items() if key in common and value == common[key]]
        assert not same, f"conf/source/{option}.yaml repeats {same} of base.yaml"


@pytest.mark.parametrize("option", options("experiment"))
def test_every_experiment_composes(tmp_path, option):
    roots = [] if option in ("photos", "real", "real_small") else ["dataset.root=x"]
    cfg = configure(tmp_path, f"experiment={option}", *roots)
    assert cfg.steps > 0 and instantiate(cfg.dataset, _convert_="all").batch_size > 0


REPORT = {
    "robotcar_all": ("robotcar", None), "robotcar_night": ("robotcar", ["night-all"]),
    "cmu_urban": ("cmu", "urban"), "cmu_suburban": ("cmu", "suburban"), "cmu_park": ("cmu", "park"),
}  # fmt: skip


@pytest.mark.parametrize("option", REPORT)
def test_the_reports_runs_have_its_hyper_parameters(tmp_path, option):
    reader, part = REPORT[option]
    cfg = configure(tmp_path, f"experiment={option}", "dataset.root=x")
    assert cfg.model._target_ == "gnnet.models.vgg.VGG16" and cfg.weights
    assert (cfg.optimizer._target_, cfg.optimizer.lr, cfg.optimizer.weight_decay) == ("torch.optim.AdamW", 1e-7, 0.05)
    assert (cfg.dataset.batch_size, cfg.dataset.correspondences) == (1, 1024)
    dmc, gn = cfg.loss.terms.dmc, cfg.loss.terms.gn
    assert set(cfg.loss.terms) == {"dmc", "gn"} and (dmc.weight, gn.weight) == (1.0, 0.5)
    assert (dmc.positive_margin, dmc.negative_margin, dmc.candidates) == (0.1, 1.0, "all")
    assert (dmc.hardest_start, dmc.hardest_min, dmc.hardest_decay) == (300, 5, 0.6)
    assert gn.second_weight == pytest.approx(2 / 7) and gn.vicinity == 1
    assert cfg.dataset.scene._target_.endswith(f"load_{reader}")
    assert cfg.dataset["conditions" if reader == "robotcar" else "slices"] == part


def last_validation(output: Path) -> dict[str, float]:
    with (output / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/converged"]]
    return {key: float(value) for key, value in rows[-1].items() if key.startswith("val/")}


@pytest.fixture(scope="module")
def finished_run(toy_root, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    report = train.run(on_toy(toy_root, output)).localization
    return output, report


@pytest.mark.slow
def test_train_leaves_table_figures_and_checkpoints(finished_run):
    output, report = finished_run
    assert {row.method for row in report.rows} == {"initial poses", "trained", "untrained", "grey values"}
    assert "night" in {row.condition for row in report.rows}
    assert read_table(output / "results.json") == report
    assert json.loads((output / "results.json").read_text())["settings"]["steps"] == 4
    names = {path.name for path in (output / "figures").glob("*.png")}
    assert {"losses.png", "convergence_basin.png", "overview.png"} <= names
    assert {"before_after_night.png", "matches_night.png", "features_night.png"} <= names
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    checkpoint = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4


@pytest.mark.slow
def test_losses_are_logged_by_part_and_level(finished_run):
    with (finished_run[0] / "logs" / "metrics.csv").open() as file:
        header = next(csv.reader(file))
    assert {"train/loss", "train/dmc", "train/dmc/stride8", "train/gn/stride2"} <= set(header)


@pytest.mark.slow
def test_evaluate_agrees_with_the_last_validation_of_training(finished_run, tmp_path):
    output, trained = finished_run
    logged = last_validation(output)
    checkpoint = output / "checkpoints" / "last.ckpt"
    overrides = ["localizer.refiner.iterations=5", "starts.count=1", f"checkpoint={checkpoint}"]
    report = evaluate.run(configure(tmp_path, *overrides, name="evaluate")).localization
    for line in report.rows:
        same = next(x for x in trained.rows if (x.method, x.condition) == (line.method, line.condition))
        assert line == same
        if line.method in ("trained", "initial poses"):
            prefix = "val" if line.condition == "all" else f"val/{line.condition}"
            suffix = "_before" if line.method == "initial poses" else ""
            assert logged[f"{prefix}/converged{suffix}"] == pytest.approx(line["converged"])
            assert logged[f"{prefix}/position_m{suffix}"] == pytest.approx(line["median_position_m"], rel=1e-5)
            assert logged[f"{prefix}/rotation_deg{suffix}"] == pytest.approx(line["median_rotation_deg"], rel=1e-5)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(finished_run, toy_root, tmp_path, capsys):
    # One epoch (2 of 4 steps), as a run killed there leaves it; then the rest from its checkpoint.
    train.run(on_toy(toy_root, tmp_path / "first", "+trainer.max_epochs=1"))
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    train.run(on_toy(toy_root, tmp_path / "second", f"checkpoint={checkpoint}"))
    assert "step 2 of 4" in capsys.readouterr().out
    whole, resumed = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (finished_run[0], tmp_path / "second")
    )
    assert resumed["global_step"] == whole["global_step"] == 4
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=0, atol=0)
    rates = [c["optimizer_states"][0]["param_groups"][0]["lr"] for c in (resumed, whole)]
    assert rates[0] == rates[1]
    scores = [
        next(state for name, state in c["callbacks"].items() if "val/score" in name)["best_model_score"]
        for c in (resumed, whole)
    ]
    assert scores[0] == scores[1]
    assert last_validation(tmp_path / "second") == pytest.approx(last_validation(finished_run[0]))


@pytest.mark.slow
def test_resuming_from_what_does_not_exist_or_fit_is_an_error(finished_run, toy_root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        train.run(on_toy(toy_root, tmp_path, f"checkpoint={tmp_path}/nowhere.ckpt"))
    checkpoint = finished_run[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"settings were others[\s\S]*loss"):
        train.run(on_toy(toy_root, tmp_path, f"checkpoint={checkpoint}", "loss=nce", "steps=8"))
    with pytest.raises(ValueError, match="done 4 steps already"):
        train.run(on_toy(toy_root, tmp_path, f"checkpoint={checkpoint}"))
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt is damaged"):
        train.run(on_toy(toy_root, tmp_path, f"checkpoint={tmp_path}/text.ckpt"))


@pytest.mark.slow
def test_learning_improves_localization(toy_root, tmp_path):
    settings = [
        "steps=150", "dataset.pairs_per_epoch=300", "dataset.correspondences=128", "dataset.crop=80",
        "model.widths=[16,32,48]", "model.channels=16", "optimizer.lr=0.003", "scheduler.warmup_steps=5",
        "loss=gn", "dataset.validation_queries=null",
        "starts.count=2", "starts.position=0.2", "starts.rotation=2", "photometric=off",
        "localizer.refiner.iterations=15",
    ]  # fmt: skip
    report = train.run(on_toy(toy_root, tmp_path, *settings)).localization
    of = {line.method: line for line in report.rows if line.condition == "all"}
    # Not against the start's median: with two places to learn from, which side of it 16 starts end on is chance.
    assert of["trained"]["median_position_m"] < 0.6 * of["untrained"]["median_position_m"]
    assert of["trained"]["converged"] > max(of["initial poses"]["converged"], of["untrained"]["converged"])
    assert math.isfinite(of["trained"]["median_rotation_deg"])


def call(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_sweep_of_two_process_jobs_leaves_one_folder_each(toy_root, tmp_path):
    sizes = [x for x in SMALL_ROBOTCAR if "validation_queries" not in x]
    sizes += ["trainer=ddp", "trainer.accelerator=cpu", "steps=2"]
    done = call(
        "train.py", "-m", "dataset.validation_queries=1,3", "dataset=robotcar", f"dataset.root={toy_root}", *sizes,
        "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {"0_validation_queries-1": 1, "1_validation_queries-3": 3}
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [*jobs, "multirun.yaml", "sweep.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs", "sweep"]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["index"]  # of the dataset, beside the runs
    for job, count in jobs.items():
        folder = tmp_path / "sweep" / job
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        report = read_table(folder / "results.json")
        assert report.settings["run"] == f"dataset.validation_queries={count}"
        logged = last_validation(folder)
        # One query, or three, on two processes: gathered, each counts once, as in the table of one process.
        everywhere = next(x for x in report.rows if (x.method, x.condition) == ("trained", "all"))
        assert everywhere["count"] == count
        assert logged["val/position_m"] == pytest.approx(everywhere["median_position_m"], rel=1e-4)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
@pytest.mark.slow
def test_jobs_in_processes_of_a_launcher_leave_the_same_and_one_that_fails_is_named(toy_root, tmp_path, launcher):
    done = call(
        "train.py", "-m", "weights=null,none.ckpt", "dataset=robotcar", f"dataset.root={toy_root}", *SMALL_ROBOTCAR,
        "trainer=ddp", "trainer.accelerator=cpu", "steps=2", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    sweep = tmp_path / "sweep"
    assert {path.name for path in sweep.glob("[!.]*")} == {
        "0_weights-null", "1_weights-none.ckpt", "multirun.yaml", "sweep.csv",
    }  # fmt: skip
    assert f"failed: {sweep}/1_weights-none.ckpt (none.ckpt is not a file" in done.stdout
    assert "1 of 2 jobs done" in done.stdout
    folder = sweep / "0_weights-null"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert read_table(folder / "results.json").settings["run"] == "weights=null"
    assert (folder / ".hydra" / "config.yaml").is_file() and len(list(sweep.rglob("results.json"))) == 1
    assert "weights=null,all" in (sweep / "sweep.csv").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "sweep"}


@pytest.mark.slow
def test_missing_data_ends_in_one_message(tmp_path):
    done = call("train.py", "dataset=robotcar", "loss=gn", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for hint in ("dataset.root", str(tmp_path / "data" / "robotcar"), "visuallocalization.net", "correspondence"):
        assert hint in done.stderr


@pytest.mark.cases
def test_files_that_are_missing_are_named_before_anything_is_read(tmp_path):
    missing = f"{tmp_path}/none.txt"
    pairs = ["localizer=nearest", "localizer/retrieval=pairs", f"localizer.retrieval.file={missing}"]
    cfg = configure(tmp_path, "checkpoint=none.ckpt", *pairs, name="evaluate")
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist; expected query reference"):
        evaluate.make(cfg.localizer)
    for given in ([f"poses={missing}"], [f"truth={missing}"], [f"queries={missing}", "images=."]):
        with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
            evaluate.run(configure(tmp_path, "checkpoint=none.ckpt", *given, name="evaluate"))
    with pytest.raises(ValueError, match="queries=FILE needs images=DIR"):
        evaluate.run(configure(tmp_path, "checkpoint=none.ckpt", f"queries={missing}", name="evaluate"))


@pytest.mark.cases
@pytest.mark.slow
def test_a_list_of_queries_is_not_passed_over(finished_run, tmp_path):
    run, _ = finished_run
    listed = tmp_path / "queries.txt"
    listed.write_text("a.jpg PINHOLE 96 96 60 60 48 48\n")
    given = [f"checkpoint={run}/checkpoints/best.ckpt", f"queries={listed}", f"images={tmp_path}"]
    with pytest.raises(ValueError, match="queries=FILE and truth=FILE need poses=FILE"):
        evaluate.run(configure(tmp_path, *given, name="evaluate"))


@pytest.mark.parametrize("mode", ["nearest", "sparse", "sparse_to_dense", "hybrid"])
@pytest.mark.slow
def test_queries_are_localized_on_a_map_with_one_command(finished_run, toy_root, tmp_path, mode):
    run, _ = finished_run
    fewer = ["localizer.refiner.iterations=5"] if mode in ("sparse_to_dense", "hybrid") else []
    done = evaluate.run(
        configure(
            tmp_path, f"checkpoint={run}/checkpoints/best.ckpt", f"localizer={mode}", f"paths.map_dir={tmp_path}/maps",
            "max_queries=4", "colmap_model=true", *fewer, name="evaluate",
        )
    )  # fmt: skip
    (result,) = done
    assert len(result.localizations) == 4
    assert {"poses.txt", "submission.txt", "localizations.jsonl", "report.html", "colmap"} <= {
        path.name for path in tmp_path.iterdir()
    }
    maps = list((tmp_path / "maps").glob("*.gnmap"))
    assert len(maps) == 1 + (mode == "hybrid")
    methods = {line.method for line in read_table(tmp_path / "localization.json").rows}
    expected = {"nearest": set(), "sparse": {"PnP"}, "sparse_to_dense": {"PnP", "refined"}}
    expected["hybrid"] = expected["sparse_to_dense"]
    assert methods == {"nearest"} | expected[mode]
    if mode != "nearest":
        return
    # The map stands in the README's ten lines, with the checkpoint that it was compiled with.
    localizer = Localizer.from_checkpoint(
        run / "checkpoints" / "best.ckpt", maps[0], pose=NearestPose(), refiner=None
    )
    image = next(i for i in load_robotcar(toy_root).images.values() if not i.is_reference)
    found = localizer.localize(read_image(image.path), image.camera)
    assert found.status == "localized" and found.cam_from_world is not None


@pytest.mark.parametrize(("script", "word"), [("train.py", "nce_gn"), ("evaluate.py", "checkpoint")])
@pytest.mark.slow
def test_help_lists_groups_and_options(tmp_path, script, word):
    done = call(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in ("gnnet", "dataset: ", "localizer: ", word):
        assert text in done.stdout


@pytest.mark.parametrize("given", [(), ("weights=gnnet-small", "checkpoint=last.ckpt")])
def test_evaluate_takes_either_weights_or_a_checkpoint(tmp_path, given):
    with pytest.raises(ValueError, match=r"either weights=NAME \(gnnet-small\) or checkpoint=FILE"):
        evaluate.prepare(configure(tmp_path, *given, name="evaluate"))


@pytest.mark.slow
def test_evaluate_takes_a_run_or_the_newest_one_as_training_does(finished_run, tmp_path):
    run = tmp_path / "runs" / "one"
    shutil.copytree(finished_run[0] / "checkpoints", run / "checkpoints")
    for given in ([f"checkpoint={run}"], ["checkpoint=last", f"paths.runs_dir={run.parent}"]):
        cfg = configure(tmp_path, *given, "localizer=nearest", name="evaluate")
        evaluate.prepare(cfg)
        assert cfg.checkpoint == str(run / "checkpoints" / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no run in .* has left checkpoints/last\.ckpt"):
        evaluate.prepare(configure(tmp_path, "checkpoint=last", f"paths.runs_dir={run / 'none'}", name="evaluate"))
    for given in ("devices=2", f"resume={tmp_path}"):
        with pytest.raises(ValueError, match=r"so do devices=N and resume=RUN; give it"):
            evaluate.prepare(configure(tmp_path, f"checkpoint={run}", given, name="evaluate"))


@pytest.mark.slow
def test_evaluate_with_two_processes_writes_what_one_writes_and_goes_on(finished_run, tmp_path):
    run, _ = finished_run
    shared = [f"checkpoint={run}", "localizer=nearest", f"paths.map_dir={tmp_path}/maps", "max_queries=3"]
    for devices in (1, 2):
        evaluate.run(configure(tmp_path / str(devices), *shared, f"devices={devices}", name="evaluate"))
    journal = tmp_path / "2" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    (tmp_path / "2" / "poses.txt").unlink()
    evaluate.run(configure(tmp_path / "else", *shared, f"resume={tmp_path / '2'}", name="evaluate"))
    assert not (tmp_path / "else").exists()
    for name in ("poses.txt", "submission.txt"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "2" / name).read_text()


@pytest.mark.slow
def test_weights_in_the_package_are_evaluated_on_a_dataset_that_is_given(tmp_path):
    street = ["weights=gnnet-small", "localizer=hybrid", f"paths.index_dir={tmp_path}", "baselines=false"]
    with pytest.raises(ValueError, match="no settings of a dataset"):
        evaluate.prepare(configure(tmp_path, *street, name="evaluate"))
    root = ROOT / "examples" / "lund_street"
    data = ["dataset=colmap", f"dataset.root={root}", f"queries={root / 'queries.txt'}", f"images={root / 'queries'}"]
    prepared = evaluate.prepare(configure(tmp_path, *street, *data, name="evaluate"))
    assert prepared.networks["trained"].strides == (16, 8, 2)
    assert sum(len(validation.scene.images) for validation in prepared.data.validations) == 12


@pytest.mark.slow
def test_training_starts_from_the_weights_in_the_package(tmp_path):
    network = train.build_network(configure(tmp_path, "model=gnnet_small", "weights=gnnet-small"))
    trained = evaluate.read_checkpoint("gnnet-small").network().state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())
