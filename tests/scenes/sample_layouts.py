"""A small folder of each dataset layout, and how it is read, for tests that damage it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gnnet.scenes.layouts.cmu import load_cmu
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.layouts.homography import load_homography
from gnnet.scenes.layouts.rgbd import load_rgbd
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.layouts.sevenscenes import load_sevenscenes
from gnnet.scenes.layouts.timelapse import load_timelapse
from gnnet.scenes.scene import Scene
from gnnet.toy.cmu_sample import write_cmu_sample
from gnnet.toy.town import TownSettings, load_toy, render_toy_town
from tests.scenes.layouts.test_colmap import as_binary
from tests.scenes.layouts.test_rgbd import write_sequence
from tests.scenes.layouts.test_sevenscenes import write_scene
from tests.scenes.layouts.test_timelapse import write_place

TOWN = {"places": 2, "frames": 2, "query_frames": 1, "image_size": 48, "conditions": ("overcast-reference", "night")}
STREET = {"places": 1, "frames": 2, "query_frames": 2, "image_size": 32, "conditions": ("overcast-reference", "night")}


def write_robotcar(root: Path) -> None:
    """A town with lists of queries and a left camera, which has the poses of the rear one."""
    render_toy_town(root, TownSettings(**TOWN), progress=False)
    home = root / "robotcar"
    for rear in [*home.glob("images/*/rear"), *home.glob("*trinsics/rear_*.txt")]:
        left = rear.with_name(rear.name.replace("rear", "left"))
        shutil.copytree(rear, left) if rear.is_dir() else shutil.copy(rear, left)
    folder = home / "3D-models/individual/queries_per_location"
    folder.mkdir()
    for place, path in enumerate(sorted(home.glob("images/night/rear/*.jpg")), start=1):
        (folder / f"queries_location_{place:03d}.txt").write_text(f"night/rear/{path.name}\n")


def write_street(root: Path) -> None:
    render_toy_town(root, TownSettings(**STREET), progress=False)


def write_merged(root: Path) -> None:
    render_toy_town(root, TownSettings(**TOWN), progress=False)
    shutil.rmtree(root / "robotcar/3D-models/individual")


def write_cmu(root: Path) -> None:
    write_cmu_sample(root, slices=(2,), frames=2, image_size=(48, 36))


def write_unpacked(root: Path) -> None:
    """A folder without correspondences, where covisible images are pairs."""
    write_cmu(root)
    shutil.rmtree(root / "cmu/correspondence")


def write_model(root: Path) -> None:
    town = root.with_name("town")
    if not town.exists():
        render_toy_town(town, TownSettings(**(TOWN | {"places": 1, "frames": 4})), progress=False)
    shutil.copytree(town / "robotcar/3D-models/individual/colmap_reconstructions/001_aligned", root / "sparse")
    shutil.copytree(town / "robotcar/images/overcast-reference", root / "images/overcast-reference")
    path = root / "sparse/images.txt"
    path.write_text(path.read_text().replace(".png", ".jpg"))


def write_binary_model(root: Path) -> None:
    write_model(root)
    as_binary(root / "sparse")


def write_rooms(root: Path) -> None:
    write_scene(root, train=(1, 3), test=(2,), frames=(0, 2))


def write_walk(root: Path) -> None:
    write_sequence(root / "000", count=3)
    write_sequence(root / "001", count=3)


def write_places(root: Path) -> None:
    """Places with JPEG and PNG images."""
    for number, path in enumerate([*write_place(root / "harbour", 4), *write_place(root / "square", 3, seed=1)]):
        if number % 2:
            with Image.open(path) as image:
                image.save(path.with_suffix(".png"))
            path.unlink()


class Layout(NamedTuple):
    """How a folder is written and read; `shared` matches files that all of the dataset needs."""

    write: Callable[[Path], None]
    read: Callable[..., Scene]
    shared: str


LAYOUTS = {
    "robotcar": Layout(
        write_robotcar, partial(load_robotcar, cameras=("left", "rear"), test_queries=True), r"rear_intrinsics",
    ),
    "robotcar, merged": Layout(write_merged, load_robotcar, r"intrinsics/"),
    "cmu": Layout(write_cmu, partial(load_cmu, places=1), r"(?!)"),
    "cmu, unpacked": Layout(write_unpacked, partial(load_cmu, places=1), r"sparse/"),
    "colmap": Layout(write_model, load_colmap, r"sparse/"),
    "colmap, binary": Layout(write_binary_model, load_colmap, r"sparse/"),
    "sevenscenes": Layout(write_rooms, partial(load_sevenscenes, gaps=(2,)), r"Split\.txt"),
    "rgbd": Layout(write_walk, partial(load_rgbd, gaps=(1,), places=1), r"(?!)"),
    "timelapse": Layout(write_places, load_timelapse, r"(?!)"),
    "homography": Layout(write_places, load_homography, r"(?!)"),
    "toy": Layout(write_street, partial(load_toy, **STREET), r"json|aligned|trinsics"),
}  # fmt: skip

# Folders of the images that lists, models and pairs name.
IMAGES_OF = {
    "robotcar": "robotcar/images", "robotcar, merged": "robotcar/images", "cmu": "cmu/images/slice2/database",
    "colmap": "images", "colmap, binary": "images",
}  # fmt: skip
