from types import SimpleNamespace

import pytest
from pytorch_lightning.loggers import CSVLogger

from gnnet.training.launch import draw_loss_curves


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
