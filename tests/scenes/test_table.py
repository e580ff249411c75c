"""Columns return what was packed, and selections agree with plain dicts and tuples."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, so3_exp
from gnnet.scenes.columns import Strings
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage


def random_pose(rng: np.random.Generator) -> Pose:
    return Pose(so3_exp(torch.from_numpy(rng.normal(size=3))), torch.from_numpy(rng.normal(size=3)))


def random_camera(rng: np.random.Generator) -> Camera:
    return Camera.from_colmap("OPENCV", 640, 480, rng.uniform(100, 200, 8), dtype=torch.float64)


def random_images(count: int = 60) -> dict[str, SceneImage]:
    """Each optional field is set or missing at random."""
    rng = np.random.default_rng(0)
    images = [random_image(i, rng) for i in range(count)]
    return {image.name: image for image in images}


def random_image(number: int, rng: np.random.Generator) -> SceneImage:
    def known(make):
        return make() if rng.random() < 0.5 else None

    def depth() -> Depth:
        camera, pose = known(lambda: random_camera(rng)), known(lambda: random_pose(rng))
        return Depth(Path(f"/depth/{number}.png"), camera, pose, scale=float(rng.choice([1000, 6553.5])))

    seen = int(rng.integers(0, 4))
    name = f"{'naïve' if number % 7 == 0 else 'plain'}/rear/{number * 7919 % 1000:03d}.jpg"
    return SceneImage(
        name=name,
        path=Path("/data") / name,
        condition=str(rng.choice(["reference", "night", "night-rain", "snow"])),
        place=f"p{rng.integers(5)}",
        camera=known(lambda: random_camera(rng)),
        cam_from_world=known(lambda: random_pose(rng)),
        is_reference=bool(rng.random() < 0.3),
        point_ids=known(lambda: rng.integers(0, 2**40, seen)),
        keypoints=known(lambda: rng.uniform(0, 4096, (seen, 2))),
        depth=known(depth),
    )


def random_pairs(images: dict[str, SceneImage], count: int = 100) -> tuple[Pair, ...]:
    rng, names = np.random.default_rng(1), list(images)
    return tuple(
        Pair(
            image_a=names[rng.integers(len(names))],
            image_b=names[rng.integers(len(names))],
            place=f"p{rng.integers(5)}",
            correspondences=Path(f"/mat/{i}.mat") if rng.random() < 0.5 else None,
            static=bool(rng.random() < 0.5),
            count=int(rng.integers(0, 2**40)),
        )
        for i in range(count)
    )


def assert_equal(found, expected) -> None:
    """Assert that every field is exactly equal, nested values included."""
    if expected is None or isinstance(expected, str | Path | bool | int | float):
        assert found == expected and type(found) is type(expected)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    else:
        assert type(found) is type(expected)
        for field in fields(expected):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))


@pytest.fixture(scope="module")
def images() -> dict[str, SceneImage]:
    return random_images()


@pytest.fixture(scope="module")
def pairs(images) -> tuple[Pair, ...]:
    return random_pairs(images)


@pytest.fixture(scope="module")
def scene(images, pairs) -> Scene:
    return Scene("random", images, pairs, groups={"dark": ("night", "night-rain")})


def test_cameras_of_several_models_come_back(tmp_path):
    """They share one column, and go back to COLMAP as the model that they were."""
    cameras = {
        "plain": Camera.from_colmap("PINHOLE", 64, 48, (50, 51, 32, 24), dtype=torch.float64),
        "bent": Camera.from_colmap("OPENCV", 64, 48, (50, 51, 32, 24, -0.1, 0.01, 0, 0), dtype=torch.float64),
        "fish": Camera.from_colmap("THIN_PRISM_FISHEYE", 64, 48, (50, 51, 32, 24, *[0.01] * 8), dtype=torch.float64),
    }
    images = {name: SceneImage(name, tmp_path / name, camera=camera) for name, camera in cameras.items()}
    scene = Scene("mixed", {**images, "unknown": SceneImage("unknown", tmp_path / "unknown")}, [])
    for name, camera in cameras.items():
        assert scene.images[name].camera.to_colmap() == camera.to_colmap()
    assert scene.images["unknown"].camera is None


def test_every_field_comes_back(scene, images, pairs):
    assert list(scene.images) == list(images) and len(scene.images) == len(images)
    for name, expected in images.items():
        assert_equal(scene.images[name], expected)
    for found, expected in zip(scene.images.values(), images.values(), strict=True):
        assert_equal(found, expected)
    assert [name for name, _ in scene.images.items()] == list(images)
    assert len(scene.pairs) == len(pairs)
    for i, expected in enumerate(pairs):
        assert_equal(scene.pairs[i], expected)
    for found, expected in zip(scene.pairs, pairs, strict=True):
        assert_equal(found, expected)


def test_references_are_those_that_a_map_can_hold_by_name(scene, images):
    def usable(image: SceneImage) -> bool:
        sees = image.depth is not None or (image.point_ids is not None and len(image.point_ids) > 0)
        return image.is_reference and image.camera is not None and image.cam_from_world is not None and sees

    expected = [image for _, image in sorted(images.items()) if usable(image)]
    found = scene.images.references()
    assert 0 < len(expected) < sum(image.is_reference for image in images.values())
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    assert found.names == [i.name for i in expected] and found.places == [i.place for i in expected]
    assert_equal(found.poses, Pose.stack([i.cam_from_world for i in expected]))
    assert_equal(found.cameras, Camera.stack([i.camera for i in expected]))
    assert [i.name for i in found[1:3]] == found.names[1:3]
    night = scene.with_places(["p1"]).images.references()
    assert night.names == [i.name for i in expected if i.place == "p1"] != []


def test_unknown_names_and_indices(scene):
    assert "fog/1.jpg" not in scene.images and 3 not in scene.images and scene.images.get("fog/1.jpg") is None
    with pytest.raises(KeyError, match="fog"):
        scene.images["fog/1.jpg"]
    with pytest.raises(IndexError):
        scene.pairs[len(scene.pairs)]
    night = scene.with_places({"p0"})
    left_out = next(name for name in scene.images if name not in set(night.images))
    assert left_out not in night.images
    with pytest.raises(KeyError):
        night.images[left_out]


def test_pairs_are_a_sequence(scene, pairs):
    assert scene.pairs == pairs and pairs == scene.pairs[:] and scene.pairs != pairs[1:]
    assert scene.pairs[-1] == pairs[-1] and scene.pairs[3:60:7] == pairs[3:60:7]
    assert bool(scene.pairs) and not scene.pairs[:0]
    shorter = replace(scene, pairs=scene.pairs[10:20])
    assert shorter.pairs == pairs[10:20] and shorter.with_places(shorter.places).pairs == pairs[10:20]


@pytest.mark.parametrize("conditions", [[], ["night"], ["snow", "night-rain"], ["dark"], ["dark", "snow"]])
def test_conditions_and_places_select_as_dicts_do(scene, images, pairs, conditions):
    wanted = set(conditions) | ({"night", "night-rain"} if "dark" in conditions else set())
    expected = {n: i for n, i in images.items() if i.is_reference or i.condition in wanted}
    found = scene.with_conditions(conditions)
    for places in ({"p0", "p1", "p2", "p3", "p4"}, {"p1", "p3"}, {"p9"}):
        kept = {n: i for n, i in expected.items() if i.place in places}
        part = found.with_places(places)
        assert list(part.images) == list(kept) == [i.name for i in part.images.values()]
        assert part.pairs == tuple(p for p in pairs if p.image_a in kept and p.image_b in kept)
        assert part.conditions == tuple(sorted({i.condition for i in kept.values()}))
        assert part.places == tuple(sorted({i.place for i in kept.values()}))
        assert part.images.columns is scene.images.columns  # nothing is copied


def test_pairs_of_other_images(scene, images, pairs):
    few = dict(list(images.items())[:20])
    part = replace(scene, images=few)  # its columns are not those that the pairs refer to
    assert part.pairs == pairs
    kept = part.with_places(part.places)
    assert kept.pairs == tuple(p for p in pairs if p.image_a in few and p.image_b in few)
    stray = replace(scene, pairs=(Pair("fog/1.jpg", next(iter(images)), "p0"),))
    assert stray.pairs[0].image_a == "fog/1.jpg" and len(stray.with_places(stray.places).pairs) == 0


def test_empty_scene():
    scene = Scene("empty", {}, ())
    assert list(scene.images.values()) == [] and list(scene.pairs) == [] and scene.places == () == scene.conditions


def test_malformed_images_are_explained(images):
    image = SceneImage("a", Path("a"), "day", "p", point_ids=np.arange(3), keypoints=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="image a observes 3 points at 2 keypoints"):
        Scene("x", {"a": image}, ())
    with pytest.raises(ValueError, match="image a stands under the name b"):
        Scene("x", {"b": image}, ())


def test_scenes_can_be_pickled_and_values_are_small(scene, images):
    copy = pickle.loads(pickle.dumps(scene))
    for name, expected in images.items():
        assert_equal(copy.images[name], expected)
    assert len(pickle.dumps([i.camera for i in scene.images.values()][1])) < 3000  # not the whole column


def test_any_string():
    strings = ["", "a", "ä/ö.jpg", "caf\udce9.jpg", "x" * 5000, ""]  # the fourth is no UTF-8
    packed = Strings.of(strings)
    assert list(packed) == strings and packed[4] == "x" * 5000
    assert packed.take(np.array([3, 0, 3])) == [strings[3], "", strings[3]]
    with pytest.raises(IndexError):
        packed[6]
