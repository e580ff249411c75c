"""The notebooks run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Where notebooks render their towns; one finds what another has rendered."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_notebook_runs(path, data, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    # Where the notebooks' paths lead, `../data` and the like, is a folder that the test leaves nothing behind in.
    root, folder = Path(__file__).parents[2], tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "examples").symlink_to(root / "examples")
    (tmp_path / "data").symlink_to(data)
    for cell in notebook.cells:  # a small town and a short training take seconds
        small = "load_toy(root, places=1, frames=3, query_frames=1, image_size=96)"
        cell.source = cell.source.replace("load_toy(root)", small).replace("steps = 80", "steps = 20")
    monkeypatch.setenv("PYTHONPATH", str(root))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in shown), "no figure is shown"
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "refined" in text
