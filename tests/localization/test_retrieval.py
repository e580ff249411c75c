"""Ways to find references: by descriptor they are tested with the localizer, here the others by what they return."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gnnet.geometry.pose import Pose
from gnnet.localization.query import Query
from gnnet.localization.retrieval import InitialPoseRetrieval, OracleRetrieval, PairsRetrieval, rows_of

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


def at(*x: float) -> Pose:
    """Poses of cameras at x metres on the x axis."""
    rotation = torch.eye(3, dtype=torch.float64).expand(len(x), 3, 3)
    return Pose.from_center(rotation, torch.tensor([[value, 0, 0] for value in x], dtype=torch.float64))


@pytest.fixture
def town():
    """What retrieval reads of a map of four references at 0, 1, 2 and 3 m."""
    rows = {name: row for row, name in enumerate(NAMES)}
    return SimpleNamespace(names=NAMES, rows=rows, poses=at(0, 1, 2, 3), depth=10.0)


def query(name: str = "q.jpg", **known) -> Query:
    return Query(name, None, None, None, None, **known)


@pytest.mark.parametrize(("retrieval", "key"), [(OracleRetrieval(), "truth"), (InitialPoseRetrieval(), "initial")])
def test_the_references_nearest_to_a_pose(town, retrieval, key):
    pose = at(1.9)[0]
    assert retrieval.find(query(**{key: pose}), town, 3).tolist() == [2, 1, 3]
    assert retrieval.find(query(**{key: pose}, itself="c.jpg"), town, 3).tolist() == [1, 3, 0]
    assert retrieval.find(query("c.jpg", **{key: pose}), town, 3).tolist() == [2, 1, 3]  # another image of that name
    assert retrieval.find(query(**{key: pose}), town, 9).tolist() == [2, 1, 3, 0]
    other = {"truth": "initial", "initial": "truth"}[key]
    assert retrieval.find(query(**{other: pose}), town, 3).shape == (0,)


def test_the_references_that_a_file_lists(town, tmp_path):
    lines = ["q.jpg d.jpg", "q.jpg unknown.jpg", "q.jpg a.jpg", "q.jpg d.jpg", "q.jpg b.jpg", "b.jpg b.jpg"]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    retrieval = PairsRetrieval(tmp_path / "pairs.txt")
    assert retrieval.find(query(), town, 2).tolist() == [3, 0]
    for name in ("b.jpg", "unlisted.jpg"):  # its own image is no reference
        assert retrieval.find(query(name, itself=name), town, 2).shape == (0,)
    with pytest.raises(FileNotFoundError, match="none"):
        PairsRetrieval(tmp_path / "none")


def test_names_become_rows_in_their_order_each_once(town):
    names = ["c.jpg", "q.jpg", "a.jpg", "c.jpg", "d.jpg"]
    assert rows_of(names, query(), town, 9).tolist() == [2, 0, 3]
    assert rows_of(names, query(itself="a.jpg"), town, 2).tolist() == [2, 3]
    assert rows_of(["db/c.jpg", "db/none.jpg", "db/a.jpg"], query("a.jpg"), town, 9).tolist() == [2, 0]
