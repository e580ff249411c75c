"""Queries of a scene and of a list."""

from __future__ import annotations

import shutil

import pytest

from gnnet.evaluation.given import QueryList, queries_of_list, queries_of_scene
from gnnet.scenes.layouts.robotcar import load_robotcar


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root)


def test_queries_of_a_list_have_their_own_cameras(scene, tmp_path):
    known = next(q for q in queries_of_scene(scene) if q.cam_from_world is not None)
    listed = QueryList({known.name: known.camera, "phone.jpg": known.camera}, tmp_path)
    (tmp_path / known.name).parent.mkdir(parents=True)
    shutil.copy(known.path, tmp_path / known.name)
    queries = {q.name: q for q in queries_of_list(listed, scene)[0]}
    assert list(queries) == sorted([known.name, "phone.jpg"])
    assert queries["phone.jpg"].cam_from_world is None and queries["phone.jpg"].path == tmp_path / "phone.jpg"
    assert queries[known.name].cam_from_world is None  # a copy is another file: who knows what it shows
    (tmp_path / "phone.jpg").symlink_to(known.path)
    same = next(q for q in queries_of_list(listed, scene)[0] if q.name == "phone.jpg")
    assert same.cam_from_world is not None and same.condition == known.condition and same.place == known.place


def test_where_all_images_are_references_each_is_a_query(scene):
    references = scene.with_conditions(["overcast-reference"])
    assert {q.name for q in queries_of_scene(references)} == set(references.images)
