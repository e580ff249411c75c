"""The dashboard that a script makes at wandb: its panels show what a run logs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from gnnet.training import workspace

TRAINING = Path(workspace.__file__).parent
LOGGED = [
    "val/score", "val/night/converged", "val/night/recall_0.25m_2deg", "val/day-dusk/matched_3px", "train/loss",
    "train/gn/stride8/converged", "train/gradient_norm", "lr-AdamW", "speed/pairs_per_s", "speed/waiting_for_data",
    "memory/host_gib", "train/broken_pairs_epoch", "train/skipped_steps",
]  # fmt: skip


@pytest.fixture
def panels():
    pytest.importorskip("wandb_workspaces")
    made = workspace.make_workspace("p", "e", ["night"])
    assert (made.project, made.entity) == ("p", "e")
    return [panel for section in made.sections for panel in section.panels]


def test_panels_show_what_a_run_logs(panels):
    shown = [panel.metric_regex or panel.y[0] for panel in panels[:-1]]
    shown = [getattr(metric, "name", metric) for metric in shown]
    assert shown == [workspace.as_regex(metric) for plots in workspace.PLOTS.values() for metric in plots.values()]
    # The same as in test_dashboard, which reads a run's.
    names = ("overview", "convergence_basin", "matches_night", "features_night", "before_after_night")
    assert panels[-1].media_keys == [f"pictures/{name}" for name in names]


def test_each_plot_has_a_name_that_training_logs():
    metrics = [metric for plots in workspace.PLOTS.values() for metric in plots.values()]
    for metric in metrics:
        assert any(re.fullmatch(workspace.as_regex(metric), name) for name in LOGGED), metric
    # The names above are those of the code that logs.
    code = "".join(path.read_text() for path in TRAINING.glob("*.py") if path.name != "workspace.py")
    code += (TRAINING.parents[1] / "conf/callbacks/default.yaml").read_text()
    for name in ("val/score", "gradient_norm", "broken_pairs", "skipped_steps", "pairs_per_s", "waiting_for_data",
                 "host_gib", "converged", "recall_", "matched_", "pictures/", "LearningRateMonitor"):  # fmt: skip
        assert name in code


def test_without_the_package_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit, match="pip install wandb-workspaces"):
        workspace.main(["--project", "p", "--entity", "e"])
