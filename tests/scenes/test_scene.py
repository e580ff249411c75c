"""The split of a scene by place, and the choice of conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from gnnet.scenes.scene import Pair, Scene, SceneImage


def make_scene(order) -> Scene:
    images = {
        f"{place}/{condition}": SceneImage(
            name=f"{place}/{condition}",
            path=Path("x.jpg"),
            condition=condition,
            place=f"p{place}",
            is_reference=condition == "reference",
        )
        for place in order
        for condition in ("reference", "night", "snow")
    }
    pairs = tuple(Pair(f"{p}/reference", f"{p}/{c}", f"p{p}") for p in order for c in ("night", "snow"))
    return Scene(name="streets", images=images, pairs=pairs)


def test_split_is_by_place_and_independent_of_listing_order():
    train, validation = make_scene(range(10)).split(0.3, seed=0)
    assert set(train.places) | set(validation.places) == {f"p{i}" for i in range(10)}
    assert not set(train.places) & set(validation.places)
    assert len(validation.places) == 3
    assert all(pair.image_a in train.images and pair.image_b in train.images for pair in train.pairs)
    again = make_scene(reversed(range(10))).split(0.3, seed=0)[1]
    assert again.places == validation.places
    # Known values: the split must be the same on every machine and in every version.
    assert validation.places == ("p0", "p3", "p6")
    assert make_scene(range(10)).split(0.3, seed=1)[1].places != validation.places


def test_a_single_place_cannot_be_split():
    with pytest.raises(ValueError, match="validation_root"):
        make_scene(range(1)).split(0.5, seed=0)


def test_conditions_are_chosen_and_references_stay():
    scene = make_scene(range(3)).with_conditions(["night"])
    assert scene.conditions == ("night", "reference")
    assert [pair.image_b for pair in scene.pairs] == ["0/night", "1/night", "2/night"]
    with pytest.raises(ValueError, match=r"fog.*it has night, reference, snow"):
        make_scene(range(3)).with_conditions(["fog"])
