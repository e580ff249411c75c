"""A dashboard of wandb's for a project of runs: `python -m gnnet.training.workspace --project P [--entity E]`.

It needs an account, as the dashboard is kept at wandb, and `pip install 'gnnet[dashboard]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

# Title and metric of each line plot by section; a metric with a `*` stands for all names that fit.
PLOTS = {
    "Validation": {
        "score": "val/score", "converged": "val/*converged", "recall": "val/*recall_*", "matches": "val/*matched_3px",
    },
    "Losses": {"loss": "train/loss", "by part and level": "train/*/*", "gradient norm": "train/gradient_norm"},
    "Run": {
        "learning rate": "lr-*", "pairs a second": "speed/pairs_per_s",
        "share of time waiting for data": "speed/waiting_for_data", "memory [GiB]": "memory/*",
        "pairs that were broken": "train/broken_pairs*", "steps left out": "train/skipped_steps*",
    },
}  # fmt: skip
PICTURES = ("matches", "features", "before_after")  # of one query of each condition
STEP = "trainer/global_step"


def make_workspace(project: str, entity: str, conditions: Sequence[str] = ()) -> Any:
    """The dashboard, a `wandb_workspaces.workspaces.Workspace`; nothing is sent.

    Args:
        project: of the runs, `logger.wandb.project`.
        entity: user or team that the project belongs to.
        conditions: of the queries, whose pictures are shown beside the overview and the convergence basin.
    """
    import wandb_workspaces.reports.v2 as reports  # optional
    import wandb_workspaces.workspaces as workspaces  # optional

    def plot(title: str, metric: str) -> Any:
        if "*" not in metric:
            return reports.LinePlot(title=title, x=STEP, y=[metric])
        return reports.LinePlot(title=title, x=STEP, metric_regex=as_regex(metric))

    sections = [
        workspaces.Section(name=name, is_open=True, panels=[plot(*entry) for entry in plots.items()])
        for name, plots in PLOTS.items()
    ]
    names = ["overview", "convergence_basin", *(f"{kind}_{c}" for c in conditions for kind in PICTURES)]
    pictures = reports.MediaBrowser(title="pictures", media_keys=[f"pictures/{n}" for n in names], num_columns=2)
    sections.append(workspaces.Section(name="Pictures", is_open=True, panels=[pictures]))
    return workspaces.Workspace(name="gnnet", project=project, entity=entity, sections=sections)


def as_regex(metric: str) -> str:
    """The regular expression of a name in which `*` stands for anything."""
    return metric.replace("*", ".*")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gnnet.training.workspace", description=__doc__)
    parser.add_argument("--project", required=True, help="project of the runs (logger.wandb.project)")
    parser.add_argument("--entity", help="user or team that it belongs to; default: the account's own")
    parser.add_argument("--conditions", nargs="*", default=[], help="of the queries whose pictures are shown, as night")
    given = parser.parse_args(arguments)
    try:
        print(make_workspace(given.project, given.entity or _own_entity(), given.conditions).save().url)
    except ImportError:
        raise SystemExit("the dashboard needs a package that is not installed: pip install wandb-workspaces") from None


def _own_entity() -> str:
    import wandb  # slow to import

    return wandb.Api().default_entity or ""


if __name__ == "__main__":
    main()
