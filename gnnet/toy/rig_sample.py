"""A toy town as a rig of three cameras sees it: a COLMAP model as a map, and a drive in other weather to localize."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, so3_exp
from gnnet.scenes.formats.poses import write_pose_file
from gnnet.toy.camera import toy_camera
from gnnet.toy.layout import cam_from_world, in_world, write_colmap, write_image, write_lines
from gnnet.toy.light import WEATHERS, LitStreet, light_street, paint_street
from gnnet.toy.render import render_frame
from gnnet.toy.streets import build_street, drive
from gnnet.toy.town import CONDITIONS, REFERENCE, TownSettings
from gnnet.toy.truth import Observations, observe_points

# Degrees by which a camera looks to the right of the front camera, and its centre in that camera's frame in metres.
CAMERAS = {"front": (0.0, (0.0, 0.0, 0.0)), "left": (-40.0, (-0.4, 0.0, -0.2)), "right": (40.0, (0.4, 0.0, -0.2))}


@dataclass(frozen=True)
class RigSample:
    """Files of a rig sample.

    Args:
        map: folder of a COLMAP model and its photographs, whose references are of all cameras: `dataset.root`.
        images: folder of the photographs to localize.
        queries, rig, truth: their list, the rig's file, and the true poses.
    """

    map: Path
    images: Path
    queries: Path
    rig: Path
    truth: Path


def toy_rig() -> dict[str, Pose]:
    """`cam_from_rig` of the three cameras by name, float64; the front camera is where the rig is."""
    poses = {}
    for name, (degrees, center) in CAMERAS.items():
        rotation = so3_exp(torch.tensor([0.0, -np.radians(degrees), 0.0], dtype=torch.float64))
        poses[name] = Pose.from_center(rotation, torch.tensor(center, dtype=torch.float64))
    return poses


def write_rig_sample(root: str | Path, town: TownSettings, *, condition: str = "rain", instants: int = 2) -> RigSample:
    """Render two drives of the rig through each street of a town; the same settings give the same files.

    Args:
        root: folder to write to.
        town: the streets, and the number and size of the references of each camera in each.
        condition: weather of the drive that is to be localized.
        instants: photographs of each camera in each place that are to be localized.
    """
    root, camera = Path(root), toy_camera(town.image_size)
    sample = RigSample(root, root / "queries", root / "queries.txt", root / "rig_config.json", root / "truth.txt")
    model, width, height, parameters = camera.to_colmap()
    references: dict[str, Pose] = {}
    queries: dict[str, Pose] = {}
    seen = []
    for place in range(town.places):
        street = build_street(place, town.seed)
        painted = paint_street(street, np.random.default_rng([town.seed, place, 1]), coarseness=256 / town.image_size)
        rng = np.random.default_rng([town.seed, place, 2, CONDITIONS.index(REFERENCE)])
        on_drive = drive(frames=town.frames, reference_frames=town.frames, rng=rng)
        lit = light_street(painted, WEATHERS[REFERENCE], rng)
        poses, images = _photographs(lit, camera, on_drive, f"{place:03d}", rng)
        seen.append(in_world(street, observe_points(street, camera, Pose.stack(list(poses.values())), images)))
        for (name, pose), image in zip(poses.items(), images, strict=True):
            references[f"reference/{name}"] = cam_from_world(street, pose)
            write_image(root / "images" / "reference" / name, image)

        rng = np.random.default_rng([town.seed, place, 3, CONDITIONS.index(condition)])
        on_drive = drive(frames=instants, reference_frames=town.frames, rng=rng)
        lit = light_street(painted, WEATHERS[condition], rng)
        poses, images = _photographs(lit, camera, on_drive, f"{place:03d}", rng)
        for (name, pose), image in zip(poses.items(), images, strict=True):
            queries[name] = cam_from_world(street, pose)
            write_image(sample.images / name, image)
    matrices = Pose.stack(list(references.values())).matrix().numpy()
    write_colmap(root / "sparse", list(references), matrices, Observations.cat(seen), camera)
    write_lines(sample.queries, [" ".join(map(str, (n, model, width, height, *parameters))) for n in queries])
    write_pose_file(sample.truth, queries)
    cameras = [
        {"image_prefix": f"{name}/", "ref_sensor": True} if name == "front" else {
            "image_prefix": f"{name}/", "cam_from_rig_rotation": pose.quaternion().tolist(),
            "cam_from_rig_translation": pose.translation.tolist(),
        }
        for name, pose in toy_rig().items()
    ]  # fmt: skip
    sample.rig.write_text(json.dumps([{"cameras": cameras}], indent=2) + "\n")
    return sample


def _photographs(
    lit: LitStreet, camera: Camera, rig_from_place: Pose, place: str, rng: np.random.Generator
) -> tuple[dict[str, Pose], list[np.ndarray]]:
    """`camera_from_place` by name, and the images, that the rig takes where it has the poses `rig_from_place` (N,)."""
    poses = {
        f"{name}/{place}_{instant}.jpg": cam_from_rig @ rig_from_place[instant]
        for name, cam_from_rig in toy_rig().items() for instant in range(rig_from_place.shape[0])
    }  # fmt: skip
    return poses, [render_frame(lit, camera, pose, rng) for pose in poses.values()]
