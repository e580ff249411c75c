"""Localize queries with a trained network: `python evaluate.py checkpoint=PATH`, see `python evaluate.py --help`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gnnet.data.datamodule import CorrespondenceData
from gnnet.evaluation.comparison import compare_networks, draw_basin, grey_values_like, make_report
from gnnet.evaluation.examples import draw_examples
from gnnet.evaluation.report import Report, print_report, write_results
from gnnet.localization.localizer import Localizer, StartPoses
from gnnet.models.weights import load_weights
from gnnet.training.checkpoints import read_checkpoint


def run(cfg: DictConfig) -> Report:
    """Evaluate a checkpoint on the validation queries of a dataset, the one that it was trained on by default.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit, see `prepare`.
    """
    return evaluate(cfg, *prepare(cfg))


def prepare(cfg: DictConfig) -> tuple[dict[str, nn.Module], CorrespondenceData, int]:
    """The networks by name, the data, and how many steps the checkpoint was trained for.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit.
    """
    checkpoint = read_checkpoint(cfg.checkpoint)
    trained_with = OmegaConf.create(checkpoint["config"])
    pl.seed_everything(trained_with.seed, workers=True, verbose=False)
    networks = {"trained": instantiate(trained_with.model, _convert_="all")}
    load_weights(networks["trained"], cfg.checkpoint)
    if cfg.baselines:
        pl.seed_everything(trained_with.seed, workers=True, verbose=False)
        networks["untrained"] = instantiate(trained_with.model, _convert_="all")
        if trained_with.weights is not None:
            load_weights(networks["untrained"], trained_with.weights)
    data = instantiate(cfg.get("dataset") or trained_with.dataset, _convert_="all")
    data.setup("validate")
    return networks, data, checkpoint["global_step"]


def evaluate(cfg: DictConfig, networks: Mapping[str, nn.Module], data: CorrespondenceData, steps: int) -> Report:
    """Localize and report with what `prepare` made."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    return evaluate_networks(
        networks,
        data,
        localizer=instantiate(cfg.localizer, _convert_="all"),
        starts=instantiate(cfg.starts, _convert_="all"),
        device=torch.device(device),
        output=Path(cfg.paths.output_dir),
        settings={"checkpoint": str(cfg.checkpoint), "steps": steps},
        baselines=cfg.baselines,
    )


def evaluate_networks(
    networks: Mapping[str, nn.Module],
    data: CorrespondenceData,
    *,
    localizer: Localizer,
    starts: StartPoses,
    device: torch.device,
    output: Path,
    settings: dict,
    baselines: bool = True,
) -> Report:
    """Localize the validation queries with every network: print the table, write `results.json` and figures.

    Args:
        networks: by name, `trained` among them; pictures are drawn with that.
        data: set up.
        localizer, starts: how refinement runs and where from.
        device: where.
        output: folder to write into.
        settings: to stand in the report.
        baselines: also evaluate raw grey values.
    """
    if baselines:
        networks = {**networks, "grey values": grey_values_like(networks["trained"])}
    comparison = compare_networks(
        networks,
        data.all_queries(),
        localizer=localizer,
        starts=starts,
        conditions=data.queries.conditions,
        device=device,
    )
    title = f"Localization on {data.queries.scene.name}: {len(data.queries)} queries, {describe(starts)}"
    report = make_report(comparison, title=title, settings=settings)
    write_results(report, output / "results.json")
    draw_basin(comparison, output / "figures" / "convergence_basin.png")
    samples = [batch.to(device) for batch in data.queries.one_of_each_condition()]
    farthest = replace(starts, exact=True)
    draw_examples(networks["trained"], samples, output / "figures", localizer=localizer, starts=farthest)
    print_report(report)
    print(f"results.json, figures and logs are in {output}", flush=True)
    return report


def describe(starts: StartPoses) -> str:
    """Where refinement starts from, in words."""
    if starts.kind == "reference":
        return "started at the reference's pose"
    return f"started up to {starts.position:g} m and {starts.rotation:g}° off"


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        prepared = prepare(cfg)
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # what the user can mend; the message says how
        raise SystemExit(f"\n{error}") from error
    evaluate(cfg, *prepared)


if __name__ == "__main__":
    main()
