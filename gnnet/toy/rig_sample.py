"""Photographs of a toy town by a rig of three cameras, with its `rig_config.json`, a query list and the true poses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gnnet.geometry.pose import Pose, so3_exp
from gnnet.scenes.formats.poses import write_pose_file
from gnnet.toy.camera import toy_camera
from gnnet.toy.layout import cam_from_world, write_image, write_lines
from gnnet.toy.light import WEATHERS, light_street, paint_street
from gnnet.toy.render import render_frame
from gnnet.toy.streets import build_street, drive
from gnnet.toy.town import TownSettings

# Degrees by which a camera looks to the right of the front camera, and its centre in that camera's frame in metres.
CAMERAS = {"front": (0.0, (0.0, 0.0, 0.0)), "left": (-40.0, (-0.4, 0.0, -0.2)), "right": (40.0, (0.4, 0.0, -0.2))}


@dataclass(frozen=True)
class RigSample:
    """Files of a rig sample: the folder of the images, the list of queries, the rig's file, and the true poses."""

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
    """Render one drive of the rig through each street of a town; the same settings give the same files.

    Args:
        root: folder to write to.
        town: settings of the town, whose map the images are to be localized on.
        condition: weather of the drive.
        instants: photographs of each camera in each place.
    """
    root, camera, rig = Path(root), toy_camera(town.image_size), toy_rig()
    model, width, height, parameters = camera.to_colmap()
    poses, lines = {}, []
    for place in range(town.places):
        street = build_street(place, town.seed)
        painted = paint_street(street, np.random.default_rng([town.seed, place, 1]), coarseness=256 / town.image_size)
        rng = np.random.default_rng([town.seed, place, 3, list(WEATHERS).index(condition)])
        rig_from_place = drive(frames=instants, reference_frames=town.frames, rng=rng)
        lit = light_street(painted, WEATHERS[condition], rng)
        for instant in range(instants):
            for name, cam_from_rig in rig.items():
                pose = cam_from_rig @ rig_from_place[instant]
                file = f"{name}/{place:03d}_{instant}.jpg"
                write_image(root / "images" / file, render_frame(lit, camera, pose, rng))
                poses[file] = cam_from_world(street, pose)
                lines.append(" ".join(map(str, (file, model, width, height, *parameters))))
    sample = RigSample(root / "images", root / "queries.txt", root / "rig_config.json", root / "truth.txt")
    write_lines(sample.queries, lines)
    write_pose_file(sample.truth, poses)
    cameras = [
        {"image_prefix": f"{name}/", "ref_sensor": True} if name == "front" else {
            "image_prefix": f"{name}/", "cam_from_rig_rotation": pose.quaternion().tolist(),
            "cam_from_rig_translation": pose.translation.tolist(),
        }
        for name, pose in rig.items()
    ]  # fmt: skip
    sample.rig.write_text(json.dumps([{"cameras": cameras}], indent=2) + "\n")
    return sample
