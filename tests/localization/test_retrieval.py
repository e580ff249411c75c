"""Ways to find references: by descriptor they are tested with the localizer, here the others by what they return."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gnnet.geometry.pose import Pose
from gnnet.localization.query import Query
from gnnet.localization.retrieval import (
    DescriptorRetrieval,
    IndexedRetrieval,
    InitialPoseRetrieval,
    OracleRetrieval,
    PairsRetrieval,
    rows_of,
)

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


@dataclass(eq=False)
class Described:
    """What an index is made of."""

    path: Path
    about: dict
    global_descriptors: np.ndarray


def test_an_index_finds_among_those_allowed_what_all_are_compared_for(tmp_path):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    descriptors = torch.nn.functional.normalize(torch.randn(500, 16, generator=generator), dim=1)
    descriptors[7] = torch.nan  # a reference that could not be read
    map = Described(tmp_path / "x.gnmap", {"network": "1"}, descriptors.numpy())
    some = torch.rand(500, generator=generator) < 0.5
    exact = DescriptorRetrieval()
    for allowed in (torch.ones(500, dtype=torch.bool), some, torch.arange(500) < 3):
        for query in descriptors[20:30] + 0.1 * torch.randn(10, 16, generator=generator):
            expected = exact._nearest(query, map, 10, allowed).tolist()
            for retrieval in (IndexedRetrieval(probes=89, few=0), IndexedRetrieval(few=500)):
                assert retrieval._nearest(query, map, 10, allowed).tolist() == expected
            found = IndexedRetrieval(probes=4, few=2)._nearest(query, map, 10, allowed)  # it may miss some
            assert allowed[found].all() and 7 not in found and len(found.unique()) == len(found)
    assert len(list(tmp_path.glob("x.gnmap.*.faiss"))) == 1
    other = Described(map.path, {"network": "2"}, descriptors.numpy())  # compiled anew in its place
    IndexedRetrieval(few=0)._nearest(descriptors[0], other, 1, some)
    assert len(list(tmp_path.glob("x.gnmap.*.faiss"))) == 2


def test_without_faiss_an_index_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    map = Described(tmp_path / "x.gnmap", {}, np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"pip install 'gnnet\[index\]'"):
        IndexedRetrieval(few=2)._nearest(torch.zeros(2), map, 1, torch.ones(4, dtype=torch.bool))


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
